"""The rows that ``npair bulk`` writes: ``part-*.parquet`` in the output's folder."""

from __future__ import annotations

import pyarrow as pa

PREFIX = "part-"
PRECISIONS = {"fp32": pa.float32(), "fp16": pa.float16()}


def schema(dimension: int, precision: str) -> pa.Schema:
    """Return the columns of a row, which stands for one photo.

    id: its name in the list. vector: of unit length, null if the photo was refused. reason: why it
    was refused, in the server's words, else null. model, version, manifest: what embedded it;
    manifest is the SHA-256 of the version's manifest.json, in hexadecimal. piece: which part of the
    list it belongs to; Ray's checkpoints count by it.
    precision: one of PRECISIONS.
    """
    return pa.schema(
        [
            pa.field("id", pa.string(), nullable=False),
            pa.field("vector", pa.list_(PRECISIONS[precision], dimension)),
            pa.field("reason", pa.string()),
            pa.field("model", pa.string(), nullable=False),
            pa.field("version", pa.int64(), nullable=False),
            pa.field("manifest", pa.string(), nullable=False),
            pa.field("piece", pa.int64(), nullable=False),
        ]
    )
