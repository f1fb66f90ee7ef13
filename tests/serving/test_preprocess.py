"""Decoding, from the limits inwards. That the served formats agree with their RGB twins is in model/api/test_model_api.py."""

from __future__ import annotations

import dataclasses
import random

import numpy as np
import numpy.typing as npt
import pytest
from conftest import LIMITS, PREPROCESSING
from PIL import Image

from npair.drawings import draw, encode
from npair.serving.preprocess import Limits, PhotoError, decode

PHOTO = draw(0, 0, 200)


def decoded(photo: bytes) -> npt.NDArray[np.uint8]:
    return decode(photo, PREPROCESSING, LIMITS)


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


def test_reduced_decoding_of_large_jpegs_changes_little() -> None:
    large = PHOTO.resize((1600, 1600), Image.Resampling.BICUBIC)
    limits = Limits(max_bytes=10_000_000, max_pixels=10_000_000)
    reduced, full = (decode(encode(large, kind), PREPROCESSING, limits) for kind in ("JPEG", "PNG"))
    assert np.abs(reduced.astype(int) - full).mean() < 2


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
