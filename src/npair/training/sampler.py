"""Choice of the photos in each N-pair batch (Sohn, NeurIPS 2016, section 3.2)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from npair.training.run import RunError

Indices = npt.NDArray[np.int64]


class NPairSampler:
    """Draws batches of N distinct classes with two different photos of each.

    A draw depends on the seed and the step alone (if classes are mined, on the network as well),
    so a resumed run draws what an uninterrupted one would, and all processes draw the same.
    """

    def __init__(
        self, labels: Indices, classes_per_batch: int, seed: int, *, multiple_of: int = 1
    ) -> None:
        """labels: int64 [n], the class of each photo; classes with one photo are left out.

        classes_per_batch: N, lowered to the number of classes and to a multiple of
        ``multiple_of``, so that as many processes can share a batch.
        Raises: ValueError if fewer than two classes have two photos, or if N is too small.
        """
        self.seed = seed
        members = (np.flatnonzero(labels == label) for label in np.unique(labels))
        self.members = [indices for indices in members if len(indices) >= 2]
        count = len(self.members)
        if count < 2:
            raise ValueError(
                f"N-pair batches need at least two classes with two photos each, found {count}"
            )
        self.classes_per_batch = min(classes_per_batch, count) // multiple_of * multiple_of
        if self.classes_per_batch < 2:
            raise ValueError(
                f"a batch of {classes_per_batch} of {count} classes is too small for"
                f" {multiple_of} processes"
            )

    def pairs(self, step: int) -> Indices:
        """Draw [N, 2]: each row holds two photos of one class, and all classes differ."""
        rng = self._rng(step)
        return self._two_of_each(self._draw_classes(self.classes_per_batch, rng), rng)

    def tuplets(self, step: int) -> Indices:
        """Draw [N, 1 + N]: anchor, positive, and one negative of each of the other N - 1 classes.

        Negatives are drawn for each row.
        """
        rng = self._rng(step)
        drawn = self._draw_classes(self.classes_per_batch, rng)
        pairs = self._two_of_each(drawn, rng)
        negatives = [
            [rng.choice(self.members[other]) for other in drawn if other != own] for own in drawn
        ]
        return np.concatenate([pairs, np.array(negatives)], axis=1)

    def mined_pairs(
        self, step: int, candidates: int, embed: Callable[[Indices], npt.NDArray[np.float32]]
    ) -> Indices:
        """Draw [N, 2] of classes that the network confuses: hard negative class mining.

        Section 3.2.1. candidates: C >= N, the number of classes to mine from.
        embed: photos int64 [2C] -> embeddings float32 [2C, D], not normalised.
        """
        rng = self._rng(step)
        count = min(max(candidates, self.classes_per_batch), len(self.members))
        drawn = self._draw_classes(count, rng)
        embeddings = embed(self._two_of_each(drawn, rng).ravel()).reshape(count, 2, -1)
        hardest = hardest_classes(embeddings, self.classes_per_batch, rng)
        return self._two_of_each(drawn[hardest], rng)

    def _rng(self, step: int) -> np.random.Generator:
        return np.random.default_rng((self.seed, step))

    def _draw_classes(self, count: int, rng: np.random.Generator) -> Indices:
        return rng.choice(len(self.members), count, replace=False)

    def _two_of_each(self, classes: Indices, rng: np.random.Generator) -> Indices:
        return np.stack([rng.choice(self.members[i], 2, replace=False) for i in classes])


def hardest_classes(
    embeddings: npt.NDArray[np.float32], n: int, rng: np.random.Generator
) -> Indices:
    """Grow a set of n classes from a random one, adding the worst violator each time.

    With f_i and g_i the embeddings of class i, class c violates the triplet constraint of class i
    by f_i . f_c - f_i . g_i, at most over both photos of either class. The class that violates any
    constraint in the set the most is next; ties are broken at random.

    embeddings: float32 [C, 2, D], two photos of each class.
    Returns: int64 [n], distinct, in the order of choice.
    Raises: RunError if a product of embeddings is not finite.
    """
    own = np.einsum("id,id->i", embeddings[:, 0], embeddings[:, 1])
    violation = np.einsum("iad,cbd->icab", embeddings, embeddings).max(axis=(2, 3)) - own[:, None]
    if not np.isfinite(violation).all():
        raise RunError(
            "the products of the network's embeddings are not finite;"
            " start again with a lower --learning-rate"
        )
    hardest = [int(rng.integers(len(embeddings)))]
    worst = violation[hardest[0]].copy()
    while len(hardest) < n:
        worst[hardest] = -np.inf
        hardest.append(int(rng.choice(np.flatnonzero(worst == worst.max()))))
        worst = np.maximum(worst, violation[hardest[-1]])
    return np.array(hardest)
