"""Search a large gallery from a disk and from S3: recall, latency, readers, time to build.

    PYTHONPATH=model/api:tests .venv/bin/python benchmarks/gallery_at_scale.py --vectors 1000000

The vectors are drawn as for benchmarks/gallery.py: 40 around each centre. They are stored, indexed
and searched through npair.gallery itself, with either index that it uses. The S3 server is
SeaweedFS on this machine, so that the network is missing and both share its cores.

Prints a table in Markdown. store, index: seconds. MB: of the index. first: milliseconds of a new
process's first search, opening included. warm: milliseconds, median / 99th percentile. readers:
searches per second of 1, 2 and 4 processes together.

Needs: Linux, the .venv of `make install`; 0.6 GB of disk for a million vectors in one place.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from machine import say
from support.s3 import seaweed

from npair.gallery import build, gallery
from npair.gallery.location import Where, locate
from npair.objects import Objects

DIMENSION, PER_CENTRE, QUERIES, K = 128, 40, 100, 10
BLOCK = 100_000
READERS, SECONDS = (1, 2, 4), 10.0
KINDS = ("IvfFlat", "IvfPq")
Vectors = npt.NDArray[np.float32]


class Measured(NamedTuple):
    """first, warm: milliseconds; warm by query. found: row numbers by query."""

    first: float
    warm: list[float]
    found: list[set[int]]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--vectors", type=int, default=1_000_000, help="(%(default)s)")
    parser.add_argument("--places", nargs="+", default=["disk", "S3"], choices=["disk", "S3"])
    parser.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS)
    parser.add_argument("--scratch", type=Path, help="folder for the data")
    arguments = parser.parse_args()
    columns = ["place", "index", "store s", "index s", "MB", f"recall@{K}", "first", "warm"]
    columns += [f"{readers} readers" for readers in READERS]
    print("| " + " | ".join(columns) + " |\n|" + " --- |" * len(columns), flush=True)
    queries, exact = nearest(arguments.vectors)
    for place in arguments.places:
        with ExitStack() as stack:
            scratch = stack.enter_context(
                tempfile.TemporaryDirectory(prefix="npair-", dir=arguments.scratch)
            )
            where: Where = Path(scratch) / "gallery"
            if place == "S3":
                os.environ.update(stack.enter_context(seaweed(Path(scratch))))
                where = "s3://gallery/large"
                Objects(where).store.mkdir("gallery")
            stored = fill(where, arguments.vectors)
            for kind in arguments.kinds:
                say(f"{place}: {kind}")
                indexed, megabytes = index(where, kind, arguments.vectors)
                cells = [place, kind, f"{stored:.0f}", f"{indexed:.0f}", f"{megabytes:.0f}"]
                print(
                    "| " + " | ".join([*cells, *searched(where, queries, exact)]) + " |", flush=True
                )


def drawn(block: int, count: int, rows: int) -> Vectors:
    """Draw a block of a gallery of ``count`` unit vectors, float32 [rows, 128]."""
    own, shared = centres(count)
    rng = np.random.default_rng([1, block])
    centre = rng.integers(len(own), size=rows)
    vectors = rng.standard_normal((rows, DIMENSION), dtype=np.float32)
    vectors += own[centre] + shared[centre // 20]
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors


@cache
def centres(count: int) -> tuple[Vectors, Vectors]:
    """Draw the centres, which themselves lie in groups of 20 around others."""
    rng, total = np.random.default_rng(0), count // PER_CENTRE
    own, shared = (
        rng.standard_normal((size, DIMENSION), dtype=np.float32)
        for size in (total, total // 20 + 1)
    )
    return own, shared


def blocks(count: int) -> Iterator[tuple[int, Vectors]]:
    for block, start in enumerate(range(0, count, BLOCK)):
        yield start, drawn(block, count, min(BLOCK, count - start))


def nearest(count: int) -> tuple[Vectors, list[set[int]]]:
    """Return queries that are not in the gallery, and the rows of their K nearest vectors."""
    queries = drawn(count, count, QUERIES)
    best = np.full((QUERIES, K), -1, np.float32)
    rows = np.zeros((QUERIES, K), np.int64)
    for start, vectors in blocks(count):
        cosines = np.hstack([best, queries @ vectors.T])
        kept = np.argpartition(-cosines, K, axis=1)[:, :K]
        rows = np.where(
            kept < K, np.take_along_axis(rows, np.minimum(kept, K - 1), 1), kept - K + start
        )
        best = np.take_along_axis(cosines, kept, 1)
    return queries, [set(map(int, each)) for each in rows]


def fill(where: Where, count: int) -> float:
    """Store the vectors. Returns: seconds."""
    location = locate(where)
    location.prepare()
    table = build.create(location, ("npair", "1", "0"), DIMENSION)
    seconds = 0.0
    for start, vectors in blocks(count):
        names = [f"photos/{row}.jpg" for row in range(start, start + len(vectors))]
        columns = {
            "photo": names,
            "label": [f"product {row % 2500}" for row in range(len(names))],
            "columns": ["{}"] * len(names),
            "sha256": [f"{row:064x}" for row in range(start, start + len(names))],
            "vector": pa.FixedSizeListArray.from_arrays(vectors.ravel(), DIMENSION),
        }
        began = time.perf_counter()
        table.add(pa.table(columns))
        seconds += time.perf_counter() - began
    location.switch({"table": table.name}, location.tag())
    return seconds


def index(where: Where, kind: str, count: int) -> tuple[float, float]:
    """Index with one kind. Returns: seconds, megabytes of the index."""
    opened = gallery.Gallery(where).table
    for old in opened.list_indices():
        opened.drop_index(old.name)
    build.WHOLE = count if kind == "IvfFlat" else 0
    began = time.perf_counter()
    build.index(opened)
    seconds = time.perf_counter() - began
    return seconds, (next(iter(opened.list_indices())).size_bytes or 0) / 1e6


def searched(where: Where, queries: Vectors, exact: list[set[int]]) -> list[str]:
    alone = pool(1).submit(search, where, queries).result()
    hits = sum(len(mine & right) for mine, right in zip(alone.found, exact, strict=True))
    cells = [f"{hits / (K * QUERIES):.4f}", f"{alone.first:.0f}"]
    cells.append("{:.1f} / {:.1f}".format(*np.percentile(alone.warm, [50, 99])))
    for readers in READERS:
        with pool(readers) as processes:
            rates = list(processes.map(rate, [where] * readers, [queries] * readers))
        cells.append(f"{sum(rates):.0f}")
    return cells


def pool(processes: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"))


def search(where: Where, queries: Vectors) -> Measured:
    began = time.perf_counter()
    opened = gallery.Gallery(where)
    opened.nearest(queries[0], K)
    first = 1e3 * (time.perf_counter() - began)
    for query in queries:  # every part of the index is read once
        opened.nearest(query, K)
    warm, found = [], []
    for query in queries:
        began = time.perf_counter()
        hits = opened.nearest(query, K)
        warm.append(1e3 * (time.perf_counter() - began))
        found.append({int(hit.id, 16) for hit in hits})
    return Measured(first, warm, found)


def rate(where: Where, queries: Vectors) -> float:
    """Return searches per second, after each query was searched once."""
    opened = gallery.Gallery(where)
    for query in queries:
        opened.nearest(query, K)
    began, count = time.perf_counter(), 0
    while (seconds := time.perf_counter() - began) < SECONDS:
        opened.nearest(queries[count % len(queries)], K)
        count += 1
    return count / seconds


if __name__ == "__main__":
    main()
