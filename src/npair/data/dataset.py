"""Photos by class: which there are, their labels, and how they are divided into splits and folds."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import json
import os
import unicodedata
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
SPLIT_NAMES = {  # what people call them, in any case
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp")
DELIMITERS = {".csv": ",", ".tsv": "\t"}
# What systems keep beside the user's photos: thumbnails, what was deleted, snapshots; in any case.
SYSTEM_FOLDERS = {
    *("@eadir", "#recycle", "#snapshot"),  # Synology
    *("@recycle", "@recently-snapshot"),  # QNAP
    *("__macosx", "lost+found", "$recycle.bin", "system volume information"),
}

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
        ``train``, ``val`` and ``test`` at the top are the splits, and what lies beside them is ignored;
      - a ``.csv`` or ``.tsv`` table with the columns path, label and maybe coarse and split.

    Splits go by any name in ``SPLIT_NAMES``, such as ``valid`` or ``Test``. Labels that differ only in blanks or in Unicode form
    (NFC, NFD) are one, and a listed path is found in whichever form it is on disk.

    Splits that the source names are kept. Otherwise val gets ``val_share`` of each class's photos, of classes with at least three
    (``split_by="photo"``), or that share of the classes, at least two, with all of their photos (``"class"``); which ones is a
    function of the seed.

    Raises: DataError for a source that is none of these, for a malformed line, a photo that is not there, splits that cannot be
    told from classes, or too few classes.
    """
    if source.suffix.lower() in DELIMITERS and source.is_file():
        dataset = _read_table(source)
    elif not source.is_dir():
        raise DataError(f"{source} is neither a folder nor a .csv or .tsv table; name one that exists")
    else:
        inner = source / "dataset"
        root = inner if "train" in find_lists(inner) and "train" not in find_lists(source) else source
        dataset = _read_lists(root) if find_lists(root) else _read_folders(root)
    return dataset if dataset.made else _split(dataset, split_by, val_share, seed)


def label_of(text: str) -> str:
    """A label as it is compared: composed (NFC), as all but Macs write it, and with single blanks."""
    return unicodedata.normalize("NFC", " ".join(text.split()) or text)


def _split_of(name: str) -> str | None:
    return SPLIT_NAMES.get(name.casefold())


def _named_splits(names: Iterable[str], place: Path) -> dict[str, str]:
    """The name of each split that is among these, in the order of SPLITS. Raises: DataError where one split has two names."""
    found: dict[str, str] = {}
    for name in sorted(names):
        if (split := _split_of(name.casefold().removesuffix(".txt"))) is None:
            continue
        if split in found:
            raise DataError(f"{place}: {found[split]} and {name} are both the {split} split; merge them, or move one away")
        found[split] = name
    return {split: found[split] for split in SPLITS if split in found}


def find_lists(folder: Path) -> dict[str, str]:
    """The files that list a split, by split. Raises: DataError where two list one."""
    files = folder.glob("*.[tT][xX][tT]") if folder.is_dir() else ()
    return _named_splits((file.name for file in files if file.is_file()), folder)


def _read_lists(root: Path) -> Dataset:
    listed: list[tuple[str, Path, int, int]] = []
    lists = find_lists(root)
    if "train" not in lists:
        raise DataError(
            f"{root / 'train.txt'} is missing; it lists the photos of a split, a line each: path, fine label, coarse label."
            f" If {' and '.join(lists.values())} is no such list, move it away"
        )
    for split, name in lists.items():
        listed += [(split, *photo) for photo in _read_list(root / name)]
    folders: dict[int, set[str]] = defaultdict(set)
    for _, path, fine, _ in listed:
        folders[fine].add(label_of(path.parent.name))
    fine_known, coarse_known = _read_classes(root / "classes.csv")
    fine_known = {label: names.pop() for label, names in folders.items() if len(names) == 1} | fine_known
    fine_names = _distinct(fine_known, {fine for _, _, fine, _ in listed})
    coarse_names = _distinct(coarse_known, {coarse for _, _, _, coarse in listed})
    rows = [_Row(split, path, fine_names[fine], coarse_names[coarse]) for split, path, fine, coarse in listed]
    splits = _by_split(rows, tuple(fine_names.values()), tuple(coarse_names.values()))
    return Dataset(splits, f"as listed in {' and '.join(lists.values())}")


def _read_list(listing: Path) -> list[tuple[Path, int, int]]:
    photos, find = [], _Finder()
    for number, line in enumerate(_text(listing).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            name, fine, coarse = line.rsplit(",", 2)
            labels = int(fine), int(coarse)
        except ValueError:
            raise DataError(f"{listing}:{number}: expected 'path, fine label, coarse label', got {line!r}") from None
        photos.append((find.photo(listing.parent / name.strip(), f"{listing}:{number}"), *labels))
    if not photos:
        raise DataError(f"{listing} lists no photo; add some, or remove it")
    return photos


def _read_classes(table: Path) -> tuple[dict[int, str], dict[int, str]]:
    """The names of fine and of coarse labels, empty where there is no such table."""
    columns = ("Class ID (int)", "Class Name (str)", "Coarse Class ID (int)", "Coarse Class Name (str)")
    fine, coarse = {}, {}
    for number, cells in _cells(table, columns) if table.is_file() else ():
        try:
            fine[int(cells[columns[0]])] = label_of(cells[columns[1]])
            coarse[int(cells[columns[2]])] = label_of(cells[columns[3]])
        except ValueError:
            raise DataError(f"{table}:{number}: a class ID is not a whole number; correct it") from None
    return fine, coarse


def _distinct(known: Mapping[int, str], labels: Iterable[int]) -> dict[int, str]:
    """A name for each label, in the labels' order: the known one, followed by the label where others have it too, or the label."""
    names = {label: known.get(label) or str(label) for label in sorted(labels)}
    uses = Counter(names.values())
    return {label: name if uses[name] == 1 else f"{name} ({label})" for label, name in names.items()}


def _read_table(table: Path) -> Dataset:
    optional = ("coarse", "split")
    rows, named, find = [], dict[str, str](), _Finder()
    others: dict[str, set[str]] = defaultdict(set)
    for number, cells in _cells(table, ("path", "label"), optional):
        for column in ("path", "label", *optional):
            if cells.get(column, "given") == "":
                raise DataError(f"{table}:{number}: no {column}; fill the cell" + ", or drop the column" * (column in optional))
        name = cells.get("split", "train").casefold()
        if (split := _split_of(name)) is None:
            raise DataError(f"{table}:{number}: the split is {cells['split']!r}; it must be train, val or test")
        if named.setdefault(split, name) != name:
            raise DataError(f"{table}:{number}: the split is {name!r}, which is {named[split]!r} above; call it one thing")
        for column in cells.keys() - {"path", "label", *optional}:
            others[column].add(_split_of(cells[column]) or "")
        path = find.photo(table.parent / cells["path"], f"{table}:{number}")
        label = label_of(cells["label"])
        rows.append(_Row(split, path, label, label_of(cells.get("coarse", label))))
    if not any(row.split == "train" for row in rows):
        raise DataError(f"{table} lists no train photo; add some")
    if "split" in cells:
        return Dataset(_by_split(rows), f"as the column split of {table.name} says")
    for column, splits in others.items():
        if len(splits) > 1 and splits <= set(SPLITS):
            raise DataError(f"{table}:1: the column {column!r} holds splits; call it split")
    return Dataset(_by_split(rows), "")


def _cells(table: Path, required: Sequence[str], optional: Sequence[str] = ()) -> Iterator[tuple[int, dict[str, str]]]:
    """The line number and the cells by column of each row that is not empty. These columns are known in any case."""
    known = {column.casefold(): column for column in (*required, *optional)}
    reader = csv.reader(io.StringIO(_text(table), newline=""), delimiter=DELIMITERS[table.suffix.lower()], strict=True)
    try:
        header = [known.get(name.strip().casefold(), name.strip()) for name in next(reader, [])]
        for column in known.values():
            if header.count(column) not in ((1,) if column in required else (0, 1)):
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


class _Finder:
    """Finds the files that a list or a table names, be a name composed there (NFC) and decomposed on disk, or the reverse."""

    def __init__(self) -> None:
        self._names: dict[Path, dict[str, str]] = {}  # on disk, by composed name, of folders that were looked through

    def photo(self, path: Path, place: str) -> Path:
        """The path as it is on disk. Raises: DataError where no file is there."""
        with contextlib.suppress(OSError):  # a name too long for the file system
            if path.is_file() or (path := self._on_disk(path)).is_file():
                return path
        raise DataError(f"{place}: no photo at {shown(path)}; correct the path or remove the line")

    def _on_disk(self, path: Path) -> Path:
        if path.exists() or path.parent == path:
            return path
        folder = self._on_disk(path.parent)
        if folder not in self._names:
            names = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
            self._names[folder] = {unicodedata.normalize("NFC", name): name for name in names}
        return folder / self._names[folder].get(unicodedata.normalize("NFC", path.name), path.name)


def _read_folders(root: Path) -> Dataset:
    photos, ignored = find_photos(root)
    folders = split_folders(root, photos)
    split_names = _named_splits(folders, root)
    if not folders:
        _refuse_doubtful_splits(root, photos)
    found: list[tuple[str, Path, tuple[str, ...]]] = []
    beside = set()
    for path in photos:
        parents = path.relative_to(root).parts[:-1]
        if folders and parents and parents[0] not in folders:
            beside.add(root / parents[0])
            continue
        split, *folder = (folders[parents[0]], *parents[1:]) if folders and parents else ("train", *parents)
        if folder:
            found.append((split, path, tuple(map(label_of, folder))))
        else:
            ignored.append(path)
    if not any(split == "train" for split, _, _ in found):
        place = root / split_names.get("train", "train") if folders else root
        raise DataError(
            f"{place} holds no photo in a folder of its class; make a folder for each class, or list the photos in a table"
        )
    nested = all(len(folder) > 1 for _, _, folder in found)
    rows = [_Row(split, path, "/".join(folder), "/".join(folder[:-1] if nested else folder)) for split, path, folder in found]
    splits = _by_split(rows)
    made = f"as in the folders {' and '.join(split_names[split] for split in splits)}" if folders else ""
    return Dataset(splits, made, tuple(sorted({*ignored, *beside})))


def split_folders(root: Path, photos: Iterable[Path]) -> dict[str, str]:
    """The folders at the top that are splits, and which splits: where there are at least two, or nothing else. One among others may
    be a class, such as toy trains."""
    tops = {path.relative_to(root).parts[0] for path in photos if path.parent != root}
    named = {top: split for top in tops if (split := _split_of(top))}
    return named if len(set(named.values())) > 1 or len(named) == len(tops) else {}


def _refuse_doubtful_splits(root: Path, photos: Iterable[Path]) -> None:
    """Raises: DataError for folders that bear a split's name and would be read as classes, but for a class of toy trains."""
    inside: dict[Path, set[Path]] = defaultdict(set)
    for path in photos:
        for folder in path.relative_to(root).parents[:-1]:
            inside[root / folder.parent].add(root / folder)
    for parent, folders in sorted(inside.items()):
        named = sorted(folder for folder in folders if _split_of(folder.name))
        if parent != root and len({_split_of(folder.name) for folder in named}) > 1:
            raise DataError(
                f"{parent} holds {' and '.join(folder.name for folder in named)}, which look like splits, but not at the top; name"
                f" {parent} as the data, move the splits to the top, or list the photos in a table with a column split"
            )
        for folder in named if parent == root else ():
            if _split_of(folder.name) != "train" or folder in inside:
                raise DataError(
                    f"{folder} looks like a split, but beside it are other folders and no other split; if it is one, move those"
                    " away or into a split; if it is a class, rename it, or list the photos in a table"
                )


def find_photos(root: Path) -> tuple[list[Path], list[Path]]:
    """The photos at any depth, and what else there is, each sorted; folders that are hidden or a system's are not looked into."""

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
            of_system = folder.startswith(".") or folder.casefold() in SYSTEM_FOLDERS
            if of_system or identity(parent / folder) in seen:  # symlinks can form circles
                folders.remove(folder)
                ignored.append(parent / folder)
            else:
                seen.add(identity(parent / folder))
        for file in files:
            path = parent / file
            is_photo = not file.startswith(".") and path.suffix.lower() in SUFFIXES and path.is_file()
            (photos if is_photo else ignored).append(path)
    return sorted(photos), sorted(ignored)


def summary(ignored: Iterable[Path]) -> str:
    """What was passed over, in a line: how many of each suffix or name, with an example, the most first."""
    kinds: dict[str, list[Path]] = defaultdict(list)
    for path in ignored:
        kinds["hidden" if path.name.startswith(".") else path.suffix.lower() or path.name].append(path)
    groups = sorted(kinds.items(), key=lambda kind: -len(kind[1]))
    parts = [f"{len(paths)} {shown(kind)} such as {shown(paths[0])}" if paths[1:] else shown(paths[0]) for kind, paths in groups]
    return ", ".join(parts[:5]) + (f" and {len(parts) - 5} more kinds" if parts[5:] else "")


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
