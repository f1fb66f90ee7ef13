"""Decoding in itself; what the server makes of hostile photos is tested in model/api."""

from __future__ import annotations

import io

import numpy as np
import pytest
from conftest import LIMITS
from PIL import Image, ImageOps

from npair.drawings import draw, encode
from npair.serving.preprocess import Limits, PhotoError, Preprocessing, decode

SIZE = 208
PREPROCESSING = Preprocessing(size=SIZE, resample="BILINEAR", background=255)
PHOTO = draw(0, 0).resize((348, 348))


def by_pillow(photo: bytes) -> np.ndarray:
    """The central square of all pixels, scaled."""
    image = ImageOps.fit(Image.open(io.BytesIO(photo)).convert("RGB"), (SIZE, SIZE), Image.Resampling.BILINEAR)
    return np.asarray(ImageOps.exif_transpose(image))


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("size", [(1, 1), (100, 300), (208, 208), (237, 348), (348, 348), (1100, 900), (1500, 300)])
def test_scaled_decoding_shows_the_same(size: tuple[int, int], mode: str) -> None:
    for options in ({}, {"progressive": True}, {"subsampling": "4:4:4"}):
        photo = encode(PHOTO.convert(mode).resize(size), "JPEG", quality=90, **options)
        difference = decode(photo, PREPROCESSING, LIMITS).astype(int) - by_pillow(photo)
        assert np.abs(difference).mean() < 2
        assert abs(difference.mean()) < 0.5


def test_orientation_counts_after_scaled_decoding() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    photo = encode(PHOTO.resize((800, 600)), "JPEG", quality=90, exif=exif)
    assert np.abs(decode(photo, PREPROCESSING, LIMITS).astype(int) - by_pillow(photo)).mean() < 2


def test_what_browsers_show_is_taken() -> None:
    """Zeros between two segments, over which libjpeg warns, and bytes after the end of the picture."""
    photo = encode(PHOTO, "JPEG", quality=90)
    quantisation = photo.index(b"\xff\xdb")
    for odd in (photo[:quantisation] + b"\0\0" + photo[quantisation:], photo + b"more"):
        assert np.abs(decode(odd, PREPROCESSING, LIMITS).astype(int) - by_pillow(photo)).mean() < 2


@pytest.mark.parametrize("keep", [300, 0.2, 0.5, 0.9, 0.99])
def test_truncated(keep: float) -> None:
    photo = encode(PHOTO, "JPEG", quality=90)
    with pytest.raises(PhotoError, match="truncated"):
        decode(photo[: int(keep if keep > 1 else keep * len(photo))], PREPROCESSING, LIMITS)


def test_no_damage_brings_it_down() -> None:
    """A photo with a few damaged bytes is a photo or a PhotoError."""
    photo, random, refused = bytearray(encode(PHOTO, "JPEG", quality=90)), np.random.default_rng(0), 0
    for _ in range(300):
        damaged = photo.copy()
        for place in random.integers(2, len(photo), 5):
            damaged[place] = random.integers(256)
        try:
            assert decode(bytes(damaged), PREPROCESSING, LIMITS).shape == (SIZE, SIZE, 3)
        except PhotoError:
            refused += 1
    assert 0 < refused < 300


def test_limits_come_before_pixels() -> None:
    photo = encode(PHOTO, "JPEG", quality=90)
    with pytest.raises(PhotoError, match="348x348 pixels, more than the limit of 1000"):
        decode(photo, PREPROCESSING, Limits(max_bytes=len(photo), max_pixels=1000))
    with pytest.raises(PhotoError, match=f"{len(photo)} bytes, more than the limit"):
        decode(photo, PREPROCESSING, Limits(max_bytes=len(photo) - 1, max_pixels=1_000_000))
