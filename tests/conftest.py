"""What several tests need: a drawn data set, a tiny run trained on it, and the version published from that."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from npair.artifact import publish
from npair.drawings import write_dataset
from npair.run import TrainConfig
from npair.serving.preprocess import Limits, Preprocessing
from npair.train import train

ROOT = Path(__file__).parents[1]
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
