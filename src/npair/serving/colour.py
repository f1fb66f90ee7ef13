"""Colour profiles: from a photo's own colours to sRGB, which networks are trained on."""

from __future__ import annotations

import io
import struct
from functools import lru_cache

import numpy as np
from PIL import Image, ImageCms

from .metadata import MAX_PROFILE

SPACES = {"L": b"GRAY", "RGB": b"RGB ", "CMYK": b"CMYK"}
CLASSES = (b"scnr", b"mntr", b"prtr", b"spac")
SRGB = ImageCms.createProfile("sRGB")
# Processing elements, of which one profile may have thousands, each worked off for every pixel. No camera writes them.
ELEMENTS = (b"D2B", b"B2D")
# A step of a channel is invisible, and rounding alone makes some: most profiles are sRGB's, and cost nothing.
ROUNDING = 2


@lru_cache(maxsize=8)
def to_srgb(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """What makes sRGB of pixels of a mode (L, RGB or CMYK); None if the profile is sRGB, broken, too large or not for these.

    Raises: MemoryError.
    """
    if not _sound(profile, mode):
        return None
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        transform = ImageCms.buildTransform(
            source, SRGB, mode, "RGB", ImageCms.Intent.RELATIVE_COLORIMETRIC
        )
        if mode != "CMYK":
            steps = np.arange(0, 256, 17, dtype=np.uint8)
            colours = np.stack(np.meshgrid(steps, steps, steps), axis=-1).reshape(-1, 16, 3)
            probe = Image.fromarray(colours if mode == "RGB" else colours[..., 0])
            change = np.asarray(transform.apply(probe)).astype(int) - np.asarray(
                probe.convert("RGB")
            )
            if np.abs(change).max() <= ROUNDING:
                return None
    except MemoryError:
        raise
    except (
        Exception
    ):  # a broken profile does not spoil the pixels: browsers show such photos as if it had none
        return None
    return transform


def _sound(profile: bytes, mode: str) -> bool:
    """Whether its header says that it is for such pixels, and its tags are none that might take any time."""
    if not 132 <= len(profile) <= MAX_PROFILE or profile[36:40] != b"acsp":
        return False
    if profile[12:16] not in CLASSES or profile[16:20] != SPACES[mode]:
        return False
    (tags,) = struct.unpack_from(">I", profile, 128)
    return tags <= 100 and not any(
        profile[132 + 12 * tag :].startswith(ELEMENTS) for tag in range(tags)
    )
