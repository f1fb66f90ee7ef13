from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from npair.training.run import RunError
from npair.training.sampler import NPairSampler, hardest_classes

LABELS = np.repeat(np.arange(10), 5)


def test_pairs_are_of_distinct_classes_and_distinct_photos() -> None:
    sampler = NPairSampler(LABELS, classes_per_batch=7, seed=0)
    seen = set()
    for step in range(200):
        pairs = sampler.pairs(step)
        assert pairs.shape == (7, 2)
        assert (LABELS[pairs[:, 0]] == LABELS[pairs[:, 1]]).all()
        assert (pairs[:, 0] != pairs[:, 1]).all()
        assert len(set(LABELS[pairs[:, 0]])) == 7
        seen |= set(pairs.ravel().tolist())
    assert seen == set(range(50)), "every photo takes part"


def test_tuplets_have_a_negative_of_every_other_class() -> None:
    sampler = NPairSampler(LABELS, classes_per_batch=4, seed=0)
    for step in range(50):
        labels = LABELS[sampler.tuplets(step)]
        assert labels.shape == (4, 5)
        assert (labels[:, 0] == labels[:, 1]).all()
        assert all(len(set(row[1:])) == 4 and set(row) == set(labels[:, 0]) for row in labels)


def test_draws_depend_on_seed_and_step_alone() -> None:
    sampler, same = NPairSampler(LABELS, 4, seed=3), NPairSampler(LABELS, 4, seed=3)
    same.pairs(0)
    np.testing.assert_array_equal(sampler.pairs(5), same.pairs(5))
    assert (sampler.pairs(5) != sampler.pairs(6)).any()
    assert (sampler.pairs(5) != NPairSampler(LABELS, 4, seed=4).pairs(5)).any()


def test_leaves_out_classes_with_one_photo_and_takes_no_more_classes_than_there_are() -> None:
    sampler = NPairSampler(np.array([0, 0, 1, 2, 2, 2]), classes_per_batch=60, seed=0)
    assert sampler.classes_per_batch == 2
    assert all(2 not in sampler.pairs(step) for step in range(20)), (
        "photo 2 is the only one of its class"
    )


@pytest.mark.parametrize("labels", [[], [0, 0], [0, 1, 2], [0, 0, 0, 1]])
def test_refuses_labels_without_two_pairs(labels: list[int]) -> None:
    with pytest.raises(ValueError, match="at least two classes with two photos"):
        NPairSampler(np.array(labels, dtype=np.int64), 2, seed=0)


def test_batches_can_be_shared_by_processes() -> None:
    assert NPairSampler(LABELS, classes_per_batch=9, seed=0, multiple_of=4).classes_per_batch == 8
    with pytest.raises(ValueError, match="a batch of 3 of 10 classes is too small for 4 processes"):
        NPairSampler(LABELS, classes_per_batch=3, seed=0, multiple_of=4)
    with pytest.raises(ValueError, match="a batch of 1 of 10 classes is too small for 1 processes"):
        NPairSampler(LABELS, classes_per_batch=1, seed=0)


def naive_hardest(embeddings: npt.NDArray[np.float32], first: int, n: int) -> list[int]:
    """Mine by loops over section 3.2.1, for embeddings without ties."""
    chosen = [first]
    while len(chosen) < n:
        violations = {
            c: max(
                float(f @ e) - float(embeddings[i][0] @ embeddings[i][1])
                for i in chosen
                for f in embeddings[i]
                for e in rows
            )
            for c, rows in enumerate(embeddings)
            if c not in chosen
        }
        chosen.append(max(violations, key=violations.__getitem__))
    return chosen


def test_mining_equals_a_loop() -> None:
    embeddings = np.random.default_rng(0).normal(size=(12, 2, 6)).astype(np.float32)
    for seed in range(5):
        mined = hardest_classes(embeddings, 7, np.random.default_rng(seed))
        assert mined.tolist() == naive_hardest(embeddings, int(mined[0]), 7)


def test_mining_breaks_ties_at_random() -> None:
    embeddings = np.ones((6, 2, 3), dtype=np.float32)
    orders = {
        tuple(hardest_classes(embeddings, 6, np.random.default_rng(seed)).tolist())
        for seed in range(30)
    }
    assert len(orders) > 20
    assert all(sorted(order) == list(range(6)) for order in orders)


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("value", [np.nan, np.inf, 1e30])
def test_mining_refuses_embeddings_without_finite_products(value: float) -> None:
    embeddings = np.full((6, 2, 3), value, dtype=np.float32)
    with pytest.raises(RunError, match="lower --learning-rate"):
        hardest_classes(embeddings, 2, np.random.default_rng(0))


def test_mined_batches_bring_confused_classes_together() -> None:
    """Classes 2k and 2k + 1 look the same to this network, so each brings its twin."""
    looks: npt.NDArray[np.float32] = 3 * np.eye(5, dtype=np.float32)

    sampler = NPairSampler(LABELS, classes_per_batch=2, seed=0)
    for step in range(30):
        labels = LABELS[sampler.mined_pairs(step, 10, lambda photos: looks[LABELS[photos] // 2])]
        assert (labels[:, 0] == labels[:, 1]).all()
        assert labels[0, 0] // 2 == labels[1, 0] // 2
        assert labels[0, 0] != labels[1, 0]
