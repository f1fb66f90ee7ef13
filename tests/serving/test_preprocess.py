"""Decoding, from the limits inwards. That the served formats agree with their RGB twins is in model/api/test_model_api.py."""

from __future__ import annotations

import dataclasses
import io
import random
import subprocess
import sys
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from conftest import LIMITS, PREPROCESSING
from PIL import Image, ImageOps

from npair.drawings import draw, encode
from npair.serving.preprocess import Limits, PhotoError, Preprocessing, decode

PHOTO = draw(0, 0, 200)
SHARP = Preprocessing(size=208, resample="BILINEAR", background=255)
LARGE = Limits(max_bytes=10_000_000, max_pixels=10_000_000)


def decoded(photo: bytes) -> npt.NDArray[np.uint8]:
    return decode(photo, PREPROCESSING, LIMITS)


def by_pillow(photo: bytes) -> npt.NDArray[np.uint8]:
    """The central square of all pixels, scaled to what SHARP asks for."""
    image = ImageOps.fit(Image.open(io.BytesIO(photo)).convert("RGB"), (208, 208), Image.Resampling.BILINEAR)
    return np.asarray(ImageOps.exif_transpose(image))


def test_central_square_scaled() -> None:
    stripes = Image.new("RGB", (300, 100), "red")
    stripes.paste("blue", (100, 0, 200, 100))
    pixels = decoded(encode(stripes, "PNG"))
    assert pixels.shape == (64, 64, 3)
    assert pixels.dtype == np.uint8
    assert (pixels == (0, 0, 255)).all(axis=2).mean() > 0.9


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (500, 1), (64, 64), (999, 1001)])
def test_any_shape(size: tuple[int, int]) -> None:
    assert (decoded(encode(Image.new("RGB", size, "lime"), "PNG")) == (0, 255, 0)).all()


def test_limits_are_inclusive() -> None:
    photo = encode(PHOTO, "JPEG")
    exact = Limits(max_bytes=len(photo), max_pixels=200 * 200)
    assert decode(photo, PREPROCESSING, exact).shape == (64, 64, 3)
    with pytest.raises(PhotoError, match=f"{len(photo)} bytes, more than the limit of {len(photo) - 1}"):
        decode(photo, PREPROCESSING, dataclasses.replace(exact, max_bytes=len(photo) - 1))
    with pytest.raises(PhotoError, match="200x200 pixels, more than the limit of 39999"):
        decode(photo, PREPROCESSING, dataclasses.replace(exact, max_pixels=39_999))


def test_16_bit_grey_is_scaled_not_clipped() -> None:
    ramp = np.linspace(0, 65535, 64 * 64, dtype=np.uint16).reshape(64, 64)
    pixels = decoded(encode(Image.fromarray(ramp), "PNG"))
    np.testing.assert_array_equal(pixels[..., 0], ramp >> 8)


def test_transparent_pixels_show_the_background() -> None:
    photo = encode(Image.new("RGBA", (50, 50), (255, 0, 0, 0)), "PNG")
    assert (decoded(photo) == 255).all()
    assert (decode(photo, dataclasses.replace(PREPROCESSING, background=7), LIMITS) == 7).all()


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_damaged_exif_does_not_spoil_the_photo() -> None:
    plain, spoiled = encode(PHOTO, "JPEG"), encode(PHOTO, "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xffgarbage")
    np.testing.assert_array_equal(decoded(plain), decoded(spoiled))


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("size", [(1, 1), (100, 300), (208, 208), (237, 348), (348, 348), (1100, 900), (1500, 300)])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": "4:4:4"}], ids=str)
def test_jpegs_are_scaled_as_by_pillow(size: tuple[int, int], mode: str, options: dict[str, Any]) -> None:
    photo = encode(draw(0, 0).convert(mode).resize(size), "JPEG", quality=90, **options)
    difference = decode(photo, SHARP, LARGE).astype(int) - by_pillow(photo)
    assert np.abs(difference).mean() < 2
    assert abs(difference.mean()) < 0.5


def test_orientation_counts_after_scaled_decoding() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    photo = encode(PHOTO.resize((800, 600)), "JPEG", quality=90, exif=exif)
    assert np.abs(decode(photo, SHARP, LARGE).astype(int) - by_pillow(photo)).mean() < 2


def test_what_browsers_show_is_taken() -> None:
    """Zeros between two segments, over which libjpeg warns, and bytes after the end of the picture."""
    photo = encode(PHOTO, "JPEG", quality=90)
    quantisation = photo.index(b"\xff\xdb")
    for odd in (photo[:quantisation] + b"\0\0" + photo[quantisation:], photo + b"more"):
        assert np.abs(decode(odd, SHARP, LARGE).astype(int) - by_pillow(photo)).mean() < 2


@pytest.mark.parametrize("keep", [0.05, 0.2, 0.5, 0.9, 0.99])
def test_truncated_jpegs_are_refused(keep: float) -> None:
    photo = encode(PHOTO, "JPEG", quality=90)
    with pytest.raises(PhotoError, match="truncated"):
        decoded(photo[: int(keep * len(photo))])


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP"])
def test_damaged_files_are_refused_or_decoded(image_format: str) -> None:
    """Truncated anywhere and with any bytes changed, a photo is decoded or refused; nothing else is raised."""
    photo, dice = encode(PHOTO, image_format), random.Random(0)
    outcomes: set[object] = set()
    for _ in range(300):
        damaged = bytearray(photo[: dice.randrange(len(photo))] if dice.random() < 0.5 else photo)
        for _ in range(dice.randrange(4)):
            if damaged:
                damaged[dice.randrange(len(damaged))] = dice.randrange(256)
        try:
            outcomes.add(decoded(bytes(damaged)).shape)
        except PhotoError:
            outcomes.add("refused")
    assert outcomes == {(64, 64, 3), "refused"}


def test_want_of_memory_is_not_blamed_on_the_photo() -> None:
    """In a process that may not have the 75 MB that the pixels take."""
    code = """
import io, resource, sys
from PIL import Image
from npair.serving.preprocess import Limits, Preprocessing, decode
photo = io.BytesIO()
Image.new("RGB", (5000, 5000)).save(photo, "PNG")
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (32 << 20), resource.RLIM_INFINITY))
try:
    decode(photo.getvalue(), Preprocessing(64, "BILINEAR", 255), Limits(1 << 30, 1 << 30))
except MemoryError:
    print("no memory")
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "no memory\n"
