"""What several tests need: a drawn data set, a tiny run trained on it, the version published from that, and real servers."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from npair.artifact import publish
from npair.drawings import write_dataset
from npair.run import TrainConfig
from npair.serving.preprocess import Limits, Preprocessing
from npair.train import train

ROOT = Path(__file__).parents[1]
PORTS = ("HTTP_PORT", "GRPC_PORT", "METRICS_PORT")
PREPROCESSING = Preprocessing(size=64, resample="BILINEAR", background=255)
LIMITS = Limits(max_bytes=1_000_000, max_pixels=1_000_000)
TINY = TrainConfig(epochs=2, classes_per_batch=4, size=64, crop_size=48, evaluate_every=1)


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six drawn products, four train photos and two val photos of each."""
    root = tmp_path_factory.mktemp("drawn")
    write_dataset(root, products=6, train=4, val=2)
    return root


@pytest.fixture(scope="session")
def trained(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of a network that was trained for two epochs."""
    run = tmp_path_factory.mktemp("runs") / "tiny"
    assert train(dataset, run, TINY)
    return run


@pytest.fixture(scope="session")
def published(dataset: Path, trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository (the model's folder) with version 1; to be read, not changed."""
    repository = tmp_path_factory.mktemp("models") / "npair"
    repository.mkdir()
    shutil.copy(ROOT / "model_repository/npair/config.pbtxt", repository)
    publish(trained, dataset, repository)
    return repository


@pytest.fixture
def version(published: Path, tmp_path: Path) -> Path:
    """A copy of version 1 for one test to spoil."""
    return Path(shutil.copytree(published / "1", tmp_path / "npair" / "1"))


def rewrite_manifest(folder: Path, **changes: object) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | changes))


def free_ports() -> dict[str, str]:
    listeners = {name: socket.create_server(("127.0.0.1", 0)) for name in PORTS}
    ports = {name: str(listener.getsockname()[1]) for name, listener in listeners.items()}
    for listener in listeners.values():
        listener.close()
    return ports


def start(**environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, ROOT / "model/api/serve.py"], env=os.environ | environment, stderr=subprocess.PIPE, text=True
    )


def lines_until_ready(process: subprocess.Popen[str]) -> list[str]:
    """What a starting server says on stderr, up to the line that says that it is ready; fails the test where it ends instead."""
    assert process.stderr is not None
    lines = []
    while line := process.stderr.readline():
        lines.append(line)
        if "ready after" in line:
            return lines
    pytest.fail("the server did not start:\n" + "".join(lines))


@contextmanager
def running(**environment: str) -> Iterator[tuple[subprocess.Popen[str], dict[str, str]]]:
    """A server that is ready, and its URLs by protocol."""
    ports = free_ports()
    process = start(**ports, **environment)
    try:
        lines = lines_until_ready(process)
        assert len(lines) == 1, f"one line says that it is ready, and nothing else is said: {lines}"
        yield process, {"http": f"http://127.0.0.1:{ports['HTTP_PORT']}", "grpc": f"grpc://127.0.0.1:{ports['GRPC_PORT']}"}
    finally:
        process.terminate()
        process.wait(timeout=30)
