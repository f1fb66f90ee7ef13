"""Stop a server through serve.py, by signals and by itself."""

from __future__ import annotations

import contextlib
import http.client
import http.server
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from PIL import Image
from supervisor.api import CONTROL_HEADER
from supervisor.logs import StderrHandler
from supervisor.procfs import cpu_seconds
from support.models import ROOT, SHIPPED
from support.servers import eventually, free_ports, running
from support.supervised import SERVE, computed, ended, standin, stopped, stubs_of

from npair.client import NpairClient, NpairError
from npair.publishing.drawings import encode


def test_stops_in_order_although_an_idle_client_holds_its_connection() -> None:
    with running() as (process, urls):
        idle = http.client.HTTPConnection(urls["http"].removeprefix("http://"))
        idle.request("GET", "/v2/health/live")
        idle.getresponse().read()
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        _, output = process.communicate(timeout=30)
        assert process.returncode == 0, output
        assert time.monotonic() - began < 10
        assert output == "npair: stopped\n"
        idle.close()


def test_stops_in_order_although_the_repository_has_other_folders(tmp_path: Path) -> None:
    """The root of a Kubernetes volume has a lost+found folder."""
    shutil.copytree(ROOT / "model_repository", tmp_path / "models")
    (tmp_path / "models/lost+found").mkdir()
    with running(MODEL_REPOSITORY=str(tmp_path / "models")) as (process, _):
        assert stopped(process) == (0, "npair: stopped\n")


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_answers_what_it_accepted_before_it_stops(protocol: str) -> None:
    # Photos of this size are decoded one at a time.
    photos = [encode(Image.new("RGB", (4100, 4100)), "PNG")] * 16
    with (
        running(DRAIN_SECONDS="30") as (process, urls),
        NpairClient(urls[protocol], batch_size=64) as client,
    ):
        answers: list[int] = []
        request = threading.Thread(target=lambda: answers.append(len(client.embed(photos).vectors)))
        worked = computed(process)
        request.start()
        # More CPU time than a golden photo needs shows that the request was accepted.
        eventually(lambda: computed(process) > worked + 0.2)
        assert not answers
        process.send_signal(signal.SIGTERM)
        request.join(timeout=60)
        client.close()
        assert answers == [16]
        assert process.wait(timeout=30) == 0


def test_stops_in_order_before_it_has_started_a_server(tmp_path: Path) -> None:
    assert ended(**free_ports(), **standin(tmp_path, "stopped")) == (0, "")


def test_a_second_signal_does_not_wait_for_the_drain() -> None:
    photos = [encode(Image.new("RGB", (4100, 4100)), "PNG")] * 32
    with (
        running(DRAIN_SECONDS="60") as (process, urls),
        NpairClient(urls["http"], batch_size=64, retries=0) as client,
    ):
        failures: list[Exception | None] = []
        worked = computed(process)
        request = threading.Thread(target=lambda: failures.append(failure(client, photos)))
        request.start()
        eventually(lambda: computed(process) > worked + 0.2)
        process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        assert process.poll() is None, "it drains"
        began = time.monotonic()
        process.send_signal(signal.SIGINT)
        _, output = process.communicate(timeout=30)
        assert time.monotonic() - began < 3
        request.join(timeout=60)
        reason = "npair: stopped with requests in flight (exit code -9)\n"
        assert (process.returncode, output) == (1, reason)
        assert failures != [None]


def failure(client: NpairClient, photos: list[bytes]) -> Exception | None:
    try:
        client.embed(photos)
    except NpairError as error:
        return error
    return None


def test_ctrl_c() -> None:
    with running() as (process, _):
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 0


def test_what_others_compute_beside_a_dead_stub_is_answered() -> None:
    photos = [encode(Image.new("RGB", (4100, 4100)), "PNG")] * 32
    with (
        running(DRAIN_SECONDS="30") as (process, urls),
        NpairClient(urls["http"], batch_size=32) as client,
    ):
        answers: list[int] = []
        request = threading.Thread(target=lambda: answers.append(len(client.embed(photos).vectors)))
        before = {stub: cpu_seconds(stub) for stub in stubs_of(process)}

        def busy() -> list[int]:
            return [stub for stub in before if cpu_seconds(stub) > before[stub] + 0.5]

        request.start()
        eventually(busy)
        os.kill(next(stub for stub in before if stub not in busy()), signal.SIGKILL)
        _, output = process.communicate(timeout=60)
        request.join(timeout=60)
        assert "npair: a Python stub of the model died" in output
        assert process.returncode == 1
        assert answers == [32]


def test_a_reader_that_has_stalled_does_not_hold_up_the_end(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writer, bytes(4096))
    os.set_blocking(writer, True)
    process = subprocess.Popen(
        [sys.executable, SERVE, f"--model-repository={tmp_path}"], stderr=writer
    )
    os.close(writer)
    try:
        assert process.wait(timeout=60) == 1
    finally:
        process.kill()
        os.close(reader)


def test_a_slow_reader_gets_all_lines() -> None:
    reader, writer = os.pipe()
    lines = [f"{number} " + "x" * 100_000 for number in range(5)]

    def write() -> None:
        with os.fdopen(writer, "w") as stream:
            handler = StderrHandler(stream)
            for line in lines:
                handler.emit(logging.makeLogRecord({"msg": line}))

    thread = threading.Thread(target=write)
    thread.start()
    with os.fdopen(reader) as read:
        time.sleep(0.5)
        assert read.read().splitlines() == lines
    thread.join()


def test_log_lines_that_cannot_be_written_do_not_end_the_server() -> None:
    """Simulate a full disk behind stderr."""
    ports = free_ports()
    url = f"http://127.0.0.1:{ports['HTTP_PORT']}"
    with Path("/dev/full").open("w") as full:
        process = subprocess.Popen(
            [sys.executable, SERVE, "--verbose"],
            env=os.environ | ports | {"NPAIR_CONTROL_SECRET": "s"},
            stderr=full,
        )
    try:
        with NpairClient(url) as client:
            eventually(client.ready)
            connection = http.client.HTTPConnection(url.removeprefix("http://"))
            connection.request(
                "POST", "/v2/logging", '{"log_verbose_level": 1}', {CONTROL_HEADER: "s"}
            )
            assert connection.getresponse().status == 200
            connection.close()
            end = time.monotonic() + 5
            while time.monotonic() < end:
                client.embed(SHIPPED / "golden/photo.jpg")
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 0
    finally:
        process.kill()
