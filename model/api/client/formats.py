"""Convert photos of formats that the server does not take."""

from __future__ import annotations

import io
import re
import warnings
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL import Image

# How the files begin that are converted, by format.
CONVERTED = {
    "AVIF": rb".{4}ftypavi[fs]",
    "HEIC": rb".{4}ftyp(?:hei[cmsx]|hev[cmsx]|mif1|msf1)",
    "GIF": rb"GIF8[79]a",
    "BMP": rb"BM.{4}\0{4}",
    "TIFF": rb"II\*\0(?!.{4}CR)|MM\0\*|II\+\0|MM\0\+",  # CR: raw files of Canon
}
SERVED = rb"\xff\xd8\xff|\x89PNG|RIFF.{4}WEBP"
READ = re.compile(b"|".join([*CONVERTED.values(), SERVED]), re.DOTALL)
LAZY = ("GIF", "BMP", "TIFF")  # Pillow reads as much of them as it decodes
MAX_BYTES = 100_000_000  # of other files, which are read whole; no server is meant to take more
MAX_PIXELS = 64_000_000  # the server's limit for its own formats
# A larger photo is halved before it is encoded, so that its PNG has at most 16 MB. Networks see
# less than a megapixel.
SENT_PIXELS = 4_000_000
ENCODING: dict[str, Any] = {"quality": 98, "subsampling": 0, "compress_level": 1}  # JPEG's, PNG's


def encoded_photo(photo: Path | IO[bytes]) -> bytes:
    """Read a photo; convert it to PNG (CMYK to JPEG) if it is AVIF, HEIC, GIF, BMP or TIFF.

    The content decides, not the name. Any other content is returned as it is, for the server to
    accept or refuse. Orientation, transparency and colour profile are kept, and the server applies
    them as in its own formats. Takes the first frame or page, and halves the sides of a photo
    until it has at most SENT_PIXELS.

    photo: a path, or a seekable binary file.
    Raises: OSError; ValueError with a reason if the photo is too large or cannot be converted.
    """
    if isinstance(photo, Path):
        with photo.open("rb") as file:
            return encoded_photo(file)
    start = photo.read(32)
    matches = (kind for kind, begin in CONVERTED.items() if re.match(begin, start, re.DOTALL))
    kind = next(matches, None)
    if kind not in LAZY and (size := photo.seek(0, io.SEEK_END)) > MAX_BYTES:
        raise ValueError(f"{size} bytes, more than the limit of {MAX_BYTES}")
    photo.seek(0)
    if kind is None:
        return photo.read(MAX_BYTES)  # a device has no size
    try:
        from PIL import AvifImagePlugin, Image  # noqa: F401, PLC0415  # with AVIF: Pillow 11.3

        if kind == "HEIC":
            from pillow_heif import register_heif_opener  # noqa: PLC0415

            register_heif_opener()
    except ImportError as error:
        remedy = "run pip install --upgrade 'npair[heic]', or save it as JPEG"
        raise ValueError(f"{kind} is converted by Pillow and pillow-heif; {remedy}") from error
    try:
        formats = ["AVIF", "HEIF"] if kind == "HEIC" else [kind]  # mif1 and msf1 may be either
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(photo, formats=formats) as image:
                return _converted(image)
    except MemoryError:
        raise
    except Exception as error:  # damaged files make Pillow raise far more than OSError
        problem = f"the {kind} photo cannot be converted ({' '.join(str(error).split())})"
        raise ValueError(f"{problem}; save it as JPEG") from error


def _converted(image: Image.Image) -> bytes:
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(
            f"{image.width}x{image.height} pixels, more than the limit of {MAX_PIXELS}"
        )
    if getattr(image, "tag_v2", {}).get(254, 0) & 1:  # NewSubfileType: a reduced image
        raise ValueError("a camera's raw file, of which only the preview could be read")
    if image.mode in ("I", "F", "LAB"):
        raise ValueError(f"pixels of the kind {image.mode}")
    metadata = {"exif": image.info.get("exif", b""), "icc_profile": image.info.get("icc_profile")}
    mode = image.mode
    if mode.startswith("I;16"):  # as the server reads a PNG of 16 bits
        image = image.convert("I").point(lambda value: value / 256).convert("L")
    elif image.has_transparency_data:
        image = image.convert("LA" if mode == "LA" else "RGBA")
    elif mode != "CMYK":
        image = image.convert("L" if mode in ("1", "L") else "RGB")
    while image.width * image.height > SENT_PIXELS:
        image = image.reduce(2)
    encoded = io.BytesIO()  # PNG has no CMYK
    image.save(encoded, "JPEG" if mode == "CMYK" else "PNG", **ENCODING, **metadata)
    return encoded.getvalue()
