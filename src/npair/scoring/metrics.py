"""How good embeddings are, in numbers: retrieval, verification and clustering, with intervals that say how sure the numbers are.

Vectors are of unit length, so that products are cosines. Two protocols: queries against a gallery of other photos ("gallery"), and
photos against each other, each without itself ("self"), for classes that the gallery does not have. All counts are exact; memory is
bounded by BLOCK floats and a few integers for each of them, whatever the number of photos.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.stats import t as student_t  # comes with scikit-learn
from sklearn.cluster import KMeans, MiniBatchKMeans
from sklearn.metrics import adjusted_mutual_info_score, normalized_mutual_info_score

Vectors = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Protocol = Literal["gallery", "self"]

BLOCK = 1 << 24  # similarities computed at a time
VOTERS = 5  # of the k-NN classifier
RESAMPLES = 1000
SEED = 0
RESOLUTION = 1 << 14  # bins for a cosine difference of 1; a power of two, so that binning float32 does not round
FULL_KMEANS = 20_000  # vectors; beyond, k-means takes mini-batches
CURVE_POINTS = 200


class Embedded(NamedTuple):
    """Photos as the metrics see them: unit vectors, float32 [n, d], with fine and coarse labels, int64 [n] each."""

    vectors: Vectors
    fine: Labels
    coarse: Labels


@dataclass(frozen=True)
class Estimate:
    """A share of the queries with its 95 % bootstrap interval. Of a single class the interval has no width and says nothing."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Retrieval:
    """How well nearest neighbours share the query's label; each number is a mean over queries, all of them shares from 0 to 1.

    recall_at_k: at least one of the k nearest has the label (Jegou et al., PAMI 2011; as Oh Song et al., CVPR 2016, use it).
    Recall@1 is the 1-nearest-neighbour accuracy. knn_accuracy: the label of the majority of the 5 nearest, equal votes decided by
    their summed cosines, is the query's. r_precision: of the R nearest, R being how many photos have the label, the share that has
    it. map_at_r: the mean over ranks 1 to R of the precision at that rank where the photo there has the label, else 0 (Musgrave,
    Belongie & Lim, A Metric Learning Reality Check, ECCV 2020, section 3.2).

    ``unanswerable`` queries are those whose label no (other) gallery photo has. Recall and k-NN accuracy count them as misses, as a
    user would; R-precision and MAP@R, which R = 0 leaves undefined, leave them out and are None where no query remains.
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
RECALLS = (1, 2, 4, 8)


@dataclass(frozen=True)
class OperatingPoint:
    """Taking two photos for the same product if and only if their cosine is at least ``threshold``: the shares of different pairs
    (far, false acceptance rate) and of same pairs (tar, true acceptance rate) that are taken for the same."""

    threshold: float
    far: float
    tar: float


@dataclass(frozen=True)
class Verification:
    """Telling pairs of photos of one product from other pairs by their cosine.

    eer: the equal error rate, where as large a share of different pairs is accepted as of same pairs is refused (the mean of
    both, at the threshold where they are closest). ``far_1_percent`` and ``far_01_percent`` have the lowest thresholds whose FAR is
    at most 1 % and 0.1 %; where different photos coincide, that lies above 1 and accepts nothing. Each is None where so few pairs
    are negative that its rate is fewer than 30 of them, too few for a rate (the rule of 30: Doddington et al., Speech Communication
    31, 2000). curve: at most 200 points of the ROC, evenly spaced in log FAR. Thresholds are multiples of 1 / 16,384, where float32
    cosines are counted exactly.
    """

    positives: int
    negatives: int
    eer: float
    eer_threshold: float
    far_1_percent: OperatingPoint | None
    far_01_percent: OperatingPoint | None
    curve: tuple[OperatingPoint, ...]


@dataclass(frozen=True)
class Evaluation:
    """Every number of one evaluation. Counts: photos, and fine and coarse classes of the queries.

    nmi, ami: normalised and adjusted mutual information (Vinh, Epps & Bailey, JMLR 2010) between the queries' fine labels and as
    many k-means clusters of the queries as there are labels; AMI takes off what chance gives, which is a lot for small classes.
    verification: None where no two photos compared share a label, or all do.
    """

    protocol: Protocol
    queries: int
    gallery: int
    fine_classes: int
    coarse_classes: int
    fine: Retrieval
    coarse: Retrieval
    nmi: float
    ami: float
    verification: Verification | None

    def thresholds(self) -> dict[str, float | None]:
        """The cosines from which two photos are taken for the same product, by how many false acceptances they allow."""
        points = {name: getattr(self.verification, name, None) for name in ("far_1_percent", "far_01_percent")}
        return {name: point and point.threshold for name, point in points.items()}

    def lines(self) -> list[str]:
        """The numbers as a table, each with its 95 % interval."""
        against = f"{self.gallery:,} gallery photos" if self.protocol == "gallery" else "each other"
        lines = [
            f"{self.queries:,} photos of {self.fine_classes} classes against {against}",
            f"{'':14}{'fine':24}coarse",
        ]
        for measure in MEASURES:
            found = (getattr(self.fine, measure), getattr(self.coarse, measure))
            cells = [f"{share.value:.3f} ({share.low:.3f} to {share.high:.3f})" if share else "-" for share in found]
            lines.append(f"{measure.replace('_', ' '):14}{cells[0]:24}{cells[1]}")
        lines.append(f"NMI {self.nmi:.3f}, AMI {self.ami:.3f}")
        if self.verification:
            lines.append(f"same product or not, by cosine: equal error rate {self.verification.eer:.3f}")
            for rate, point in (("1 %", self.verification.far_1_percent), ("0.1 %", self.verification.far_01_percent)):
                if point:
                    accepted = f"threshold {point.threshold:.4f}, {point.tar:.3f} of same pairs accepted"
                    lines.append(f"  at {rate} false acceptances: {accepted}")
        return lines

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, stored: dict[str, Any]) -> Evaluation:
        """The inverse of as_dict, also after JSON. Raises: KeyError, TypeError for anything else."""

        def point(of: dict[str, float] | None) -> OperatingPoint | None:
            return OperatingPoint(**of) if of else None

        def retrieval(of: dict[str, Any]) -> Retrieval:
            return Retrieval(of["unanswerable"], *(Estimate(**of[name]) if of[name] else None for name in MEASURES))  # type: ignore[arg-type]

        verified = stored["verification"]
        if verified:
            points = {name: point(verified[name]) for name in ("far_1_percent", "far_01_percent")}
            curve = tuple(OperatingPoint(**of) for of in verified["curve"])
            verified = Verification(**(verified | points | {"curve": curve}))
        restored = {"fine": retrieval(stored["fine"]), "coarse": retrieval(stored["coarse"]), "verification": verified}
        return cls(**(stored | restored))


def protocol_of(query_fine: Labels, gallery_fine: Labels) -> Protocol:
    """ "gallery" where any query's class occurs in the gallery, the other queries being unanswerable; "self" where none does."""
    return "gallery" if np.isin(query_fine, gallery_fine).any() else "self"


def nearest(
    queries: Vectors, gallery: Vectors, k: int, *, exclude_self: bool = False
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """The k gallery rows of largest cosine, best first, equal ones in the gallery's order; [q, d] and [g, d], both of unit length.

    exclude_self: the queries are the gallery, and a query's own row (not those equal to it) is left out.
    Returns: indices, int64 [q, k], and cosines, float32 [q, k]. Raises: ValueError where vectors are not of unit length or of
    different dimensions, or where the gallery has no k rows.
    """
    found = [_best(block, k) for _, block in _blocks(queries, gallery, exclude_self)]
    indices, similarities = zip(*found, strict=True)
    return np.concatenate(indices), np.concatenate(similarities)


def evaluate(queries: Embedded, gallery: Embedded | None = None) -> Evaluation:
    """Score queries against a gallery, or against each other where there is none ("self").

    Raises: ValueError where vectors are not of unit length, or labels, queries and gallery do not fit each other.
    """
    alone = gallery is None
    gallery = gallery or queries
    for fine_or_coarse in ("fine", "coarse"):
        if any(len(getattr(side, fine_or_coarse)) != len(side.vectors) for side in (queries, gallery)):
            raise ValueError(f"every vector needs one {fine_or_coarse} label")
    relevant = [_relevant(q, g, alone) for q, g in ((queries.fine, gallery.fine), (queries.coarse, gallery.coarse))]
    # As deep as the largest R asks for; a coarse label that most photos share makes this a full sort.
    depth = min(max(*RECALLS, int(np.max(relevant))), len(gallery.vectors) - alone)

    fine_outcomes, coarse_outcomes = [], []
    histogram = np.zeros((2, 2 * RESOLUTION + 1), dtype=np.int64)
    for rows, block in _blocks(queries.vectors, gallery.vectors, alone):
        indices, similarities = _best(block, depth)
        fine_outcomes.append(_outcomes(queries.fine[rows], gallery.fine[indices], similarities, relevant[0][rows]))
        coarse_outcomes.append(_outcomes(queries.coarse[rows], gallery.coarse[indices], similarities, relevant[1][rows]))
        _count_pairs(histogram, block, queries.fine[rows], gallery.fine, rows.start if alone else None)

    _, groups = np.unique(queries.fine, return_inverse=True)
    fine, coarse = (
        Retrieval(int(np.sum(counts == 0)), *_estimates(np.concatenate(outcomes), groups))  # type: ignore[arg-type]
        for counts, outcomes in zip(relevant, (fine_outcomes, coarse_outcomes), strict=True)
    )
    classes = len(np.unique(groups))
    found = clusters(queries.vectors, classes)
    return Evaluation(
        protocol="self" if alone else "gallery",
        queries=len(queries.vectors),
        gallery=len(gallery.vectors),
        fine_classes=classes,
        coarse_classes=len(np.unique(queries.coarse)),
        fine=fine,
        coarse=coarse,
        nmi=float(normalized_mutual_info_score(groups, found)),
        ami=float(adjusted_mutual_info_score(groups, found)),
        verification=verification(*histogram) if histogram.any(axis=1).all() else None,
    )


def clusters(vectors: Vectors, k: int) -> npt.NDArray[np.int32]:
    """The k-means cluster of each vector, [n, d] -> int32 [n]; the same for the same vectors. Beyond 20,000 vectors by mini-batches
    (Sculley, WWW 2010), which find slightly worse clusters in a fraction of the time."""
    method = KMeans(k, random_state=SEED) if len(vectors) <= FULL_KMEANS else MiniBatchKMeans(k, batch_size=4096, random_state=SEED)
    found: npt.NDArray[np.int32] = method.fit_predict(vectors)
    return found


def verification(positives: npt.NDArray[np.int64], negatives: npt.NDArray[np.int64]) -> Verification:
    """ROC and thresholds from how many pairs of one label, and of two, have their cosine in each bin from -1 up, int64 [bins].

    Raises: ValueError where there is no positive or no negative pair.
    """
    if not positives.any() or not negatives.any():
        raise ValueError("verification needs pairs of photos of one class and of two")
    # Entry b counts what threshold b accepts, the pairs in bins b and up; the last one accepts nothing.
    accepted = np.zeros((2, len(positives) + 1), dtype=np.int64)
    accepted[:, :-1] = np.cumsum([positives[::-1], negatives[::-1]], axis=1)[:, ::-1]
    tar, far = accepted / accepted[:, :1]
    thresholds = (np.arange(len(tar)) - RESOLUTION) / RESOLUTION
    total = int(accepted[1, 0])

    def point(b: int) -> OperatingPoint:
        return OperatingPoint(float(thresholds[b]), float(far[b]), float(tar[b]))

    equal = int(np.argmin(np.abs(far - (1 - tar))))
    at_most = [point(int(np.argmax(far <= rate))) if rate * total >= 30 else None for rate in (0.01, 0.001)]
    spaced = np.unique(np.searchsorted(-far, -np.geomspace(1, 1 / total, CURVE_POINTS)))
    return Verification(
        positives=int(accepted[0, 0]),
        negatives=total,
        eer=float(far[equal] + 1 - tar[equal]) / 2,
        eer_threshold=float(thresholds[equal]),
        far_1_percent=at_most[0],
        far_01_percent=at_most[1],
        curve=tuple(point(int(b)) for b in spaced),
    )


def over_seeds(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half width of its 95 % confidence interval (Student's t) over runs that differ by their seed alone.

    Raises: ValueError for fewer than two values, which say nothing about spread.
    """
    if len(values) < 2:
        raise ValueError(f"an interval over seeds needs at least two runs, got {len(values)}")
    standard_error = np.std(values, ddof=1) / np.sqrt(len(values))
    return float(np.mean(values)), float(student_t.ppf(0.975, len(values) - 1) * standard_error)


def _blocks(queries: Vectors, gallery: Vectors, exclude_self: bool) -> Iterator[tuple[slice, npt.NDArray[np.float32]]]:
    """Yields slices of the queries and their cosines with the whole gallery, [rows, g]; a query's own is -inf where excluded."""
    for name, vectors in (("queries", queries), ("gallery", gallery)):
        if vectors.ndim != 2 or not len(vectors) or vectors.shape[1] != queries.shape[1]:
            raise ValueError(f"{name}: expected vectors [n, {queries.shape[-1]}], got {list(vectors.shape)}")
        if not np.allclose(np.linalg.norm(vectors, axis=1), 1, rtol=0, atol=1e-4):
            raise ValueError(f"{name}: vectors must be of unit length, so that products are cosines")
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


def _best(block: npt.NDArray[np.float32], k: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """Columns of the k largest entries of each row, largest first, equal ones in order, and the entries."""
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


def _relevant(query_labels: Labels, gallery_labels: Labels, exclude_self: bool) -> npt.NDArray[np.int64]:
    """How many gallery photos, the query itself not counted, have the query's label; int64 [q]."""
    labels, counts = np.unique(gallery_labels, return_counts=True)
    places = np.searchsorted(labels, query_labels).clip(max=len(labels) - 1)
    relevant: npt.NDArray[np.int64] = np.where(labels[places] == query_labels, counts[places], 0) - int(exclude_self)
    return relevant


def _outcomes(labels: Labels, neighbours: Labels, similarities: Vectors, relevant: npt.NDArray[np.int64]) -> Floats:
    """What each query scores in each of MEASURES, NaN where it is left out: [q], [q, k], [q, k], [q] -> float64 [q, 7]."""
    same = neighbours == labels[:, None]
    ranks = np.arange(1, same.shape[1] + 1)
    within = same & (ranks <= relevant[:, None])
    voters = neighbours[:, :VOTERS]
    agree = voters[:, :, None] == voters[:, None, :]
    # Cosines of 5 voters add up to between -5 and 5: they decide where votes are equal, and only there.
    votes = 16 * agree.sum(axis=2) + (agree * similarities[:, None, :VOTERS]).sum(axis=2)
    elected = np.take_along_axis(voters, votes.argmax(axis=1, keepdims=True), axis=1)[:, 0]
    with np.errstate(invalid="ignore"):  # 0 / 0 is the NaN of the queries that are left out
        r_precision = within.sum(axis=1) / relevant
        map_at_r = (np.cumsum(within, axis=1) / ranks * within).sum(axis=1) / relevant
    recalls = (same[:, :k].any(axis=1) for k in RECALLS)
    return np.stack([*recalls, elected == labels, r_precision, map_at_r], axis=1, dtype=np.float64)


def _count_pairs(
    histogram: npt.NDArray[np.int64],
    block: npt.NDArray[np.float32],
    query_labels: Labels,
    gallery_labels: Labels,
    first: int | None,
) -> None:
    """Add a block's pairs, by cosine, to the histogram of positive and negative pairs, int64 [2, bins]. first: the number of the
    block's first row where queries are the gallery, so that each pair is counted once; else None."""
    for row, (cosines, label) in enumerate(zip(block, query_labels, strict=True)):
        begin = 0 if first is None else first + row + 1
        bins = np.floor(cosines[begin:] * np.float32(RESOLUTION)).astype(np.int64) + RESOLUTION
        positives = np.bincount(bins[gallery_labels[begin:] == label], minlength=histogram.shape[1])
        histogram[0] += positives
        histogram[1] += np.bincount(bins, minlength=histogram.shape[1]) - positives


def _estimates(outcomes: Floats, groups: npt.NDArray[np.int64]) -> list[Estimate | None]:
    """Means of the columns of [q, m], NaN left out, with percentile intervals of a bootstrap that draws classes with replacement.

    Photos of a class are alike, and queries drawn one by one would pass for independent: intervals would be too narrow (the cluster
    bootstrap: Davison & Hinkley, Bootstrap Methods and their Application, 1997, section 3.8). groups: [q], classes numbered from 0.
    """
    classes, measures = int(groups.max()) + 1, outcomes.shape[1]
    columns = np.concatenate([np.nan_to_num(outcomes), ~np.isnan(outcomes)], axis=1)
    totals = np.stack([np.bincount(groups, weights=column, minlength=classes) for column in columns.T], axis=1)

    def means(weights: Floats) -> Floats:
        sums, counts = np.split(weights @ totals, [measures])
        return np.divide(sums, counts, out=np.full(measures, np.nan), where=counts > 0)

    rng = np.random.default_rng(SEED)
    draws = (np.bincount(rng.integers(classes, size=classes), minlength=classes) for _ in range(RESAMPLES))
    resampled = np.stack([means(draw.astype(np.float64)) for draw in draws])
    return [
        None if np.isnan(value) else Estimate(float(value), *map(float, np.nanpercentile(resampled[:, column], [2.5, 97.5])))
        for column, value in enumerate(means(np.ones(classes)))
    ]
