"""Cause faults on a real server under load; measure errors, lost requests and recovery time.

    make test-faults

Needs root (mount namespaces, a memory control group) and Debian's faketime.

FAULTS_SECONDS: how long to keep up the load before and after each fault (3).
FAULTS_TABLE: file to write the results to, as the table in docs/reliability.md.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import pytest
from machine import descendants
from supervisor import procfs
from support.clients import Clients
from support.models import HANGS, ROOT
from support.service import Service, broken_models, until

from npair.client import (
    NpairClient,
    NpairError,
    RequestTimeoutError,
    ServerFaultError,
    UnavailableError,
)
from npair.publishing.drawings import draw, encode

SECONDS = float(os.environ.get("FAULTS_SECONDS", "3"))
TIMEOUT = 20.0  # seconds that a client waits for an answer; no request may reach this limit
REFUSED = "has no available versions"  # Triton's answer to a request that it did not accept
PHOTOS = [encode(draw(product, 0, 200), "JPEG") for product in range(16)]
LARGE = encode(draw(0, 0, 6000), "PNG")  # 36 megapixels, 108 MB when decoded


@dataclass(frozen=True)
class Answer:
    """When a request was sent and ended, in seconds of the monotonic clock, and its error."""

    sent: float
    ended: float
    error: str = ""


class Traffic(Clients):
    """Clients that request one or eight photos over both protocols, without pause or retries.

    Every vector is compared with the server's earlier answer for the same photo.
    """

    def __init__(self, urls: dict[str, str]) -> None:
        self.answers: list[Answer] = []
        with NpairClient(urls["http"]) as client:
            self.expected = np.stack([client.embed(photo).vectors[0] for photo in PHOTOS])
        loads = [(url, size) for url in urls.values() for size in (1, 1, 8)]
        super().__init__(*(partial(self._ask, *load, seed) for seed, load in enumerate(loads)))

    def _ask(self, url: str, size: int, seed: int, stopping: threading.Event) -> None:
        draws = np.random.default_rng(seed)
        with NpairClient(url, retries=0, timeout=TIMEOUT) as client:
            while not stopping.is_set():
                chosen, sent, error = draws.integers(len(PHOTOS), size=size), time.monotonic(), ""
                try:
                    vectors = client.embed([PHOTOS[index] for index in chosen]).vectors
                    if (vectors * self.expected[chosen]).sum(1).min() < 0.999:
                        error = "wrong vectors"
                except NpairError as failure:
                    error = f"{type(failure).__name__}: {failure}"
                self.answers.append(Answer(sent, time.monotonic(), error))
                if error:
                    time.sleep(0.05)

    def well(self) -> bool:
        """Return whether there was an answer per client in the last second, and no error."""
        last = [answer for answer in self.answers if answer.ended > time.monotonic() - 1]
        return len(last) >= len(self.threads) and not any(answer.error for answer in last)


@dataclass(frozen=True)
class Outcome:
    """The effect of a fault on the requests that ended after it.

    asked: number of requests. lost: failed requests that were sent before the fault. refused:
    failed requests that were sent later or not accepted. silent: requests without an answer. back:
    seconds from the fault to the last failure. unhealthy, healthy: seconds from the fault until
    serve.py --health reported it, and until it reported the recovery.
    """

    asked: int
    lost: int
    refused: int
    silent: int
    back: float
    errors: Counter[str]
    unhealthy: float | None = None
    healthy: float | None = None

    def row(self, fault: str, seen: str) -> str:
        back = f"{self.back:.1f} s" if self.errors else "never away"
        health = (
            "true"
            if self.unhealthy is None
            else f"false after {self.unhealthy:.1f} s, true after {self.healthy:.1f} s"
        )
        return (
            f"| {fault} | {seen} | {back} | {health} "
            f"| {self.asked:,} | {self.lost} | {self.refused:,} | {self.silent} |"
        )


HEAD = (
    "| fault | what clients see | all well again after | health probe "
    "| asked | lost | refused | silent |",
    "| --- | --- | ---: | --- | ---: | ---: | ---: | ---: |",
)


@pytest.fixture(scope="module")
def table(pytestconfig: pytest.Config) -> Iterator[list[str]]:
    rows: list[str] = [*HEAD]
    yield rows
    text = "\n".join(rows) + "\n"
    if path := os.environ.get("FAULTS_TABLE"):
        Path(path).write_text(text)
    with pytestconfig.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print(f"\n\n{text}")


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """The server for all faults that need no environment of their own."""
    with Service(tmp_path_factory.mktemp("service")) as running:
        yield running


def cause(service: Service, fault: Callable[[], object], *, code: int | None = None) -> Outcome:
    """Cause a fault under load and wait for the recovery.

    code: exit code of serve.py, or None if it keeps running.
    """
    told: list[tuple[float, bool]] = []  # time and result of each probe
    with Traffic(service.urls) as traffic:
        until(traffic.well, "clients get no answers", service.log.read_text)
        time.sleep(SECONDS)
        at, ended = time.monotonic(), len(service.codes)

        def watch(stopping: threading.Event) -> None:
            while not stopping.wait(0.5):
                told.append((time.monotonic() - at, service.healthy()))

        with Clients(watch):
            fault()
            if code is not None:
                until(
                    lambda: service.codes[ended:] == [code],
                    "serve.py keeps running",
                    service.log.read_text,
                )
            time.sleep(SECONDS)
            until(traffic.well, "clients did not recover", service.log.read_text)
            settled = time.monotonic() - at
            until(
                lambda: bool(told) and told[-1][0] > settled and told[-1][1],
                "the probe does not report the recovery",
            )
    result = outcome(traffic.answers, at)
    if code is None:
        assert all(well for _, well in told)
        return result
    unhealthy = next(when for when, well in told if not well)
    healthy = next(when for when, well in told if well and when > result.back)
    assert healthy < result.back + 10
    return replace(result, unhealthy=unhealthy, healthy=healthy)


def outcome(answers: Sequence[Answer], at: float) -> Outcome:
    after = [answer for answer in answers if answer.ended >= at]
    failed = [answer for answer in after if answer.error]
    assert not [answer for answer in answers if answer.error and answer.ended < at], (
        "requests failed before the fault"
    )
    assert not [answer for answer in answers if answer.error == "wrong vectors"]
    silent = [answer for answer in failed if answer.error.startswith(RequestTimeoutError.__name__)]
    lost = [
        answer
        for answer in failed
        if answer.sent < at and answer not in silent and REFUSED not in answer.error
    ]
    return Outcome(
        len(after),
        len(lost),
        len(failed) - len(lost) - len(silent),
        len(silent),
        max((answer.ended for answer in failed), default=at) - at,
        Counter(answer.error for answer in failed),
    )


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


def stop(pids: Sequence[int]) -> None:
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)


class TestKilled:
    """Killing a process loses the requests inside it; their clients get errors at once."""

    def test_stub(self, service: Service, table: list[str]) -> None:
        result = cause(service, lambda: kill(service.stubs[0]), code=1)
        table.append(
            result.row(
                "a Python stub is killed (-9)",
                "errors of requests inside it; then the server is restarted",
            )
        )
        assert result.errors
        assert not result.silent

    def test_server(self, service: Service, table: list[str]) -> None:
        result = cause(service, lambda: kill(service.server), code=1)
        table.append(result.row("the server is killed (-9)", "connections break off"))
        assert result.errors
        assert not result.silent

    def test_supervisor(self, service: Service, table: list[str]) -> None:
        """Triton has to end with serve.py: otherwise it would keep the ports."""
        result = cause(service, lambda: kill(service.process.pid), code=-signal.SIGKILL)
        table.append(result.row("serve.py is killed (-9)", "connections break off"))
        assert result.errors
        assert not result.silent


def test_all_stubs_hang(service: Service, table: list[str]) -> None:
    result = cause(service, lambda: stop(service.stubs), code=1)
    table.append(
        result.row(
            "all stubs hang (SIGSTOP)", "no answer for 10 to 15 s, then connections break off"
        )
    )
    assert "the golden photo has failed" in service.log.read_text()
    assert result.errors
    assert not result.silent


def test_one_stub_hangs(tmp_path: Path, table: list[str]) -> None:
    models = broken_models(tmp_path)
    with Service(tmp_path, environment={"MODEL_REPOSITORY": str(models)}) as service:

        def fault() -> None:
            with (
                NpairClient(service.urls["http"], retries=0, timeout=TIMEOUT) as client,
                # By whether Triton has noticed that the process is dead.
                pytest.raises((ServerFaultError, UnavailableError)),
            ):
                client.embed(HANGS)

        result = cause(service, fault, code=1)
        assert "a batch has made no progress for 10 s" in service.log.read_text()
    table.append(
        result.row(
            "one stub hangs",
            "no answer to requests inside it for 10 s, then errors; the server is restarted",
        )
    )
    assert result.errors
    assert not result.silent


@contextmanager
def memory_group(pid: int, room: int) -> Iterator[None]:
    """Move a process and its descendants to a control group that may allocate this many bytes."""
    root = Path("/sys/fs/cgroup")
    version_1 = (root / "memory").is_dir()
    group = root / (f"memory/npair-{pid}" if version_1 else f"npair-{pid}")
    limit = group / ("memory.limit_in_bytes" if version_1 else "memory.max")
    group.mkdir()
    try:
        for process in [pid, *descendants(pid)]:
            (group / "cgroup.procs").write_text(str(process))
        # Memory stays charged to the group that first touched it, so only new memory counts.
        limit.write_text(str(room))
        yield
        limit.write_text("-1" if version_1 else "max")
        for member in (group / "cgroup.procs").read_text().split():
            with suppress(ProcessLookupError):
                (group.parent / "cgroup.procs").write_text(member)
    finally:
        until(
            lambda: not (group / "cgroup.procs").read_text(),
            "the memory group still has processes",
        )
        group.rmdir()


class TestMemory:
    def test_no_room(self, tmp_path: Path, table: list[str]) -> None:
        """Exceed a container's memory limit: the kernel kills the process that does."""
        with Service(tmp_path) as service:
            group = ExitStack()

            def fault() -> None:
                group.enter_context(memory_group(service.process.pid, 64 << 20))
                with (
                    NpairClient(service.urls["http"], retries=0, timeout=TIMEOUT) as client,
                    pytest.raises(NpairError),
                ):
                    client.embed([LARGE] * 8)

            with group:
                result = cause(service, fault, code=1)
        table.append(result.row("out of memory: the kernel kills a stub", "as with a killed stub"))
        assert result.errors
        assert not result.silent


def with_mounts(mounts: str) -> list[str]:
    """Return a command prefix that mounts in a private namespace, then runs the command."""
    return [
        "unshare",
        "--mount",
        "--propagation",
        "private",
        "sh",
        "-c",
        f'{mounts} && exec "$@"',
        "sh",
    ]


class TestDisk:
    @pytest.mark.parametrize("folder", ["/dev/shm", "/tmp"])
    def test_full(
        self, tmp_path_factory: pytest.TempPathFactory, table: list[str], folder: str
    ) -> None:
        # Keep the checkout visible if it lies below the folder.
        small = with_mounts(
            f"mount --bind {ROOT} /mnt && mount -t tmpfs -o size=64m,mode=1777 tmpfs {folder} "
            f"&& mkdir -p {ROOT} && mount --move /mnt {ROOT}"
        )
        with Service(tmp_path_factory.mktemp("full"), small) as service:
            there = Path(f"/proc/{service.process.pid}/root{folder}/filler")

            def fault() -> None:
                with suppress(OSError), there.open("wb", buffering=0) as filler:
                    while True:
                        filler.write(bytes(1 << 20))
                assert not os.statvfs(there.parent).f_bavail
                time.sleep(SECONDS)
                there.unlink()

            result = cause(service, fault)
        table.append(result.row(f"{folder} is full", "nothing"))
        assert not result.errors

    def test_read_only(self, tmp_path: Path, table: list[str]) -> None:
        models = shutil.copytree(ROOT / "model_repository", tmp_path / "models")
        mounts = f"mount --bind {models} {models} && mount -o remount,bind,ro {models}"
        with Service(tmp_path, with_mounts(mounts), {"MODEL_REPOSITORY": str(models)}) as service:
            result = cause(service, lambda: None)
        table.append(result.row("the repository is read-only", "nothing"))
        assert not result.errors


class TestClients:
    """Misbehaving clients do not affect the others."""

    def connections(self, service: Service, send: bytes, number: int) -> list[socket.socket]:
        made = []
        for _ in range(number):
            made.append(socket.create_connection(("127.0.0.1", int(service.ports["HTTP_PORT"]))))
            made[-1].sendall(send)
        return made

    def request(self, length: int) -> bytes:
        lines = (
            "POST /v2/models/npair/infer HTTP/1.1",
            "Host: a",
            "Inference-Header-Content-Length: 0",
            f"Content-Length: {length}",
        )
        return "\r\n".join([*lines, "", ""]).encode()

    def test_slow_and_half_open(self, service: Service, table: list[str]) -> None:
        photo = PHOTOS[0]
        held = []

        def fault() -> None:
            held.extend(
                self.connections(service, b"POST /v2/models/npair/infer HTTP/1.1\r\nHost:", 200)
            )
            held.extend(
                self.connections(service, self.request(len(photo)) + photo[: len(photo) // 2], 200)
            )

        result = cause(service, fault)
        slow = held[-1]
        slow.sendall(photo[len(photo) // 2 :])
        assert slow.recv(100).startswith(b"HTTP/1.1 200"), (
            "the server does not wait for slow clients"
        )
        for connection in held:
            connection.close()
        table.append(result.row("400 clients that send half a request and wait", "nothing"))
        assert not result.errors

    def test_vanishing(self, service: Service, table: list[str]) -> None:
        photo = PHOTOS[0]

        def fault() -> None:
            for length in (0, len(photo) // 2, len(photo)):
                for connection in self.connections(
                    service, self.request(len(photo)) + photo[:length], 100
                ):
                    connection.close()

        result = cause(service, fault)
        table.append(result.row("300 clients that vanish within a request", "nothing"))
        assert not result.errors
        until(
            lambda: sockets(service.server) < 50,
            "the server keeps connections of vanished clients",
        )


def sockets(pid: int) -> int:
    return sum(link.is_socket() for link in Path(f"/proc/{pid}/fd").iterdir())


def test_flood(service: Service, table: list[str]) -> None:
    """Send three times as many requests as may wait: the excess is refused."""
    answers: list[Answer] = []

    def ask(stopping: threading.Event) -> None:
        with NpairClient(service.urls["http"], retries=0, timeout=TIMEOUT) as client:
            while not stopping.is_set():
                sent, error = time.monotonic(), ""
                try:
                    client.embed(PHOTOS[0])
                except UnavailableError as failure:
                    error = str(failure)
                    time.sleep(0.05)
                answers.append(Answer(sent, time.monotonic(), error))

    process = service.process.pid
    with Clients(*[ask] * 400):
        time.sleep(max(SECONDS, 3))
        healthy = service.healthy()
    refused = [answer for answer in answers if answer.error]
    waited = [
        median(answer.ended - answer.sent for answer in some)
        for some in (refused, [a for a in answers if not a.error])
    ]
    seen = (
        f"{waited[0] * 1e3:.0f} ms until a refusal and {waited[1] * 1e3:.0f} ms until an answer, "
        "medians"
    )
    table.append(
        Outcome(len(answers), 0, len(refused), 0, 0, Counter()).row("400 clients at once", seen)
    )
    assert {answer.error for answer in refused} == {"more than 128 requests wait; try again later"}
    assert healthy
    assert service.process.pid == process


def test_stop(tmp_path: Path, table: list[str]) -> None:
    """SIGTERM under load: accepted requests are answered, later connections are refused."""
    with Service(tmp_path) as service, Traffic(service.urls) as traffic:
        until(traffic.well, "clients get no answers")
        time.sleep(SECONDS)
        at = time.monotonic()
        service.stop()
        took = time.monotonic() - at
    result = outcome(traffic.answers, at)
    seen = (
        f"ended after {took:.1f} s with exit code {service.codes[-1]}; "
        "later connections are refused"
    )
    table.append(result.row("SIGTERM", seen))
    assert service.codes == [0], service.log.read_text() + str(result)
    assert not result.lost
    assert not result.silent


@pytest.mark.parametrize("jump", ["+1d", "-1d"])
def test_clock_jumps(tmp_path: Path, table: list[str], jump: str) -> None:
    """Let faketime move the wall clock of the server and its stubs, but not the monotonic clock."""
    library = next(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"), None)
    assert library, "apt-get install faketime"
    clock = tmp_path / "clock"
    clock.write_text("+0")
    environment = {
        "LD_PRELOAD": str(library),
        "FAKETIME_TIMESTAMP_FILE": str(clock),
        "FAKETIME_NO_CACHE": "1",
        "DONT_FAKE_MONOTONIC": "1",
    }
    with Service(
        tmp_path, ["env", *(f"{key}={value}" for key, value in environment.items())]
    ) as service:
        result = cause(service, lambda: clock.write_text(jump))
        port = int(service.ports["HTTP_PORT"])
    # Clean up here, since serve.py cannot: faketime rejects absolute times in the past.
    until(lambda: not procfs.server_at(port), "the server outlives serve.py")
    procfs.remove_remains(port)
    table.append(result.row(f"the clock jumps by {jump}", "nothing"))
    assert not result.errors
