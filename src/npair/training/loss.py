"""The multi-class N-pair losses: Sohn, Improved Deep Metric Learning with Multi-class N-pair Loss Objective, NeurIPS 2016.

All return a fp32 scalar and compute products and log-sum-exp in fp32, whatever autocast is on: bf16 keeps 8 bits of a product,
which is too coarse for the differences that the exponential takes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class NPairLoss(nn.Module):
    """N-pair-mc with the embedding-norm penalty, symmetric in anchors and positives.

    For N pairs of N distinct classes, with s_ij = a_i . p_j, N-pair-mc (section 3.2 of the paper) is

        L(a, p) = 1/N sum_i log(1 + sum_{j != i} exp(s_ij - s_ii)),

    which is the cross-entropy of row i of the N x N products against target i. The loss returned is
    (L(a, p) + L(p, a)) / 2 + norm_penalty * mean(|f|^2) over all 2N embeddings f. The second direction is not in the paper: it
    makes 2N tuplets of the same 2N embeddings. Embeddings are not normalised: with cosines the loss could not fall below
    log(1 + (N - 1) exp(-2)); the penalty (section 3.2.2) keeps the norms from growing without bound.

    Coarse labels smooth the targets, which the paper does not: the share coarse_smoothing of row i's target is spread evenly over
    the other classes with its coarse label, if there are any, so that a product that is not found has its own kind around it.
    """

    def __init__(self, *, norm_penalty: float, coarse_smoothing: float = 0.0) -> None:
        super().__init__()
        self.norm_penalty = norm_penalty
        self.coarse_smoothing = coarse_smoothing

    def forward(self, anchors: Tensor, positives: Tensor, coarse: Tensor | None = None) -> Tensor:
        """anchors, positives: [N, D], row i of both from class i, any float dtype; coarse: int64 [N], by default all different.

        Raises: ValueError unless N >= 2 pairs.
        """
        anchors, positives = _pairs(anchors, positives)
        targets = torch.eye(len(anchors), device=anchors.device)
        if coarse is not None:
            kin = (coarse[:, None] == coarse).float() - targets
            others = kin.sum(dim=1, keepdim=True)
            smoothing = self.coarse_smoothing * (others > 0)
            targets = (1 - smoothing) * targets + smoothing * kin / others.clamp(min=1)
        return _multi_class(anchors, positives, targets) + self.norm_penalty * _squared_norm(anchors, positives)


class CosineNPairLoss(nn.Module):
    """N-pair-mc on cosines divided by a temperature: s_ij = cos(a_i, p_j) / temperature in NPairLoss, without penalty.

    Known as NT-Xent (Chen et al., SimCLR, ICML 2020) with the positives of other pairs alone as negatives.
    """

    def __init__(self, *, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature

    def forward(self, anchors: Tensor, positives: Tensor) -> Tensor:
        """anchors, positives: [N, D], row i of both from class i, any float dtype. Raises: ValueError unless N >= 2 pairs."""
        anchors, positives = _pairs(anchors, positives)
        targets = torch.eye(len(anchors), device=anchors.device)
        return _multi_class(F.normalize(anchors) / self.temperature, F.normalize(positives), targets)


class TupletLoss(nn.Module):
    """The (N+1)-tuplet loss with the norm penalty: every anchor has negatives of its own, which takes N (N + 1) photos.

    Section 3.1 of the paper, for tuplets {a_i, p_i, n_i1, ..., n_iK}:

        L = 1/N sum_i log(1 + sum_k exp(a_i . n_ik - a_i . p_i)),

    plus norm_penalty * mean(|f|^2) over all embeddings f.
    """

    def __init__(self, *, norm_penalty: float) -> None:
        super().__init__()
        self.norm_penalty = norm_penalty

    def forward(self, anchors: Tensor, positives: Tensor, negatives: Tensor) -> Tensor:
        """anchors, positives: [N, D]; negatives: [N, K, D], none of row i of class i. Raises: ValueError for other shapes."""
        if (
            negatives.ndim != 3
            or negatives.shape[::2] != anchors.shape
            or anchors.shape != positives.shape
            or not negatives.numel()
        ):
            shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (anchors, positives, negatives))
            raise ValueError(f"tuplets of shapes [N, D], [N, D] and [N, K, D] needed, got {shapes}")
        with torch.autocast(anchors.device.type, enabled=False):
            anchors, positives, negatives = anchors.float(), positives.float(), negatives.float()
            products = torch.einsum("nd,nkd->nk", anchors, torch.cat([positives[:, None], negatives], dim=1))
            contrast = F.cross_entropy(products, products.new_zeros(len(products), dtype=torch.int64))
            return contrast + self.norm_penalty * _squared_norm(anchors, positives, negatives)


def _pairs(anchors: Tensor, positives: Tensor) -> tuple[Tensor, Tensor]:
    if anchors.shape != positives.shape or anchors.ndim != 2 or len(anchors) < 2:
        raise ValueError(f"N >= 2 pairs of shape [N, D] needed, got {tuple(anchors.shape)} and {tuple(positives.shape)}")
    return anchors.float(), positives.float()


def _multi_class(anchors: Tensor, positives: Tensor, targets: Tensor) -> Tensor:
    """N-pair-mc on products, averaged over both directions; targets: fp32 [N, N], rows that add up to 1."""
    with torch.autocast(anchors.device.type, enabled=False):
        products = anchors @ positives.T
        return (F.cross_entropy(products, targets) + F.cross_entropy(products.T, targets)) / 2


def _squared_norm(*embeddings: Tensor) -> Tensor:
    """The mean of |f|^2 over all embeddings."""
    return torch.cat([rows.reshape(-1, rows.shape[-1]) for rows in embeddings]).square().sum(dim=1).mean()
