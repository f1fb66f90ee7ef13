"""From the bytes of one photo to the pixels that the network takes.

Training, evaluation and serving all call :func:`decode`. Every published version carries a copy, so
its answers never change.
"""

from __future__ import annotations

import contextlib
import io
import re
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from . import colour, jpeg, png
from .manifest import Preprocessing
from .metadata import Metadata, upright
from .refusal import PhotoError, no_photo

__all__ = ["LARGE", "Limits", "Preprocessing", "decode", "is_photo"]

PHOTO = re.compile(rb"\xff\xd8\xff|\x89PNG\r\n\x1a\n|RIFF.{4}WEBP", re.DOTALL)  # signatures
LARGE = 16_000_000  # pixels
NO_LOCK = nullcontext()


@dataclass(frozen=True)
class Limits:
    """The largest photo that is accepted: encoded, in bytes, and decoded, in pixels."""

    max_bytes: int
    max_pixels: int


def is_photo(content: bytes) -> bool:
    """Return whether the content begins like a JPEG, PNG or WebP."""
    return PHOTO.match(content) is not None


def decode(
    photo: bytes,
    preprocessing: Preprocessing,
    limits: Limits,
    large_photo_lock: AbstractContextManager[object] = NO_LOCK,
) -> npt.NDArray[np.uint8]:
    """Decode one JPEG, PNG or WebP file, upright, its central square scaled to the input size.

    Grey, palette, CMYK and 16-bit pixels become 8-bit RGB. Transparent pixels are laid over
    ``preprocessing.background``. Colours become sRGB by the embedded profile, unless it is broken,
    larger than 4 MiB or meant for another kind of pixel. An animation gives its first frame.

    large_photo_lock: held while a photo of more than LARGE pixels is decoded, so that threads
    decode such photos one at a time, which bounds memory.
    Returns: uint8 [size, size, 3], RGB.
    Raises: PhotoError if the photo is empty, too large, truncated, unreadable or of another format;
    MemoryError.
    """
    if not photo:
        raise PhotoError("empty", "the photo is empty (0 bytes)")
    if len(photo) > limits.max_bytes:
        raise PhotoError(
            "too_many_bytes",
            f"the photo has {len(photo)} bytes, more than the limit of {limits.max_bytes};"
            " send a smaller file",
        )
    if not is_photo(photo):
        raise PhotoError("not_an_image", no_photo(photo))
    opened, metadata = _open(photo)
    width, height = opened.size
    if width * height > limits.max_pixels:
        raise PhotoError(
            "too_many_pixels",
            f"the photo has {width}x{height} pixels, more than the limit of {limits.max_pixels};"
            " scale it down",
        )
    size, resample = preprocessing.size, preprocessing.resample
    try:
        with large_photo_lock if width * height > LARGE else NO_LOCK:
            if isinstance(opened, jpeg.Jpeg):
                pixels = opened.decode(size, resample)
                if pixels.shape == (size, size, 3) and metadata == Metadata():
                    return pixels  # the usual photo, a fifth faster
                image = Image.fromarray(pixels, "CMYK" if pixels.shape == (size, size, 4) else None)
            else:  # Pillow, unlike the resizer for JPEGs, scales without a copy of a large photo
                flat = _flat(opened, preprocessing.background)
                image = ImageOps.fit(flat, (size, size), Image.Resampling[resample])
        transform = colour.to_srgb(metadata.profile, image.mode) if metadata.profile else None
        image = transform.apply(image) if transform else image.convert("RGB")
    except (MemoryError, PhotoError):
        raise
    except Exception as error:  # hostile files make Pillow raise far more than OSError
        reason = f"the image data is truncated or damaged ({error})"
        raise PhotoError("damaged", reason) from error
    with contextlib.suppress(Exception):  # like browsers, ignore EXIF data that cannot be read
        image = upright(image, metadata)
    return np.array(image)


def _open(photo: bytes) -> tuple[jpeg.Jpeg | Image.Image, Metadata]:
    """Read a photo's size and metadata, but no pixels. Raises: PhotoError, MemoryError.

    Pillow's format classes are called directly, because Image.open has a limit on pixels that is
    global to the process, and would override a higher one in ``Limits``.
    """
    if photo.startswith(jpeg.SIGNATURE):
        read = jpeg.read(photo)
        return read, read.metadata
    try:
        if photo.startswith(b"RIFF"):
            webp = WebPImageFile(io.BytesIO(photo))
            info = {key: value for key, value in webp.info.items() if isinstance(value, bytes)}
            found = (info.get(key, b"") for key in ("exif", "xmp", "icc_profile"))
            return webp, Metadata(*found)
        chunks, metadata = png.read(photo)
        return PngImageFile(io.BytesIO(chunks)), metadata
    except (MemoryError, PhotoError):
        raise
    except Exception as error:
        reason = "the image data is truncated or damaged; send the original file"
        raise PhotoError("damaged", reason) from error


def _flat(image: Image.Image, background: int) -> Image.Image:
    """Convert the pixels of a PNG or WebP to L or RGB of 8 bits, without transparency."""
    if image.mode.startswith("I"):  # 16-bit grey: Pillow's own conversion clips instead of scaling
        return Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
    if image.mode in ("1", "L", "LA") and not image.has_transparency_data:
        return image.convert("L")
    if image.has_transparency_data:
        rgba = image if image.mode == "RGBA" else image.convert("RGBA")  # convert always copies
        rgb = Image.new("RGB", image.size, (background, background, background))
        rgb.paste(rgba, mask=rgba)
        return rgb
    return image.convert("RGB")
