"""A repository (see npair.releasing.repository) on a local disk."""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from npair.releasing import RepositoryError
from npair.serving.manifest import NAME


class Folder:
    """A repository on a local disk, where versions appear and disappear atomically.

    Triton takes every name that begins with a digit for a version, so unfinished folders begin
    with "staging". Folders are locked by flock, which the kernel releases if the process dies.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.location = folder, str(folder)
        self.name = Path(os.path.abspath(folder)).name  # noqa: PTH100 - keeps the name of a link

    def read(self, path: str) -> bytes:
        return (self.folder / path).read_bytes()

    def write(self, path: str, content: bytes) -> None:
        unfinished = self.folder / f"unfinished-{path}"
        try:
            unfinished.write_bytes(content)
            unfinished.chmod(0o644)  # despite the umask: the server may run as another user
            _sync(unfinished)
            unfinished.replace(self.folder / path)
        finally:
            unfinished.unlink(missing_ok=True)
        _sync(self.folder)

    def delete(self, path: str) -> None:
        (self.folder / path).unlink(missing_ok=True)
        _sync(self.folder)

    def names(self) -> set[str]:
        return {path.name for path in self.folder.iterdir()} if self.folder.exists() else set()

    def versions(self) -> dict[int, bool]:
        names = filter(str.isdecimal, self.names())
        numbers = sorted(int(name) for name in names if (self.folder / name).is_dir())
        return {number: (self.folder / f"{number}/{NAME}").is_file() for number in numbers}

    def unfinished(self) -> list[str]:
        return sorted(path.name for path in self.folder.glob("staging-*"))

    def size(self, number: int) -> int:
        paths = (self.folder / str(number)).rglob("*")
        return sum(path.stat().st_size for path in paths if path.is_file())

    @contextlib.contextmanager
    def version(self, number: int) -> Iterator[Path]:
        yield self.folder / str(number)

    @contextlib.contextmanager
    def new_version(self) -> Iterator[tuple[int, Path]]:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._clean()
        number = max(self.versions(), default=0) + 1
        while (handle := self._claim(number)) is None:
            number += 1
        staging = self.folder / f"staging-{number}"
        try:
            yield number, staging
            for path in (staging, *staging.rglob("*")):
                path.chmod(0o755 if path.is_dir() else 0o644)  # despite the umask, as in write
                _sync(path)
            staging.rename(self.folder / str(number))
            _sync(self.folder)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
        finally:
            os.close(handle)

    def remove(self, number: int) -> None:
        going = self.folder / f"staging-retired-{number}-{secrets.token_hex(8)}"
        (self.folder / str(number)).rename(going)
        _sync(self.folder)
        if going.is_symlink():  # what it points to is not the repository's
            going.unlink()
        else:
            shutil.rmtree(going, ignore_errors=True)  # a publisher may be removing it as well

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[None]:
        handle = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            if not _lock(handle):
                raise RepositoryError(
                    f"another process releases or retires in {self.location}; wait for it, then"
                    " try again"
                )
            yield
        finally:
            os.close(handle)

    def _claim(self, number: int) -> int | None:
        """Create and lock the staging folder of a number.

        Returns: the open folder, or None if another publisher has or had it.
        """
        staging = self.folder / f"staging-{number}"
        try:
            staging.mkdir(exist_ok=True)
            handle = os.open(staging, os.O_RDONLY | os.O_DIRECTORY)
        except (FileExistsError, FileNotFoundError):  # another publisher is removing it
            return None
        except PermissionError:
            if not staging.exists():
                raise
            return None  # it belongs to another user
        with contextlib.ExitStack() as closing:
            closing.callback(os.close, handle)
            try:
                if not _lock_at(staging, handle) or not os.access(staging, os.W_OK):
                    return None
            except FileNotFoundError:  # another publisher has removed it
                return None
            except RepositoryError:  # no locks: do not leave a folder for each try
                with contextlib.suppress(OSError):
                    staging.rmdir()
                raise
            if not (self.folder / str(number)).exists():
                closing.pop_all()
                return handle
            with contextlib.suppress(OSError):  # others remove it as well
                staging.rmdir()  # the number was published after it was chosen
        return None

    def _clean(self) -> None:
        """Remove the staging folders of killed processes."""
        for path in self.folder.glob("staging-*"):
            with contextlib.suppress(OSError):
                handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
                try:
                    if _lock_at(path, handle):
                        shutil.rmtree(path)
                finally:
                    os.close(handle)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _lock_at(path: Path, handle: int) -> bool:
    """Lock an open folder. Returns: whether it succeeded and the folder is still at this path.

    Since it was opened, it may have been removed, and created again by another publisher.
    Raises: OSError if there is none at this path.
    """
    return _lock(handle) and os.path.samestat(path.stat(), os.fstat(handle))


def _lock(handle: int) -> bool:
    """Lock an open folder until it is closed. Returns: False if it is locked already.

    Raises: RepositoryError on a file system without locks.
    """
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise RepositoryError(
            f"the repository's file system has no locks ({error}); publish and release on one that"
            " has, or in an object store"
        ) from error
    return True
