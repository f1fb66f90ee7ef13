"""Answers other than 200: one exception, one JSON form (OpenAI's), one table of statuses."""

from __future__ import annotations

import logging

from starlette.requests import Request
from starlette.responses import JSONResponse

from npair.client import (
    AccessDeniedError,
    InvalidPhotoError,
    InvalidRequestError,
    NpairError,
    RequestTimeoutError,
    RequestTooLargeError,
    UnavailableError,
    VersionGoneError,
)
from npair.gallery.gallery import GalleryError, PhotoGoneError

LOG = logging.getLogger("npair.web")
RETRY_AFTER = "1"  # seconds

# The first match counts. Any other NpairError is a fault of the server behind, like 502's here.
STATUSES: dict[type[NpairError], int] = {
    InvalidPhotoError: 400,
    RequestTooLargeError: 413,
    InvalidRequestError: 502,  # this service asked for something that the server does not have
    AccessDeniedError: 502,  # this service's own key is wrong, not the caller's
    UnavailableError: 503,
    RequestTimeoutError: 504,
}
KINDS = {401: "authentication_error", 403: "permission_error"}
HEADERS = {401: {"WWW-Authenticate": "Bearer"}, 503: {"Retry-After": RETRY_AFTER}}


class RefusedError(Exception):
    """A request that is not answered with 200. param: the part of the request that is wrong."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code


def refused_of(error: Exception) -> RefusedError:
    """Translate an error of the client or the gallery. No message of a gallery gets out: it names
    folders.
    """
    if isinstance(error, RefusedError):
        return error
    if isinstance(error, GalleryError):
        if isinstance(error, PhotoGoneError):
            message = "the gallery has no such photo, or its file is gone"
            return RefusedError(404, message, code="photo_gone")
        LOG.warning("%s", error)
        if isinstance(error.__cause__, VersionGoneError):
            gone = f"{error.__cause__}; build the gallery anew: npair index build"
            return RefusedError(
                503, f"the gallery is of another version: {gone}", code="version_gone"
            )
        message = "the gallery cannot be searched; the service's log says why"
        return RefusedError(503, message, code="gallery")
    if isinstance(error, InvalidPhotoError):
        lone = list(error.reasons) == [0]
        message = error.reasons[0] if lone else str(error)
        return RefusedError(400, message, param="photo", code="invalid_photo")
    status = next((status for kind, status in STATUSES.items() if isinstance(error, kind)), 502)
    if status >= 500:
        LOG.warning("%s: %s", type(error).__name__, error)
    return RefusedError(status, f"the model's server: {error}", code=type(error).__name__)


def answer(refusal: RefusedError) -> JSONResponse:
    status = refusal.status
    kind = "invalid_request_error" if status < 500 else "server_error"
    error = {
        "message": str(refusal),
        "type": KINDS.get(status, kind),
        "param": refusal.param,
        "code": refusal.code,
    }
    return JSONResponse({"error": error}, status, HEADERS.get(status))


async def handle(_: Request, error: Exception) -> JSONResponse:
    """Answer a RefusedError, NpairError or GalleryError."""
    return answer(refused_of(error))
