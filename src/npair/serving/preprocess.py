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

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, ImageOps

from . import colour, jpeg, png
from .metadata import MAX_METADATA, Metadata
from .refusal import PhotoError, no_photo

PHOTO = re.compile(rb"\xff\xd8\xff|\x89PNG\r\n\x1a\n|RIFF.{4}WEBP", re.DOTALL)  # how they begin

# Limits.max_pixels is checked before any pixel is decoded; Pillow's own limit is a global that would override a higher setting.
Image.MAX_IMAGE_PIXELS = None

TIFF = re.compile(
    rb"(?:Exif\0\0)*(?=II|MM)"
)  # what follows may be in the wrong order, as in some photos


LARGE = 16_000_000  # pixels
NOTHING = nullcontext()


@dataclass(frozen=True)
class Preprocessing:
    """What a network was trained on; travels in the version's manifest, so it has no defaults.

    size: width and height of the network's input, in pixels.
    resample: Pillow's name of the resampling filter: ``BOX``, ``BILINEAR``, ``BICUBIC`` or ``LANCZOS``.
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
    photo: bytes,
    preprocessing: Preprocessing,
    limits: Limits,
    large: AbstractContextManager[object] = NOTHING,
) -> npt.NDArray[np.uint8]:
    """Decode one JPEG, PNG or WebP file, upright, its central square scaled to the network's input.

    Grey, palette, CMYK and 16-bit pixels become 8-bit RGB, transparent ones are laid over ``preprocessing.background``, and the
    EXIF orientation is applied. Of an animation the first frame counts. Colours become sRGB by the embedded profile; one that is
    broken, larger than 4 MiB or for another kind of pixels is ignored.

    large: held while a photo of more than LARGE pixels is decoded: with a lock, threads decode one of them at a time, and memory
    need not hold more.
    Returns: uint8 of shape [size, size, 3], RGB.
    Raises: PhotoError for an empty, too large, truncated or unreadable photo or a format that is none of these; MemoryError.
    """
    if not photo:
        raise PhotoError("empty", "the photo is empty (0 bytes)")
    if len(photo) > limits.max_bytes:
        raise PhotoError(
            "too_many_bytes",
            f"the photo has {len(photo)} bytes, more than the limit of {limits.max_bytes}; send a smaller file",
        )
    if not is_photo(photo):
        raise PhotoError("not_an_image", no_photo(photo))
    opened, metadata = _read(photo)
    width, height = opened.size
    if width * height > limits.max_pixels:
        raise PhotoError(
            "too_many_pixels",
            f"the photo has {width}x{height} pixels, more than the limit of {limits.max_pixels}; scale it down",
        )
    size, resample = preprocessing.size, preprocessing.resample
    try:
        with large if width * height > LARGE else NOTHING:
            if isinstance(opened, jpeg.Jpeg):
                pixels = opened.decode(size, resample)
                if (
                    pixels.shape == (size, size, 3) and metadata == Metadata()
                ):  # nothing is left to do
                    return pixels
                image = Image.fromarray(pixels, "CMYK" if pixels.shape == (size, size, 4) else None)
            else:  # by Pillow, which holds no copies of a large photo while it scales
                image = ImageOps.fit(
                    _flat(opened, preprocessing.background),
                    (size, size),
                    Image.Resampling[resample],
                )
        to_srgb = colour.to_srgb(metadata.profile, image.mode) if metadata.profile else None
        image = to_srgb.apply(image) if to_srgb else image.convert("RGB")
    except (MemoryError, PhotoError):
        raise
    except Exception as error:  # hostile files make Pillow raise far more than OSError
        raise PhotoError("damaged", f"the image data is truncated or damaged ({error})") from error
    with contextlib.suppress(
        Exception
    ):  # unreadable EXIF data does not spoil the pixels: browsers show such photos unrotated too
        image = _upright(image, metadata)
    return np.array(image)


def _read(photo: bytes) -> tuple[jpeg.Jpeg | Image.Image, Metadata]:
    """A photo of which no pixel is decoded yet, and its metadata. Raises: PhotoError, MemoryError."""
    if photo.startswith(jpeg.SIGNATURE):
        read = jpeg.read(photo)
        return read, read.metadata
    try:
        if photo.startswith(b"RIFF"):
            image = Image.open(io.BytesIO(photo), formats=["WEBP"])
            info = {key: value for key, value in image.info.items() if isinstance(value, bytes)}
            return image, Metadata(
                info.get("exif", b""), info.get("xmp", b""), info.get("icc_profile", b"")
            )
        chunks, metadata = png.read(photo)
        return Image.open(io.BytesIO(chunks), formats=["PNG"]), metadata
    except MemoryError:
        raise
    except Exception as error:
        raise PhotoError(
            "damaged", "the image data is truncated or damaged; send the original file"
        ) from error


def _flat(image: Image.Image, background: int) -> Image.Image:
    """The pixels of a PNG or WebP without transparency, L or RGB of 8 bits."""
    if image.mode.startswith(
        "I"
    ):  # 16-bit grey: Pillow's own conversion would clip at 255 instead of scaling
        return Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
    if image.mode in ("1", "L", "LA") and not image.has_transparency_data:
        return image.convert("L")
    if image.has_transparency_data:
        rgba = image if image.mode == "RGBA" else image.convert("RGBA")  # which would copy it
        rgb = Image.new("RGB", image.size, (background, background, background))
        rgb.paste(rgba, mask=rgba)
        return rgb
    return image.convert("RGB")


def _upright(image: Image.Image, metadata: Metadata) -> Image.Image:
    """The image, turned as the metadata of its photo say. Raises: whatever, where they cannot be read."""
    orientation = _orientation(metadata.exif[:MAX_METADATA])
    image.info = {
        "xmp": metadata.xmp[:MAX_METADATA]
    }  # Pillow looks into XMP data where EXIF data say nothing
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
        tag, kind, count, value = struct.unpack_from(
            order + "HHIH", tiff, directory + 2 + 12 * entry
        )
        if (tag, kind, count) == (ExifTags.Base.Orientation, 3, 1):  # one SHORT
            return int(value)
    return None
