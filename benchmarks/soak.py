"""Soak test: check that memory, descriptors, shared memory and latency stay constant under load.

    make soak MINUTES=60

Clients of both protocols send one photo or many, good and bad, in all formats, from small to 12
megapixels. Each vector is compared with the first one of the same photo, and each refusal with its
expected reason. Every few seconds, the server's resources are read. To warm up, all clients at once
send the largest requests that may come: these determine the memory that the server keeps for reuse.
The exit code is 1 if a vector was wrong, a good request failed, or memory grew by GROWTH or more
from the second tenth of the time to the last. This does not measure speed, since the clients share
the cores.
"""

from __future__ import annotations

import argparse
import csv
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from statistics import median
from urllib.parse import urlsplit

import numpy as np
from machine import descendants, proportional_memory, pyplot
from supervisor.procfs import shared_regions

from npair.client import InvalidPhotoError, NpairClient, NpairError, Vectors
from npair.client.photos import SUFFIXES
from npair.publishing.drawings import draw, encode
from npair.releasing.tune import LocalServer, serving

ROOT = Path(__file__).resolve().parents[1]
GROWTH = 0.02
INTERVAL = 5.0  # seconds between two readings
FORMATS = ("JPEG", "PNG", "WEBP")
SIZES = (64, 350, 640, 1400)
LARGE = 3464  # 12 megapixels
BATCHES = (1, 1, 1, 4, 32)


@dataclass(frozen=True)
class Reading:
    """Resources and speed of the server at one time.

    minute: since the start. memory: MB of serve.py and its descendants. shared: MB in /dev/shm.
    descriptors: those open in all these processes. rate: photos per second. p50, p99: latency of
    requests of one photo, in milliseconds.
    """

    minute: float
    memory: float
    shared: float
    descriptors: int
    rate: float
    p50: float
    p99: float


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=60, help="(%(default)s)")
    parser.add_argument(
        "--photos", type=Path, help="a folder of photos to send beside the drawn ones"
    )
    parser.add_argument(
        "--clients",
        type=int,
        default=4,
        help="an even number: half of them over gRPC (%(default)s)",
    )
    parser.add_argument("--csv", type=Path, help="write every reading")
    parser.add_argument("--picture", type=Path, help="write a picture of them, .svg or .png")
    options = parser.parse_args()
    good = list(photos(options.photos))
    with serving(ROOT / "model_repository") as server:
        load = Load(good, [server.http, server.grpc], options.clients)
        load.warm_up()
        with load:
            readings = list(read(server, load, options.minutes))
    if options.csv:
        with options.csv.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(field.name for field in fields(Reading))
            writer.writerows(map(astuple, readings))
    if options.picture:
        plot(readings, options.picture)
    return report(readings, load)


def photos(folder: Path | None) -> Iterator[bytes]:
    for number, (size, image_format) in enumerate(
        (size, image_format) for size in SIZES for image_format in FORMATS
    ):
        yield encode(draw(number, 0, size), image_format)
    yield encode(draw(0, 1, LARGE), "JPEG")
    if folder:
        found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
        yield from (path.read_bytes() for path in found[:: max(1, len(found) // 100)])


def bad_photos(good: bytes) -> dict[bytes, str]:
    """Photos that the server must refuse, each with a part of the expected reason."""
    return {
        b"": "empty",
        b"no photo at all": "not a JPEG",
        good[: len(good) // 2]: "truncated",
        bytes(20_000_001): "more than the limit",
    }


class Load:
    """Clients that send requests without pauses. problems: wrong answers, counted by kind."""

    def __init__(self, good: Sequence[bytes], urls: Sequence[str], clients: int) -> None:
        self.good, self.bad = good, bad_photos(good[3])
        self.urls = [urls[client % len(urls)] for client in range(clients)]
        self.answered, self.refused, self.problems = 0, 0, Counter[str]()
        self.latencies: list[float] = []
        self.stopping, self.lock = threading.Event(), threading.Lock()
        with NpairClient(urls[0]) as client:
            self.expected: Vectors = np.concatenate([client.embed(photo).vectors for photo in good])
        self.threads = [
            threading.Thread(target=self._ask, args=(url, seed))
            for seed, url in enumerate(self.urls)
        ]

    def warm_up(self) -> None:
        too_large = max(self.bad, key=len)
        largest = [[too_large]] * 40 + [
            [max(self.good, key=len)] * (max(BATCHES) - 1) + [too_large]
        ] * 4

        def ask(url: str) -> None:
            with NpairClient(url, retries=0, timeout=60) as client:
                for batch in largest:
                    with suppress(InvalidPhotoError):
                        client.embed(batch)

        with ThreadPoolExecutor(len(self.urls)) as pool:
            list(pool.map(ask, self.urls))

    def __enter__(self) -> None:
        for thread in self.threads:
            thread.start()

    def __exit__(self, *_: object) -> None:
        self.stopping.set()
        for thread in self.threads:
            thread.join()

    def _ask(self, url: str, seed: int) -> None:
        draws, refusals = np.random.default_rng(seed), list(self.bad.items())
        with NpairClient(url, retries=0, timeout=60) as client:
            while not self.stopping.is_set():
                chosen = draws.integers(len(self.good), size=draws.choice(BATCHES))
                batch = [self.good[index] for index in chosen]
                photo, reason = refusals[draws.integers(len(refusals))]
                place = int(draws.integers(len(batch))) if draws.random() < 0.05 else None
                if place is not None:
                    batch[place] = photo
                began = time.perf_counter()
                problem = ""
                try:
                    vectors = client.embed(batch).vectors
                    if place is not None:
                        problem = f"a photo was embedded that should be refused: {reason}"
                    elif (vectors * self.expected[chosen]).sum(axis=1).min() < 0.999:
                        problem = "wrong vectors"
                except InvalidPhotoError as error:
                    if (
                        place is None
                        or list(error.reasons) != [place]
                        or reason not in error.reasons[place]
                    ):
                        problem = f"refused: {error}"
                except NpairError as error:
                    problem = f"{type(error).__name__}: {error}"
                with self.lock:
                    if problem:
                        self.problems[problem] += 1
                    elif place is not None:
                        self.refused += 1
                    else:
                        self.answered += len(batch)
                        if len(batch) == 1:
                            self.latencies.append(1e3 * (time.perf_counter() - began))

    def take(self) -> tuple[int, list[float]]:
        """Returns: the photos answered so far, and the latencies since the last call."""
        with self.lock:
            latencies, self.latencies = self.latencies, []
            return self.answered, latencies


def read(server: LocalServer, load: Load, minutes: float) -> Iterator[Reading]:
    began = last = time.monotonic()
    before, _ = load.take()
    while last - began < 60 * minutes:
        time.sleep(INTERVAL)
        now, (answered, latencies) = time.monotonic(), load.take()
        p50, p99 = np.percentile(latencies or [np.nan], (50, 99))
        rate = (answered - before) / (now - last)
        held = proportional_memory(server.pid), shared(server.http), open_files(server.pid)
        yield Reading((now - began) / 60, *held, rate, float(p50), float(p99))
        before, last = answered, now


def shared(url: str) -> float:
    """MB that the server at this HTTP address shares with its stubs."""
    return (
        sum(region.stat().st_blocks * 512 for region in shared_regions(urlsplit(url).port or 80))
        / 1e6
    )


def open_files(pid: int) -> int:
    total = 0
    for process in [pid, *descendants(pid)]:
        with suppress(OSError):
            total += sum(1 for _ in Path(f"/proc/{process}/fd").iterdir())
    return total


def report(readings: Sequence[Reading], load: Load) -> int:
    """Print the second tenth, after the warm-up, beside the last. Returns: the exit code."""
    tenth = max(1, len(readings) // 10)
    ratios, rows = {}, []
    for field in fields(Reading)[1:]:
        first, last = (
            median(getattr(reading, field.name) for reading in of)
            for of in (readings[tenth : 2 * tenth], readings[-tenth:])
        )
        ratios[field.name] = last / first
        rows.append(f"| {field.name} | {first:,.1f} | {last:,.1f} | {last / first:.3f} |")
    print(
        f"{readings[-1].minute:.0f} minutes, {load.answered:,} photos embedded, "
        f"{load.refused:,} bad photos refused,",
        end=" ",
    )
    print(f"{load.problems.total()} requests answered otherwise than they should be\n")
    print(
        "| | second tenth | last tenth | ratio |", "| --- | ---: | ---: | ---: |", *rows, sep="\n"
    )
    for problem, times in load.problems.most_common(10):
        print(f"{times} x {problem}", file=sys.stderr)
    return int(bool(load.problems) or ratios["memory"] >= 1 + GROWTH)


def plot(readings: Sequence[Reading], path: Path) -> None:
    figure, axes = pyplot().subplots(4, figsize=(8, 8), sharex=True, layout="constrained")
    minutes = [reading.minute for reading in readings]
    shown = {
        "MB": ("memory", "shared"),
        "open descriptors": ("descriptors",),
        "photos/s": ("rate",),
        "latency, ms": ("p50", "p99"),
    }
    for axis, (label, names) in zip(axes, shown.items(), strict=True):
        for name in names:
            axis.plot(minutes, [getattr(reading, name) for reading in readings], label=name)
        axis.set(ylabel=label, ylim=(0, None))
        if len(names) > 1:
            axis.legend(loc="center right")
    axes[-1].set(xlabel="minutes")
    figure.savefig(path)


if __name__ == "__main__":
    sys.exit(main())
