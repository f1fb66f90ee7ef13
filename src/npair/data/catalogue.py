"""What a gallery is made of: photos with labels and other columns, without splits."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import NamedTuple

from npair.data.dataset import DataError, label_of
from npair.data.files import shown, summary
from npair.data.sources import find_photos, read_dataset, split_folders
from npair.data.tables import DELIMITERS, Finder, find_lists, read_cells


class Entry(NamedTuple):
    """What a catalogue says about a photo; columns: all but path and label."""

    label: str
    columns: dict[str, str]


class Catalogue(NamedTuple):
    """Photos of a source.

    root: the folder of the photos, or of the table or lists that name them. ignored: in words, the
    files and folders in it that are not photos.
    """

    root: Path
    entries: dict[Path, Entry]
    ignored: str


def read_catalogue(source: Path) -> Catalogue:
    """Read which photos a source holds, without opening any. One label is enough.

    source: one of
      - a ``.csv`` or ``.tsv`` table with the columns path, label and any others. Listed files may
        be missing, so that the rest can be read;
      - a folder with lists, as ``read_dataset`` takes it, with all its splits;
      - any other folder. The subfolder is the label, empty at the top, and without the folders of
        splits. Photos in formats that must be converted are among the entries.

    Raises: DataError.
    """
    if source.suffix.lower() in DELIMITERS and source.is_file():
        return _read_table(source)
    if not source.is_dir() or find_lists(source) or find_lists(source / "dataset"):
        splits = read_dataset(source).splits.values()
        entries = {
            path: Entry(photos.fine_names[fine], {})
            for photos in splits
            for path, fine in zip(photos.paths, photos.fine, strict=True)
        }
        return Catalogue(source, entries, "")
    photos, others, ignored = find_photos(source)
    paths = sorted(photos + others)
    split_names = split_folders(source, paths)
    entries = {}
    for path in paths:
        folders = path.relative_to(source).parts[:-1]
        if folders and folders[0] in split_names:
            folders = folders[1:]
        entries[path] = Entry("/".join(map(label_of, folders)), {})
    return Catalogue(source, entries, summary(ignored))


def _read_table(table: Path) -> Catalogue:
    entries: dict[Path, Entry] = {}
    lines: dict[Path, int] = {}
    finder = Finder()
    for number, cells in read_cells(table, ("path", "label")):
        for column in ("path", "label"):
            if not cells[column].strip():
                raise DataError(f"{table}:{number}: no {column}; fill the cell, or remove the line")
        path = _listed(table.parent / cells.pop("path"), finder)
        if os.path.exists(path) and not os.path.isfile(path):  # noqa: PTH110, PTH113 never raise
            raise DataError(f"{table}:{number}: {shown(path)} is no file; remove the line")
        entry = Entry(label_of(cells.pop("label")), cells)
        if path in entries:
            _refuse_contradiction(entries[path], entry, f"{table}:{number}", path, lines[path])
        else:
            entries[path], lines[path] = entry, number
    return Catalogue(table.parent, entries, "")


def _listed(path: Path, finder: Finder) -> Path:
    """Return a listed path as it is on disk, if it is there, without '..'."""
    with contextlib.suppress(OSError):  # it cannot be read, which whoever opens it will notice
        path = finder.on_disk(path)
    return path.parent.resolve() / path.name if ".." in path.parts else path


def _refuse_contradiction(first: Entry, second: Entry, place: str, path: Path, line: int) -> None:
    """Raise DataError if two lines say different things of a photo, but for its split."""
    before, after = ({"label": entry.label, **entry.columns} for entry in (first, second))
    for column in after.keys() - {"split"}:
        if before[column] != after[column]:
            raise DataError(
                f"{place}: {shown(path)} has the {column} {after[column]!r}, but {before[column]!r}"
                f" in line {line}; keep one of the lines"
            )
