"""The rows that ``npair bulk`` writes: ``part-*.parquet`` in the output's folder."""

from __future__ import annotations

import pyarrow as pa

# Columns of few values. A dictionary of a vector's numbers would take half as much space again.
DICTIONARIES = ["reason", "model", "version", "manifest", "piece"]
PRECISIONS = {"fp32": pa.float32(), "fp16": pa.float16()}


def schema(dimension: int, precision: str) -> pa.Schema:
    """Return the columns of a row, which stands for one photo.

    id: its name in the list. reason: why the photo was refused, in the server's words, else null.
    vector: of unit length, or zeros if there is a reason, since pyarrow does not read nulls of this
    type from Parquet. model, version, manifest: what embedded it; manifest is the SHA-256 of the
    version's manifest.json, in hexadecimal. piece: the part of the list that it belongs to; its
    file is named by it.
    precision: one of PRECISIONS.
    """
    return pa.schema(
        [
            pa.field("id", pa.string(), nullable=False),
            pa.field("vector", pa.list_(PRECISIONS[precision], dimension), nullable=False),
            pa.field("reason", pa.string()),
            pa.field("model", pa.string(), nullable=False),
            pa.field("version", pa.int64(), nullable=False),
            pa.field("manifest", pa.string(), nullable=False),
            pa.field("piece", pa.int64(), nullable=False),
        ]
    )
