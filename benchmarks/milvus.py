"""Load an exported gallery into Milvus, and search it there.

    npair index export vectors
    PYTHONPATH=model/api .venv/bin/python benchmarks/milvus.py vectors --uri http://milvus:19530

Without --uri, Milvus Lite does it, the embedded edition, which answers the same calls. The key is
the row's id, so that loading again replaces rows. Prints how many rows there are, how many of a
hundred of them a search by their own vectors finds first, and the median of its milliseconds.

Needs: Linux, the .venv of `make install` and, the first time, a package index.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from importlib import import_module
from pathlib import Path
from statistics import median

import pyarrow.dataset as ds
from machine import ROOT, python_of

COLUMNS = ["id", "label", "vector"]
BATCH, LONGEST, ASKED = 1000, 1024, 100
HNSW = {"index_type": "HNSW", "metric_type": "COSINE", "params": {"M": 16, "efConstruction": 200}}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", help="of npair index export")
    parser.add_argument("--uri", help="of Milvus; a new file of Milvus Lite if left out")
    parser.add_argument("--collection", default="gallery", help="(%(default)s)")
    arguments = parser.parse_args()
    python = python_of("gallery", ROOT / ".venv/peers")
    if Path(sys.executable) != python:
        os.execv(python, [str(python), *sys.argv])
    with tempfile.TemporaryDirectory() as scratch:
        load(arguments.folder, arguments.uri or f"{scratch}/milvus.db", arguments.collection)


def load(folder: str, uri: str, name: str) -> None:
    milvus = import_module("pymilvus")
    files = ds.dataset(folder, format="parquet")
    client = milvus.MilvusClient(uri)
    schema, index = client.create_schema(), client.prepare_index_params()
    dimension = files.schema.field("vector").type.list_size
    for column in COLUMNS[:2]:
        kind = milvus.DataType.VARCHAR
        schema.add_field(column, kind, is_primary=column == "id", max_length=LONGEST)
    schema.add_field("vector", milvus.DataType.FLOAT_VECTOR, dim=dimension)
    index.add_index("vector", **HNSW)
    client.create_collection(name, schema=schema, index_params=index)
    for batch in files.to_batches(columns=COLUMNS, batch_size=BATCH):
        if len(batch):
            client.upsert(name, batch.to_pylist())
    client.flush(name)
    client.load_collection(name)
    rows = client.get_collection_stats(name)["row_count"]
    asked = files.head(ASKED, columns=COLUMNS).to_pylist()
    first, milliseconds = 0, []
    for row in asked:
        began = time.perf_counter()
        hits = client.search(name, [row["vector"]], limit=1, output_fields=["label"])[0]
        milliseconds.append(1e3 * (time.perf_counter() - began))
        first += hits[0]["id"] == row["id"]
    print(f"{rows} rows, {first} of {len(asked)} found first, {median(milliseconds):.1f} ms")
    client.close()


if __name__ == "__main__":
    main()
