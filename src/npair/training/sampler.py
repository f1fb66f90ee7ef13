"""N-pair batches: which photos of which classes meet in a step (Sohn, NeurIPS 2016, section 3.2)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]
Vectors = npt.NDArray[np.float32]


class NPairSampler:
    """Draws batches of N distinct classes with two different photos of each.

    What is drawn is a function of the seed and the step alone (and, in mining, of the network), so a resumed run draws what an
    uninterrupted one would have drawn, and so does every process of a run.
    """

    def __init__(self, labels: npt.NDArray[np.int64], classes_per_batch: int, seed: int, *, multiple_of: int = 1) -> None:
        """labels: [n], the class of each photo. Classes with one photo are left out; N is at most the number of the others.

        multiple_of: N is lowered to a multiple of it, so that as many processes can share a batch.
        Raises: ValueError where fewer than two classes have two photos, or N is too small.
        """
        self.seed = seed
        members = (np.flatnonzero(labels == label) for label in np.unique(labels))
        self.members = [indices for indices in members if len(indices) >= 2]
        if len(self.members) < 2:
            raise ValueError(f"N-pair batches need at least two classes with two photos each, found {len(self.members)}")
        self.classes_per_batch = min(classes_per_batch, len(self.members)) // multiple_of * multiple_of
        if self.classes_per_batch < 2:
            raise ValueError(
                f"a batch of {classes_per_batch} of {len(self.members)} classes is too small for {multiple_of} processes"
            )

    def pairs(self, step: int) -> Indices:
        """[N, 2]: row i holds two photos of one class, and no two rows are of the same class."""
        rng = self._rng(step)
        return self._two_of_each(rng.choice(len(self.members), self.classes_per_batch, replace=False), rng)

    def tuplets(self, step: int) -> Indices:
        """[N, 1 + N]: anchor, positive and a negative of each of the other N - 1 classes, drawn for this row."""
        rng = self._rng(step)
        chosen = rng.choice(len(self.members), self.classes_per_batch, replace=False)
        pairs = self._two_of_each(chosen, rng)
        negatives = [[rng.choice(self.members[other]) for other in chosen if other != own] for own in chosen]
        return np.concatenate([pairs, np.array(negatives)], axis=1)

    def mined_pairs(self, step: int, candidates: int, embed: Callable[[Indices], Vectors]) -> Indices:
        """[N, 2] as from ``pairs``, of classes that the network confuses: hard negative class mining (section 3.2.1).

        candidates: C, the number of classes to choose from, N <= C. embed: int64 [2C] photos -> float32 [2C, D], not normalised.
        """
        rng = self._rng(step)
        drawn = rng.choice(len(self.members), min(max(candidates, self.classes_per_batch), len(self.members)), replace=False)
        examples = self._two_of_each(drawn, rng)
        embeddings = embed(examples.ravel()).reshape(len(drawn), 2, -1)
        return self._two_of_each(drawn[hardest_classes(embeddings, self.classes_per_batch, rng)], rng)

    def _rng(self, step: int) -> np.random.Generator:
        return np.random.default_rng((self.seed, step))

    def _two_of_each(self, classes: npt.NDArray[np.int64], rng: np.random.Generator) -> Indices:
        return np.stack([rng.choice(self.members[i], 2, replace=False) for i in classes])


def hardest_classes(embeddings: Vectors, n: int, rng: np.random.Generator) -> Indices:
    """Grow a set of n classes from a random one, each time by the class that violates a triplet constraint with the set the most.

    embeddings: float32 [C, 2, D], two photos of each class. With f_i and g_i those of class i, class c violates the constraint of
    class i by f_i . f_c - f_i . g_i, the largest over both photos of either class. Ties go to a random one of the tied.
    Returns: int64 [n], distinct, the random one first.
    """
    own = np.einsum("id,id->i", embeddings[:, 0], embeddings[:, 1])
    violation = np.einsum("iad,cbd->icab", embeddings, embeddings).max(axis=(2, 3)) - own[:, None]
    chosen = [int(rng.integers(len(embeddings)))]
    worst = violation[chosen[0]].copy()
    while len(chosen) < n:
        worst[chosen] = -np.inf
        chosen.append(int(rng.choice(np.flatnonzero(worst == worst.max()))))
        worst = np.maximum(worst, violation[chosen[-1]])
    return np.array(chosen)
