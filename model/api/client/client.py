"""The clients of a model, for threads and for asyncio."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import re
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import KW_ONLY, dataclass, field, fields, replace
from functools import partial
from typing import Any, TypeVar
from urllib.parse import urlsplit

import numpy as np

from .errors import (
    AccessDeniedError,
    InvalidPhotoError,
    InvalidRequestError,
    NpairError,
    RequestTimeoutError,
    ServerFaultError,
    UnavailableError,
    VersionGoneError,
)
from .pool import PATIENT_RETRIES, Pool
from .results import Configuration, Embeddings, Thresholds
from .stream import EmbeddingStream, Photo, read
from .transports import GrpcTransport, HttpTransport, StrPath, Transport, tls_context

Answer = TypeVar("Answer")

log = logging.getLogger("npair.client")

DEFAULT_URL = "http://127.0.0.1:8000"
# A socket's timeout wraps around where its milliseconds exceed 32 bits.
MAX_SECONDS = 1e6
# By scheme. gRPC has no paths.
PATHS = {"http": "[!-~]*", "https": "[!-~]*", "grpc": "/?", "grpcs": "/?"}
MAX_RECONNECTS = 8  # to look for another server behind the same address
# The smallest PNG: one white pixel.
PIXEL = bytes.fromhex(
    "89504e470d0a1a0a0000000d49484452000000010000000108000000003a7e9b55"
    "0000000a4944415478da63f80f00010101001cb08c990000000049454e44ae426082"
)


@dataclass(eq=False)
class NpairClient:
    """A client of one model, on one server or several behind one address.

    Close it, or use it as a context manager. Threads may share it: every call has a connection to
    itself, which is kept for later calls. A forked process may use its parent's client, on new
    connections; over gRPC, do not fork while another thread has a call under way, which can crash
    the child, and leave GRPC_ENABLE_FORK_SUPPORT unset. A pickled client contains its API key.

    url: http(s)://host:port/path or grpc(s)://host:port; grpc:// needs the port. Proxies named by
        the environment are not used.
    version: pins a version; if None, each call of embed() stays with the version it first gets.
    timeout: seconds for one request, a million at most.
    retries: repeats of a request if no server answers, and of embed() if its version is gone. Each
        takes a new connection, on which a balancer may choose another server.
    retry_seconds: no repeat of a request begins later than this after its first try.
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
    retry_seconds: float = MAX_SECONDS
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
            # Without a port, gRPC would take that of TLS.
            complete = parts.hostname and parts.port != 0 and (parts.port or parts.scheme != "grpc")
        except ValueError:  # the port is not a number
            complete = False
        path = PATHS.get(parts.scheme)
        if not complete or path is None or not re.fullmatch(path, parts.path) or any(parts[3:]):
            raise ValueError(
                f"the URL must be like http://host:8000 or grpc://host:8001, got {self.url!r}"
            )
        if not (self.batch_size >= 1 and self.batch_bytes >= 1):  # or nan
            raise ValueError("batch_size and batch_bytes must be positive")
        if not (self.retries >= 0 and self.retry_seconds >= 0):
            raise ValueError("retries and retry_seconds must not be negative")
        if not 0 < self.timeout <= MAX_SECONDS:
            limit = f"above 0 and up to {MAX_SECONDS:.0f}"
            raise ValueError(f"timeout must be a number of seconds {limit}, got {self.timeout}")
        if self.api_key and not re.fullmatch("[!-~]+", self.api_key):
            raise ValueError("api_key must be printable ASCII without blanks")
        self.version = str(self.version) if self.version else None
        tls = tls_context(parts.scheme, self.ca, self.cert)  # for gRPC, only to check ca and cert
        headers = {"authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        options: dict[str, Any] = {"timeout": self.timeout, "headers": headers}
        self._pool = Pool(
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

    def be_patient(self) -> None:
        """Wait half a minute or more for a server that has answered, should it go away."""
        self.retries = max(self.retries, PATIENT_RETRIES)
        self.retry_seconds = MAX_SECONDS

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

    def configuration(self) -> Configuration:
        """Get thresholds and manifest hashes by one request. Raises: NpairErrors."""
        return Configuration(self._call(lambda transport: transport.parameters(), self.retries))

    def thresholds(self) -> Thresholds | None:
        """Get the served version's similarity thresholds, or None. Raises: NpairErrors."""
        return self.configuration().thresholds()

    def manifest_sha256(self, version: str) -> str | None:
        """Get the hash that tells a served version from others of its number, or None.

        Raises: NpairErrors.
        """
        return self.configuration().manifest_sha256(version)

    def versions(self) -> list[str]:
        """Get the served versions of the model; none if the server does not tell."""
        with self._pool.lend() as transport, contextlib.suppress(RequestTimeoutError):
            return self._versions(transport) or []
        return []

    def embed(self, images: Photo | Iterable[Photo]) -> Embeddings:
        """Embed one photo or many: paths, encoded bytes or open binary files.

        One version makes all vectors: if it is not pinned, and is replaced meanwhile, start over.
        Raises: InvalidPhotoError that names every refused photo, other NpairErrors, OSError for an
        unreadable file, ValueError if there is no photo.
        """
        single = isinstance(images, str | os.PathLike | bytes | bytearray | memoryview)
        one = single or hasattr(images, "read")
        photos: list[Photo] = [images] if one else list(images)  # type: ignore[list-item, arg-type]
        # Files are read once, though a call may start over.
        photos = [read(photo) if hasattr(photo, "read") else photo for photo in photos]
        for attempt in itertools.count():
            try:
                results = list(stream := self.stream(map(read, photos)))
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

    def _infer(self, photos: Sequence[bytes], version: str | None, retries: int) -> Embeddings:
        """Embed one batch in one request."""
        if version is not None and not re.fullmatch("[1-9][0-9]{0,17}", version):
            raise self._gone(version, None)  # Triton would take 017 or +17 for 17
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
        """Ask, and retry over other connections if no server answers or the version is gone.

        Not after a timeout: the server may still be at work, and a retry would add to its load.
        """
        attempt, rounds = 0, MAX_RECONNECTS if retries else 0
        last = time.monotonic() + self.retry_seconds
        with self._pool.lend() as transport:
            while True:
                try:
                    return ask(transport)
                except (UnavailableError, InvalidRequestError) as error:
                    self._pool.check_open()
                    served = self._versions(transport) if version else None
                    if isinstance(error, VersionGoneError) or (served and version not in served):
                        if not rounds:
                            raise self._gone(version, served) from error
                        rounds -= 1
                    elif (
                        attempt == retries
                        or isinstance(error, InvalidRequestError)
                        or (left := last - time.monotonic()) <= 0
                    ):
                        raise
                    else:
                        log.info("%s does not answer (%s); trying again", self.url, error)
                        self._pool.back_off(attempt, left)
                        attempt += 1
                self._reconnect(transport, version)

    def _reconnect(self, transport: Transport, version: str | None) -> None:
        """Reconnect until a server has the version (any, if None), or nobody tells for a second.

        Raises: VersionGoneError if all servers have other versions.
        """
        others, began = set[str](), time.monotonic()
        for _ in range(MAX_RECONNECTS):
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
