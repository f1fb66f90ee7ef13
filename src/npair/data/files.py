"""Photo files: which names they have, how they are read, hashed and shown."""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from tqdm import tqdm

from npair.serving.preprocess import Limits

# Training photos are the user's own: refuse only a file that cannot be a photo.
LIMITS = Limits(max_bytes=100_000_000, max_pixels=200_000_000)

SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp")

# Photos that have to be converted first. Their absence must be said; that of a text must not.
OTHER_SUFFIXES = {
    *(".avif", ".avifs", ".bmp", ".dib", ".gif", ".heic", ".heif", ".heics", ".hif", ".tif"),
    *(".tiff", ".apng", ".jp2", ".j2k", ".jpf", ".jpx", ".jxl", ".jxr", ".psd", ".svg", ".tga"),
    *(".3fr", ".arw", ".cr2", ".cr3", ".dng", ".erf", ".mrw", ".nef", ".nrw", ".orf", ".pef"),
    *(".raf", ".raw", ".rw2", ".rwl", ".sr2", ".srw", ".x3f"),  # cameras' raw files
}

BLOCK = 256  # items under way, so that results do not pile up behind a slow one

Item = TypeVar("Item")
Result = TypeVar("Result")


def summary(paths: Iterable[Path]) -> str:
    """Describe files in a line: the count and an example of each suffix or name."""
    kinds: dict[str, list[Path]] = defaultdict(list)
    for path in paths:
        kind = "hidden" if path.name.startswith(".") else path.suffix.lower() or path.name
        kinds[kind].append(path)
    parts = [
        f"{len(paths)} {shown(kind)} such as {shown(paths[0])}" if paths[1:] else shown(paths[0])
        for kind, paths in sorted(kinds.items(), key=lambda kind: -len(kind[1]))
    ]
    return ", ".join(parts[:5]) + (f" and {len(parts) - 5} more kinds" if parts[5:] else "")


def read_photo(path: Path) -> bytes:
    """Read a photo, or as much of a file as shows that it exceeds LIMITS. Raises: OSError."""
    with path.open("rb") as file:
        return file.read(LIMITS.max_bytes + 1)


def digest_of(path: Path) -> str:
    """Return the SHA-256 of a photo's bytes, in hexadecimal. Raises: OSError."""
    return hashlib.sha256(read_photo(path)).hexdigest()


def parallel_map(
    function: Callable[[Item], Result], items: Sequence[Item], description: str
) -> Iterator[Result]:
    """Yield ``function(item)`` for each item, in order, from threads and with a progress bar.

    Threads suffice: Pillow decodes and hashlib hashes without holding the GIL.
    """
    with (
        ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool,
        tqdm(
            total=len(items), desc=description, unit="photo", leave=False, disable=None
        ) as progress,
    ):
        for start in range(0, len(items), BLOCK):
            for result in pool.map(function, items[start : start + BLOCK]):
                progress.update()
                yield result


def shown(name: Path | str) -> str:
    """Return a name for a line of a terminal; escape line breaks and bytes that are not UTF-8."""
    return str(name) if str(name).isprintable() else ascii(str(name))
