"""Fuzz the decoder with libFuzzer, guided by branch coverage of Pillow's and npair's Python code.

tests/fuzz/fuzz.py runs it. Replay one input with:

    PYTHONPATH=src .venv/bin/python tests/fuzz/fuzz_decode.py FILE
"""

from __future__ import annotations

import struct
import sys
import warnings
import zlib
from importlib import import_module
from pathlib import Path

import atheris
import numpy as np

with atheris.instrument_imports(include=["PIL", "npair.serving"]):
    # Pillow imports its plugins lazily, which would be too late here. EXIF data is TIFF.
    for plugin in ("Jpeg", "Mpo", "Png", "Tiff", "WebP"):
        import_module(f"PIL.{plugin}ImagePlugin")
    from npair.serving.preprocess import Limits, Preprocessing, decode
    from npair.serving.refusal import PhotoError
    from npair.serving.text import photo_of

PREPROCESSING = Preprocessing(size=64, resample="BILINEAR", background=255)
LIMITS = Limits(max_bytes=1 << 20, max_pixels=1 << 18)
# Memory that one input may add: what docs/hostile-input.md allows for this many pixels, plus the
# text that Pillow decompresses.
MEGABYTES = 32 * LIMITS.max_pixels / 1e6 + 64

STATUS, REFERENCES = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def one_input(photo: bytes) -> None:
    """Decode one photo.

    Raises: any exception of the decoder but PhotoError; AssertionError if the result is not pixels
    or decoding took too much memory.
    """
    before = resident("VmRSS")
    REFERENCES.write_text("5")  # reset the peak
    try:
        pixels = decode(photo_of(photo, LIMITS), PREPROCESSING, LIMITS)
    except PhotoError:
        pass
    else:
        assert pixels.shape == (64, 64, 3)
        assert pixels.dtype == np.uint8
    grown = resident("VmHWM") - before
    assert grown < MEGABYTES, f"decoding took {grown:.0f} MB"


def resident(key: str) -> float:
    """Return a field of /proc/self/status in MB."""
    return (
        next(
            float(line.split()[1])
            for line in STATUS.read_text().splitlines()
            if line.startswith(key)
        )
        / 1000
    )


def mutate(photo: bytes, largest: int, seed: int) -> bytes:
    """Mutate as libFuzzer does, then fix a PNG's checksums in three of four cases.

    Pillow rejects a PNG with a wrong checksum before most of its code runs.
    """
    changed = bytearray(atheris.Mutate(photo, largest))
    start = 8
    while seed % 4 and changed.startswith(b"\x89PNG\r\n\x1a\n") and start + 12 <= len(changed):
        end = start + 8 + struct.unpack_from(">I", changed, start)[0]
        if end + 4 > len(changed):
            break
        struct.pack_into(">I", changed, end, zlib.crc32(changed[start + 4 : end]))
        start = end + 4
    return bytes(changed)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    atheris.Setup(sys.argv, one_input, custom_mutator=mutate)
    atheris.Fuzz()
