"""Scoring embeddings: one split of a data set against its gallery, in numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from sklearn.cluster import KMeans, MiniBatchKMeans
from sklearn.metrics import adjusted_mutual_info_score, normalized_mutual_info_score

from npair.data.dataset import DataError, Dataset, Photos
from npair.scoring.intervals import Estimate, bootstrap
from npair.scoring.retrieval import (
    MEASURES,
    RECALLS,
    LabelledVectors,
    Labels,
    Retrieval,
    Vectors,
    cosine_blocks,
    count_relevant,
    largest,
    nearest,
    score_queries,
)
from npair.scoring.verification import BINS, OperatingPoint, Verification, count_pairs, verification

# Queries against a gallery of other photos, or photos of unseen classes against each other.
Protocol = Literal["gallery", "self"]

SEED = 0  # of k-means
FULL_KMEANS = 20_000  # vectors; beyond, k-means takes mini-batches


@dataclass(frozen=True)
class Evaluation:
    """Every number of one evaluation.

    queries, gallery: number of photos. fine_classes, coarse_classes: of the queries.
    nmi, ami: normalised and adjusted mutual information (Vinh, Epps & Bailey, JMLR 2010) of the
    queries' fine labels and as many k-means clusters. AMI subtracts the agreement that chance
    gives, which is large for small classes.
    verification: None if no two photos compared share a label, or all do.
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
        """Return the cosines from which two photos count as one product, by false acceptances."""
        names = ("far_1_percent", "far_01_percent")
        points = {name: getattr(self.verification, name, None) for name in names}
        return {name: point and point.threshold for name, point in points.items()}

    def lines(self) -> list[str]:
        """Return the numbers as a table, with 95 % intervals."""
        gallery = f"{self.gallery:,} gallery photos"
        against = gallery if self.protocol == "gallery" else "each other"
        lines = [
            f"{self.queries:,} photos of {self.fine_classes} classes against {against}",
            f"{'':14}{'fine':24}coarse",
        ]
        for measure in MEASURES:
            fine, coarse = (
                f"{of.value:.3f} ({of.low:.3f} to {of.high:.3f})" if of else "-"
                for of in (getattr(self.fine, measure), getattr(self.coarse, measure))
            )
            lines.append(f"{measure.replace('_', ' '):14}{fine:24}{coarse}")
        lines.append(f"NMI {self.nmi:.3f}, AMI {self.ami:.3f}")
        if found := self.verification:
            lines.append(f"same product or not, by cosine: equal error rate {found.eer:.3f}")
            for rate, point in (("1 %", found.far_1_percent), ("0.1 %", found.far_01_percent)):
                if point:
                    lines.append(
                        f"  at {rate} false acceptances: threshold {point.threshold:.4f},"
                        f" {point.tar:.3f} of same pairs accepted"
                    )
        return lines

    def as_dict(self) -> dict[str, Any]:
        """Return the numbers as JSON can hold them."""
        return asdict(self)

    @classmethod
    def from_dict(cls, stored: dict[str, Any]) -> Evaluation:
        """Restore what as_dict returned, also after JSON. Raises: KeyError, TypeError."""

        def point(of: dict[str, float] | None) -> OperatingPoint | None:
            return OperatingPoint(**of) if of else None

        def retrieval(of: dict[str, Any]) -> Retrieval:
            estimates = (Estimate(**of[name]) if of[name] else None for name in MEASURES)
            return Retrieval(of["unanswerable"], *estimates)  # type: ignore[arg-type]

        verified = stored["verification"]
        if verified:
            points = {name: point(verified[name]) for name in ("far_1_percent", "far_01_percent")}
            curve = tuple(OperatingPoint(**of) for of in verified["curve"])
            verified = Verification(**(verified | points | {"curve": curve}))
        fine, coarse = retrieval(stored["fine"]), retrieval(stored["coarse"])
        return cls(**(stored | {"fine": fine, "coarse": coarse, "verification": verified}))


def evaluate(queries: LabelledVectors, gallery: LabelledVectors | None = None) -> Evaluation:
    """Score queries against a gallery or, without one, against each other ("self").

    Raises: ValueError if vectors are not of unit length or labels, queries and gallery do not fit.
    """
    exclude_self = gallery is None
    gallery = gallery or queries
    for kind in ("fine", "coarse"):
        if any(len(getattr(side, kind)) != len(side.vectors) for side in (queries, gallery)):
            raise ValueError(f"every vector needs one {kind} label")
    fine_relevant = count_relevant(queries.fine, gallery.fine, exclude_self)
    coarse_relevant = count_relevant(queries.coarse, gallery.coarse, exclude_self)
    # As deep as the largest R; a coarse label that most photos share makes this a full sort.
    deepest = max(*RECALLS, int(fine_relevant.max()), int(coarse_relevant.max()))
    depth = min(deepest, len(gallery.vectors) - exclude_self)

    fine_scores, coarse_scores = [], []
    histogram = np.zeros((2, BINS), dtype=np.int64)
    for rows, block in cosine_blocks(queries.vectors, gallery.vectors, exclude_self):
        found, cosines = largest(block, depth)
        fine, coarse = queries.fine[rows], queries.coarse[rows]
        fine_scores.append(score_queries(fine, gallery.fine[found], cosines, fine_relevant[rows]))
        coarse_scores.append(
            score_queries(coarse, gallery.coarse[found], cosines, coarse_relevant[rows])
        )
        count_pairs(histogram, block, fine, gallery.fine, rows.start if exclude_self else None)

    _, classes = np.unique(queries.fine, return_inverse=True)

    def retrieval(relevant: Labels, scores: list[npt.NDArray[np.float64]]) -> Retrieval:
        estimates = bootstrap(np.concatenate(scores), classes)
        return Retrieval(int(np.sum(relevant == 0)), *estimates)  # type: ignore[arg-type]

    count = len(np.unique(classes))
    clustered = clusters(queries.vectors, count)
    return Evaluation(
        protocol="self" if exclude_self else "gallery",
        queries=len(queries.vectors),
        gallery=len(gallery.vectors),
        fine_classes=count,
        coarse_classes=len(np.unique(queries.coarse)),
        fine=retrieval(fine_relevant, fine_scores),
        coarse=retrieval(coarse_relevant, coarse_scores),
        nmi=float(normalized_mutual_info_score(classes, clustered)),
        ami=float(adjusted_mutual_info_score(classes, clustered)),
        verification=verification(*histogram) if histogram.any(axis=1).all() else None,
    )


def clusters(vectors: Vectors, k: int) -> npt.NDArray[np.int32]:
    """Assign each vector to a k-means cluster, [n, d] -> int32 [n], always to the same.

    Beyond 20,000 vectors by mini-batches (Sculley, WWW 2010), which find slightly worse clusters in
    a fraction of the time.
    """
    method = KMeans(k, random_state=SEED)
    if len(vectors) > FULL_KMEANS:
        method = MiniBatchKMeans(k, batch_size=4096, random_state=SEED)
    found: npt.NDArray[np.int32] = method.fit_predict(vectors)
    return found


def protocol_of(query_fine: Labels, gallery_fine: Labels) -> Protocol:
    """Return "gallery" if any query's class is in the gallery, else "self".

    Queries of other classes are then unanswerable.
    """
    return "gallery" if np.isin(query_fine, gallery_fine).any() else "self"


@dataclass(frozen=True)
class Comparison:
    """The photos of one split as queries, and a gallery, all embedded by one network.

    The gallery is the train split or, if it has none of the queries' classes, the queries: then
    both are the same objects.
    embedded_by: the network, in words.
    """

    embedded_by: str
    query_photos: Photos
    queries: Vectors
    gallery_photos: Photos
    gallery: Vectors

    @property
    def exclude_self(self) -> bool:
        """Whether the queries are the gallery, so that a query's own photo is no neighbour."""
        return self.gallery is self.queries

    def nearest(self, k: int) -> tuple[npt.NDArray[np.int64], Vectors]:
        """Find each query's k nearest gallery photos and their cosines, [q, k] each."""
        return nearest(self.queries, self.gallery, k, exclude_self=self.exclude_self)

    def recall_at_1(self) -> dict[str, float]:
        """Return the share of queries whose nearest neighbour has their fine or coarse label."""
        found = self.nearest(1)[0][:, 0]
        return {
            "fine": float(np.mean(self.gallery_photos.fine[found] == self.query_photos.fine)),
            "coarse": float(np.mean(self.gallery_photos.coarse[found] == self.query_photos.coarse)),
        }

    def evaluate(self) -> Evaluation:
        """Compute every number. Raises: ValueError as ``evaluate`` does."""
        queries = LabelledVectors(self.queries, self.query_photos.fine, self.query_photos.coarse)
        photos = self.gallery_photos
        gallery = LabelledVectors(self.gallery, photos.fine, photos.coarse)
        return evaluate(queries, None if self.exclude_self else gallery)


def sides(dataset: Dataset, split: str) -> tuple[Photos, Photos]:
    """Return a split's photos and their gallery: train or, if it lacks their classes, the same.

    Raises: DataError if the data set has no such split.
    """
    if split not in dataset.splits:
        raise DataError(f"the data set has no split {split}; it has {', '.join(dataset.splits)}")
    queries, train = dataset.splits[split], dataset.train
    return queries, train if protocol_of(queries.fine, train.fine) == "gallery" else queries


def compare(
    embedded_by: str, dataset: Dataset, split: str, embed: Callable[[Photos], Vectors]
) -> Comparison:
    """Embed a split and its gallery, each photo once.

    embed: returns unit vectors, float32 [n, d].
    Raises: DataError if the data set has no such split.
    """
    query_photos, gallery_photos = sides(dataset, split)
    queries = embed(query_photos)
    gallery = queries if gallery_photos is query_photos else embed(gallery_photos)
    return Comparison(embedded_by, query_photos, queries, gallery_photos, gallery)
