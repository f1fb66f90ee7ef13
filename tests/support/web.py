"""The service of ``npair web``, and plain HTTP to call it."""

from __future__ import annotations

import http.client
import json
import socket
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import uvicorn

from npair.client import NpairClient
from npair.web.app import create_app
from npair.web.search import Search
from npair.web.server import LOOPBACK, configured


class Answer(NamedTuple):
    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def reason(self) -> str:
        return str(self.json["error"]["message"])


@contextmanager
def serving(
    gallery: Path, server: str, *, key: str = "", photos: Path | None = None
) -> Iterator[str]:
    """Run the service in a thread, as ``npair web`` configures it; yield its URL."""
    search = Search(gallery, NpairClient(server, retries=0), photos)
    app = create_app(search, hosts=LOOPBACK, key=key)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        web = uvicorn.Server(configured(app))
        thread = threading.Thread(target=web.run, args=([listener],))
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            web.should_exit = True
            thread.join(30)


def call(
    url: str,
    path: str,
    body: bytes | Iterable[bytes] | None = None,
    headers: Mapping[str, str] = {},
    method: str = "",
) -> Answer:
    """Make a request, POST if there is a body; an iterable body is sent in chunks."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=30)
    method = method or ("GET" if body is None else "POST")
    try:
        with suppress(ConnectionError):  # refused before all of the body was sent
            connection.request(method, path, body, dict(headers))
        answer = connection.getresponse()
        try:
            content = answer.read()
        except http.client.IncompleteRead as error:  # reset, because bytes came after the refusal
            content = error.partial
        return Answer(answer.status, dict(answer.headers.items()), content)
    finally:
        connection.close()
