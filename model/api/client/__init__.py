"""Embed photos with an npair server, over HTTP or gRPC::

    with NpairClient("http://127.0.0.1:8000") as client:
        vectors, version = client.embed(["a.jpg", "b.jpg"])

This folder needs numpy and tritonclient[http,grpc], and can be copied alone. ``python -m client``
runs its commands. Exceptions::

    NpairError
    ├── InvalidPhotoError         the server refused photos: .reasons says why, by index
    ├── InvalidRequestError       wrong model, version or server
    │   └── RequestTooLargeError  more bytes than the server, or a proxy before it, accepts
    ├── AccessDeniedError         a proxy before the server wants another API key
    ├── UnavailableError          the model is not served; retries have failed
    │   ├── UnreachableError      no server answers at the URL
    │   └── VersionGoneError      the model is served, but not in the version the call is pinned to
    ├── RequestTimeoutError       no answer in time; the server may still be working on it
    └── ServerFaultError          the server failed, or its answer makes no sense

Wrong arguments raise ValueError or TypeError, unreadable photos OSError.
"""

from .client import DEFAULT_URL, PIXEL, AsyncNpairClient, NpairClient
from .errors import (
    AccessDeniedError,
    InvalidPhotoError,
    InvalidRequestError,
    NpairError,
    RequestTimeoutError,
    RequestTooLargeError,
    ServerFaultError,
    UnavailableError,
    UnreachableError,
    VersionGoneError,
)
from .results import (
    THRESHOLD_PARAMETERS,
    Configuration,
    Embedded,
    Embeddings,
    Thresholds,
    Vectors,
)
from .stream import IN_FLIGHT, EmbeddingStream, Photo, Readable
from .transports import GrpcTransport, HttpTransport, Transport

__all__ = [
    "DEFAULT_URL",
    "IN_FLIGHT",
    "PIXEL",
    "THRESHOLD_PARAMETERS",
    "AccessDeniedError",
    "AsyncNpairClient",
    "Configuration",
    "Embedded",
    "EmbeddingStream",
    "Embeddings",
    "GrpcTransport",
    "HttpTransport",
    "InvalidPhotoError",
    "InvalidRequestError",
    "NpairClient",
    "NpairError",
    "Photo",
    "Readable",
    "RequestTimeoutError",
    "RequestTooLargeError",
    "ServerFaultError",
    "Thresholds",
    "Transport",
    "UnavailableError",
    "UnreachableError",
    "Vectors",
    "VersionGoneError",
]
