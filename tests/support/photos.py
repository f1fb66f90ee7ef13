"""Drawn photos and data sets."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from npair.data.dataset import Dataset
from npair.publishing.drawings import draw, encode
from npair.serving.preprocess import Limits, Preprocessing

PREPROCESSING = Preprocessing(size=64, resample="BILINEAR", background=255)
LIMITS = Limits(max_bytes=1_000_000, max_pixels=1_000_000)
PNG = encode(draw(0, 0, 8), "PNG")
DRAWN = np.array(draw(0, 0, 8))


def photo(path: Path, number: int = 0) -> Path:
    """Write a PNG with this number as the colour of its first pixel; return the path."""
    pixels = DRAWN.copy()
    pixels[0, 0] = list(number.to_bytes(3, "big"))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode(Image.fromarray(pixels), "PNG"))
    return path


def folders(root: Path, classes: int = 6, photos: int = 5) -> Path:
    for label in range(classes):
        for number in range(photos):
            photo(root / f"class {label}" / f"{number}.png", 100 * label + number)
    return root


def table(root: Path, text: str | bytes, name: str = "photos.csv") -> Path:
    path = root / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def sizes(dataset: Dataset) -> dict[str, int]:
    return {split: len(photos) for split, photos in dataset.splits.items()}


def chunk(kind: bytes, content: bytes) -> bytes:
    """Return a chunk of a PNG file, with its length and checksum."""
    checksum = zlib.crc32(kind + content)
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)


def with_much_text(png: bytes) -> bytes:
    """Return a PNG with more text than Pillow's ``Image.open`` allows."""
    text = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(3_000_000)))
    return png[:33] + text + png[33:]  # after the header
