"""Shared fixtures: a drawn data set, a tiny training run, a published version, real servers."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import pytest
from support import releases
from support.models import ROOT, TINY, publish_into
from support.servers import controlled

from npair.publishing.drawings import write_dataset
from npair.releasing.config import with_release
from npair.releasing.release import promote
from npair.releasing.repository import open_repository
from npair.training.train import train

# A signal that nohup (SIGHUP) or a background job (SIGINT) ignores stays ignored in the processes
# that the tests start. Children do not inherit a handler, so install one that does nothing.
for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, lambda *_: None)


# Run the same examples on every machine; tests/fuzz/fuzz.py searches for new ones.
hypothesis.settings.register_profile("npair", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("npair")


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Keep decoded photos out of the user's cache, in this process and in its children."""
    folder = tmp_path_factory.mktemp("cache")
    before = os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = str(folder)
    yield folder
    os.environ.pop("XDG_CACHE_HOME")
    if before is not None:
        os.environ["XDG_CACHE_HOME"] = before


@pytest.fixture
def listed(tmp_path: Path) -> Path:
    """Six drawn products, four train photos and two val photos of each."""
    root = tmp_path / "listed"
    write_dataset(root, products=6, train=4, val=2, size=24)
    return root


Once = Callable[[str, Callable[[Path], object]], Path]


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Once:
    """Build a named folder in one worker and share it with the others, which must not change it."""
    root = tmp_path_factory.getbasetemp()
    root = root.parent / "shared" if "PYTEST_XDIST_WORKER" in os.environ else root / "shared"
    root.mkdir(exist_ok=True)

    def made(name: str, build: Callable[[Path], object]) -> Path:
        folder = root / name
        with (root / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (root / f"{name}.done").exists():
                shutil.rmtree(folder, ignore_errors=True)
                build(folder)
                (root / f"{name}.done").touch()
        return folder

    return made


@pytest.fixture(scope="session")
def dataset(once: Once) -> Path:
    """Six drawn products, four train photos and two val photos of each."""
    return once("drawn", lambda root: write_dataset(root, products=6, train=4, val=2))


@pytest.fixture(scope="session")
def trained(dataset: Path, once: Once) -> Path:
    """A run of two epochs."""
    return once("tiny", lambda run: train(dataset, run, TINY))


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A model's folder that has no version yet."""
    folder = tmp_path / "models" / "npair"
    folder.mkdir(parents=True)
    shutil.copy(ROOT / "model_repository/npair/config.pbtxt", folder)
    return folder


@pytest.fixture(scope="session")
def published(dataset: Path, trained: Path, once: Once) -> Path:
    """A model's folder with version 1. Do not change it."""

    def build(models: Path) -> None:
        repository = models / "npair"
        repository.mkdir(parents=True)
        shutil.copy(ROOT / "model_repository/npair/config.pbtxt", repository)
        publish_into(repository, trained, dataset)

    return once("published", build) / "npair"


@pytest.fixture(scope="session")
def pair(published: Path, trained: Path, once: Once) -> Path:
    """A model's folder with versions 1 and 2, of which 1 is promoted. Copy it, do not change it."""

    def build(folder: Path) -> None:
        shutil.copytree(published, folder)
        releases.two_versions(folder, trained)
        config = folder / "config.pbtxt"
        config.write_text(with_release(config.read_text(), [1], {}))
        promote(open_repository(folder), 1, [])

    return once("pair", build)


@pytest.fixture
def models(pair: Path, tmp_path: Path) -> Path:
    """A copy of ``pair``."""
    return Path(shutil.copytree(pair, tmp_path / "models/npair"))


@pytest.fixture(params=releases.DAMAGES)
def broken(request: pytest.FixtureRequest, models: Path, trained: Path) -> Path:
    """A copy of ``pair`` whose version 2 is broken in one way."""
    releases.DAMAGES[request.param](models / "2", trained)
    return models


@pytest.fixture(scope="module")
def shared(pair: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[releases.Standing]:
    models = Path(shutil.copytree(pair, tmp_path_factory.mktemp("shared") / "npair"))
    with controlled(models) as (server, urls):
        yield models, server, urls


@pytest.fixture
def standing(shared: releases.Standing) -> releases.Standing:
    """A copy of ``pair`` and a server of version 1, for tests that leave both versions sound."""
    models, server, _ = shared
    if server.serving() != [1] or not releases.pins(models, 1):
        promote(open_repository(models), 1, [server])
    return shared


@pytest.fixture
def version(published: Path, tmp_path: Path) -> Path:
    """A copy of version 1 for one test to spoil."""
    return Path(shutil.copytree(published / "1", tmp_path / "npair" / "1"))
