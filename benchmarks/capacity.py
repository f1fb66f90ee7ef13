"""What embedding a great number of photos takes, derived from what benchmarks/bulk.py measured.

    PYTHONPATH=model/api .venv/bin/python benchmarks/capacity.py --rate 328 --megabytes 1008

Prints a table in Markdown. Bytes of a row are measured here, from a piece of random vectors. The
reads of S3 are what tests/bulk counts.
"""

from __future__ import annotations

import argparse

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from npair.bulk.schema import DICTIONARIES, PRECISIONS, schema
from npair.releasing.tune import markdown

DIMENSION, PIECE = 128, 1000


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--photos", type=float, default=1e9, help="(%(default)g)")
    add("--cores", type=int, default=1000, help="that embed (%(default)s)")
    add("--rate", type=float, required=True, help="photos/s of a core")
    add("--by-path", type=float, default=2000, help="reads of S3 a thousand photos (%(default)g)")
    add("--by-shard", type=float, default=2, help="the same in shards of a thousand (%(default)g)")
    add("--megabytes", type=float, required=True, help="of memory for a core")
    print(table(parser.parse_args()))


def table(measured: argparse.Namespace) -> str:
    photos, seconds = measured.photos, measured.photos / measured.rate
    rows = [
        ["core hours", f"{seconds / 3600:,.0f}"],
        [f"hours on {measured.cores:,} cores", f"{seconds / 3600 / measured.cores:.1f}"],
        [
            f"memory of {measured.cores:,} cores",
            f"{measured.cores * measured.megabytes / 1e3:,.0f} GB",
        ],
        ["reads of S3, by paths", f"{photos * measured.by_path / 1000:.1e}"],
        ["reads of S3, in shards", f"{photos * measured.by_shard / 1000:.1e}"],
        *(
            [f"vectors in {precision}", f"{photos * row_bytes(precision) / 1e9:,.0f} GB"]
            for precision in PRECISIONS
        ),
    ]
    return markdown([f"{photos:.0e} photos", ""], rows)


def row_bytes(precision: str) -> float:
    """Bytes of a row in a file of one piece."""
    columns = schema(DIMENSION, precision)
    numbers = np.random.default_rng(0).standard_normal(PIECE * DIMENSION) / np.sqrt(DIMENSION)
    vector = columns.field("vector").type
    table = pa.table(
        {
            "id": [f"00000.tar/{row:09}.jpg" for row in range(PIECE)],
            "vector": pa.FixedSizeListArray.from_arrays(
                pa.array(numbers.astype(vector.value_type.to_pandas_dtype())), type=vector
            ),
            "reason": [None] * PIECE,
            "model": ["npair"] * PIECE,
            "version": [13] * PIECE,
            "manifest": ["0" * 64] * PIECE,
            "piece": [0] * PIECE,
        },
        schema=columns,
    )
    file = pa.BufferOutputStream()
    pq.write_table(table, file, use_dictionary=DICTIONARIES)
    return float(len(file.getvalue()) / PIECE)


if __name__ == "__main__":
    main()
