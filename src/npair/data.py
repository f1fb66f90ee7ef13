"""Photos by class: which there are, their labels, and how they are divided into splits and folds."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from npair.serving.preprocess import Limits

# Training photos are the user's own: only a file that cannot be a photo is refused.
LIMITS = Limits(max_bytes=100_000_000, max_pixels=200_000_000)

SPLITS = ("train", "val", "test")  # in the order in which photos must not leak: never from a later one into an earlier one
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
DELIMITERS = {".csv": ",", ".tsv": "\t"}

Item = TypeVar("Item")
Result = TypeVar("Result")


class DataError(ValueError):
    """A data set that cannot be used; the message names the file and the line or the class."""


@dataclass(frozen=True)
class Photos:
    """One split of a data set.

    fine: int64 [n], indices into fine_names.
    coarse: int64 [n], indices into coarse_names; the same as fine where the data has no coarse labels.
    fine_names, coarse_names: the data set's labels, shared by all of its splits, no name twice.
    """

    paths: tuple[Path, ...]
    fine: npt.NDArray[np.int64]
    coarse: npt.NDArray[np.int64]
    fine_names: tuple[str, ...]
    coarse_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.paths)

    def select(self, indices: Iterable[int] | npt.NDArray[np.int64]) -> Photos:
        """The photos at these indices, in this order."""
        rows = np.fromiter(indices, dtype=np.int64)
        paths = tuple(self.paths[row] for row in rows)
        return Photos(paths, self.fine[rows], self.coarse[rows], self.fine_names, self.coarse_names)


@dataclass(frozen=True)
class Dataset:
    """Photos by split: ``train``, and ``val`` and ``test`` where there are any.

    made: how photos came into splits, in words; empty for photos that are yet to be split.
    ignored: files and folders beside the photos that are not part of the data set.
    """

    splits: dict[str, Photos]
    made: str
    ignored: tuple[Path, ...] = ()

    @property
    def train(self) -> Photos:
        return self.splits["train"]

    @property
    def val(self) -> Photos | None:
        return self.splits.get("val")

    def fingerprint(self) -> str:
        """SHA-256 over every photo's bytes, label names and split, in order: two data sets are the same if and only if theirs are.

        Where the photos lie does not count. Raises: OSError for a photo that cannot be read.
        """
        digest = hashlib.sha256()
        for split, photos in self.splits.items():
            for index, photo in enumerate(each(digest_of, photos.paths, "read")):
                fine, coarse = photos.fine_names[photos.fine[index]], photos.coarse_names[photos.coarse[index]]
                digest.update(json.dumps([split, photo, fine, coarse]).encode())
        return digest.hexdigest()


class _Row(NamedTuple):
    """What a source says of one photo."""

    split: str
    path: Path
    fine: str
    coarse: str


def read_dataset(source: Path, *, split_by: str = "photo", val_share: float = 0.1, seed: int = 0) -> Dataset:
    """Read which photos there are, and their labels; no photo is opened.

    source: one of
      - a folder, or one with a subfolder ``dataset``, with ``train.txt`` and maybe ``val.txt`` and ``test.txt``: a line per photo,
        ``path, fine label, coarse label``, the labels numbers, which a ``classes.csv`` like the Grocery Store Dataset's names;
      - a folder of folders of photos, each a class; the parent folders are the coarse labels where every class has one. Folders
        ``train``, ``val`` and ``test`` at the top are the splits;
      - a ``.csv`` or ``.tsv`` table with the columns path, label and maybe coarse and split.

    Splits that the source names are kept. Otherwise val gets ``val_share`` of each class's photos, of classes with at least three
    (``split_by="photo"``), or that share of the classes, at least two, with all of their photos (``"class"``); which ones is a
    function of the seed.

    Raises: DataError for a source that is none of these, for a malformed line, a photo that is not there, or too few classes.
    """
    if source.suffix.lower() in DELIMITERS and source.is_file():
        dataset = _read_table(source)
    elif not source.is_dir():
        raise DataError(f"{source} is neither a folder nor a .csv or .tsv table; name one that exists")
    elif (source / "train.txt").is_file() or not (source / "dataset" / "train.txt").is_file():
        listed = any((source / f"{split}.txt").is_file() for split in SPLITS)
        dataset = _read_lists(source) if listed else _read_folders(source)
    else:
        dataset = _read_lists(source / "dataset")
    return dataset if dataset.made else _split(dataset, split_by, val_share, seed)


def _read_lists(root: Path) -> Dataset:
    listed: list[tuple[str, Path, int, int]] = []
    for split in SPLITS:
        listing = root / f"{split}.txt"
        if split == "train" or listing.is_file():
            listed += [(split, *photo) for photo in _read_list(listing)]
    folders: dict[int, set[str]] = defaultdict(set)
    for _, path, fine, _ in listed:
        folders[fine].add(path.parent.name)
    fine_known, coarse_known = _read_classes(root / "classes.csv")
    fine_known = {label: names.pop() for label, names in folders.items() if len(names) == 1} | fine_known
    fine_names = _distinct(fine_known, {fine for _, _, fine, _ in listed})
    coarse_names = _distinct(coarse_known, {coarse for _, _, _, coarse in listed})
    rows = [_Row(split, path, fine_names[fine], coarse_names[coarse]) for split, path, fine, coarse in listed]
    splits = _by_split(rows, tuple(fine_names.values()), tuple(coarse_names.values()))
    return Dataset(splits, f"as listed in {' and '.join(f'{split}.txt' for split in splits)}")


def _read_list(listing: Path) -> list[tuple[Path, int, int]]:
    if not listing.is_file():
        raise DataError(f"{listing} is missing; it lists the photos of a split, a line each: path, fine label, coarse label")
    photos = []
    for number, line in enumerate(_text(listing).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            name, fine, coarse = line.rsplit(",", 2)
            photo = (listing.parent / name.strip(), int(fine), int(coarse))
        except ValueError:
            raise DataError(f"{listing}:{number}: expected 'path, fine label, coarse label', got {line!r}") from None
        _require_file(photo[0], f"{listing}:{number}")
        photos.append(photo)
    if not photos:
        raise DataError(f"{listing} lists no photo; add some, or remove it")
    return photos


def _read_classes(table: Path) -> tuple[dict[int, str], dict[int, str]]:
    """The names of fine and of coarse labels, empty where there is no such table."""
    columns = ("Class ID (int)", "Class Name (str)", "Coarse Class ID (int)", "Coarse Class Name (str)")
    fine, coarse = {}, {}
    for number, cells in _cells(table, columns) if table.is_file() else ():
        try:
            fine[int(cells[columns[0]])] = cells[columns[1]]
            coarse[int(cells[columns[2]])] = cells[columns[3]]
        except ValueError:
            raise DataError(f"{table}:{number}: a class ID is not a whole number; correct it") from None
    return fine, coarse


def _distinct(known: Mapping[int, str], labels: Iterable[int]) -> dict[int, str]:
    """A name for each label, in the labels' order: the known one, followed by the label where others have it too, or the label."""
    names = {label: known.get(label) or str(label) for label in sorted(labels)}
    uses = Counter(names.values())
    return {label: name if uses[name] == 1 else f"{name} ({label})" for label, name in names.items()}


def _read_table(table: Path) -> Dataset:
    rows, splits = [], set()
    for number, cells in _cells(table, ("path", "label")):
        for column in ("path", "label", "coarse", "split"):
            if cells.get(column, "given") == "":
                raise DataError(
                    f"{table}:{number}: no {column}; fill the cell" + ", or drop the column" * (column in {"coarse", "split"})
                )
        split = cells.get("split", "train")
        if split not in SPLITS:
            raise DataError(f"{table}:{number}: the split is {split!r}; it must be train, val or test")
        splits.add(cells.get("split"))
        path = table.parent / cells["path"]
        _require_file(path, f"{table}:{number}")
        rows.append(_Row(split, path, cells["label"], cells.get("coarse", cells["label"])))
    if not any(row.split == "train" for row in rows):
        raise DataError(f"{table} lists no train photo; add some")
    return Dataset(_by_split(rows), "" if None in splits else f"as the column split of {table.name} says")


def _cells(table: Path, required: Sequence[str]) -> Iterator[tuple[int, dict[str, str]]]:
    """The line number and the cells by column of each row that is not empty."""
    reader = csv.reader(io.StringIO(_text(table), newline=""), delimiter=DELIMITERS[table.suffix.lower()], strict=True)
    try:
        header = [name.strip() for name in next(reader, [])]
        for column in required:
            if header.count(column) != 1:
                raise DataError(
                    f"{table}:1: the header must name the column {column!r} once; it names {', '.join(header) or 'none'}"
                )
        for row in reader:
            if len(row) > 0 and len(row) != len(header):
                raise DataError(
                    f"{table}:{reader.line_num}: {len(row)} cells in {len(header)} columns; quote cells with separators"
                )
            if any(cell.strip() for cell in row):
                yield (
                    reader.line_num,
                    {name: cell if name == "path" else cell.strip() for name, cell in zip(header, row, strict=True)},
                )
    except csv.Error as error:
        raise DataError(f"{table}:{reader.line_num}: {error}; correct the quotes there") from error


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text (byte {error.start}); save it as UTF-8") from error


def _require_file(path: Path, place: str) -> None:
    try:
        if path.is_file():
            return
    except OSError:  # a name too long for the file system
        pass
    raise DataError(f"{place}: no photo at {shown(path)}; correct the path or remove the line")


def _read_folders(root: Path) -> Dataset:
    photos, ignored = find_photos(root)
    tops = {path.relative_to(root).parts[0] for path in photos if path.parent != root}
    own = "train" in tops and tops <= set(SPLITS)
    found: list[tuple[str, Path, tuple[str, ...]]] = []
    for path in photos:
        parents = path.relative_to(root).parts[:-1]
        split, *folder = parents if own and parents else ("train", *parents)
        if folder:
            found.append((split, path, tuple(folder)))
        else:
            ignored.append(path)
    if not any(split == "train" for split, _, _ in found):
        place = root / "train" if own else root
        raise DataError(
            f"{place} holds no photo in a folder of its class; make a folder for each class, or list the photos in a table"
        )
    nested = all(len(folder) > 1 for _, _, folder in found)
    rows = [_Row(split, path, "/".join(folder), "/".join(folder[:-1] if nested else folder)) for split, path, folder in found]
    splits = _by_split(rows)
    return Dataset(splits, f"as in the folders {' and '.join(splits)}" if own else "", tuple(ignored))


def find_photos(root: Path) -> tuple[list[Path], list[Path]]:
    """The photos at any depth, and what else there is, each sorted; what is hidden is not looked into."""

    def refuse(error: OSError) -> None:
        raise DataError(f"{error.filename}: {error.strerror}; let this user read the folder, or move it away") from error

    def identity(folder: Path) -> tuple[int, int]:
        return folder.stat().st_dev, folder.stat().st_ino

    photos: list[Path] = []
    ignored: list[Path] = []
    seen = {identity(root)}
    for name, folders, files in os.walk(root, followlinks=True, onerror=refuse):
        parent = Path(name)
        for folder in sorted(folders, key=lambda folder: ((parent / folder).is_symlink(), folder)):
            if folder.startswith(".") or identity(parent / folder) in seen:  # symlinks can form circles
                folders.remove(folder)
                ignored.append(parent / folder)
            else:
                seen.add(identity(parent / folder))
        for file in files:
            path = parent / file
            is_photo = not file.startswith(".") and path.suffix.lower() in SUFFIXES and path.is_file()
            (photos if is_photo else ignored).append(path)
    return sorted(photos), sorted(ignored)


def _by_split(
    rows: Sequence[_Row], fine_names: tuple[str, ...] | None = None, coarse_names: tuple[str, ...] | None = None
) -> dict[str, Photos]:
    """Photos by split in the order of SPLITS; names are sorted where they are not given."""
    fine_names = fine_names or tuple(sorted({row.fine for row in rows}))
    coarse_names = coarse_names or tuple(sorted({row.coarse for row in rows}))
    fine_index, coarse_index = ({name: index for index, name in enumerate(names)} for names in (fine_names, coarse_names))
    splits = {}
    for split in SPLITS:
        if chosen := [row for row in rows if row.split == split]:
            fine = np.array([fine_index[row.fine] for row in chosen], dtype=np.int64)
            coarse = np.array([coarse_index[row.coarse] for row in chosen], dtype=np.int64)
            splits[split] = Photos(tuple(row.path for row in chosen), fine, coarse, fine_names, coarse_names)
    return splits


def _split(dataset: Dataset, split_by: str, val_share: float, seed: int) -> Dataset:
    photos, rng = dataset.train, np.random.default_rng(seed)
    if not 0 < val_share < 1:
        raise DataError(f"the share of val is {val_share}; it must lie between 0 and 1")
    if split_by not in ("photo", "class"):
        raise DataError(f"a data set can be split by photo or by class, not by {split_by!r}")
    classes = len(photos.fine_names)
    needed = 2 if split_by == "photo" else 4
    if classes < needed:
        raise DataError(f"a split by {split_by} needs at least {needed} classes, found {classes}: {', '.join(photos.fine_names)}")
    if split_by == "class":
        count = min(max(2, round(val_share * classes)), classes - 2)
        in_val = np.isin(photos.fine, rng.choice(classes, count, replace=False))
        made = f"split by class, seed {seed}: {count} of {classes} classes are val"
    else:
        in_val = np.zeros(len(photos), dtype=bool)
        for label in range(classes):
            members = np.flatnonzero(photos.fine == label)
            if len(members) >= 3:  # two photos stay in train, where they make a pair
                count = min(max(1, round(val_share * len(members))), len(members) - 2)
                in_val[rng.choice(members, count, replace=False)] = True
        made = f"split by photo, seed {seed}: {val_share} of each class's photos are val"
    splits = {"train": photos.select(np.flatnonzero(~in_val)), "val": photos.select(np.flatnonzero(in_val))}
    return Dataset({split: chosen for split, chosen in splits.items() if len(chosen)}, made, dataset.ignored)


def shown(name: Path | str) -> str:
    """A name as it can stand in a line of a terminal: line breaks and bytes that are not UTF-8 escaped."""
    return str(name) if str(name).isprintable() else ascii(str(name))


def read_photo(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(LIMITS.max_bytes + 1)  # enough to see that it is too large


def digest_of(path: Path) -> str:
    return hashlib.sha256(read_photo(path)).hexdigest()


def each(function: Callable[[Item], Result], items: Sequence[Item], what: str) -> Iterator[Result]:
    """``function`` of each item, in order, with a progress bar; Pillow decodes and hashlib hashes outside the GIL."""
    block = 256  # so that results do not pile up behind a slow one
    threads = len(os.sched_getaffinity(0))
    with (
        ThreadPoolExecutor(threads) as pool,
        tqdm(total=len(items), desc=what, unit="photo", leave=False, disable=None) as progress,
    ):
        for start in range(0, len(items), block):
            for result in pool.map(function, items[start : start + block]):
                progress.update()
                yield result
