"""Where a model's versions are kept, as Triton reads them: a folder, or an object store."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Protocol

STORES = ("s3", "gs")  # the extras of pyproject.toml that bring what fsspec reads them with


class RepositoryError(RuntimeError):
    """A repository that cannot be used as asked; the message says what to do."""


class Repository(Protocol):
    """One model's folder: config.pbtxt, and a folder for each version, which is complete once it has its manifest.json.

    location: as it was given. name: the model's, the last part of that.
    """

    location: str
    name: str

    def read(self, path: str) -> bytes:
        """A file in the model's folder. Raises: FileNotFoundError."""

    def write(self, path: str, content: bytes) -> None:
        """In one step: whoever reads it finds the old content or the new one. For one writer at a time, see ``exclusive``."""

    def delete(self, path: str) -> None:
        """A file in the model's folder, where it is there."""

    def versions(self) -> dict[int, bool]:
        """Their numbers, ascending, and whether each is complete."""

    def unfinished(self) -> list[str]:
        """What publishers are writing, or left, under names that are no versions'."""

    def size(self, number: int) -> int:
        """Bytes of a version."""

    def version(self, number: int) -> AbstractContextManager[Path]:
        """A local folder that holds the version."""

    def new_version(self) -> AbstractContextManager[tuple[int, Path]]:
        """The next number, and an empty folder that becomes this version when the block ends without an exception."""

    def remove(self, number: int) -> None:
        """All of a version; nobody sees half of it as complete."""

    def exclusive(self) -> AbstractContextManager[None]:
        """For whoever changes config.pbtxt or removes versions. Raises: RepositoryError where another is at it."""


class Folder(Repository):
    """On this machine's disks: a version is there whole or not at all.

    Triton takes every name that begins with a digit for a version, so nothing unfinished has one. Locks are the kernel's (flock):
    they end with the process that holds them, however it ends.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.location, self.name = folder, str(folder), Path(os.path.abspath(folder)).name  # noqa: PTH100 (a link's own name is the model's)

    def read(self, path: str) -> bytes:
        return (self.folder / path).read_bytes()

    def write(self, path: str, content: bytes) -> None:
        unfinished = self.folder / f"unfinished-{path}"
        try:
            unfinished.write_bytes(content)
            unfinished.chmod(0o644)  # whatever the umask: servers run as others
            _sync(unfinished)
            unfinished.replace(self.folder / path)
        finally:
            unfinished.unlink(missing_ok=True)
        _sync(self.folder)

    def delete(self, path: str) -> None:
        (self.folder / path).unlink(missing_ok=True)
        _sync(self.folder)

    def versions(self) -> dict[int, bool]:
        numbers = sorted(int(path.name) for path in self.folder.iterdir() if path.name.isdecimal() and path.is_dir())
        return {number: (self.folder / f"{number}/manifest.json").is_file() for number in numbers}

    def unfinished(self) -> list[str]:
        return sorted(path.name for path in self.folder.glob("staging-*"))

    def size(self, number: int) -> int:
        return sum(path.stat().st_size for path in (self.folder / str(number)).rglob("*") if path.is_file())

    @contextlib.contextmanager
    def version(self, number: int) -> Iterator[Path]:
        yield self.folder / str(number)

    @contextlib.contextmanager
    def new_version(self) -> Iterator[tuple[int, Path]]:
        self._clean()
        number = max(self.versions(), default=0) + 1
        while (locked := self._claim(number)) is None:
            number += 1
        staging = self.folder / f"staging-{number}"
        try:
            yield number, staging
            for path in (staging, *staging.rglob("*")):
                path.chmod(0o755 if path.is_dir() else 0o644)  # whatever the umask: servers run as others
                _sync(path)
            staging.rename(self.folder / str(number))
            _sync(self.folder)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
        finally:
            os.close(locked)

    def remove(self, number: int) -> None:
        going = Path(tempfile.mkdtemp(prefix=f"staging-retired-{number}-", dir=self.folder))
        (self.folder / str(number)).rename(going)
        _sync(self.folder)
        shutil.rmtree(going, ignore_errors=True)  # a publisher that cleans may be at it, too

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[None]:
        busy = RepositoryError(f"another process releases or retires in {self.location}; wait for it, then try again")
        with alone(self.folder, busy):
            yield

    def _claim(self, number: int) -> int | None:
        """A lock on the staging folder of a number, or none where another publisher has it or had it."""
        staging = self.folder / f"staging-{number}"
        try:
            staging.mkdir(exist_ok=True)
            handle = os.open(staging, os.O_RDONLY | os.O_DIRECTORY)
        except (FileExistsError, FileNotFoundError):  # another publisher cleans meanwhile
            return None
        except PermissionError:
            if not staging.exists():
                raise
            return None  # another user's
        with contextlib.suppress(OSError):
            if _locked_at(staging, handle) and os.access(staging, os.W_OK):
                if not (self.folder / str(number)).exists():
                    return handle
                staging.rmdir()  # another has published this number since it was chosen
        os.close(handle)
        return None

    def _clean(self) -> None:
        """Removes what processes left that were killed."""
        for path in self.folder.glob("staging-*"):
            with contextlib.suppress(OSError):
                handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
                try:
                    if _locked_at(path, handle):
                        shutil.rmtree(path)
                finally:
                    os.close(handle)


class Store(Repository):
    """In an object store, where nothing can be renamed but every put is atomic, and a listing tells all that was put before.

    A version's manifest.json is put first, empty and only where there is none, which claims the number; and last, with its content,
    which completes the version. It also goes last, so that a number is free only when nothing is left of it. A publisher that was
    killed leaves a version that is not complete: others pass it over, and it can be removed.
    """

    def __init__(self, location: str) -> None:
        import fsspec  # noqa: PLC0415  # an optional extra

        self.location = location.rstrip("/")
        self.store, self.root = fsspec.url_to_fs(self.location, use_listings_cache=False)
        self.name = self.root.rpartition("/")[2]

    def read(self, path: str) -> bytes:
        content: bytes = self._ask("cat_file", f"{self.root}/{path}")
        return content

    def write(self, path: str, content: bytes) -> None:
        self._ask("pipe_file", f"{self.root}/{path}", content)

    def delete(self, path: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._ask("rm_file", f"{self.root}/{path}")

    def versions(self) -> dict[int, bool]:
        files = self._files()
        numbers = {int(first) for first, inside, _ in (path.partition("/") for path in files) if inside and first.isdecimal()}
        return {number: files.get(f"{number}/manifest.json", 0) > 0 for number in sorted(numbers)}

    def unfinished(self) -> list[str]:
        return []  # all that there is has a number

    def size(self, number: int) -> int:
        return sum(self._files(f"{number}/").values())

    @contextlib.contextmanager
    def version(self, number: int) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(prefix="npair-version-") as scratch:
            paths = list(self._files(f"{number}/"))
            self._ask("get", [f"{self.root}/{path}" for path in paths], [f"{scratch}/{path}" for path in paths])
            yield Path(scratch) / str(number)

    @contextlib.contextmanager
    def new_version(self) -> Iterator[tuple[int, Path]]:
        number = max(self.versions(), default=0) + 1
        while not self._create(f"{self.root}/{number}/manifest.json", b""):
            number += 1
        try:
            with tempfile.TemporaryDirectory(prefix="npair-staging-") as staging:
                yield number, Path(staging)
                self._upload(Path(staging), number)
        except BaseException:
            with contextlib.suppress(OSError, RepositoryError):  # the reason may be that the store is out of reach
                self.remove(number)
            raise

    def remove(self, number: int) -> None:
        manifest = f"{number}/manifest.json"
        self.write(manifest, b"")  # not complete from here on, and the number still claimed
        for path in [*(self._files(f"{number}/").keys() - {manifest}), manifest]:
            self._ask("rm_file", f"{self.root}/{path}")

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[None]:
        # Beside the folder, not in it: a server that loads copies all that it lists there, and this goes any moment.
        lock = f"{self.root}.releasing"
        now = datetime.now(timezone.utc).isoformat()
        mine = f"user {os.getuid()} on {socket.gethostname()}, process {os.getpid()}, since {now}"
        holder = mine if self._create(lock, mine.encode()) else self._holder(lock)
        if holder != mine:  # it would be where the store's answer was lost, and the library asked again
            raise RepositoryError(
                f"{holder} releases or retires in {self.location}; wait for it, then try again; if it was killed, first delete "
                f"{self.location}.releasing"
            )
        try:
            yield
        finally:
            self._ask("rm_file", lock)

    def _holder(self, lock: str) -> str:
        try:
            return str(self._ask("cat_file", lock).decode())
        except FileNotFoundError:  # it has just ended
            return "another process"

    def _upload(self, folder: Path, number: int) -> None:
        sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
        for name in sizes.keys() - {"manifest.json"}:
            self._ask("put_file", str(folder / name), f"{self.root}/{number}/{name}")
        arrived = self._files(f"{number}/")
        if arrived != {f"{number}/{name}": size for name, size in (sizes | {"manifest.json": 0}).items()}:
            raise RepositoryError(f"what arrived of version {number} in {self.location} is not what was sent; publish it again")
        self.write(f"{number}/manifest.json", (folder / "manifest.json").read_bytes())

    def _create(self, path: str, content: bytes) -> bool:
        """Whether there was none; among several at once, one creates it."""
        try:
            self._ask("pipe_file", path, content, mode="create")
        except OSError:  # FileExistsError of AWS and Google only
            if not self._ask("exists", path):
                raise
            return False
        return True

    def _files(self, prefix: str = "") -> dict[str, int]:
        """Sizes in bytes by path in the model's folder."""
        found = self._ask("find", self.root, detail=True)
        sizes = {path[len(self.root) + 1 :]: int(info["size"]) for path, info in found.items()}
        return {path: size for path, size in sizes.items() if path.startswith(prefix)}

    def _ask(self, operation: str, *arguments: object, **options: object) -> Any:
        """Raises: OSError as the store answers, RepositoryError where it does not or there are no credentials: each kind of store
        has exceptions of its own for that."""
        try:
            return getattr(self.store, operation)(*arguments, **options)
        except OSError:
            raise
        except Exception as error:
            raise RepositoryError(f"{self.location} cannot be reached: {error}") from error


def open_repository(location: str | Path) -> Repository:
    """Raises: RepositoryError where there is no model's folder, or what reads such a store is not installed."""
    scheme, remote, _ = str(location).partition("://")
    if remote and scheme not in STORES:
        raise RepositoryError(f"{location} is neither a folder nor at {' or '.join(f'{store}://' for store in STORES)}")
    try:
        repository: Repository = Store(str(location)) if remote else Folder(Path(location))
        repository.read("config.pbtxt")
    except ImportError as error:
        raise RepositoryError(f"{location} needs what is not installed; run: pip install 'npair[{scheme}]'") from error
    except (FileNotFoundError, NotADirectoryError) as error:
        raise RepositoryError(f"{location} is not a model's folder: it has no config.pbtxt") from error
    return repository


@contextlib.contextmanager
def alone(folder: Path, busy: Exception) -> Iterator[None]:
    """For one process at a time. The lock is the kernel's: it ends with the process, however that ends. Raises: ``busy``."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        if not _locked(handle):
            raise busy
        yield
    finally:
        os.close(handle)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _locked_at(path: Path, handle: int) -> bool:
    """Whether the lock could be had, and the folder is still the one at this path: another may have cleaned since it was opened,
    and a publisher may write under the same name. Raises: OSError where nothing is there."""
    return _locked(handle) and os.path.samestat(path.stat(), os.fstat(handle))


def _locked(handle: int) -> bool:
    """Whether the lock on an open file or folder could be had."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
