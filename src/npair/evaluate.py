"""How good embeddings are: the nearest gallery photos of query photos, counted and drawn."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageOps
from tqdm import tqdm

from npair.client import NpairClient
from npair.data import DataError, Photos, read_split

Vectors = npt.NDArray[np.float32]

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


def nearest(queries: Vectors, gallery: Vectors, k: int = 1) -> npt.NDArray[np.int64]:
    """Indices of the k gallery rows with the largest products, best first; [q, d] and [g, d] of unit length -> int64 [q, k]."""
    best = [np.argsort(-(queries[i : i + CHUNK] @ gallery.T), axis=1, kind="stable")[:, :k] for i in range(0, len(queries), CHUNK)]
    return np.concatenate(best)


def accuracy(queries: Vectors, query_photos: Photos, gallery: Vectors, gallery_photos: Photos) -> Accuracy:
    """Score each query photo by the labels of its nearest gallery photo."""
    neighbours = nearest(queries, gallery)[:, 0]
    return Accuracy(
        fine=float(np.mean(gallery_photos.fine[neighbours] == query_photos.fine)),
        coarse=float(np.mean(gallery_photos.coarse[neighbours] == query_photos.coarse)),
        queries=len(queries),
        gallery=len(gallery),
    )


@dataclass(frozen=True)
class ServedSplits:
    """A data set's val photos (queries) and train photos (gallery), both embedded by one version of a running server."""

    version: str
    query_photos: Photos
    queries: Vectors
    gallery_photos: Photos
    gallery: Vectors

    def accuracy(self) -> Accuracy:
        return accuracy(self.queries, self.query_photos, self.gallery, self.gallery_photos)

    def draw(self, path: Path, *, rows: int = 6, neighbours: int = 6, cell: int = 140) -> None:
        """Draw a grid: in each row a query, then its nearest gallery photos, framed in green where the product is the same and in
        red where not. The queries are spread evenly over the val photos, not chosen by how well they did."""
        margin, label = 6, 18
        chosen = np.linspace(0, len(self.query_photos) - 1, rows).astype(int)
        ranked = nearest(self.queries[chosen], self.gallery, neighbours)
        picture = Image.new(
            "RGB", ((neighbours + 1) * (cell + margin) + 3 * margin, rows * (cell + label + margin) + margin), "white"
        )
        pen = ImageDraw.Draw(picture)

        def place(photo: Path, column: int, row: int, frame: str) -> None:
            left = margin + column * (cell + margin) + (2 * margin if column else 0)
            top = margin + row * (cell + label + margin)
            with Image.open(photo) as image:
                thumbnail = ImageOps.fit(ImageOps.exif_transpose(image).convert("RGB"), (cell - 8, cell - 8))
            picture.paste(ImageOps.expand(thumbnail, 4, frame), (left, top))
            pen.text((left + 2, top + cell + 2), photo.parent.name[:22], fill="black")

        for row, (query, indices) in enumerate(zip(chosen, ranked, strict=True)):
            place(self.query_photos.paths[query], 0, row, "black")
            for column, index in enumerate(indices, start=1):
                same = self.gallery_photos.fine[index] == self.query_photos.fine[query]
                place(self.gallery_photos.paths[index], column, row, "green" if same else "red")
        picture.save(path)


def embed_served(data: Path, url: str) -> ServedSplits:
    """Embed a data set through a running server, so that what is scored is what is served.

    Raises: DataError for unusable data or a photo that the server refuses, client.NpairError.
    """
    query_photos, gallery_photos = read_split(data, "val"), read_split(data, "train")
    paths = [*query_photos.paths, *gallery_photos.paths]
    vectors = []
    with NpairClient(url) as client:
        stream = client.stream(paths)
        for result in tqdm(stream, total=len(paths), desc="embed", unit="photo"):
            if result.vector is None:
                raise DataError(f"{paths[result.index]}: {result.reason}")
            vectors.append(result.vector)
    queries, gallery = np.split(np.stack(vectors), [len(query_photos)])
    return ServedSplits(stream.version, query_photos, queries, gallery_photos, gallery)
