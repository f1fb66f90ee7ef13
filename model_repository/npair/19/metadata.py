"""A photo's metadata, as far as it affects the pixels, read without trusting it."""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass

from PIL import ExifTags, Image, ImageOps

# A few kB of EXIF data can make Pillow build objects of 10 GB, because thousands of entries may
# share one value. So Pillow never parses it, and no more is read than one segment of a JPEG holds.
MAX_METADATA = 65_535
MAX_PROFILE = 4 << 20  # bytes of a colour profile; those of printers have up to 3 MB

TIFF = re.compile(rb"(?:Exif\0\0)*(?=II|MM)")  # some photos repeat the prefix


@dataclass
class Metadata:
    """EXIF data, XMP data and the colour profile of a photo, each empty if there is none."""

    exif: bytes = b""
    xmp: bytes = b""
    profile: bytes = b""


def upright(image: Image.Image, metadata: Metadata) -> Image.Image:
    """Turn an image as the EXIF data say, or the XMP data if EXIF says nothing.

    Raises: any kind of exception if they cannot be read.
    """
    orientation = _orientation(metadata.exif[:MAX_METADATA])
    image.info = {"xmp": metadata.xmp[:MAX_METADATA]}  # Pillow falls back to it
    if orientation is not None:
        image.getexif()[ExifTags.Base.Orientation] = orientation
    return ImageOps.exif_transpose(image)


def _orientation(exif: bytes) -> int | None:
    """Return the orientation in the first directory of EXIF data, None if there is none.

    Raises: struct.error if the data is cut off.
    """
    header = TIFF.match(exif)
    if not header:
        return None
    tiff = exif[header.end() :]
    order = "<" if tiff.startswith(b"II") else ">"
    (directory,) = struct.unpack_from(order + "I", tiff, 4)
    (entries,) = struct.unpack_from(order + "H", tiff, directory)
    for entry in range(entries):
        start = directory + 2 + 12 * entry
        tag, kind, count, value = struct.unpack_from(order + "HHIH", tiff, start)
        if (tag, kind, count) == (ExifTags.Base.Orientation, 3, 1):  # one SHORT
            return int(value)
    return None
