"""Cause each alert: Debian's Prometheus scrapes a real server with this repository's configuration.

Only the durations in the configuration and the rules are shortened.

    make test-faults

Needs Prometheus: apt-get install --no-install-recommends prometheus
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from PIL import Image
from support.clients import Clients
from support.models import BREAKS, SHIPPED
from support.monitors import RULES, Prometheus
from support.service import Service, broken_models, until

from npair.client import NpairClient, NpairError
from npair.publishing.drawings import encode

ALERTS = re.findall(r"alert: (\w+)", RULES)
PHOTOS = [
    path.read_bytes() for path in sorted((SHIPPED / "golden").iterdir()) if path.suffix != ".npy"
]


class World(Service):
    """A server that is restarted when it ends, like a container, and its Prometheus."""

    monitor: Prometheus

    def firing(self) -> set[str]:
        return self.monitor.firing()

    def fires(self, name: str, within: float) -> None:
        self.monitor.fires(name, within)

    def sending(self, photos: list[bytes], clients: int = 1, pause: float = 0.0) -> Clients:
        """Request these photos from this many clients during a block; ignore errors.

        pause: seconds between two requests of a client.
        """

        def client(stopping: threading.Event) -> None:
            with NpairClient(self.urls["http"], retries=0, batch_size=64) as connection:
                while not stopping.wait(pause):
                    with contextlib.suppress(NpairError):
                        connection._infer(photos, None, 0)

        return Clients(*[client] * clients)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """Serve the shipped network with the current code, made to fail on one photo."""
    folder = tmp_path_factory.mktemp("alerts")
    world = World(folder, environment={"MODEL_REPOSITORY": str(broken_models(folder))})
    prometheus = Prometheus(folder, [f"127.0.0.1:{world.ports['METRICS_PORT']}"])
    with world, prometheus.running() as world.monitor:
        until(
            lambda: [sample["value"][1] for sample in world.monitor.query("up")] == ["1"],
            "Prometheus does not read the server's metrics",
        )
        yield world


def changed(world: World) -> None:
    """Send grey photos a (shortened) day after the traffic of the test that causes no alert."""
    grey = encode(Image.new("RGB", (300, 300), "grey"), "JPEG")
    with world.sending([grey] * 8):
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


def slow(world: World) -> None:
    """Have the server, which has just started, decode photos that take long, in all instances."""
    large = encode(Image.new("RGB", (7000, 7000), "white"), "PNG")
    with world.sending([large] * 3, clients=2):
        world.fires("NpairSlow", 60)


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
    "NpairSlow": slow,
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
