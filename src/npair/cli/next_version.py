"""Write the next version of a repository, completely or not at all."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from npair.publishing.publish import UNPUBLISHED, publish
from npair.publishing.steps import forget
from npair.releasing.config import new_config, pinned, with_release
from npair.releasing.release import client_parameters
from npair.releasing.repository import Repository
from npair.serving.manifest import NAME, Manifest


def publish_next(
    repository: Repository, run: Path, data: Path, *, cache: Path, **options: Any
) -> Manifest:
    """Publish a run as the repository's next version, compared with the newest pinned one.

    If the repository has no config.pbtxt, writes one that pins the version: a server that starts on
    it serves the version.
    cache, options: passed on to ``publishing.publish``.
    Raises: the errors of ``publish``; RepositoryError, ConfigError.
    """
    with (
        repository.new_version() as (number, folder),
        _newest_pinned(repository) as pinned_folder,
    ):
        manifest = publish(
            run,
            data,
            folder,
            model=repository.name,
            version=number,
            pinned=pinned_folder,
            cache=cache,
            **options,
        )
    forget(cache / UNPUBLISHED)
    if is_new(repository):
        with repository.exclusive():
            described = client_parameters(repository.read(f"{number}/{NAME}"))
            config = with_release(new_config(), [number], described)
            repository.write("config.pbtxt", config.encode())
    return manifest


def is_new(repository: Repository) -> bool:
    """Return whether the repository has no config.pbtxt yet, and so serves nothing."""
    return "config.pbtxt" not in repository.names()


@contextlib.contextmanager
def _newest_pinned(repository: Repository) -> Iterator[Path | None]:
    """Yield the folder of the newest complete version that is pinned, None if there is none."""
    pins = []
    if not is_new(repository):
        complete = repository.versions()
        config = repository.read("config.pbtxt").decode()
        pins = [pin for pin in pinned(config) if complete.get(pin)]
    with repository.version(pins[-1]) if pins else contextlib.nullcontext() as folder:
        yield folder
