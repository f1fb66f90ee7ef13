"""A repository in an object store."""

from __future__ import annotations

import contextlib
import os
import socket
import tempfile
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from npair.releasing import RepositoryError


class Store:
    """A repository in an object store, where puts are atomic and listings consistent, but nothing
    can be renamed.

    Publishing puts an empty manifest.json first, if there is none, which claims the number, and
    puts its content last, which completes the version. Removing deletes manifest.json last, so
    that a free number has no files. A killed publisher leaves an incomplete version, which others
    skip and ``remove`` deletes.
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

    def names(self) -> set[str]:
        return {path.partition("/")[0] for path in self._files()}

    def versions(self) -> dict[int, bool]:
        files = self._files()
        folders = {path.partition("/")[0] for path in files if "/" in path}
        numbers = sorted(int(folder) for folder in folders if folder.isdecimal())
        return {number: files.get(f"{number}/manifest.json", 0) > 0 for number in numbers}

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
        while not self._create(f"{self.root}/{number}/manifest.json", b""):
            number += 1
        try:
            with tempfile.TemporaryDirectory(prefix="npair-staging-") as staging:
                yield number, Path(staging)
                self._upload(Path(staging), number)
        except BaseException:
            with contextlib.suppress(OSError, RepositoryError):  # the store may be unreachable
                self.remove(number)
            raise

    def remove(self, number: int) -> None:
        manifest = f"{number}/manifest.json"
        self.write(manifest, b"")  # incomplete from here on, and the number still claimed
        for path in [*(self._files(f"{number}/").keys() - {manifest}), manifest]:
            self._ask("rm_file", f"{self.root}/{path}")

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[None]:
        # Beside the folder: Triton lists it to download it, and fails if a file has gone meanwhile.
        lock = f"{self.root}.releasing"
        now = datetime.now(timezone.utc).isoformat()
        process = (
            f"user {os.getuid()} on {socket.gethostname()}, process {os.getpid()}, since {now}"
        )
        holder = process if self._create(lock, process.encode()) else self._holder(lock)
        # If an answer was lost and the library asked again, the lock exists and is this process's.
        if holder != process:
            raise RepositoryError(
                f"{holder} releases or retires in {self.location}; wait for it, then try again; if"
                f" it was killed, first delete {self.location}.releasing"
            )
        try:
            yield
        finally:
            self._ask("rm_file", lock)

    def _holder(self, lock: str) -> str:
        try:
            return str(self._ask("cat_file", lock).decode())
        except FileNotFoundError:  # just released
            return "another process"

    def _upload(self, folder: Path, number: int) -> None:
        sizes = {
            path.relative_to(folder).as_posix(): path.stat().st_size
            for path in folder.rglob("*")
            if path.is_file()
        }
        for name in sizes.keys() - {"manifest.json"}:
            self._ask("put_file", str(folder / name), f"{self.root}/{number}/{name}")
        sizes["manifest.json"] = 0
        if self._files(f"{number}/") != {f"{number}/{name}": sizes[name] for name in sizes}:
            raise RepositoryError(
                f"version {number} did not arrive in {self.location} as it was sent; publish it"
                " again"
            )
        self.write(f"{number}/manifest.json", (folder / "manifest.json").read_bytes())

    def _create(self, path: str, content: bytes) -> bool:
        """Create an object. Returns: False if it exists; of several callers, one gets True."""
        try:
            self._ask("pipe_file", path, content, mode="create")
        except OSError:  # FileExistsError only from AWS and Google
            if not self._ask("exists", path):
                raise
            return False
        return True

    def _files(self, prefix: str = "") -> dict[str, int]:
        """Return sizes in bytes by path in the model's folder."""
        found = self._ask("find", self.root, detail=True)
        sizes = {
            path.removeprefix(f"{self.root}/"): int(info["size"]) for path, info in found.items()
        }
        return {path: size for path, size in sizes.items() if path.startswith(prefix)}

    def _ask(self, operation: str, *arguments: object, **options: object) -> Any:
        """Call the store.

        Raises: OSError for the store's refusals. Other errors, such as a lost connection or missing
        credentials, differ between stores; they become RepositoryError.
        """
        try:
            return getattr(self.store, operation)(*arguments, **options)
        except OSError:
            raise
        except Exception as error:
            raise RepositoryError(f"{self.location} cannot be reached: {error}") from error
