"""Colour profiles: from a photo's own colours to sRGB, in which networks are trained."""

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
# A profile may have thousands of processing elements, each evaluated for every pixel. No camera
# writes them.
ELEMENTS = (b"D2B", b"B2D")
# Differences this small come from rounding. Most profiles are sRGB itself, and are skipped.
ROUNDING = 2


def to_srgb(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """Build the transform of pixels of a mode (L, RGB or CMYK) to sRGB.

    Returns: None if the profile is sRGB, broken, too large or for another kind of pixel.
    Raises: MemoryError.
    """
    return _to_srgb(profile, mode) if _sound(profile, mode) else None


@lru_cache(maxsize=8)  # it keeps the profiles too, so none that is too large comes here
def _to_srgb(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        intent = ImageCms.Intent.RELATIVE_COLORIMETRIC
        transform = ImageCms.buildTransform(source, SRGB, mode, "RGB", intent)
        if mode != "CMYK":
            steps = np.arange(0, 256, 17, dtype=np.uint8)
            colours = np.stack(np.meshgrid(steps, steps, steps), axis=-1).reshape(-1, 16, 3)
            probe = Image.fromarray(colours if mode == "RGB" else colours[..., 0])
            after = np.asarray(transform.apply(probe)).astype(int)
            change = after - np.asarray(probe.convert("RGB"))
            if np.abs(change).max() <= ROUNDING:
                return None
    except MemoryError:
        raise
    except Exception:  # like browsers, ignore a broken profile
        return None
    return transform


def _sound(profile: bytes, mode: str) -> bool:
    """Return whether the profile is for pixels of this mode and cannot be slow to apply."""
    if not 132 <= len(profile) <= MAX_PROFILE or profile[36:40] != b"acsp":
        return False
    if profile[12:16] not in CLASSES or profile[16:20] != SPACES[mode]:
        return False
    (tags,) = struct.unpack_from(">I", profile, 128)
    starts = range(132, 132 + 12 * tags, 12)
    return tags <= 100 and not any(profile.startswith(ELEMENTS, start) for start in starts)
