"""Scoring a network, of a run or behind a server, on one split of a data set."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageOps

from npair.data.dataset import DataError, Dataset, Photos
from npair.scoring.metrics import Embedded, Evaluation, Vectors, evaluate, nearest, protocol_of


@dataclass(frozen=True)
class Comparison:
    """The photos of one split as queries, and the photos that they are compared with, all embedded by one network.

    The gallery are the train photos; where none of the queries' classes is among theirs, the queries are compared with each other,
    and gallery and queries are the same.
    embedded_by: the network, in words.
    """

    embedded_by: str
    query_photos: Photos
    queries: Vectors
    gallery_photos: Photos
    gallery: Vectors

    @property
    def alone(self) -> bool:
        """Whether the queries are compared with each other."""
        return self.gallery is self.queries

    def recall_at_1(self) -> dict[str, float]:
        """The share of queries whose nearest gallery photo has their label, for "fine" and "coarse" labels."""
        found = nearest(self.queries, self.gallery, 1, exclude_self=self.alone)[0][:, 0]
        return {
            kind: float(np.mean(getattr(self.gallery_photos, kind)[found] == getattr(self.query_photos, kind)))
            for kind in ("fine", "coarse")
        }

    def evaluate(self) -> Evaluation:
        queries = Embedded(self.queries, self.query_photos.fine, self.query_photos.coarse)
        return evaluate(
            queries, None if self.alone else Embedded(self.gallery, self.gallery_photos.fine, self.gallery_photos.coarse)
        )

    def draw(self, path: Path, *, rows: int = 6, neighbours: int = 6, cell: int = 140) -> None:
        """Draw a grid: in each row a query, then its nearest gallery photos, framed in green where the product is the same and in
        red where not. The queries are spread evenly over the split, not chosen by how well they did."""
        margin, label = 6, 18
        chosen = np.linspace(0, len(self.query_photos) - 1, rows).astype(int)
        ranked = nearest(self.queries, self.gallery, neighbours, exclude_self=self.alone)[0][chosen]
        picture = Image.new(
            "RGB", ((neighbours + 1) * (cell + margin) + 3 * margin, rows * (cell + label + margin) + margin), "white"
        )
        pen = ImageDraw.Draw(picture)

        def place(photos: Photos, index: int, column: int, row: int, frame: str) -> None:
            left = margin + column * (cell + margin) + (2 * margin if column else 0)
            top = margin + row * (cell + label + margin)
            with Image.open(photos.paths[index]) as image:
                thumbnail = ImageOps.fit(ImageOps.exif_transpose(image).convert("RGB"), (cell - 8, cell - 8))
            picture.paste(ImageOps.expand(thumbnail, 4, frame), (left, top))
            pen.text((left + 2, top + cell + 2), photos.fine_names[photos.fine[index]][:22], fill="black")

        for row, (query, indices) in enumerate(zip(chosen, ranked, strict=True)):
            place(self.query_photos, query, 0, row, "black")
            for column, index in enumerate(indices, start=1):
                same = self.gallery_photos.fine[index] == self.query_photos.fine[query]
                place(self.gallery_photos, index, column, row, "green" if same else "red")
        picture.save(path)


def sides(dataset: Dataset, split: str) -> tuple[Photos, Photos]:
    """The split's photos and those that they are compared with: train's, or their own where none of their classes is in train.

    Raises: DataError where the data set has no such split.
    """
    if split not in dataset.splits:
        raise DataError(f"the data set has no split {split}; it has {', '.join(dataset.splits)}")
    queries, gallery = dataset.splits[split], dataset.train
    return queries, gallery if protocol_of(queries.fine, gallery.fine) == "gallery" else queries


def compare(embedded_by: str, dataset: Dataset, split: str, embed: Callable[[Photos], Vectors]) -> Comparison:
    """Embed a split and its gallery, each photo once. Raises: DataError where the data set has no such split."""
    query_photos, gallery_photos = sides(dataset, split)
    queries = embed(query_photos)
    gallery = queries if gallery_photos is query_photos else embed(gallery_photos)
    return Comparison(embedded_by, query_photos, queries, gallery_photos, gallery)
