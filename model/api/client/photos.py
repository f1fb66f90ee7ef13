"""Find photos in folders, and read them."""

from __future__ import annotations

import io
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from .formats import MAX_BYTES, READ, encoded_photo

SUFFIXES = {
    *(".apng", ".jfif", ".jpe", ".jpeg", ".jpg", ".png", ".webp"),  # sent as they are
    *(".avif", ".avifs", ".bmp", ".dib", ".gif", ".heic", ".heics", ".heif", ".hif"),  # converted
    *(".tif", ".tiff"),
}
# Other photos, cameras' raw files among them. They are left out by name, so that it is noticed.
OTHER_SUFFIXES = {
    *(".3fr", ".arw", ".cr2", ".cr3", ".dng", ".erf", ".j2k", ".jp2", ".jpf", ".jpx", ".jxl"),
    *(".jxr", ".mrw", ".nef", ".nrw", ".orf", ".pef", ".psd", ".raf", ".raw", ".rw2", ".rwl"),
    *(".sr2", ".srw", ".svg", ".tga", ".x3f"),
}
# Thumbnails, deleted files and snapshots of Synology, QNAP, macOS and Windows; case does not count.
SYSTEM_FOLDERS = {
    *("@eadir", "#recycle", "#snapshot", "@recycle", "@recently-snapshot"),
    *("__macosx", "lost+found", "$recycle.bin", "system volume information"),
}
STDIN = Path("-")


class Unread:
    """A photo for NpairClient.stream, which reads it when its batch is due."""

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)

    def read(self) -> bytes:
        """Raises: OSError; ValueError with a reason."""
        if self._path == STDIN:
            content = sys.stdin.buffer.read(MAX_BYTES + 1)
            if len(content) > MAX_BYTES:
                raise ValueError(f"more than {MAX_BYTES} bytes on standard input")
            return encoded_photo(io.BytesIO(content))
        with self._path.open("rb") as file:
            if self._path.suffix.lower() in OTHER_SUFFIXES and not READ.match(file.read(32)):
                raise ValueError("neither the server nor this command reads it; save it as JPEG")
            file.seek(0)
            return encoded_photo(file)


def photos_in(paths: Iterable[Path], passed_over: Counter[str] | None = None) -> Iterator[Path]:
    """Yield the paths, and for a folder the photos in it and below, sorted by name.

    Skips hidden files and folders, ``._`` files among them, and SYSTEM_FOLDERS. Follows symlinks.
    Visits no folder twice and yields no path twice, but STDIN. npair.data.sources.find_photos has
    the same rule.

    passed_over: counts the other files of folders, except hidden ones, by suffix.
    """
    paths = list(paths)
    passed_over = Counter() if passed_over is None else passed_over
    # Only a path that is given can come twice: no set of all photos is needed.
    visited, given, yielded = set[str](), {*paths} - {STDIN}, set[Path]()
    for path in paths:
        if not path.is_dir():
            found = iter((path,))
        elif (real := os.path.realpath(path)) not in visited:
            visited.add(real)
            found = _photos_below(path, passed_over, visited)
        else:
            continue
        for photo in found:
            if photo in yielded:
                continue
            if photo in given:
                yielded.add(photo)
            yield photo


def _photos_below(folder: Path, passed_over: Counter[str], visited: set[str]) -> Iterator[Path]:
    for name in _names_in(folder, passed_over, visited):
        path = folder / name
        if path.is_dir():
            yield from _photos_below(path, passed_over, visited)
        else:
            yield path


def _names_in(folder: Path, passed_over: Counter[str], visited: set[str]) -> list[str]:
    """Return the sorted names of a folder's photos, and of folders that are new to ``visited``."""
    names = []
    with os.scandir(folder) as entries:
        # Real folders first, so that a symlink to one of them is the one that is skipped.
        ordered = sorted(entries, key=lambda entry: (entry.is_symlink(), entry.name))
    for entry in ordered:
        file = Path(entry) if entry.is_symlink() else entry  # a Path bears circular symlinks
        suffix = Path(entry.name).suffix.lower()
        if entry.name.startswith(".") or entry.name.casefold() in SYSTEM_FOLDERS:
            continue
        if file.is_dir():
            if (real := os.path.realpath(entry)) not in visited:
                visited.add(real)
                names.append(entry.name)
        elif not file.is_file() and Path(entry).exists():  # a pipe or a device
            continue
        elif suffix in SUFFIXES | OTHER_SUFFIXES:  # a broken symlink as well: it will be named
            names.append(entry.name)
        else:
            passed_over[suffix or "without a suffix"] += 1
    return sorted(names)
