"""Guard JPEG decoders against hostile files.

A decoder never sees the file itself, but a copy with one frame of a kind that it scales correctly,
no metadata, and nothing between segments or after the end. So this module and libjpeg cannot
interpret the file differently.
"""

from __future__ import annotations

import io
import re
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image, ImageOps
from PIL.JpegImagePlugin import JpegImageFile

from .metadata import Metadata
from .refusal import PhotoError
from .scaling import fit

SIGNATURE = b"\xff\xd8\xff"
SOI, EOI = b"\xff\xd8", b"\xff\xd9"
SOS = 0xDA
TABLES = {0xC4, 0xCC, 0xDB, 0xDD}  # Huffman, arithmetic, quantisation, restart interval
METADATA = {*range(0xE0, 0xF0), 0xFE}
PROGRESSIVE, ARITHMETIC = {0xC2, 0xCA}, {0xC9, 0xCA}
FRAMES = {0xC0, 0xC1, *PROGRESSIVE, *ARITHMETIC}
SEGMENTS = {SOS, *TABLES, *METADATA, *FRAMES}
# libjpeg cannot scale lossless frames: asked for a smaller picture, it writes past the end of its
# buffer.
OTHER_FRAMES = {
    **dict.fromkeys((0xC3, 0xCB), "lossless JPEG"),
    **dict.fromkeys((0xC5, 0xC6, 0xC7, 0xCD, 0xCE, 0xCF, 0xDE, 0xDF), "hierarchical JPEG"),
    0xF7: "JPEG-LS file",
}
REMEDY = "which is not read; save it as a baseline or progressive JPEG, or as PNG"

# As libjpeg finds markers: any number of FF, then anything but 00. It skips other bytes before a
# marker; within a scan, restart markers belong to the data.
MARKER = re.compile(rb"\xff([^\x00\xff])")
END_OF_SCAN = re.compile(rb"\xff([^\x00\xff\xd0-\xd7])")

# Every scan passes over all pixels, and can be as short as 70 bytes, so that 20 MB of scans would
# keep a core busy for an hour. Encoders write about ten.
MAX_SCANS = 100

# Each takes two microseconds, and 20 MB have room for five million. The largest profile fills 255,
# and 20 MB of other metadata 305.
MAX_SEGMENTS = 5_000

# Some cameras pad the data before the end marker; libjpeg warns as if the data were corrupt.
EXTRANEOUS = re.compile(r"(\d+) extraneous bytes before marker 0xd9")
MAX_EXTRANEOUS = 4

JFIF = b"\xff\xe0\0\x10JFIF\0\1\1\0\0\1\0\1\0\0"
EXIF, XMP, ICC = b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0", b"ICC_PROFILE\0"

Pixels = npt.NDArray[np.uint8]


@dataclass
class Jpeg:
    """A JPEG whose segments are sound.

    size: width and height, in pixels.
    components: the identifiers of its 1 (grey), 3 or 4 (CMYK) components.
    scans: their headers.
    content: the copy for the decoder.
    """

    size: tuple[int, int] = (0, 0)
    components: bytes = b""
    metadata: Metadata = field(default_factory=Metadata)
    scans: list[bytes] = field(default_factory=list)
    content: bytes = b""

    def decode(self, size: int, resample: str) -> Pixels:
        """Decode the central square, scaled.

        resample: BOX, BILINEAR, BICUBIC or LANCZOS.
        Returns: uint8 [size, size] for grey, else [size, size, 3] RGB or [size, size, 4] CMYK.
        Raises: PhotoError if data is missing or corrupt; MemoryError.
        """
        try:
            return self._decode(self.content, size, resample)
        except PhotoError as error:
            padding = EXTRANEOUS.search(str(error))
            if not padding or int(padding[1]) > MAX_EXTRANEOUS:
                raise
            # Decode again without the padding, since its warning may have hidden another.
            return self._decode(self.content[: -2 - int(padding[1])] + EOI, size, resample)

    def _decode(self, content: bytes, size: int, resample: str) -> Pixels:
        colours = {1: "GRAY", 3: "RGB", 4: "CMYK"}[len(self.components)]
        try:  # at the smallest scale, in eighths, that is at least the size asked for
            pixels: Pixels = simplejpeg.decode_jpeg(
                content, colours, min_width=size, min_height=size
            )
        except ValueError as error:  # raised for warnings as well
            if "Could not determine subsampling" in str(error):
                return self._decode_by_pillow(content, size, resample)
            if "nsufficient memory" in str(error):
                raise MemoryError(str(error)) from error
            raise damaged(str(error)) from error
        pixels = fit(pixels, size, resample)
        if len(self.components) == 4:  # inverted, as Adobe writes it and everyone reads it
            return np.invert(pixels)
        return pixels[..., 0] if len(self.components) == 1 else pixels

    def _decode_by_pillow(self, content: bytes, size: int, resample: str) -> Pixels:
        """Decode unusual chroma subsampling, which simplejpeg refuses. Pillow hides warnings."""
        image = JpegImageFile(io.BytesIO(content))
        image.draft(None, (size, size))
        return np.asarray(ImageOps.fit(image, (size, size), Image.Resampling[resample]))


def damaged(why: str) -> PhotoError:
    """Make the error for a JPEG that is truncated or damaged."""
    message = f"the JPEG data is truncated or damaged ({why}); send the original file"
    return PhotoError("damaged", message)


def read(photo: bytes) -> Jpeg:
    """Read the segments of a JPEG up to its end, in linear time.

    Raises: PhotoError if it is cut off before its scans, has more than MAX_SCANS of them or
    MAX_SEGMENTS segments, or is of a kind that is not decoded.
    """
    jpeg, frame, segments = Jpeg(), 0, 0
    parts, profile = [SOI], dict[bytes, bytes]()
    start, marker_to_find = 2, MARKER
    while marker := marker_to_find.search(photo, start):
        kind, begin = marker[1][0], marker.end() + 2
        if marker_to_find is END_OF_SCAN:
            parts.append(photo[start : marker.start()].rstrip(b"\xff"))
        if kind == EOI[1]:
            break
        if kind in OTHER_FRAMES:
            raise PhotoError("not_an_image", f"a {OTHER_FRAMES[kind]}, {REMEDY}")
        if kind not in SEGMENTS:
            raise damaged(f"marker {kind:02X} where none may be")
        segments += 1
        if segments > MAX_SEGMENTS:
            raise damaged(f"it has more than the limit of {MAX_SEGMENTS} segments")
        start, marker_to_find = (
            marker.end() + int.from_bytes(photo[marker.end() : begin], "big"),
            MARKER,
        )
        if not begin <= start <= len(photo):
            raise damaged("a segment is cut off")
        content = photo[begin:start]
        if kind in FRAMES:
            if frame:
                raise damaged("a second frame")
            frame = kind
            _read_frame(jpeg, content)
        if kind == SOS:
            jpeg.scans.append(content)
            if not frame:
                raise damaged("a scan without a frame")
            _check_scan(content, frame)
            if len(jpeg.scans) > MAX_SCANS:
                message = f"the photo has more than the limit of {MAX_SCANS} scans; save it anew"
                raise PhotoError("too_many_scans", message)
            marker_to_find = END_OF_SCAN
            if frame not in PROGRESSIVE:  # some cameras write zeros here: libjpeg warns
                parts.append(photo[marker.start() : start - 3] + b"\0\x3f\0")
                continue
        if kind not in METADATA or (kind == 0xEE and content.startswith(b"Adobe")):
            parts.append(photo[marker.start() : start])
        elif kind == 0xE0 and content.startswith(b"JFIF\0") and JFIF not in parts[:2]:
            parts.insert(1, JFIF)
        elif kind == 0xE1 and content.startswith(EXIF):
            jpeg.metadata.exif = jpeg.metadata.exif or content
        elif kind == 0xE1 and content.startswith(XMP):
            jpeg.metadata.xmp = content[len(XMP) :]
        elif kind == 0xE2 and content.startswith(ICC):
            profile.setdefault(content[len(ICC) :][:1], content[len(ICC) + 2 :])
    else:
        if marker_to_find is END_OF_SCAN:
            parts.append(photo[start:].rstrip(b"\xff"))
        # A decoder of arithmetic coding would not notice missing data.
        if frame in ARITHMETIC or not _complete(jpeg, frame):
            raise damaged("it ends too early")
    if not jpeg.scans:
        raise damaged("it has no scan")
    if b"".join(sorted(profile)) == bytes(range(1, len(profile) + 1)):
        jpeg.metadata.profile = b"".join(part for _, part in sorted(profile.items()))
    jpeg.content = b"".join([*parts, EOI])
    return jpeg


def _read_frame(jpeg: Jpeg, content: bytes) -> None:
    if len(content) < 6 or len(content) != 6 + 3 * content[5]:
        raise damaged("a frame header of the wrong length")
    if content[0] != 8:
        raise PhotoError("not_an_image", f"a JPEG of {content[0]} bits for each colour, {REMEDY}")
    if content[5] not in (1, 3, 4):
        raise PhotoError("not_an_image", f"a JPEG of {content[5]} colours, {REMEDY}")
    jpeg.components = content[6::3]
    jpeg.size = int.from_bytes(content[3:5], "big"), int.from_bytes(content[1:3], "big")
    if not all(jpeg.size):
        message = f"a JPEG that does not say its size before its pixels, {REMEDY}"
        raise PhotoError("not_an_image", message)


def _check_scan(content: bytes, frame: int) -> None:
    """Refuse what libjpeg refuses, so that a scan names at most 4 components and 64 indices."""
    if len(content) not in (6, 8, 10, 12) or len(content) != 4 + 2 * content[0]:
        raise damaged("a scan header of the wrong length")
    if frame in PROGRESSIVE and content[-2] > 63:
        raise damaged("a scan of coefficients that do not exist")


def _complete(jpeg: Jpeg, frame: int) -> bool:
    """Return whether the scans hold every coefficient of every component, down to its last bit."""
    missing = {(component, index): 1 for component in jpeg.components for index in range(64)}
    for scan in jpeg.scans:
        first, last, low_bit = 0, 63, 0
        if frame in PROGRESSIVE:
            first, last, low_bit = scan[-3], scan[-2], scan[-1] & 15
        for component in scan[1:-3:2]:
            for index in range(first, last + 1):
                missing[component, index] = low_bit
    return not any(missing.values())
