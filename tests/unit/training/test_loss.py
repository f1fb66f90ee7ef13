"""Compare the losses with naive loops over the paper and with pytorch-metric-learning."""

from __future__ import annotations

import math

import pytest
import torch
from pytorch_metric_learning.distances import DotProductSimilarity
from pytorch_metric_learning.losses import NPairsLoss

from npair.training.loss import CosineNPairLoss, NPairLoss, TupletLoss


def pairs(n: int = 7, d: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(n)
    return torch.randn(n, d, generator=generator), torch.randn(n, d, generator=generator)


def naive(anchors: torch.Tensor, positives: torch.Tensor) -> float:
    """Compute N-pair-mc of section 3.2 term by term, in one direction."""
    total = 0.0
    for i in range(len(anchors)):
        others = (
            float(anchors[i] @ positives[j] - anchors[i] @ positives[i])
            for j in range(len(positives))
            if j != i
        )
        total += math.log(1 + sum(map(math.exp, others)))
    return total / len(anchors)


def test_equals_the_equation() -> None:
    anchors, positives = pairs()
    expected = (naive(anchors, positives) + naive(positives, anchors)) / 2
    assert NPairLoss(norm_penalty=0.0)(anchors, positives).item() == pytest.approx(
        expected, rel=1e-5
    )


def test_equals_pytorch_metric_learning() -> None:
    """NPairsLoss has one direction and no penalty, and normalises unless told not to."""
    anchors, positives = pairs()
    labels = torch.arange(len(anchors)).repeat(2)
    reference = NPairsLoss(distance=DotProductSimilarity(normalize_embeddings=False))
    forth = reference(torch.cat([anchors, positives]), labels)
    back = reference(torch.cat([positives, anchors]), labels)
    torch.testing.assert_close(NPairLoss(norm_penalty=0.0)(anchors, positives), (forth + back) / 2)


def test_norm_penalty() -> None:
    anchors, positives = pairs()
    norms = [float(row @ row) for row in torch.cat([anchors, positives])]
    difference = NPairLoss(norm_penalty=0.5)(anchors, positives) - NPairLoss(norm_penalty=0.0)(
        anchors, positives
    )
    assert difference.item() == pytest.approx(0.5 * sum(norms) / len(norms), rel=1e-5)


def test_coarse_labels_share_the_target() -> None:
    """A sibling of class 0 gets a tenth of its target, two of class 3 a twentieth each.

    Class 6 has no sibling and keeps its whole target.
    """
    anchors, positives = pairs()
    coarse = torch.tensor([0, 0, 1, 1, 1, 2, 3])
    total = 0.0
    for a, p in ((anchors, positives), (positives, anchors)):
        for i, logs in enumerate(torch.log_softmax(a @ p.T, dim=1)):
            siblings = [j for j in range(7) if coarse[j] == coarse[i] and j != i]
            share = 0.1 if siblings else 0.0
            total -= float(
                (1 - share) * logs[i] + sum(share / len(siblings) * logs[j] for j in siblings)
            )
    loss = NPairLoss(norm_penalty=0.0, coarse_smoothing=0.1)
    assert loss(anchors, positives, coarse).item() == pytest.approx(total / 14, rel=1e-5)
    torch.testing.assert_close(loss(anchors, positives, torch.arange(7)), loss(anchors, positives))


def test_falls_below_what_cosines_allow() -> None:
    """Embeddings are not normalised: separated classes far from the origin have almost no loss."""
    corners = 10 * torch.eye(8)
    assert (
        NPairLoss(norm_penalty=0.0)(corners, corners).item() < 1e-6 < math.log(1 + 7 * math.exp(-2))
    )


def test_computes_in_fp32_from_bf16_without_overflow() -> None:
    anchors, positives = (100 * tensor.bfloat16() for tensor in pairs())
    loss = NPairLoss(norm_penalty=0.0)(anchors, positives)
    assert loss.dtype == torch.float32
    assert torch.isfinite(loss)


@pytest.mark.parametrize(
    ("anchors", "positives"), [((1, 4), (1, 4)), ((3, 4), (2, 4)), ((4,), (4,))]
)
def test_refuses_what_is_no_set_of_pairs(
    anchors: tuple[int, ...], positives: tuple[int, ...]
) -> None:
    with pytest.raises(ValueError, match="N >= 2 pairs"):
        NPairLoss(norm_penalty=0.0)(torch.zeros(anchors), torch.zeros(positives))


class TestCosineNPairLoss:
    def test_equals_the_equation_on_cosines(self) -> None:
        anchors, positives = pairs()
        unit = [
            rows / rows.norm(dim=1, keepdim=True) / math.sqrt(0.1) for rows in (anchors, positives)
        ]
        expected = (naive(unit[0], unit[1]) + naive(unit[1], unit[0])) / 2
        assert CosineNPairLoss(temperature=0.1)(anchors, positives).item() == pytest.approx(
            expected, rel=1e-4
        )

    def test_does_not_depend_on_norms(self) -> None:
        anchors, positives = pairs()
        loss = CosineNPairLoss(temperature=0.1)
        torch.testing.assert_close(loss(anchors, positives), loss(7 * anchors, 0.01 * positives))


class TestTupletLoss:
    def test_equals_the_equation(self) -> None:
        anchors, positives = pairs()
        negatives = torch.randn(7, 3, 5, generator=torch.Generator().manual_seed(1))
        terms = [
            math.log(
                1
                + sum(
                    math.exp(float(anchors[i] @ negatives[i, k] - anchors[i] @ positives[i]))
                    for k in range(3)
                )
            )
            for i in range(7)
        ]
        norms = [
            float(row @ row) for row in torch.cat([anchors, positives, negatives.flatten(0, 1)])
        ]
        expected = sum(terms) / 7 + 0.5 * sum(norms) / len(norms)
        assert TupletLoss(norm_penalty=0.5)(anchors, positives, negatives).item() == pytest.approx(
            expected, rel=1e-5
        )

    def test_is_one_direction_of_n_pairs_where_the_negatives_are_the_other_positives(self) -> None:
        anchors, positives = pairs()
        negatives = torch.stack([torch.cat([positives[:i], positives[i + 1 :]]) for i in range(7)])
        loss = TupletLoss(norm_penalty=0.0)(anchors, positives, negatives)
        assert loss.item() == pytest.approx(naive(anchors, positives), rel=1e-5)

    @pytest.mark.parametrize("negatives", [(3, 4), (3, 0, 4), (2, 5, 4), (3, 5, 3)])
    def test_refuses_other_shapes(self, negatives: tuple[int, ...]) -> None:
        with pytest.raises(ValueError, match="tuplets of shapes"):
            TupletLoss(norm_penalty=0.0)(
                torch.zeros(3, 4), torch.zeros(3, 4), torch.zeros(negatives)
            )


@pytest.mark.parametrize(
    "loss",
    [NPairLoss(norm_penalty=1e-3), CosineNPairLoss(temperature=0.1), TupletLoss(norm_penalty=1e-3)],
    ids=lambda loss: type(loss).__name__,
)
def test_autocast_changes_nothing(loss: torch.nn.Module) -> None:
    anchors, positives = pairs()
    batch = (anchors, positives, positives.expand(3, 7, 5).transpose(0, 1))[
        : 3 if isinstance(loss, TupletLoss) else 2
    ]
    with torch.autocast("cpu", torch.bfloat16):
        inside = loss(*batch)
    assert inside.dtype == torch.float32
    assert inside.item() == loss(*batch).item()
