"""Draw invented characters in many hands, as folders by alphabet."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from npair.publishing.drawings import encode


def write_characters(root: Path, *, characters: int, drawings: int, size: int = 105) -> None:
    """Write 1-bit PNG files, a folder per character inside a folder per alphabet of 30."""
    for character in range(characters):
        folder = root / f"alphabet-{character // 30:02}" / f"character-{character % 30:02}"
        folder.mkdir(parents=True)
        for drawing in range(drawings):
            (folder / f"{drawing:02}.png").write_bytes(
                encode(draw_character(character, drawing, size), "PNG")
            )


def draw_character(character: int, drawing: int, size: int = 105) -> Image.Image:
    """Draw an invented character in one of many hands; mode "1", size x size, black on white."""
    shape = np.random.default_rng((3, character))
    hand = np.random.default_rng((4, character, drawing))
    image = Image.new("1", (size, size), 1)
    pen = ImageDraw.Draw(image)
    turn, stretch = np.radians(hand.normal(0, 6)), hand.normal(1, 0.08, 2)
    turned = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    for _ in range(int(shape.integers(2, 5))):
        points = shape.uniform(-0.36, 0.36, (3, 2)) + hand.normal(
            0, 0.025, (3, 2)
        )  # of a quadratic Bezier curve
        t = np.linspace(0, 1, 24)[:, None]
        curve = (1 - t) ** 2 * points[0] + 2 * t * (1 - t) * points[1] + t**2 * points[2]
        pen.line(
            [tuple(at) for at in size * (0.5 + (curve * stretch) @ turned.T)],
            fill=0,
            width=max(2, size // 35),
        )
    return image
