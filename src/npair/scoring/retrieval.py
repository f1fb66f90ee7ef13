"""How well the nearest neighbours of a photo share its label.

Vectors are of unit length, so that products are cosines. All counts are exact, and memory does not
grow with the number of photos beyond BLOCK floats and a few integers for each of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from npair.scoring.intervals import Estimate, Floats

Vectors = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]

BLOCK = 1 << 24  # cosines computed at a time
RECALLS = (1, 2, 4, 8)
VOTERS = 5  # of the k-NN classifier


class LabelledVectors(NamedTuple):
    """Unit vectors, float32 [n, d], with their photos' fine and coarse labels, int64 [n] each.

    coarse: None if the data has no coarse labels.
    """

    vectors: Vectors
    fine: Labels
    coarse: Labels | None


@dataclass(frozen=True)
class Retrieval:
    """Means over queries, all between 0 and 1.

    recall_at_k: at least one of the k nearest has the query's label (Jegou et al., PAMI 2011; as Oh
    Song et al., CVPR 2016, use it). Recall@1 is the accuracy of the nearest neighbour.
    knn_accuracy: most of the 5 nearest have the query's label; summed cosines decide ties.
    r_precision: the share of the R nearest that has the query's label, if R photos have it in all.
    map_at_r: the mean over ranks 1 to R of the precision at that rank if the photo there has the
    label, else 0 (Musgrave, Belongie & Lim, A Metric Learning Reality Check, ECCV 2020, section
    3.2).

    unanswerable: queries whose label no (other) gallery photo has. Recall and k-NN accuracy count
    them as misses, as a user would. R-precision and MAP@R, undefined for R = 0, leave them out, and
    are None if no query remains.
    """

    unanswerable: int
    recall_at_1: Estimate
    recall_at_2: Estimate
    recall_at_4: Estimate
    recall_at_8: Estimate
    knn_accuracy: Estimate
    r_precision: Estimate | None
    map_at_r: Estimate | None


MEASURES = tuple(field.name for field in fields(Retrieval))[1:]


def nearest(
    queries: Vectors, gallery: Vectors, k: int, *, exclude_self: bool = False
) -> tuple[npt.NDArray[np.int64], Vectors]:
    """Find the k gallery rows of largest cosine, best first, ties in the gallery's order.

    queries, gallery: unit vectors, [q, d] and [g, d].
    exclude_self: the queries are the gallery; leave out each query's own row, not its equals.
    Returns: indices, int64 [q, k], and cosines, float32 [q, k].
    Raises: ValueError if vectors differ in dimension or are not of unit length, or the gallery has
    fewer than k rows.
    """
    found = [largest(block, k) for _, block in cosine_blocks(queries, gallery, exclude_self)]
    indices, cosines = zip(*found, strict=True)
    return np.concatenate(indices), np.concatenate(cosines)


def cosine_blocks(
    queries: Vectors, gallery: Vectors, exclude_self: bool
) -> Iterator[tuple[slice, Vectors]]:
    """Yield slices of the queries and their cosines with the whole gallery, [rows, g].

    exclude_self: set each query's cosine with itself to -inf.
    Raises: ValueError if vectors differ in dimension or are not of unit length.
    """
    for name, vectors in (("queries", queries), ("gallery", gallery)):
        if vectors.ndim != 2 or not len(vectors) or vectors.shape[1] != queries.shape[1]:
            raise ValueError(
                f"{name}: expected vectors [n, {queries.shape[-1]}], got {list(vectors.shape)}"
            )
        if not np.allclose(np.linalg.norm(vectors, axis=1), 1, rtol=0, atol=1e-4):
            raise ValueError(
                f"{name}: vectors must be of unit length, so that products are cosines"
            )
    if exclude_self and len(queries) != len(gallery):
        raise ValueError("exclude_self: the queries must be the gallery")
    step = max(1, BLOCK // len(gallery))
    for start in range(0, len(queries), step):
        rows = slice(start, min(start + step, len(queries)))
        block = queries[rows] @ gallery.T
        np.clip(block, -1, 1, out=block)  # rounding
        if exclude_self:
            block[np.arange(len(block)), np.arange(rows.start, rows.stop)] = -np.inf
        yield rows, block


def largest(block: Vectors, k: int) -> tuple[npt.NDArray[np.int64], Vectors]:
    """Return the columns of the k largest entries of each row, ties in order, and the entries.

    Raises: ValueError if a row has fewer than k, -inf not counted.
    """
    available = block.shape[1] - int(np.isneginf(block[0]).any())
    if not 1 <= k <= available:
        raise ValueError(f"cannot find {k} neighbours among {available}")
    cut = block.shape[1] - k
    smallest = np.partition(block, cut, axis=1)[:, cut]
    chosen = block >= smallest[:, None]
    surplus = np.count_nonzero(chosen, axis=1) - k
    for row in np.flatnonzero(surplus):
        chosen[row, np.flatnonzero(block[row] == smallest[row])[-surplus[row] :]] = False
    columns = np.nonzero(chosen)[1].reshape(-1, k)
    entries = np.take_along_axis(block, columns, axis=1)
    order = np.argsort(-entries, axis=1, kind="stable")
    return np.take_along_axis(columns, order, axis=1), np.take_along_axis(entries, order, axis=1)


def count_relevant(
    query_labels: Labels, gallery_labels: Labels, exclude_self: bool
) -> npt.NDArray[np.int64]:
    """Count the gallery photos with each query's label, int64 [q]; not the query if excluded."""
    labels, counts = np.unique(gallery_labels, return_counts=True)
    places = np.searchsorted(labels, query_labels).clip(max=len(labels) - 1)
    found: npt.NDArray[np.int64] = np.where(labels[places] == query_labels, counts[places], 0)
    return found - int(exclude_self)


def score_queries(
    labels: Labels, neighbours: Labels, cosines: Vectors, relevant: npt.NDArray[np.int64]
) -> Floats:
    """Score each query by each of MEASURES, NaN if undefined: float64 [q, 7].

    labels, relevant: of each query, [q]. neighbours, cosines: of its k nearest photos, [q, k].
    """
    same = neighbours == labels[:, None]
    ranks = np.arange(1, same.shape[1] + 1)
    within = same & (ranks <= relevant[:, None])
    voters = neighbours[:, :VOTERS]
    agree = voters[:, :, None] == voters[:, None, :]
    # The cosines of 5 voters add up to between -5 and 5: they decide ties and nothing else.
    votes = 16 * agree.sum(axis=2) + (agree * cosines[:, None, :VOTERS]).sum(axis=2)
    elected = np.take_along_axis(voters, votes.argmax(axis=1, keepdims=True), axis=1)[:, 0]
    with np.errstate(invalid="ignore"):  # 0 / 0 is NaN
        r_precision = within.sum(axis=1) / relevant
        map_at_r = (np.cumsum(within, axis=1) / ranks * within).sum(axis=1) / relevant
    recalls = (same[:, :k].any(axis=1) for k in RECALLS)
    columns = [*recalls, elected == labels, r_precision, map_at_r]
    return np.stack(columns, axis=1, dtype=np.float64)
