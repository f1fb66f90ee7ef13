"""Answers other than 200: one exception, one JSON form (OpenAI's), one table of statuses."""

from __future__ import annotations

import logging

from pydantic import BaseModel
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
from npair.gallery.gallery import PhotoGoneError
from npair.gallery.location import GalleryError, GalleryStoreError, Where

LOG = logging.getLogger("npair.web")
RETRY_AFTER = "1"  # seconds

# The first match counts. Any other NpairError is a fault of the server behind, like 502's here.
STATUSES: dict[type[NpairError], int] = {
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


def refused_of(error: Exception, gallery: Where) -> RefusedError:
    """Translate an error of the client or the gallery, without the names of folders and files."""
    if isinstance(error, InvalidPhotoError):
        lone = list(error.reasons) == [0]
        message = error.reasons[0] if lone else str(error)
        return RefusedError(400, message, param="photo", code="invalid_photo")
    if isinstance(error, PhotoGoneError):
        message = "the gallery has no such photo, or its file is gone"
        return RefusedError(404, message, code="photo_gone")
    if isinstance(error, GalleryError | PermissionError):
        LOG.warning("%s", error)
        return RefusedError(503, _remedy(error, gallery), code="gallery")
    status = next((status for kind, status in STATUSES.items() if isinstance(error, kind)), 502)
    if status >= 500:
        LOG.warning("%s: %s", type(error).__name__, error)
    return RefusedError(status, f"the model's server: {error}", code=type(error).__name__)


def _remedy(error: GalleryError | PermissionError, gallery: Where) -> str:
    if isinstance(error, PermissionError):
        return "the service may not read the gallery; make its files readable"
    if isinstance(error, GalleryStoreError):  # which names the bucket
        return "the object store that holds the gallery does not answer as it should; try again"
    if isinstance(error.__cause__, VersionGoneError):
        return f"{error.__cause__}; build the gallery again: npair index build"
    if error.__cause__:  # which may name files
        return "the gallery is damaged; delete it, and build it again: npair index build"
    return str(error).replace(f" in {gallery}", "")


class Reason(BaseModel):
    """The reason. param: the part of the request that is wrong. code: for programs."""

    message: str
    type: str
    param: str | None
    code: str | None


class Refusal(BaseModel):
    """The body of every answer other than 200, as OpenAI's clients expect it."""

    error: Reason


def answer(refused: RefusedError) -> JSONResponse:
    status = refused.status
    kind = "invalid_request_error" if status < 500 else "server_error"
    kind = KINDS.get(status, kind)
    reason = Reason(message=str(refused), type=kind, param=refused.param, code=refused.code)
    return JSONResponse(Refusal(error=reason).model_dump(), status, HEADERS.get(status))
