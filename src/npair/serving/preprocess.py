"""From the bytes of one photo to the pixels that the network takes.

The one decoder of npair: training, evaluation and serving all call :func:`decode`. Every published version carries a copy of this
file, so a version answers the same way for as long as it exists.
"""

from __future__ import annotations

import contextlib
import io
import re
import struct
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, ImageOps

from . import jpeg
from .refusal import PhotoError, no_photo

FORMATS = ("JPEG", "PNG", "WEBP")
PHOTO = re.compile(rb"\xff\xd8\xff|\x89PNG\r\n\x1a\n|RIFF.{4}WEBP", re.DOTALL)  # how they begin

# Limits.max_pixels is checked before any pixel is decoded; Pillow's own limit is a global that would override a higher setting.
Image.MAX_IMAGE_PIXELS = None

# Each of thousands of entries in a directory of EXIF data may have all of the data for its value, which Pillow makes objects of:
# 10 GB from 65 kB. So Pillow parses no directory, and no more metadata is read than one segment of a JPEG holds.
MAX_METADATA = 65_535
TIFF = re.compile(rb"(?:Exif\0\0)*(?=II|MM)")  # what follows may be in the wrong order, as in some photos


LARGE = 16_000_000  # pixels
NOTHING = nullcontext()


@dataclass(frozen=True)
class Preprocessing:
    """What a network was trained on; travels in the version's manifest, so it has no defaults.

    size: width and height of the network's input, in pixels.
    resample: Pillow's name of the resampling filter, for example ``BILINEAR``.
    background: grey level (0 to 255) that shows through transparent pixels.
    """

    size: int
    resample: str
    background: int


@dataclass(frozen=True)
class Limits:
    """How large a photo may be: encoded, in bytes, and decoded, in pixels (width x height)."""

    max_bytes: int
    max_pixels: int


def is_photo(content: bytes) -> bool:
    """Whether it begins like a JPEG, PNG or WebP."""
    return PHOTO.match(content) is not None


def decode(
    photo: bytes, preprocessing: Preprocessing, limits: Limits, large: AbstractContextManager[object] = NOTHING
) -> npt.NDArray[np.uint8]:
    """Decode one JPEG, PNG or WebP file, upright, its central square scaled to the network's input.

    Grey, palette, CMYK and 16-bit pixels become 8-bit RGB, transparent ones are laid over ``preprocessing.background``, and the
    EXIF orientation is applied. Of an animation the first frame counts. Colour profiles are ignored.

    large: held while a photo of more than LARGE pixels is decoded: with a lock, threads decode one of them at a time, and memory
    need not hold more.
    Returns: uint8 of shape [size, size, 3], RGB.
    Raises: PhotoError for an empty, too large, truncated or unreadable photo or a format that is not in FORMATS; MemoryError.
    """
    if not photo:
        raise PhotoError("empty", "the photo is empty (0 bytes)")
    if len(photo) > limits.max_bytes:
        raise PhotoError(
            "too_many_bytes", f"the photo has {len(photo)} bytes, more than the limit of {limits.max_bytes}; send a smaller file"
        )
    if not is_photo(photo):
        raise PhotoError("not_an_image", no_photo(photo))
    opened = jpeg.read(photo) if photo.startswith(jpeg.SIGNATURE) else _open(photo)
    width, height = opened.size
    if width * height > limits.max_pixels:
        raise PhotoError(
            "too_many_pixels", f"the photo has {width}x{height} pixels, more than the limit of {limits.max_pixels}; scale it down"
        )
    size = (preprocessing.size, preprocessing.size)
    info: dict[Any, Any]
    try:
        with large if width * height > LARGE else NOTHING:
            if isinstance(opened, jpeg.Jpeg):
                pixels, info = opened.decode(size), {"exif": opened.exif, "xmp": opened.xmp}
            else:
                pixels, info = _to_rgb(opened, preprocessing.background), opened.info
            if pixels.mode == "CMYK":
                pixels = pixels.convert("RGB")
            image = ImageOps.fit(pixels, size, Image.Resampling[preprocessing.resample]).convert("RGB")
            del pixels
    except (MemoryError, PhotoError):
        raise
    except Exception as error:  # hostile files make Pillow raise far more than OSError
        raise PhotoError("damaged", f"the image data is truncated or damaged ({error})") from error
    info = {key: value[:MAX_METADATA] for key, value in info.items() if isinstance(value, (str, bytes))}
    with contextlib.suppress(Exception):  # unreadable EXIF data does not spoil the pixels: browsers show such photos unrotated too
        image = _upright(image, info)
    return np.array(image)


def _open(photo: bytes) -> Image.Image:
    """A PNG or WebP, of which no pixel is decoded yet."""
    try:
        return Image.open(io.BytesIO(photo), formats=FORMATS[1:])
    except MemoryError:
        raise
    except Exception as error:
        raise PhotoError("damaged", "the image data is truncated or damaged; send the original file") from error


def _to_rgb(image: Image.Image, background: int) -> Image.Image:
    """Any mode that Pillow reads from FORMATS, as 8-bit RGB."""
    if image.mode.startswith("I"):  # 16-bit grey: Pillow's own conversion would clip at 255 instead of scaling
        rgb = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8)).convert("RGB")
    elif image.has_transparency_data:
        rgba = image if image.mode == "RGBA" else image.convert("RGBA")  # which would copy it
        rgb = Image.new("RGB", image.size, (background, background, background))
        rgb.paste(rgba, mask=rgba)
    else:
        rgb = image.convert("RGB")
    return rgb


def _upright(image: Image.Image, info: dict[Any, Any]) -> Image.Image:
    """The image, turned as the metadata of its photo say. Raises: whatever, where they cannot be read."""
    exif, profile = info.pop("exif", None), info.pop("Raw profile type exif", None)
    if exif is None and profile is not None:  # text: how a PNG has EXIF data that is older than the chunk for it
        exif = bytes.fromhex("".join(profile.split("\n")[3:]))
    orientation = _orientation(exif or b"")
    image.info = info  # for Pillow to look into XMP data, which count where EXIF data say nothing
    if orientation is not None:
        image.getexif()[ExifTags.Base.Orientation] = orientation
    return ImageOps.exif_transpose(image)


def _orientation(exif: bytes) -> int | None:
    """What the first directory of EXIF data says; None where it says nothing. Raises: struct.error where it is cut off."""
    header = TIFF.match(exif)
    if not header:
        return None
    tiff = exif[header.end() :]
    order = "<" if tiff.startswith(b"II") else ">"
    (directory,) = struct.unpack_from(order + "I", tiff, 4)
    (entries,) = struct.unpack_from(order + "H", tiff, directory)
    for entry in range(entries):
        tag, kind, count, value = struct.unpack_from(order + "HHIH", tiff, directory + 2 + 12 * entry)
        if (tag, kind, count) == (ExifTags.Base.Orientation, 3, 1):  # one SHORT
            return int(value)
    return None
