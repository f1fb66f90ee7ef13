"""Decode photos sent as base64 text; test_model.py sends them to a real server."""

from __future__ import annotations

import base64
import contextlib
import re
import textwrap
import tracemalloc
from collections.abc import Callable
from urllib.parse import quote

import pytest
from fuzz import PHOTOS

from npair.publishing.drawings import draw, encode
from npair.serving.preprocess import Limits
from npair.serving.refusal import PhotoError
from npair.serving.text import photo_of

LIMITS = Limits(max_bytes=100_000, max_pixels=1_000_000)
WAYS: dict[str, Callable[[bytes], bytes]] = {
    "standard": base64.b64encode,
    "URL-safe": base64.urlsafe_b64encode,
    "without padding": lambda photo: base64.urlsafe_b64encode(photo).rstrip(b"="),
    "in lines": base64.encodebytes,
    "MIME": lambda photo: base64.encodebytes(photo).replace(b"\n", b"\r\n"),
    "indented": lambda photo: textwrap.indent(base64.encodebytes(photo).decode(), "\t ").encode(),
    "data URI": lambda photo: b"data:image/jpeg;base64," + base64.b64encode(photo),
    "data URI in capitals": lambda photo: (
        b"DATA:image/JPEG;charset=utf-8;name=a.jpg;BASE64," + base64.b64encode(photo)
    ),
    "data URI without a type": lambda photo: b"data:;base64," + base64.b64encode(photo),
    "percent-encoded": lambda photo: (
        b"data:image/png;base64," + quote(base64.b64encode(photo), safe="").encode()
    ),
    "percent-encoded lines, in lower case": lambda photo: re.sub(
        rb"%..",
        lambda escape: escape[0].lower(),
        b"data:;base64," + quote(base64.encodebytes(photo).replace(b"\n", b" \r\n")).encode(),
    ),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", PHOTOS)
def test_every_photo_gets_through_every_way(name: str, way: str) -> None:
    photo = PHOTOS[name]
    for padding in range(3):  # bytes after a photo's end are ignored
        assert photo_of(WAYS[way](photo + bytes(padding)), LIMITS) == photo + bytes(padding)


@pytest.mark.parametrize("name", PHOTOS)
def test_photos_themselves_are_not_taken_for_text(name: str) -> None:
    assert photo_of(PHOTOS[name], LIMITS) is PHOTOS[name]


def test_a_webp_made_of_letters_is_none_the_less_a_photo() -> None:
    photo = b"RIFFaaaaWEBPVP8L" + b"a" * 100
    assert photo_of(photo, LIMITS) is photo


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"no photo",
        b"x",
        b"<html>",
        b"\xff\xd8\xff",
        b"GIF89a\0\0",
        b'{"b64": "/9j/"}',
        bytes(100),
    ],
)
def test_what_is_no_text_of_a_photo_stays_what_it_is(sent: bytes) -> None:
    assert photo_of(sent, LIMITS) is sent


TEXT = base64.b64encode(encode(draw(0, 0, 64), "JPEG"))


@pytest.mark.parametrize(
    ("sent", "reason"),
    [
        (
            TEXT[:400] + b"!" + TEXT[400:],
            "looks like base64, but character 401 of it is no part of that",
        ),
        (TEXT[:400] + b"=" + TEXT[400:], "looks like base64, but character 401"),
        (TEXT.rstrip(b"=")[: len(TEXT) // 4 * 4 - 7], "looks like base64, but is not whole"),
        (
            base64.b64encode(TEXT),
            "looks like base64, but what it stands for is text, not a JPEG, PNG or WebP",
        ),
        (
            base64.b64encode(encode(draw(0, 0, 64), "GIF")),
            "looks like base64, but what it stands for is a GIF",
        ),
        (b"data:image/png," + TEXT, "a data: URI that is not base64"),
        (b"data:;base64,%2B%41" + TEXT, "looks like base64, but character 2 of it is no part"),
        (b"data:image/svg+xml,%3Csvg/%3E", "a data: URI that is not base64"),
    ],
)
def test_refusals_say_what_it_looks_like(sent: bytes, reason: str) -> None:
    with pytest.raises(PhotoError, match=reason) as caught:
        photo_of(sent, LIMITS)
    assert caught.value.reason == "not_an_image"


def test_text_is_bounded_before_it_is_decoded() -> None:
    largest = b"\xff\xd8\xff" + bytes(LIMITS.max_bytes - 3)
    assert photo_of(base64.encodebytes(largest), LIMITS) == largest
    with pytest.raises(PhotoError, match="more than a photo within the limit of 100000") as caught:
        photo_of(b"A" * 160_000, LIMITS)
    assert caught.value.reason == "too_many_bytes"


@pytest.mark.parametrize("escape", [b"%", b"%41", b"%2B", b"%2b", b"%20", b"%3D"])
def test_escapes_take_no_more_memory_than_other_text(escape: bytes) -> None:
    sent = b"data:image/jpeg;base64," + escape * (150_000 // len(escape))
    tracemalloc.start()
    with contextlib.suppress(PhotoError):
        photo_of(sent, LIMITS)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 3 * len(sent)
