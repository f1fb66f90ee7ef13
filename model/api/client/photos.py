"""Find photos in folders, and read them."""

from __future__ import annotations

import io
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from .formats import SERVED, encoded_photo

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
            return encoded_photo(io.BytesIO(sys.stdin.buffer.read()))
        content = encoded_photo(self._path)
        if self._path.suffix.lower() in OTHER_SUFFIXES and not SERVED.match(content):
            raise ValueError("neither the server nor this command reads it; save it as JPEG")
        return content


def photos_in(
    paths: Iterable[Path],
    passed_over: Counter[str] | None = None,
    visited: set[str] | None = None,
) -> Iterator[Path]:
    """Yield the paths, and for a folder the photos in it and below, sorted by name.

    Skips hidden files and folders, ``._`` files among them, and SYSTEM_FOLDERS. Follows symlinks,
    and visits no folder twice. npair.data.sources.find_photos has the same rule.

    passed_over: counts the other files of folders, except hidden ones, by suffix.
    visited: the real paths of folders that are not visited again.
    """
    passed_over = Counter() if passed_over is None else passed_over
    for path in paths:
        if not path.is_dir():
            yield path
            continue
        known = {os.path.realpath(path)} if visited is None else visited
        names = _names_in(path, passed_over, known)
        yield from photos_in((path / name for name in names), passed_over, known)


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
