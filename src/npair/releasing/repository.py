"""The repository of a model's versions, as Triton reads it: a folder or an object store."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

from npair.releasing import RepositoryError
from npair.releasing.folder import Folder
from npair.releasing.object_store import Store

MODEL = "npair"  # the only name that serve.py, clients and dashboards know
STORES = ("s3", "gs")  # the extras of pyproject.toml with their fsspec implementations


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
