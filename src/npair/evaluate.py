"""How good embeddings are: nearest-neighbour accuracy of query photos against a gallery."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt

from npair.data import Photos

CHUNK = 1024  # queries compared with the whole gallery at a time: bounds memory at CHUNK x gallery floats


@dataclass(frozen=True)
class Accuracy:
    """1-nearest-neighbour accuracy (Recall@1), as shares of the queries, on fine and on coarse labels."""

    fine: float
    coarse: float
    queries: int
    gallery: int

    def as_dict(self) -> dict[str, float | int]:
        return asdict(self)


def nearest(queries: npt.NDArray[np.float32], gallery: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
    """Index of the gallery row with the largest product, for each query; [q, d] and [g, d] of unit length -> int64 [q]."""
    chunks = [np.argmax(queries[start : start + CHUNK] @ gallery.T, axis=1) for start in range(0, len(queries), CHUNK)]
    return np.concatenate(chunks).astype(np.int64)


def accuracy(
    queries: npt.NDArray[np.float32], query_photos: Photos, gallery: npt.NDArray[np.float32], gallery_photos: Photos
) -> Accuracy:
    """Score each query photo by the labels of its nearest gallery photo."""
    neighbours = nearest(queries, gallery)
    return Accuracy(
        fine=float(np.mean(gallery_photos.fine[neighbours] == query_photos.fine)),
        coarse=float(np.mean(gallery_photos.coarse[neighbours] == query_photos.coarse)),
        queries=len(queries),
        gallery=len(gallery),
    )
