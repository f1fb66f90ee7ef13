"""An HTTP server on a real socket that gives inference requests the answers a test chooses."""

from __future__ import annotations

import http.server
import json
import math
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from npair.client import NpairClient

PHOTOS = list[bytes]
Answer = Callable[[PHOTOS, str], tuple[int, str]]  # (photos, path) to (status, body)


def embeddings(photos: PHOTOS, version: str = "1", unit: bool = False) -> tuple[int, str]:
    """Answer with vectors whose first component is the length of their photo.

    unit: it is a tenth of that, and the second makes the vector's length 1.
    """
    data = list[float]()
    for photo in photos:
        first = len(photo) / 10 if unit else float(len(photo))
        data += [first, math.sqrt(1 - first**2) if unit else 0.0, *[0.0] * 126]
    output = {"name": "EMBEDDING", "datatype": "FP32", "shape": [len(photos), 128], "data": data}
    return 200, json.dumps({"model_version": version, "outputs": [output]})


def of_version(version: str, unit: bool = False) -> Answer:
    """Embed as this version; answer other requests with an empty object."""
    return lambda photos, _: embeddings(photos, version, unit) if photos else (200, "{}")


def always(status: int, body: str) -> Answer:
    return lambda *_: (status, body)


echo = of_version("1")
unit = of_version("1", unit=True)
DENIED = always(401, '{"error": "a key is needed"}')
UNHEALTHY = always(500, '{"error": "stub is not healthy"}')


def changing(after: int) -> Answer:
    """Serve version 1 for the first ``after`` batches, then version 2."""
    left = iter(range(after))

    def answer(photos: PHOTOS, path: str) -> tuple[int, str]:
        if path.endswith("/models/npair"):
            return 200, '{"name": "npair", "versions": ["2"]}'
        if path.endswith("/config"):
            told = {"manifest_version": "2", "manifest_sha256": "abc"}
            parameters = {key: {"string_value": value} for key, value in told.items()}
            return 200, json.dumps({"parameters": parameters})
        old = next(left, None) is not None
        if "/versions/1/" in path and not old:
            return 400, '{"error": "Request for unknown model: \'npair\' version 1 is not found"}'
        return embeddings(photos, "1" if old else "2")

    return answer


class FakeServer(http.server.ThreadingHTTPServer):
    """Handles each connection in a thread of its own and records the requests."""

    daemon_threads = True

    def __init__(self, answer: Answer, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.answer = answer
        self.batches: list[PHOTOS] = []
        self.paths: list[str] = []
        self.authorizations: list[str | None] = []


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        assert isinstance(self.server, FakeServer)
        body = self.rfile.read(int(self.headers["Content-Length"]))
        content, photos = body[int(self.headers["Inference-Header-Content-Length"]) :], []
        while content:
            length = int.from_bytes(content[:4], "little")
            photos.append(content[4 : 4 + length])
            content = content[4 + length :]
        self.server.batches.append(photos)
        self.server.paths.append(self.path)
        self.reply(photos)

    def do_GET(self) -> None:
        self.reply([])

    def reply(self, photos: PHOTOS) -> None:
        assert isinstance(self.server, FakeServer)
        self.server.authorizations.append(self.headers["Authorization"])
        status, text = self.server.answer(photos, self.path)
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def serving(
    answer: Answer = echo, tls: ssl.SSLContext | None = None, port: int = 0
) -> Iterator[tuple[str, FakeServer]]:
    """Run a server; yield its URL and the server itself."""
    server = FakeServer(answer, port)
    if tls:
        server.socket = tls.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"{'https' if tls else 'http'}://127.0.0.1:{server.server_port}", server
    server.shutdown()


@contextmanager
def client_of(
    answer: Answer = echo, tls: ssl.SSLContext | None = None, **options: Any
) -> Iterator[tuple[NpairClient, FakeServer]]:
    """Run a server; yield a client of it, made with these options, and the server itself."""
    with serving(answer, tls) as (url, server), NpairClient(url, **options) as client:
        yield client, server
