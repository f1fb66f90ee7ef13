"""Why a photo is refused, in words for its sender."""

from __future__ import annotations

import re

REASONS = (
    *("empty", "too_many_bytes", "too_many_pixels", "too_many_scans"),
    *("not_an_image", "damaged"),
)


class PhotoError(ValueError):
    """A photo that cannot be embedded; the message says why and what to do.

    reason: one of REASONS, for counters.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


CONVERT, PICTURE = "convert it to one of these", "send one picture of it"
# How files begin, their kind, and the remedy; the first match counts.
KINDS = [
    (rb"GIF8[79]a", "a GIF", CONVERT),
    (rb"BM.{4}\0{4}", "a BMP", CONVERT),
    (
        rb"II\*\0.{4}CR|IIU\0|IIRO|FUJIFILM|\0MRM|FOVb|.{4}ftypcrx",
        "a camera's raw file",
        "export it as JPEG",
    ),
    (rb"II\*\0|MM\0\*|II\+\0|MM\0\+", "a TIFF, or a camera's raw file", "export it as JPEG"),
    (
        rb".{4}ftyp(?:hei[cxms]|hev[cx]|mif1|msf1)",
        "a HEIC",
        "set the iPhone's camera to Most Compatible, or convert it to JPEG",
    ),
    (rb".{4}ftypavi[fs]", "an AVIF", CONVERT),
    (
        rb".{4}(?:ftyp|moov|mdat|wide)|\x1aE\xdf\xa3|FLV\x01|OggS"
        rb"|\0\0\x01[\xb3\xba]|RIFF.{4}AVI ",
        "a video",
        PICTURE,
    ),
    (rb"\xff\x0a|\0\0\0\x0cJXL ", "a JPEG XL", CONVERT),
    (rb"\xff\x4f\xff\x51|\0\0\0\x0cjP  ", "a JPEG 2000", CONVERT),
    (rb"RIFF.{4}WAVE|ID3|\xff[\xf2\xf3\xfb]|fLaC", "a sound", "send a photo"),
    (rb"RIFF.{8}", "another RIFF file", CONVERT),
    (rb"8BP[SB]", "a Photoshop file", "export it as JPEG"),
    (rb"%PDF|%!PS|\xc5\xd0\xd3\xc6", "a PDF or PostScript file", PICTURE),
    (rb"\s*(?:<[?!][^>]*>\s*)*<svg", "an SVG", CONVERT),
    (
        rb"(?i)\s*(?:<[?!][^>]*>\s*)*<(?:html|head|body)|\s*<!doctype html",
        "a web page",
        "look at what it says, and download the photo",
    ),
    (
        rb"version https://git-lfs",
        "a Git LFS pointer",
        "run git lfs pull, and send what it was for",
    ),
    (
        rb"PK[\x03\x05]|\x1f\x8b|7z\xbc\xaf|Rar!|BZh|\xfd7zXZ|\x28\xb5\x2f\xfd|.{257}ustar",
        "an archive or a compressed file",
        "unpack it",
    ),
    (rb"MZ|\x7fELF|[\xce\xcf]\xfa\xed\xfe|\xca\xfe\xba\xbe|#!", "a program", "send a photo"),
    (
        rb"\0{1,64}(?:\Z|\0{64})",
        "nothing but zeros, at least in its beginning,",
        "copy or download it anew",
    ),
    (rb"\s*[\[{]", "JSON", "send the photo itself, or its base64"),
    (rb"[\t\n\r -~\x80-\xff]+\Z", "text", "send the photo itself, or its base64"),
]
PATTERNS = [(re.compile(pattern, re.DOTALL), name, remedy) for pattern, name, remedy in KINDS]


def no_photo(content: bytes) -> str:
    """Describe a file that is not a JPEG, PNG or WebP, and the remedy."""
    start = content[:512]
    found = ((name, remedy) for pattern, name, remedy in PATTERNS if pattern.match(start))
    name, remedy = next(found, ("of a kind that is not known here", CONVERT))
    return f"{name}, not a JPEG, PNG or WebP image; {remedy}"
