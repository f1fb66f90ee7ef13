"""Photos in pictures: thumbnails for the report, and queries beside their nearest neighbours."""

from __future__ import annotations

import base64
import io
from pathlib import Path

from PIL import Image, ImageDraw, ImageOps

from npair.data import Preprocessing
from npair.data.dataset import Photos, spread
from npair.data.pixels import decode_photo
from npair.scoring.evaluate import EmbeddedSplit

# Pixels.
THUMBNAIL = 144  # sharp at 1.5 times the size at which the report shows it
CELL, FRAME, LABEL, MARGIN = 140, 4, 18, 6


def thumbnail(path: Path) -> str:
    """Return the square that the network sees as the data URI of a small JPEG.

    Raises: DataError, OSError.
    """
    buffer = io.BytesIO()
    _square(path, THUMBNAIL).save(buffer, "JPEG", quality=72, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def draw_neighbours(
    embedded: EmbeddedSplit, path: Path, *, rows: int = 6, neighbours: int = 6
) -> None:
    """Draw a row for each of some queries: the photo, then its nearest gallery photos.

    Neighbours are framed in green if they show the same product, else in red. The queries are
    spread evenly over the split, however well they did.
    rows, neighbours: the most of each; fewer if there are no more photos.
    Raises: DataError, OSError.
    """
    chosen = spread(len(embedded.query_photos), rows)
    rows = len(chosen)
    neighbours = min(neighbours, len(embedded.gallery_photos) - embedded.exclude_self)
    ranked = embedded.nearest(neighbours)[0][chosen]
    width = (neighbours + 1) * (CELL + MARGIN) + 3 * MARGIN
    picture = Image.new("RGB", (width, rows * (CELL + LABEL + MARGIN) + MARGIN), "white")
    pen = ImageDraw.Draw(picture)

    def place(photos: Photos, index: int, column: int, row: int, colour: str) -> None:
        left = MARGIN + column * (CELL + MARGIN) + (2 * MARGIN if column else 0)
        top = MARGIN + row * (CELL + LABEL + MARGIN)
        photo = _square(photos.paths[index], CELL - 2 * FRAME)
        picture.paste(ImageOps.expand(photo, FRAME, colour), (left, top))
        name = photos.fine_names[photos.fine[index]][:22]
        pen.text((left + 2, top + CELL + 2), name, fill="black")

    for row, (query, found) in enumerate(zip(chosen, ranked, strict=True)):
        place(embedded.query_photos, query, 0, row, "black")
        for column, index in enumerate(found, start=1):
            same = embedded.gallery_photos.fine[index] == embedded.query_photos.fine[query]
            place(embedded.gallery_photos, index, column, row, "green" if same else "red")
    picture.save(path)


def _square(path: Path, side: int) -> Image.Image:
    """Read a photo as the network sees it, but with this side."""
    return Image.fromarray(decode_photo(path, Preprocessing(side, "BILINEAR", background=255)))
