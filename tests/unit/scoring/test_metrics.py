"""Compare the metrics with naive loops and with pytorch-metric-learning."""

from __future__ import annotations

import json
import tracemalloc

import numpy as np
import numpy.typing as npt
import pytest
import torch
from pytorch_metric_learning.distances import CosineSimilarity
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from pytorch_metric_learning.utils.inference import CustomKNN
from scipy.stats import binomtest, ttest_1samp
from sklearn.metrics import roc_curve

import npair.scoring.retrieval
from npair.scoring.evaluate import Evaluation, clusters, evaluate, protocol_of
from npair.scoring.intervals import Difference, difference, over_runs
from npair.scoring.retrieval import LabelledVectors, Retrieval, Vectors, nearest
from npair.scoring.verification import RESOLUTION, verification


def photos(n: int, classes: int, seed: int, *, d: int = 16, spread: float = 1.0) -> LabelledVectors:
    """Draw clustered unit vectors; some classes are common, others rare."""
    centres = np.random.default_rng(99).normal(size=(classes, d))
    rng = np.random.default_rng(seed)
    fine = (classes * rng.random(n) ** 2).astype(np.int64)
    vectors = centres[fine] + spread * rng.normal(size=(n, d))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return LabelledVectors(vectors.astype(np.float32), fine, fine // 3)


def of_kinds(photos: LabelledVectors) -> LabelledVectors:
    """Return the photos with their coarse labels as fine ones, and no coarse ones."""
    assert photos.coarse is not None
    return LabelledVectors(photos.vectors, photos.coarse, None)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make blocks of a few rows, so that small examples cross blocks and end in a partial one."""
    monkeypatch.setattr(npair.scoring.retrieval, "BLOCK", 700)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("k", [1, 3, 99])
def test_nearest_equals_a_loop(k: int) -> None:
    x = photos(100, 5, 0).vectors
    indices, similarities = nearest(x, x, k, exclude_self=True)
    for i in range(len(x)):
        expected = sorted(
            (j for j in range(len(x)) if j != i), key=lambda j: (-float(x[i] @ x[j]), j)
        )[:k]
        np.testing.assert_allclose(similarities[i], x[expected] @ x[i], atol=1e-6)
        assert list(indices[i]) == expected
    assert (str(indices.dtype), str(similarities.dtype)) == ("int64", "float32")


@pytest.mark.usefixtures("small_blocks")
def test_equal_neighbours_keep_the_gallerys_order_and_only_the_own_row_is_excluded() -> None:
    corners = np.eye(4, dtype=np.float32)[[0, 0, 0, 1, 0]]
    np.testing.assert_array_equal(nearest(corners[:1], corners, 3)[0], [[0, 1, 2]])
    np.testing.assert_array_equal(
        nearest(corners, corners, 2, exclude_self=True)[0], [[1, 2], [0, 2], [0, 1], [0, 1], [0, 1]]
    )


def naive(
    queries: LabelledVectors, gallery: LabelledVectors, exclude_self: bool
) -> dict[str, float]:
    """Compute the fine retrieval metrics by their definitions."""
    scores: dict[str, list[float]] = {}
    for i, label in enumerate(queries.fine):
        others = [j for j in range(len(gallery.fine)) if not (exclude_self and j == i)]
        cosines = {j: float(queries.vectors[i] @ gallery.vectors[j]) for j in others}
        ranked = sorted(others, key=lambda j: -cosines[j])
        hits = [gallery.fine[j] == label for j in ranked]
        relevant = sum(hits)
        for k in (1, 2, 4, 8):
            scores.setdefault(f"recall_at_{k}", []).append(any(hits[:k]))
        votes: dict[int, tuple[int, float]] = {}
        for j in ranked[:5]:
            count, total = votes.get(gallery.fine[j], (0, 0.0))
            votes[gallery.fine[j]] = (count + 1, total + cosines[j])
        scores.setdefault("knn_accuracy", []).append(
            max(votes, key=lambda voted: votes[voted]) == label
        )
        if relevant:
            scores.setdefault("r_precision", []).append(sum(hits[:relevant]) / relevant)
            precisions = [
                sum(hits[:rank]) / rank for rank in range(1, relevant + 1) if hits[rank - 1]
            ]
            scores.setdefault("map_at_r", []).append(sum(precisions) / relevant)
    return {name: float(np.mean(values)) for name, values in scores.items()}


def values(retrieval: Retrieval) -> dict[str, float]:
    return {name: getattr(retrieval, name).value for name in npair.scoring.retrieval.MEASURES}


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("exclude_self", [False, True])
def test_retrieval_equals_its_definition(exclude_self: bool) -> None:
    queries, gallery = photos(90, 20, 1), photos(120, 15, 2)
    scores = evaluate(queries, None if exclude_self else gallery)
    assert scores.protocol == ("self" if exclude_self else "gallery")
    assert scores.fine.unanswerable > 0
    assert values(scores.fine) == pytest.approx(
        naive(queries, queries if exclude_self else gallery, exclude_self)
    )
    kinds, others = (of_kinds(side) for side in (queries, gallery))
    assert scores.coarse is not None
    assert values(scores.coarse) == pytest.approx(
        naive(kinds, kinds if exclude_self else others, exclude_self)
    )


@pytest.mark.parametrize("exclude_self", [False, True])
def test_equals_pytorch_metric_learning(exclude_self: bool) -> None:
    """Its precision at 1 skips unanswerable queries, which Recall@1 counts as misses."""
    queries, gallery = photos(300, 120, 3), photos(400, 100, 4)
    scores = evaluate(queries, None if exclude_self else gallery)
    assert scores.fine.unanswerable > 0
    reference = AccuracyCalculator(
        include=("precision_at_1", "r_precision", "mean_average_precision_at_r", "NMI", "AMI"),
        device=torch.device("cpu"),
        knn_func=CustomKNN(CosineSimilarity()),
        kmeans_func=lambda x, k: torch.from_numpy(clusters(x.numpy(), k)),
    )
    others = () if exclude_self else (gallery.vectors, gallery.fine)
    expected = reference.get_accuracy(queries.vectors, queries.fine, *others)
    answerable = scores.queries - scores.fine.unanswerable
    found = values(scores.fine)
    assert {
        "precision_at_1": found["recall_at_1"] * scores.queries / answerable,
        "r_precision": found["r_precision"],
        "mean_average_precision_at_r": found["map_at_r"],
        "NMI": scores.nmi,
        "AMI": scores.ami,
    } == pytest.approx(expected)


def test_votes_that_are_equal_are_decided_by_summed_cosines() -> None:
    query = np.array([[1, 0]], dtype=np.float32)
    angles = np.array([0.1, 0.7, 0.2, 0.3, 0.9])
    vectors = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    labels = np.array([1, 1, 2, 2, 3])
    scores = evaluate(
        LabelledVectors(query, np.array([2]), np.array([0])),
        LabelledVectors(vectors, labels, labels),
    )
    assert scores.fine.recall_at_1.value == 0
    assert scores.fine.knn_accuracy.value == 1


def by_pair(
    queries: LabelledVectors, gallery: LabelledVectors, exclude_self: bool
) -> tuple[npt.NDArray[np.bool_], Vectors]:
    pairs = [
        (i, j)
        for i in range(len(queries.fine))
        for j in range(len(gallery.fine))
        if not exclude_self or i < j
    ]
    i, j = np.array(pairs).T
    return queries.fine[i] == gallery.fine[j], (queries.vectors[i] * gallery.vectors[j]).sum(axis=1)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("exclude_self", [False, True])
def test_verification_counts_every_pair_once(exclude_self: bool) -> None:
    queries, gallery = photos(250, 12, 5), photos(150, 12, 6)
    found = evaluate(queries, None if exclude_self else gallery).verification
    assert found is not None
    same, cosines = by_pair(queries, queries if exclude_self else gallery, exclude_self)
    assert (found.positives, found.negatives) == (same.sum(), (~same).sum())
    assert found.far_1_percent is not None
    for point in (*found.curve, found.far_1_percent):
        assert point.far == pytest.approx(
            np.mean(cosines[~same] >= point.threshold), abs=2 / found.negatives
        )
        assert point.tar == pytest.approx(
            np.mean(cosines[same] >= point.threshold), abs=2 / found.positives
        )
    assert (
        found.far_1_percent.far
        <= 0.01
        < np.mean(cosines[~same] >= found.far_1_percent.threshold - 1 / RESOLUTION) + 1e-4
    )
    far, tar, _ = roc_curve(same, cosines, drop_intermediate=False)
    crossing = np.argmin(np.abs(far - (1 - tar)))
    assert found.eer == pytest.approx((far[crossing] + 1 - tar[crossing]) / 2, abs=1e-3)
    assert len(found.curve) <= 200
    assert found.curve[0].far == 1


def test_thresholds_need_enough_negative_pairs() -> None:
    positives, negatives = np.zeros((2, 2 * RESOLUTION + 1), dtype=np.int64)
    positives[-1], negatives[RESOLUTION] = 5, 29_999
    found = verification(positives, negatives)
    assert found.far_01_percent is None
    assert found.far_1_percent is not None
    assert (found.far_1_percent.threshold, found.far_1_percent.far, found.far_1_percent.tar) == (
        1 / RESOLUTION,
        0,
        1,
    )
    assert found.eer == 0
    negatives[RESOLUTION] += 1
    assert verification(positives, negatives).far_01_percent is not None
    with pytest.raises(ValueError, match="pairs of photos"):
        verification(positives, 0 * negatives)


@pytest.mark.filterwarnings("ignore:Number of distinct clusters")
def test_collapsed_embeddings_are_no_better_than_chance() -> None:
    """If all photos coincide, neighbours follow the gallery's order, and no threshold helps."""
    fine = np.arange(200) % 4
    scores = evaluate(
        LabelledVectors(np.tile(np.array([0.6, 0.8], dtype=np.float32), (200, 1)), fine, fine)
    )
    assert scores.verification is not None
    assert scores.verification.eer == pytest.approx(0.5)
    assert scores.verification.far_1_percent is not None
    assert (scores.verification.far_1_percent.far, scores.verification.far_1_percent.tar) == (0, 0)
    assert scores.ami == pytest.approx(0, abs=1e-6)


def test_intervals_resample_classes_not_photos() -> None:
    """Twenty copies of each query add no information."""
    x = photos(60, 12, 7, spread=2.0)
    copies = LabelledVectors(np.repeat(x.vectors, 20, axis=0), np.repeat(x.fine, 20), None)
    gallery = photos(60, 12, 8, spread=2.0)
    once, often = (evaluate(queries, gallery).fine.recall_at_1 for queries in (x, copies))
    assert once == often
    assert 0.1 < once.high - once.low < 1
    assert once.low < once.value < once.high


def test_what_is_undefined_is_none() -> None:
    x = LabelledVectors(np.eye(4, dtype=np.float32), np.arange(4), np.zeros(4, dtype=np.int64))
    scores = evaluate(x)
    assert scores.coarse is not None
    assert (scores.fine.unanswerable, scores.coarse.unanswerable) == (4, 0)
    assert scores.fine.recall_at_1.value == 0
    assert (scores.fine.r_precision, scores.fine.map_at_r, scores.verification) == (
        None,
        None,
        None,
    )
    assert scores.coarse.recall_at_1.value == 1
    assert Evaluation.from_dict(json.loads(json.dumps(scores.as_dict()))) == scores


def test_survives_json() -> None:
    scores = evaluate(photos(200, 5, 9))
    assert scores.verification is not None
    assert scores.verification.far_1_percent is not None
    assert Evaluation.from_dict(json.loads(json.dumps(scores.as_dict()))) == scores


def test_without_coarse_labels_there_are_no_coarse_numbers() -> None:
    queries, gallery = photos(90, 20, 1), photos(120, 15, 2)
    with_kinds, scores = (
        evaluate(queries, gallery),
        evaluate(queries._replace(coarse=None), gallery),
    )
    assert scores.fine == with_kinds.fine
    assert "coarse" in with_kinds.lines()[1]
    assert "coarse" not in "".join(scores.lines())
    assert not {"coarse", "coarse_classes"} & scores.as_dict().keys()
    assert Evaluation.from_dict(json.loads(json.dumps(scores.as_dict()))) == scores


def test_one_class_has_no_intervals_and_no_clusters() -> None:
    queries, gallery = photos(12, 1, 1), photos(30, 3, 2)
    scores = evaluate(queries, gallery)
    assert (scores.nmi, scores.ami) == (None, None)
    assert not any(" to " in line for line in scores.lines())
    assert f"recall at 1   {scores.fine.recall_at_1.value:.3f}" in "\n".join(scores.lines())
    assert any("one class alone" in line for line in scores.lines())
    assert Evaluation.from_dict(json.loads(json.dumps(scores.as_dict()))) == scores


def test_one_photo_of_each_class_has_no_clusters() -> None:
    """As many clusters as photos agree with the classes of any network's vectors."""
    queries = photos(12, 12, 1)._replace(fine=np.arange(12))
    scores = evaluate(queries, photos(30, 12, 2))
    assert (scores.nmi, scores.ami) == (None, None)
    assert "one photo of each class: no NMI or AMI" in scores.lines()
    assert Evaluation.from_dict(json.loads(json.dumps(scores.as_dict()))) == scores


@pytest.mark.parametrize(("won", "lost"), [(0, 1), (1, 0), (2, 7), (0, 6), (30, 12)])
def test_differences_are_those_of_mcnemars_exact_test(won: int, lost: int) -> None:
    before = np.repeat([False, True, True], [won, lost, 50])
    after = np.repeat([True, False, True], [won, lost, 50])
    found = difference(before, after)
    assert found.value == pytest.approx(after.mean() - before.mean())
    assert found.low <= found.value <= found.high
    chance = binomtest(won, won + lost).pvalue
    assert (found.low > 0 or found.high < 0) == (chance < 0.05)


def test_equal_hits_do_not_differ() -> None:
    assert difference([True, False], [True, False]) == Difference(0.0, 0.0, 0.0)


def test_protocol() -> None:
    seen, unseen = np.array([1, 2]), np.array([3, 4])
    assert protocol_of(seen, seen) == "gallery"
    assert protocol_of(unseen, seen) == "self"
    assert protocol_of(np.concatenate([seen, unseen]), seen) == "gallery"


def test_over_runs() -> None:
    runs = [0.61, 0.64, 0.66]
    mean, half_width = over_runs(runs)
    interval = ttest_1samp(runs, 0).confidence_interval(0.95)
    assert (mean - half_width, mean + half_width) == pytest.approx((interval.low, interval.high))
    with pytest.raises(ValueError, match="at least two"):
        over_runs([0.6])


def test_refuses_what_it_cannot_score() -> None:
    x = photos(20, 3, 10)
    with pytest.raises(ValueError, match="unit length"):
        evaluate(x._replace(vectors=2 * x.vectors))
    with pytest.raises(ValueError, match="unit length"):
        nearest(np.full_like(x.vectors, np.nan), x.vectors, 1)
    with pytest.raises(ValueError, match="gallery: expected vectors"):
        nearest(x.vectors, x.vectors[:, :8], 1)
    with pytest.raises(ValueError, match="queries: expected vectors"):
        nearest(x.vectors[:0], x.vectors, 1)
    with pytest.raises(ValueError, match="20 neighbours among 19"):
        nearest(x.vectors, x.vectors, 20, exclude_self=True)
    with pytest.raises(ValueError, match="must be the gallery"):
        nearest(x.vectors[:5], x.vectors, 1, exclude_self=True)
    with pytest.raises(ValueError, match="coarse label"):
        evaluate(x._replace(coarse=x.fine[:5]))


def test_memory_is_bounded() -> None:
    """All cosines of 20,000 photos would be 1.6 GB of float32."""
    vectors = np.random.default_rng(11).normal(size=(20_000, 32)).astype(np.float32)
    fine = np.arange(len(vectors)) // 40
    x = LabelledVectors(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), fine, fine // 5)
    tracemalloc.start()
    try:
        evaluate(x)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 400e6
