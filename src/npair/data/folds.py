"""Cross-validation folds that do not give the answer away.

Photos of one product from one visit to a shop nearly repeat each other. If they fall into different
folds, any network that matches colours finds them, and a fold's score says little about photos of
other visits. Folds are therefore made of groups of lookalikes.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from sklearn.cluster import AgglomerativeClustering

from npair.data.dataset import DataError, Dataset, Photos
from npair.data.pixels import Pixels

LEVELS = 4  # of R, G and B each: so coarse that a scene's light counts more than its details


def colour_histograms(photos: Photos, pixels: Pixels) -> npt.NDArray[np.float32]:
    """Return the square roots of the shares of 4 x 4 x 4 colours in each photo: float32 [n, 64].

    Their Euclidean distance is the Hellinger distance of the histograms times sqrt(2).
    """
    histograms = np.empty((len(photos), LEVELS**3), dtype=np.float32)
    for index, row in enumerate(pixels.of(photos)):
        levels = pixels.array[row].reshape(-1, 3).astype(np.int64) * LEVELS // 256
        histograms[index] = np.bincount(levels @ (LEVELS**2, LEVELS, 1), minlength=LEVELS**3)
    shares: npt.NDArray[np.float32] = np.sqrt(histograms / histograms.sum(axis=1, keepdims=True))
    return shares


def folds(
    labels: npt.NDArray[np.int64], histograms: npt.NDArray[np.float32], k: int
) -> npt.NDArray[np.int64]:
    """Assign each photo to a fold, 0 to k - 1: int64 [n], float32 [n, d] -> int64 [n].

    Ward's clustering (JASA 1963) of their histograms divides the photos of a class into k groups,
    one for each fold. The largest group goes to the fold with the fewest photos so far.
    Raises: DataError for fewer than two folds.
    """
    if k < 2:
        raise DataError(f"cross-validation needs at least two folds, got {k}")
    fold = np.empty(len(labels), dtype=np.int64)
    sizes = np.zeros(k, dtype=np.int64)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        groups = np.arange(len(members))
        if len(members) > k:
            clustering = AgglomerativeClustering(k, linkage="ward")
            groups = clustering.fit_predict(histograms[members])
        counts = np.bincount(groups)
        largest_first, fewest_first = (np.argsort(of, kind="stable") for of in (-counts, sizes))
        for group, place in zip(largest_first, fewest_first, strict=False):
            fold[members[groups == group]] = place
            sizes[place] += counts[group]
    return fold


def found_by_colour(queries: Photos, gallery: Photos, pixels: Pixels) -> float:
    """Return the share of queries whose nearest gallery photo, by colour alone, has their label."""
    ours, theirs = colour_histograms(queries, pixels), colour_histograms(gallery, pixels)
    nearest = [np.argmax(theirs @ histogram) for histogram in ours]
    return float(np.mean(gallery.fine[nearest] == queries.fine))


def write_folds(
    dataset: Dataset, pixels: Pixels, k: int, splits: Sequence[str], folder: Path
) -> list[Path]:
    """Divide the photos of these splits into folds, and write a table for each.

    Returns: the tables, as ``write_tables`` does.
    Raises: DataError for an unknown split, a name that no table can hold, or fewer than two folds.
    """
    for split in splits:
        if split not in dataset.splits:
            raise DataError(
                f"the data set has no split {split!r}; it has {', '.join(dataset.splits)}"
            )
    parts = [dataset.splits[split] for split in splits]
    labels = np.concatenate([photos.fine for photos in parts])
    histograms = np.concatenate([colour_histograms(photos, pixels) for photos in parts])
    return write_tables(parts, folds(labels, histograms, k), k, folder)


def write_tables(
    parts: Sequence[Photos], fold: npt.NDArray[np.int64], k: int, folder: Path
) -> list[Path]:
    """Write ``fold-0.csv`` to ``fold-<k - 1>.csv``, in each of which one fold is val, the others
    train.

    fold: the fold of each photo, part after part, int64 [n].
    Returns: the tables, which hold absolute paths. Raises: DataError for a name that no table can
    hold.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tables = [folder / f"fold-{number}.csv" for number in range(k)]
    for number, table in enumerate(tables):
        write_table(table, parts, np.where(fold == number, "val", "train"))
    return tables


def write_table(table: Path, parts: Sequence[Photos], splits: Iterable[str]) -> None:
    """Write photos with their labels and absolute paths, part after part.

    splits: of each photo. Raises: DataError for a name that no table can hold.
    """
    rows = [
        (path.absolute(), photos.fine_names[fine], photos.coarse_names[coarse])
        for photos in parts
        for path, fine, coarse in zip(photos.paths, photos.fine, photos.coarse, strict=True)
    ]
    try:
        with table.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(("path", "label", "coarse", "split"))
            writer.writerows((*row, split) for row, split in zip(rows, splits, strict=True))
    except UnicodeEncodeError as error:
        raise DataError(
            f"{table}: a name is not UTF-8 ({error.object!a}); rename that file or folder"
        ) from error
