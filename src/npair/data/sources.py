"""Data sets as users keep them: folders by class, lists or a table."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from npair.data.dataset import (
    DataError,
    Dataset,
    Row,
    by_split,
    label_of,
    named_splits,
    split_of,
)
from npair.data.files import OTHER_SUFFIXES, SUFFIXES, summary
from npair.data.tables import DELIMITERS, find_lists, read_lists, read_table

# Thumbnails, deleted files and snapshots that systems keep beside the user's photos; in any case.
SYSTEM_FOLDERS = {
    *("@eadir", "#recycle", "#snapshot"),  # Synology
    *("@recycle", "@recently-snapshot"),  # QNAP
    *("__macosx", "lost+found", "$recycle.bin", "system volume information"),
}


def read_dataset(source: Path) -> Dataset:
    """Find the photos of a data set and their labels, without opening any photo.

    source: one of
      - a folder, or one with a subfolder ``dataset``, that holds ``train.txt`` and optionally
        ``val.txt`` and ``test.txt``. Each line is ``path, fine label, coarse label``; the labels
        are numbers, which a ``classes.csv`` like the Grocery Store Dataset's names;
      - a folder of folders of photos, each a class. Their parents are the coarse labels if every
        class has one. If folders ``train``, ``val`` and ``test`` are at the top, they are the
        splits, and folders beside them are ignored;
      - a ``.csv`` or ``.tsv`` table with the columns path, label and optionally coarse and split.

    Splits go by any name in ``SPLIT_NAMES``, such as ``valid`` or ``Test``. Labels that differ only
    in blanks or in Unicode form (NFC, NFD) are one, and a listed path may have either form.

    Keeps the splits that the source names. If it names none, all photos are in train, and
    ``decode_dataset`` holds some out.

    Raises: DataError for any other source, a malformed line, a missing photo, or folders that may
    be splits or classes.
    """
    if source.suffix.lower() in DELIMITERS and source.is_file():
        return read_table(source)
    if not source.is_dir():
        raise DataError(
            f"{source} is neither a folder nor a .csv or .tsv table; name one that exists"
        )
    inner = source / "dataset"
    nested = "train" in find_lists(inner) and "train" not in find_lists(source)
    root = inner if nested else source
    return read_lists(root) if find_lists(root) else _read_folders(root)


def _read_folders(root: Path) -> Dataset:
    photos, others, ignored = find_photos(root)
    folders = split_folders(root, photos)
    split_names = named_splits(folders, root)
    if not folders:
        _refuse_doubtful_splits(root, photos)
    found: list[tuple[str, Path, tuple[str, ...]]] = []
    beside = set()
    for path in photos:
        parents = path.relative_to(root).parts[:-1]
        if folders and parents and parents[0] not in folders:
            beside.add(root / parents[0])
            continue
        in_split = folders and parents
        split, *folder = (folders[parents[0]], *parents[1:]) if in_split else ("train", *parents)
        if folder:
            found.append((split, path, tuple(map(label_of, folder))))
        else:
            ignored.append(path)
    passed_over = sorted({*others, *ignored, *beside})
    if not any(split == "train" for split, _, _ in found):
        place = root / split_names.get("train", "train") if folders else root
        raise DataError(
            f"{place} holds no photo in a folder of its class; make a folder for each class, or"
            " list the photos in a table"
            + f". Not read: {summary(passed_over)}"
            * bool(passed_over)
        )
    nested = all(len(folder) > 1 for _, _, folder in found)
    rows = [
        Row(split, path, "/".join(folder), "/".join(folder[:-1] if nested else folder))
        for split, path, folder in found
    ]
    splits = by_split(rows)
    names = " and ".join(split_names[split] for split in splits) if folders else ""
    made = f"as in the folders {names}" if folders else ""
    return Dataset(splits, made, tuple(passed_over))


def split_folders(root: Path, photos: Iterable[Path]) -> dict[str, str]:
    """Map the folders at the top that are splits to their splits.

    They are splits if they stand for at least two, or if no other folder is at the top. A single
    one among others may be a class, such as toy trains.
    """
    tops = {path.relative_to(root).parts[0] for path in photos if path.parent != root}
    named = {top: split for top in tops if (split := split_of(top))}
    return named if len(set(named.values())) > 1 or len(named) == len(tops) else {}


def _refuse_doubtful_splits(root: Path, photos: Iterable[Path]) -> None:
    """Raise DataError if a folder that would become a class looks like a split.

    A folder at the top named train that holds no folders passes: it may be a class of toy trains.
    """
    inside: dict[Path, set[Path]] = defaultdict(set)
    for path in photos:
        for folder in path.relative_to(root).parents[:-1]:
            inside[root / folder.parent].add(root / folder)
    for parent, folders in sorted(inside.items()):
        named = sorted(folder for folder in folders if split_of(folder.name))
        if parent != root and len({split_of(folder.name) for folder in named}) > 1:
            raise DataError(
                f"{parent} holds {' and '.join(folder.name for folder in named)}, which look like"
                f" splits, but not at the top; name {parent} as the data, move the splits to the"
                " top, or list the photos in a table with a column split"
            )
        for folder in named if parent == root else ():
            if split_of(folder.name) != "train" or folder in inside:
                raise DataError(
                    f"{folder} looks like a split, but beside it are other folders and no other"
                    " split; if it is one, move those away or into a split; if it is a class,"
                    " rename it, or list the photos in a table"
                )


class Found(NamedTuple):
    """What a folder holds, all sorted.

    photos: files with SUFFIXES. others: photos with OTHER_SUFFIXES. ignored: other files, hidden
    files and folders, SYSTEM_FOLDERS, and symlinks to folders that were visited otherwise.
    """

    photos: list[Path]
    others: list[Path]
    ignored: list[Path]


def find_photos(root: Path) -> Found:
    """Find all files below a folder. Follows symlinks, and visits no folder twice.

    A symlink that leads nowhere counts as the photo that it is named as: reading it fails, so that
    its absence is noticed. Raises: DataError for a folder that cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise DataError(
            f"{error.filename}: {error.strerror}; let this user read the folder, or move it away"
        ) from error

    def identity(folder: Path) -> tuple[int, int]:
        return folder.stat().st_dev, folder.stat().st_ino

    found = Found([], [], [])
    seen = {identity(root)}
    for name, folders, files in os.walk(root, followlinks=True, onerror=refuse):
        parent = Path(name)
        # Real folders first, so that a symlink to one of them is the one that is skipped.
        for folder in sorted(folders, key=lambda folder: ((parent / folder).is_symlink(), folder)):
            of_system = folder.startswith(".") or folder.casefold() in SYSTEM_FOLDERS
            if of_system or identity(parent / folder) in seen:  # symlinks can form circles
                folders.remove(folder)
                found.ignored.append(parent / folder)
            else:
                seen.add(identity(parent / folder))
        for path in (parent / file for file in files):
            special = os.path.exists(path) and not os.path.isfile(path)  # noqa: PTH110, PTH113
            suffix = "" if special or path.name.startswith(".") else path.suffix.lower()
            if suffix in SUFFIXES:
                found.photos.append(path)
            else:
                (found.others if suffix in OTHER_SUFFIXES else found.ignored).append(path)
    return Found(*map(sorted, found))
