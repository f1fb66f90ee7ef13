"""Refuse what waits beyond a limit, with a stand-in for Triton's metrics."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from support.servers import eventually

from npair.serving.overload import ADDRESS, CALM_INTERVAL, Overload

METRICS = """\
# TYPE nv_inference_pending_request_count gauge
nv_inference_pending_request_count{model="npair",version="7"} %d
nv_inference_pending_request_count{model="npair",version="77"} 9000
nv_inference_pending_request_count{model="other",version="7"} 9000
"""


class Metrics:
    """Answers with ``text``. looks: how often it was asked."""

    def __init__(self) -> None:
        self.looks = 0
        self.waiting(0)

    def waiting(self, requests: int) -> None:
        self.text = METRICS % requests

    @contextmanager
    def served(self, patch: pytest.MonkeyPatch) -> Iterator[None]:
        metrics = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                metrics.looks += 1
                self.send_response(200 if self.path == "/metrics" else 404)
                self.end_headers()
                self.wfile.write(metrics.text.encode())

            def log_message(self, *_: object) -> None:
                pass

        with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            patch.setenv(ADDRESS, f"127.0.0.1:{server.server_port}")
            yield
            server.shutdown()


@pytest.fixture
def metrics(monkeypatch: pytest.MonkeyPatch) -> Iterator[Metrics]:
    metrics = Metrics()
    with metrics.served(monkeypatch):
        yield metrics


@contextmanager
def overload(warnings: list[str] | None = None) -> Iterator[Overload]:
    """Of one of two instances, with a limit of 8."""
    said = [] if warnings is None else warnings
    overload = Overload("npair", "7", limit=8, instances=2, warn=said.append)
    try:
        yield overload
    finally:
        overload.close()
    assert not overload.thread.is_alive()
    assert warnings is not None or said == []


def test_half_of_the_limit_is_left(metrics: Metrics) -> None:
    """Of 23 that wait, 19 are refused, 10 of them by this instance."""
    metrics.waiting(23)
    with overload() as one:
        assert not one.refuses(1), "before it looked"
        eventually(lambda: one.excess)
        assert one.excess == 10
        metrics.waiting(4)
        assert [one.refuses(6), one.refuses(6), one.refuses(6)] == [True, True, False]


def test_up_to_the_limit_nothing_is_refused(metrics: Metrics) -> None:
    metrics.waiting(8)
    with overload() as one:
        one.refuses(1)
        eventually(lambda: metrics.looks > 3)
        assert not one.refuses(1)
        metrics.waiting(9)
        eventually(lambda: one.excess == 3)
        metrics.waiting(8)
        eventually(lambda: one.excess == 0)


def test_an_idle_instance_does_not_look(metrics: Metrics) -> None:
    """It looks after a batch, then for as long as requests wait, even without another batch."""
    with overload() as one:
        time.sleep(2 * CALM_INTERVAL)
        assert metrics.looks == 0
        metrics.waiting(1)
        one.refuses(1)
        eventually(lambda: metrics.looks > 3)
        metrics.waiting(0)
        time.sleep(2 * CALM_INTERVAL)
        looks = metrics.looks
        time.sleep(2 * CALM_INTERVAL)
        assert metrics.looks == looks


def test_without_the_number_nothing_is_refused(metrics: Metrics) -> None:
    """The reason is said once; a number that comes later counts."""
    metrics.text = "nv_inference_count 1\n"
    warnings: list[str] = []
    with overload(warnings) as one:
        assert not one.refuses(1)
        eventually(lambda: metrics.looks == 1)
        assert not one.refuses(1)
        eventually(lambda: metrics.looks == 2)
        metrics.waiting(20)
        one.refuses(1)
        eventually(lambda: one.excess)
    assert warnings == [
        "no request is refused, however many wait: "
        "the server's metrics lack nv_inference_pending_request_count"
    ]


@pytest.mark.parametrize(
    ("address", "reason"),
    [("", "NPAIR_METRICS_ADDRESS is not set"), ("127.0.0.1:9", "Connection refused")],
)
def test_without_metrics_nothing_is_refused(
    monkeypatch: pytest.MonkeyPatch, address: str, reason: str
) -> None:
    monkeypatch.setenv(ADDRESS, address)
    warnings: list[str] = []
    with overload(warnings) as one:
        one.refuses(1)
        eventually(lambda: warnings)
        one.refuses(1)
        time.sleep(2 * CALM_INTERVAL)
        assert not one.refuses(1)
    assert len(warnings) == 1
    assert reason in warnings[0]
