from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.photos import folders, photo, sizes

from npair.data.dataset import DataError, Dataset, HoldOut
from npair.data.folds import colour_histograms, folds, found_by_colour, write_folds
from npair.data.pixels import PREVIEW, Pixels, decode_dataset
from npair.data.sources import read_dataset
from npair.publishing.drawings import draw


@pytest.fixture
def visits(tmp_path: Path, cache: Path) -> tuple[Dataset, Pixels]:
    """Draw four products on three visits in different light, four near copies each.

    The photos' numbers do not reveal the visit.
    """
    for product in range(4):
        for visit, tint in enumerate(((1.0, 0.5, 0.3), (0.3, 1.0, 0.5), (0.4, 0.4, 1.0))):
            for copy in range(4):
                path = tmp_path / "photos" / f"product-{product}" / f"{3 * copy + visit}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                pixels = np.asarray(draw(product, 0, 64)) * tint + copy
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path)
    return decode_dataset(
        read_dataset(tmp_path / "photos"), PREVIEW, cache, HoldOut(val_share=0.25)
    )[:2]


def test_histograms_are_shares_of_colours(visits: tuple[Dataset, Pixels]) -> None:
    dataset, pixels = visits
    histograms = colour_histograms(dataset.train, pixels)
    assert histograms.shape == (len(dataset.train), 64)
    np.testing.assert_allclose((histograms**2).sum(axis=1), 1, rtol=1e-5)
    red = Pixels(
        np.full((1, 4, 4, 3), (255, 0, 0), dtype=np.uint8), dict.fromkeys(dataset.train.paths, 0)
    )
    assert np.flatnonzero(colour_histograms(dataset.train, red)[0]).tolist() == [48]


def test_lookalikes_stay_together(visits: tuple[Dataset, Pixels]) -> None:
    dataset, pixels = visits
    train = dataset.train
    fold = folds(train.fine, colour_histograms(train, pixels), 3)
    for label in range(4):
        members = np.flatnonzero(train.fine == label)
        visit = np.array([int(train.paths[index].stem) % 3 for index in members])
        assert len(set(zip(visit.tolist(), fold[members].tolist(), strict=True))) == 3, (
            "a visit is a fold"
        )
    assert np.ptp(np.bincount(fold)) <= 4


def test_colours_find_lookalikes(
    visits: tuple[Dataset, Pixels], tmp_path: Path, cache: Path
) -> None:
    """Splitting by photo leaves near copies of val in train; folds leave none."""
    dataset, pixels = visits
    assert found_by_colour(dataset.splits["val"], dataset.train, pixels) == 1
    for table in write_folds(dataset, pixels, 3, ["train", "val"], tmp_path / "folds"):
        fold, fold_pixels, _ = decode_dataset(read_dataset(table), PREVIEW, cache)
        assert found_by_colour(fold.splits["val"], fold.train, fold_pixels) < 0.5


def test_small_classes_are_spread() -> None:
    histograms = np.random.default_rng(0).random((7, 64), dtype=np.float32)
    fold = folds(np.array([0, 0, 0, 1, 1, 2, 3]), histograms, 3)
    assert sorted(fold[:3]) == [0, 1, 2]
    assert fold[3] != fold[4]
    assert np.ptp(np.bincount(fold)) <= 1


def test_tables_cover_every_photo_once(tmp_path: Path, cache: Path) -> None:
    dataset, pixels, _ = decode_dataset(
        read_dataset(folders(tmp_path / "a, ü")), PREVIEW, cache, HoldOut(val_share=0.4)
    )
    tables = write_folds(dataset, pixels, 2, ["train", "val"], tmp_path / "folds")
    assert [path.name for path in tables] == ["fold-0.csv", "fold-1.csv"]
    read = [read_dataset(path) for path in tables]
    assert all(sum(sizes(fold).values()) == 30 for fold in read)
    queries = [path for fold in read for path in fold.splits["val"].paths]
    assert sorted(queries) == sorted(
        path for photos in dataset.splits.values() for path in photos.paths
    )
    assert read[0].train.fine_names == dataset.train.fine_names


def test_refuses_what_it_cannot_do(tmp_path: Path, cache: Path) -> None:
    photo(folders(tmp_path / "root") / os.fsdecode(b"\xff") / "1.png", 99_999)
    dataset, pixels, _ = decode_dataset(read_dataset(tmp_path / "root"), PREVIEW, cache)
    with pytest.raises(DataError, match="at least two folds, got 1"):
        write_folds(dataset, pixels, 1, ["train"], tmp_path)
    with pytest.raises(DataError, match="no split 'test'; it has train, val"):
        write_folds(dataset, pixels, 2, ["test"], tmp_path)
    with pytest.raises(DataError, match=r"fold-0.csv: a name is not UTF-8 .*udcff"):
        write_folds(dataset, pixels, 2, ["train"], tmp_path)
