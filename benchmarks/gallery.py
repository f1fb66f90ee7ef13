"""Why LanceDB: compare embedded vector databases by the cost and recall of a search.

    PYTHONPATH=model/api .venv/bin/python benchmarks/gallery.py

The vectors are synthetic: 40 around each of 2,500 centres, with a mean cosine of 0.67 within one
centre, which is looser than val photos of the Grocery Store Dataset (0.82). Each database is
filled in one process and searched in another, one query at a time; the queries are not among the
vectors. LanceDB is measured through npair.gallery.gallery itself.

Prints a table in Markdown: megabytes of packages beyond the needs of npair's client, seconds to
fill and index, megabytes on disk, megabytes by which the searching process grew, milliseconds per
search (median / 99th percentile), the recall relative to exact search, and whether another process
can search while this one has the database open.

Needs: Linux, the .venv of `make install` and, the first time, a package index.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from importlib import import_module, metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from machine import ROOT, python_of, say
from metrics_at_scale import resident_megabytes
from packaging.requirements import Requirement

from npair.gallery import build, gallery, location

DIMENSION, PER_CENTRE, QUERIES, WARM_UP, KS = 128, 40, 1000, 50, (5, 10)
OWN = (
    "numpy",
    "tritonclient",
    "geventhttpclient",
    "grpcio",
    "protobuf",
    "tqdm",
)  # what npair's client and tqdm need
Vectors = npt.NDArray[np.float32]
Search = Callable[[Vectors, int], Iterable[int]]


class Database(NamedTuple):
    """A vector database.

    packages: to install. fill: stores vectors in a folder, with an index. opened: opens the folder
    and returns a search, which gives row numbers.
    """

    packages: tuple[str, ...]
    fill: Callable[[Path, Vectors], None]
    opened: Callable[[Path], Search]


class Measured(NamedTuple):
    milliseconds: dict[int, tuple[float, float]]  # by k: median, 99th percentile
    recall: dict[int, float]
    megabytes: float
    shared: bool


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--vectors", type=int, default=100_000, help="(%(default)s)")
    arguments = parser.parse_args()
    python = python_of("gallery", ROOT / ".venv/peers")
    if Path(sys.executable) != python:
        os.execve(
            python,
            [str(python), *sys.argv],
            os.environ | {"PYTHONPATH": f"{ROOT}/src:{ROOT}/model/api"},
        )
    columns = ["database", "licence", "MB installed", "build s", "MB on disk", "MB in memory"]
    columns += [*(f"k = {k}, ms" for k in KS), *(f"recall@{k}" for k in KS), "another process"]
    print("| " + " | ".join(columns) + " |\n|" + " --- |" * len(columns), flush=True)
    for name, database in DATABASES.items():
        say(name)
        with tempfile.TemporaryDirectory(prefix="npair-gallery-") as scratch:
            folder = Path(scratch)
            seconds = alone(fill, name, folder, arguments.vectors)
            disk = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6
            measured = alone(measure, name, folder, arguments.vectors)
        cells = [
            name,
            licence(database.packages[0]),
            f"{installed(database.packages):.0f}",
            f"{seconds:.1f}",
            f"{disk:.0f}",
        ]
        cells += [
            f"{measured.megabytes:.0f}",
            *("{:.1f} / {:.1f}".format(*measured.milliseconds[k]) for k in KS),
        ]
        cells += [*(f"{measured.recall[k]:.3f}" for k in KS), "yes" if measured.shared else "no"]
        print("| " + " | ".join(cells) + " |", flush=True)


def alone(function: Callable[..., Any], *arguments: object) -> Any:
    """Call a function in a new process, free of the threads and memory of other databases."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


@cache
def drawn(count: int) -> tuple[Vectors, Vectors]:
    """Draw unit vectors (float32 [count, 128]) and queries around the same centres.

    The centres themselves lie in groups of 20 around others.
    """
    rng, total = np.random.default_rng(0), count + QUERIES
    centre = rng.permutation(total) % (count // PER_CENTRE)
    own, shared = (
        rng.standard_normal((count // PER_CENTRE, DIMENSION), dtype=np.float32) for _ in range(2)
    )
    vectors = (
        rng.standard_normal((total, DIMENSION), dtype=np.float32)
        + own[centre]
        + shared[centre // 20]
    )
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors[:count], vectors[count:]


def fill(name: str, folder: Path, count: int) -> float:
    """Fill a new database. Returns: seconds."""
    vectors, _ = drawn(count)
    began = time.perf_counter()
    DATABASES[name].fill(folder, vectors)
    return time.perf_counter() - began


def measure(name: str, folder: Path, count: int) -> Measured:
    vectors, queries = drawn(count)
    exact = np.concatenate(
        [np.argsort(-(block @ vectors.T), axis=1)[:, : max(KS)] for block in np.split(queries, 10)]
    )
    before = resident_megabytes()
    search = DATABASES[name].opened(folder)
    for query in queries[:WARM_UP]:
        search(query, max(KS))
    milliseconds, recall = {}, {}
    for k in KS:
        times, hits = [], 0
        for query, nearest in zip(queries, exact[:, :k], strict=True):
            began = time.perf_counter()
            found = search(query, k)
            times.append(1e3 * (time.perf_counter() - began))
            hits += len(set(found) & set(nearest.tolist()))
        milliseconds[k] = (float(np.median(times)), float(np.percentile(times, 99)))
        recall[k] = hits / exact[:, :k].size
    return Measured(
        milliseconds,
        recall,
        resident_megabytes() - before,
        alone(can_search, name, folder, queries[0]),
    )


def can_search(name: str, folder: Path, query: Vectors) -> bool:
    try:
        return len(list(DATABASES[name].opened(folder)(query, 5))) == 5
    except Exception as error:
        say(f"{name} in another process: {error}")
        return False


def blocks(vectors: Vectors) -> Iterator[range]:
    for start in range(0, len(vectors), build.ROWS):
        yield range(start, min(start + build.ROWS, len(vectors)))


def label(row: int) -> str:
    return f"product {row % 2500}"


def fill_lancedb(folder: Path, vectors: Vectors) -> None:
    table = build.create(location.Folder(folder), ("npair", "1", "0"), DIMENSION)
    for rows in blocks(vectors):
        table.add(
            [
                {"photo": str(row), "label": label(row), "sha256": "", "vector": vectors[row]}
                for row in rows
            ]
        )
    build.index(table)
    (folder / location.POINTER).write_text(json.dumps({"table": table.name}))


def open_lancedb(folder: Path) -> Search:
    opened = gallery.Gallery(folder)
    return lambda query, k: [int(Path(found.photo).name) for found in opened.nearest(query, k)]


def fill_milvus(folder: Path, vectors: Vectors) -> None:
    pymilvus = import_module("pymilvus")
    client = pymilvus.MilvusClient(str(folder / "gallery.db"))
    schema, index = client.create_schema(), client.prepare_index_params()
    schema.add_field("row", pymilvus.DataType.INT64, is_primary=True)
    schema.add_field("label", pymilvus.DataType.VARCHAR, max_length=100)
    schema.add_field("vector", pymilvus.DataType.FLOAT_VECTOR, dim=DIMENSION)
    index.add_index(
        "vector", index_type="HNSW", metric_type="COSINE", params={"M": 16, "efConstruction": 200}
    )
    client.create_collection("gallery", schema=schema, index_params=index)
    for rows in blocks(vectors):
        client.insert(
            "gallery", [{"row": row, "label": label(row), "vector": vectors[row]} for row in rows]
        )
    client.flush("gallery")
    client.close()


def open_milvus(folder: Path) -> Search:
    client = import_module("pymilvus").MilvusClient(str(folder / "gallery.db"))
    client.load_collection("gallery")
    ef = {"params": {"ef": 100}}

    def search(query: Vectors, k: int) -> list[int]:
        found = client.search(
            "gallery", [query], limit=k, output_fields=["label"], search_params=ef
        )
        return [hit["row"] for hit in found[0]]

    return search


def fill_qdrant(folder: Path, vectors: Vectors) -> None:
    qdrant = import_module("qdrant_client")
    client, models = qdrant.QdrantClient(path=folder), qdrant.models
    client.create_collection(
        "gallery", models.VectorParams(size=DIMENSION, distance=models.Distance.COSINE)
    )
    for rows in blocks(vectors):
        points = [
            models.PointStruct(id=row, vector=vectors[row].tolist(), payload={"label": label(row)})
            for row in rows
        ]
        client.upsert("gallery", points)
    client.close()


def open_qdrant(folder: Path) -> Search:
    client = import_module("qdrant_client").QdrantClient(path=folder)
    return lambda query, k: [
        point.id for point in client.query_points("gallery", query.tolist(), limit=k).points
    ]


def fill_edge(folder: Path, vectors: Vectors) -> None:
    edge = import_module("qdrant_edge")
    hnsw = edge.HnswIndexConfig(m=16, ef_construct=200, full_scan_threshold=10)
    config = edge.EdgeConfig(
        vectors=edge.EdgeVectorParams(size=DIMENSION, distance=edge.Distance.Cosine),
        hnsw_config=hnsw,
    )
    shard = edge.EdgeShard.create(str(folder), config)
    for rows in blocks(vectors):
        points = [edge.Point(row, vectors[row].tolist(), {"label": label(row)}) for row in rows]
        shard.update(edge.UpdateOperation.upsert_points(points))
    shard.optimize()
    shard.close()


def open_edge(folder: Path) -> Search:
    edge = import_module("qdrant_edge")
    shard, params = edge.EdgeShard.load(str(folder)), edge.SearchParams(hnsw_ef=100)

    def search(query: Vectors, k: int) -> list[int]:
        nearest = edge.Query.Nearest(query.tolist())
        return [
            point.id
            for point in shard.query(
                edge.QueryRequest(k, query=nearest, with_payload=True, params=params)
            )
        ]

    return search


def fill_usearch(folder: Path, vectors: Vectors) -> None:
    index = import_module("usearch.index").Index(
        ndim=DIMENSION, metric="cos", dtype="f32", expansion_add=200
    )
    for rows in blocks(vectors):
        index.add(np.array(rows), vectors[rows.start : rows.stop])
    index.save(folder / "gallery.usearch")


def open_usearch(folder: Path) -> Search:
    index = import_module("usearch.index").Index.restore(folder / "gallery.usearch", view=True)
    index.expansion_search = 100
    return lambda query, k: index.search(query, k).keys.tolist()


def fill_numpy(folder: Path, vectors: Vectors) -> None:
    np.save(folder / "gallery.npy", vectors)


def open_numpy(folder: Path) -> Search:
    vectors = np.load(folder / "gallery.npy")
    return lambda query, k: np.argpartition(vectors @ query, -k)[-k:].tolist()


DATABASES = {
    "LanceDB, as npair.gallery.gallery uses it": Database(
        ("lancedb", "pyarrow"), fill_lancedb, open_lancedb
    ),
    "Milvus Lite, HNSW": Database(("milvus-lite", "pymilvus"), fill_milvus, open_milvus),
    "Qdrant, local mode": Database(("qdrant-client",), fill_qdrant, open_qdrant),
    "Qdrant Edge, HNSW": Database(("qdrant-edge-py",), fill_edge, open_edge),
    "usearch, HNSW; no labels": Database(("usearch",), fill_usearch, open_usearch),
    "numpy, compares with all": Database(("numpy",), fill_numpy, open_numpy),
}


def licence(package: str) -> str:
    about: Any = metadata.metadata(package)
    classifiers = [
        line.rpartition(" :: ")[2]
        for line in about.get_all("Classifier") or ()
        if line.startswith("License")
    ]
    return str(about["License-Expression"] or (classifiers or [about["License"]])[0])


def installed(packages: Iterable[str]) -> float:
    """MB of packages and their dependencies, without those that npair's client needs anyway."""
    files = [
        Path(str(file.locate()))
        for name in needed(packages) - needed(OWN)
        for file in metadata.files(name) or ()
    ]
    return sum(file.stat().st_size for file in files if file.exists()) / 1e6


def needed(packages: Iterable[str]) -> set[str]:
    found, left = set[str](), list(packages)
    while left:
        if (name := left.pop().lower().replace("_", "-")) not in found:
            found.add(name)
            required = map(Requirement, metadata.requires(name) or ())
            left += [
                one.name for one in required if not one.marker or one.marker.evaluate({"extra": ""})
            ]
    return found


if __name__ == "__main__":
    main()
