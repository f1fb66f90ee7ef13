"""Scale decoded photos to the network's input: by cykooz-resizer, or by Pillow where it is missing.

Both round once for each direction, and their pixels differ by rounding alone. Each gives the same
pixels on every CPU.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

try:
    import cykooz_resizer as resizer
except ImportError:  # it has no build for Linux on Arm
    resizer = None

MODES = {1: "L", 3: "RGB", 4: "CMYK"}  # Pillow's, by channels; it weights RGBA by alpha
KINDS = {1: "U8", 3: "U8x3", 4: "U8x4"}  # the resizer's
FILTERS = {  # the resizer's, by Pillow's name
    "BOX": "box",
    "BILINEAR": "bilinear",
    "BICUBIC": "catmull_rom",
    "LANCZOS": "lanczos3",
}
Pixels = npt.NDArray[np.uint8]


def fit(pixels: Pixels, size: int, resample: str) -> Pixels:
    """Scale the central square of pixels [h, w, 1, 3 or 4] to [size, size, the same].

    Pillow takes four times as long. resample: BOX, BILINEAR, BICUBIC or LANCZOS.
    """
    by = _fit_by_pillow if resizer is None else _fit_by_resizer
    return by(pixels, size, resample)


def _fit_by_resizer(pixels: Pixels, size: int, resample: str) -> Pixels:
    height, width, channels = pixels.shape
    kind = getattr(resizer.PixelType, KINDS[channels])
    square = resizer.ImageData(size, size, kind)
    scaling = resizer.ResizeAlg.convolution(getattr(resizer.FilterType, FILTERS[resample]))
    options = resizer.ResizeOptions(scaling, use_alpha=False, fit_into_destination=True)
    source = resizer.ImageData(width, height, kind, pixels.tobytes())
    resizer.Resizer().resize(source, square, options)
    return np.frombuffer(square.get_buffer(), np.uint8).reshape(size, size, channels)


def _fit_by_pillow(pixels: Pixels, size: int, resample: str) -> Pixels:
    channels = pixels.shape[2]
    image = Image.fromarray(pixels[..., 0] if channels == 1 else pixels, MODES[channels])
    fitted = ImageOps.fit(image, (size, size), Image.Resampling[resample])
    return np.asarray(fitted).reshape(size, size, channels)
