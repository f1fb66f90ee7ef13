"""Read photos, and embed them in batches, several at a time."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from .errors import InvalidPhotoError, RequestTooLargeError
from .results import Embedded, Vectors

if TYPE_CHECKING:
    from .client import NpairClient

IN_FLIGHT = 4  # batches under way, so that no instance of the server waits for the next


class Readable(Protocol):
    """An open binary file, or what reads a photo when its turn comes."""

    def read(self) -> bytes: ...


Photo = str | os.PathLike[str] | bytes | bytearray | memoryview | Readable


class EmbeddingStream:
    """The results of NpairClient.stream, to iterate over once.

    unanswered: number of photos by index of the first, of each batch that has no answer (yet).
    """

    def __init__(self, client: NpairClient, photos: Iterable[Photo]) -> None:
        self._client = client
        self._photos = photos
        self._version = client.version
        self.unanswered: dict[int, int] = {}

    @property
    def version(self) -> str:
        """The version of the first answer, to which later batches are pinned.

        Raises: LookupError before that.
        """
        if self._version is None:
            raise LookupError("no photo was embedded yet")
        return self._version

    def __iter__(self) -> Iterator[Embedded]:
        pending: deque[Future[list[Embedded]]] = deque()
        pool = ThreadPoolExecutor(IN_FLIGHT)
        try:
            for start, batch in self._batches():
                if self._version is None or start == 0:  # a single batch needs no thread
                    yield from self._results(start, batch)
                    continue
                if len(pending) == IN_FLIGHT:
                    yield from pending.popleft().result()
                pending.append(pool.submit(self._results, start, batch))
            while pending:
                yield from pending.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _batches(self) -> Iterator[tuple[int, list[bytes | str]]]:
        """Yield the index of each batch's first photo, and its photos: bytes or why not."""
        batch: list[bytes | str] = []
        start = size = 0
        for photo in self._photos:
            content: bytes | str
            try:
                content = read(photo)
            except OSError as error:
                content = f"cannot be read: {error.strerror or error}"
            except ValueError as error:  # a Readable's
                content = str(error)
            full = len(batch) == self._client.batch_size
            if batch and (full or size + len(content) > self._client.batch_bytes):
                yield start, batch
                start, batch, size = start + len(batch), [], 0
            batch.append(content)
            size += len(content)
        if batch:
            yield start, batch

    def _results(self, start: int, batch: Sequence[bytes | str]) -> list[Embedded]:
        """Embed a batch; if photos are refused, send the others again."""
        self.unanswered[start] = len(batch)
        reasons = {
            index: content for index, content in enumerate(batch) if isinstance(content, str)
        }
        vectors: dict[int, Vectors] = {}
        while rest := [index for index in range(len(batch)) if index not in reasons | vectors]:
            photos: Any = [batch[index] for index in rest]
            try:
                answer = self._client._infer(photos, self._version, self._client.retries)
            except InvalidPhotoError as error:
                reasons |= {rest[index]: reason for index, reason in error.reasons.items()}
            except RequestTooLargeError as error:
                if len(rest) > 1:
                    raise
                reasons[rest[0]] = str(error)
            else:
                self._version = answer.version
                vectors = dict(zip(rest, answer.vectors, strict=True))
        del self.unanswered[start]
        return [Embedded(start + i, vectors.get(i), reasons.get(i)) for i in range(len(batch))]


def read(photo: Photo) -> bytes:
    if isinstance(photo, bytes | bytearray | memoryview):
        return bytes(photo)
    if isinstance(photo, str | os.PathLike):
        return Path(photo).read_bytes()
    content = photo.read() if hasattr(photo, "read") else None
    if not isinstance(content, bytes):
        kind = type(photo).__name__
        raise TypeError(f"a photo is a path, bytes or an open binary file, not {kind}")
    return content
