"""The embedding network, and how a run's description of it becomes one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from npair.networks import NetworkError, efficientnet_lite, pretrained
from npair.networks.compact import CompactResidual
from npair.networks.efficientnet_lite import EfficientNetLite, load_weights

EMBEDDING_DIM = 128

# What a run's config.json keeps to build its network again: "name" and "views" and,
#   of compact: "width";
#   of an EfficientNet-Lite: "weights", the SHA-256 of the weights it started from;
#   of a transformers model: "architecture" (its configuration), "mean" and "std".
Description = dict[str, Any]


class EmbeddingLayer(nn.Linear):
    """Power normalisation, x -> sign(x) |x|^power, and a linear layer.

    Perronnin, Sanchez and Mensink, Improving the Fisher Kernel for Large-Scale Image
    Classification, ECCV 2010. While the loss trains the layer, the power is 1, which changes
    nothing.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels, EMBEDDING_DIM)
        self.power = nn.Buffer(torch.ones(()))
        self.register_load_state_dict_pre_hook(_default_power)  # type: ignore[no-untyped-call]

    def forward(self, x: Tensor) -> Tensor:
        """Features [N, channels] -> embeddings [N, EMBEDDING_DIM]."""
        return super().forward(self.normalised(x))

    def normalised(self, x: Tensor) -> Tensor:
        """Features [N, channels] -> the input of the linear layer, of the same shape."""
        return x.sign() * x.abs() ** self.power


def _default_power(_: nn.Module, state: dict[str, Any], prefix: str, *_others: Any) -> None:
    state.setdefault(prefix + "power", torch.ones(()))  # older weights have none


class EmbeddingNetwork(nn.Module):
    """A backbone and an embedding layer; takes raw pixels and standardises them itself."""

    def __init__(
        self,
        backbone: nn.Module,
        views: int = 1,
        *,
        mean: tuple[float, ...] = pretrained.MEAN,
        std: tuple[float, ...] = pretrained.STD,
    ) -> None:
        """backbone: standardised photos [N, 3, H, W] -> features [N, channels].

        mean, std: of RGB values from 0 to 1.
        views: 1 embeds the photo; 2 averages the embeddings of the photo and of its central part,
        3/4 as wide and high, mirrored.
        """
        super().__init__()
        self.views = views
        self.mean = nn.Buffer(255 * torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.std = nn.Buffer(255 * torch.tensor(std).view(3, 1, 1), persistent=False)
        self.backbone = backbone
        with torch.inference_mode():
            channels = backbone.eval()(torch.zeros(1, 3, 64, 64)).shape[1]
        self.embedding = EmbeddingLayer(channels)
        self.train()

    def forward(self, photos: Tensor) -> Tensor:
        """RGB photos [N, H, W, 3], 0 to 255, uint8 or float -> fp32 [N, 128], not normalised."""
        features = self.features(photos)
        if self.views == 2:
            margin = photos.shape[1] // 8
            centre = photos[:, margin:-margin, margin:-margin].flip(2)
            features = (features + self.features(centre)) / 2
        embeddings: Tensor = self.embedding(features)
        return embeddings

    def features(self, photos: Tensor) -> Tensor:
        """Compute the input of the embedding layer for one view: [N, H, W, 3] -> [N, channels]."""
        standardised = (photos.permute(0, 3, 1, 2).float() - self.mean) / self.std
        features: Tensor = self.backbone(standardised)
        return features


def new_network(
    name: str, width: int, views: int = 1, weights: str = ""
) -> tuple[EmbeddingNetwork, Description]:
    """Create a network to train, and its description.

    name: ``compact``, which starts from random weights; one of efficientnet_lite.VARIANTS; or a
    model of transformers: its name on the Hugging Face hub or a local folder.
    width: of ``compact``.
    weights: a file for an EfficientNet-Lite to start from, instead of its package's.
    Raises: NetworkError if weights cannot be loaded or do not fit, or if transformers is not
    installed or has no such vision model.
    """
    if weights and name not in efficientnet_lite.VARIANTS:
        variants = ", ".join(efficientnet_lite.VARIANTS)
        raise NetworkError(f"--weights is for {variants}; {name} has its own or none")
    description: Description = {"name": name, "views": views}
    if name == "compact":
        description["width"] = width
        return build_network(description), description
    if name in efficientnet_lite.VARIANTS:
        lite = EfficientNetLite(name)
        description["weights"] = load_weights(lite, name, Path(weights) if weights else None)
        return _assemble(lite, description), description
    backbone, details = pretrained.download(name)
    description |= details
    return _assemble(backbone, description), description


def build_network(description: Description) -> EmbeddingNetwork:
    """Build the network of a description, with random weights.

    Raises: NetworkError if it needs transformers, which is not installed.
    """
    if description["name"] == "compact":
        backbone: nn.Module = CompactResidual(description["width"])
    elif description["name"] in efficientnet_lite.VARIANTS:
        backbone = EfficientNetLite(description["name"])
    else:
        backbone = pretrained.rebuild(description["architecture"])
    return _assemble(backbone, description)


def _assemble(backbone: nn.Module, description: Description) -> EmbeddingNetwork:
    lite = description["name"] in efficientnet_lite.VARIANTS
    standard = efficientnet_lite if lite else pretrained
    return EmbeddingNetwork(
        backbone,
        description["views"],
        mean=description.get("mean", standard.MEAN),
        std=description.get("std", standard.STD),
    )


def multiply_adds(network: EmbeddingNetwork, size: int) -> int:
    """Count the multiply-adds for one photo of size x size pixels."""
    training = network.training
    photo = torch.zeros(1, size, size, 3, dtype=torch.uint8, device=network.mean.device)
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        network.eval()(photo)
    network.train(training)
    return int(counter.get_total_flops()) // 2  # the counter takes a multiply-add for two


@torch.inference_mode()
def embed(
    network: nn.Module,
    pixels: npt.NDArray[np.uint8],
    rows: npt.NDArray[np.int64] | None = None,
    batch: int = 64,
) -> npt.NDArray[np.float32]:
    """Embed decoded photos in fp32: uint8 [m, size, size, 3] -> unit-length float32 [n, 128].

    rows: int64 [n], the photos to embed, by default all.
    """
    training = network.training
    network.eval()
    device = next(network.parameters()).device
    rows = np.arange(len(pixels)) if rows is None else rows
    embeddings = [
        network(torch.from_numpy(pixels[rows[start : start + batch]]).to(device))
        for start in range(0, len(rows), batch)
    ]
    network.train(training)
    return F.normalize(torch.cat(embeddings)).cpu().numpy()
