"""What is wrong with a data set, and the data set without it."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from npair.data.dataset import SPLITS, DataError, Dataset, HoldOut, hold_out_val
from npair.data.files import OTHER_SUFFIXES, SUFFIXES, shown, summary

# With fewer, a network learns these photos by heart rather than the products they show.
FEW_CLASSES, FEW_PHOTOS = 10, 5


@dataclass(frozen=True)
class Findings:
    """Problems of a data set that were dealt with before training, and facts worth a look.

    corrupt: files that cannot be decoded, each with the reason; left out.
    copies: further files of the same picture in the same class and split; left out.
    contradicting: groups of files of the same picture in different classes; all left out.
    leaks: files of the same picture as one of their class in a later split; left out.
    blank: photos of one colour; kept, but for copies.
    lone: classes with a single photo in train, which cannot make a pair; kept.
    classes, median: number of classes in train, and the median of their photos.
    ignored: files and folders that are not photos, or that are in formats which nobody decodes.
    """

    corrupt: tuple[tuple[Path, str], ...]
    copies: tuple[Path, ...]
    contradicting: tuple[tuple[Path, ...], ...]
    leaks: tuple[Path, ...]
    blank: tuple[Path, ...]
    lone: tuple[str, ...]
    classes: int
    median: float
    ignored: tuple[Path, ...]

    def lines(self) -> list[str]:
        """Return a sentence for each kind of finding; none if all is well."""
        others = [
            path
            for path in self.ignored
            if path.suffix.lower() in OTHER_SUFFIXES and not path.name.startswith(".")
        ]
        ignored = set(self.ignored).difference(others)
        formats = ", ".join(SUFFIXES)
        kinds = {
            f"Left out {len(others)} photos, since training reads {formats}; convert them": (
                [summary(others)] if others else []
            ),
            "Left out, since they cannot be decoded": [
                f"{shown(path)} ({reason})" for path, reason in self.corrupt
            ],
            "Left out as copies of other photos of their class": list(map(shown, self.copies)),
            "Left out, since the same photo has different labels": [
                " = ".join(map(shown, group)) for group in self.contradicting
            ],
            "Left out, since the same photo is in a split that tests what was learnt": list(
                map(shown, self.leaks)
            ),
            "Photos of one colour alone, which show nothing": list(map(shown, self.blank)),
            "Classes with a single train photo, which take no part in training": list(
                map(shown, self.lone)
            ),
            "Ignored, since they are not photos in a class's folder": (
                [summary(sorted(ignored))] if ignored else []
            ),
        }
        lines = [f"{what}: {_first(things)}." for what, things in kinds.items() if things]
        if self.classes < FEW_CLASSES or self.median < FEW_PHOTOS:
            lines.append(
                f"The data set is tiny, {self.classes} classes with {self.median:g} train photos"
                " each in the median: expect little of a network trained on fewer than"
                f" {FEW_CLASSES} classes or {FEW_PHOTOS} photos of each."
            )
        return lines


def clean(
    dataset: Dataset,
    digests: Mapping[Path, str],
    previews: Mapping[Path, npt.NDArray[np.uint8]],
    corrupt: Mapping[Path, str],
    hold_out: HoldOut,
) -> tuple[Dataset, Findings]:
    """Leave out corrupt photos and all but one copy of each other, the one in the latest split.

    If the data set has no splits, divide the rest afterwards, so that copies do not decide what is
    val.

    digests: SHA-256 of each photo that could be read. corrupt: why photos cannot be used.
    previews: of the others, the pixels by which copies are found: programs that write other
    metadata into a file, or compress it without loss, leave these as they are.
    Returns: the data set, with the digests of its photos, and the findings.
    Raises: DataError for too few classes.
    """
    places: dict[bytes, list[tuple[str, int]]] = defaultdict(list)
    for split, photos in dataset.splits.items():
        for index, path in enumerate(photos.paths):
            if path not in corrupt:
                places[hashlib.sha256(previews[path].tobytes()).digest()].append((split, index))
    kept: dict[str, list[int]] = {split: [] for split in dataset.splits}
    copies: list[Path] = []
    leaks: list[Path] = []
    contradicting: list[tuple[Path, ...]] = []
    for same in places.values():
        files = tuple(dataset.splits[split].paths[index] for split, index in same)
        if len({int(dataset.splits[split].fine[index]) for split, index in same}) > 1:
            contradicting.append(files)
            continue
        chosen = max(same, key=lambda place: SPLITS.index(place[0]))
        kept[chosen[0]].append(chosen[1])
        for place, path in zip(same, files, strict=True):
            if place != chosen:
                (copies if place[0] == chosen[0] else leaks).append(path)
    splits = {
        split: photos.select(sorted(kept[split]))
        for split, photos in dataset.splits.items()
        if kept[split] or split == "train"
    }
    cleaned = replace(dataset, splits=splits, digests=digests)
    if not dataset.made:
        cleaned = hold_out_val(cleaned, hold_out)
    train = cleaned.train
    counts = np.bincount(train.fine, minlength=len(train.fine_names))
    findings = Findings(
        corrupt=tuple(corrupt.items()),
        copies=tuple(copies),
        contradicting=tuple(contradicting),
        leaks=tuple(leaks),
        blank=tuple(path for path, preview in previews.items() if (preview == preview[0, 0]).all()),
        lone=tuple(train.fine_names[label] for label in np.flatnonzero(counts == 1)),
        classes=int((counts > 0).sum()),
        median=float(np.median(counts[counts > 0])) if len(train) else 0.0,
        ignored=dataset.ignored,
    )
    usable = int((counts >= 2).sum())
    if usable < 2:
        raise DataError(
            f"training needs at least two classes with two photos each, {usable} remained in train;"
            f" add photos. {' '.join(findings.lines())}"
        )
    return cleaned, findings


def _first(things: Sequence[str]) -> str:
    return ", ".join(things[:5]) + (f" and {len(things) - 5} more" if len(things) > 5 else "")
