"""Make traffic for a server and measure its answers: one photo per request, over HTTP."""

from __future__ import annotations

import asyncio
import itertools
import re
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple
from urllib.parse import urlsplit

import numpy as np

LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class TrafficError(RuntimeError):
    """The server refused a photo or closed the connection."""


class FullError(TrafficError):
    """The server refused a photo because too many requests wait."""


class Measurement(NamedTuple):
    """rate: answers per second. p50, p99: percentiles of the latency, in milliseconds."""

    rate: float
    p50: float
    p99: float


def closed(url: str, photos: Sequence[bytes], connections: int, seconds: float) -> Measurement:
    """Send photos from as many clients as connections, each with one request at a time.

    Raises: TrafficError, OSError.
    """
    return asyncio.run(_closed(url, photos, connections, seconds))


def paced(url: str, photos: Sequence[bytes], rate: float, seconds: float) -> Measurement:
    """Send ``rate`` photos per second on average, without waiting for answers.

    The intervals are exponential, the same on every call. Raises: TrafficError, OSError.
    """
    return asyncio.run(_paced(url, photos, rate, seconds))


async def _closed(
    url: str, photos: Sequence[bytes], connections: int, seconds: float
) -> Measurement:
    requests, latencies = _requests(url, photos), list[float]()
    start = time.perf_counter()

    async def client() -> None:
        connection = await _connect(url)
        while (sent := time.perf_counter()) < start + seconds:
            await _ask(connection, next(requests))
            latencies.append(time.perf_counter() - sent)
        connection[1].close()

    await asyncio.gather(*(client() for _ in range(connections)))
    return _summary(latencies, time.perf_counter() - start)


async def _paced(url: str, photos: Sequence[bytes], rate: float, seconds: float) -> Measurement:
    requests, latencies, free = _requests(url, photos), list[float](), list[Connection]()
    gaps = np.random.default_rng(0).exponential(1 / rate, max(1, round(rate * seconds)))
    start = time.perf_counter()

    async def client() -> None:
        sent = time.perf_counter()
        connection = free.pop() if free else await _connect(url)
        await _ask(connection, next(requests))
        latencies.append(time.perf_counter() - sent)
        free.append(connection)

    clients = []
    for due in start + np.cumsum(gaps):
        await asyncio.sleep(due - time.perf_counter())
        clients.append(asyncio.create_task(client()))
    await asyncio.gather(*clients)
    for _, writer in free:
        writer.close()
    return _summary(latencies, time.perf_counter() - start)


def _requests(url: str, photos: Sequence[bytes]) -> Iterator[bytes]:
    head = (
        f"POST /v2/models/npair/infer HTTP/1.1\r\nHost: {urlsplit(url).netloc}\r\n"
        "Inference-Header-Content-Length: 0\r\n"
    )
    return itertools.cycle(
        [f"{head}Content-Length: {len(photo)}\r\n\r\n".encode() + photo for photo in photos]
    )


async def _connect(url: str) -> Connection:
    parts = urlsplit(url)
    return await asyncio.open_connection(parts.hostname, parts.port)


async def _ask(connection: Connection, request: bytes) -> None:
    """Send a request and read its answer.

    At the rate that two cores reach, this takes a twentieth of a core, a client library a third.
    """
    reader, writer = connection
    writer.write(request)
    try:
        head = await reader.readuntil(b"\r\n\r\n")
        length = LENGTH.search(head)
        body = await reader.readexactly(int(length[1]) if length else 0)
    except asyncio.IncompleteReadError as error:
        raise TrafficError("the server closed the connection") from error
    if not head.startswith(b"HTTP/1.1 200"):
        status = head.partition(b"\r\n")[0].decode(errors="replace")
        kind = FullError if head.startswith(b"HTTP/1.1 503") else TrafficError
        raise kind(f"the server answered {status}: {body[:300].decode(errors='replace')}")


def _summary(latencies: Sequence[float], seconds: float) -> Measurement:
    p50, p99 = np.percentile(latencies, (50, 99)) * 1e3
    return Measurement(len(latencies) / seconds, float(p50), float(p99))
