"""Where a model's versions are kept: a folder, as Triton reads it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path


class RepositoryError(RuntimeError):
    """A repository that cannot be used as asked; the message says what to do."""


class Repository:
    """One model's folder: config.pbtxt, and a folder for each version, which is there whole or not at all.

    Triton takes every name that begins with a digit for a version, so nothing unfinished has one. Locks are the kernel's (flock):
    they end with the process that holds them, however it ends.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.location, self.name = folder, str(folder), folder.resolve().name

    def read(self, path: str) -> bytes:
        """A file in the model's folder. Raises: FileNotFoundError."""
        return (self.folder / path).read_bytes()

    def write(self, path: str, content: bytes) -> None:
        """In one step: whoever reads it finds the old content or the new one. For one writer at a time, see ``exclusive``."""
        unfinished = self.folder / f"unfinished-{path}"
        try:
            unfinished.write_bytes(content)
            _sync(unfinished)
            unfinished.replace(self.folder / path)
        finally:
            unfinished.unlink(missing_ok=True)
        _sync(self.folder)

    def versions(self) -> dict[int, bool]:
        """Their numbers, ascending, and whether each is complete."""
        numbers = sorted(int(path.name) for path in self.folder.iterdir() if path.name.isdecimal() and path.is_dir())
        return {number: (self.folder / f"{number}/manifest.json").is_file() for number in numbers}

    def unfinished(self) -> list[str]:
        """What publishers are writing, or left."""
        return sorted(path.name for path in self.folder.glob("staging-*"))

    def sizes(self, number: int) -> int:
        """Bytes of a version."""
        return sum(path.stat().st_size for path in (self.folder / str(number)).rglob("*") if path.is_file())

    @contextlib.contextmanager
    def version(self, number: int) -> Iterator[Path]:
        """A local folder that holds the version."""
        yield self.folder / str(number)

    @contextlib.contextmanager
    def new_version(self) -> Iterator[tuple[int, Path]]:
        """The next number, and an empty folder that becomes this version when the block ends without an exception."""
        self._clean()
        number = max(self.versions(), default=0) + 1
        while (locked := self._claim(number)) is None:
            number += 1
        staging = self.folder / f"staging-{number}"
        try:
            yield number, staging
            for path in (staging, *staging.rglob("*")):
                _sync(path)
            staging.rename(self.folder / str(number))
            _sync(self.folder)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
        finally:
            os.close(locked)

    def remove(self, number: int) -> None:
        """All of a version; nobody sees half of it."""
        going = self.folder / f"staging-retired-{number}"
        (self.folder / str(number)).rename(going)
        _sync(self.folder)
        shutil.rmtree(going)

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[None]:
        """For whoever changes config.pbtxt or removes versions. Raises: RepositoryError where another is at it."""
        handle = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            if not _locked(handle):
                raise RepositoryError(f"another process releases or retires in {self.location}; wait for it, then try again")
            yield
        finally:
            os.close(handle)

    def _claim(self, number: int) -> int | None:
        """A lock on the staging folder of a number, or none where another publisher has it or had it."""
        staging = self.folder / f"staging-{number}"
        staging.mkdir(mode=0o755, exist_ok=True)
        handle = os.open(staging, os.O_RDONLY | os.O_DIRECTORY)
        with contextlib.suppress(FileNotFoundError):
            if _locked(handle) and os.path.samestat(staging.stat(), os.fstat(handle)) and not (self.folder / str(number)).exists():
                return handle
        os.close(handle)
        return None

    def _clean(self) -> None:
        """Removes what processes left that were killed."""
        for path in self.folder.glob("staging-*"):
            with contextlib.suppress(OSError):
                handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
                try:
                    if _locked(handle):
                        shutil.rmtree(path)
                finally:
                    os.close(handle)


def open_repository(location: str | Path) -> Repository:
    """Raises: RepositoryError where there is no model's folder."""
    folder = Path(location)
    if not (folder / "config.pbtxt").is_file():
        raise RepositoryError(f"{location} is not a model's folder: it has no config.pbtxt")
    return Repository(folder)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _locked(handle: int) -> bool:
    """Whether the lock on an open file or folder could be had."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
