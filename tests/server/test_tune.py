"""Tune the real server, and measure traffic on servers of known latency."""

from __future__ import annotations

import contextlib
import http.server
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.models import ROOT

from npair.releasing import tune
from npair.releasing.config import ConfigError
from npair.releasing.traffic import FullError, Measurement, TrafficError, closed, paced
from npair.releasing.tune import (
    LocalServer,
    Point,
    Setting,
    TuneError,
    best_point,
    frontier,
    read_setting,
    with_setting,
)

CONFIG = (ROOT / "model_repository/npair/config.pbtxt").read_text()


@contextmanager
def answering(status: int = 200, after: float = 0.0) -> Iterator[str]:
    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            time.sleep(after)
            self.send_response(status)
            self.send_header("Inference-Header-Content-Length", "999")
            self.send_header("Content-Length", "4")
            self.end_headers()
            self.wfile.write(b"full")

        def log_message(self, *_: object) -> None:
            pass

    class Server(http.server.ThreadingHTTPServer):
        request_queue_size = 64  # connections waiting to be accepted

    server = Server(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


class TestLoad:
    def test_closed_loops(self) -> None:
        with answering(after=0.1) as url:
            load = closed(url, [b"photo"], 4, 1)
        assert 10 < load.rate <= 40, "four clients get 10 answers per second each at most"
        assert 100 <= load.p50 <= load.p99

    def test_paced_does_not_wait_for_answers(self) -> None:
        with answering(after=0.5) as url:
            load = paced(url, [b"photo"], 40, 1)
        assert load.rate > 5, "one connection would have had two answers a second"
        assert load.p50 >= 500

    def test_a_full_server(self) -> None:
        with answering(status=503) as url, pytest.raises(FullError, match="503 Service"):
            closed(url, [b"x"], 2, 1)

    @pytest.mark.parametrize(
        "load", [lambda url: closed(url, [b"x"], 2, 1), lambda url: paced(url, [b"x"], 20, 1)]
    )
    def test_refused_photos_end_it(self, load: object) -> None:
        with (
            answering(status=400) as url,
            pytest.raises(TrafficError, match="400 Bad Request: full"),
        ):
            load(url)  # type: ignore[operator]


class TestConfig:
    @pytest.mark.parametrize("setting", [Setting(1, 0, 0), Setting(3, 16, 500), Setting(2, 8, 0)])
    def test_changes_nothing_else(self, setting: Setting) -> None:
        changed = with_setting(CONFIG, setting)
        assert read_setting(changed) == setting
        assert with_setting(changed, read_setting(CONFIG)) == CONFIG

    @pytest.mark.parametrize(
        ("before", "after", "reason"),
        [
            ("instance_group [ {", "instance_group [\n{", "one line of its own"),
            ("dynamic_batching {", "# dynamic_batching {", "nothing to tune"),
            ("max_batch_size: 64", "max_batch_size: many", "cannot be read"),
        ],
    )
    def test_what_it_cannot_change_is_refused(self, before: str, after: str, reason: str) -> None:
        config = CONFIG.replace(before, after)
        with pytest.raises((ConfigError, TuneError), match=reason):
            with_setting(
                config,
                Setting(1, 4, 0) if reason == "one line of its own" else read_setting(config),
            )


def test_best_points() -> None:
    quick, most = Setting(1, 0, 0), Setting(2, 0, 0)
    points = [
        Point(quick, 1, 100, 5, 10),
        Point(quick, 8, 150, 20, 50),
        Point(most, 1, 90, 6, 12),
        Point(most, 8, 200, 30, 60),
        Point(most, 32, 220, 60, 150),
    ]
    assert best_point(points, 100) == points[3]
    assert best_point(points, 5) is None
    assert frontier(points) == [points[0], points[1], points[3], points[4]]


def test_a_load_beyond_the_queue_s_limit_ends_a_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    """The warm-up exceeds it first."""
    asked = []

    def measured(_url: str, _photos: object, connections: int, seconds: float) -> Measurement:
        asked.append(connections)
        if connections > 4:
            raise FullError("the server answered HTTP/1.1 503")
        return Measurement(seconds, 1.0, 2.0)

    server = contextlib.nullcontext(LocalServer("", "", 0))
    monkeypatch.setattr(tune, "serving", lambda _: server)
    monkeypatch.setattr(tune, "closed", measured)
    points = tune._points(Path(), Setting(1, 0, 0), [], 100, 1.0)
    assert [point.connections for point in points] == [1, 2, 4]
    assert asked == [64, 1, 2, 4, 8]


class TestCommand:
    def run(self, models: Path, data: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [
            sys.executable,
            "-m",
            "npair",
            "tune",
            "--repository",
            str(models),
            "--data",
            str(data),
        ]
        command += ["--seconds", "0.3", "--batch", "8", "--delay", "0", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    def test_finds_and_writes(
        self, published: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Start from a setting that is bad on every machine: a single photo waits one second."""
        models = Path(shutil.copytree(published, tmp_path / "npair"))
        config = models / "config.pbtxt"
        bad = with_setting(
            re.sub("versions: .*? ]", "versions: [ 1 ]", config.read_text()),
            Setting(1, 8, 1_000_000),
        )
        config.write_text(re.sub(r"(?m)^parameters .*(thresh|sha256).*\n", "", bad))
        before = config.read_text()
        picture = tmp_path / "frontier.svg"
        monkeypatch.chdir(models)
        result = self.run(
            Path(), dataset, "--instances", "1", "--p99-ms", "900", "--picture", str(picture)
        )
        assert result.returncode == 0, result.stderr
        assert config.read_text() == with_setting(before, Setting(1, 8, 0))
        assert re.search(
            r"\| 1 x \d+ \| 8 \| 0 \| \d+ \| \d+ \| \d+\.\d \| \d+\.\d \|", result.stdout
        )
        assert "</svg>" in picture.read_text()

    def test_impossible(self, published: Path, dataset: Path, tmp_path: Path) -> None:
        models = Path(shutil.copytree(published, tmp_path / "npair"))
        config = models / "config.pbtxt"
        config.write_text(re.sub("versions: .*? ]", "versions: [ 1 ]", config.read_text()))
        before = config.read_text()
        too_quick = self.run(models, dataset, "--instances", "2", "--p99-ms", "0.01")
        assert too_quick.returncode == 1
        assert re.search(r"no setting keeps a p99 of 0\.01 ms; the least was \d", too_quick.stderr)
        config.write_text(before.replace("versions: [ 1 ]", "versions: [ 7 ]"))
        missing = self.run(models, dataset)
        assert missing.returncode == 1
        assert "the server does not start" in missing.stderr
        assert config.read_text() == before.replace("versions: [ 1 ]", "versions: [ 7 ]")
