"""Vectors as ``npair bulk`` writes them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from npair.client import Vectors

DIMENSION = 128


def units(count: int, seed: int = 0) -> Vectors:
    """Draw unit vectors, float32 [count, 128]."""
    vectors = np.random.default_rng(seed).standard_normal((count, DIMENSION), dtype=np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors


def bulk_file(
    path: Path, vectors: Vectors, *, version: int = 13, refused: int = 0, first: int = 0
) -> Path:
    """Write a file of ``npair bulk``, whose last rows are refused photos without a vector.

    The ids are photos/class 0/0.jpg, photos/class 1/1.jpg and so on, counted from ``first``.
    """
    rows = len(vectors) + refused
    kind = pa.list_(pa.from_numpy_dtype(vectors.dtype), -1 if refused else DIMENSION)
    columns = {
        "id": [f"photos/class {row % 3}/{row}.jpg" for row in range(first, first + rows)],
        "vector": pa.array([*vectors, *[None] * refused], kind),
        "reason": pa.array([None] * len(vectors) + ["not a JPEG"] * refused, pa.string()),
        "model": ["npair"] * rows,
        "version": pa.array([version] * rows, pa.int64()),
        "manifest": [f"{version:064x}"] * rows,
        "piece": pa.array([0] * rows, pa.int64()),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return path
