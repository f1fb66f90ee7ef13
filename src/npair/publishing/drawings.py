"""Draw pictures of invented products, for golden sets and tests.

A product is a shape with colours and stripes; each of its photos has another position, size,
rotation and light. A picture is a function of two numbers, so nothing needs to be stored.
"""

from __future__ import annotations

import colorsys
import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

SHAPES = ("ellipse", "box", "bottle", "pear")


def draw(product: int, photo: int, size: int = 348) -> Image.Image:
    """Draw photo number ``photo`` of product number ``product``; RGB, size x size pixels."""
    look = np.random.default_rng((1, product))
    pose = np.random.default_rng((2, product, photo))
    hue, shape, stripes = (
        look.random(),
        SHAPES[int(look.integers(len(SHAPES)))],
        int(look.integers(0, 5)),
    )
    body, mark = _rgb(hue, 0.75, 0.85), _rgb((hue + look.uniform(0.2, 0.8)) % 1, 0.8, 0.7)

    thing = Image.new("RGBA", (size, size))
    pen = ImageDraw.Draw(thing)
    unit = size / 100
    if shape == "ellipse":
        pen.ellipse([15 * unit, 25 * unit, 85 * unit, 75 * unit], fill=body)
    elif shape == "box":
        pen.rounded_rectangle(
            [20 * unit, 20 * unit, 80 * unit, 80 * unit], radius=6 * unit, fill=body
        )
    elif shape == "bottle":
        pen.rectangle([43 * unit, 5 * unit, 57 * unit, 35 * unit], fill=mark)
        pen.rounded_rectangle(
            [30 * unit, 30 * unit, 70 * unit, 95 * unit], radius=8 * unit, fill=body
        )
    else:
        pen.ellipse([25 * unit, 40 * unit, 75 * unit, 95 * unit], fill=body)
        pen.ellipse([36 * unit, 10 * unit, 64 * unit, 65 * unit], fill=body)
    outline = thing.getchannel("A")
    for stripe in range(stripes):
        top = (40 + 9 * stripe) * unit
        pen.rectangle([0, top, size, top + 4 * unit], fill=mark)
    thing.putalpha(outline)

    scale = pose.uniform(0.6, 1.0)
    thing = thing.rotate(pose.uniform(-40, 40), Image.Resampling.BICUBIC).resize(
        [int(scale * size)] * 2
    )
    ground = pose.integers(90, 230, (6, 6, 3), dtype=np.uint8)
    scene = Image.fromarray(ground).resize((size, size), Image.Resampling.BICUBIC)
    left, top = (int(pose.uniform(0, size - thing.width + 1)) for _ in range(2))
    scene.paste(thing, (left, top), thing)
    light = pose.uniform(0.6, 1.2) + pose.normal(0, 0.04, (size, size, 1))
    return Image.fromarray((np.asarray(scene) * light).clip(0, 255).astype(np.uint8)).filter(
        ImageFilter.GaussianBlur(0.6)
    )


def encode(image: Image.Image, image_format: str, **options: object) -> bytes:
    """Encode an image as a file; options as for Pillow's ``Image.save``."""
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def write_dataset(root: Path, *, products: int, train: int, val: int, size: int = 128) -> None:
    """Write JPEG photos, so many of each product in train and val, with the two lists."""
    for split, numbers in (("train", range(train)), ("val", range(train, train + val))):
        lines = []
        for product in range(products):
            for number in numbers:
                path = root / split / f"product-{product}" / f"{number}.jpg"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(encode(draw(product, number, size), "JPEG", quality=90))
                lines.append(f"{path.relative_to(root)}, {product}, {product // 2}\n")
        (root / f"{split}.txt").write_text("".join(lines))


def _rgb(hue: float, saturation: float, value: float) -> tuple[int, int, int]:
    red, green, blue = colorsys.hsv_to_rgb(hue, saturation, value)
    return int(255 * red), int(255 * green), int(255 * blue)
