"""Convert colour profiles in every format, and ignore oversized PNG chunks."""

from __future__ import annotations

import dataclasses
import io
import struct
import tracemalloc
import zlib
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image, ImageCms
from support import profiles
from support.photos import LIMITS, PREPROCESSING, chunk

from npair.publishing.drawings import draw, encode
from npair.serving.colour import to_srgb
from npair.serving.metadata import MAX_PROFILE
from npair.serving.preprocess import decode

PLAIN = draw(0, 0, 200)
EXACT: dict[str, dict[str, Any]] = {
    "JPEG": {"quality": 100, "subsampling": "4:4:4"},
    "PNG": {},
    "WEBP": {"lossless": True},
}


def decoded(photo: bytes) -> npt.NDArray[np.int64]:
    return decode(photo, PREPROCESSING, dataclasses.replace(LIMITS, max_bytes=10_000_000)).astype(
        int
    )


def in_space(profile: bytes) -> Image.Image:
    """Convert PLAIN to a profile, clipping colours outside its gamut to the nearest."""
    srgb, target = ImageCms.createProfile("sRGB"), ImageCms.ImageCmsProfile(io.BytesIO(profile))
    transform = ImageCms.buildTransform(
        srgb, target, "RGB", "RGB", ImageCms.Intent.RELATIVE_COLORIMETRIC
    )
    converted = transform.apply(PLAIN)
    del converted.info["icc_profile"]  # else Pillow saves the profile
    return converted


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("space", ["DISPLAY_P3", "ADOBE_RGB", "PROPHOTO"])
def test_colours_are_those_of_the_profile(name: str, space: str) -> None:
    profile = getattr(profiles, space)
    converted, expected = in_space(profile), decoded(encode(PLAIN, name, **EXACT[name]))
    ignored = np.abs(decoded(encode(converted, name, **EXACT[name])) - expected).mean()
    difference = np.abs(
        decoded(encode(converted, name, icc_profile=profile, **EXACT[name])) - expected
    ).mean()
    assert difference < 1.5
    assert ignored > 3 * difference


def test_grey_by_a_grey_profile() -> None:
    """In linear grey, 128 is half of white's light, which is 188 in sRGB."""
    for name in ("JPEG", "PNG"):
        photo = encode(Image.new("L", (80, 80), 128), name, icc_profile=profiles.GREY)
        assert np.abs(decoded(photo) - 188).max() <= 1


def test_inks_by_a_printers_profile() -> None:
    cyan = Image.new("CMYK", (80, 80), (255, 0, 0, 0))
    assert np.abs(decoded(encode(cyan, "JPEG", icc_profile=profiles.PRINTER)) - 119).max() <= 2
    assert np.abs(decoded(encode(cyan, "JPEG")) - (0, 255, 255)).max() <= 2


def test_transparent_pixels_still_show_the_background() -> None:
    photo = encode(
        Image.new("RGBA", (50, 50), (255, 0, 0, 0)), "PNG", icc_profile=profiles.DISPLAY_P3
    )
    assert (decoded(photo) == 255).all()


def test_profiles_in_several_segments_are_read_in_their_order() -> None:
    large = profiles.profile(
        b"GRAY",
        {
            b"wtpt": profiles.xyz(profiles.D50),
            b"text": bytes(150_000),
            b"kTRC": profiles.gamma(1.0),
        },
    )
    photo = encode(Image.new("L", (80, 80), 128), "JPEG", icc_profile=large)
    assert photo.count(b"ICC_PROFILE\0") == 3
    assert np.abs(decoded(photo) - 188).max() <= 1
    first = photo.index(b"ICC_PROFILE\0") - 4
    end = first + 2 + int.from_bytes(photo[first + 2 : first + 4], "big")
    behind = photo.index(b"\xff\xdb")
    np.testing.assert_array_equal(
        decoded(photo[:first] + photo[end:behind] + photo[first:end] + photo[behind:]),
        decoded(photo),
    )
    assert np.abs(decoded(photo[:first] + photo[end:]) - 128).max() <= 1, "it is incomplete"


MATRIX = profiles.DISPLAY_P3
BROKEN = {
    "empty": b"",
    "cut": MATRIX[:200],
    "no profile": bytes(500),
    "of another kind of pixels": profiles.GREY,
    "of a printer": profiles.PRINTER,
    "without tags": MATRIX[:128] + bytes(4),
    "too large": MATRIX + bytes(MAX_PROFILE),
    "a link of two devices": MATRIX[:12] + b"link" + MATRIX[16:],
    "tags beyond the end": MATRIX[:136] + b"\xff\xff\xff\xf0" * 20 + MATRIX[216:],
    "thousands of tags": MATRIX[:128] + struct.pack(">I", 5000) + MATRIX[132:],
    "processing elements": profiles.profile(
        b"RGB ", {b"D2B0": b"mpet" + bytes(100), b"wtpt": profiles.xyz(profiles.D50)}
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
@pytest.mark.parametrize("name", ["PNG", "WEBP"])
def test_broken_profiles_are_ignored(name: str, kind: str) -> None:
    photo = encode(PLAIN, name, icc_profile=BROKEN[kind], **EXACT[name])
    np.testing.assert_array_equal(decoded(photo), decoded(encode(PLAIN, name, **EXACT[name])))


def test_srgb_costs_nothing() -> None:
    assert to_srgb(profiles.SRGB, "RGB") is None
    assert (
        to_srgb(
            profiles.profile(
                b"GRAY", {b"wtpt": profiles.xyz(profiles.D50), b"kTRC": profiles.SRGB_CURVE}
            ),
            "L",
        )
        is None
    )


LARGE = zlib.compress(bytes((1 << 20) + 1))
CHUNKS = {
    "profile": chunk(b"iCCP", b"printer\0\0" + LARGE),
    "broken profile": chunk(b"iCCP", b"broken\0\0no zlib stream"),
    "text": chunk(b"zTXt", b"Raw profile type xmp\0\0" + LARGE),
    "international text": chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + LARGE),
    "much text": chunk(b"zTXt", b"x\0\0" + zlib.compress(bytes(1_000_000))) * 80,
    "EXIF text that is none": chunk(b"zTXt", b"Raw profile type exif\0\0" + LARGE),
    "wrong checksum": chunk(b"tEXt", b"a\0b")[:-1] + b"\0",
    "a chunk of the application's own": chunk(b"npAr", bytes(9)),
}


@pytest.mark.parametrize("kind", CHUNKS)
def test_chunks_beside_the_pixels_do_not_spoil_a_png(kind: str) -> None:
    photo = encode(PLAIN, "PNG")
    for start in (33, len(photo) - 12):  # after the header, before the end
        np.testing.assert_array_equal(
            decoded(photo[:start] + CHUNKS[kind] + photo[start:]), decoded(photo)
        )


def test_profiles_that_are_ignored_are_not_kept() -> None:
    tracemalloc.start()
    for number in range(8):
        assert to_srgb(bytes([number]) * (MAX_PROFILE + 1), "RGB") is None
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert kept < MAX_PROFILE
