"""Check what is read of a PNG besides its pixels; test_preprocess.py checks the pixels."""

from __future__ import annotations

import zlib
from unittest.mock import Mock

import pytest
from fuzz import PHOTOS
from support.photos import LIMITS, PREPROCESSING, chunk

from npair.serving import png
from npair.serving.metadata import Metadata
from npair.serving.png import MAX_CHUNKS, read
from npair.serving.preprocess import decode
from npair.serving.refusal import PhotoError

PHOTO = PHOTOS["RGB.png"]


def with_chunks(*chunks: bytes) -> bytes:
    """Insert chunks after the header."""
    return PHOTO[:33] + b"".join(chunks) + PHOTO[33:]


def profile(content: bytes) -> bytes:
    return chunk(b"iCCP", b"name\0\0" + zlib.compress(content))


def exif(content: bytes) -> bytes:
    packed = zlib.compress(b"\n\n\n" + content.hex().encode())
    return chunk(b"zTXt", b"Raw profile type exif\0\0" + packed)


def xmp(content: bytes) -> bytes:
    return chunk(b"zTXt", b"XML:com.adobe.xmp\0\0" + zlib.compress(content))


def international(content: bytes) -> bytes:
    return chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(content))


def test_the_first_chunk_of_each_kind_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    unpacked = Mock(side_effect=png._unpacked)
    monkeypatch.setattr(png, "_unpacked", unpacked)
    first, second = (
        [profile(content), exif(content), xmp(content)] for content in (b"first", b"second")
    )
    photo = with_chunks(
        chunk(b"zTXt", b"Title\0\0"), *first, *second * 100, international(b"third")
    )
    _, metadata = read(photo)
    assert metadata == Metadata(exif=b"first", xmp=b"first", profile=b"first")
    assert unpacked.call_count == 3


def test_one_that_cannot_be_read_counts_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    unpacked = Mock(side_effect=png._unpacked)
    monkeypatch.setattr(png, "_unpacked", unpacked)
    broken = [
        chunk(b"iCCP", b"name\0\0broken"),
        chunk(b"zTXt", b"Raw profile type exif\0\0broken"),
        chunk(b"zTXt", b"XML:com.adobe.xmp\0\0broken"),
    ]
    _, metadata = read(with_chunks(*broken * 100, profile(b"x"), exif(b"x"), xmp(b"x")))
    assert metadata == Metadata()
    assert unpacked.call_count == 3


def test_no_metadata_reach_the_decoder_behind_a_chunk_of_digits() -> None:
    """Pillow takes digits and underscores for letters, and reads on."""
    for kind in (b"aa0A", b"__AA", b"AA00"):
        content, metadata = read(with_chunks(chunk(kind, b""), profile(b"x"), xmp(b"x")))
        assert b"iCCP" not in content
        assert b"zTXt" not in content
        assert metadata.profile == metadata.xmp == b"x"


@pytest.mark.parametrize("kind", [b"aaAA", b"AAAA", b"AaAA", b"IDAT", b"tRNS"])
def test_chunks_are_limited(kind: bytes) -> None:
    with pytest.raises(PhotoError, match=f"more than the limit of {MAX_CHUNKS} chunks"):
        decode(with_chunks(chunk(kind, b"") * MAX_CHUNKS), PREPROCESSING, LIMITS)
    many = chunk(kind.lower(), b"") * (MAX_CHUNKS - 100)
    assert decode(with_chunks(many), PREPROCESSING, LIMITS).shape == (64, 64, 3)
