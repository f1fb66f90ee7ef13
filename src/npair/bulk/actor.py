"""An actor of a bulk job: one core that reads pieces of a list, embeds them, and writes rows."""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import socket
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import ray

from npair.bulk import BulkError
from npair.bulk.output import Output
from npair.bulk.progress import Done
from npair.bulk.schema import schema
from npair.bulk.source import Source
from npair.bulk.version import Version

GROUP = 32  # photos that are embedded while the next ones are read

Item = TypeVar("Item")


class Embed:
    """Turns pieces into rows of an output, by the version's own code."""

    def __init__(self, version: Any, source: Source, out: str, precision: str) -> None:
        """version: a reference to a Version. out: the output's location."""
        self.version: Version = ray.get(version)
        self.source, self.output = source, Output(out)
        manifest = self.version.manifest
        self.made_by = (manifest.model, manifest.version, self.version.manifest_sha256)
        self.schema = schema(manifest.embedding.dimension, precision)
        self.stack, self.fault = contextlib.ExitStack(), ""
        try:
            self.embedder = self.stack.enter_context(self.version.embedder())
        except Exception as error:  # published code has exception classes of its own
            # Raised by the first call, since Ray says more of an error there than of one here.
            reason = re.sub(r"\S*/npair-bulk-\S+: ", "", str(error))
            self.fault = f"{socket.gethostname()} cannot run the version: {reason}"
        self.began = time.monotonic()

    def __call__(self, pieces: pa.Table) -> pa.Table:
        """Embed and write pieces, the columns of output.PLAN. Returns: those of progress.Done."""
        if self.fault:
            raise BulkError(self.fault)
        return pa.Table.from_pylist([self._embed(**piece) for piece in pieces.to_pylist()])

    def _embed(self, piece: int, size: int, content: str) -> dict[str, float]:
        limits = self.version.limits
        ids: list[str] = []
        answers: list[Any] = []
        photos = self.source.photos(json.loads(content), limits.max_bytes)
        for group in ahead(grouped(photos, GROUP)):
            read = [photo.read for photo in group if isinstance(photo.read, bytes)]
            vectors = iter(self.embedder.embed_photos(read, limits))
            ids += [photo.id for photo in group]
            answers += [
                next(vectors) if isinstance(photo.read, bytes) else photo.read for photo in group
            ]
        rows = self._rows(piece, ids, answers)
        self.output.write(piece, rows)
        refused = len(rows) - rows["reason"].null_count
        return Done(len(rows), refused, size, time.monotonic() - self.began)._asdict()

    def _rows(self, piece: int, ids: Sequence[str], answers: Sequence[Any]) -> pa.Table:
        """Make rows of embeddings, float32 [D], and of reasons."""
        kind = self.schema.field("vector").type
        vectors = np.zeros((len(ids), kind.list_size), kind.value_type.to_pandas_dtype())
        reasons: list[str | None] = [None] * len(ids)
        for row, answer in enumerate(answers):
            if isinstance(answer, np.ndarray):
                vectors[row] = answer
            else:
                reasons[row] = str(answer)
        model, version, manifest = self.made_by
        columns = {
            "id": ids,
            "vector": pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), type=kind),
            "reason": reasons,
            "model": [model] * len(ids),
            "version": [version] * len(ids),
            "manifest": [manifest] * len(ids),
            "piece": [piece] * len(ids),
        }
        return pa.table(columns, schema=self.schema)


def ahead(items: Iterable[Item]) -> Iterator[Item]:
    """Yield items while a thread gets the next one."""
    remaining, end = iter(items), object()
    with ThreadPoolExecutor(1) as thread:
        following = thread.submit(next, remaining, end)
        while (item := following.result()) is not end:
            following = thread.submit(next, remaining, end)
            yield item  # type: ignore[misc]


def grouped(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Yield lists of so many items; the last may be shorter."""
    remaining = iter(items)
    while group := list(itertools.islice(remaining, size)):
        yield group
