from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from npair.data import Photos, read_split
from npair.evaluate import CHUNK, ServedSplits, Vectors, accuracy, nearest


def unit(n: int, d: int, seed: int) -> Vectors:
    vectors: Vectors = np.random.default_rng(seed).normal(size=(n, d)).astype(np.float32)
    return np.divide(vectors, np.linalg.norm(vectors, axis=1, keepdims=True))


def test_nearest_equals_a_loop_across_chunks() -> None:
    queries, gallery = unit(CHUNK + 7, 8, 0), unit(50, 8, 1)
    expected = [sorted(range(50), key=lambda j: -float(query @ gallery[j]))[:3] for query in queries]
    np.testing.assert_array_equal(nearest(queries, gallery, 3), expected)


def test_accuracy_counts_labels_of_nearest_photos() -> None:
    gallery = np.eye(3, dtype=np.float32)
    queries = gallery[[0, 1, 2, 2]]
    gallery_photos = Photos((Path(),) * 3, np.array([10, 11, 12]), np.array([0, 0, 1]))
    query_photos = Photos((Path(),) * 4, np.array([10, 10, 12, 13]), np.array([0, 0, 1, 2]))
    scores = accuracy(queries, query_photos, gallery, gallery_photos)
    assert scores.as_dict() == {"fine": 0.5, "coarse": 0.75, "queries": 4, "gallery": 3}


def test_draws_a_readable_picture(dataset: Path, tmp_path: Path) -> None:
    queries, gallery = read_split(dataset, "val"), read_split(dataset, "train")
    served = ServedSplits(
        "1", queries, np.eye(6, dtype=np.float32)[queries.fine], gallery, np.eye(6, dtype=np.float32)[gallery.fine]
    )
    assert served.accuracy().fine == 1
    served.draw(tmp_path / "picture.png", rows=3, neighbours=4)
    with Image.open(tmp_path / "picture.png") as picture:
        colours = {colour for _, colour in picture.convert("RGB").getcolors(1 << 24) or []}
    assert (0, 128, 0) in colours, "neighbours of the same product are framed in green"
    assert (255, 0, 0) not in colours
