"""A data set in memory: photos with their labels, divided into splits."""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from npair.data.files import digest_of, parallel_map

# From the least to the most withheld: no photo may leak from a later split into an earlier one.
SPLITS = ("train", "val", "test")
SPLIT_NAMES = {  # in any case
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}


class DataError(ValueError):
    """A data set that cannot be used; the message names the file and the line or the class."""


@dataclass(frozen=True)
class Photos:
    """The photos of one split.

    fine: int64 [n], indices into fine_names.
    coarse: int64 [n], indices into coarse_names; equal to fine if the source has no coarse labels.
    fine_names, coarse_names: the labels, unique, shared by all splits of a data set.
    """

    paths: tuple[Path, ...]
    fine: npt.NDArray[np.int64]
    coarse: npt.NDArray[np.int64]
    fine_names: tuple[str, ...]
    coarse_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def has_coarse(self) -> bool:
        """Whether the coarse labels are any others than the fine ones."""
        same_names = self.coarse_names == self.fine_names
        return not (same_names and np.array_equal(self.coarse, self.fine))

    def select(self, indices: Iterable[int] | npt.NDArray[np.int64]) -> Photos:
        """Return the photos at these indices, in this order."""
        rows = np.fromiter(indices, dtype=np.int64)
        paths = tuple(self.paths[row] for row in rows)
        return Photos(paths, self.fine[rows], self.coarse[rows], self.fine_names, self.coarse_names)


@dataclass(frozen=True)
class Dataset:
    """Photos by split: ``train`` and, if the data set has them, ``val`` and ``test``.

    made: how the photos were divided, in words; empty if all are in train and yet to be divided.
    held_out: whether ``hold_out_val`` divided them, not the source.
    ignored: files and folders beside the photos that are not part of the data set.
    digests: SHA-256 of the photos that have been read, by path.
    """

    splits: dict[str, Photos]
    made: str
    ignored: tuple[Path, ...] = ()
    digests: Mapping[Path, str] = field(default_factory=dict)
    held_out: bool = False

    @property
    def train(self) -> Photos:
        return self.splits["train"]

    @property
    def val(self) -> Photos | None:
        return self.splits.get("val")

    def digest(self, path: Path) -> str:
        """Return a photo's SHA-256; read it only if it has not been read. Raises: OSError."""
        return self.digests.get(path) or digest_of(path)

    def fingerprint(self) -> str:
        """Hash every photo's bytes, label names and split, in order, with SHA-256.

        Two data sets are equal if and only if their fingerprints are; paths do not count.
        Raises: OSError for a photo that cannot be read.
        """
        digest = hashlib.sha256()
        for split, photos in self.splits.items():
            for index, photo in enumerate(parallel_map(self.digest, photos.paths, "read")):
                fine = photos.fine_names[photos.fine[index]]
                coarse = photos.coarse_names[photos.coarse[index]]
                digest.update(json.dumps([split, photo, fine, coarse]).encode())
        return digest.hexdigest()


@dataclass(frozen=True)
class HoldOut:
    """How train is divided if a data set has no splits.

    Moves ``val_share`` of each class with at least three photos to val (``split_by="photo"``), or
    that share of the classes with at least two photos, at least two of them (``"class"``).
    """

    split_by: str = "photo"
    val_share: float = 0.1
    seed: int = 0

    @classmethod
    def of(cls, options: Any) -> HoldOut:
        """Take the fields from what has them, such as the configuration of a run."""
        return cls(options.split_by, options.val_share, options.seed)


class Row(NamedTuple):
    """One photo as a source describes it."""

    split: str
    path: Path
    fine: str
    coarse: str


def spread(count: int, most: int) -> npt.NDArray[np.int64]:
    """Return at most ``most`` indices, spread evenly over ``count`` items: int64 [n]."""
    return np.unique(np.linspace(0, count - 1, most).astype(np.int64))


def split_of(name: str) -> str | None:
    """Return the split that a name means, or None."""
    return SPLIT_NAMES.get(name.casefold())


def named_splits(names: Iterable[str], place: Path) -> dict[str, str]:
    """Map each split to its name among these, with or without .txt, in the order of SPLITS.

    Raises: DataError if a split has two names.
    """
    found: dict[str, str] = {}
    for name in sorted(names):
        if (split := split_of(name.casefold().removesuffix(".txt"))) is None:
            continue
        if split in found:
            raise DataError(
                f"{place}: {found[split]} and {name} are both the {split} split; merge them, or"
                " move one away"
            )
        found[split] = name
    return {split: found[split] for split in SPLITS if split in found}


def label_of(text: str) -> str:
    """Normalise a label: Unicode's composed form (NFC), as all but Macs write it, single blanks."""
    return unicodedata.normalize("NFC", " ".join(text.split()) or text)


def by_split(
    rows: Sequence[Row],
    fine_names: tuple[str, ...] | None = None,
    coarse_names: tuple[str, ...] | None = None,
) -> dict[str, Photos]:
    """Group rows by split, in the order of SPLITS. Sort the labels if no order is given.

    A coarse label that all photos share says nothing, such as a folder around all classes: they
    count as having none.
    """
    if len({row.coarse for row in rows}) == 1:
        rows, coarse_names = [row._replace(coarse=row.fine) for row in rows], fine_names
    fine_names = fine_names or tuple(sorted({row.fine for row in rows}))
    coarse_names = coarse_names or tuple(sorted({row.coarse for row in rows}))
    fine_index = {name: index for index, name in enumerate(fine_names)}
    coarse_index = {name: index for index, name in enumerate(coarse_names)}
    splits = {}
    for split in SPLITS:
        if members := [row for row in rows if row.split == split]:
            fine = np.array([fine_index[row.fine] for row in members], dtype=np.int64)
            coarse = np.array([coarse_index[row.coarse] for row in members], dtype=np.int64)
            paths = tuple(row.path for row in members)
            splits[split] = Photos(paths, fine, coarse, fine_names, coarse_names)
    return splits


def hold_out_val(dataset: Dataset, how: HoldOut) -> Dataset:
    """Move photos from train to val.

    Which ones depends on the seed and each photo's bytes, or each class's label, but not on the
    photos beside it: if photos are added, nearly all of val stays what it was. A network that was
    trained before they came can then be compared with one that was trained with them.
    Raises: DataError for bad options or too few classes; OSError for a photo that cannot be read.
    """
    photos = dataset.train
    if not 0 < how.val_share < 1:
        raise DataError(f"the share of val is {how.val_share}; it must lie between 0 and 1")
    if how.split_by not in ("photo", "class"):
        raise DataError(f"a data set can be split by photo or by class, not by {how.split_by!r}")

    def rank(name: str) -> bytes:
        return hashlib.sha256(f"{how.seed} {name}".encode(errors="surrogateescape")).digest()

    labels, counts = np.unique(photos.fine, return_counts=True)
    if how.split_by == "class":
        labels = labels[counts >= 2]  # others would be queries without a match
        names = [photos.fine_names[label] for label in labels]
        if len(names) < 4:
            raise DataError(
                "a split by class needs at least 4 classes with two photos each, found"
                f" {len(names)}: {', '.join(names)}"
            )
        count = min(max(2, round(how.val_share * len(names))), len(names) - 2)
        in_val = np.isin(photos.fine, labels[np.argsort([rank(name) for name in names])[:count]])
        made = (
            f"split by class, seed {how.seed}: {count} of {len(names)} classes with two photos or"
            " more are val"
        )
    else:
        ranks = np.array(
            [rank(digest) for digest in parallel_map(dataset.digest, photos.paths, "read")]
        )
        in_val = np.zeros(len(photos), dtype=bool)
        for label in labels:
            members = np.flatnonzero(photos.fine == label)
            if len(members) >= 3:  # leave two in train, which make a pair
                count = min(max(1, round(how.val_share * len(members))), len(members) - 2)
                in_val[members[np.argsort(ranks[members])[:count]]] = True
        made = (
            f"split by photo, seed {how.seed}: {how.val_share} of each class's photos are val, at"
            " least one of each class with three"
        )
        if not in_val.any():
            made = "no photo is val, since no class has three"
    splits = {"train": photos.select(np.flatnonzero(~in_val))}
    if in_val.any():
        splits["val"] = photos.select(np.flatnonzero(in_val))
    return replace(dataset, splits=splits, made=made, held_out=True)
