"""Search the serving settings under which this machine answers most photos a second while the slowest answers stay quick."""

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
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from statistics import median
from typing import NamedTuple

from npair import serve
from npair.client import NpairClient
from npair.releasing.config import on_one_line, parse, with_lines
from npair.releasing.traffic import Load, closed
from npair.serving.engine import cores

CONNECTIONS = (1, 2, 4, 8, 16, 32, 64)
ROUNDS = 3  # of the last comparison
GAIN = 1.03  # what another setting must be better by, since runs differ by as much


class TuneError(RuntimeError):
    """Why nothing was changed."""


@dataclass(frozen=True)
class Setting:
    """What config.pbtxt says of an instance group and of its batches.

    instances: processes, which share the cores. batch: how many photos the scheduler prefers to give to one, 0: all that wait.
    delay: microseconds that a photo waits for company.
    """

    instances: int
    batch: int
    delay: int

    def __str__(self) -> str:
        return f"{self.instances} x {max(1, cores() // self.instances)} | {self.batch or 'any'} | {self.delay}"


@dataclass(frozen=True)
class Point:
    """One load of one setting."""

    setting: Setting
    connections: int
    load: Load


class Server(NamedTuple):
    """Its URLs, and the process that started it."""

    http: str
    grpc: str
    pid: int


def read_setting(config: str) -> Setting:
    """Of a config.pbtxt. Raises: ConfigError where it is not one, TuneError where it has no batching."""
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
    """The config.pbtxt, else unchanged. Raises: ConfigError where its two lines for this are not found."""
    batching = f"preferred_batch_size: [ {setting.batch} ] " if setting.batch else ""
    batching += f"max_queue_delay_microseconds: {setting.delay} " if setting.delay else ""
    kept = parse(config).dynamic_batching
    for tuned in ("preferred_batch_size", "max_queue_delay_microseconds"):
        kept.ClearField(tuned)
    lines = {
        "instance_group": f"instance_group [ {{ count: {setting.instances} kind: KIND_CPU }} ]",
        "dynamic_batching": f"dynamic_batching {{ {batching}{on_one_line(kept)} }}",
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
    """Measure a setting after another, each with a server of its own, from the one in the model's folder ``repository``.

    p99: milliseconds that the slowest hundredth of the answers may take. seconds: of each load. axes: the values to try, by name of
    Setting's fields. The search goes along one axis after the other; then the best two and the present setting are measured anew.
    Returns: all loads (their medians, where there were several), and the best setting, which is the present one unless another is
    clearly better.
    Raises: TuneError where no setting keeps p99, or the server does not start; ConfigError, LoadError, OSError.
    """
    config = (repository / "config.pbtxt").read_text(encoding="utf-8")
    present = read_setting(config)
    with_setting(config, present)
    runs: dict[Setting, list[list[Point]]] = {}

    with tempfile.TemporaryDirectory(prefix="npair-tune-") as scratch:
        copy = Path(scratch) / repository.name
        shutil.copytree(repository, copy)

        def measured(setting: Setting) -> float:
            """The largest rate that keeps p99, 0 where there is none."""
            (copy / "config.pbtxt").write_text(with_setting(config, setting), encoding="utf-8")
            points = list(_points(copy.parent, setting, photos, p99, seconds))
            runs.setdefault(setting, []).append(points)
            best = best_point(points, p99)
            found = (
                f"{best.load.rate:.0f} photos/s, p99 {best.load.p99:.0f} ms"
                if best
                else f"p99 above {p99:g} ms"
            )
            say(f"{setting} | {found}")
            return best.load.rate if best else 0.0

        rates = {present: [measured(present)]}
        best = present
        for axis, values in axes.items():
            for setting in [replace(best, **{axis: value}) for value in values]:
                if setting not in rates:
                    rates[setting] = [measured(setting)]
            best = max(rates, key=lambda setting: rates[setting][0])
        finalists = {present, *sorted(rates, key=lambda setting: -rates[setting][0])[:2]}
        if len(finalists) > 1:
            for _ in range(ROUNDS):
                for setting in finalists:
                    rates[setting].append(measured(setting))
    points = [point for of_setting in runs.values() for point in _medians(of_setting)]
    best = max(finalists, key=lambda setting: median(rates[setting]))
    if not median(rates[best]):
        least = min(points, key=lambda point: point.load.p99)
        raise TuneError(
            f"no setting keeps a p99 of {p99:g} ms; the least was {least.load.p99:.1f} ms"
        )
    return points, best if median(rates[best]) > GAIN * median(rates[present]) else present


def best_point(points: Iterable[Point], p99: float) -> Point | None:
    return max(
        (point for point in points if point.load.p99 <= p99),
        key=lambda point: point.load.rate,
        default=None,
    )


def frontier(points: Iterable[Point]) -> list[Point]:
    """The points than which no other has both more photos a second and a lower p99, from the quickest to the most."""
    kept: list[Point] = []
    for point in sorted(points, key=lambda point: (point.load.p99, -point.load.rate)):
        if not kept or point.load.rate > kept[-1].load.rate:
            kept.append(point)
    return kept


def table(points: Iterable[Point]) -> str:
    """In Markdown."""
    rows = [
        f"| {point.setting} | {point.connections} | {point.load.rate:.0f} | {point.load.p50:.1f} | {point.load.p99:.1f} |"
        for point in points
    ]
    head = "| instances x threads | batch | delay µs | connections | photos/s | p50 ms | p99 ms |"
    return "\n".join([head, "|" + " --- |" * 7, *rows])


def draw(points: Sequence[Point], chosen: Setting, p99: float, path: Path) -> None:
    """Throughput against latency: every setting a line, the frontier a thick one."""
    import matplotlib  # noqa: PLC0415  # the search itself needs none

    matplotlib.use("Agg")
    from matplotlib import pyplot  # noqa: PLC0415

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for setting in dict.fromkeys(point.setting for point in points):
        of_setting = [point.load for point in points if point.setting == setting]
        kind = (
            {"color": "C0", "zorder": 3, "label": f"chosen: {setting}"}
            if setting == chosen
            else {"color": "0.8"}
        )
        axes.plot(
            [load.p99 for load in of_setting],
            [load.rate for load in of_setting],
            "o",
            markersize=4,
            **kind,
        )
    best = [point.load for point in frontier(points)]
    axes.plot(
        [load.p99 for load in best], [load.rate for load in best], color="C1", label="frontier"
    )
    axes.axvline(p99, color="0.5", linestyle=":", label=f"objective: {p99:g} ms")
    axes.set(xscale="log", xlabel="p99, ms", ylabel="photos/s", ylim=(0, None))
    axes.legend(title="instances x threads | batch | delay µs")
    figure.savefig(path)
    pyplot.close(figure)


def _points(
    models: Path, setting: Setting, photos: Sequence[bytes], p99: float, seconds: float
) -> Iterator[Point]:
    """With more and more connections, until answers take too long."""
    with serving(models) as server:
        closed(server.http, photos, CONNECTIONS[-1], min(1.0, seconds))  # warm-up
        for connections in CONNECTIONS:
            load = closed(server.http, photos, connections, seconds)
            yield Point(setting, connections, load)
            if load.p99 > p99:
                return


def _medians(runs: Iterable[Iterable[Point]]) -> Iterator[Point]:
    """Of the runs of one setting, for each number of connections."""
    loads: dict[tuple[Setting, int], list[Load]] = {}
    for point in itertools.chain.from_iterable(runs):
        loads.setdefault((point.setting, point.connections), []).append(point.load)
    for (setting, connections), of_point in loads.items():
        yield Point(
            setting, connections, Load(*map(median, zip(*map(astuple, of_point), strict=True)))
        )


@contextlib.contextmanager
def serving(models: Path) -> Iterator[Server]:
    """A server of this model repository, from when it embeds. Raises: TuneError with what it said where it ends instead."""
    with contextlib.ExitStack() as listeners:  # all at once, or one port could be given twice
        names = ("HTTP_PORT", "GRPC_PORT", "METRICS_PORT")
        ports = {
            name: str(
                listeners.enter_context(socket.create_server(("127.0.0.1", 0))).getsockname()[1]
            )
            for name in names
        }
    url = f"http://127.0.0.1:{ports['HTTP_PORT']}"
    with tempfile.TemporaryFile("w+") as log:
        environment = {
            **os.environ,
            **ports,
            "MODEL_REPOSITORY": str(models),
            "BIND_ADDRESS": "127.0.0.1",
        }
        process = subprocess.Popen(
            [sys.executable, str(serve.__file__)], env=environment, stderr=log
        )
        try:
            with NpairClient(url) as client:
                while not client.ready():
                    if process.poll() is not None:
                        log.seek(0)
                        raise TuneError(f"the server does not start: {log.read().strip()}")
                    time.sleep(0.1)
            yield Server(url, f"grpc://127.0.0.1:{ports['GRPC_PORT']}", process.pid)
        finally:
            process.terminate()
            process.wait()
