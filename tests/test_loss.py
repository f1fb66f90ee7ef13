"""The loss against a naive loop over the paper's equation, and against pytorch-metric-learning where the two agree."""

from __future__ import annotations

import math

import pytest
import torch
from pytorch_metric_learning.distances import DotProductSimilarity
from pytorch_metric_learning.losses import NPairsLoss

from npair.loss import NPairLoss


def pairs(n: int = 7, d: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(n)
    return torch.randn(n, d, generator=generator), torch.randn(n, d, generator=generator)


def naive(anchors: torch.Tensor, positives: torch.Tensor) -> float:
    """Equation 7, term by term, for one direction."""
    total = 0.0
    for i in range(len(anchors)):
        others = (float(anchors[i] @ positives[j] - anchors[i] @ positives[i]) for j in range(len(positives)) if j != i)
        total += math.log(1 + sum(map(math.exp, others)))
    return total / len(anchors)


def test_equals_the_equation() -> None:
    anchors, positives = pairs()
    expected = (naive(anchors, positives) + naive(positives, anchors)) / 2
    assert NPairLoss(norm_penalty=0.0)(anchors, positives).item() == pytest.approx(expected, rel=1e-5)


def test_equals_pytorch_metric_learning() -> None:
    """Its NPairsLoss is one direction, without penalty, and normalises unless it is told not to."""
    anchors, positives = pairs()
    labels = torch.arange(len(anchors)).repeat(2)
    reference = NPairsLoss(distance=DotProductSimilarity(normalize_embeddings=False))
    forth = reference(torch.cat([anchors, positives]), labels)
    back = reference(torch.cat([positives, anchors]), labels)
    torch.testing.assert_close(NPairLoss(norm_penalty=0.0)(anchors, positives), (forth + back) / 2)


def test_norm_penalty() -> None:
    anchors, positives = pairs()
    norms = [float(row @ row) for row in torch.cat([anchors, positives])]
    difference = NPairLoss(norm_penalty=0.5)(anchors, positives) - NPairLoss(norm_penalty=0.0)(anchors, positives)
    assert difference.item() == pytest.approx(0.5 * sum(norms) / len(norms), rel=1e-5)


def test_falls_below_what_cosines_allow() -> None:
    """Embeddings are not normalised: separated classes far from the origin have almost no loss."""
    corners = 10 * torch.eye(8)
    assert NPairLoss(norm_penalty=0.0)(corners, corners).item() < 1e-6 < math.log(1 + 7 * math.exp(-2))


def test_computes_in_fp32_from_bf16_without_overflow() -> None:
    anchors, positives = (100 * tensor.bfloat16() for tensor in pairs())
    loss = NPairLoss(norm_penalty=0.0)(anchors, positives)
    assert loss.dtype == torch.float32
    assert torch.isfinite(loss)


@pytest.mark.parametrize(("anchors", "positives"), [((1, 4), (1, 4)), ((3, 4), (2, 4)), ((4,), (4,))])
def test_refuses_what_is_no_set_of_pairs(anchors: tuple[int, ...], positives: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="N >= 2 pairs"):
        NPairLoss(norm_penalty=0.0)(torch.zeros(anchors), torch.zeros(positives))
