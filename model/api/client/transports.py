"""One connection to a model, over HTTP or gRPC."""

from __future__ import annotations

import contextlib
import http.client
import io
import json
import os
import socket
import ssl
import time
from collections.abc import Mapping, Sequence
from email.message import Message
from functools import partial
from typing import Any, Protocol
from urllib.parse import SplitResult, quote, urlsplit

import numpy as np
import tritonclient.grpc
import tritonclient.http
from tritonclient.utils import InferenceServerException

from .errors import mapped_errors, reading
from .results import Embeddings

StrPath = str | os.PathLike[str]

CONNECT_SECONDS = 5.0
JSON_LENGTH = "Inference-Header-Content-Length"  # the bytes of JSON before the tensors


class Transport(Protocol):
    """A connection to a model of one server, for one call at a time. Calls raise NpairErrors."""

    def infer(self, photos: Sequence[bytes], version: str, request: str) -> Embeddings:
        """Embed photos by a version; the server chooses if it is empty. The shape is unchecked."""

    def versions(self) -> list[str] | None:
        """Get the served versions, or None if the server does not tell."""

    def parameters(self) -> dict[str, str]:
        """Get the parameters of the model's configuration."""

    def reconnect(self) -> None:
        """Give up the connection; the next call takes a new one."""

    def close(self) -> None: ...

    def abort(self) -> None:
        """End the call that another thread has under way."""


class HttpTransport:
    """tritonclient's requests over the standard library's connection.

    tritonclient's own is gevent's, which other threads and forked processes cannot use.

    tls: what https:// needs; the system's authorities if it is None.
    address: one of the addresses of the URL's host, to reach this server and no other.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        timeout: float,
        headers: Mapping[str, str],
        tls: ssl.SSLContext | None = None,
        address: str | None = None,
    ) -> None:
        parts = urlsplit(url)
        self._connection = _HttpConnection(parts, address, tls)
        self._path, self._headers, self._aborted = parts.path.rstrip("/"), headers, False
        self._timeout = timeout
        self.model, self._model = model, f"/v2/models/{quote(model)}"

    def infer(self, photos: Sequence[bytes], version: str, request: str) -> Embeddings:
        triton = tritonclient.http.InferenceServerClient
        tensor = _tensor(tritonclient.http, photos)
        body, length = triton.generate_request_body([tensor], request_id=request)
        headers = {"Content-Type": "application/octet-stream", JSON_LENGTH: str(length)}
        pinned = f"/versions/{quote(version)}" if version else ""
        with mapped_errors(self.model, request):
            path = f"{self._model}{pinned}/infer"
            content, received = self.request("POST", path, body, headers)
            with reading():
                answer = triton.parse_response_body(content, header_length=received[JSON_LENGTH])
                version = str(answer.get_response()["model_version"])
                return Embeddings(answer.as_numpy("EMBEDDING"), version)

    def versions(self) -> list[str] | None:
        with mapped_errors(self.model):
            content, _ = self.request("GET", self._model)
            with reading():
                versions = dict(json.loads(content)).get("versions")
                return None if versions is None else list(map(str, versions))

    def parameters(self) -> dict[str, str]:
        with mapped_errors(self.model):
            content, _ = self.request("GET", f"{self._model}/config")
            with reading():
                parameters = dict(json.loads(content)).get("parameters", {})
                return {key: value.get("string_value", "") for key, value in parameters.items()}

    def request(
        self, method: str, path: str, body: bytes | None = None, headers: Mapping[str, str] = {}
    ) -> tuple[bytes, Message]:
        """Make a request and return the answer's body and headers.

        Raises: InferenceServerException for a status other than 200, OSError, HTTPException.
        """
        self._connection.deadline = time.monotonic() + self._timeout
        return self._exchange(method, self._path + path, body, {**self._headers, **headers})

    def _exchange(
        self, method: str, path: str, body: bytes | None, headers: Mapping[str, str]
    ) -> tuple[bytes, Message]:
        kept = self._connection.sock is not None
        try:
            if not kept:
                self._connection.connect()
            if self._aborted:
                raise ConnectionAbortedError("the client is closed")
            with contextlib.suppress(ConnectionError):  # a proxy may refuse a body it is still sent
                self._connection.request(method, path, body, headers)
            answer = self._connection.getresponse()
            content = answer.read()
            if not content and answer.getheader("Content-Length") is None:
                # The connection broke off within the headers; http.client takes that for their end.
                raise http.client.IncompleteRead(content)
        except BaseException as error:
            self._connection.close()
            closed = isinstance(error, ConnectionError | ssl.SSLEOFError)
            if kept and closed and not self._aborted:  # the server closed it while it was idle
                return self._exchange(method, path, body, headers)
            raise
        if answer.status != http.client.OK:
            try:
                reason = str(json.loads(content)["error"])
            except (ValueError, LookupError, TypeError):  # a proxy's page
                page = content.lstrip().startswith(b"<")
                said = "a proxy's page" if page else content[:200].decode(errors="replace")
                reason = f"{answer.status} {answer.reason}: {said}"
            raise InferenceServerException(reason, status=str(answer.status))
        return content, answer.headers

    def close(self) -> None:
        self._connection.close()

    reconnect = close  # requests connect if need be

    def abort(self) -> None:
        self._aborted = True
        if (connected := self._connection.sock) is not None:
            with contextlib.suppress(OSError):
                socket.socket.shutdown(connected, socket.SHUT_RDWR)  # closing alone wakes nobody


class _HttpConnection(http.client.HTTPConnection):
    """A connection to an address; the Host header and the certificate are those of the URL.

    deadline: when the request must be done, by the monotonic clock. A socket's timeout is that of
    one call, and starts again with each byte of a slow answer.
    """

    sock: Any
    deadline: float

    def __init__(self, url: SplitResult, address: str | None, tls: ssl.SSLContext | None) -> None:
        self._tls = None
        if url.scheme == "https":
            self.default_port = http.client.HTTPS_PORT
            self._tls = tls or ssl.create_default_context()
        super().__init__(url.hostname or "", url.port)
        self._address = address or self.host

    def left(self) -> float:
        """Return the seconds until the deadline. Raises: TimeoutError."""
        if (left := self.deadline - time.monotonic()) <= 0:
            raise TimeoutError("timed out")
        return left

    def connect(self) -> None:
        limit = min(self.left(), CONNECT_SECONDS)
        try:
            self.sock = socket.create_connection((self._address, self.port), limit)
        except TimeoutError as error:
            raise TimeoutError(f"no connection within {limit:.2g} s") from error
        self.sock.settimeout(self.left())
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self._tls is not None:
            self.sock = self._tls.wrap_socket(self.sock, server_hostname=self.host)

    def send(self, data: Any) -> None:
        self.sock.settimeout(self.left())
        super().send(data)

    def response_class(self, sock: socket.socket, **options: Any) -> http.client.HTTPResponse:  # type: ignore[override]
        answer = http.client.HTTPResponse(sock, **options)
        answer.fp.close()
        answer.fp = io.BufferedReader(_InTime(self, sock))
        return answer


class _InTime(io.RawIOBase):
    """Reads from a connection's socket, and waits no longer than until the deadline."""

    def __init__(self, connection: _HttpConnection, sock: socket.socket) -> None:
        self._connection, self._sock = connection, sock
        self._raw = sock.makefile("rb", buffering=0)  # the socket stays open until it is closed

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        self._sock.settimeout(self._connection.left())
        return self._raw.readinto(buffer)

    def close(self) -> None:
        self._raw.close()
        super().close()


class GrpcTransport:
    """A gRPC channel of tritonclient."""

    def __init__(
        self,
        url: str,
        model: str,
        *,
        timeout: float,
        headers: Mapping[str, str],
        ca: StrPath | None = None,
        cert: tuple[StrPath, StrPath] | None = None,
    ) -> None:
        parts = urlsplit(url)
        certificate, key = cert or (None, None)
        system = ssl.get_default_verify_paths().cafile  # as for https://; gRPC brings its own
        self._connect = partial(
            tritonclient.grpc.InferenceServerClient,
            parts.netloc,
            ssl=parts.scheme == "grpcs",
            root_certificates=ca or system,
            certificate_chain=certificate,
            private_key=key,
            channel_args=[
                # The defaults look for a server that was away every two minutes, and keep the
                # connection to a machine that is gone for a quarter of an hour.
                ("grpc.max_reconnect_backoff_ms", 1000),
                ("grpc.keepalive_time_ms", 300_000),
                ("grpc.keepalive_timeout_ms", 10_000),  # also for unacknowledged data
                ("grpc.use_local_subchannel_pool", 1),  # a new channel is a new connection
                ("grpc.enable_http_proxy", 0),
            ],
        )
        self._channel = self._connect()
        self.model, self._options = model, {"client_timeout": timeout, "headers": headers}

    def infer(self, photos: Sequence[bytes], version: str, request: str) -> Embeddings:
        tensor = _tensor(tritonclient.grpc, photos)
        with mapped_errors(self.model, request):
            answer = self._channel.infer(
                self.model, [tensor], model_version=version, request_id=request, **self._options
            )
            with reading():
                version = answer.get_response().model_version
                return Embeddings(answer.as_numpy("EMBEDDING"), version)

    def versions(self) -> list[str] | None:
        with mapped_errors(self.model):
            metadata = self._channel.get_model_metadata(self.model, **self._options)
            return list(metadata.versions) or None

    def parameters(self) -> dict[str, str]:
        with mapped_errors(self.model):
            answer = self._channel.get_model_config(self.model, **self._options)
            return {name: each.string_value for name, each in answer.config.parameters.items()}

    def reconnect(self) -> None:
        self.close()
        self._channel = self._connect()

    def close(self) -> None:
        self._channel.close()

    abort = close


def _tensor(protocol: Any, photos: Sequence[bytes]) -> Any:
    tensor = protocol.InferInput("IMAGE", [len(photos), 1], "BYTES")
    tensor.set_data_from_numpy(np.array(photos, dtype=np.object_).reshape(-1, 1))
    return tensor


def tls_context(
    scheme: str, ca: StrPath | None, cert: tuple[StrPath, StrPath] | None
) -> ssl.SSLContext | None:
    """Load certificates, if there are any or the scheme is https. Raises: ValueError."""
    if scheme != "https" and ca is None and cert is None:
        return None
    try:
        context = ssl.create_default_context(cafile=ca)
    except OSError as error:
        problem = f"ca must be a file of certificates (PEM), and {ca} is not: {error}"
        raise ValueError(problem) from error
    try:
        if cert is not None:
            context.load_cert_chain(*cert, password="")
    except OSError as error:
        problem = f"cert must be a certificate and its key (PEM), and {cert} are not: {error}"
        raise ValueError(problem) from error
    return context
