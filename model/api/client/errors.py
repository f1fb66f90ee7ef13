"""The client's exceptions, and the tables that map the errors of HTTP, gRPC and Triton to them."""

from __future__ import annotations

import contextlib
import http.client
import re
from collections.abc import Iterator

from tritonclient.utils import InferenceServerException


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
def reading() -> Iterator[None]:
    """Blame the server if its answer cannot be read."""
    try:
        yield
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        problem = f"an answer that is not understood: {type(error).__name__}: {error}"
        raise InferenceServerException(problem) from error
