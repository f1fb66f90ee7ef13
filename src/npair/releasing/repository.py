"""The repository of a model's versions, as Triton reads it: a folder or an object store."""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

from npair.objects import Objects, this_process
from npair.serving.manifest import NAME

MODEL = "npair"  # the only name that serve.py, clients and dashboards know
STORES = ("s3", "gs")  # the extras of pyproject.toml with their fsspec implementations


class RepositoryError(RuntimeError):
    """The repository cannot be used; the message says what to do."""


class Repository(Protocol):
    """One model's folder: config.pbtxt, and a folder for each version, complete with manifest.json.

    location: the path or URL. name: the model's, which is the last part of the location.
    """

    location: str
    name: str

    def read(self, path: str) -> bytes:
        """Read a file of the model's folder. Raises: FileNotFoundError."""

    def write(self, path: str, content: bytes) -> None:
        """Replace a file atomically. One writer at a time: see ``exclusive``."""

    def delete(self, path: str) -> None:
        """Delete a file of the model's folder if it exists."""

    def names(self) -> set[str]:
        """Return the names of files and folders in the model's folder; empty if it is missing."""

    def versions(self) -> dict[int, bool]:
        """Return whether each version is complete, by number, ascending."""

    def unfinished(self) -> list[str]:
        """Return the names of folders that publishers are writing or have abandoned."""

    def size(self, number: int) -> int:
        """Return the size of a version in bytes."""

    def version(self, number: int) -> AbstractContextManager[Path]:
        """Provide a version as a local folder."""

    def new_version(self) -> AbstractContextManager[tuple[int, Path]]:
        """Provide the next number and an empty folder.

        The folder becomes the version if the block ends without an exception.
        """

    def remove(self, number: int) -> None:
        """Remove a version. Readers never see half of it as complete.

        Raises: RepositoryError if another process is publishing it.
        """

    def exclusive(self) -> AbstractContextManager[None]:
        """Hold the lock for changes of config.pbtxt and removals.

        Raises: RepositoryError if another process holds it.
        """


class Folder(Repository):
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


class Store(Objects, Repository):
    """A repository in an object store, where puts are atomic and listings consistent, but nothing
    can be renamed.

    Publishing puts an empty manifest.json first, if there is none, which claims the number, and
    puts its content last, which completes the version. Removing deletes manifest.json last, so
    that a free number has no files. An object beside the folder names the publisher meanwhile:
    ``remove`` spares its version, and if somebody deletes that object, the publisher neither
    completes nor removes what may be another's by then. A killed publisher leaves an incomplete
    version, which others skip.
    """

    error = RepositoryError

    def __init__(self, location: str) -> None:
        super().__init__(location)
        self.name = self.root.rpartition("/")[2]

    def write(self, path: str, content: bytes) -> None:
        self._ask("pipe_file", f"{self.root}/{path}", content)

    def delete(self, path: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._ask("rm_file", f"{self.root}/{path}")

    def names(self) -> set[str]:
        return {path.partition("/")[0] for path in self._files()}

    def versions(self) -> dict[int, bool]:
        files = self._files()
        folders = {path.partition("/")[0] for path in files if "/" in path}
        numbers = sorted(int(folder) for folder in folders if folder.isdecimal())
        return {number: files.get(f"{number}/{NAME}", 0) > 0 for number in numbers}

    def unfinished(self) -> list[str]:
        return []  # unfinished versions have numbers

    def size(self, number: int) -> int:
        return sum(self._files(f"{number}/").values())

    @contextlib.contextmanager
    def version(self, number: int) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(prefix="npair-version-") as scratch:
            paths = list(self._files(f"{number}/"))
            sources, targets = ([f"{top}/{path}" for path in paths] for top in (self.root, scratch))
            self._ask("get", sources, targets)
            yield Path(scratch) / str(number)

    @contextlib.contextmanager
    def new_version(self) -> Iterator[tuple[int, Path]]:
        number = max(self.versions(), default=0) + 1
        while not self._create(f"{self.root}/{number}/{NAME}", b""):
            number += 1
        this = this_process()
        try:
            self._ask("pipe_file", self._claim(number), this.encode())
            with tempfile.TemporaryDirectory(prefix="npair-staging-") as staging:
                yield number, Path(staging)
                self._upload(Path(staging), number, this)
        except BaseException:
            with contextlib.suppress(OSError, RepositoryError):  # the store may be unreachable
                if self._holder(self._claim(number)) == this:
                    self._remove(number)
            raise
        with contextlib.suppress(OSError, RepositoryError):  # means nothing beside a whole version
            self._ask("rm_file", self._claim(number))

    def remove(self, number: int) -> None:
        if not self.versions().get(number) and (holder := self._holder(self._claim(number))):
            raise RepositoryError(
                f"{holder} publishes version {number} in {self.location}; wait for it; if it was"
                f" killed, first delete {self.location}.{number}.publishing"
            )
        self._remove(number)

    def _remove(self, number: int) -> None:
        manifest = f"{number}/{NAME}"
        self.write(manifest, b"")  # incomplete from here on, and the number still claimed
        for path in self._files(f"{number}/").keys() - {manifest}:
            self._ask("rm_file", f"{self.root}/{path}")
        with contextlib.suppress(FileNotFoundError):
            self._ask("rm_file", self._claim(number))
        self._ask("rm_file", f"{self.root}/{manifest}")

    def _claim(self, number: int) -> str:
        """Return the path of the object that names the publisher of a version.

        It lies beside the folder, as the lock does: see ``exclusive``.
        """
        return f"{self.root}.{number}.publishing"

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[None]:
        # Beside the folder: Triton lists it to download it, and fails if a file has gone meanwhile.
        lock = f"{self.root}.releasing"
        this = this_process()
        holder = this if self._create(lock, this.encode()) else self._holder(lock)
        # If an answer was lost and the library asked again, the lock exists and is this process's.
        if holder != this:
            raise RepositoryError(
                f"{holder or 'another process'} releases or retires in {self.location}; wait for"
                f" it, then try again; if it was killed, first delete {self.location}.releasing"
            )
        try:
            yield
        finally:
            self._release(lock)

    def _release(self, lock: str) -> None:
        """Delete the lock, or warn: a failure must not hide the outcome of what it guarded."""
        try:
            self._ask("rm_file", lock)
        except FileNotFoundError:  # an answer was lost and the library asked again
            pass
        except (OSError, RepositoryError) as error:
            left = f"the lock {self.location}.releasing is left and blocks other changes; delete it"
            print(f"npair: {left} ({error})", file=sys.stderr)

    def _holder(self, lock: str) -> str:
        """Return the process that a lock or a claim names, empty if there is none."""
        try:
            return str(self._ask("cat_file", lock).decode())
        except FileNotFoundError:
            return ""

    def _check_claim(self, number: int, this: str) -> None:
        if (holder := self._holder(self._claim(number))) != this:
            raise RepositoryError(
                f"version {number} in {self.location} was retired while it was being published"
                f"{f', and {holder} publishes that number now' if holder else ''}; publish again"
            )

    def _upload(self, folder: Path, number: int, this: str) -> None:
        self._check_claim(number, this)
        sizes = {
            path.relative_to(folder).as_posix(): path.stat().st_size
            for path in folder.rglob("*")
            if path.is_file()
        }
        for name in sizes.keys() - {NAME}:
            self._ask("put_file", str(folder / name), f"{self.root}/{number}/{name}")
        sizes[NAME] = 0
        if self._files(f"{number}/") != {f"{number}/{name}": sizes[name] for name in sizes}:
            raise RepositoryError(
                f"version {number} did not arrive in {self.location} as it was sent; publish it"
                " again"
            )
        self._check_claim(number, this)
        self.write(f"{number}/{NAME}", (folder / NAME).read_bytes())

    def _files(self, prefix: str = "") -> dict[str, int]:
        """Return sizes in bytes by path in the model's folder."""
        found = self._ask("find", self.root, detail=True)
        sizes = {
            path.removeprefix(f"{self.root}/"): int(info["size"]) for path, info in found.items()
        }
        return {path: size for path, size in sizes.items() if path.startswith(prefix)}


def open_repository(location: str | Path, *, start: bool = False) -> Repository:
    """Open a model's folder: a path, s3:// or gs://.

    start: take an empty or missing folder as well, to publish a model's first version.
    Raises: RepositoryError if there is none, or support for the store is not installed.
    """
    scheme, remote, _ = str(location).partition("://")
    if remote and scheme not in STORES:
        schemes = " or ".join(f"{store}://" for store in STORES)
        raise RepositoryError(f"{location} is neither a folder nor at {schemes}")
    try:
        repository: Repository = Store(str(location)) if remote else Folder(Path(location))
        repository.read("config.pbtxt")
    except ImportError as error:
        raise RepositoryError(
            f"support for {scheme}:// is not installed; run: pip install 'npair[{scheme}]'"
        ) from error
    except (FileNotFoundError, NotADirectoryError) as error:
        reason = f"{location} is not a model's folder: it has no config.pbtxt"
        if not start:
            raise RepositoryError(reason) from error
        a_file = isinstance(error, NotADirectoryError)
        if repository.name != MODEL or a_file or _foreign(repository):
            raise RepositoryError(
                f"{reason}; to start a model, name an empty or missing folder called {MODEL}"
            ) from error
    return repository


def _foreign(repository: Repository) -> list[str]:
    """Return the names of what neither a publisher nor a version control system has left."""
    left, names = ("staging-", "unfinished-", "."), repository.names()
    return [name for name in names if not name.isdecimal() and not name.startswith(left)]


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
