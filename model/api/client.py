"""The npair client: photos in, embeddings out, over HTTP or gRPC. A library (NpairClient) and a command line.

    with NpairClient("http://127.0.0.1:8000") as client:
        vectors, version = client.embed(["a.jpg", "b.jpg"])

Exceptions, all of them NpairError::

    NpairError
    ├── InvalidPhotoError    photos that the server refused: .reasons says why, by index
    ├── InvalidRequestError  the server does not understand the call: wrong model, version or server
    ├── AccessDeniedError    a proxy before the server wants another API key, or does not let it pass
    ├── UnavailableError     nobody answers, or the model is not served; may pass (the client has retried)
    │   └── VersionGoneError the model is served, but not in the version that the call is pinned to
    ├── RequestTimeoutError  no answer in time; the server may still be working on it
    └── ServerFaultError     the server failed, or answered what this client does not understand; names the request as its log does
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import http.client
import itertools
import json
import os
import random
import re
import socket
import ssl
import sys
import threading
import time
import uuid
import zipfile
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol, TypeVar
from urllib.parse import SplitResult, quote, urlsplit

import numpy as np
import numpy.typing as npt
import tritonclient.grpc
import tritonclient.http
from tritonclient.utils import InferenceServerException

Answer = TypeVar("Answer")
Photo = str | os.PathLike[str] | bytes | IO[bytes]
Vectors = npt.NDArray[np.float32]

DEFAULT_URL = "http://127.0.0.1:8000"
PATIENT_RETRIES = 8  # for half a minute or more: a server that is full or begins anew is back by then
IN_FLIGHT = 4  # batches that a stream has under way, so that no instance of the server waits for the next
ELSEWHERE = 8  # new connections that look for another server behind the same address
SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp")
# What systems keep beside the user's photos, in any case: thumbnails, deleted files, snapshots (Synology, QNAP, macOS, Windows).
SYSTEM_FOLDERS = {
    *("@eadir", "#recycle", "#snapshot", "@recycle", "@recently-snapshot"),
    *("__macosx", "lost+found", "$recycle.bin", "system volume information"),
}
# Of the model's configuration: the version that they were measured on, and its thresholds.
THRESHOLD_PARAMETERS = ("thresholds_version", "threshold_far_1_percent", "threshold_far_01_percent")
# The smallest PNG: one white pixel. A model that embeds it works, which its readiness URL alone does not say.
PIXEL = bytes.fromhex(
    "89504e470d0a1a0a0000000d49484452000000010000000108000000003a7e9b55"
    "0000000a4944415478da63f80f00010101001cb08c990000000049454e44ae426082"
)


class NpairError(Exception):
    """The root of what this client raises, but for ValueError on wrong arguments and OSError on photos that cannot be read."""


class InvalidPhotoError(NpairError):
    """Photos that the server refused.

    reasons: why, by index in the call's photos.
    """

    def __init__(self, reasons: dict[int, str]) -> None:
        super().__init__(reasons)  # as it is: pickle makes the copy from it
        self.reasons = reasons

    def __str__(self) -> str:
        return "; ".join(f"photo {index}: {reason}" for index, reason in self.reasons.items())


class InvalidRequestError(NpairError):
    """The server does not understand the call."""


class RequestTooLargeError(InvalidRequestError):
    """The server, or a proxy before it, takes no request of this size."""


class AccessDeniedError(NpairError):
    """The API key is missing, wrong, or not allowed to call this."""


class UnavailableError(NpairError):
    """Nobody answers, or the model is not served."""


class VersionGoneError(UnavailableError):
    """The model is served, but not in the version that the call is pinned to."""


class RequestTimeoutError(NpairError):
    """No answer in time."""


class ServerFaultError(NpairError):
    """The server failed."""


class Embeddings(NamedTuple):
    """vectors: float32 [n, 128], unit length, in the photos' order. version: of the model that made them all.

    Vectors of two versions must not be compared.
    """

    vectors: Vectors
    version: str


class Thresholds(NamedTuple):
    """Cosines from which two photos are taken for the same product, as publishing measured them for one version of the model.

    far_1_percent, far_01_percent: where 1 % and 0.1 % of the pairs of photos of different products are taken for the same, too;
    None where it was measured on too few pairs to tell.
    """

    version: str
    far_1_percent: float | None
    far_01_percent: float | None


@dataclass(frozen=True)
class Embedded:
    """One photo's outcome: a vector (float32 [128]), or the reason why there is none."""

    index: int
    vector: Vectors | None = None
    reason: str | None = None


class NpairClient:
    """One model of one server, or of several behind one address. Close it, or use it as a context manager.

    Threads may share a client: it takes as many connections as there are calls at a time, and keeps them for the next ones.
    A forked process may use its parent's client, on connections of its own. gRPC has limits there: over grpc://, do not fork while
    another thread has a call under way, which can crash the child, and leave GRPC_ENABLE_FORK_SUPPORT as it is. A pickled client,
    for a process that is spawned, is its arguments, the API key among them.

    A call is repeated on a new connection: behind a balancer, another server may answer there.
    """

    def __init__(
        self,
        url: str = DEFAULT_URL,
        *,
        model: str = "npair",
        version: str | None = None,
        timeout: float = 30.0,
        retries: int = 3,
        batch_size: int = 32,
        batch_bytes: int = 16_000_000,
        ca: str | os.PathLike[str] | None = None,
        cert: tuple[str | os.PathLike[str], str | os.PathLike[str]] | None = None,
        api_key: str | None = None,
    ) -> None:
        """url: http://, https://, grpc:// or grpcs:// and host:port. Proxies that environment variables name are not used.

        version: pins a version; otherwise each call of ``embed`` stays with the version that answered its first batch.
        timeout: seconds for one request.
        retries: how often a request is repeated while nobody answers, and how often ``embed`` starts over if its version is gone.
        batch_size, batch_bytes: the most photos, and the most bytes, of one request; a photo larger than that travels alone.
        ca: certificates (PEM) to trust over https:// and grpcs:// in place of the usual ones.
        cert: the certificate and the private key (PEM, without a password) to show to a server that asks for one.
        api_key: sent as "Authorization: Bearer KEY" with every call, for a proxy before the server.
        Raises: ValueError for a URL, a limit, a key or certificates that make no sense.
        """
        parts = urlsplit(url)
        if parts.username is not None:
            raise ValueError("the URL must not hold a name or password; api_key is sent with every call")
        try:
            sensible = parts.scheme in ("http", "https", "grpc", "grpcs") and parts.hostname and parts.port != 0
        except ValueError:  # of a port that is no number
            sensible = False
        if not sensible:
            raise ValueError(f"the URL must be like http://host:8000 or grpc://host:8001, got {url!r}")
        if batch_size < 1 or batch_bytes < 1 or timeout <= 0 or retries < 0:
            raise ValueError("batch_size, batch_bytes and timeout must be positive, and retries must not be negative")
        if api_key and not re.fullmatch("[!-~]+", api_key):
            raise ValueError("api_key must be printable ASCII without blanks")
        context = None
        try:  # gRPC itself would call the server unavailable
            if ca is not None or parts.scheme == "https":
                context = ssl.create_default_context(cafile=ca)
        except OSError as error:
            raise ValueError(f"ca must be a file of certificates (PEM), and {ca} is not: {error}") from error
        try:
            if cert is not None:
                context = context or ssl.create_default_context()
                context.load_cert_chain(*cert, password="")
        except OSError as error:
            raise ValueError(f"cert must be the files (PEM) of a certificate and its key, and {cert} are not: {error}") from error
        self.ca, self.cert, self.api_key = ca, cert, api_key
        self.version = str(version) if version else None
        self.url, self.model, self.timeout, self.retries = url, model, timeout, retries
        self.batch_size, self.batch_bytes = batch_size, batch_bytes
        headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        connect: Callable[[], _Connection] = partial(_Http, parts, timeout, headers, context)
        if parts.scheme.startswith("grpc"):
            connect = partial(_Grpc, parts, timeout, headers, ca, cert)
        self._connections = _Connections(connect)

    def __getstate__(self) -> dict[str, Any]:
        """The arguments of __init__."""
        names = ("url", "model", "version", "timeout", "retries", "batch_size", "batch_bytes", "ca", "cert", "api_key")
        return {name: getattr(self, name) for name in names}

    def __setstate__(self, arguments: dict[str, Any]) -> None:
        self.__init__(**arguments)  # type: ignore[misc]

    def __enter__(self) -> NpairClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections, and end the calls that other threads have under way; calling it again does nothing."""
        self._connections.close()

    def copy(self) -> NpairClient:
        """Another client of the same model, with connections of its own."""
        return NpairClient(**self.__getstate__())

    def ready(self) -> bool:
        """Whether the model embeds: sends a picture of one pixel, once, since readiness URLs stay green when inference is dead.

        Raises: AccessDeniedError, which tells nothing of the model.
        """
        try:
            self._embed_batch([PIXEL], self.version, retries=0)
        except AccessDeniedError:
            raise
        except NpairError:
            return False
        return True

    def thresholds(self) -> Thresholds | None:
        """What the served version's photos of the same product are told by; None where its configuration does not say.

        They hold for embeddings of their ``version`` alone. Raises: NpairErrors.
        """
        parameters = self._parameters()
        version, *cosines = map(parameters.get, THRESHOLD_PARAMETERS)
        return Thresholds(version, *(float(cosine) if cosine else None for cosine in cosines)) if version else None

    def manifest_sha256(self, version: str) -> str | None:
        """The hash of a served version's manifest, which tells it from another version of that number elsewhere; None where its
        configuration does not say. Raises: NpairErrors."""
        parameters = self._parameters()
        kept = parameters.get(f"manifest_sha256_{version}")  # a lower version beside the one that was promoted
        return kept or (parameters.get("manifest_sha256") if parameters.get("manifest_version") == version else None)

    def _parameters(self) -> dict[str, str]:
        """Of the model's configuration, as it was when a version was promoted."""
        parameters = self._ask(lambda connection: connection.config(self.model), self.retries).get("parameters", {})
        return {key: value.get("string_value", "") for key, value in parameters.items()}

    def embed(self, images: Photo | Iterable[Photo]) -> Embeddings:
        """Embed one photo or many: paths, encoded bytes or open binary files.

        All by one version: if another takes its place meanwhile, and none is pinned, the call starts over, up to ``retries`` times.
        Raises: InvalidPhotoError that names every photo that was refused, other NpairErrors, OSError for a file that cannot be
        read, ValueError for no photo at all.
        """
        one = isinstance(images, str | os.PathLike | bytes) or hasattr(images, "read")
        photos: list[Photo] = [images] if one else list(images)  # type: ignore[list-item, arg-type]
        photos = [_read(photo) if hasattr(photo, "read") else photo for photo in photos]  # a file is read once only
        for attempt in itertools.count():
            try:
                results = list(stream := self.stream(map(_read, photos)))
                break
            except VersionGoneError:
                if self.version is not None or attempt >= self.retries:
                    raise
                self._connections.pause(attempt)
        if not results:
            raise ValueError("no photo to embed")
        if reasons := {result.index: result.reason for result in results if result.reason is not None}:
            raise InvalidPhotoError(reasons)
        return Embeddings(np.stack([result.vector for result in results if result.vector is not None]), stream.version)

    def stream(self, images: Iterable[Photo]) -> EmbeddingStream:
        """Embed photos as they come, in order, several batches at a time; a refused or unreadable photo becomes a result with a
        reason."""
        return EmbeddingStream(self, images)

    def _embed_batch(self, photos: Sequence[bytes], version: str | None, retries: int) -> Embeddings:
        """One request."""
        request_id = uuid.uuid4().hex
        vectors, answered = self._ask(
            lambda connection: connection.infer(self.model, version or "", photos, request_id), retries, version, request_id
        )
        if vectors is None or vectors.shape[:1] != (len(photos),) or vectors.ndim != 2:
            shape = None if vectors is None else vectors.shape
            raise ServerFaultError(f"expected {len(photos)} embeddings, got {shape} (request {request_id})")
        if version not in (None, answered):
            raise ServerFaultError(f"asked for version {version}, got {answered} (request {request_id})")
        return Embeddings(vectors, answered)

    def _ask(
        self, question: Callable[[_Connection], Answer], retries: int, version: str | None = None, request_id: str = ""
    ) -> Answer:
        """Ask, and ask again on another connection: if nobody answers, up to ``retries`` times; if the server has another version,
        as long as one is found that has it.

        Embedding changes nothing on a server, so it may be repeated. But not after a timeout: the request may still be in work, and
        repeating it would add to the load that delays it.
        """
        attempt, searches = 0, ELSEWHERE if retries else 0
        with self._connections.lend() as connection:
            while True:
                try:
                    with _mapped_errors(self.model, request_id):
                        return question(connection)
                except (UnavailableError, InvalidRequestError) as error:
                    self._connections.check_open()
                    served = self._versions(connection) if version else None
                    if isinstance(error, VersionGoneError) or (served and version not in served):
                        if not searches:
                            raise self._gone(version, served) from error
                        searches -= 1
                    elif attempt == retries or isinstance(error, InvalidRequestError):
                        raise
                    else:
                        self._connections.pause(attempt)
                        attempt += 1
                self._reconnect(connection, version)

    def _reconnect(self, connection: _Connection, version: str | None) -> None:
        """Take new connections until one reaches a server that serves the model, in that version: which server each one reaches is
        up to a balancer. Raises: VersionGoneError if they reach other versions alone."""
        others, began = set[str](), time.monotonic()
        for _ in range(ELSEWHERE):
            connection.reconnect()
            self._connections.check_open()
            served = self._versions(connection)
            if served is None or version in served or (version is None and served):
                return
            others.update(served)
            if time.monotonic() - began > 1:  # nobody is there, and it takes long to find out
                break
        if others:
            raise self._gone(version, others)

    def _gone(self, version: str | None, served: Iterable[str] | None) -> VersionGoneError:
        others = f", but {', '.join(sorted(served))} is" if served else ""
        return VersionGoneError(f"version {version} of model {self.model} is not served{others}")

    def _versions(self, connection: _Connection) -> list[str] | None:
        """Those of the model that the server serves; None if it does not tell. Raises: RequestTimeoutError."""
        try:
            with _mapped_errors(self.model):
                versions = connection.metadata(self.model).get("versions")
        except UnavailableError:
            return []
        except (InvalidRequestError, AccessDeniedError, ServerFaultError):
            return None
        return None if versions is None else list(map(str, versions))

    def _served(self) -> list[str]:
        """The versions of the model that are served; none if that cannot be told."""
        with self._connections.lend() as connection, contextlib.suppress(RequestTimeoutError):
            return self._versions(connection) or []
        return []


class AsyncNpairClient:
    """NpairClient for asyncio. Each call runs in a thread, to its end even if it is cancelled; as many at a time as asyncio has."""

    def __init__(self, url: str = DEFAULT_URL, **options: Any) -> None:
        """As of NpairClient."""
        self._client = NpairClient(url, **options)

    async def __aenter__(self) -> AsyncNpairClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

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

    version: the one that answered, known from the first batch on; later batches are pinned to it, so that no two are mixed.
    unanswered: the batches that were sent and have no answer (yet): the index of the first photo, and how many there are.
    """

    def __init__(self, client: NpairClient, photos: Iterable[Photo]) -> None:
        self._client = client
        self._photos = photos
        self._version = client.version
        self.unanswered: dict[int, int] = {}

    @property
    def version(self) -> str:
        """Raises: LookupError before any photo was embedded."""
        if self._version is None:
            raise LookupError("no photo was embedded yet")
        return self._version

    def __iter__(self) -> Iterator[Embedded]:
        pending: deque[Future[list[Embedded]]] = deque()
        pool = ThreadPoolExecutor(IN_FLIGHT)
        try:
            for start, batch in self._batches():
                if self._version is None or start == 0:  # one batch alone needs no thread
                    yield from self._embed(batch, start)
                    continue
                if len(pending) == IN_FLIGHT:
                    yield from pending.popleft().result()
                pending.append(pool.submit(self._embed, batch, start))
            while pending:
                yield from pending.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _batches(self) -> Iterator[tuple[int, list[bytes | str]]]:
        """The number of each batch's first photo, and its photos' bytes, or why they could not be read."""
        batch: list[bytes | str] = []
        size = start = 0
        for photo in self._photos:
            content: bytes | str
            try:
                content = _read(photo)
            except OSError as error:
                content = f"cannot be read: {error.strerror or error}"
            if batch and (len(batch) == self._client.batch_size or size + len(content) > self._client.batch_bytes):
                yield start, batch
                start, batch, size = start + len(batch), [], 0
            batch.append(content)
            size += len(content)
        if batch:
            yield start, batch

    def _embed(self, batch: Sequence[bytes | str], start: int) -> list[Embedded]:
        """The outcomes of one batch: if photos are refused, the rest is sent once more without them."""
        self.unanswered[start] = len(batch)
        results = {i: Embedded(start + i, reason=content) for i, content in enumerate(batch) if isinstance(content, str)}
        while remaining := [i for i in range(len(batch)) if i not in results]:
            try:
                photos = [batch[i] for i in remaining]
                answer = self._client._embed_batch(photos, self._version, self._client.retries)  # type: ignore[arg-type]
            except InvalidPhotoError as error:
                results |= {remaining[i]: Embedded(start + remaining[i], reason=reason) for i, reason in error.reasons.items()}
                continue
            except RequestTooLargeError as error:
                if len(remaining) > 1:
                    raise
                results[remaining[0]] = Embedded(start + remaining[0], reason=str(error))
                continue
            self._version = answer.version
            for i, vector in zip(remaining, answer.vectors, strict=True):
                results[i] = Embedded(start + i, vector)
        del self.unanswered[start]
        return [results[i] for i in range(len(batch))]


def _read(photo: Photo) -> bytes:
    """Raises: OSError, or TypeError for what is no photo."""
    if isinstance(photo, bytes | bytearray | memoryview):
        return bytes(photo)
    if isinstance(photo, str | os.PathLike):
        return Path(photo).read_bytes()
    content = photo.read() if hasattr(photo, "read") else None
    if not isinstance(content, bytes):
        raise TypeError(f"a photo is a path, bytes or an open binary file, not {type(photo).__name__}")
    return content


class _Connection(Protocol):
    """To one server, for one call at a time. Calls raise what their library raises; _mapped_errors knows what that means."""

    def infer(self, model: str, version: str, photos: Sequence[bytes], request_id: str) -> tuple[Vectors | None, str]:
        """The vectors, and the version that made them. No version: the server's choice."""

    def config(self, model: str) -> dict[str, Any]: ...

    def metadata(self, model: str) -> dict[str, Any]: ...

    def reconnect(self) -> None:
        """Take a new connection in place of this one."""

    def close(self) -> None: ...

    def abort(self) -> None:
        """End the call that another thread has under way."""


class _Http:
    """Requests and answers are made and read by tritonclient, but travel over the standard library's connection: tritonclient's
    own is gevent's, which no two threads can use, nor a forked process."""

    def __init__(self, url: SplitResult, timeout: float, headers: dict[str, str], tls: ssl.SSLContext | None) -> None:
        host = url.hostname or ""
        self._connection = (
            http.client.HTTPSConnection(host, url.port, timeout=timeout, context=tls)
            if url.scheme == "https"
            else http.client.HTTPConnection(host, url.port, timeout=timeout)
        )
        self._path, self._headers, self._aborted = url.path.rstrip("/"), headers, False

    def infer(self, model: str, version: str, photos: Sequence[bytes], request_id: str) -> tuple[Vectors | None, str]:
        body, length = tritonclient.http.InferenceServerClient.generate_request_body(
            [_tensor(tritonclient.http, photos)], request_id=request_id
        )
        headers = {"Content-Type": "application/octet-stream", "Inference-Header-Content-Length": str(length)}
        pinned = f"/versions/{quote(version)}" if version else ""
        content, length = self._request("POST", f"/v2/models/{quote(model)}{pinned}/infer", body, headers)
        with _understood():
            answer = tritonclient.http.InferenceServerClient.parse_response_body(content, header_length=length)
            return answer.as_numpy("EMBEDDING"), str(answer.get_response()["model_version"])

    def config(self, model: str) -> dict[str, Any]:
        return self._json(f"/v2/models/{quote(model)}/config")

    def metadata(self, model: str) -> dict[str, Any]:
        return self._json(f"/v2/models/{quote(model)}")

    def reconnect(self) -> None:
        self.close()  # it connects again by itself

    def close(self) -> None:
        self._connection.close()

    def abort(self) -> None:
        self._aborted = True
        if (connected := self._connection.sock) is not None:
            with contextlib.suppress(OSError):
                socket.socket.shutdown(connected, socket.SHUT_RDWR)  # closing alone wakes nobody

    def _json(self, path: str) -> dict[str, Any]:
        content, _ = self._request("GET", path)
        with _understood():
            answer: dict[str, Any] = dict(json.loads(content))
            return answer

    def _request(
        self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
    ) -> tuple[bytes, str | None]:
        """The answer, and how much of it is JSON: all, where the server does not say."""
        kept = self._connection.sock is not None
        try:
            if not kept:
                self._connection.connect()
            if self._aborted:
                raise ConnectionAbortedError("the client is closed")
            with contextlib.suppress(ConnectionError):  # a proxy may answer that this is too large before it has read it all
                self._connection.request(method, self._path + path, body, self._headers | (headers or {}))
            answer = self._connection.getresponse()
            content = answer.read()
            if not content and answer.getheader("Content-Length") is None:
                raise http.client.IncompleteRead(content)  # it broke off within the head, which http.client takes for its end
        except BaseException as error:
            self._connection.close()
            if kept and not self._aborted and isinstance(error, ConnectionError | ssl.SSLEOFError):
                return self._request(method, path, body, headers)  # the server had closed it, idle as it was
            raise
        if answer.status != 200:
            try:
                reason = str(json.loads(content)["error"])
            except (ValueError, LookupError, TypeError):  # a proxy's page
                reason = f"{answer.reason}: {content[:200].decode(errors='replace')}"
            raise InferenceServerException(reason, status=str(answer.status))
        return content, answer.getheader("Inference-Header-Content-Length")


class _Grpc:
    """A channel of tritonclient's."""

    def __init__(
        self,
        url: SplitResult,
        timeout: float,
        headers: dict[str, str],
        ca: str | os.PathLike[str] | None,
        cert: tuple[str | os.PathLike[str], str | os.PathLike[str]] | None,
    ) -> None:
        shown, key = cert or (None, None)
        self._connect = partial(
            tritonclient.grpc.InferenceServerClient,
            url.netloc,
            ssl=url.scheme == "grpcs",
            root_certificates=ca,
            certificate_chain=shown,
            private_key=key,
            channel_args=[
                # By itself, gRPC would come to look for a server that is away every two minutes only, and keep a connection to a
                # machine that is gone for a quarter of an hour: with keepalive, what is not received within 10 s ends it.
                ("grpc.max_reconnect_backoff_ms", 1000),
                ("grpc.keepalive_time_ms", 300_000),
                ("grpc.keepalive_timeout_ms", 10_000),
                ("grpc.use_local_subchannel_pool", 1),  # else a new channel would share the old one's connection
                ("grpc.enable_http_proxy", 0),  # http_proxy would be asked even for 127.0.0.1
            ],
        )
        self._client = self._connect()
        self._options = {"client_timeout": timeout, "headers": headers}

    def infer(self, model: str, version: str, photos: Sequence[bytes], request_id: str) -> tuple[Vectors | None, str]:
        tensor = _tensor(tritonclient.grpc, photos)
        answer = self._client.infer(model, [tensor], model_version=version, request_id=request_id, **self._options)
        with _understood():
            return answer.as_numpy("EMBEDDING"), answer.get_response().model_version

    def config(self, model: str) -> dict[str, Any]:
        answer: dict[str, Any] = self._client.get_model_config(model, as_json=True, **self._options)
        return answer["config"]  # type: ignore[no-any-return]

    def metadata(self, model: str) -> dict[str, Any]:
        answer: dict[str, Any] = self._client.get_model_metadata(model, as_json=True, **self._options)
        return answer

    def reconnect(self) -> None:
        self.close()
        self._client = self._connect()

    def close(self) -> None:
        self._client.close()

    abort = close


def _tensor(protocol: Any, photos: Sequence[bytes]) -> Any:
    tensor = protocol.InferInput("IMAGE", [len(photos), 1], "BYTES")
    tensor.set_data_from_numpy(np.array(photos, dtype=np.object_).reshape(-1, 1))
    return tensor


class _Connections:
    """Those of one client: each is lent to one call at a time, and kept for the next one.

    No lock, which a fork could leave locked for ever: what threads do to the list and the set is atomic.
    """

    def __init__(self, connect: Callable[[], _Connection]) -> None:
        self._connect = connect
        self._idle: list[_Connection] = []
        self._begin()

    def _begin(self) -> None:
        """In each process anew: what a child sends on its parent's connections would be taken for the parent's."""
        inherited, self._idle = self._idle, []
        self._process, self._lent, self._closed = os.getpid(), set[_Connection](), threading.Event()
        for connection in inherited:
            connection.close()

    @contextlib.contextmanager
    def lend(self) -> Iterator[_Connection]:
        if self._process != os.getpid() and not self._closed.is_set():
            self._begin()
        self.check_open()
        try:
            connection = self._idle.pop()
        except IndexError:
            connection = self._connect()
        self._lent.add(connection)
        try:
            yield connection
        finally:
            self._lent.discard(connection)
            self._idle.append(connection)
            if self._closed.is_set():
                self._close_idle()

    def pause(self, attempt: int) -> None:
        """Before the next one, and not as long as all others. Raises: RuntimeError if the client is closed meanwhile."""
        self._closed.wait(0.2 * 2**attempt * random.uniform(0.5, 1))
        self.check_open()

    def close(self) -> None:
        if self._process == os.getpid():
            self._closed.set()
            for connection in list(self._lent):
                connection.abort()
            self._close_idle()

    def _close_idle(self) -> None:
        with contextlib.suppress(IndexError):
            while True:
                self._idle.pop().close()

    def check_open(self) -> None:
        if self._closed.is_set():
            raise RuntimeError("the client is closed")


# What the statuses of HTTP and gRPC mean. Any other is a fault of the server.
_STATUSES: dict[str, type[NpairError]] = {
    **dict.fromkeys(("400", "404", "405", "INVALID_ARGUMENT", "NOT_FOUND", "UNIMPLEMENTED"), InvalidRequestError),
    **dict.fromkeys(("401", "403", "UNAUTHENTICATED", "PERMISSION_DENIED"), AccessDeniedError),
    **dict.fromkeys(("429", "502", "503", "504", "UNAVAILABLE", "CANCELLED"), UnavailableError),
    "413": RequestTooLargeError,
    "DEADLINE_EXCEEDED": RequestTimeoutError,
}
# Messages that say more than the status that comes with them.
_MESSAGES: dict[str, type[NpairError]] = {
    r"unknown model: .* version \d+ is not found": VersionGoneError,
    r"is not (at )?ready|has no available versions": UnavailableError,
    r"header with status: 413$": RequestTooLargeError,  # a proxy's, for which gRPC has no status
    r"timed out": RequestTimeoutError,
}
# What else the connections raise; the first that fits. Nothing else is caught, so that a bug looks like one.
_RAISED: dict[type[Exception], type[NpairError]] = {
    TimeoutError: RequestTimeoutError,
    OSError: UnavailableError,  # names that are not found, connections that are refused or break off, TLS
    http.client.IncompleteRead: UnavailableError,  # the connection broke off within the answer
    http.client.HTTPException: ServerFaultError,  # it does not speak HTTP
}


@contextlib.contextmanager
def _mapped_errors(model: str, request_id: str = "") -> Iterator[None]:
    """The one place where errors of the connections and the server become this client's."""
    try:
        yield
    except InferenceServerException as error:
        status, message = (error.status() or "").removeprefix("StatusCode."), error.message() or str(error)
        if reasons := dict(re.findall(r"(?:^|; )IMAGE\[(\d+)\]: (.*?)(?=; IMAGE\[|$)", message, re.DOTALL)):
            raise InvalidPhotoError({int(index): reason for index, reason in reasons.items()}) from error
        said = (meaning for pattern, meaning in _MESSAGES.items() if re.search(pattern, message))
        meaning = next(said, _STATUSES.get(status, ServerFaultError))
        if meaning is RequestTooLargeError:
            message = "too large for the server, or for a proxy before it (413)"
        elif meaning is InvalidRequestError:
            message = f"model {model}: {message}"
        elif meaning is ServerFaultError:
            message = f"{status or 'error'}: {message}" + (f" (request {request_id})" if request_id else "")
        raise meaning(message) from error
    except tuple(_RAISED) as error:
        meaning = next(meaning for raised, meaning in _RAISED.items() if isinstance(error, raised))
        raise meaning(f"{type(error).__name__}: {error}") from error


@contextlib.contextmanager
def _understood() -> Iterator[None]:
    """Around the reading of an answer."""
    try:
        yield
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise InferenceServerException(f"an answer that is not understood: {type(error).__name__}: {error}") from error


EXIT_OK, EXIT_PHOTOS, EXIT_USAGE, EXIT_SERVER = 0, 1, 2, 3


def from_environment() -> dict[str, Any]:
    """NpairClient's arguments that command lines take from the environment: NPAIR_CA; NPAIR_CERT, with the key in the same file or
    in NPAIR_KEY; and NPAIR_API_KEY, which users of this machine could read on a command line."""
    certificate = os.environ.get("NPAIR_CERT")
    cert = (certificate, os.environ.get("NPAIR_KEY") or certificate) if certificate else None
    given = {"ca": os.environ.get("NPAIR_CA"), "cert": cert, "api_key": os.environ.get("NPAIR_API_KEY")}
    return {name: value for name, value in given.items() if value}


def main() -> int:
    """Returns: 0, 1 where a photo could not be embedded, 2 for wrong usage, 3 where the server did not do its part."""
    options = _parser().parse_args()
    try:
        with NpairClient(options.url, version=options.version, timeout=options.timeout, **from_environment()) as client:
            code: int = options.command(client, options)
            return code
    except (InvalidPhotoError, OSError) as error:
        return _fail(error, EXIT_PHOTOS)
    except NpairError as error:
        return _fail(f"{options.url}: {type(error).__name__}: {error}", EXIT_SERVER)
    except ValueError as error:
        return _fail(error, EXIT_USAGE)
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Embed and compare photos with an npair server.",
        epilog="For https:// and grpcs://, NPAIR_CA names certificates (PEM) to trust, NPAIR_CERT and NPAIR_KEY the ones to show; "
        "NPAIR_API_KEY is sent as a bearer token. "
        "Exit code: 0 done, 1 a photo could not be embedded, 2 wrong usage, 3 the server did not do its part.",
    )
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument(
        "--url", default=os.environ.get("NPAIR_URL", DEFAULT_URL), help="http(s):// or grpc(s):// (NPAIR_URL; %(default)s)"
    )
    shared.add_argument("--version", help="pin a version of the model")
    shared.add_argument("--timeout", type=float, default=30.0, help="seconds for one request (%(default)s)")
    shared.add_argument("--json", action="store_true", help="print JSON")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, command: Callable[[NpairClient, argparse.Namespace], int], description: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, parents=[shared], help=description, description=description)
        added.set_defaults(command=command)
        return added

    photos = f"photo files, or folders that are searched for {', '.join(SUFFIXES)}"
    embed = add("embed", _embed, "embed photos: JSON lines on standard output, or a file")
    embed.add_argument("photos", nargs="+", type=Path, help=photos)
    embed.add_argument(
        "--out", type=Path, help="write vectors.npz or vectors.jsonl instead; after an interruption, the same command goes on"
    )
    compare = add("compare", _compare, "tell whether two photos show the same product")
    for name in "ab":
        compare.add_argument(name, type=Path, help="a photo, or an .npz file that embed has written of one")
    compare.add_argument(
        "--far",
        type=float,
        choices=(1.0, 0.1),
        default=1.0,
        help="percent of pairs of different products that may be taken for the same (%(default)s)",
    )
    rank = add("rank", _rank, "print the candidates that are most similar to a photo")
    rank.add_argument("query", type=Path)
    rank.add_argument("candidates", nargs="+", type=Path, help=f"{photos}, or .npz files that embed has written")
    rank.add_argument("-k", type=int, default=5, help="how many to print (%(default)s)")
    add("ready", _ready, "tell whether the model embeds")
    return parser


def _embed(client: NpairClient, options: argparse.Namespace) -> int:
    client.retries = PATIENT_RETRIES
    if options.out is not None:
        return _embed_into(options.out, client, options)
    files = _Files(client, options.photos)
    for name, vector, version in files:
        print(_line(name, vector, client.model, version, files.manifest_sha256))
    return EXIT_PHOTOS if files.left_out else EXIT_OK


def _embed_into(out: Path, client: NpairClient, options: argparse.Namespace) -> int:
    """Vectors go into a file beside ``out`` as they come, from which a run that was interrupted goes on, and of which ``out`` is
    made in the end. Memory does not grow with the number of photos."""
    if out.suffix not in (".npz", ".jsonl"):
        raise ValueError(f"--out must end in .npz or .jsonl, got {out}")
    if not out.parent.is_dir():
        raise ValueError(f"--out must be in a folder that is there, got {out}")
    unfinished = out.with_name(out.name + ".unfinished")
    done = _resume(unfinished, client)
    if strange := done.difference(map(str, _files(options.photos))) if done else None:
        raise ValueError(f"{unfinished} is of another command: it has {min(strange)}; repeat that one, or delete the file")
    files, version, embedded = _Files(client, options.photos, done), client.version, len(done)
    try:
        with unfinished.open("a", encoding="utf-8") as lines:
            for name, vector, version in files:
                print(_line(name, vector, client.model, version, files.manifest_sha256), file=lines, flush=True)
                embedded += 1
        if embedded and out.suffix == ".npz":
            _save_npz(unfinished, out)
    except VersionGoneError as error:
        if options.version or not embedded:
            raise
        served = client._served()
        if not served:
            raise
        print(f"{error}: all photos are embedded anew", file=sys.stderr)
        unfinished.unlink()
        client.version = options.version = max(served, key=int)  # once: pinned, it is not left again
        return _embed_into(out, client, options)
    except (NpairError, OSError, KeyboardInterrupt):
        if embedded:
            print(f"{embedded} photos are in {unfinished}, and the same command goes on after them", file=sys.stderr)
        raise
    finally:
        if not embedded:
            unfinished.unlink(missing_ok=True)
    if embedded:
        if out.suffix == ".npz":
            unfinished.unlink()
        else:
            unfinished.replace(out)
        summary = {"out": str(out), "embedded": embedded, "left_out": files.left_out, "model": client.model, "version": version}
        text = f"{embedded} photos embedded by {client.model} version {version} in {out}, {files.left_out} left out"
        print(json.dumps(summary) if options.json else text)
    return EXIT_PHOTOS if files.left_out else EXIT_OK


def _resume(unfinished: Path, client: NpairClient) -> set[str]:
    """The names of the photos that the file has already; the client is pinned to the version that embedded them.

    A last line that was cut off is removed. Raises: ValueError where the file is damaged, or of another model or version.
    """
    done: set[str] = set()
    if not unfinished.exists():
        return done
    with unfinished.open("r+b") as lines:
        for line in iter(lines.readline, b""):
            if not line.endswith(b"\n"):
                lines.truncate(lines.tell() - len(line))
                break
            try:
                row = json.loads(line)
                made_by, name = (row["model"], row["version"], row["manifest_sha256"]), row["photo"]
            except (ValueError, LookupError, TypeError) as error:
                raise ValueError(f"{unfinished} is damaged; delete it to begin again") from error
            if not done:
                expected = (client.model, client.version or made_by[1], made_by[2])
                client.version = made_by[1]
            if made_by != expected:
                raise ValueError(f"{unfinished} has vectors of {made_by[0]} version {made_by[1]}; delete it to begin again")
            done.add(name)
    if done and made_by[1] in client._served() and made_by[2] != client.manifest_sha256(made_by[1]):
        raise ValueError(f"{unfinished} has vectors of another version {made_by[1]} than is served; delete it to begin again")
    return done


def _save_npz(lines: Path, out: Path) -> None:
    """names [n], vectors float32 [n, D], model, version and manifest_sha256, as np.savez would write them, but from
    lines that need not fit into memory."""

    def rows() -> Iterator[dict[str, Any]]:
        with lines.open(encoding="utf-8") as file:
            yield from map(json.loads, file)

    count, longest = 0, 1
    for row in rows():
        count, longest = count + 1, max(longest, len(row["photo"]))
    columns = {
        "names": ("photo", np.dtype((np.str_, longest)), (count,)),
        "vectors": ("embedding", np.dtype("<f4"), (count, len(row["embedding"]))),
    }
    unfinished = out.with_name(out.name + ".partial")
    try:
        with zipfile.ZipFile(unfinished, "w") as archive:
            for name, (key, dtype, shape) in columns.items():
                with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                    header = {"descr": dtype.str, "fortran_order": False, "shape": shape}
                    np.lib.format.write_array_header_1_0(file, header)  # type: ignore[no-untyped-call]
                    for row in rows():
                        file.write(np.array(row[key], dtype).tobytes())
            for key in ("model", "version", "manifest_sha256"):
                with archive.open(f"{key}.npy", "w") as file:
                    np.lib.format.write_array(file, np.array(row[key] or ""), allow_pickle=False)  # type: ignore[no-untyped-call]
        unfinished.replace(out)
    finally:
        unfinished.unlink(missing_ok=True)


def _compare(client: NpairClient, options: argparse.Namespace) -> int:
    saved = [path for path in (options.a, options.b) if path.suffix == ".npz"]
    vectors = []
    for path, (_, rows) in zip(saved, _load(saved, client), strict=True):
        if len(rows) != 1:
            raise ValueError(f"{path} holds the vectors of {len(rows)} photos, and compare takes one; rank takes more")
        vectors += [*rows]
    if photos := [path for path in (options.a, options.b) if path not in saved]:
        embedded = client.embed(photos)
        client.version = embedded.version
        vectors += [*embedded.vectors]
    version = client.version
    cosine = float(vectors[0] @ vectors[1])
    thresholds = client.thresholds()
    threshold = None
    if thresholds is not None and thresholds.version == version:
        threshold = thresholds.far_1_percent if options.far == 1 else thresholds.far_01_percent
    same = None if threshold is None else cosine >= threshold
    if options.json:
        known = {} if threshold is None else {"threshold": threshold, "far": options.far / 100}
        print(json.dumps({"cosine": cosine, "version": version, "same_product": same, **known}))
    elif threshold is None:
        print(f"cosine {cosine:.4f}; no verdict: the server's configuration has no such threshold for version {version}")
    else:
        verdict, sign = ("same product", ">=") if same else ("different products", "<")
        print(
            f"{verdict}: cosine {cosine:.4f} {sign} {threshold:.4f}, which {options.far:g} % of pairs of different products reach"
        )
    return EXIT_OK


def _rank(client: NpairClient, options: argparse.Namespace) -> int:
    if options.k < 1:
        raise ValueError(f"-k must be at least 1, got {options.k}")
    # Saved vectors first: they pin the version that has to embed the rest.
    saved = _load([path for path in options.candidates if path.suffix == ".npz"], client)
    names = [name for of_file, _ in saved for name in of_file]
    blocks = [rows for _, rows in saved]
    query = client.embed(options.query)
    client.version = query.version
    left_out = 0
    if photos := [path for path in options.candidates if path.suffix != ".npz"]:
        files = _Files(client, photos)
        for name, vector, _ in files:
            names.append(name)
            blocks.append(vector[np.newaxis])
        left_out = files.left_out
    if not names:
        return EXIT_PHOTOS
    cosines = np.concatenate(blocks) @ query.vectors[0]
    best = np.argsort(-cosines, kind="stable")[: options.k]
    if options.json:
        ranked = [{"photo": names[index], "cosine": float(cosines[index])} for index in best]
        print(json.dumps({"version": query.version, "ranked": ranked, "left_out": left_out}))
    else:
        print(*(f"{cosines[index]:.4f}  {names[index]}" for index in best), sep="\n")
    return EXIT_PHOTOS if left_out else EXIT_OK


def _ready(client: NpairClient, options: argparse.Namespace) -> int:
    ready = client.ready()
    print(
        json.dumps({"ready": ready}) if options.json else f"{client.model} at {options.url} is {'ready' if ready else 'not ready'}"
    )
    return EXIT_OK if ready else EXIT_SERVER


class _Files:
    """Embeds files and iterates, in order, over name, vector and version of those that have one; the others are named on standard
    error and counted in ``left_out``. done: names that are passed over. manifest_sha256: the version's, from the first one on."""

    def __init__(self, client: NpairClient, paths: Sequence[Path], done: Collection[str] = ()) -> None:
        self._client, self._paths, self._done = client, paths, done
        self.left_out = 0
        self.manifest_sha256: str | None = None

    def __iter__(self) -> Iterator[tuple[str, Vectors, str]]:
        passed_over = Counter[str]()
        found = map(str, _files(self._paths, passed_over))
        names, photos = itertools.tee(name for name in found if name not in self._done)
        stream, total, asked = self._client.stream(photos), len(self._done), False
        try:
            for result, name in zip(self._progress(stream), names, strict=True):
                total += 1
                if result.vector is None:
                    self.left_out += 1
                    print(f"{name}: {result.reason}", file=sys.stderr)
                else:
                    if not asked:
                        self.manifest_sha256, asked = self._client.manifest_sha256(stream.version), True
                    yield name, result.vector, stream.version
        except (UnavailableError, RequestTimeoutError, ServerFaultError) as error:
            if not isinstance(error, VersionGoneError):
                waiting = _at(stream.unanswered, total - len(self._done), names)
                print(f"no answer for these photos: {', '.join(waiting)}", file=sys.stderr)
            raise
        if passed_over:
            kinds = ", ".join(f"{count} {suffix}" for suffix, count in passed_over.most_common(10))
            print(f"{passed_over.total()} other files in folders passed over: {kinds}", file=sys.stderr)
        if not total:
            raise ValueError(f"no photos in {', '.join(map(str, self._paths))}")
        if self.left_out:
            print(f"{self.left_out} of {total} photos left out", file=sys.stderr)

    def _progress(self, results: Iterable[Embedded]) -> Iterable[Embedded]:
        """With a progress bar, where tqdm is installed and somebody watches."""
        if not sys.stderr.isatty():
            return results
        try:
            from tqdm import tqdm  # noqa: PLC0415
        except ImportError:
            return results
        total = sum(1 for _ in _files(self._paths))
        bar: Iterable[Embedded] = tqdm(results, total=total, initial=len(self._done), unit="photo")
        return bar


def _files(paths: Iterable[Path], passed_over: Counter[str] | None = None) -> Iterator[Path]:
    """The paths, and of folders the photos in them and below, in the order of their names.

    passed_over: counts the folders' other files, hidden ones aside, by suffix.
    """
    passed_over = Counter() if passed_over is None else passed_over
    for path in paths:
        if not path.is_dir():
            yield path
            continue
        names = []
        with os.scandir(path) as entries:
            for entry in entries:
                suffix = Path(entry.name).suffix.lower()
                if entry.name.startswith(".") or entry.name.casefold() in SYSTEM_FOLDERS:
                    continue
                if entry.is_dir(follow_symlinks=False) or (suffix in SUFFIXES and entry.is_file()):
                    names.append(entry.name)
                elif entry.is_file():
                    passed_over[suffix or "without a suffix"] += 1
        yield from _files((path / name for name in sorted(names)), passed_over)


def _at(batches: dict[int, int], first: int, names: Iterator[str]) -> list[str]:
    """The names that the batches are of. batches: see EmbeddingStream.unanswered. first: the index of the first of the names."""
    indices = {index for start, count in list(batches.items()) for index in range(start, start + count)}
    return [name for index, name in zip(range(first, max(indices, default=0) + 1), names, strict=False) if index in indices]


def _line(name: str, vector: Vectors, model: str, version: str, manifest_sha256: str | None) -> str:
    made_by = {"model": model, "version": version, "manifest_sha256": manifest_sha256}
    return json.dumps({"photo": name, **made_by, "embedding": vector.tolist()})


def _load(paths: Sequence[Path], client: NpairClient) -> list[tuple[list[str], Vectors]]:
    """Names and vectors of each file that ``embed --out`` has saved. The client is pinned to the version that made them all.

    Raises: OSError, or ValueError for another file, or for vectors that must not be compared with each other or with this server's.
    """
    loaded: list[tuple[list[str], Vectors]] = []
    manifests: set[str] = set()
    for path in paths:
        try:
            with np.load(path, allow_pickle=False) as saved:
                model, version, manifest = (str(saved[key]) for key in ("model", "version", "manifest_sha256"))
                loaded.append((saved["names"].tolist(), saved["vectors"]))
        except (KeyError, ValueError, TypeError, AttributeError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path} holds no vectors: {error}") from error
        if model != client.model:
            raise ValueError(f"{path} holds vectors of model {model}, not {client.model}")
        if client.version not in (None, version):
            raise ValueError(f"{path} holds vectors of version {version}, not {client.version}; embed its photos again")
        client.version = version
        if not manifests and version in client._served():
            manifests.add(client.manifest_sha256(version) or "")
        if len(manifests | {manifest}) > 1:
            raise ValueError(
                f"{path} holds vectors of another version {version} than is served or saved beside it; embed its photos again"
            )
        manifests.add(manifest)
    return loaded


def _fail(reason: object, code: int) -> int:
    print(f"client.py: {reason}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
