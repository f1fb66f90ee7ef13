"""Watch servers that fail, are busy or follow the control API."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import tritonclient.grpc
from supervisor.api import CONTROL_HEADER
from supervisor.procfs import arguments, children, cpu_seconds, dead_stubs, server_at
from supervisor.watch import UNHEALTHY_AFTER, WATCH_INTERVAL
from support.models import ROOT, SHIPPED
from support.servers import eventually, free_ports, lines_until_ready, running, start
from support.supervised import child_of, control, ended, health, standin, stopped, stubs_of
from tritonclient.utils import InferenceServerException

from npair.client import NpairClient, UnavailableError
from npair.publishing.drawings import draw, encode

UNLOADED = "the model was unloaded through the control API; waiting for it to be loaded"
NOT_LOADED = "the model could not be loaded, for the reasons above; waiting for it to be loaded"


class TestStart:
    def test_changed_version(self, tmp_path: Path) -> None:
        shutil.copytree(ROOT / "model_repository", tmp_path / "models")
        with (tmp_path / "models/npair" / SHIPPED.name / "network.pt2").open("r+b") as file:
            file.truncate(100_000)
        code, output = ended(**free_ports(), MODEL_REPOSITORY=str(tmp_path / "models"))
        assert code == 1
        assert "network.pt2 has changed since it was published" in output
        assert output.splitlines()[-1].endswith(
            "was refused, for the reasons above, and no other was served before"
        )

    @pytest.mark.parametrize(("parameter", "value"), [("max_bytes", "lots"), ("max_pixels", "0")])
    def test_senseless_limits(self, tmp_path: Path, parameter: str, value: str) -> None:
        shutil.copytree(ROOT / "model_repository", tmp_path / "models")
        config = tmp_path / "models/npair/config.pbtxt"
        config.write_text(
            re.sub(
                rf'("{parameter}" value: {{ string_value: )"\d+"',
                rf'\1"{value}"',
                config.read_text(),
            )
        )
        code, output = ended(**free_ports(), MODEL_REPOSITORY=str(tmp_path / "models"))
        assert code == 1
        assert (
            f'parameter "{parameter}" must be a positive whole number, found "{value}"'
            in output.replace('\\"', '"')
        )


def test_a_start_that_hangs_ends_with_the_reason() -> None:
    """If a loading stub gets no CPU for two seconds, Triton gives it up and waits forever."""
    ports = free_ports()
    process = start(**ports, START_SECONDS="15")

    def stub() -> int | None:
        server = server_at(int(ports["HTTP_PORT"]))
        return (
            next((pid for pid in children(server) if cpu_seconds(pid) > 0.3), None)
            if server
            else None
        )

    eventually(stub)
    stopped = stub()
    assert stopped is not None
    os.kill(stopped, signal.SIGSTOP)
    time.sleep(4)
    os.kill(stopped, signal.SIGCONT)
    _, output = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "loading: npair" in output, "what the server logged"
    reason = "the model was not ready within START_SECONDS=15, with the last log lines above"
    assert output.splitlines()[-1] == f"npair: {reason}; the server was ended"


def test_a_load_that_ends_between_two_questions_is_not_taken_for_refused(tmp_path: Path) -> None:
    process = start(**free_ports(), **standin(tmp_path, "loading"))
    lines_until_ready(process)
    assert stopped(process) == (0, "npair: stopped\n")


def test_an_answer_that_does_not_come_is_not_taken_for_refused(tmp_path: Path) -> None:
    """On a starved machine, a loaded server's first answers may come too late."""
    environment = standin(tmp_path, "late")
    process = start(**free_ports(), **environment)
    lines_until_ready(process)
    assert stopped(process) == (0, "npair: stopped\n")
    late = Path(environment["STANDIN_LOG"]).read_text().split()
    assert late == ["/v2/models/npair/stats", "/v2/models/npair/ready"]


class TestControl:
    """Unloading by the control API is no fault; a dead model still is."""

    def test_unloaded_and_never_loaded(self) -> None:
        with running(NPAIR_CONTROL_SECRET="s") as (process, urls):
            assert control(urls["http"], "unload") == 200
            time.sleep(UNHEALTHY_AFTER + 3)
            assert process.poll() is None
            assert stopped(process) == (0, f"npair: WARNING: {UNLOADED}\nnpair: stopped\n")

    def test_unloaded_loaded_wrong_and_loaded_right(self) -> None:
        with (
            running(NPAIR_CONTROL_SECRET="s") as (process, urls),
            NpairClient(urls["http"]) as client,
        ):
            server = child_of(process)
            grpc = tritonclient.grpc.InferenceServerClient(urls["grpc"].removeprefix("grpc://"))
            secret = {f"triton-grpc-protocol-{CONTROL_HEADER}": "s"}
            grpc.unload_model("npair", headers=secret)
            time.sleep(5)
            assert health(urls["http"]).returncode == 1, "it serves nobody"
            wrong = {
                "backend": "python",
                "max_batch_size": 64,
                "version_policy": {"specific": {"versions": [int(SHIPPED.name)]}},
            }
            with pytest.raises(InferenceServerException, match="load failed"):
                grpc.load_model("npair", headers=secret, config=json.dumps(wrong))
            time.sleep(UNHEALTHY_AFTER + 3)
            grpc.load_model("npair", headers=secret)
            grpc.close()
            assert len(client.embed(SHIPPED / "golden/photo.jpg").vectors) == 1
            eventually(lambda: health(urls["http"]).returncode == 0)
            time.sleep(2 * WATCH_INTERVAL)
            assert child_of(process) == server
            _, output = stopped(process)
            assert [line for line in output.splitlines() if line.startswith("npair: ")] == [
                f"npair: WARNING: {UNLOADED}",
                f"npair: WARNING: {NOT_LOADED}",
                f"npair: the model is loaded again, version {SHIPPED.name}",
                "npair: stopped",
            ]

    def test_loaded_again_while_photos_come(self) -> None:
        with (
            running(NPAIR_CONTROL_SECRET="s") as (process, urls),
            NpairClient(urls["http"]) as client,
        ):
            with ThreadPoolExecutor(1) as threads:
                loading = threads.submit(lambda: [control(urls["http"], "load") for _ in range(3)])
                while not loading.done():
                    assert len(client.embed(SHIPPED / "golden/photo.jpg").vectors) == 1
            assert loading.result() == [200] * 3
            assert stopped(process) == (0, "npair: stopped\n")

    def test_unloaded_beside_a_dead_stub(self) -> None:
        """If the unload ends before the dead stub is noticed, the next load starts new stubs."""
        with (
            running(NPAIR_CONTROL_SECRET="s") as (process, urls),
            NpairClient(urls["http"]) as client,
        ):
            os.kill(stubs_of(process)[0], signal.SIGKILL)
            control(urls["http"], "unload")
            time.sleep(4 * WATCH_INTERVAL)
            if process.poll() is None:
                assert control(urls["http"], "load") == 200
                assert len(client.embed(SHIPPED / "golden/photo.jpg").vectors) == 1
                assert not dead_stubs(child_of(process))
            else:
                assert process.stderr is not None
                assert "npair: a Python stub of the model died" in process.stderr.read()


def test_dead_stub_ends_the_server_with_the_reason() -> None:
    """Triton stays ready, and the other instance answers most golden photos."""
    with running() as (process, urls):
        assert health(urls["http"]).returncode == 0
        os.kill(stubs_of(process)[0], signal.SIGKILL)
        told = health(urls["http"])
        assert (told.returncode, told.stderr) == (1, "npair: a Python stub of the model died\n")
        _, output = process.communicate(timeout=60)
        assert process.returncode == 1
        reason = "npair: a Python stub of the model died, and requests that it is given fail"
        assert f"{reason}; the server was ended" in output
        with NpairClient(urls["http"], retries=0) as client, pytest.raises(UnavailableError):
            client.embed(b"photo")


def test_hanging_stubs_end_the_server_with_the_reason() -> None:
    with running() as (process, _):
        stubs = stubs_of(process)
        for stub in stubs:
            os.kill(stub, signal.SIGSTOP)
        _, output = process.communicate(timeout=60)
        assert process.returncode == 1
        deadline = time.monotonic() + 10
        while any(map(arguments, stubs)):
            assert time.monotonic() < deadline, "stubs are left behind"
            time.sleep(0.1)
        assert re.search(
            r"npair: the golden photo has failed for 10 s \(.*\); the server was ended", output
        )


def test_load_is_not_taken_for_death() -> None:
    """Golden photos queue behind others for longer than a dead model is tolerated."""
    photos = [encode(draw(0, 0, 1500), "PNG")] * 64
    with running() as (process, urls):
        end = time.monotonic() + 1.5 * UNHEALTHY_AFTER

        def load(_: int) -> None:
            with NpairClient(
                urls["http"], batch_size=64, batch_bytes=1 << 30, timeout=120, retries=10
            ) as client:
                while time.monotonic() < end:
                    client.embed(photos)

        with ThreadPoolExecutor(5) as threads:
            list(threads.map(load, range(5)))
        assert process.poll() is None


def test_storage_that_goes_away_does_not_end_a_server_that_runs(tmp_path: Path) -> None:
    """Everything is in memory, so losing the mount does no harm."""
    model = Path(shutil.copytree(ROOT / "model_repository", tmp_path / "models")) / "npair"
    with (
        running(MODEL_REPOSITORY=str(model.parent)) as (process, urls),
        NpairClient(urls["http"]) as client,
    ):
        photo = (model / SHIPPED.name / "golden/photo.jpg").read_bytes()
        model.rename(tmp_path / "away")
        time.sleep(UNHEALTHY_AFTER + 3)
        assert process.poll() is None
        assert len(client.embed(photo).vectors) == 1
        assert stopped(process) == (0, "npair: stopped\n")
