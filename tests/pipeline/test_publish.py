"""Publish complete versions only, and worse ones only if given a reason."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.models import ROOT, publish_into

import npair.serving
from npair.cli.next_version import publish_next
from npair.networks.network import EmbeddingNetwork
from npair.publishing import PublishError, publish
from npair.publishing import graphs as engines
from npair.publishing import version_folder as artifact
from npair.publishing.drawings import write_dataset
from npair.publishing.graphs import ENGINES, REFERENCE
from npair.publishing.publish import check_libraries, refusals
from npair.releasing import ReleaseError
from npair.releasing.config import with_release
from npair.releasing.repository import RepositoryError, open_repository
from npair.serving.manifest import Comparison, VersionError
from npair.training.checkpoint import load_network
from npair.training.run import RunError


@pytest.fixture(autouse=True)
def torch_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip the other, slow engines and instruction sets; test_artifact.py covers them."""
    monkeypatch.setattr(
        artifact,
        "write_graphs",
        lambda *_: {name: "not for this test" for name in ENGINES if name != REFERENCE},
    )
    monkeypatch.setattr(engines, "INSTRUCTION_SETS", {})


@pytest.fixture
def second(published: Path, repository: Path) -> Path:
    """Return a model folder with version 1, pinned."""
    shutil.copytree(published / "1", repository / "1")
    config = repository / "config.pbtxt"
    config.write_text(with_release(config.read_text(), [1], {}))
    return repository


def left(repository: Path) -> set[str]:
    return {path.name for path in repository.iterdir() if not path.name.startswith(".")}


def test_is_compared_with_the_pinned_version(second: Path, trained: Path, dataset: Path) -> None:
    folder = publish_into(
        second, trained, dataset, accept_cost="torch alone, and busy test machines"
    )
    compared = json.loads((folder / "manifest.json").read_text())["compared_with"]
    assert compared["version"] == 1
    for old, new in compared["recall_at_1"].values():
        assert old == new
    assert compared["bytes"][1] < compared["bytes"][0], "of other engines' graphs"
    assert min(compared["milliseconds"]) > 0


def test_a_worse_network_needs_a_reason(
    second: Path, trained: Path, dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def blind(run: Path) -> EmbeddingNetwork:
        """Load a network that maps all photos to one vector."""
        network = load_network(run)
        with torch.no_grad():
            network.embedding.weight.zero_()
        return network

    monkeypatch.setattr(artifact, "load_network", blind)
    with pytest.raises(
        PublishError,
        match=r"Recall@1 on val, of (fine|coarse) labels, is .* \(--accept-recall-drop REASON",
    ):
        publish_into(second, trained, dataset)
    assert left(second) == {"config.pbtxt", "1"}
    folder = publish_into(
        second, trained, dataset, accept_recall_drop="a test", accept_cost="another"
    )
    accepted = json.loads((folder / "manifest.json").read_text())["compared_with"][
        "accepted_recall"
    ]
    assert accepted["reason"] == "a test"
    assert "version 1 has" in accepted["problem"]


def test_what_was_refused_is_not_measured_again(
    second: Path, trained: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def attempt(**options: Any) -> int:
        cache = tmp_path / "cache"
        manifest = publish_next(
            open_repository(second), trained, dataset, cache=cache, say=said.append, **options
        )
        return manifest.version

    said: list[str] = []
    monkeypatch.setattr(publish, "COST_RISE", 0.0)
    with pytest.raises(PublishError, match="--accept-cost REASON"):
        attempt()
    assert any("measuring" in line for line in said)
    said.clear()
    number = attempt(accept_cost="a test")
    assert len(said) == 1
    assert "was measured before" in said[0]
    manifest = json.loads((second / str(number) / "manifest.json").read_text())
    assert manifest["compared_with"]["accepted_cost"]["reason"] == "a test"
    assert manifest["version"] == number
    assert not list((tmp_path / "cache/refused").iterdir()), "it takes no room once it is published"
    said.clear()
    attempt(accept_cost="a test")
    assert any("measuring" in line for line in said), "another number is another version"


def test_refusals() -> None:
    compared = Comparison(
        version=1, recall_at_1={"fine": [0.7, 0.695]}, milliseconds=[2, 2.9], bytes=[10, 15]
    )
    assert refusals(compared) == {}
    assert (
        "0.689"
        in refusals(replace(compared, recall_at_1={"fine": [0.7, 0.7], "coarse": [0.7, 0.689]}))[
            "recall"
        ]
    )
    assert (
        refusals(replace(compared, milliseconds=[2, 3.1]))["cost"]
        == "it takes 3.1 ms a photo; version 1 takes 2"
    )
    assert "bytes" in refusals(replace(compared, bytes=[10, 16]))["cost"]


def test_serving_libraries_are_those_of_the_pins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_libraries()
    (tmp_path / "requirements.txt").write_text("numpy==0.1 ; python_version < '3'\nopenvino==0.2\n")
    monkeypatch.setattr(publish, "PINS", tmp_path)
    with pytest.raises(
        PublishError, match=r"openvino is .* here and 0\.2 where versions are served"
    ):
        check_libraries()


@pytest.mark.parametrize("spoil", ["nan", "other"])
def test_a_graph_that_is_not_the_network_is_refused(
    spoil: str, repository: Path, trained: Path, dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export = engines.export

    def spoilt(network: EmbeddingNetwork, size: int, path: Path) -> None:
        before = network.embedding.bias.detach().clone()
        with torch.no_grad():
            network.embedding.bias.add_(float("nan") if spoil == "nan" else 1.0)
        export(network, size, path)
        with torch.no_grad():
            network.embedding.bias.copy_(before)

    monkeypatch.setattr(artifact, "export", spoilt)
    with pytest.raises(
        PublishError, match=r"the exported graph (is not the network|does not work)"
    ):
        publish_into(repository, trained, dataset)
    assert left(repository) == {"config.pbtxt"}


def test_code_that_does_not_run_is_refused(
    repository: Path, trained: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = shutil.copytree(ROOT / "src/npair/serving", tmp_path / "serving")
    (code / "model.py").write_text("def execute(:\n")
    monkeypatch.setattr(npair.serving, "__path__", [str(code)])
    with pytest.raises(ReleaseError, match=r"model\.py cannot be run: invalid syntax"):
        publish_into(repository, trained, dataset)
    assert left(repository) == {"config.pbtxt"}


def test_next_number_whatever_lies_around(repository: Path, trained: Path, dataset: Path) -> None:
    (repository / "7").mkdir()
    (repository / "staging-of-a-crash").mkdir()
    assert publish_into(repository, trained, dataset) == repository / "8"


def test_a_version_is_published_anew(published: Path, repository: Path, dataset: Path) -> None:
    shutil.copytree(published / "1", repository / "1")
    again = publish_into(repository, repository / "1", dataset)
    old, new = (
        json.loads((folder / "manifest.json").read_text()) for folder in (repository / "1", again)
    )
    assert new["training"] == old["training"]
    before, after = (
        np.load(folder / "golden/embeddings.npy") for folder in (repository / "1", again)
    )
    np.testing.assert_allclose(after, before, atol=1e-6)
    (again / "network.pt2").write_bytes(b"changed")
    with pytest.raises(VersionError, match=r"network\.pt2 has changed"):
        publish_into(repository, again, dataset)


def test_failure_leaves_nothing(
    repository: Path, trained: Path, dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(artifact, "write_golden", full)
    with pytest.raises(OSError, match="No space left"):
        publish_into(repository, trained, dataset)
    assert left(repository) == {"config.pbtxt"}


def test_refuses_other_data(repository: Path, trained: Path, tmp_path: Path) -> None:
    write_dataset(tmp_path / "other", products=3, train=2, val=1)
    with pytest.raises(PublishError, match="was not trained on"):
        publish_into(repository, trained, tmp_path / "other")


def test_refuses_what_is_no_model_folder(trained: Path, dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(RepositoryError, match=r"no config\.pbtxt"):
        publish_into(tmp_path, trained, dataset)


def test_refuses_what_is_no_run(repository: Path, dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="is not a run"):
        publish_into(repository, tmp_path, dataset)
