"""Write the next version of a repository, completely or not at all."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from npair.publishing.publish import publish
from npair.releasing.config import pinned
from npair.releasing.repository import Repository
from npair.serving.manifest import Manifest


def publish_next(repository: Repository, run: Path, data: Path, **options: Any) -> Manifest:
    """Publish a run as the repository's next version, compared with the newest pinned one.

    options: passed on to ``publishing.publish``.
    Raises: whatever ``publish`` raises; RepositoryError, ConfigError.
    """
    with (
        repository.new_version() as (number, folder),
        _newest_pinned(repository) as pinned_folder,
    ):
        return publish(
            run,
            data,
            folder,
            model=repository.name,
            version=number,
            pinned=pinned_folder,
            **options,
        )


@contextlib.contextmanager
def _newest_pinned(repository: Repository) -> Iterator[Path | None]:
    """Yield the folder of the newest complete version that is pinned, None if there is none."""
    complete = repository.versions()
    pins = [pin for pin in pinned(repository.read("config.pbtxt").decode()) if complete.get(pin)]
    with repository.version(pins[-1]) if pins else contextlib.nullcontext() as folder:
        yield folder
