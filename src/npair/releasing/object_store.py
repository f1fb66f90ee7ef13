"""A repository (see npair.releasing.repository) in an object store."""

from __future__ import annotations

import contextlib
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from npair.objects import Objects, this_process
from npair.releasing import RepositoryError
from npair.serving.manifest import NAME


class Store(Objects):
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
