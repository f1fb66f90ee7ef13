"""Check host, origin and size before a request is read, and secure the headers of its answer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from npair.web.refusals import RefusedError, answer

BODY_SECONDS = 30.0  # for the whole body, so that slow senders do not hold memory
SMALL = 65_536  # bytes of a body where none is expected

_POLICY = {
    "default-src": "'none'",
    "script-src": "'self'",
    "style-src": "'self'",
    "img-src": "'self' blob: data:",
    "connect-src": "'self'",
    "base-uri": "'none'",
    "form-action": "'none'",
    "frame-ancestors": "'none'",
}
SECURITY = {
    "Content-Security-Policy": "; ".join(f"{name} {value}" for name, value in _POLICY.items()),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class Guard:
    """Refuses what no route should see, before a body is read.

    hosts: names that the Host header may have. A site that points its own name at this address
    (DNS rebinding) would otherwise be of the same origin as this service.
    limits: the largest body by path, in bytes.
    """

    def __init__(self, app: ASGIApp, hosts: frozenset[str], limits: Mapping[str, int]) -> None:
        self.app, self.hosts, self.limits = app, hosts, limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        headers = Headers(scope=scope)
        limit = self.limits.get(scope["path"], SMALL)
        body = _Body(receive, limit)
        sends_body = "transfer-encoding" in headers or headers.get("content-length", "0") != "0"

        async def secured(message: Message) -> None:
            if message["type"] == "http.response.start":
                answered = MutableHeaders(scope=message)
                for name, value in SECURITY.items():
                    answered.setdefault(name, value)
                if sends_body and not body.complete:
                    answered["Connection"] = "close"  # or uvicorn would read the rest
            await send(message)

        try:
            self._check(scope["method"], headers, limit)
        except RefusedError as refused:
            await answer(refused)(scope, receive, secured)
        else:
            await self.app(scope, body, secured)

    def _check(self, method: str, headers: Headers, limit: int) -> None:
        host = headers.get("host", "").lower()
        try:
            name = urlsplit(f"//{host}").hostname
        except ValueError:
            name = None
        if name not in self.hosts:
            message = "this service does not go by the name in the Host header; see --allow-host"
            raise RefusedError(400, message, param="Host", code="wrong_host")
        origin = headers.get("origin")
        foreign = origin is not None and origin.partition("://")[2].lower() != host
        if method not in ("GET", "HEAD") and foreign:
            message = "requests of pages from elsewhere are refused"
            raise RefusedError(403, message, param="Origin", code="cross_origin")
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > limit:
            raise _too_large(limit)


class _Body:
    """Receives a body of at most ``limit`` bytes within BODY_SECONDS, despite its header."""

    def __init__(self, receive: Receive, limit: int) -> None:
        self._receive, self._limit = receive, limit
        self._size, self.complete = 0, False
        self._deadline = time.monotonic() + BODY_SECONDS

    async def __call__(self) -> Message:
        if self.complete:  # only a disconnection can come
            return await self._receive()
        try:
            left = self._deadline - time.monotonic()
            message = await asyncio.wait_for(self._receive(), left)
        except asyncio.TimeoutError:
            slow = f"the body did not arrive within {BODY_SECONDS:g} s"
            raise RefusedError(408, slow, code="slow_body") from None
        self._size += len(message.get("body", b""))
        self.complete = not message.get("more_body", False)
        if self._size > self._limit:
            raise _too_large(self._limit)
        return message


def _too_large(limit: int) -> RefusedError:
    return RefusedError(413, f"the body has more than {limit} bytes", code="too_large")
