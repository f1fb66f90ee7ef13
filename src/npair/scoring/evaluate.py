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
from npair.scoring.intervals import Estimate, Floats, bootstrap
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
    coarse, coarse_classes: None if the data has no coarse labels.
    nmi, ami: normalised and adjusted mutual information (Vinh, Epps & Bailey, JMLR 2010) of the
    queries' fine labels and as many k-means clusters; None for one class, or as many as queries,
    on which any network's clusters agree. AMI subtracts the agreement that chance gives, which is
    large for small classes.
    verification: None if no two photos compared share a label, or all do.
    """

    protocol: Protocol
    queries: int
    gallery: int
    fine_classes: int
    coarse_classes: int | None
    fine: Retrieval
    coarse: Retrieval | None
    nmi: float | None
    ami: float | None
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
        ]
        columns = [self.fine]
        if self.coarse:
            columns.append(self.coarse)
            lines.append(f"{'':14}{'fine':24}coarse")
        for measure in MEASURES:
            cells = (self._cell(getattr(column, measure)) for column in columns)
            row = f"{measure.replace('_', ' '):14}" + "".join(f"{cell:24}" for cell in cells)
            lines.append(row.rstrip())
        if not self.has_intervals:
            lines.append("one class alone: no intervals, NMI or AMI")
        elif self.nmi is None or self.ami is None:
            lines.append("one photo of each class: no NMI or AMI")
        else:
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

    @property
    def has_intervals(self) -> bool:
        """Whether there are classes to resample: the intervals of one class have no width."""
        return self.fine_classes > 1

    def _cell(self, of: Estimate | None) -> str:
        if of is None:
            return "-"
        interval = f" ({of.low:.3f} to {of.high:.3f})" if self.has_intervals else ""
        return f"{of.value:.3f}{interval}"

    def as_dict(self) -> dict[str, Any]:
        """Return the numbers as JSON can hold them, without coarse ones if there are none."""
        numbers = asdict(self)
        if self.coarse is None:
            del numbers["coarse"], numbers["coarse_classes"]
        return numbers

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
        coarse: dict[str, Any] = {"coarse": None, "coarse_classes": None}
        if "coarse" in stored:
            coarse = {"coarse": retrieval(stored["coarse"])}
        changed = coarse | {"fine": retrieval(stored["fine"]), "verification": verified}
        return cls(**(stored | changed))


def evaluate(queries: LabelledVectors, gallery: LabelledVectors | None = None) -> Evaluation:
    """Score queries against a gallery or, without one, against each other ("self").

    Raises: ValueError if vectors are not of unit length or labels, queries and gallery do not fit.
    """
    exclude_self = gallery is None
    gallery = gallery or queries
    labels = {"fine": (queries.fine, gallery.fine)}
    if queries.coarse is not None and gallery.coarse is not None:
        labels["coarse"] = queries.coarse, gallery.coarse
    for kind, sides in labels.items():
        if [len(side) for side in sides] != [len(queries.vectors), len(gallery.vectors)]:
            raise ValueError(f"every vector needs one {kind} label")
    relevant = {kind: count_relevant(*sides, exclude_self) for kind, sides in labels.items()}
    # As deep as the largest R; a coarse label that most photos share makes this a full sort.
    deepest = max(*RECALLS, *(int(counts.max()) for counts in relevant.values()))
    depth = min(deepest, len(gallery.vectors) - exclude_self)

    scores: dict[str, list[Floats]] = {kind: [] for kind in labels}
    histogram = np.zeros((2, BINS), dtype=np.int64)
    for rows, block in cosine_blocks(queries.vectors, gallery.vectors, exclude_self):
        found, cosines = largest(block, depth)
        for kind, (own, others) in labels.items():
            scores[kind].append(
                score_queries(own[rows], others[found], cosines, relevant[kind][rows])
            )
        first = rows.start if exclude_self else None
        count_pairs(histogram, block, queries.fine[rows], gallery.fine, first)

    _, classes = np.unique(queries.fine, return_inverse=True)

    def retrieval(kind: str) -> Retrieval:
        estimates = bootstrap(np.concatenate(scores[kind]), classes)
        return Retrieval(int(np.sum(relevant[kind] == 0)), *estimates)  # type: ignore[arg-type]

    count = len(np.unique(classes))
    # One cluster, and one for each photo, are the same whatever the network does.
    clustered = clusters(queries.vectors, count) if 1 < count < len(classes) else None
    return Evaluation(
        protocol="self" if exclude_self else "gallery",
        queries=len(queries.vectors),
        gallery=len(gallery.vectors),
        fine_classes=count,
        coarse_classes=len(np.unique(labels["coarse"][0])) if "coarse" in labels else None,
        fine=retrieval("fine"),
        coarse=retrieval("coarse") if "coarse" in labels else None,
        nmi=_agreement(normalized_mutual_info_score, classes, clustered),
        ami=_agreement(adjusted_mutual_info_score, classes, clustered),
        verification=verification(*histogram) if histogram.any(axis=1).all() else None,
    )


def _agreement(
    measure: Callable[[Labels, npt.NDArray[np.int32]], float],
    classes: Labels,
    clustered: npt.NDArray[np.int32] | None,
) -> float | None:
    return None if clustered is None else float(measure(classes, clustered))


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
class EmbeddedSplit:
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

    def hits(self) -> dict[str, npt.NDArray[np.bool_]]:
        """Return whether each query's nearest neighbour has its label, bool [q], by kind of label.

        The kinds are "fine" and, if the data has coarse labels, "coarse".
        """
        found = self.nearest(1)[0][:, 0]
        photos, queries = self.gallery_photos, self.query_photos
        hits = {"fine": photos.fine[found] == queries.fine}
        if self.has_coarse:
            hits["coarse"] = photos.coarse[found] == queries.coarse
        return hits

    @property
    def has_coarse(self) -> bool:
        return self.query_photos.has_coarse or self.gallery_photos.has_coarse

    def recall_at_1(self) -> dict[str, float]:
        """Return the share of ``hits`` by kind of label."""
        return {kind: float(np.mean(hits)) for kind, hits in self.hits().items()}

    def evaluate(self) -> Evaluation:
        """Compute every number. Raises: ValueError as ``evaluate`` does."""

        def labelled(vectors: Vectors, photos: Photos) -> LabelledVectors:
            return LabelledVectors(vectors, photos.fine, photos.coarse if self.has_coarse else None)

        queries = labelled(self.queries, self.query_photos)
        gallery = labelled(self.gallery, self.gallery_photos)
        return evaluate(queries, None if self.exclude_self else gallery)


def queries_and_gallery(dataset: Dataset, split: str) -> tuple[Photos, Photos]:
    """Return a split's photos and their gallery: train or, if it lacks their classes, the same.

    Raises: DataError if the data set has no such split, or if it holds a single photo and train
    lacks its class.
    """
    if split not in dataset.splits:
        raise DataError(
            f"the data set has no split {split}; it has {', '.join(dataset.splits)}: name one of"
            " these (--split)"
        )
    queries, train = dataset.splits[split], dataset.train
    if protocol_of(queries.fine, train.fine) == "gallery":
        return queries, train
    if len(queries) < 2:
        raise DataError(
            f"the split {split} is a single photo, {queries.paths[0]}, whose class train lacks, so"
            " there is nothing to compare it with; add photos of its class"
        )
    return queries, queries


def embed_split(
    embedded_by: str, dataset: Dataset, split: str, embed: Callable[[Photos], Vectors]
) -> EmbeddedSplit:
    """Embed a split and its gallery, each photo once.

    embed: returns unit vectors, float32 [n, d].
    Raises: DataError as ``queries_and_gallery`` does.
    """
    query_photos, gallery_photos = queries_and_gallery(dataset, split)
    queries = embed(query_photos)
    gallery = queries if gallery_photos is query_photos else embed(gallery_photos)
    return EmbeddedSplit(embedded_by, query_photos, queries, gallery_photos, gallery)
