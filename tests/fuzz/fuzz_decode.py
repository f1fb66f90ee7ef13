"""The decode target of tests/fuzz/fuzz.py: libFuzzer, steered by the branches that Pillow's and npair's Python code takes.

python tests/fuzz/fuzz_decode.py FILE    # replays one input
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
    for plugin in (
        "Jpeg",
        "Mpo",
        "Png",
        "Tiff",
        "WebP",
    ):  # which Pillow would import only later; EXIF data is TIFF
        import_module(f"PIL.{plugin}ImagePlugin")
    from npair.serving.preprocess import Limits, Preprocessing, decode
    from npair.serving.refusal import PhotoError
    from npair.serving.text import photo_of

PREPROCESSING = Preprocessing(size=64, resample="BILINEAR", background=255)
LIMITS = Limits(max_bytes=1 << 20, max_pixels=1 << 18)
# For one input, beside what the process has: what docs/hostile-input.md allows for so many pixels, and text that Pillow unpacks.
MEGABYTES = 32 * LIMITS.max_pixels / 1e6 + 64

STATUS, REFERENCES = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def one_input(photo: bytes) -> None:
    """Raises: whatever decode raises beside PhotoError; AssertionError for anything but pixels, or too much memory."""
    before = resident("VmRSS")
    REFERENCES.write_text("5")  # the peak starts anew
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
    """MB."""
    return (
        next(
            float(line.split()[1])
            for line in STATUS.read_text().splitlines()
            if line.startswith(key)
        )
        / 1000
    )


def mutate(photo: bytes, largest: int, seed: int) -> bytes:
    """libFuzzer's mutation; a PNG gets right checksums in three of four cases, else it would hardly get further."""
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
