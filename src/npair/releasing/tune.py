"""Find the serving settings with the most photos per second within a limit of latency."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from npair.client import NpairClient
from npair.releasing.config import on_one_line, parse, with_lines
from npair.releasing.repository import open_repository
from npair.releasing.traffic import FullError, closed
from npair.serving.engine import cores

SERVE = Path(__file__).parents[3] / "model/api/serve.py"  # of the checkout
CONNECTIONS = (1, 2, 4, 8, 16, 32, 64)
ROUNDS = 3  # of the final comparison
GAIN = 1.03  # the least gain worth a change; equal runs differ by as much


class TuneError(RuntimeError):
    """Nothing was changed; the message says why."""


@dataclass(frozen=True)
class Setting:
    """The settings of config.pbtxt that are tuned.

    instances: processes, which share the cores. batch: preferred batch size; 0 takes all waiting
    photos. delay: microseconds that a photo waits for a fuller batch.
    """

    instances: int
    batch: int
    delay: int

    def __str__(self) -> str:
        threads = max(1, cores() // self.instances)
        return f"{self.instances} x {threads} | {self.batch or 'any'} | {self.delay}"


class Point(NamedTuple):
    """A ``traffic.Measurement`` of a setting with a number of connections."""

    setting: Setting
    connections: int
    rate: float
    p50: float
    p99: float


class LocalServer(NamedTuple):
    """A server on this machine: its URLs, and the process id of its serve.py."""

    http: str
    grpc: str
    pid: int


def read_setting(config: str) -> Setting:
    """Read a config.pbtxt. Raises: ConfigError if it is damaged, TuneError without batching."""
    parsed = parse(config)
    if not parsed.HasField("dynamic_batching"):
        raise TuneError("config.pbtxt has no dynamic_batching { }, so there is nothing to tune")
    batching = parsed.dynamic_batching
    return Setting(
        sum(group.count for group in parsed.instance_group),
        max(batching.preferred_batch_size, default=0),
        batching.max_queue_delay_microseconds,
    )


def with_setting(config: str, setting: Setting) -> str:
    """Return a config.pbtxt with only its setting changed.

    Raises: ConfigError if instance_group or dynamic_batching is not on one line.
    """
    kept = parse(config).dynamic_batching
    for tuned in ("preferred_batch_size", "max_queue_delay_microseconds"):
        kept.ClearField(tuned)
    batching = [
        f"preferred_batch_size: [ {setting.batch} ]" if setting.batch else "",
        f"max_queue_delay_microseconds: {setting.delay}" if setting.delay else "",
        on_one_line(kept),
    ]
    lines = {
        "instance_group": f"instance_group [ {{ count: {setting.instances} kind: KIND_CPU }} ]",
        "dynamic_batching": f"dynamic_batching {{ {' '.join(filter(None, batching))} }}",
    }
    return with_lines(config, lines)


def tune(
    repository: Path,
    photos: Sequence[bytes],
    *,
    p99: float,
    seconds: float,
    axes: dict[str, Sequence[int]],
    say: Callable[[str], None],
) -> tuple[list[Point], Setting]:
    """Search along one axis after the other, starting a server for each setting.

    The best two settings and the present one are then compared again, in turns.
    repository: the model's folder. photos: encoded files. p99: the limit, in milliseconds.
    seconds: length of each measurement. axes: values to try, by name of Setting's fields.
    Returns: all points (medians if measured repeatedly), and the best setting, which is the
    present one unless another is clearly better.
    Raises: TuneError if no setting keeps p99, the server does not start or npair is not of a
    checkout; ConfigError, TrafficError, OSError.
    """
    if not SERVE.exists():
        raise TuneError(
            f"npair tune starts servers by {SERVE.name} of a checkout, and this npair is not"
            " installed from one: pip install --editable '.[tune]' there"
        )
    config = (repository / "config.pbtxt").read_text(encoding="utf-8")
    present = best = read_setting(config)
    runs: dict[Setting, list[list[Point]]] = {}

    def rate(setting: Setting) -> float:
        """Return the median over runs of the largest rate within p99, 0 if there is none."""
        found = [best_point(points, p99) for points in runs[setting]]
        return median(point.rate if point else 0.0 for point in found)

    with tempfile.TemporaryDirectory(prefix="npair-tune-") as scratch:
        copy = Path(scratch) / open_repository(repository).name  # also of "."
        shutil.copytree(repository, copy)

        def measure(setting: Setting) -> None:
            (copy / "config.pbtxt").write_text(with_setting(config, setting), encoding="utf-8")
            points = list(_points(copy.parent, setting, photos, p99, seconds))
            runs.setdefault(setting, []).append(points)
            found = f"p99 above {p99:g} ms"
            if point := best_point(points, p99):
                found = f"{point.rate:.0f} photos/s, p99 {point.p99:.0f} ms"
            say(f"{setting} | {found}")

        measure(present)
        for axis, values in axes.items():
            for setting in [replace(best, **{axis: value}) for value in values]:
                if setting not in runs:
                    measure(setting)
            best = max(runs, key=rate)
        finalists = {present, *sorted(runs, key=rate, reverse=True)[:2]}
        if len(finalists) > 1:
            for _ in range(ROUNDS):
                for setting in finalists:
                    measure(setting)
    points = [point for repeated in runs.values() for point in _medians(repeated)]
    best = max(finalists, key=rate)
    if not rate(best):
        least = min(point.p99 for point in points)
        raise TuneError(f"no setting keeps a p99 of {p99:g} ms; the least was {least:.1f} ms")
    return points, best if rate(best) > GAIN * rate(present) else present


def best_point(points: Iterable[Point], p99: float) -> Point | None:
    """Return the point with the largest rate within p99, if there is one."""
    within = [point for point in points if point.p99 <= p99]
    return max(within, key=lambda point: point.rate, default=None)


def frontier(points: Iterable[Point]) -> list[Point]:
    """Return the Pareto-optimal points in rate and p99, from the lowest p99 to the largest rate."""
    kept: list[Point] = []
    for point in sorted(points, key=lambda point: (point.p99, -point.rate)):
        if not kept or point.rate > kept[-1].rate:
            kept.append(point)
    return kept


def table(points: Iterable[Point]) -> str:
    """Return a Markdown table of points."""
    head = "instances x threads", "batch", "delay µs", "connections", "photos/s", "p50 ms", "p99 ms"
    rows = ((*point[:2], *map("{:.{}f}".format, point[2:], (0, 1, 1))) for point in points)
    return markdown(head, rows)


def markdown(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def draw(points: Sequence[Point], chosen: Setting, p99: float, path: Path) -> None:
    """Plot throughput against latency: all points, the chosen setting and the frontier."""
    import matplotlib  # noqa: PLC0415  # the search itself needs none

    matplotlib.use("Agg")
    from matplotlib import pyplot  # noqa: PLC0415

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for setting in dict.fromkeys(point.setting for point in points):
        own = [point for point in points if point.setting == setting]
        style: dict[str, Any] = {"color": "C0", "zorder": 3, "label": f"chosen: {setting}"}
        if setting != chosen:
            style = {"color": "0.8"}
        x, y = [point.p99 for point in own], [point.rate for point in own]
        axes.plot(x, y, "o", markersize=4, **style)
    best = frontier(points)
    x, y = [point.p99 for point in best], [point.rate for point in best]
    axes.plot(x, y, color="C1", label="frontier")
    axes.axvline(p99, color="0.5", linestyle=":", label=f"objective: {p99:g} ms")
    axes.set(xscale="log", xlabel="p99, ms", ylabel="photos/s", ylim=(0, None))
    axes.legend(title="instances x threads | batch | delay µs")
    figure.savefig(path)
    pyplot.close(figure)


def _points(
    models: Path, setting: Setting, photos: Sequence[bytes], p99: float, seconds: float
) -> Iterator[Point]:
    """Measure a setting with more and more connections until p99 or its queue_limit is exceeded."""
    with serving(models) as server, contextlib.suppress(FullError):
        with contextlib.suppress(FullError):  # warm-up
            closed(server.http, photos, CONNECTIONS[-1], min(1.0, seconds))
        for connections in CONNECTIONS:
            point = Point(setting, connections, *closed(server.http, photos, connections, seconds))
            yield point
            if point.p99 > p99:
                return


def _medians(runs: Iterable[Iterable[Point]]) -> Iterator[Point]:
    """Take medians over a setting's runs for each number of connections."""
    repeated: dict[tuple[Setting, int], list[list[float]]] = {}
    for setting, connections, *measured in itertools.chain.from_iterable(runs):
        repeated.setdefault((setting, connections), []).append(measured)
    for (setting, connections), columns in repeated.items():
        yield Point(setting, connections, *map(median, zip(*columns, strict=True)))


@contextlib.contextmanager
def serving(models: Path, serve: Path = SERVE) -> Iterator[LocalServer]:
    """Start a server for a model repository by its serve.py and wait until it is ready.

    Raises: TuneError with the server's output if it ends instead.
    """
    ports = {}
    with contextlib.ExitStack() as listeners:  # held together, so that all ports differ
        for name in ("HTTP_PORT", "GRPC_PORT", "METRICS_PORT"):
            listener = listeners.enter_context(socket.create_server(("127.0.0.1", 0)))
            ports[name] = str(listener.getsockname()[1])
    url = f"http://127.0.0.1:{ports['HTTP_PORT']}"
    with tempfile.TemporaryFile("w+") as log:
        environment = os.environ | ports
        environment |= {"MODEL_REPOSITORY": str(models), "BIND_ADDRESS": "127.0.0.1"}
        process = subprocess.Popen([sys.executable, str(serve)], env=environment, stderr=log)
        try:
            with NpairClient(url) as client:
                while not client.ready():
                    if process.poll() is not None:
                        log.seek(0)
                        raise TuneError(f"the server does not start: {log.read().strip()}")
                    time.sleep(0.1)
            yield LocalServer(url, f"grpc://127.0.0.1:{ports['GRPC_PORT']}", process.pid)
        finally:
            process.terminate()
            process.wait()
