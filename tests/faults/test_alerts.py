"""Cause each alert: Debian's Prometheus scrapes a real server with this repository's configuration.

Only the durations in the configuration and the rules are shortened.

    make test-faults

Needs Prometheus: apt-get install --no-install-recommends prometheus
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
from PIL import Image
from support.models import BREAKS, ROOT, SHIPPED
from support.servers import free_ports
from support.service import Service, broken_models, until

from npair.client import NpairClient, NpairError
from npair.publishing.drawings import encode

SHORTENED = {"15s": "1s", "1m": "3s", "5m": "10s", "30m": "90s", "1h": "10s", "1d": "20s"}
RULES = (ROOT / "monitoring/alerts.yml").read_text()
ALERTS = re.findall(r"alert: (\w+)", RULES)
PHOTOS = [
    path.read_bytes() for path in sorted((SHIPPED / "golden").iterdir()) if path.suffix != ".npy"
]


def shortened(text: str) -> str:
    return re.sub(r"(?<=[\[ ])(\d+[smhd])(?=[\]\n)])", lambda found: SHORTENED[found[1]], text)


class World(Service):
    """A server that is restarted when it ends, like a container, and its Prometheus."""

    def __enter__(self) -> World:
        self.start()
        self.prometheus = f"http://127.0.0.1:{free_ports()['HTTP_PORT']}"
        (self.folder / "alerts.yml").write_text(shortened(RULES))
        settings = shortened((ROOT / "monitoring/prometheus.yml").read_text())
        (self.folder / "prometheus.yml").write_text(
            settings.replace("model_api:8002", f"127.0.0.1:{self.ports['METRICS_PORT']}")
        )
        self.monitor = subprocess.Popen(
            [
                "prometheus",
                f"--config.file={self.folder}/prometheus.yml",
                f"--storage.tsdb.path={self.folder}/data",
                f"--web.listen-address={self.prometheus.removeprefix('http://')}",
            ],
            stderr=subprocess.DEVNULL,
        )
        until(self.scraped, "Prometheus does not read the server's metrics")
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self.monitor.terminate()
        self.monitor.wait(timeout=30)

    def asked(self, what: str) -> Any:
        return json.load(urlopen(f"{self.prometheus}/api/v1/{what}", timeout=10))["data"]

    def scraped(self) -> bool:
        with contextlib.suppress(OSError):
            return any(
                series["value"][1] == "1" for series in self.asked("query?query=up")["result"]
            )
        return False

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
    def sending(self, photos: list[bytes], clients: int = 1, pause: float = 0.0) -> Iterator[None]:
        """Request these photos from this many clients until the block ends; ignore errors.

        pause: seconds between two requests of a client.
        """
        done = threading.Event()

        def client() -> None:
            with NpairClient(self.urls["http"], retries=0, batch_size=64) as connection:
                while not done.wait(pause):
                    with contextlib.suppress(NpairError):
                        connection._infer(photos, None, 0)

        threads = [threading.Thread(target=client) for _ in range(clients)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            done.set()
            for thread in threads:
                thread.join()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """Serve the shipped network with the current code, made to fail on one photo."""
    if not shutil.which("prometheus"):
        pytest.fail("Prometheus is missing: apt-get install --no-install-recommends prometheus")
    folder = tmp_path_factory.mktemp("alerts")
    with World(folder, environment={"MODEL_REPOSITORY": str(broken_models(folder))}) as world:
        yield world


def changed(world: World) -> None:
    """Send empty photos a (shortened) day after the traffic of the test that causes no alert."""
    empty = encode(Image.new("RGB", (300, 300), "white"), "JPEG")
    with world.sending([empty] * 8):
        world.fires("NpairPhotosChanged", 40)


def refused(world: World) -> None:
    """Send many bad photos in few requests."""
    with world.sending(PHOTOS, pause=0.05), world.sending([b"no photo"] * 64, pause=0.5):
        world.fires("NpairPhotosRefused", 40)
        assert "NpairRequestsFail" not in world.firing()


def failing(world: World) -> None:
    with world.sending([BREAKS], pause=0.2):
        world.fires("NpairRequestsFail", 40)


def queued(world: World) -> None:
    with world.sending(PHOTOS * 8, clients=8):
        world.fires("NpairQueueGrows", 40)
        assert "NpairQueueFull" not in world.firing()


def turned_away(world: World) -> None:
    with world.sending(PHOTOS, clients=250, pause=0.2):
        world.fires("NpairQueueFull", 40)


def killed(world: World) -> None:
    def kill() -> None:
        ended = len(world.codes)
        os.kill(world.stubs[0], 9)
        until(
            lambda: world.codes[ended:] == [1],
            "the server keeps running without its stub",
            world.log.read_text,
        )
        until(world.ready, "the server did not start", world.log.read_text)
        time.sleep(2)

    kill()
    kill()
    world.fires("NpairRestarts", 20)


def unserved(world: World) -> None:
    """Delete the version, then kill the server, which would keep serving it from memory."""
    shutil.rmtree(Path(world.environment["MODEL_REPOSITORY"]) / "npair" / SHIPPED.name)
    os.kill(world.server, 9)
    world.fires("NpairDown", 40)


CAUSES: dict[str, Callable[[World], None]] = {
    "NpairPhotosChanged": changed,
    "NpairPhotosRefused": refused,
    "NpairRequestsFail": failing,
    "NpairQueueGrows": queued,
    "NpairQueueFull": turned_away,
    "NpairRestarts": killed,
    "NpairDown": unserved,
}


def test_silent_while_all_is_well(world: World) -> None:
    """Watch for as long as the longest window and offset."""
    with world.sending(PHOTOS, pause=0.05):
        for _ in range(35):
            time.sleep(1)
            assert world.firing() == set()


@pytest.mark.parametrize("alert", CAUSES)
def test_fires_when_caused_and_not_before(world: World, alert: str) -> None:
    """Use the shared server for one alert after another, in order of the damage that they need."""
    assert alert not in world.firing()
    CAUSES[alert](world)


def test_every_alert_is_caused() -> None:
    assert set(CAUSES) == set(ALERTS)
