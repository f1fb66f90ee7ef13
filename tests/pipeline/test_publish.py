"""Publish complete versions only, and worse ones only if given a reason."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.models import ROOT, SHIPPED, publish_into

import npair.serving
from npair.cli.next_version import publish_next
from npair.networks.network import EmbeddingNetwork, embed
from npair.publishing import PublishError, gates, publish
from npair.publishing import graphs as engines
from npair.publishing import version_folder as artifact
from npair.publishing.drawings import write_dataset
from npair.publishing.graphs import ENGINES, REFERENCE
from npair.publishing.publish import check_libraries
from npair.publishing.version_folder import restore
from npair.releasing import ReleaseError, RepositoryError
from npair.releasing.config import new_config, with_release
from npair.releasing.release import check_pins, client_parameters
from npair.releasing.repository import open_repository
from npair.serving.manifest import Comparison, Manifest, VersionError
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


def blind(run: Path) -> EmbeddingNetwork:
    """Load a network that maps all photos to one vector."""
    network = load_network(run)
    with torch.no_grad():
        network.embedding.weight.zero_()
    return network


@pytest.fixture
def worse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Version 1 finds every val photo, and the run's network none but by chance.

    The tiny network itself finds too few for a drop that is beyond chance.
    """
    monkeypatch.setattr(artifact, "load_network", blind)
    monkeypatch.setattr(publish, "_hits", lambda *_: {"fine": [True] * 12, "coarse": [True] * 12})


def test_is_compared_with_the_pinned_version(second: Path, trained: Path, dataset: Path) -> None:
    folder = publish_into(
        second, trained, dataset, accept_cost="torch alone, and busy test machines"
    )
    compared = json.loads((folder / "manifest.json").read_text())["compared_with"]
    assert compared["version"] == 1
    before, after = (Manifest.read(each).recall_at_1() for each in (second / "1", folder))
    assert compared["recall_at_1"] == {kind: [before[kind], after[kind]] for kind in before}
    assert compared["bytes"][1] < compared["bytes"][0], "of other engines' graphs"
    assert min(compared["milliseconds"]) > 0


@pytest.mark.usefixtures("worse")
def test_a_worse_network_needs_a_reason(second: Path, trained: Path, dataset: Path) -> None:
    with pytest.raises(
        PublishError,
        match=r"Recall@1 on val, of (fine|coarse) labels, is .* --accept-recall-drop REASON",
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


class Publisher:
    """Publishes ``trained`` into a model's folder, with a cache of its own."""

    def __init__(self, repository: Path, trained: Path, dataset: Path, cache: Path) -> None:
        self.repository, self.sources, self.cache = repository, (trained, dataset), cache
        self.said: list[str] = []

    def __call__(self, **options: Any) -> Manifest:
        self.said.clear()
        repository = open_repository(self.repository, start=True)
        options = {"cache": self.cache, "say": self.said.append, **options}
        return publish_next(repository, *self.sources, **options)

    @property
    def kept(self) -> list[Path]:
        folder = self.cache / "unpublished"
        return list(folder.iterdir()) if folder.exists() else []


@pytest.fixture
def publisher(second: Path, trained: Path, dataset: Path, tmp_path: Path) -> Publisher:
    return Publisher(second, trained, dataset, tmp_path / "cache")


def test_what_was_refused_is_not_computed_again(
    publisher: Publisher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gates, "COST_RISE", 0.0)
    with pytest.raises(PublishError, match="--accept-cost REASON"):
        publisher()
    assert any("measuring the cost" in line for line in publisher.said)
    manifest = publisher(accept_cost="a test")
    assert not any("measuring the cost" in line for line in publisher.said)
    assert any("an earlier try computed" in line for line in publisher.said)
    compared = manifest.compared_with
    assert compared
    assert compared.accepted_cost
    assert compared.accepted_cost.reason == "a test"
    assert manifest.version == 2
    assert not publisher.kept, "it takes no room once it is published"


def test_an_interrupted_publication_goes_on(
    publisher: Publisher, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(artifact, "write_graphs", interrupted)
        with pytest.raises(KeyboardInterrupt):
            publisher()
    assert left(publisher.repository) == {"config.pbtxt", "1"}
    with monkeypatch.context() as patch:
        patch.setattr(artifact, "export", interrupted)  # not called again
        assert publisher(accept_cost="torch alone").version == 2


def test_what_failed_is_not_kept(publisher: Publisher, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise ArithmeticError("an embedding is zero")

    monkeypatch.setattr(artifact, "write_graphs", fails)
    with pytest.raises(ArithmeticError):
        publisher()
    assert not publisher.kept


def test_what_could_not_be_stored_is_not_computed_again(
    publisher: Publisher, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("npair.releasing.folder._sync", full)  # as the version is completed
        with pytest.raises(OSError, match="No space left"):
            publisher(accept_cost="torch alone")
    assert left(publisher.repository) == {"config.pbtxt", "1"}
    monkeypatch.setattr(artifact, "export", full)  # not called again
    assert publisher(accept_cost="torch alone").version == 2
    assert not publisher.kept


@pytest.mark.usefixtures("worse")
def test_a_worse_network_is_refused_before_it_is_quantised(
    publisher: Publisher, monkeypatch: pytest.MonkeyPatch
) -> None:
    def quantised(*_: object) -> None:
        pytest.fail("this takes minutes")

    monkeypatch.setattr(artifact, "write_graphs", quantised)
    with pytest.raises(PublishError, match="--accept-recall-drop REASON"):
        publisher()
    assert len(publisher.kept) == 1


def test_a_drop_that_may_be_chance_is_said_and_published(
    publisher: Publisher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One val photo of twelve changes sides, and the data has no coarse labels."""
    monkeypatch.setattr(publish, "_hits", lambda *_: {"fine": [True] * 12})
    monkeypatch.setattr(artifact, "reference_hits", lambda *_: {"fine": [False] + [True] * 11})
    manifest = publisher(accept_cost="torch alone")
    (warning,) = (line for line in publisher.said if line.startswith("warning"))
    assert "is 0.917; version 1 has 1.000: -0.083 (-0.083 to +0.079) on 12 photos" in warning
    assert manifest.compared_with
    assert manifest.compared_with.recall_at_1 == {"fine": [1.0, 11 / 12]}
    assert manifest.compared_with.accepted_recall is None


def test_an_engine_is_refused_for_a_drop_beyond_chance_alone() -> None:
    before = {"fine": [True] * 300}
    (doubtful,) = gates.recall_drops(before, {"fine": [False] * 5 + [True] * 295}, "torch", 0.005)
    assert not doubtful.proven
    (drop,) = gates.recall_drops(before, {"fine": [False] * 6 + [True] * 294}, "torch", 0.005)
    assert drop.proven
    assert "is 0.980; torch has 1.000: -0.020 (-0.020 to -0.002) on 300 photos" in drop.text
    assert not gates.recall_drops(before, {"fine": [False] + [True] * 299}, "torch", 0.005)


def test_what_costs_more_needs_a_reason() -> None:
    def check(milliseconds: float, size: int) -> None:
        compared = Comparison(
            version=1, recall_at_1={}, milliseconds=[2, milliseconds], bytes=[10, size]
        )
        gates.Gate(1, "", "").check_cost(compared)

    check(2.9, 15)
    with pytest.raises(PublishError, match=r"it takes 3\.1 ms a photo; version 1 takes 2;"):
        check(3.1, 15)
    with pytest.raises(PublishError, match="it takes 16 bytes"):
        check(2.9, 16)


def test_a_first_version_is_pinned_after_a_kill(
    trained: Path, dataset: Path, published: Path, tmp_path: Path
) -> None:
    """A process that is killed before it writes config.pbtxt leaves a whole version.

    tests/server/test_release.py starts in a missing folder.
    """
    folder = tmp_path / "models/npair"
    shutil.copytree(published / "1", folder / "1")
    Publisher(folder, trained, dataset, tmp_path / "cache")()
    assert check_pins(open_repository(folder)) == [2]


@pytest.mark.parametrize("name", ["other", "npair"])
def test_a_model_does_not_start_among_other_files(
    name: str, trained: Path, dataset: Path, tmp_path: Path
) -> None:
    folder = tmp_path / name
    if name == "npair":
        folder.mkdir()
        (folder / "photo.jpg").touch()
    with pytest.raises(RepositoryError, match="name an empty or missing folder called npair"):
        Publisher(folder, trained, dataset, tmp_path / "cache")()


def test_a_new_config_is_that_of_the_shipped_version() -> None:
    described = client_parameters((SHIPPED / "manifest.json").read_bytes())
    config = with_release(new_config(), [int(SHIPPED.name)], described)
    assert config == (SHIPPED.parent / "config.pbtxt").read_text()


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


def test_an_earlier_version_gets_the_layer_that_training_ends_with(
    published: Path, dataset: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, found = restore(published / "1"), restore(published / "1")
    torch.nn.init.normal_(found.embedding.weight)
    monkeypatch.setattr(artifact, "restore", lambda _: found)
    source = artifact.read_source(published / "1", dataset, cache)
    assert source.network is found
    np.testing.assert_allclose(
        embed(found, source.pixels.array), embed(expected, source.pixels.array), atol=1e-3
    )


def test_a_version_is_published_again(published: Path, repository: Path, dataset: Path) -> None:
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


def test_refuses_what_is_no_run(repository: Path, dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="is not a run"):
        publish_into(repository, tmp_path, dataset)
