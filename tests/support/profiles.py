"""Minimal colour profiles (ICC.1), built here so that none has to be copied."""

from __future__ import annotations

import struct

import numpy as np
import numpy.typing as npt

D50, D65 = (0.9642, 1.0, 0.8249), (0.3127, 0.3290)
BRADFORD = np.array(
    [[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]]
)


def fixed(*numbers: float) -> bytes:
    return b"".join(struct.pack(">i", round(number * 65536)) for number in numbers)


def xyz(colour: npt.ArrayLike) -> bytes:
    return b"XYZ \0\0\0\0" + fixed(*np.asarray(colour))


def gamma(exponent: float) -> bytes:
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(exponent * 256))


SRGB_CURVE = (
    b"para\0\0\0\0"
    + struct.pack(">HH", 3, 0)
    + fixed(2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)
)


def profile(
    space: bytes, tags: dict[bytes, bytes], connection: bytes = b"XYZ ", kind: bytes = b"mntr"
) -> bytes:
    table, data, start = b"", b"", 132 + 12 * len(tags)
    for name, content in tags.items():
        table += struct.pack(">4sII", name, start + len(data), len(content))
        data += content + bytes(-len(content) % 4)
    sizes = struct.pack(">II4s4s4s", start + len(data), 0x04300000, kind, space, connection)
    header = sizes[:4] + bytes(4) + sizes[4:] + bytes(12) + b"acsp" + bytes(28) + fixed(*D50)
    return header.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + data


def rgb(primaries: list[tuple[float, float]], white: tuple[float, float], curve: bytes) -> bytes:
    """An RGB profile of these chromaticities (x, y), adapted to D50 as ICC.1 requires."""
    columns = np.array([[x / y, 1, (1 - x - y) / y] for x, y in primaries]).T
    light = np.array([white[0] / white[1], 1, (1 - white[0] - white[1]) / white[1]])
    adapted = np.linalg.inv(BRADFORD) @ np.diag((BRADFORD @ D50) / (BRADFORD @ light)) @ BRADFORD
    matrix = adapted @ (columns * np.linalg.solve(columns, light))
    colours = {
        name: xyz(column)
        for name, column in zip((b"rXYZ", b"gXYZ", b"bXYZ"), matrix.T, strict=True)
    }
    return profile(
        b"RGB ", {b"wtpt": xyz(D50), **colours, b"rTRC": curve, b"gTRC": curve, b"bTRC": curve}
    )


SRGB = rgb([(0.64, 0.33), (0.30, 0.60), (0.15, 0.06)], D65, SRGB_CURVE)
DISPLAY_P3 = rgb([(0.68, 0.32), (0.265, 0.69), (0.15, 0.06)], D65, SRGB_CURVE)
ADOBE_RGB = rgb([(0.64, 0.33), (0.21, 0.71), (0.15, 0.06)], D65, gamma(563 / 256))
PROPHOTO = rgb([(0.7347, 0.2653), (0.1596, 0.8404), (0.0366, 0.0001)], (0.3457, 0.3585), gamma(1.8))
GREY = profile(b"GRAY", {b"wtpt": xyz(D50), b"kTRC": gamma(1.0)})
# A printer that prints every mixture of its four inks as the same grey of L* = 50: a table of two
# steps per ink.
LUT = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + fixed(1, 0, 0, 0, 1, 0, 0, 0, 1)
PRINTER = profile(
    b"CMYK",
    {
        b"wtpt": xyz(D50),
        b"A2B0": LUT + bytes(range(256)) * 4 + bytes([128, 128, 128]) * 16 + bytes(range(256)) * 3,
    },
    connection=b"Lab ",
    kind=b"prtr",
)
