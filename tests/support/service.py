"""A real server whose processes tests may kill or stop."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from observing import prepared
from supervisor import procfs

from npair.client import NpairClient
from support.models import ROOT, SHIPPED, let_fail
from support.servers import free_ports

RECOVERY = 60.0  # seconds that a server has to recover


@dataclass
class Service:
    """Runs serve.py and restarts it whenever it ends, like ``restart: unless-stopped``.

    wrapped: a command that runs serve.py, as a prefix. codes: the exit codes so far.
    """

    folder: Path
    wrapped: Sequence[str] = ()
    environment: dict[str, str] = field(default_factory=dict)
    codes: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.ports, self.log = free_ports(), self.folder / "log"
        self.urls = {
            "http": f"http://127.0.0.1:{self.ports['HTTP_PORT']}",
            "grpc": f"grpc://127.0.0.1:{self.ports['GRPC_PORT']}",
        }

    def __enter__(self) -> Service:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        self.stopping = threading.Event()
        self.keeper = threading.Thread(target=self._keep)
        self.keeper.start()
        try:
            until(self.ready, "the server did not start", self.log.read_text)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Stop serve.py and do not restart it."""
        self.stopping.set()
        self.process.terminate()
        self.keeper.join(30)

    def _keep(self) -> None:
        while not self.stopping.is_set():
            with self.log.open("a") as log:
                self.process = subprocess.Popen(
                    [*self.wrapped, sys.executable, ROOT / "model/api/serve.py"],
                    env=os.environ | self.ports | self.environment,
                    stderr=log,
                )
                self.codes.append(self.process.wait())

    def ready(self) -> bool:
        with NpairClient(self.urls["http"], timeout=2) as client:
            return client.ready()

    def healthy(self) -> bool:
        command: list[str | Path] = [sys.executable, ROOT / "model/api/serve.py", "--health"]
        return (
            subprocess.run(
                command, env=os.environ | self.ports, check=False, capture_output=True
            ).returncode
            == 0
        )

    @property
    def server(self) -> int:
        server = procfs.server_at(int(self.ports["HTTP_PORT"]))
        assert server
        return server

    @property
    def stubs(self) -> list[int]:
        return procfs.children(self.server)


def broken_models(folder: Path) -> Path:
    """Write a model repository of the shipped network and the current code, broken by let_fail."""
    models = prepared(folder / "models", "")
    let_fail(models / "npair" / SHIPPED.name)
    return models


def until(condition: Callable[[], bool], what: str, more: Callable[[], str] = str) -> None:
    deadline = time.monotonic() + RECOVERY
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"{what}\n{more()}")
        time.sleep(0.1)
