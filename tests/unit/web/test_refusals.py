"""Check which status each error of the client becomes."""

from __future__ import annotations

from pathlib import Path

import pytest

from npair.client import (
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
from npair.gallery.gallery import PhotoGoneError
from npair.gallery.location import GalleryError
from npair.web.refusals import answer, refused_of

EXPECTED: dict[Exception, int] = {
    InvalidPhotoError({0: "empty"}): 400,
    RequestTooLargeError("too large"): 413,
    InvalidRequestError("no such model"): 502,
    AccessDeniedError("another key"): 502,
    UnavailableError("refused"): 503,
    UnreachableError("refused"): 503,
    VersionGoneError("version 1 is not served"): 503,
    RequestTimeoutError("timed out"): 504,
    ServerFaultError("dead"): 502,
    GalleryError("the gallery in /srv/photos is damaged"): 503,
    PermissionError(13, "Permission denied", "/srv/photos"): 503,
    PhotoGoneError("/srv/photos/a.jpg is gone"): 404,
}


@pytest.mark.parametrize("error", EXPECTED, ids=lambda error: type(error).__name__)
def test_status(error: Exception) -> None:
    answered = answer(refused_of(error, Path("/srv/photos")))
    assert answered.status_code == EXPECTED[error]
    assert b"/srv" not in answered.body
    assert ("retry-after" in answered.headers) == (EXPECTED[error] == 503)


def test_every_error_of_the_client_is_expected() -> None:
    kinds = set(NpairError.__subclasses__())
    while more := {each for kind in kinds for each in kind.__subclasses__()} - kinds:
        kinds |= more
    assert kinds <= set(map(type, EXPECTED))
