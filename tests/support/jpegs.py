"""JPEGs that Pillow cannot write."""

from __future__ import annotations

import base64
import itertools
import struct

from PIL import Image

GRADIENT = Image.linear_gradient("L").resize((24, 24))
# GRADIENT written by cjpeg -grayscale -quality 60 -arithmetic, and again with -progressive.
ARITHMETIC = [
    base64.b64decode(text)
    for text in (
        "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDAA0JCgsKCA0LCgsODg0PEyAVExISEyccHhcgLikxMC4pLSwzOko+MzZGNywtQFdBRkxOUlNSMj5aYVpQYEpRUk//yQALCAAY"
        "ABgBAREA/8wABgAQEAX/2gAIAQEAAD8A/wClV4rqkMrsITqwVhf3p2CmdkqBqP/Z",
        "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDAA0JCgsKCA0LCgsODg0PEyAVExISEyccHhcgLikxMC4pLSwzOko+MzZGNywtQFdBRkxOUlNSMj5aYVpQYEpRUk//ygALCAAY"
        "ABgBAREA/8wABAAQ/9oACAEBAAAAAf8ASk2QNv/MAAQQBf/aAAgBAQABBQKbgShYIv/MAAQQBf/aAAgBAQAGPwLA/8wABBAF/9oACAEBAAE/IUxjv3nSsP/aAAgBAQAA"
        "ABDpgP/MAAQQBf/aAAgBAQABPxBMIJvVQP/Z",
    )
]


def segment(marker: int, content: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(content) + 2) + content


def lossless(components: int, width: int = 420, height: int = 420, marker: int = 0xC3) -> bytes:
    """A lossless JPEG of a single colour: every difference is 0, coded in one bit."""
    frame = struct.pack(">BHHB", 8, height, width, components) + b"".join(
        bytes([c, 0x11, 0]) for c in range(components)
    )
    scan = bytes([components, *itertools.chain(*((c, 0) for c in range(components))), 1, 0, 0])
    adobe = segment(0xEE, b"Adobe" + struct.pack(">HHHB", 100, 0, 0, 0))
    tables = segment(0xC4, bytes([0, 1, *[0] * 15, 0]))
    return (
        b"\xff\xd8"
        + adobe
        + segment(marker, frame)
        + tables
        + segment(0xDA, scan)
        + bytes(-(-width * height * components // 8))
        + b"\xff\xd9"
    )


def many_scans(count: int) -> bytes:
    """A grey progressive JPEG of 800 x 800 pixels. Every scan after the first changes nothing."""
    tables = [
        segment(0xDB, b"\0" + b"\1" * 64),
        *(
            segment(0xC4, bytes([table, 1, *[0] * 15, value]))
            for table, value in ((0, 0), (16, 0xE0))
        ),
    ]
    head = (
        b"\xff\xd8"
        + segment(0xC2, struct.pack(">BHHB3B", 8, 800, 800, 1, 1, 0x11, 0))
        + b"".join(tables)
    )
    first = segment(0xDA, bytes([1, 1, 0, 0, 0, 0])) + bytes(10_000 // 8)
    return (
        head
        + first
        + (segment(0xDA, bytes([1, 1, 0, 1, 63, 0])) + bytes(2)) * (count - 1)
        + b"\xff\xd9"
    )
