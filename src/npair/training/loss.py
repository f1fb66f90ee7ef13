"""The multi-class N-pair losses.

Sohn, Improved Deep Metric Learning with Multi-class N-pair Loss Objective, NeurIPS 2016.

All return a scalar and compute products and log-sum-exp in fp32, even under autocast: bf16's
8 bits are too coarse for the differences that the exponential takes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class NPairLoss(nn.Module):
    """N-pair-mc with the embedding-norm penalty, symmetric in anchors and positives.

    For N pairs of N distinct classes, with s_ij = a_i . p_j, N-pair-mc (section 3.2) is

        L(a, p) = 1/N sum_i log(1 + sum_{j != i} exp(s_ij - s_ii)),

    which is the cross-entropy of row i of the N x N products against target i. This loss is
    (L(a, p) + L(p, a)) / 2 + norm_penalty * mean(|f|^2) over all 2N embeddings f. The second
    direction, which is not in the paper, makes 2N tuplets of the same 2N embeddings. Embeddings
    are not normalised: with cosines the loss could not fall below log(1 + (N - 1) exp(-2)). The
    penalty (section 3.2.2) bounds their norms.

    Coarse labels smooth the targets, which is not in the paper either: row i gives the share
    coarse_smoothing of its target in equal parts to the other classes with its coarse label, if
    there are any, so that a product's nearest neighbours are at least of its kind.
    """

    def __init__(self, *, norm_penalty: float, coarse_smoothing: float = 0.0) -> None:
        super().__init__()
        self.norm_penalty = norm_penalty
        self.coarse_smoothing = coarse_smoothing

    def forward(self, anchors: Tensor, positives: Tensor, coarse: Tensor | None = None) -> Tensor:
        """anchors, positives: [N, D], any float dtype; row i of both is of class i.

        coarse: int64 [N], the classes' coarse labels, by default all different.
        Raises: ValueError unless N >= 2.
        """
        anchors, positives = _checked_pairs(anchors, positives)
        targets = torch.eye(len(anchors), device=anchors.device)
        if coarse is not None:
            siblings = (coarse[:, None] == coarse).float() - targets
            count = siblings.sum(dim=1, keepdim=True)
            smoothing = self.coarse_smoothing * (count > 0)
            targets = (1 - smoothing) * targets + smoothing * siblings / count.clamp(min=1)
        penalty = self.norm_penalty * _mean_squared_norm(anchors, positives)
        return _multi_class(anchors, positives, targets) + penalty


class CosineNPairLoss(nn.Module):
    """N-pair-mc on s_ij = cos(a_i, p_j) / temperature, symmetric, without a penalty.

    Known as NT-Xent (Chen et al., SimCLR, ICML 2020), but only the positives of other pairs are
    negatives.
    """

    def __init__(self, *, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature

    def forward(self, anchors: Tensor, positives: Tensor) -> Tensor:
        """anchors, positives: [N, D], any float dtype; row i of both is of class i.

        Raises: ValueError unless N >= 2.
        """
        anchors, positives = _checked_pairs(anchors, positives)
        targets = torch.eye(len(anchors), device=anchors.device)
        return _multi_class(
            F.normalize(anchors) / self.temperature, F.normalize(positives), targets
        )


class TupletLoss(nn.Module):
    """The (N+1)-tuplet loss with the norm penalty: each anchor has negatives of its own.

    Section 3.1, for tuplets {a_i, p_i, n_i1, ..., n_iK}:

        L = 1/N sum_i log(1 + sum_k exp(a_i . n_ik - a_i . p_i)),

    plus norm_penalty * mean(|f|^2) over all embeddings f. A batch takes N (N + 1) photos.
    """

    def __init__(self, *, norm_penalty: float) -> None:
        super().__init__()
        self.norm_penalty = norm_penalty

    def forward(self, anchors: Tensor, positives: Tensor, negatives: Tensor) -> Tensor:
        """anchors, positives: [N, D]; negatives: [N, K, D], none in row i of class i.

        Raises: ValueError for other shapes.
        """
        if (
            negatives.ndim != 3
            or negatives.shape[::2] != anchors.shape
            or anchors.shape != positives.shape
            or not negatives.numel()
        ):
            shapes = ", ".join(str(tuple(t.shape)) for t in (anchors, positives, negatives))
            raise ValueError(f"tuplets of shapes [N, D], [N, D] and [N, K, D] needed, got {shapes}")
        with torch.autocast(anchors.device.type, enabled=False):
            anchors, positives, negatives = anchors.float(), positives.float(), negatives.float()
            candidates = torch.cat([positives[:, None], negatives], dim=1)
            products = torch.einsum("nd,nkd->nk", anchors, candidates)
            targets = products.new_zeros(len(products), dtype=torch.int64)
            penalty = self.norm_penalty * _mean_squared_norm(anchors, positives, negatives)
            return F.cross_entropy(products, targets) + penalty


def _checked_pairs(anchors: Tensor, positives: Tensor) -> tuple[Tensor, Tensor]:
    if anchors.shape != positives.shape or anchors.ndim != 2 or len(anchors) < 2:
        shapes = f"{tuple(anchors.shape)} and {tuple(positives.shape)}"
        raise ValueError(f"N >= 2 pairs of shape [N, D] needed, got {shapes}")
    return anchors.float(), positives.float()


def _multi_class(anchors: Tensor, positives: Tensor, targets: Tensor) -> Tensor:
    """Average N-pair-mc over both directions; targets: fp32 [N, N], each row adds up to 1."""
    with torch.autocast(anchors.device.type, enabled=False):
        products = anchors @ positives.T
        return (F.cross_entropy(products, targets) + F.cross_entropy(products.T, targets)) / 2


def _mean_squared_norm(*embeddings: Tensor) -> Tensor:
    rows = torch.cat([part.reshape(-1, part.shape[-1]) for part in embeddings])
    return rows.square().sum(dim=1).mean()
