"""Check a version's own metrics on a real server."""

from __future__ import annotations

import base64
import concurrent.futures
import contextlib
import json
import re
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import numpy as np
import pytest
from PIL import Image
from soak import shared
from support.clients import Clients
from support.jpegs import many_scans
from support.servers import eventually, free_ports, lines_until_ready, start
from support.supervised import health

from npair.client import InvalidPhotoError, NpairClient, UnavailableError
from npair.publishing.drawings import draw, encode
from npair.releasing.config import with_release
from npair.releasing.control import Server
from npair.serving.embedder import UNLIMITED, Embedder
from npair.serving.jpeg import MAX_SCANS
from npair.serving.preprocess import decode
from npair.serving.refusal import REASONS

PHOTO = encode(draw(0, 0), "JPEG")
REFUSED = {
    "empty": b"",
    "too_many_bytes": b"\xff\xd8\xff" + bytes(100_000),
    "too_many_pixels": encode(Image.new("L", (1001, 1000)), "PNG"),
    "too_many_scans": many_scans(MAX_SCANS + 1),
    "not_an_image": b"no photo",
    "damaged": PHOTO[: len(PHOTO) // 2],
}


class Series(dict[tuple[str, frozenset[tuple[str, str]]], float]):
    """One reading of npair's own metrics.

    Golden photos are counted all the time, so compare values of a single reading only.
    """

    def total(self, name: str, **labels: str) -> float:
        return sum(
            value
            for (found, of), value in self.items()
            if found == name and set(labels.items()) <= of
        )

    def label_values(self, label: str) -> set[str]:
        return {value for _, labels in self for name, value in labels if name == label}


class Served:
    """A server and its metrics."""

    def __init__(self, models: Path, ports: dict[str, str]) -> None:
        self.models, self.url = models, f"http://127.0.0.1:{ports['HTTP_PORT']}"
        self.grpc = f"grpc://127.0.0.1:{ports['GRPC_PORT']}"
        self.metrics = f"http://127.0.0.1:{ports['METRICS_PORT']}/metrics"
        self.control = Server(self.url, "npair", secret="secret", timeout=60)

    def series(self) -> Series:
        lines = re.findall(
            r"^(npair_\w+)\{(.*)\} (\S+)$",
            urlopen(self.metrics, timeout=10).read().decode(),
            re.MULTILINE,
        )
        return Series(
            {
                (name, frozenset(re.findall(r'(\w+)="([^"]*)"', labels))): float(value)
                for name, labels, value in lines
            }
        )

    def serve(self, *versions: int) -> None:
        config = self.models / "npair/config.pbtxt"
        config.write_text(
            with_release(config.read_text(), versions, {"loaded": str(time.monotonic())})
        )
        self.control.load()


@contextlib.contextmanager
def serving(models: Path) -> Iterator[Served]:
    process = start(
        **(ports := free_ports()), MODEL_REPOSITORY=str(models), NPAIR_CONTROL_SECRET="secret"
    )
    try:
        lines_until_ready(process)
        yield Served(models, ports)
        assert process.poll() is None
    finally:
        process.terminate()
        process.wait(timeout=30)


@pytest.fixture(scope="module")
def served(published: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Serve the first of two versions, with low limits."""
    models = tmp_path_factory.mktemp("observed")
    shutil.copytree(published, models / "npair")
    shutil.copytree(published / "1", models / "npair/2")
    config = models / "npair/config.pbtxt"
    limits = {"max_bytes": "100000", "max_pixels": "1000000"}
    config.write_text(with_release(config.read_text(), [1], limits))
    with serving(models) as server:
        yield server


def test_counts_what_it_embeds(served: Served, published: Path) -> None:
    """The golden photo is counted as well, once a second."""
    embedder = Embedder(published / "1", cores=1)

    def norm(photo: bytes) -> float:
        pixels = decode(photo, embedder.preprocessing, UNLIMITED)
        return float(np.linalg.norm(embedder.network([pixels], all_cores=False)))

    def counted() -> tuple[float, ...]:
        names, series = (
            ("photos_total", "decode_seconds_total", "network_seconds_total", "norm_total"),
            served.series(),
        )
        return tuple(
            series.total(f"npair_{name}", version="1", engine=embedder.engine) for name in names
        )

    own, golden = norm(PHOTO), norm((published / "1/golden/photo.jpg").read_bytes())
    assert 64 * abs(own - 1) > 4 * golden, "else these lengths could be those of the answers"
    time.sleep(1.5)
    before, began = counted(), time.monotonic()
    with NpairClient(served.url, batch_size=64) as client:
        client.embed([PHOTO] * 64)
    eventually(lambda: counted()[0] >= before[0] + 64)
    time.sleep(1.5)
    photos, decode_seconds, network_seconds, norms = np.subtract(counted(), before)
    elapsed = time.monotonic() - began
    assert 64 <= photos <= 64 + elapsed + 2
    # A golden photo may be counted just before a reading and its norm added after it.
    assert norms == pytest.approx(64 * own + (photos - 64) * golden, abs=1.5 * golden)
    assert 0 < decode_seconds < 16 * elapsed
    assert 0 < network_seconds < 16 * elapsed


def test_tells_how_the_golden_set_was_embedded(served: Served, published: Path) -> None:
    embedder = Embedder(published / "1", cores=1)
    for name, expected in (
        ("npair_golden_norm", embedder.golden_norm),
        ("npair_golden_distance", embedder.golden_distance),
    ):
        values = [value for (found, _), value in served.series().items() if found == name]
        assert values == pytest.approx([expected] * 2, rel=1e-3, abs=1e-6), "by each instance"
    golden = np.linalg.norm(np.load(published / "1/golden/embeddings.npy"), axis=1)
    assert golden == pytest.approx(1), (
        "published embeddings have lost their lengths, so the loaded network's count"
    )


def test_counts_refusals_by_reason(served: Served) -> None:
    assert set(REFUSED) == set(REASONS)

    def counted() -> dict[str, float]:
        series = served.series()
        return {
            reason: series.total("npair_photos_rejected_total", reason=reason) for reason in REASONS
        }

    before = counted()
    with NpairClient(served.url) as client:
        for number, photo in enumerate(REFUSED.values(), 1):
            with pytest.raises(InvalidPhotoError):
                client.embed([PHOTO, *[photo] * number])
    expected = {reason: before[reason] + number for number, reason in enumerate(REFUSED, 1)}
    eventually(lambda: counted() == expected)


def test_photos_may_be_base64(served: Served) -> None:
    """Accept base64, for clients limited to JSON, mixed with raw photos over both protocols."""
    text = base64.b64encode(PHOTO)
    with NpairClient(served.url) as client, NpairClient(served.grpc) as grpc:
        expected = client.embed(PHOTO).vectors[0]
        for vectors in (
            each.embed([PHOTO, text, b"data:image/jpeg;base64," + text]).vectors
            for each in (client, grpc)
        ):
            np.testing.assert_allclose(vectors, [expected] * 3, atol=1e-3)
        with pytest.raises(InvalidPhotoError, match="looks like base64, but") as caught:
            grpc.embed([text, text[:99] + b"!" + text[99:]])
    assert list(caught.value.reasons) == [1]
    tensor = {
        "name": "IMAGE",
        "datatype": "BYTES",
        "shape": [2, 1],
        "data": [text.decode(), base64.urlsafe_b64encode(PHOTO).decode()],
    }
    request = Request(
        f"{served.url}/v2/models/npair/infer", json.dumps({"inputs": [tensor]}).encode()
    )
    answer = json.load(urlopen(request, timeout=10))["outputs"][0]
    np.testing.assert_allclose(
        np.reshape(answer["data"], answer["shape"]), [expected] * 2, atol=1e-3
    )


def test_refused_photos_leave_no_memory_behind(served: Served) -> None:
    """Release refused photos at once.

    If they waited for the garbage collector, each would take new shared memory for good.
    """
    with NpairClient(served.url) as client:
        for _ in range(40):
            with pytest.raises(InvalidPhotoError):
                client.embed(bytes(5_000_000))
    assert shared(served.url) < 2 * 5 * 5, "MB: two instances, and five times the photo for each"


def test_batches_are_a_histogram(served: Served) -> None:
    def counted() -> dict[str, float]:
        series = served.series()
        buckets = {
            bound: series.total("npair_batch_photos_bucket", le=bound)
            for bound in ("32", "64", "+Inf")
        }
        return buckets | {"count": series.total("npair_batch_photos_count")}

    before = counted()
    with NpairClient(served.url, batch_size=64) as client:
        client.embed([PHOTO] * 33)
    eventually(lambda: counted()["64"] - before["64"] > counted()["32"] - before["32"])
    after = counted()
    assert after["64"] - before["64"] == after["32"] - before["32"] + 1
    assert after["64"] == after["+Inf"] == after["count"]


def test_instances_add_up(served: Served) -> None:
    """Each instance has its own series, so that one may end without affecting the other."""

    def by_process() -> dict[str, float]:
        series = served.series()
        return {
            process: series.total("npair_photos_total", process=process)
            for process in series.label_values("process")
        }

    before = by_process()
    assert len(before) == 2
    with concurrent.futures.ThreadPoolExecutor(8) as pool:

        def send(_: int) -> None:
            with NpairClient(served.url) as client:
                client.embed([PHOTO] * 8)

        list(pool.map(send, range(40)))
    eventually(lambda: sum(by_process().values()) >= sum(before.values()) + 320)
    assert all(by_process()[process] > before[process] for process in before)


def test_labels_are_bounded_whatever_clients_send(served: Served) -> None:
    before = {frozenset(labels) for _, labels in served.series()}
    tensor = {"name": "IMAGE", "datatype": "BYTES", "shape": [1, 1], "data": ["no photo"]}
    for number in range(30):
        body = {
            "id": f'id "{number}"\n{{}}',
            "inputs": [tensor],
            "parameters": {"version": str(number), "reason": "mine"},
        }
        request = Request(
            f"{served.url}/v2/models/npair/infer",
            json.dumps(body).encode(),
            {"traceparent": f"00-{number}"},
        )
        with pytest.raises(Exception, match="400"):
            urlopen(request, timeout=10)
    time.sleep(1.5)
    assert {frozenset(labels) for _, labels in served.series()} == before


def test_versions_are_apart_and_gone_when_unloaded(served: Served) -> None:
    """Switch versions under load.

    A series that outlives its process, or a process its series, could crash the server.
    """
    stop, failures = False, list[Any]()

    def processes(*versions: str) -> set[str]:
        """Return all processes if exactly these versions are served, else none."""
        series = served.series()
        return (
            series.label_values("process")
            if series.label_values("version") == {*versions}
            else set()
        )

    def load() -> None:
        with NpairClient(served.url, retries=10) as client:
            while not stop:
                try:
                    client.embed([PHOTO] * 3)
                except Exception as error:
                    failures.append(error)

    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        for _ in range(3):
            pool.submit(load)
        try:
            served.serve(1, 2)
            eventually(lambda: len(processes("1", "2")) == 4)
            eventually(lambda: served.series().total("npair_photos_total", version="2") > 30)
            served.serve(2)
            eventually(lambda: len(processes("2")) == 2)
            before = processes("2")
            served.serve(2)
            eventually(lambda: len(now := processes("2")) == 2 and not now & before)
            eventually(lambda: served.series().total("npair_photos_total", version="2") > 30)
        finally:
            stop = True
    assert failures == []


def test_what_waits_beyond_the_limit_is_turned_away(published: Path, tmp_path: Path) -> None:
    """Have 40 callers at once, of whom 4 may wait; then one."""
    models = tmp_path / "models"
    shutil.copytree(published, models / "npair")
    config = models / "npair/config.pbtxt"
    config.write_text(with_release(config.read_text(), [1], {"queue_limit": "4"}))
    large = encode(draw(0, 0, 1500), "PNG")
    answers: Counter[str] = Counter()
    with serving(models) as server:

        def calling(url: str) -> Callable[[threading.Event], None]:
            def call(stopping: threading.Event) -> None:
                with NpairClient(url, retries=0, timeout=60) as client:
                    while not stopping.is_set():
                        try:
                            client.embed(large)
                            answers["embedded"] += 1
                        except UnavailableError as error:
                            answers[str(error)] += 1

            return call

        with Clients(*[calling(server.url)] * 20, *[calling(server.grpc)] * 20):
            time.sleep(3)
            well = health(server.url, MODEL_REPOSITORY=str(models))
        assert well.returncode == 0, well.stderr
        assert set(answers) == {"embedded", "more than 4 requests wait; try again later"}
        turned_away = answers.total() - answers["embedded"]
        # Golden photos may be among them.
        eventually(lambda: server.series().total("npair_requests_turned_away_total") >= turned_away)
        for url in (server.url, server.grpc):
            with NpairClient(url, retries=0) as client:
                for _ in range(20):
                    client.embed(PHOTO)
