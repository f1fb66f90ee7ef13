"""Releases on the real server: what is promoted is served, and what is broken is not, whatever was forced, killed or mixed up."""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import json
import os
import random
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import PREPROCESSING, ROOT, certificate, eventually, free_ports, lines_until_ready, rewrite_manifest, running, start

from npair.client import NpairClient, Vectors, VersionGoneError
from npair.networks.network import EmbeddingNetwork, load_network
from npair.publishing import graphs as engines
from npair.publishing.golden import write_golden
from npair.publishing.graphs import export
from npair.releasing.config import ConfigError, parameters, pinned, with_release
from npair.releasing.release import (
    ReleaseError,
    Server,
    check_pins,
    check_server,
    client_parameters,
    promote,
    retire,
    rollback,
    table,
    verify,
    versions,
)
from npair.releasing.repository import RepositoryError, open_repository
from npair.serving.manifest import Manifest

CONFIG = (ROOT / "model_repository/npair/config.pbtxt").read_text()
SECRET = "a-secret"


@pytest.fixture(scope="session")
def pair(published: Path, trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model's folder with versions 1 and 2, of which 1 was promoted; to be copied, not changed.

    They have one engine, the quickest to load, since every promotion loads all. The second is the first with another last layer,
    without the minute that training and publishing take.
    """
    folder = tmp_path_factory.mktemp("pair") / "npair"
    shutil.copytree(published, folder)
    forge(folder / "1", only_openvino)
    shutil.copytree(folder / "1", folder / "2")
    forge(folder / "2", lambda version: other_network(version, trained))
    config = folder / "config.pbtxt"
    config.write_text(with_release(config.read_text(), [1], {}))
    promote(open_repository(folder), 1, [])
    return folder


@pytest.fixture
def models(pair: Path, tmp_path: Path) -> Path:
    """A copy."""
    return Path(shutil.copytree(pair, tmp_path / "models/npair"))


@contextlib.contextmanager
def served(models: Path) -> Iterator[tuple[Server, dict[str, str]]]:
    with running(MODEL_REPOSITORY=str(models.parent), NPAIR_CONTROL_SECRET=SECRET) as (_, urls):
        yield Server(urls["http"], "npair", secret=SECRET, timeout=60), urls


Standing = tuple[Path, Server, dict[str, str]]


@pytest.fixture(scope="module")
def shared(pair: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Standing]:
    models = Path(shutil.copytree(pair, tmp_path_factory.mktemp("shared") / "npair"))
    with served(models) as (server, urls):
        yield models, server, urls


@pytest.fixture
def standing(shared: Standing) -> Standing:
    """A model's folder with versions 1 and 2, and a server of it, which serves 1; for tests that leave both versions sound."""
    models, server, _ = shared
    if server.serving() != [1] or not pins(models, 1):
        promote(open_repository(models), 1, [server])
    return shared


def golden(models: Path, number: int) -> tuple[list[Path], Vectors]:
    entry = json.loads((models / f"{number}/manifest.json").read_text())["golden"]
    return [models / str(number) / photo for photo in entry["photos"]], np.load(models / str(number) / entry["embeddings"])


def digest(version: Path) -> str:
    return hashlib.sha256((version / "manifest.json").read_bytes()).hexdigest()


def forge(folder: Path, change: Callable[[Path], None]) -> None:
    """A version whose hashes are right although it is not what was published."""
    change(folder)
    Manifest.read(folder).write(folder)


def graph_of(change: Callable[[EmbeddingNetwork], None], run: Path) -> Callable[[Path], None]:
    def forged(folder: Path) -> None:
        network = load_network(run)
        change(network)
        export(network, 64, folder / "network.pt2")
        rewrite_manifest(folder, engines={"torch": {**engines.ENGINES["torch"], "tolerance": 0.1}})

    return forged


def only_openvino(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    rewrite_manifest(folder, engines={"openvino-fp32": manifest["engines"]["openvino-fp32"]})


def other_network(folder: Path, run: Path) -> None:
    network = load_network(run)
    torch.nn.init.normal_(network.embedding.weight, generator=torch.Generator().manual_seed(1))
    export(network, 64, folder / "network.pt2")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nncf.quantize", None)  # which takes most of the time
        engines.write_graphs(folder, np.zeros((1, 64, 64, 3), np.uint8))
    manifest = json.loads((folder / "manifest.json").read_text())
    shutil.rmtree(folder / "golden")
    tolerance = {"tolerance": manifest["golden"]["tolerance"]}
    one = {"openvino-fp32": manifest["engines"]["openvino-fp32"] | tolerance}
    rewrite_manifest(folder, version=2, engines=one, golden=asdict(write_golden(folder, network, PREPROCESSING)) | tolerance)


def not_a_number(network: EmbeddingNetwork) -> None:
    torch.nn.init.constant_(network.embedding.bias, float("nan"))


def narrower(network: EmbeddingNetwork) -> None:
    network.embedding = torch.nn.Linear(network.embedding.in_features, 64)


def no_python(folder: Path) -> None:
    (folder / "model.py").write_text("def execute(:\n")


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def wrong_hash(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["network.pt2"] = hashlib.sha256(b"").hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.fixture(params=["truncated", "flipped", "hash", "syntax", "nan", "dimension", "manifest"])
def broken(request: pytest.FixtureRequest, models: Path, trained: Path) -> Path:
    """A model's folder whose version 2 is broken in one way."""
    folder = models / "2"
    ways: dict[str, Callable[[], None]] = {
        "truncated": lambda: truncate(folder / "network.pt2"),
        "flipped": lambda: flip(next(iter(folder.glob("network*.bin")))),
        "hash": lambda: wrong_hash(folder),
        "syntax": lambda: forge(folder, no_python),
        "nan": lambda: forge(folder, graph_of(not_a_number, trained)),
        "dimension": lambda: forge(folder, graph_of(narrower, trained)),
        "manifest": lambda: truncate(folder / "manifest.json"),
    }
    ways[request.param]()
    return models


class TestConfig:
    def test_changes_nothing_else(self) -> None:
        changed = with_release(CONFIG, [7, 6], {"manifest_sha256": "abc", "threshold_far_1_percent": None, "new": 'a "b"'})
        assert pinned(changed) == [6, 7]
        assert "threshold_far_1_percent" not in parameters(changed)
        assert parameters(changed)["new"] == 'a "b"'
        before, after = CONFIG.splitlines(), changed.splitlines()
        assert len([line for line in before if line not in after]) == 3
        back = {key: parameters(CONFIG).get(key) for key in ("manifest_sha256", "threshold_far_1_percent", "new")}
        assert parameters(with_release(changed, pinned(CONFIG), back)) == parameters(CONFIG)

    @pytest.mark.parametrize(
        ("before", "after", "reason"),
        [
            ("version_policy: {", "version_policy: {\n", "one line of its own"),
            ('parameters { key: "manifest_sha256"', 'parameters { # its hash\nkey: "manifest_sha256"', "one line of its own"),
            ("max_batch_size: 64", "max_batch_size: many", "cannot be read"),
        ],
    )
    def test_what_it_cannot_change_is_refused(self, before: str, after: str, reason: str) -> None:
        with pytest.raises(ConfigError, match=reason):
            with_release(CONFIG.replace(before, after), [7], {"manifest_sha256": None})

    def test_client_parameters_are_the_manifest_s(self, version: Path) -> None:
        manifest = json.loads((version / "manifest.json").read_text())
        manifest["thresholds"] = {"far_1_percent": 0.66284, "far_01_percent": None}
        (version / "manifest.json").write_text(json.dumps(manifest))
        parameters = client_parameters((version / "manifest.json").read_bytes())
        assert parameters.pop("manifest_sha256") == digest(version)
        thresholds = {"threshold_far_1_percent": "0.6628", "threshold_far_01_percent": None}
        assert parameters == {"manifest_version": "1", "thresholds_version": "1", **thresholds}


class TestVerify:
    def test_what_was_published(self, published: Path, models: Path) -> None:
        assert set(verify(published / "1")) >= {"torch", "openvino-fp32"}
        assert not list(published.rglob("__pycache__"))
        assert check_pins(open_repository(models)) == [1]

    def test_broken(self, broken: Path) -> None:
        with pytest.raises(ReleaseError, match="2"):
            verify(broken / "2")
        (line,) = (line for line in versions(open_repository(broken), []) if line.name == "2")
        golden_set_tells = json.loads((broken / "2/manifest.json").read_text()).get("engines") if line.reason is None else None
        assert line.status == ("ready" if golden_set_tells else "broken")

    def test_no_engine_that_runs_here(self, published: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "torch", None)
        with pytest.raises(ReleaseError, match=r"none of its engines runs here .*: torch: .*not installed"):
            verify(published / "1", "torch")

    @pytest.mark.parametrize("content", ["[]", "{}", "2"])
    def test_strange_manifests_are_told(self, models: Path, content: str) -> None:
        (models / "1/manifest.json").write_text(content)
        line = versions(open_repository(models), [])[0]
        assert (line.name, line.status) == ("1", "broken")
        with pytest.raises(ReleaseError, match=r"version 1 in .*: manifest\.json cannot be read"):
            check_pins(open_repository(models))

    def test_files_that_were_not_published(self, models: Path) -> None:
        (models / "2/extra.py").write_text("")
        with pytest.raises(ReleaseError, match=r"extra\.py was not published"):
            verify(models / "2")

    def test_pins(self, models: Path) -> None:
        config = models / "config.pbtxt"
        config.write_text(config.read_text().replace("versions: [ 1 ]", "versions: [ 2 ]"))
        with pytest.raises(ReleaseError, match="does not tell clients manifest_version, manifest_sha256"):
            check_pins(open_repository(models))
        shutil.rmtree(models / "2")
        with pytest.raises(ReleaseError, match="pins version 2, which is not in"):
            check_pins(open_repository(models))


class TestPromote:
    def test_there_and_back(self, models: Path) -> None:
        repository = open_repository(models)
        before = (models / "config.pbtxt").read_text()
        with served(models) as (server, urls), NpairClient(urls["grpc"]) as client:
            photos, first = golden(models, 1)
            _, second = golden(models, 2)
            assert client.embed(photos).version == "1"
            promote(repository, 2, [server])
            vectors, version = client.embed(photos)
            assert version == "2"
            np.testing.assert_allclose(vectors @ second.T, second @ second.T, atol=0.1)
            assert client.manifest_sha256("2") == digest(models / "2")
            assert client.manifest_sha256("1") is None
            assert set(check_server(repository, server)) == {2}
            assert [(line.name, line.status) for line in versions(repository, [server])] == [("1", "ready"), ("2", "serving")]
            assert re.search(r"^2 \*\s+serving", table(versions(repository, [server])), re.MULTILINE)
            with pytest.raises(ReleaseError, match="version 2 is the one that config"):
                retire(repository, 2, [server])
            assert rollback(repository, [server]) == 1
            vectors, version = client.embed(photos)
            assert version == "1"
            np.testing.assert_allclose(vectors @ first.T, first @ first.T, atol=0.1)
            assert sorted((models / "config.pbtxt").read_text().splitlines()) == sorted(before.splitlines())
            with pytest.raises(ReleaseError, match="nothing was served before"):
                rollback(repository, [server])
            retire(repository, 2, [server])
            assert [line.name for line in versions(repository, [server])] == ["1"]
            assert {path.name for path in models.iterdir()} == {"config.pbtxt", "1"}

    def test_two_side_by_side(self, models: Path) -> None:
        repository = open_repository(models)
        with served(models) as (server, urls), NpairClient(urls["http"]) as client:
            photos, _ = golden(models, 1)
            with pytest.raises(ReleaseError, match="--keep must be a version below 2"):
                promote(repository, 2, [server], keep=2)
            promote(repository, 2, [server], keep=1)
            assert client.embed(photos).version == "2"
            for number in "12":
                with NpairClient(urls["http"], version=number) as one:
                    assert one.embed(photos).version == number
                assert (
                    client.manifest_sha256(number) == hashlib.sha256((models / number / "manifest.json").read_bytes()).hexdigest()
                )
            assert set(check_server(repository, server)) == {1, 2}
            promote(repository, 2, [server])
            assert server.serving() == [2]
            with (
                NpairClient(urls["http"], version="1") as one,
                pytest.raises(VersionGoneError, match="not served, but 2 is"),
            ):
                one.embed(photos)

    def test_without_a_server(self, models: Path) -> None:
        promote(open_repository(models), 2, [])
        assert pinned((models / "config.pbtxt").read_text()) == [2]
        with served(models) as (server, _):
            assert server.serving() == [2]

    def test_retiring_leaves_no_trace(self, models: Path) -> None:
        repository, before = open_repository(models), (models / "config.pbtxt").read_text()
        promote(repository, 2, [])
        retire(repository, 1, [])
        assert {path.name for path in models.iterdir()} == {"config.pbtxt", "2"}
        assert set(parameters((models / "config.pbtxt").read_text())) == set(parameters(before))

    def test_broken_is_refused_before_a_server_hears_of_it(self, broken: Path) -> None:
        before = (broken / "config.pbtxt").read_bytes()
        with pytest.raises(ReleaseError):
            promote(open_repository(broken), 2, [Server("http://127.0.0.1:9", "npair", secret=SECRET)])
        assert (broken / "config.pbtxt").read_bytes() == before

    def test_broken_forced_by_hand_does_not_serve(self, broken: Path, standing: Standing) -> None:
        """The old version goes on, and health is green."""
        models, server, urls = standing
        config, sound = (models / "config.pbtxt").read_text(), (models / "2").rename(models.parent / "2")
        shutil.copytree(broken / "2", models / "2")
        try:
            (models / "config.pbtxt").write_text(config.replace("versions: [ 1 ]", "versions: [ 2 ]"))
            with pytest.raises(ReleaseError, match="refused to load"):
                server.load()
        finally:
            (models / "config.pbtxt").write_text(config)
            shutil.rmtree(models / "2")
            sound.rename(models / "2")
        with NpairClient(urls["http"]) as client:
            assert client.embed(golden(models, 1)[0]).version == "1"
        assert server.serving() == [1]
        for path in ("/v2/health/ready", "/v2/models/npair/ready"):
            assert urllib.request.urlopen(urls["http"] + path).status == 200

    def test_what_the_server_refuses_is_put_back(self, models: Path, tmp_path: Path) -> None:
        """It serves a copy of the folder whose version 2 was spoilt on the way."""
        theirs = Path(shutil.copytree(models, tmp_path / "theirs/npair"))
        flip(theirs / "2/model.py")
        repository = open_repository(models)
        with served(theirs) as (server, urls), NpairClient(urls["http"]) as client:
            photos, _ = golden(models, 1)
            before = (models / "config.pbtxt").read_bytes()
            write = repository.write

            def mirrored(path: str, content: bytes) -> None:
                write(path, content)
                (theirs / path).write_bytes(content)

            repository.write = mirrored  # type: ignore[method-assign]
            with pytest.raises(
                ReleaseError, match=r"version 2 is not served, and all is as it was, with version 1: .* refused to load"
            ):
                promote(repository, 2, [server])
            assert (models / "config.pbtxt").read_bytes() == before
            assert {path.name for path in models.iterdir()} == {"config.pbtxt", "1", "2"}
            assert client.embed(photos).version == "1"
            assert urllib.request.urlopen(urls["http"] + "/v2/health/ready").status == 200

    def test_closed_control_apis(self, models: Path) -> None:
        before = (models / "config.pbtxt").read_bytes()
        with running(MODEL_REPOSITORY=str(models.parent)) as (_, urls):
            for secret, reason in (("", "^the secret is missing"), ("wrong", f"^{urls['http']} refused the secret")):
                with pytest.raises(ReleaseError, match=reason):
                    promote(open_repository(models), 2, [Server(urls["http"], "npair", secret=secret)])
                assert (models / "config.pbtxt").read_bytes() == before
                assert {path.name for path in models.iterdir()} == {"config.pbtxt", "1", "2"}

    def test_a_server_that_is_away_changes_nothing(self, models: Path) -> None:
        before = (models / "config.pbtxt").stat().st_mtime_ns
        with pytest.raises(ReleaseError, match="does not answer"):
            promote(open_repository(models), 2, [Server("http://127.0.0.1:9", "npair", secret=SECRET)])
        assert (models / "config.pbtxt").stat().st_mtime_ns == before, "not even written and put back"

    def test_all_servers_go_back_whichever_fails(self, models: Path) -> None:
        """Fakes: the first goes away once it has loaded, and the last refuses. No load ends before all have begun."""
        served, together = dict.fromkeys("abc", 1), threading.Barrier(3)

        class Fake(Server):
            def reach(self) -> None:
                pass

            def load(self) -> None:
                together.wait(60)
                (number,) = pinned((models / "config.pbtxt").read_text())
                if self.model == "c" or (self.model == "a" and served["a"] == 2):
                    raise ReleaseError(f"{self.model} does not load {number}")
                served[self.model] = number

            def check(self, folder: Path) -> float:
                assert folder.name == str(served[self.model])
                return 0.0

        reason = r"going back to version 1 failed, too \(a does not load 1; c does not load 1\): c does not load 2"
        with pytest.raises(ReleaseError, match=reason):
            promote(open_repository(models), 2, [Fake("http://127.0.0.1:9", name, secret=SECRET) for name in "abc"])
        assert served == {"a": 2, "b": 1, "c": 1}
        assert pins(models, 1)

    @pytest.mark.parametrize("damage", ["gone", "truncated"])
    def test_what_cannot_be_served_again_is_not_remembered(self, models: Path, damage: str) -> None:
        """As where a new folder's config.pbtxt pins a version of elsewhere."""
        if damage == "gone":
            shutil.rmtree(models / "1")
        else:
            truncate(models / "1/manifest.json")
        promote(open_repository(models), 2, [])
        assert pins(models, 2)
        assert not (models / "fallback.json").exists()
        with pytest.raises(ReleaseError, match="nothing was served before"):
            rollback(open_repository(models), [])

    @pytest.mark.parametrize(
        ("status", "answer", "reason"),
        [(502, "<html>", "does not say what it serves: status 502: <html>"), (400, "{}", "may be loading this one")],
    )
    def test_nothing_is_retired_on_no_answer(
        self, models: Path, monkeypatch: pytest.MonkeyPatch, status: int, answer: str, reason: str
    ) -> None:
        """Such as a proxy's, or a starting server's."""
        monkeypatch.setattr(Server, "_ask", lambda *_: (status, answer))
        with pytest.raises(ReleaseError, match=reason):
            retire(open_repository(models), 2, [Server("http://127.0.0.1:9", "npair")])
        assert 2 in open_repository(models).versions()

    def test_one_at_a_time(self, models: Path) -> None:
        repository = open_repository(models)
        with repository.exclusive(), pytest.raises(RepositoryError):
            promote(open_repository(models), 2, [])


def test_a_server_that_starts_with_a_broken_pin_serves_what_was_served_before(models: Path) -> None:
    promote(open_repository(models), 2, [])
    flip(models / "2/network.pt2")
    ports = free_ports()
    process = start(**ports, MODEL_REPOSITORY=str(models.parent), NPAIR_CONTROL_SECRET=SECRET)
    try:
        said = "".join(lines_until_ready(process))
        assert "network.pt2 has changed since it was published" in said
        assert "WARNING: the version that config.pbtxt pins was refused" in said
        assert "version 1, which was served before, is served instead" in said
        url = f"http://127.0.0.1:{ports['HTTP_PORT']}"
        photos, expected = golden(models, 1)
        with NpairClient(url) as client:
            vectors, version = client.embed(photos)
        assert version == "1"
        np.testing.assert_allclose(vectors @ expected.T, expected @ expected.T, atol=0.1)
        with pytest.raises(ReleaseError, match=r"serves \[1\], and config\.pbtxt pins \[2\]"):
            check_server(open_repository(models), Server(url, "npair"))
        rollback(open_repository(models), [Server(url, "npair", secret=SECRET)])
        check_server(open_repository(models), Server(url, "npair"))
    finally:
        process.terminate()
        process.wait(timeout=30)


def test_nothing_served_before(models: Path) -> None:
    flip(models / "1/network.pt2")
    process = start(**free_ports(), MODEL_REPOSITORY=str(models.parent))
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "was refused, for the reasons above, and no other was served before" in said


def pins(models: Path, number: int) -> bool:
    return pinned((models / "config.pbtxt").read_text())[-1] == number


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_interrupted_promotions_go_back(standing: Standing, number: signal.Signals) -> None:
    """While the server loads, which here takes longer. Under nohup, a hangup does not interrupt."""
    models, server, urls = standing
    before = (models / "config.pbtxt").read_bytes()
    code = """
import sys, time
from npair import cli
from npair.releasing import release

load = release.Server.load
release.Server.load = lambda self: (time.sleep(3), load(self))
sys.exit(cli.main())
"""
    nohup = ["nohup"] if number == signal.SIGTERM else []
    command = [*nohup, sys.executable, "-c", code, "promote", "2", "--repository", str(models), "--url", urls["http"]]
    environment = os.environ | {"NPAIR_CONTROL_SECRET": SECRET}
    process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    eventually(partial(pins, models, 2), 60)
    if nohup:
        process.send_signal(signal.SIGHUP)
        time.sleep(1)
        assert pins(models, 2)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "version 2 is not served, and all is as it was, with version 1: KeyboardInterrupt" in said
    assert (models / "config.pbtxt").read_bytes() == before
    assert server.serving() == [1]


@pytest.mark.parametrize("seed", range(2))
def test_killed_promotions_leave_what_serves(standing: Standing, seed: int) -> None:
    """kill -9 at a chosen moment, and at random ones. Many more: benchmarks/promotions.py."""
    models, server, urls = standing
    dice, repository = random.Random(seed), open_repository(models)
    for target in (2, 1, 2):
        words = ["promote", str(target), "--repository", str(models), "--url", urls["http"]]
        environment = os.environ | {"NPAIR_CONTROL_SECRET": SECRET}
        process = subprocess.Popen([sys.executable, "-m", "npair", *words], env=environment, stderr=subprocess.DEVNULL)
        if seed:
            time.sleep(dice.uniform(0.5, 3))
        else:  # certainly when config.pbtxt is written and the server perhaps has not loaded it
            eventually(partial(pins, models, target), 60)
        process.send_signal(signal.SIGKILL)
        process.wait()
        promote(repository, check_pins(repository)[-1], [server])
        check_server(repository, server)


def test_promotions_under_load(standing: Standing) -> None:
    """No request fails, and every answer is of one of the versions. Many more: benchmarks/promotions.py."""
    models, server, urls = standing
    repository, stop, failures = open_repository(models), threading.Event(), list[str]()
    photos, _ = golden(models, 1)
    answered: dict[str, int] = {"1": 0, "2": 0}

    def work(url: str, count: int) -> None:
        with NpairClient(url, retries=0) as client:
            while not stop.is_set():
                try:
                    vectors, version = client.embed(photos[:count])
                    _, expected = golden(models, int(version))
                    assert np.linalg.norm(vectors - expected[:count], axis=1).max() < 0.5
                    answered[version] += 1
                except Exception as error:
                    failures.append(repr(error))

    threads = [threading.Thread(target=work, args=(url, count)) for url in urls.values() for count in (1, 4)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(3):
            promote(repository, 2, [server])
            rollback(repository, [server])
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert failures == []
    assert min(answered.values()) > 0


Resolve = Callable[..., None]


@pytest.fixture
def resolve(monkeypatch: pytest.MonkeyPatch) -> Resolve:
    """A resolver that knows more host names: a fake, since real ones need the machine's settings."""
    real = socket.getaddrinfo

    def known(host: str, *addresses: str) -> None:
        before = socket.getaddrinfo

        def lookup(name: Any, *arguments: Any, **options: Any) -> Any:
            if name != host:
                return before(name, *arguments, **options)
            return [answer for address in addresses for answer in real(address, *arguments, **options)]

        monkeypatch.setattr(socket, "getaddrinfo", lookup)

    return known


class TestHostsOfSeveralServers:
    @pytest.mark.parametrize(
        ("host", "answers", "asked"),
        [
            ("npair.test", ["::1", "127.0.0.2", "127.0.0.1", "127.0.0.2"], ["127.0.0.1", "127.0.0.2"]),
            ("npair.test", ["::2", "::1"], ["::1", "::2"]),
            ("localhost", ["127.0.0.2", "::1", "127.0.0.1"], ["127.0.0.1"]),
            ("127.0.0.1", ["127.0.0.1"], ["127.0.0.1"]),
        ],
    )
    def test_each_address_is_one(self, resolve: Resolve, host: str, answers: list[str], asked: list[str]) -> None:
        resolve(host, *answers)
        servers = Server.all_of(f"http://{host}:8000", "npair")
        assert [server.address for server in servers] == asked
        names = [f"http://{host}:8000 ({address})" if address != host else f"http://{host}:8000" for address in asked]
        assert [server.url for server in servers] == names

    def test_unknown_hosts(self) -> None:
        with pytest.raises(ReleaseError, match=r"^http://nowhere\.invalid:8000: the host cannot be found: "):
            Server.all_of("http://nowhere.invalid:8000", "npair")

    def test_all_of_them_change_at_once(self, standing: Standing, resolve: Resolve, monkeypatch: pytest.MonkeyPatch) -> None:
        models, first, _ = standing
        repository, port = open_repository(models), first.parts.port
        with contextlib.ExitStack() as stack:
            others = []
            for address in ("127.0.0.2", "127.0.0.3"):
                ports = free_ports() | {"HTTP_PORT": str(port)}
                others.append(
                    start(**ports, BIND_ADDRESS=address, MODEL_REPOSITORY=str(models.parent), NPAIR_CONTROL_SECRET=SECRET)
                )
                stack.callback(others[-1].wait, 30)
                stack.callback(others[-1].terminate)
            for process in others:
                lines_until_ready(process)
            resolve("npair.test", "127.0.0.3", "127.0.0.2", "127.0.0.1")
            resolve("more.test", "127.0.0.1", "127.0.0.4", "127.0.0.5")
            servers, more = (
                Server.all_of(f"http://{host}:{port}", "npair", secret=SECRET, timeout=60) for host in ("npair.test", "more.test")
            )
            away = [rf"more\.test:{port} \({address}\) does not answer" for address in ("127.0.0.4", "127.0.0.5")]
            with pytest.raises(ReleaseError, match=".*; .*".join(away)):
                promote(repository, 2, more)
            assert pins(models, 1)

            load, together = Server.load, threading.Barrier(3)

            def load_together(server: Server) -> None:
                together.wait(60)
                load(server)

            monkeypatch.setattr(Server, "load", load_together)
            promote(repository, 2, servers)
            assert [server.serving() for server in servers] == [[2], [2], [2]]
            assert [*map(dict.keys, (check_server(repository, server) for server in servers))] == [{2}, {2}, {2}]
            others[0].terminate()
            others[0].wait(30)
            with pytest.raises(ReleaseError, match=rf"^http://npair\.test:{port} \(127\.0\.0\.2\) does not answer"):
                rollback(repository, servers)
            monkeypatch.setattr(Server, "load", load)
            rollback(repository, [servers[0], servers[2]])
            assert (servers[0].serving(), servers[2].serving()) == ([1], [1])

    def test_tls_is_by_name(self, tmp_path: Path, resolve: Resolve, monkeypatch: pytest.MonkeyPatch) -> None:
        """A fake server, since Triton has no TLS over HTTP: proxies before it have."""
        cert, key = certificate(tmp_path, "npair.test")
        monkeypatch.setenv("SSL_CERT_FILE", str(cert))
        hosts = []

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                hosts.append(self.headers["Host"])
                self.send_response(200)
                self.end_headers()
                self.wfile.write(b'{"versions": ["7"]}')

            def log_message(self, *_: object) -> None:
                pass

        with http.server.ThreadingHTTPServer(("127.0.0.2", 0), Handler) as front:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(cert, key)
            front.socket = context.wrap_socket(front.socket, server_side=True)
            threading.Thread(target=front.serve_forever, daemon=True).start()
            for host in ("npair.test", "other.test"):
                resolve(host, "127.0.0.2")
            (right,), (wrong,) = (Server.all_of(f"https://{name}.test:{front.server_port}", "npair") for name in ("npair", "other"))
            assert right.serving() == [7]
            assert hosts == [f"npair.test:{front.server_port}"]
            with pytest.raises(ReleaseError, match=r"other\.test:\d+ \(127\.0\.0\.2\) does not answer .*certificate verify failed"):
                wrong.serving()
            front.shutdown()
