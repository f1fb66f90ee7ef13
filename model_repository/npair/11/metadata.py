"""What a file says of its photo beside the pixels, as far as it counts."""

from __future__ import annotations

from dataclasses import dataclass

# Each of thousands of entries in a directory of EXIF data may have all of the data for its value, which Pillow makes objects of:
# 10 GB from 65 kB. So Pillow parses no directory, and no more metadata is read than one segment of a JPEG holds.
MAX_METADATA = 65_535
MAX_PROFILE = 4 << 20  # bytes of a colour profile; those of printers have up to 3 MB


@dataclass
class Metadata:
    """EXIF data, XMP data and the colour profile of a photo, each empty if there is none."""

    exif: bytes = b""
    xmp: bytes = b""
    profile: bytes = b""
