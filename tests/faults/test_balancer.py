"""Restart or promote two servers behind HAProxy under load: no call fails or mixes versions.

    make test-faults
    CHANGES=20 CHANGES_TABLE=FILE .venv/bin/python -m pytest tests/faults/test_balancer.py

Needs Debian's haproxy. Like a Kubernetes Service, it balances TCP connections: a connection stays
with its server, and a server that fails its health check gets no new ones.

CHANGES: number of rolling restarts, and of promotions (2).
CHANGES_TABLE: file to write the results to, as the table in docs/releasing.md.
"""

from __future__ import annotations

import itertools
import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pytest
from support.servers import eventually, free_ports, lines_until_ready, start
from support.traffic import HEAD, NEWER, OLDER, change_under_load, expected_vectors, two_versions

from npair.client import Vectors
from npair.releasing.control import Server
from npair.releasing.release import promote
from npair.releasing.repository import open_repository

CHANGES = int(os.environ.get("CHANGES", "2"))
SECRET = "a-secret"
BALANCER = """
defaults
  mode tcp
  retries 0
  timeout connect 1s
  timeout client 1m
  timeout server 1m
  option httpchk GET /v2/models/npair/ready
  default-server check inter 500ms fall 1 rise 1

frontend stats
  mode http
  bind 127.0.0.1:{METRICS_PORT}
  stats enable
"""


@dataclass
class Replica:
    """A server that can be restarted on the same ports."""

    models: Path
    ports: dict[str, str] = field(default_factory=free_ports)

    def __post_init__(self) -> None:
        self.url = f"http://127.0.0.1:{self.ports['HTTP_PORT']}"

    def start(self) -> None:
        self.process = start(
            **self.ports,
            MODEL_REPOSITORY=str(self.models),
            NPAIR_CONTROL_SECRET=SECRET,
            DRAIN_SECONDS="30",  # whatever else this machine does
        )
        lines_until_ready(self.process)

    def stop(self) -> None:
        self.process.terminate()
        _, log = self.process.communicate(timeout=60)
        assert self.process.returncode == 0, f"accepted requests were not answered:\n{log}"


@dataclass
class Fleet:
    """Two replicas of one repository behind a balancer.

    urls: the balancer's, by protocol. stats: the port of its statistics page.
    """

    repository: Path
    replicas: list[Replica]
    urls: dict[str, str]
    stats: str
    versions: Iterator[int] = field(default_factory=lambda: itertools.cycle([NEWER, OLDER]))

    def balanced(self) -> bool:
        """Return whether all replicas get new connections over both protocols."""
        with socket.create_connection(("127.0.0.1", int(self.stats))) as connection:
            connection.sendall(b"GET /haproxy?stats;csv HTTP/1.0\r\n\r\n")
            page = b"".join(iter(lambda: connection.recv(1 << 16), b"")).decode()
        return len(re.findall(r"^\w+_PORT,\d,.*,UP,", page, re.MULTILINE)) == len(self.urls) * len(
            self.replicas
        )

    def restart(self) -> None:
        """Restart the replicas in turn; wait until each gets connections again."""
        promote(open_repository(self.repository), next(self.versions), [])
        for replica in self.replicas:
            replica.stop()
            replica.start()
            eventually(self.balanced)

    def promote(self) -> None:
        servers = [Server(replica.url, "npair", secret=SECRET) for replica in self.replicas]
        promote(open_repository(self.repository), next(self.versions), servers)


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    haproxy = shutil.which("haproxy", path="/usr/sbin:/usr/bin:/usr/local/sbin:/usr/local/bin")
    if haproxy is None:
        pytest.fail("these tests need haproxy: apt-get install --no-install-recommends haproxy")
    folder = tmp_path_factory.mktemp("fleet")
    repository = two_versions(folder / "models")
    replicas, ports = [Replica(folder / "models") for _ in range(2)], free_ports()
    configuration = BALANCER.format(**ports)
    for name in ("HTTP_PORT", "GRPC_PORT"):
        configuration += f"\nlisten {name}\n  bind 127.0.0.1:{ports[name]}\n"
        for number, replica in enumerate(replicas):
            configuration += (
                f"  server {number} 127.0.0.1:{replica.ports[name]} "
                f"port {replica.ports['HTTP_PORT']}\n"
            )
    (folder / "haproxy.cfg").write_text(configuration)
    urls = {
        "http": f"http://127.0.0.1:{ports['HTTP_PORT']}",
        "grpc": f"grpc://127.0.0.1:{ports['GRPC_PORT']}",
    }
    fleet = Fleet(repository, replicas, urls, ports["METRICS_PORT"])
    with ExitStack() as running:
        for replica in replicas:
            replica.start()
            running.callback(replica.stop)
        balancer = subprocess.Popen([haproxy, "-q", "-db", "-f", folder / "haproxy.cfg"])
        running.callback(balancer.wait, 30)
        running.callback(balancer.kill)
        time.sleep(0.5)
        assert balancer.poll() is None, "haproxy did not start"
        eventually(fleet.balanced)
        yield fleet


@pytest.fixture(scope="module")
def expected(fleet: Fleet) -> dict[str, Vectors]:
    return expected_vectors(fleet.urls["http"])


@pytest.fixture(scope="module")
def rows() -> Iterator[list[str]]:
    """The rows of the table of results."""
    rows = [*HEAD]
    yield rows
    if path := os.environ.get("CHANGES_TABLE"):
        Path(path).write_text("\n".join(rows) + "\n")


@pytest.mark.parametrize(
    ("name", "change"), [("rolling restart", Fleet.restart), ("promotion", Fleet.promote)]
)
def test_no_call_fails(
    fleet: Fleet,
    expected: dict[str, Vectors],
    rows: list[str],
    name: str,
    change: Callable[[Fleet], None],
) -> None:
    change_under_load(
        name, partial(change, fleet), CHANGES, urls=fleet.urls, expected=expected, rows=rows
    )
