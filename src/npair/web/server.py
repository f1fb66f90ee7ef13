"""Run the service: where it listens, and what it demands there."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import re
import socket
import sys
from collections.abc import Collection

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from npair.client import environment
from npair.gallery.gallery import Gallery
from npair.gallery.location import GalleryError
from npair.web.app import create_app
from npair.web.search import Search

LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
SHORTEST_KEY = 32  # characters; `openssl rand -hex 32` gives 64
DRAIN = 20  # seconds for requests under way to end after SIGTERM
CONNECTIONS = 256
HEAD_SECONDS = 10.0  # for the head of a request


class PromptProtocol(H11Protocol):
    """Closes connections that do not send the head of a request within HEAD_SECONDS.

    uvicorn has no limit for it, so that CONNECTIONS silent ones would keep everyone else out.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._late.cancel()
        elif self._late.cancelled():
            self._await_head()

    def _await_head(self) -> None:
        self._late = self.loop.call_later(HEAD_SECONDS, self.transport.close)


def serve(search: Search, *, host: str, port: int, allowed: Collection[str]) -> None:
    """Serve until SIGTERM or Ctrl-C, and then end what is under way.

    host: an address; port: 0 chooses one. allowed: names for the Host header besides loopback's
    and the address.
    Raises: ValueError if a key is needed or too short, OSError if it cannot listen there.
    """
    key = given_key()
    if not key and not _is_loopback(host):
        raise ValueError(
            f"anyone who reaches {host} could search your photos: set NPAIR_WEB_KEY or"
            " NPAIR_WEB_KEY_FILE, for example by: openssl rand -hex 32"
        )
    hosts = LOOPBACK | {name.lower() for name in (host, *allowed)}
    app = create_app(search, hosts=hosts, key=key)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family)
    except OSError as error:
        reason = error.strerror or error
        raise OSError(f"cannot listen on port {port} of {host}: {reason}") from error
    with listener:
        try:
            Gallery(search.folder)
        except GalleryError as error:  # looked for again at every request
            print(f"npair: {error}", file=sys.stderr)
        name = f"[{host}]" if ":" in host else host
        print(f"npair: http://{name}:{listener.getsockname()[1]}", file=sys.stderr, flush=True)
        with contextlib.suppress(KeyboardInterrupt):  # uvicorn raises the signal again
            uvicorn.Server(configured(app)).run([listener])


def configured(app: ASGIApp) -> uvicorn.Config:
    """Configure uvicorn for an application."""
    return uvicorn.Config(
        app,
        http=PromptProtocol,
        log_level="warning",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        ws="none",
        limit_concurrency=CONNECTIONS,
        timeout_graceful_shutdown=DRAIN,
    )


def given_key() -> str:
    """Read the key: the content of the file NPAIR_WEB_KEY_FILE, else NPAIR_WEB_KEY, else "".

    Raises: ValueError if the file cannot be read, or the key is too short or cannot be a header.
    """
    name, key = environment.secret("NPAIR_WEB_KEY")
    if (key or name.endswith("_FILE")) and not re.fullmatch(f"[!-~]{{{SHORTEST_KEY},}}", key):
        raise ValueError(
            f"{name} must hold at least {SHORTEST_KEY} printable ASCII characters without blanks,"
            " for example of: openssl rand -hex 32"
        )
    return key


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
