"""The multi-class N-pair loss: Sohn, Improved Deep Metric Learning with Multi-class N-pair Loss Objective, NeurIPS 2016."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class NPairLoss(nn.Module):
    """N-pair-mc with the embedding-norm penalty, symmetric in anchors and positives.

    For N pairs of N distinct classes, with s_ij = a_i . p_j, equation 7 of the paper is

        L(a, p) = 1/N sum_i log(1 + sum_{j != i} exp(s_ij - s_ii)),

    which is the cross-entropy of row i of the N x N products against target i. The loss returned is
    (L(a, p) + L(p, a)) / 2 + norm_penalty * mean(|f|^2) over all 2N embeddings f. Embeddings are not normalised: with
    cosines the loss could not fall below log(1 + (N - 1) exp(-2)); the penalty keeps the norms from growing without bound.
    """

    def __init__(self, *, norm_penalty: float) -> None:
        super().__init__()
        self.norm_penalty = norm_penalty

    def forward(self, anchors: Tensor, positives: Tensor) -> Tensor:
        """anchors, positives: [N, D], row i of both from class i, any float dtype. Returns: fp32 scalar."""
        if anchors.shape != positives.shape or anchors.ndim != 2 or len(anchors) < 2:
            raise ValueError(f"N >= 2 pairs of shape [N, D] needed, got {tuple(anchors.shape)} and {tuple(positives.shape)}")
        anchors, positives = anchors.float(), positives.float()
        products = anchors @ positives.T
        targets = torch.arange(len(products), device=products.device)
        contrast = (F.cross_entropy(products, targets) + F.cross_entropy(products.T, targets)) / 2
        norms = (anchors.square().sum(dim=1) + positives.square().sum(dim=1)).mean() / 2
        return contrast + self.norm_penalty * norms
