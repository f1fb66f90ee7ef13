"""Data sets that are listed in text files: a list for each split, or one table."""

from __future__ import annotations

import contextlib
import csv
import io
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from npair.data.dataset import (
    SPLITS,
    DataError,
    Dataset,
    Row,
    by_split,
    label_of,
    named_splits,
    split_of,
)
from npair.data.files import shown

LINE_END = r"\r\n?|\n"  # a lone CR is how Excel for Macs ends lines
DELIMITERS = {".csv": ",", ".tsv": "\t"}
OTHER_DELIMITERS = (",", ";", "\t")  # that either kind of table may have


def find_lists(folder: Path) -> dict[str, str]:
    """Return the name of each split's list. Raises: DataError if a split has two."""
    files = folder.glob("*.[tT][xX][tT]") if folder.is_dir() else ()
    return named_splits((file.name for file in files if file.is_file()), folder)


def read_lists(root: Path) -> Dataset:
    """Read a folder's lists. Raises: DataError."""
    listed: list[tuple[str, Path, int, int]] = []
    lists = find_lists(root)
    if "train" not in lists:
        raise DataError(
            f"{root / 'train.txt'} is missing; it lists the photos of a split, a line each: path,"
            f" fine label, coarse label. If {' and '.join(lists.values())} is no such list, move it"
            " away"
        )
    for split, name in lists.items():
        listed += [(split, *photo) for photo in _read_list(root / name)]
    folders: dict[int, set[str]] = defaultdict(set)
    for _, path, fine, _ in listed:
        folders[fine].add(label_of(path.parent.name))
    fine_known, coarse_known = _read_classes(root / "classes.csv")
    of_folders = {label: names.pop() for label, names in folders.items() if len(names) == 1}
    fine_names = _distinct(of_folders | fine_known, {fine for _, _, fine, _ in listed})
    coarse_names = _distinct(coarse_known, {coarse for _, _, _, coarse in listed})
    rows = [
        Row(split, path, fine_names[fine], coarse_names[coarse])
        for split, path, fine, coarse in listed
    ]
    splits = by_split(rows, tuple(fine_names.values()), tuple(coarse_names.values()))
    return Dataset(splits, f"as listed in {' and '.join(lists.values())}")


def read_table(table: Path) -> Dataset:
    """Read a .csv or .tsv table; all photos are train if it has no column split.

    Raises: DataError.
    """
    optional = ("coarse", "split")
    rows, named, find = [], dict[str, str](), Finder()
    others: dict[str, set[str]] = defaultdict(set)
    for number, cells in read_cells(table, ("path", "label"), optional):
        for column in ("path", "label", *optional):
            if cells.get(column, "given") == "":
                remedy = "fill the cell" + ", or drop the column" * (column in optional)
                raise DataError(f"{table}:{number}: no {column}; {remedy}")
        name = cells.get("split", "train").casefold()
        if (split := split_of(name)) is None:
            raise DataError(
                f"{table}:{number}: the split is {cells['split']!r}; it must be train, val or test"
            )
        if named.setdefault(split, name) != name:
            raise DataError(
                f"{table}:{number}: the split is {name!r}, which is {named[split]!r} above; call it"
                " one thing"
            )
        for column in cells.keys() - {"path", "label", *optional}:
            others[column].add(split_of(cells[column]) or "")
        path = find.photo(table.parent / cells["path"], f"{table}:{number}")
        label = label_of(cells["label"])
        rows.append(Row(split, path, label, label_of(cells.get("coarse", label))))
    if not any(row.split == "train" for row in rows):
        raise DataError(f"{table} lists no train photo; add some")
    if "split" in cells:
        return Dataset(by_split(rows), f"as the column split of {table.name} says")
    for column, splits in others.items():
        if len(splits) > 1 and splits <= set(SPLITS):
            raise DataError(f"{table}:1: the column {column!r} holds splits; call it split")
    return Dataset(by_split(rows), "")


def _read_list(listing: Path) -> list[tuple[Path, int, int]]:
    photos, find = [], Finder()
    for number, line in enumerate(re.split(LINE_END, _text(listing)), start=1):
        if not line.strip():
            continue
        try:
            name, fine, coarse = line.rsplit(",", 2)
            labels = int(fine), int(coarse)
        except ValueError:
            raise DataError(
                f"{listing}:{number}: expected 'path, fine label, coarse label', got {line!r}"
            ) from None
        path = find.photo(listing.parent / name.strip(), f"{listing}:{number}")
        photos.append((path, *labels))
    if not photos:
        raise DataError(f"{listing} lists no photo; add some, or remove it")
    return photos


def _read_classes(table: Path) -> tuple[dict[int, str], dict[int, str]]:
    """Return the names of fine and of coarse labels; none if there is no such table."""
    columns = (
        *("Class ID (int)", "Class Name (str)"),
        *("Coarse Class ID (int)", "Coarse Class Name (str)"),
    )
    fine, coarse = {}, {}
    for number, cells in read_cells(table, columns) if table.is_file() else ():
        try:
            fine[int(cells[columns[0]])] = label_of(cells[columns[1]])
            coarse[int(cells[columns[2]])] = label_of(cells[columns[3]])
        except ValueError:
            raise DataError(
                f"{table}:{number}: a class ID is not a whole number; correct it"
            ) from None
    return fine, coarse


def _distinct(known: Mapping[int, str], labels: Iterable[int]) -> dict[int, str]:
    """Name each label, in ascending order; append the label to a name that several share."""
    names = {label: known.get(label) or str(label) for label in sorted(labels)}
    uses = Counter(names.values())
    return {
        label: name if uses[name] == 1 else f"{name} ({label})" for label, name in names.items()
    }


def read_cells(
    table: Path, required: Sequence[str], optional: Sequence[str] = ()
) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield the line number of each row's begin, and its cells by column, but for empty rows.

    The case of the required and optional columns' names does not count. Columns without a name are
    dropped. Raises: DataError with the line.
    """
    known = {column.casefold(): column for column in (*required, *optional)}

    def names(row: Iterable[str]) -> list[str]:
        return [known.get(name.strip().casefold(), name.strip()) for name in row]

    text = _text(table)
    first, default = re.split(LINE_END, text, maxsplit=1)[0], DELIMITERS[table.suffix.lower()]
    fitting = (
        delimiter
        for delimiter in (default, *OTHER_DELIMITERS)  # spreadsheets choose by the user's language
        if set(required) <= set(names(next(csv.reader([first], delimiter=delimiter), [])))
    )
    line = 1
    try:
        delimiter = next(fitting, default)
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        header = names(next(reader, []))
        for column in required:
            if column not in header:
                raise DataError(
                    f"{table}:1: the header must name the column {column!r}; it names"
                    f" {', '.join(header) or 'none'}"
                )
        if doubled := [name for name, count in Counter(filter(None, header)).items() if count > 1]:
            raise DataError(f"{table}:1: two columns are called {doubled[0]!r}; rename one")
        line = reader.line_num + 1
        for row in reader:
            if len(row) > 0 and len(row) != len(header):
                raise DataError(
                    f"{table}:{line}: {len(row)} cells in {len(header)} columns; quote cells with"
                    " separators"
                )
            if any(cell.strip() for cell in row):
                cells = {name: cell for name, cell in zip(header, row, strict=True) if name}
                yield (
                    line,
                    {
                        name: cell if name == "path" else cell.strip()
                        for name, cell in cells.items()
                    },
                )
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{table}:{line}: {error}; correct the quotes there") from error


def _text(path: Path) -> str:
    content = path.read_bytes()
    try:
        text = content.decode("utf-8-sig")
        wrong = content.find(b"\0")  # valid UTF-8, but UTF-16 rather than text
    except UnicodeDecodeError as error:
        wrong = error.start
    if wrong >= 0:
        line = len(re.findall(LINE_END.encode(), content[:wrong])) + 1
        raise DataError(f"{path}:{line}: this is not UTF-8 text; save the file as UTF-8")
    return text


class Finder:
    """Finds listed photos whose names are composed (NFC) in the list and decomposed on disk, or the
    reverse.
    """

    def __init__(self) -> None:
        self._names: dict[Path, dict[str, str]] = {}  # of each folder: name on disk by composed one

    def photo(self, path: Path, place: str) -> Path:
        """Return the path as it is on disk. Raises: DataError if there is no such file."""
        with contextlib.suppress(OSError):  # a name too long for the file system
            if path.is_file() or (path := self.on_disk(path)).is_file():
                return path
        raise DataError(f"{place}: no photo at {shown(path)}; correct the path or remove the line")

    def on_disk(self, path: Path) -> Path:
        """Return the path as it is on disk, or as given if there is no such file."""
        if path.exists() or path.parent == path:
            return path
        folder = self.on_disk(path.parent)
        if folder not in self._names:
            names = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
            self._names[folder] = {unicodedata.normalize("NFC", name): name for name in names}
        return folder / self._names[folder].get(unicodedata.normalize("NFC", path.name), path.name)
