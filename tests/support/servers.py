"""Start, await and stop real servers."""

from __future__ import annotations

import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

from npair.releasing.control import Server
from support import releases
from support.models import ROOT

PORTS = ("HTTP_PORT", "GRPC_PORT", "METRICS_PORT")


def eventually(true: Callable[[], object], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def free_ports(names: Sequence[str] = PORTS) -> dict[str, str]:
    """Choose ports below the ephemeral range and outside the ranges of the other xdist workers.

    No other process should take them before a server starts.
    """
    ports: dict[str, str] = {}
    lowest = 15_000 + 4_000 * (int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:]) % 4)
    with ExitStack() as listeners:
        while len(ports) < len(names):
            port = random.randrange(lowest, lowest + 4_000)
            with suppress(OSError):
                listeners.enter_context(socket.create_server(("127.0.0.1", port)))
                ports[names[len(ports)]] = str(port)
    return ports


def start(*options: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, ROOT / "model/api/serve.py", *options],
        env=os.environ | environment,
        stderr=subprocess.PIPE,
        text=True,
    )


def lines_until_ready(process: subprocess.Popen[str]) -> list[str]:
    """Read a starting server's stderr up to "ready after"; fail the test if it ends first."""
    assert process.stderr is not None
    lines = []
    while line := process.stderr.readline():
        lines.append(line)
        if "ready after" in line:
            return lines
    pytest.fail("the server did not start:\n" + "".join(lines))


@contextmanager
def running(**environment: str) -> Iterator[tuple[subprocess.Popen[str], dict[str, str]]]:
    """Run a server; yield its process and its URLs by protocol once it is ready."""
    ports = free_ports()
    process = start(**ports, **environment)
    try:
        lines = [line for line in lines_until_ready(process) if "this CPU has none of" not in line]
        assert len(lines) == 1, f"expected the ready line only: {lines}"
        yield (
            process,
            {
                "http": f"http://127.0.0.1:{ports['HTTP_PORT']}",
                "grpc": f"grpc://127.0.0.1:{ports['GRPC_PORT']}",
            },
        )
    finally:
        unnoticed = process.returncode is None  # no test has waited for its end
        ended = process.poll()
        process.terminate()
        process.wait(timeout=30)
        if unnoticed and ended is not None:
            assert process.stderr is not None
            pytest.fail(
                f"the server ended by itself with exit code {ended}:\n{process.stderr.read()}"
            )


@contextmanager
def controlled(models: Path) -> Iterator[tuple[Server, dict[str, str]]]:
    """Serve a model's folder; yield the server's control API and its URLs by protocol."""
    with running(MODEL_REPOSITORY=str(models.parent), NPAIR_CONTROL_SECRET=releases.SECRET) as (
        _,
        urls,
    ):
        yield Server(urls["http"], "npair", secret=releases.SECRET, timeout=60), urls
