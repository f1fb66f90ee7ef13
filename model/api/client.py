"""Embed photos with an npair server, over HTTP or gRPC::

    with NpairClient("http://127.0.0.1:8000") as client:
        vectors, version = client.embed(["a.jpg", "b.jpg"])

This file needs numpy and tritonclient[http,grpc] and can be copied alone. With client_cli.py beside
it, ``python client.py`` runs the commands. Exceptions::

    NpairError
    ├── InvalidPhotoError         the server refused photos: .reasons says why, by index
    ├── InvalidRequestError       wrong model, version or server
    │   └── RequestTooLargeError  more bytes than the server, or a proxy before it, accepts
    ├── AccessDeniedError         a proxy before the server wants another API key
    ├── UnavailableError          the model is not served; retries have failed
    │   ├── UnreachableError      nobody answers at the URL
    │   └── VersionGoneError      the model is served, but not in the version the call is pinned to
    ├── RequestTimeoutError       no answer in time; the server may still be working on it
    └── ServerFaultError          the server failed, or its answer makes no sense

Wrong arguments raise ValueError or TypeError, unreadable photos OSError.
"""

from __future__ import annotations

import sys

if __name__ == "__main__":  # before anything is defined: the commands import this file as a library
    from importlib import import_module
    from importlib.util import find_spec

    commands = f"{__package__}.client_cli" if __package__ else "client_cli"
    if find_spec(commands) is None:
        print(
            "client.py: the commands are in client_cli.py; put it beside this file", file=sys.stderr
        )
        sys.exit(2)
    sys.exit(import_module(commands).main())

import asyncio
import contextlib
import http.client
import itertools
import json
import logging
import os
import random
import re
import socket
import ssl
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import KW_ONLY, dataclass, field, fields, replace
from email.message import Message
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar
from urllib.parse import SplitResult, quote, urlsplit

import numpy as np
import numpy.typing as npt
import tritonclient.grpc
import tritonclient.http
from tritonclient.utils import InferenceServerException


class Readable(Protocol):
    """An open binary file, or what reads a photo when its turn comes."""

    def read(self) -> bytes: ...


Answer = TypeVar("Answer")
StrPath = str | os.PathLike[str]
Photo = StrPath | bytes | Readable
Vectors = npt.NDArray[np.float32]

log = logging.getLogger("npair.client")

DEFAULT_URL = "http://127.0.0.1:8000"
IN_FLIGHT = 4  # batches of a stream under way, so that no instance of the server waits for the next
CONNECT_SECONDS = 5.0
BACKOFF_SECONDS = 0.2  # before the first retry, twice as much before each next
MAX_SEARCHES = 8  # new connections on which to look for another server behind the same address
JSON_LENGTH = "Inference-Header-Content-Length"  # the bytes of JSON before the tensors
# Parameters of the model's configuration: the version that was measured, and its thresholds.
THRESHOLD_PARAMETERS = ("thresholds_version", "threshold_far_1_percent", "threshold_far_01_percent")
# The smallest PNG: one white pixel.
PIXEL = bytes.fromhex(
    "89504e470d0a1a0a0000000d49484452000000010000000108000000003a7e9b55"
    "0000000a4944415478da63f80f00010101001cb08c990000000049454e44ae426082"
)


class NpairError(Exception):
    """The root of this client's errors."""


class InvalidPhotoError(NpairError):
    """The server refused photos; ``reasons`` says why, by index in the call's photos."""

    def __init__(self, reasons: dict[int, str]) -> None:
        super().__init__(reasons)  # unformatted: pickle rebuilds the error from it
        self.reasons = reasons

    def __str__(self) -> str:
        return "; ".join(f"photo {index}: {reason}" for index, reason in self.reasons.items())


class InvalidRequestError(NpairError):
    """The server does not understand the call."""


class RequestTooLargeError(InvalidRequestError):
    """The server, or a proxy before it, does not accept a request of this size."""


class AccessDeniedError(NpairError):
    """The API key is missing, wrong, or not allowed to make this call."""


class UnavailableError(NpairError):
    """The model is not served."""


class UnreachableError(UnavailableError):
    """Nobody answers at the URL."""


class VersionGoneError(UnavailableError):
    """The model is served, but not in the version that the call is pinned to."""


class RequestTimeoutError(NpairError):
    """No answer in time."""


class ServerFaultError(NpairError):
    """The server failed; the message ends with the request's id in the server's log."""


class Embeddings(NamedTuple):
    """Unit vectors, float32 [n, 128], in the order of the photos, and the version that made them.

    Do not compare vectors of two versions.
    """

    vectors: Vectors
    version: str


class Thresholds(NamedTuple):
    """Cosines at which photos count as the same product, measured when ``version`` was published.

    At these, 1 % and 0.1 % of the pairs of different products count as the same (false acceptance
    rate, FAR); None if too few pairs were measured.
    """

    version: str
    far_1_percent: float | None
    far_01_percent: float | None


@dataclass(frozen=True)
class Embedded:
    """The outcome of one photo: a vector, float32 [128], or the reason for its absence."""

    index: int
    vector: Vectors | None = None
    reason: str | None = None


@dataclass(eq=False)
class NpairClient:
    """A client of one model, on one server or several behind one address.

    Close it, or use it as a context manager. Threads may share it: every call has a connection to
    itself, which is kept for later calls. A forked process may use its parent's client, on new
    connections; over gRPC, do not fork while another thread has a call under way, which can crash
    the child, and leave GRPC_ENABLE_FORK_SUPPORT unset. A pickled client contains its API key.

    url: http, https, grpc or grpcs://host:port. Proxies named by the environment are not used.
    version: pins a version; if None, each call of embed() stays with the version it first gets.
    timeout: seconds for one request.
    retries: repeats of a request if nobody answers, and of embed() if its version is gone. Each
        takes a new connection, on which a balancer may choose another server.
    batch_size, batch_bytes: limits of one request; a larger photo travels alone.
    ca: certificates (PEM) to trust over https:// and grpcs:// instead of the system's.
    cert: certificate and key (PEM, without password) for a server that asks for one.
    api_key: sent as "Authorization: Bearer KEY", for a proxy before the server.
    Raises: ValueError.
    """

    url: str = DEFAULT_URL
    _: KW_ONLY
    model: str = "npair"
    version: str | None = None
    timeout: float = 30.0
    retries: int = 3
    batch_size: int = 32
    batch_bytes: int = 16_000_000
    ca: StrPath | None = None
    cert: tuple[StrPath, StrPath] | None = None
    api_key: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.username is not None:
            raise ValueError("the URL must not hold a name or password; use api_key")
        try:
            complete = parts.hostname and parts.port != 0
        except ValueError:  # the port is not a number
            complete = False
        if parts.scheme not in ("http", "https", "grpc", "grpcs") or not complete:
            raise ValueError(
                f"the URL must be like http://host:8000 or grpc://host:8001, got {self.url!r}"
            )
        if min(self.batch_size, self.batch_bytes) < 1 or self.timeout <= 0 or self.retries < 0:
            raise ValueError(
                "batch_size, batch_bytes and timeout must be positive, retries must not be negative"
            )
        if self.api_key and not re.fullmatch("[!-~]+", self.api_key):
            raise ValueError("api_key must be printable ASCII without blanks")
        self.version = str(self.version) if self.version else None
        tls = _tls(parts.scheme, self.ca, self.cert)  # for gRPC, only to check ca and cert
        headers = {"authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        options: dict[str, Any] = {"timeout": self.timeout, "headers": headers}
        self._pool = _Pool(
            partial(GrpcTransport, self.url, self.model, ca=self.ca, cert=self.cert, **options)
            if parts.scheme.startswith("grpc")
            else partial(HttpTransport, self.url, self.model, tls=tls, **options)
        )

    def __reduce__(self) -> tuple[Any, ...]:
        arguments = {argument.name: getattr(self, argument.name) for argument in fields(self)}
        return partial(type(self), **arguments), ()

    def __enter__(self) -> NpairClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections and end the calls of other threads; may be called again."""
        self._pool.close()

    def copy(self) -> NpairClient:
        """Make a client with the same arguments and connections of its own."""
        return replace(self)

    def ready(self) -> bool:
        """Check that the model embeds a photo; readiness URLs stay green when inference is dead.

        Raises: AccessDeniedError, which says nothing about the model.
        """
        try:
            self.check()
        except AccessDeniedError:
            raise
        except NpairError:
            return False
        return True

    def check(self, retries: int = 0) -> None:
        """Raise an NpairError with the reason if the model does not embed a photo."""
        self._infer([PIXEL], self.version, retries)

    def thresholds(self) -> Thresholds | None:
        """Get the served version's similarity thresholds, or None. Raises: NpairErrors."""
        parameters = self._parameters()
        version, *cosines = map(parameters.get, THRESHOLD_PARAMETERS)
        if not version:
            return None
        return Thresholds(version, *(float(cosine) if cosine else None for cosine in cosines))

    def manifest_sha256(self, version: str) -> str | None:
        """Get the hash that tells a served version from others of its number, or None.

        Raises: NpairErrors.
        """
        parameters = self._parameters()
        if parameters.get("manifest_version") == version:
            return parameters.get("manifest_sha256")
        return parameters.get(f"manifest_sha256_{version}")  # still served beside a newer version

    def versions(self) -> list[str]:
        """Get the served versions of the model; none if the server does not tell."""
        with self._pool.lend() as transport, contextlib.suppress(RequestTimeoutError):
            return self._versions(transport) or []
        return []

    def embed(self, images: Photo | Iterable[Photo]) -> Embeddings:
        """Embed one photo or many: paths, encoded bytes or open binary files.

        One version makes all vectors: if it is replaced meanwhile, and is not pinned, start over.
        Raises: InvalidPhotoError that names every refused photo, other NpairErrors, OSError for an
        unreadable file, ValueError if there is no photo.
        """
        one = isinstance(images, str | os.PathLike | bytes) or hasattr(images, "read")
        photos: list[Photo] = [images] if one else list(images)  # type: ignore[list-item, arg-type]
        # Files are read once, though a call may start over.
        photos = [_read(photo) if hasattr(photo, "read") else photo for photo in photos]
        for attempt in itertools.count():
            try:
                results = list(stream := self.stream(map(_read, photos)))
                break
            except VersionGoneError:
                if self.version is not None or attempt >= self.retries:
                    raise
                self._pool.back_off(attempt)
        if not results:
            raise ValueError("no photo to embed")
        if reasons := {each.index: each.reason for each in results if each.reason is not None}:
            raise InvalidPhotoError(reasons)
        vectors = np.stack([each.vector for each in results if each.vector is not None])
        return Embeddings(vectors, stream.version)

    def stream(self, images: Iterable[Photo]) -> EmbeddingStream:
        """Embed photos as they come, several batches at a time, and yield Embedded in order.

        A refused or unreadable photo becomes a result with a reason.
        """
        return EmbeddingStream(self, images)

    def _parameters(self) -> dict[str, str]:
        return self._call(lambda transport: transport.parameters(), self.retries)

    def _infer(self, photos: Sequence[bytes], version: str | None, retries: int) -> Embeddings:
        """Embed one batch in one request."""
        request = uuid.uuid4().hex
        answer = self._call(
            lambda transport: transport.infer(photos, version or "", request), retries, version
        )
        shape = np.shape(answer.vectors)
        if len(shape) != 2 or shape[0] != len(photos):
            problem = f"expected {len(photos)} embeddings, got an array of shape {shape}"
        elif version not in (None, answer.version):
            problem = f"asked for version {version}, got {answer.version}"
        else:
            return answer
        raise ServerFaultError(f"{problem} (request {request})")

    def _call(
        self, ask: Callable[[Transport], Answer], retries: int, version: str | None = None
    ) -> Answer:
        """Ask, and retry over other connections if nobody answers or the version is gone.

        Not after a timeout: the server may still be at work, and a retry would add to its load.
        """
        attempt, searches = 0, MAX_SEARCHES if retries else 0
        with self._pool.lend() as transport:
            while True:
                try:
                    return ask(transport)
                except (UnavailableError, InvalidRequestError) as error:
                    self._pool.check_open()
                    served = self._versions(transport) if version else None
                    if isinstance(error, VersionGoneError) or (served and version not in served):
                        if not searches:
                            raise self._gone(version, served) from error
                        searches -= 1
                    elif attempt == retries or isinstance(error, InvalidRequestError):
                        raise
                    else:
                        log.info("%s does not answer (%s); trying again", self.url, error)
                        self._pool.back_off(attempt)
                        attempt += 1
                self._search(transport, version)

    def _search(self, transport: Transport, version: str | None) -> None:
        """Reconnect until a server has the version (any, if None), or nobody tells for a second.

        Raises: VersionGoneError if all servers have other versions.
        """
        others, began = set[str](), time.monotonic()
        for _ in range(MAX_SEARCHES):
            transport.reconnect()
            self._pool.check_open()
            served = self._versions(transport)
            if served is None or version in served or (version is None and served):
                return
            others.update(served)
            if time.monotonic() - began > 1:
                break
        if others:
            raise self._gone(version, others)

    def _gone(self, version: str | None, served: Iterable[str] | None) -> VersionGoneError:
        others = f", but {', '.join(sorted(served))} is" if served else ""
        return VersionGoneError(f"version {version} of model {self.model} is not served{others}")

    def _versions(self, transport: Transport) -> list[str] | None:
        """Get the served versions, or None if the server does not tell.

        Raises: RequestTimeoutError.
        """
        try:
            return transport.versions()
        except UnavailableError:
            return []
        except (InvalidRequestError, AccessDeniedError, ServerFaultError):
            return None


class AsyncNpairClient:
    """NpairClient for asyncio: runs each call in a thread, to its end even if it is cancelled."""

    def __init__(self, url: str = DEFAULT_URL, **options: Any) -> None:
        """Take NpairClient's arguments."""
        self._client = NpairClient(url, **options)

    async def __aenter__(self) -> AsyncNpairClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        self._client.close()

    async def close(self) -> None:
        """See NpairClient.close."""
        self._client.close()

    async def ready(self) -> bool:
        """See NpairClient.ready."""
        return await asyncio.to_thread(self._client.ready)

    async def thresholds(self) -> Thresholds | None:
        """See NpairClient.thresholds."""
        return await asyncio.to_thread(self._client.thresholds)

    async def embed(self, images: Photo | Iterable[Photo]) -> Embeddings:
        """See NpairClient.embed."""
        return await asyncio.to_thread(self._client.embed, images)


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
                content = _read(photo)
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


def _read(photo: Photo) -> bytes:
    if isinstance(photo, bytes | bytearray | memoryview):
        return bytes(photo)
    if isinstance(photo, str | os.PathLike):
        return Path(photo).read_bytes()
    content = photo.read() if hasattr(photo, "read") else None
    if not isinstance(content, bytes):
        kind = type(photo).__name__
        raise TypeError(f"a photo is a path, bytes or an open binary file, not {kind}")
    return content


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
        self._connection = _HttpConnection(parts, address, timeout, tls)
        self._path, self._headers, self._aborted = parts.path.rstrip("/"), headers, False
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
            with _reading():
                answer = triton.parse_response_body(content, header_length=received[JSON_LENGTH])
                version = str(answer.get_response()["model_version"])
                return Embeddings(answer.as_numpy("EMBEDDING"), version)

    def versions(self) -> list[str] | None:
        with mapped_errors(self.model):
            content, _ = self.request("GET", self._model)
            with _reading():
                versions = dict(json.loads(content)).get("versions")
                return None if versions is None else list(map(str, versions))

    def parameters(self) -> dict[str, str]:
        with mapped_errors(self.model):
            content, _ = self.request("GET", f"{self._model}/config")
            with _reading():
                parameters = dict(json.loads(content)).get("parameters", {})
                return {key: value.get("string_value", "") for key, value in parameters.items()}

    def request(
        self, method: str, path: str, body: bytes | None = None, headers: Mapping[str, str] = {}
    ) -> tuple[bytes, Message]:
        """Make a request and return the answer's body and headers.

        Raises: InferenceServerException for a status other than 200, OSError, HTTPException.
        """
        headers = {**self._headers, **headers}
        kept = self._connection.sock is not None
        try:
            if not kept:
                self._connection.connect()
            if self._aborted:
                raise ConnectionAbortedError("the client is closed")
            with contextlib.suppress(ConnectionError):  # a proxy may refuse a body it is still sent
                self._connection.request(method, self._path + path, body, headers)
            answer = self._connection.getresponse()
            content = answer.read()
            if not content and answer.getheader("Content-Length") is None:
                # The connection broke off within the headers; http.client takes that for their end.
                raise http.client.IncompleteRead(content)
        except BaseException as error:
            self._connection.close()
            closed = isinstance(error, ConnectionError | ssl.SSLEOFError)
            if kept and closed and not self._aborted:  # the server closed it while it was idle
                return self.request(method, path, body, headers)
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
    """A connection to an address; the Host header and the certificate are those of the URL."""

    def __init__(
        self, url: SplitResult, address: str | None, timeout: float, tls: ssl.SSLContext | None
    ) -> None:
        self._tls = None
        if url.scheme == "https":
            self.default_port = http.client.HTTPS_PORT
            self._tls = tls or ssl.create_default_context()
        super().__init__(url.hostname or "", url.port, timeout=timeout)
        self._address = address or self.host

    def connect(self) -> None:
        limit = min(self.timeout or CONNECT_SECONDS, CONNECT_SECONDS)
        try:
            self.sock = socket.create_connection((self._address, self.port), limit)
        except TimeoutError as error:
            raise TimeoutError(f"no connection within {limit:g} s") from error
        self.sock.settimeout(self.timeout)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self._tls is not None:
            self.sock = self._tls.wrap_socket(self.sock, server_hostname=self.host)


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
        self._connect = partial(
            tritonclient.grpc.InferenceServerClient,
            parts.netloc,
            ssl=parts.scheme == "grpcs",
            root_certificates=ca,
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
            with _reading():
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


def _tls(
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


class _Pool:
    """The transports of a client, each lent to one call at a time and kept for later ones.

    Without a lock, which a fork could leave locked: list and set operations are atomic.
    """

    def __init__(self, connect: Callable[[], Transport]) -> None:
        self._connect = connect
        self._idle: list[Transport] = []
        self._begin()

    def _begin(self) -> None:
        """Drop what a forked process inherits: its requests would be taken for its parent's."""
        self._close_idle()
        self._process, self._lent = os.getpid(), set[Transport]()
        self._closed = threading.Event()

    @contextlib.contextmanager
    def lend(self) -> Iterator[Transport]:
        """Raises: RuntimeError if the client is closed."""
        if self._process != os.getpid() and not self._closed.is_set():
            self._begin()
        self.check_open()
        try:
            transport = self._idle.pop()
        except IndexError:
            transport = self._connect()
        self._lent.add(transport)
        try:
            yield transport
        finally:
            self._lent.discard(transport)
            self._idle.append(transport)
            if self._closed.is_set():
                self._close_idle()

    def back_off(self, attempt: int) -> None:
        """Back off exponentially, with jitter. Raises: RuntimeError if the client is closed."""
        self._closed.wait(BACKOFF_SECONDS * 2**attempt * random.uniform(0.5, 1))
        self.check_open()

    def check_open(self) -> None:
        if self._closed.is_set():
            raise RuntimeError("the client is closed")

    def close(self) -> None:
        if self._process == os.getpid():
            self._closed.set()
            for transport in list(self._lent):
                transport.abort()
            self._close_idle()

    def _close_idle(self) -> None:
        with contextlib.suppress(IndexError):
            while True:
                self._idle.pop().close()


# The meaning of HTTP's and gRPC's statuses; any other is a fault of the server.
_STATUSES: dict[str, type[NpairError]] = {
    **dict.fromkeys(("400", "404", "405"), InvalidRequestError),
    **dict.fromkeys(("INVALID_ARGUMENT", "NOT_FOUND", "UNIMPLEMENTED"), InvalidRequestError),
    **dict.fromkeys(("401", "403", "UNAUTHENTICATED", "PERMISSION_DENIED"), AccessDeniedError),
    **dict.fromkeys(("429", "502", "503", "504", "UNAVAILABLE", "CANCELLED"), UnavailableError),
    "413": RequestTooLargeError,
    "DEADLINE_EXCEEDED": RequestTimeoutError,
}
# Messages that say more than their status; the first match counts.
_MESSAGES: dict[str, type[NpairError]] = {
    r"unknown model: .* version \d+ is not found": VersionGoneError,
    r"is not (at )?ready|has no available versions": UnavailableError,
    r"Stub process .* is not healthy": UnavailableError,  # it died; its server ends soon
    r"header with status: 413$": RequestTooLargeError,  # a proxy's; gRPC has no such status
    r"timed out": RequestTimeoutError,
    r"failed to connect to all addresses|errors resolving": UnreachableError,
}
# Other exceptions of the transports; the first match counts. The rest are bugs and stay themselves.
_EXCEPTIONS: dict[type[Exception], type[NpairError]] = {
    TimeoutError: RequestTimeoutError,
    OSError: UnreachableError,  # unknown names, connections that are refused or break, TLS
    http.client.IncompleteRead: UnavailableError,
    http.client.HTTPException: ServerFaultError,  # it does not speak HTTP
}
# Errors of libraries, in words that say what to do; the first match counts.
_WORDS = {
    "Connection refused": "nothing listens there",
    "gaierror|errors resolving": "the name of its host is not found",
    "CERTIFICATE_VERIFY_FAILED": "its certificate is not trusted; ca (NPAIR_CA) names an authority",
    "WRONG_VERSION_NUMBER|UNEXPECTED_EOF|Handshake read failed": (
        "TLS is not spoken there; http:// and grpc:// do without"
    ),
    "BadStatusLine": "HTTP is not spoken there; a gRPC port needs grpc://",
    "all addresses.*(Socket closed|SETTINGS|http1)": "gRPC is not spoken there; an HTTP port needs http://",
    "Deadline Exceeded|timed out": "no answer in time",
}


def _in_words(text: str, kind: str = "") -> str:
    matches = (words for pattern, words in _WORDS.items() if re.search(pattern, kind + text))
    words = next(matches, None)
    detail = " ".join(text.rpartition("; last error: ")[2].split())
    if not detail.isprintable():  # another protocol's bytes
        detail = kind.strip(": ")
    return f"{words} ({detail})" if words else detail


@contextlib.contextmanager
def mapped_errors(model: str, request: str = "") -> Iterator[None]:
    """Turn the exceptions of a call into NpairErrors, by the tables above."""
    try:
        yield
    except InferenceServerException as error:
        status = (error.status() or "").removeprefix("StatusCode.")
        message = error.message() or str(error)
        refused = re.findall(r"(?:^|; )IMAGE\[(\d+)\]: (.*?)(?=; IMAGE\[|$)", message, re.DOTALL)
        if refused:
            raise InvalidPhotoError({int(index): reason for index, reason in refused}) from error
        matches = (kind for pattern, kind in _MESSAGES.items() if re.search(pattern, message))
        kind = next(matches, _STATUSES.get(status, ServerFaultError))
        if kind is RequestTooLargeError:
            message = "too large for the server, or for a proxy before it (413)"
        elif kind in (UnreachableError, RequestTimeoutError):
            message = _in_words(message)
        elif kind is InvalidRequestError:
            message = f"model {model}: {message}"
        elif kind is ServerFaultError:
            suffix = f" (request {request})" if request else ""
            message = f"{status or 'error'}: {message}{suffix}"
        raise kind(message) from error
    except tuple(_EXCEPTIONS) as error:
        kind = next(kind for known, kind in _EXCEPTIONS.items() if isinstance(error, known))
        raise kind(_in_words(str(error), f"{type(error).__name__}: ")) from error


@contextlib.contextmanager
def _reading() -> Iterator[None]:
    """Blame the server if its answer cannot be read."""
    try:
        yield
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        problem = f"an answer that is not understood: {type(error).__name__}: {error}"
        raise InferenceServerException(problem) from error
