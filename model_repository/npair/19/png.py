"""Guard the PNG decoder: separate the metadata from a copy that holds only the pixels' chunks.

Pillow would unpack all text and the profile, and refuse a file in which one of them is large.
"""

from __future__ import annotations

import contextlib
import re
import struct
import zlib

from .metadata import MAX_METADATA, MAX_PROFILE, Metadata
from .refusal import PhotoError

START = 8  # bytes of the signature
# What Pillow takes for the name of a chunk: behind any other it reads nothing.
KIND = re.compile(rb"\w{4}")
TEXTS = (b"iTXt", b"tEXt", b"zTXt")
EXIF_TEXT, XMP_TEXT = b"Raw profile type exif", b"XML:com.adobe.xmp"

# Pillow takes 6 microseconds for each, and 20 MB have room for 1.7 million. libpng writes one for
# each 8 kB of data.
MAX_CHUNKS = 50_000


def read(photo: bytes) -> tuple[bytes, Metadata]:
    """Return the file without its ancillary chunks, except transparency, and their metadata.

    Bytes that are not a chunk are kept, for the decoder to refuse.
    Raises: PhotoError if there are more than MAX_CHUNKS chunks.
    """
    metadata, parts, start = Metadata(), [photo[:START]], START
    chunks, seen = 0, set[bytes]()
    while start + 12 <= len(photo):
        length, kind = struct.unpack_from(">I4s", photo, start)
        end = start + 12 + length
        if kind == b"IEND" or end > len(photo) or not KIND.match(kind):
            break
        chunks += 1
        if chunks > MAX_CHUNKS:
            message = f"the PNG has more than the limit of {MAX_CHUNKS} chunks; save it anew"
            raise PhotoError("damaged", message)
        if kind[:1].isupper() or kind == b"tRNS":
            parts.append(photo[start:end])
        else:
            _keep(metadata, seen, kind, photo[start + 8 : end - 4])
        start = end
    return b"".join([*parts, photo[start:]]), metadata


def _keep(metadata: Metadata, seen: set[bytes], kind: bytes, content: bytes) -> None:
    """Read a chunk of metadata if it is the first of its name, which also counts for libpng."""
    key, _, value = content.partition(b"\0")
    name = key if kind in TEXTS and key in (EXIF_TEXT, XMP_TEXT) else kind
    if name in seen:
        return
    seen.add(name)
    if kind == b"eXIf":
        metadata.exif = metadata.exif or content
    elif kind == b"iCCP":
        metadata.profile = _unpacked(value[1:], MAX_PROFILE + 1)
    elif kind == b"iTXt" and key == XMP_TEXT:
        text = value[2:].split(b"\0", 2)[-1]
        metadata.xmp = _unpacked(text, MAX_METADATA) if value[:1] == b"\1" else text
    elif kind in (b"tEXt", b"zTXt") and key == XMP_TEXT:
        metadata.xmp = _unpacked(value[1:], MAX_METADATA) if kind == b"zTXt" else value
    elif kind in (b"tEXt", b"zTXt") and key == EXIF_TEXT and not metadata.exif:
        # Hexadecimal text, from before PNG had a chunk for EXIF data.
        text = (_unpacked(value[1:], MAX_METADATA) if kind == b"zTXt" else value)[:MAX_METADATA]
        digits = "".join(text.decode("latin-1").split("\n")[3:])
        with contextlib.suppress(ValueError):
            metadata.exif = bytes.fromhex(digits[: MAX_METADATA // 2 * 2])


def _unpacked(packed: bytes, most: int) -> bytes:
    """Decompress up to ``most`` bytes; empty if the data is broken."""
    try:
        return zlib.decompressobj().decompress(packed, most)
    except zlib.error:
        return b""
