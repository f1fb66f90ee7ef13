from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from npair.data.dataset import DataError, Dataset
from npair.data.sources import read_dataset
from npair.scoring.evaluate import Comparison, sides
from npair.scoring.pictures import draw_neighbours


def test_draws_a_readable_picture(dataset: Path, tmp_path: Path) -> None:
    queries, gallery = sides(read_dataset(dataset), "val")
    perfect = np.eye(6, dtype=np.float32)
    compared = Comparison("nothing", queries, perfect[queries.fine], gallery, perfect[gallery.fine])
    assert compared.evaluate().fine.recall_at_1.value == 1
    draw_neighbours(compared, tmp_path / "picture.png", rows=3, neighbours=4)
    with Image.open(tmp_path / "picture.png") as picture:
        colours = {colour for _, colour in picture.convert("RGB").getcolors(1 << 24) or []}
    assert (0, 128, 0) in colours, "neighbours of the same product are framed in green"
    assert (255, 0, 0) not in colours


def test_unseen_classes_are_compared_with_each_other(dataset: Path) -> None:
    read = read_dataset(dataset)
    train, val = read.splits["train"], read.splits["val"]
    seen, unseen = (
        train.select(np.flatnonzero(train.fine < 3)),
        val.select(np.flatnonzero(val.fine >= 3)),
    )
    queries, gallery = sides(Dataset({"train": seen, "val": unseen}, ""), "val")
    assert queries is gallery is unseen
    vectors = np.eye(6, dtype=np.float32)[unseen.fine]
    assert Comparison("nothing", queries, vectors, gallery, vectors).evaluate().protocol == "self"


def test_refuses_a_photo_that_can_be_compared_with_nothing(dataset: Path) -> None:
    train = read_dataset(dataset).train
    seen, one = (train.select(np.flatnonzero(train.fine == label)) for label in (0, 1))
    with pytest.raises(DataError, match=r"val is a single photo, .*\.jpg, whose class train lacks"):
        sides(Dataset({"train": seen, "val": one.select([0])}, ""), "val")


def test_names_the_splits_there_are(dataset: Path) -> None:
    with pytest.raises(DataError, match="no split test; it has train, val"):
        sides(read_dataset(dataset), "test")
