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
import simplejpeg
from PIL import ExifTags, Image, ImageFile, ImageOps, JpegImagePlugin

FORMATS = ("JPEG", "PNG", "WEBP")
SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF")

# Limits.max_pixels is checked before any pixel is decoded; Pillow's own limit is a global that would override a higher setting.
Image.MAX_IMAGE_PIXELS = None

# Each of thousands of entries in a directory of EXIF data may have all of the data for its value, which Pillow makes objects of:
# 10 GB from 65 kB. So Pillow parses no directory, and no more metadata is read than one segment of a JPEG holds.
MAX_METADATA = 65_535
TIFF = re.compile(rb"(?:Exif\0\0)*(?=II|MM)")  # what follows may be in the wrong order, as in some photos


def _keep_metadata(self: JpegImagePlugin.JpegImageFile, marker: int) -> None:  # noqa: ARG001
    """What Pillow does with a JPEG's segments of metadata: it keeps the first EXIF data and the last XMP data. Its own handlers
    keep everything, EXIF data in quadratic time, and have the directory of a file of several pictures (MPF) parsed."""
    assert self.fp is not None
    content = ImageFile._safe_read(self.fp, int.from_bytes(self.fp.read(2), "big") - 2)
    if content.startswith(b"Exif\0\0"):
        self.info.setdefault("exif", content)
    elif content.startswith(b"http://ns.adobe.com/xap/1.0/\0"):
        self.info["xmp"] = content.split(b"\0", 1)[1]


for segment in (*range(0xFFE0, 0xFFF0), 0xFFFE):
    JpegImagePlugin.MARKER[segment] = "", "APP0 to APP15, COM", _keep_metadata
JpegImagePlugin.JpegImageFile._read_dpi_from_exif = lambda self: None  # type: ignore[method-assign]  # noqa: ARG005

# Each scan of a JPEG visits all of its pixels, and 70 bytes make one, so that 20 MB would keep a core busy for an hour. Encoders
# write ten or so.
MAX_SCANS = 100
SCAN, END = b"\xda", b"\xd9"
# What has a length, and the end. libjpeg takes anything else for a marker without one, skips it (below C0, where it looks for a
# restart) or gives up. Without the fill bytes before it: looking for their end would take quadratic time.
MARKER = re.compile(rb"\xff([\xc0-\xcf\xd9-\xfe])")

LARGE = 16_000_000  # pixels
NOTHING = nullcontext()

REASONS = ("empty", "too_many_bytes", "too_many_pixels", "too_many_scans", "not_an_image", "damaged")


class PhotoError(ValueError):
    """A photo that cannot be embedded; the message says why and what to do.

    reason: the same in one word, of REASONS, for whatever counts.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


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
    try:
        image: Image.Image = Image.open(io.BytesIO(photo), formats=FORMATS)
    except MemoryError:
        raise
    except Exception as error:
        if photo.startswith(SIGNATURES):
            raise PhotoError("damaged", "the image data is truncated or damaged") from error
        raise PhotoError("not_an_image", "not a JPEG, PNG or WebP image; convert it to one of these") from error
    width, height = image.size
    if width * height > limits.max_pixels:
        raise PhotoError(
            "too_many_pixels", f"the photo has {width}x{height} pixels, more than the limit of {limits.max_pixels}; scale it down"
        )
    if _scans(photo) > MAX_SCANS:
        raise PhotoError("too_many_scans", f"the photo has more than the limit of {MAX_SCANS} scans; save it anew")
    size = (preprocessing.size, preprocessing.size)
    try:
        with large if width * height > LARGE else NOTHING:
            rgb = _jpeg_to_rgb(image, photo, size) or _to_rgb(image, preprocessing.background)
            info = {key: value[:MAX_METADATA] for key, value in image.info.items() if isinstance(value, (str, bytes))}
            image = ImageOps.fit(rgb, size, Image.Resampling[preprocessing.resample])
            del rgb
    except MemoryError:
        raise
    except Exception as error:  # hostile files make Pillow raise far more than OSError
        raise PhotoError("damaged", f"the {image.format or 'image'} data is truncated or damaged ({error})") from error
    with contextlib.suppress(Exception):  # unreadable EXIF data does not spoil the pixels: browsers show such photos unrotated too
        image = _upright(image, info)
    return np.array(image)


def _scans(photo: bytes) -> int:
    """How often a JPEG goes over its pixels; of other files, and where it is few anyway, 0."""
    if not photo.startswith(SIGNATURES[0]) or photo.count(b"\xff\xda") <= MAX_SCANS:
        return 0
    scans, start = 0, 2
    while (marker := MARKER.search(photo, start)) and marker[1] != END and scans <= MAX_SCANS:
        scans += marker[1] == SCAN
        start = marker.end() + int.from_bytes(photo[marker.end() : marker.end() + 2], "big")  # behind its segment
    return scans


def _jpeg_to_rgb(image: Image.Image, photo: bytes, size: tuple[int, int]) -> Image.Image | None:
    """A sound JPEG, decoded at so few eighths of its width and height that both are not below ``size``; None for all else, and
    Pillow, which knows only halves, says what is wrong with it."""
    if not photo.startswith(SIGNATURES[0]) or image.mode not in ("L", "RGB"):
        return None
    try:
        return Image.fromarray(simplejpeg.decode_jpeg(photo, "RGB", min_width=size[0], min_height=size[1]))
    except ValueError:
        image.draft(None, size)
        return None


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
