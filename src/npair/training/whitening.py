"""The embedding layer that a trained network ends with, in closed form.

The N-pair loss trains the backbone, and an embedding layer with it. A better layer follows from the
features of all train photos. Their square roots (Perronnin, Sanchez and Mensink, ECCV 2010) keep a
few strong features from outweighing all others. Within-class covariance normalisation (Hatch,
Kajarekar and Stolcke, Interspeech 2006) lets photos of one class differ by the same in all
directions. Principal components keep what differs most.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from npair.data.dataset import Photos
from npair.data.pixels import Pixels
from npair.networks.network import EmbeddingNetwork, embed

# The variance that is added to each direction, as a multiple of the mean variance within classes.
# With 1, the layer finds a little more of the classes that it was fitted to, and less of others.
SHRINKAGE = 3.0
# The weight of differences between classes of one kind, where those within a class have 1. With 0,
# classes of one kind end up as far apart as any others; with 0.1, more photos of two such classes
# are taken for the same.
SIBLINGS = 0.03
SQUARE_ROOT = 0.5
CHUNK = 4096  # photos whose features are in memory at once


def fit_embedding(network: EmbeddingNetwork, pixels: Pixels, train: Photos) -> None:
    """Fit a network's embedding layer to train photos, in place.

    Photos with one fine label are a class, and their coarse label is its kind.
    """
    layer = network.embedding
    layer.power.fill_(SQUARE_ROOT)
    rows = pixels.of(train)
    _, first, index, counts = np.unique(
        train.fine, return_index=True, return_inverse=True, return_counts=True
    )
    sums = np.zeros((len(counts), layer.in_features))
    products = np.zeros((layer.in_features, layer.in_features))
    inputs: list[Tensor] = []
    hook = layer.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0]))
    for start in range(0, len(rows), CHUNK):
        embed(network, pixels.array, rows[start : start + CHUNK])
        features = layer.normalised(torch.cat(inputs)).cpu().double().numpy()
        np.add.at(sums, index[start : start + CHUNK], features)
        products += features.T @ features
        inputs.clear()
    hook.remove()
    weight, bias = whitening(counts, sums, products, train.coarse[first])
    kept = min(layer.out_features, len(weight))  # a narrow backbone has fewer components
    with torch.no_grad():
        layer.weight.zero_()[:kept] = torch.from_numpy(weight[:kept])
        layer.bias.zero_()[:kept] = torch.from_numpy(bias[:kept])


def whitening(
    counts: npt.NDArray[np.int64],
    sums: npt.NDArray[np.float64],
    products: npt.NDArray[np.float64],
    kinds: npt.NDArray[np.int64],
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return weight [channels, channels] and bias [channels] of the layer that whitens features.

    Its outputs are principal components, the largest first.
    counts: photos of each class, [k]. sums: of their features, [k, channels].
    products: the sum of all features' outer products, [channels, channels].
    kinds: the kind of each class, [k].
    """
    photos = counts.sum()
    mean = sums.sum(axis=0) / photos
    of_kind = kinds[:, None] == np.unique(kinds)
    of_classes = _scatter(counts, sums)
    of_kinds = _scatter(counts @ of_kind, of_kind.T @ sums)
    total = products / photos - np.outer(mean, mean)
    within = (products - of_classes) / photos
    shrinkage = SHRINKAGE * np.trace(within) / len(within)
    within += SIBLINGS * (of_classes - of_kinds) / photos
    variances, directions = np.linalg.eigh(within)
    variances = np.maximum(variances, 0)  # rounding
    # If all photos of each class are alike, directions are left nearly as they are.
    scaled = directions / np.sqrt(variances + (shrinkage or 1.0))
    _, components = np.linalg.eigh(scaled.T @ total @ scaled)
    weight = (scaled @ components[:, ::-1]).T
    return weight, -weight @ mean


def _scatter(
    counts: npt.NDArray[np.int64], sums: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """Sum the outer products of each group's mean, once for each photo: [channels, channels]."""
    return sums.T @ (sums / counts[:, None])
