"""Prometheus and Alertmanager, with this repository's configuration and shorter durations."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlencode
from urllib.request import urlopen

import pytest

from support.models import ROOT
from support.servers import free_ports

MONITORING = ROOT / "monitoring"
SHORTENED = {
    "15s": "1s",
    "30s": "3s",
    "1m": "10s",  # Prometheus starts to scrape after 5 s, until when no server is there
    "5m": "10s",
    "10m": "10s",
    "30m": "90s",
    "1h": "10s",
    "12h": "90s",
    "1d": "20s",
}
RULES = (MONITORING / "alerts.yml").read_text()


def shortened(text: str) -> str:
    return re.sub(r"(?<=[\[ ])(\d+[smhd])(?=[\]\n)])", lambda found: SHORTENED[found[1]], text)


class Prometheus:
    """Reads metrics from targets. alertmanager: an address. Addresses and targets: HOST:PORT."""

    def __init__(self, folder: Path, targets: Sequence[str], alertmanager: str = "") -> None:
        self.address = f"127.0.0.1:{free_ports()['HTTP_PORT']}"
        (folder / "alerts.yml").write_text(shortened(RULES))
        settings = shortened((MONITORING / "prometheus.yml").read_text())
        for name, addresses in (("model_api:8002", targets), ("alertmanager:9093", [alertmanager])):
            settings = settings.replace(f'["{name}"]', json.dumps([*filter(None, addresses)]))
        (folder / "prometheus.yml").write_text(settings)
        self.command = [
            "prometheus",
            f"--config.file={folder}/prometheus.yml",
            f"--storage.tsdb.path={folder}/data",
            f"--web.listen-address={self.address}",
        ]

    @contextlib.contextmanager
    def running(self) -> Iterator[Prometheus]:
        with started(self.command, self.address):
            yield self

    def asked(self, what: str, **parameters: str) -> Any:
        url = f"http://{self.address}/api/v1/{what}?{urlencode(parameters)}"
        return json.load(urlopen(url, timeout=10))["data"]

    def query(self, expression: str) -> list[dict[str, Any]]:
        """Evaluate PromQL now. Returns: the vector. Raises: HTTPError if it is not valid."""
        found: list[dict[str, Any]] = self.asked("query", query=expression)["result"]
        return found

    def firing(self) -> set[str]:
        return {
            alert["labels"]["alertname"]
            for alert in self.asked("alerts")["alerts"]
            if alert["state"] == "firing"
        }

    def fires(self, name: str, within: float) -> None:
        deadline = time.monotonic() + within
        while name not in self.firing():
            assert time.monotonic() < deadline, f"{name} does not fire, but {self.firing()}"
            time.sleep(0.2)


@contextlib.contextmanager
def alertmanager(folder: Path, webhook: str) -> Iterator[str]:
    """Run an Alertmanager that posts to this URL. Yields: its address."""
    address = f"127.0.0.1:{free_ports()['HTTP_PORT']}"
    (folder / "webhook").write_text(webhook)
    settings = shortened((MONITORING / "alertmanager.yml").read_text())
    secret = "/run/secrets/alert_webhook"
    assert secret in settings
    (folder / "alertmanager.yml").write_text(settings.replace(secret, f"{folder}/webhook"))
    command = [
        "prometheus-alertmanager",
        f"--config.file={folder}/alertmanager.yml",
        f"--storage.path={folder}/alertmanager",
        "--cluster.listen-address=",
        f"--web.listen-address={address}",
    ]
    with started(command, address):
        yield address


@contextlib.contextmanager
def started(command: Sequence[str], address: str) -> Iterator[None]:
    """Run one of the two until the block ends, once it is ready."""
    if not shutil.which(command[0]):
        pytest.fail(f"apt-get install --no-install-recommends {command[0]}")
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        for _ in range(200):
            with contextlib.suppress(OSError):
                urlopen(f"http://{address}/-/ready", timeout=10).close()
                break
            time.sleep(0.1)
        else:
            pytest.fail(f"{command[0]} does not start")
        yield
    finally:
        process.terminate()
        process.wait(timeout=30)


@contextlib.contextmanager
def webhook() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Take what is posted, as a chat does. Yields: the URL, and the messages as they come."""
    messages: list[dict[str, Any]] = []

    class Chat(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            messages.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Chat) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/services/secret", messages
        server.shutdown()
