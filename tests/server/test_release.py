"""Release versions on the real server: sound ones go live, broken ones never."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import shutil
import sys
import threading
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from support.models import rewrite_manifest, without_int8
from support.releases import SECRET, Standing, digest, flip, golden, pins, truncate
from support.servers import controlled, free_ports, lines_until_ready, running, start
from tritonclient.utils import InferenceServerException

from npair import cli
from npair.client import HttpTransport, NpairClient, VersionGoneError
from npair.releasing import ReleaseError, RepositoryError
from npair.releasing.config import parameters, pinned
from npair.releasing.control import Server
from npair.releasing.folder import Folder
from npair.releasing.release import check_server, promote, retire, rollback
from npair.releasing.repository import open_repository
from npair.releasing.verify import verify
from npair.releasing.versions import listing, versions


def copied(models: Path, number: int, to: int) -> None:
    """Add a version whose content is that of another."""
    shutil.copytree(models / str(number), models / str(to))
    rewrite_manifest(models / str(to), version=to)


def test_a_model_starts_from_nothing(
    trained: Path,
    dataset: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "my models" / "npair"
    words = ["publish", "--run", trained, "--data", dataset, "--repository", folder]
    monkeypatch.setattr(sys, "argv", ["npair", *map(str, words)])
    with without_int8():
        assert cli.main() == 0
    printed = capsys.readouterr()
    assert "holds no model yet" in printed.err
    command = shlex.split(printed.out.strip().partition("to serve it: ")[2])
    assert command[:2] == ["make", "serve"]
    variable, _, models = command[2].partition("=")
    with running(**{variable: models}) as (_, urls), NpairClient(urls["grpc"]) as client:
        photos, expected = golden(folder, 1)
        vectors, version = client.embed(photos)
        assert version == "1"
        np.testing.assert_allclose(vectors @ expected.T, expected @ expected.T, atol=0.1)
        assert client.manifest_sha256("1") == digest(folder / "1")


class TestPromote:
    def test_there_and_back(self, models: Path) -> None:
        repository = open_repository(models)
        before = (models / "config.pbtxt").read_text()
        with controlled(models) as (server, urls), NpairClient(urls["grpc"]) as client:
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
            assert [(line.name, line.status) for line in versions(repository, [server])] == [
                ("1", "ready"),
                ("2", "serving"),
            ]
            assert re.search(
                r"^2 \*\s+serving", listing(versions(repository, [server])), re.MULTILINE
            )
            with pytest.raises(ReleaseError, match="version 2 is pinned by config"):
                retire(repository, 2, [server])
            assert rollback(repository, [server]) == 1
            vectors, version = client.embed(photos)
            assert version == "1"
            np.testing.assert_allclose(vectors @ first.T, first @ first.T, atol=0.1)
            assert sorted((models / "config.pbtxt").read_text().splitlines()) == sorted(
                before.splitlines()
            )
            with pytest.raises(ReleaseError, match="nothing was served before"):
                rollback(repository, [server])
            retire(repository, 2, [server])
            assert [line.name for line in versions(repository, [server])] == ["1"]
            assert {path.name for path in models.iterdir()} == {"config.pbtxt", "1"}

    def test_two_side_by_side(self, models: Path) -> None:
        repository = open_repository(models)
        with controlled(models) as (server, urls), NpairClient(urls["http"]) as client:
            photos, _ = golden(models, 1)
            with pytest.raises(ReleaseError, match="--keep must be a version below 2"):
                promote(repository, 2, [server], keep=2)
            promote(repository, 2, [server], keep=1)
            assert client.embed(photos).version == "2"
            for number in "12":
                with NpairClient(urls["http"], version=number) as one:
                    assert one.embed(photos).version == number
                assert (
                    client.manifest_sha256(number)
                    == hashlib.sha256((models / number / "manifest.json").read_bytes()).hexdigest()
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
        with controlled(models) as (server, _):
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
            promote(
                open_repository(broken), 2, [Server("http://127.0.0.1:9", "npair", secret=SECRET)]
            )
        assert (broken / "config.pbtxt").read_bytes() == before

    def test_broken_forced_by_hand_does_not_serve(self, broken: Path, standing: Standing) -> None:
        """The old version keeps serving, and the server stays healthy."""
        models, server, urls = standing
        config, sound = (
            (models / "config.pbtxt").read_text(),
            (models / "2").rename(models.parent / "2"),
        )
        shutil.copytree(broken / "2", models / "2")
        try:
            (models / "config.pbtxt").write_text(
                config.replace("versions: [ 1 ]", "versions: [ 2 ]")
            )
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
        """The server reads a copy of the repository in which version 2 is damaged."""
        theirs = Path(shutil.copytree(models, tmp_path / "theirs/npair"))
        flip(theirs / "2/model.py")
        repository = open_repository(models)
        with controlled(theirs) as (server, urls), NpairClient(urls["http"]) as client:
            photos, _ = golden(models, 1)
            before = (models / "config.pbtxt").read_bytes()
            write = repository.write

            def mirrored(path: str, content: bytes) -> None:
                write(path, content)
                (theirs / path).write_bytes(content)

            repository.write = mirrored  # type: ignore[method-assign]
            reason = (
                "version 2 is not served, and all is as it was, with version 1: .* refused to load"
            )
            with pytest.raises(ReleaseError, match=reason):
                promote(repository, 2, [server])
            assert (models / "config.pbtxt").read_bytes() == before
            assert {path.name for path in models.iterdir()} == {"config.pbtxt", "1", "2"}
            assert client.embed(photos).version == "1"
            assert urllib.request.urlopen(urls["http"] + "/v2/health/ready").status == 200

    def test_closed_control_apis(self, models: Path) -> None:
        before = (models / "config.pbtxt").read_bytes()
        with running(MODEL_REPOSITORY=str(models.parent)) as (_, urls):
            for secret, reason in (
                ("", "^the secret is missing"),
                ("wrong", f"^{urls['http']} refused the secret"),
            ):
                with pytest.raises(ReleaseError, match=reason):
                    promote(
                        open_repository(models), 2, [Server(urls["http"], "npair", secret=secret)]
                    )
                assert (models / "config.pbtxt").read_bytes() == before
                assert {path.name for path in models.iterdir()} == {"config.pbtxt", "1", "2"}

    def test_a_server_that_is_away_changes_nothing(self, models: Path) -> None:
        before = (models / "config.pbtxt").stat().st_mtime_ns
        with pytest.raises(ReleaseError, match="does not answer"):
            promote(
                open_repository(models), 2, [Server("http://127.0.0.1:9", "npair", secret=SECRET)]
            )
        assert (models / "config.pbtxt").stat().st_mtime_ns == before, (
            "not even written and put back"
        )

    def test_all_servers_go_back_whichever_fails(self, models: Path) -> None:
        """Of three fake servers, the last cannot load version 2 and the first cannot go back.

        No load ends before all have started.
        """
        served, together = dict.fromkeys("abc", 1), threading.Barrier(3)

        class Fake(Server):
            def reach(self) -> None:
                pass

            def load(self, config: str = "") -> None:
                assert not config
                together.wait(60)
                (number,) = pinned((models / "config.pbtxt").read_text())
                if self.model == "c" or (self.model == "a" and served["a"] == 2):
                    raise ReleaseError(f"{self.model} does not load {number}")
                served[self.model] = number

            def check(self, folder: Path) -> float:
                assert folder.name == str(served[self.model])
                return 0.0

        failures = r"\(a does not load 1; c does not load 1\): c does not load 2"
        reason = rf"going back to version 1 failed as well {failures}"
        with pytest.raises(ReleaseError, match=reason):
            promote(
                open_repository(models),
                2,
                [Fake("http://127.0.0.1:9", name, secret=SECRET) for name in "abc"],
            )
        assert served == {"a": 2, "b": 1, "c": 1}
        assert pins(models, 1)

    @pytest.mark.parametrize("damage", ["gone", "truncated", "changed"])
    def test_what_cannot_be_served_again_is_not_remembered(self, models: Path, damage: str) -> None:
        """A copied config.pbtxt may pin a version that this repository lacks."""
        if damage == "gone":
            shutil.rmtree(models / "1")
        elif damage == "truncated":
            truncate(models / "1/manifest.json")
        else:
            flip(models / "1/network.pt2")
        said: list[str] = []
        promote(open_repository(models), 2, [], say=said.append)
        assert ["version 1 can no longer be served" in line for line in said] == [True]
        assert pins(models, 2)
        assert not (models / "fallback.json").exists()
        with pytest.raises(ReleaseError, match="nothing was served before"):
            rollback(open_repository(models), [])

    def test_a_damaged_version_does_not_block_the_way_back(self, models: Path) -> None:
        """Versions 2 and 3 were served after 1, and 2 is damaged by now."""
        repository = open_repository(models)
        copied(models, 2, 3)
        promote(repository, 2, [])
        promote(repository, 3, [])
        flip(models / "2/model.py")
        copied(models, 3, 4)
        said: list[str] = []
        promote(repository, 4, [])
        assert rollback(repository, [], say=said.append) == 3
        assert ["version 2 can no longer be served" in line for line in said] == [True]
        assert rollback(repository, []) == 1
        assert not (models / "fallback.json").exists()

    def test_the_fallback_is_a_whole_version(self, models: Path) -> None:
        repository = open_repository(models)
        copied(models, 2, 3)
        promote(repository, 2, [])
        flip(models / "2/model.py")
        promote(repository, 3, [])
        fallback = json.loads((models / "fallback.json").read_text())
        assert fallback["version_policy"]["specific"]["versions"] == ["1"]

    def test_a_copy_is_no_version_of_its_own(self, models: Path) -> None:
        """A folder copied by hand would be served under two numbers."""
        shutil.copytree(models / "2", models / "3")
        repository, reason = (
            open_repository(models),
            "folder of version 3 holds version 2; .*publish",
        )
        with pytest.raises(ReleaseError, match=reason):
            promote(repository, 3, [])
        assert pins(models, 1)
        (line,) = (line for line in versions(repository, []) if line.name == "3")
        assert line.status == "broken"
        assert re.search(reason, line.reason or "")

    @pytest.mark.parametrize(
        ("changes", "reason"),
        [
            ({"schema": 99}, "published by a newer npair"),
            ({"metrics": {"val": {"fine": {"recall_at_1": 0.9}}}}, "metrics of another shape"),
        ],
    )
    def test_a_manifest_of_another_npair(
        self, models: Path, changes: dict[str, object], reason: str
    ) -> None:
        rewrite_manifest(models / "2", **changes)
        rows = versions(open_repository(models), [])
        assert [row.status for row in rows] == ["ready", "broken"]
        assert reason in listing(rows)
        with pytest.raises(ReleaseError, match=reason):
            verify(models / "2")

    def test_a_disk_that_is_full_from_the_start(
        self, models: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Nothing has changed, so nothing has to be written to put it back."""
        promote(open_repository(models), 2, [])
        before = {path.name: path.read_bytes() for path in models.glob("*.*")}

        def full(*_: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(Folder, "write", full)
        with pytest.raises(ReleaseError, match=r"all is as it was, with version 2: .*No space"):
            promote(open_repository(models), 1, [])
        assert {path.name: path.read_bytes() for path in models.glob("*.*")} == before

    def test_servers_go_back_although_the_files_cannot(
        self, models: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Of two fake servers, one loads version 2; then the disk is full."""
        given: list[str] = []
        write, wrong = Folder.write, threading.Event()

        class Fake(Server):
            def reach(self) -> None:
                pass

            def load(self, config: str = "") -> None:
                given.append(config)

            def check(self, folder: Path) -> float:
                if folder.name == "2":
                    wrong.set()
                    raise ReleaseError("golden set wrong")
                return 0.0

        def full(self: Folder, path: str, content: bytes) -> None:
            if wrong.is_set():
                raise OSError(28, "No space left on device")
            write(self, path, content)

        monkeypatch.setattr(Folder, "write", full)
        reason = r"config\.pbtxt could not be put back .*; servers that run are back at version 1: "
        with pytest.raises(ReleaseError, match=reason):
            promote(open_repository(models), 2, [Fake("http://127.0.0.1:9", "npair")])
        assert given[0] == ""
        assert json.loads(given[1])["version_policy"]["specific"]["versions"] == ["1"]

    @pytest.mark.parametrize(
        ("status", "answer", "reason"),
        [
            (502, "<html>", "does not say what it serves: status 502: <html>"),
            (400, "unknown model", "may be loading this one"),
        ],
    )
    def test_nothing_is_retired_on_no_answer(
        self, models: Path, monkeypatch: pytest.MonkeyPatch, status: int, answer: str, reason: str
    ) -> None:
        """A proxy or a starting server may give no answer."""

        def refused(*_: object) -> None:
            raise InferenceServerException(answer, status=str(status))

        monkeypatch.setattr(HttpTransport, "request", refused)
        with pytest.raises(ReleaseError, match=reason):
            retire(open_repository(models), 2, [Server("http://127.0.0.1:9", "npair")])
        assert 2 in open_repository(models).versions()

    def test_one_at_a_time(self, models: Path) -> None:
        repository = open_repository(models)
        with repository.exclusive(), pytest.raises(RepositoryError):
            promote(open_repository(models), 2, [])


def test_a_server_that_starts_with_a_broken_pin_serves_what_was_served_before(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It does so again after a promotion that fails."""
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
        server = Server(url, "npair", secret=SECRET)
        copied(models, 1, 3)
        check = Server.check

        def refuses_3(server: Server, folder: Path) -> float:
            if folder.name == "3":
                raise ReleaseError("not 3")
            return check(server, folder)

        monkeypatch.setattr(Server, "check", refuses_3)
        with pytest.raises(ReleaseError, match="all is as it was, with version 1: not 3"):
            promote(open_repository(models), 3, [server])
        assert server.serving() == [1]
        assert pins(models, 2)
        rollback(open_repository(models), [server])
        check_server(open_repository(models), server)
    finally:
        process.terminate()
        process.wait(timeout=30)


def test_nothing_served_before(models: Path) -> None:
    flip(models / "1/network.pt2")
    process = start(**free_ports(), MODEL_REPOSITORY=str(models.parent))
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "was refused, for the reasons above, and no other was served before" in said
