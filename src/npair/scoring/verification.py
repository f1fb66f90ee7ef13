"""How well cosines tell pairs of photos of one product from other pairs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from npair.scoring.retrieval import Labels, Vectors

# Bins for a cosine difference of 1; a power of two, so that binning float32 does not round.
RESOLUTION = 1 << 14
BINS = 2 * RESOLUTION + 1
CURVE_POINTS = 200
# Fewer events are too few for a rate (Doddington et al., Speech Communication 31, 2000).
FEWEST = 30


@dataclass(frozen=True)
class OperatingPoint:
    """Accepting a pair as the same product if its cosine is at least ``threshold``.

    far: false acceptance rate, the share of different pairs that is accepted.
    tar: true acceptance rate, the share of same pairs that is accepted.
    """

    threshold: float
    far: float
    tar: float


@dataclass(frozen=True)
class Verification:
    """Acceptance of pairs by their cosine.

    positives, negatives: number of same and of different pairs.
    eer: the equal error rate, the mean of FAR and 1 - TAR at the threshold where they are closest.
    far_1_percent, far_01_percent: the lowest thresholds whose FAR is at most 1 % and 0.1 %. If
    different photos coincide, they exceed 1 and accept nothing. None if the rate is fewer than 30
    of the negative pairs, too few to tell.
    curve: at most 200 points of the ROC, evenly spaced in log FAR.

    Thresholds are multiples of 1 / 16,384, at which float32 cosines are counted exactly.
    """

    positives: int
    negatives: int
    eer: float
    eer_threshold: float
    far_1_percent: OperatingPoint | None
    far_01_percent: OperatingPoint | None
    curve: tuple[OperatingPoint, ...]


def count_pairs(
    histogram: npt.NDArray[np.int64],
    block: Vectors,
    query_labels: Labels,
    gallery_labels: Labels,
    first: int | None,
) -> None:
    """Add a block's pairs to the histogram of same and of different pairs, int64 [2, BINS].

    block: cosines of some queries with the gallery, [rows, g].
    first: the block's first row if queries are the gallery, so that each pair counts once; or None.
    """
    for row, (cosines, label) in enumerate(zip(block, query_labels, strict=True)):
        begin = 0 if first is None else first + row + 1
        bins = np.floor(cosines[begin:] * np.float32(RESOLUTION)).astype(np.int64) + RESOLUTION
        positives = np.bincount(bins[gallery_labels[begin:] == label], minlength=BINS)
        histogram[0] += positives
        histogram[1] += np.bincount(bins, minlength=BINS) - positives


def verification(
    positives: npt.NDArray[np.int64], negatives: npt.NDArray[np.int64]
) -> Verification:
    """Compute ROC and thresholds from counts of pairs by cosine, from -1 up, int64 [BINS] each.

    Raises: ValueError if there is no same or no different pair.
    """
    if not positives.any() or not negatives.any():
        raise ValueError("verification needs pairs of photos of one class and of two")
    # Entry b counts the pairs in bins b and up, which threshold b accepts; the last accepts none.
    accepted = np.zeros((2, BINS + 1), dtype=np.int64)
    accepted[:, :-1] = np.cumsum([positives[::-1], negatives[::-1]], axis=1)[:, ::-1]
    tar, far = accepted / accepted[:, :1]
    thresholds = (np.arange(len(tar)) - RESOLUTION) / RESOLUTION
    total = int(accepted[1, 0])

    def point(b: int) -> OperatingPoint:
        return OperatingPoint(float(thresholds[b]), float(far[b]), float(tar[b]))

    def at_most(rate: float) -> OperatingPoint | None:
        return point(int(np.argmax(far <= rate))) if rate * total >= FEWEST else None

    equal = int(np.argmin(np.abs(far - (1 - tar))))
    spaced = np.unique(np.searchsorted(-far, -np.geomspace(1, 1 / total, CURVE_POINTS)))
    return Verification(
        positives=int(accepted[0, 0]),
        negatives=total,
        eer=float(far[equal] + 1 - tar[equal]) / 2,
        eer_threshold=float(thresholds[equal]),
        far_1_percent=at_most(0.01),
        far_01_percent=at_most(0.001),
        curve=tuple(point(int(b)) for b in spaced),
    )
