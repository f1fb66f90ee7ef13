"""Robustness of versions to the changes that phones, shops and websites make to photos.

    .venv/bin/python benchmarks/robustness.py model_repository/npair/10 --data data/grocery

Each val photo is embedded unchanged and after each change, by the version's own code from its bytes
on, and compared with the unchanged train photos. Changed photos are stored as PNG, which is
lossless. Decoding a PNG differs from decoding the original JPEG, which is scaled while it is
decoded; the row "stored as PNG" shows the effect of that alone.

Compares several versions side by side. The results of other versions stay in the file, since a
version may be retired by then.
"""

from __future__ import annotations

import argparse
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageFilter, ImageOps

from npair.data.dataset import Dataset, Photos
from npair.data.files import read_photo
from npair.data.sources import read_dataset
from npair.releasing.verify import published_code
from npair.scoring.evaluate import embed_split
from npair.scoring.retrieval import Vectors, nearest
from npair.serving.embedder import UNLIMITED
from npair.serving.engine import cores

BLUR = 0.01  # standard deviation, as a share of the shorter side
DEGREES = 10
KEPT = 2 / 3  # of the area
Row = dict[str, Any]


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=1)
    return file.getvalue()


def jpeg(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=30)
    return file.getvalue()


def exposed(image: Image.Image, factor: float) -> Image.Image:
    """The photo with ``factor`` times the exposure, computed in linear light; white clips.

    Converts from sRGB (IEC 61966-2-1) and back.
    """
    levels = np.arange(256) / 255
    light = np.where(levels <= 0.04045, levels / 12.92, ((levels + 0.055) / 1.055) ** 2.4)
    light = np.minimum(factor * light, 1)
    levels = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    return image.point(3 * np.rint(255 * levels).astype(int).tolist())


def blurred(image: Image.Image) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(BLUR * min(image.size)))


def rotated(image: Image.Image) -> Image.Image:
    """The photo rotated, of the same size, with its mirror image in the corners.

    Corners of one colour would be unlike any phone's photo.
    """
    (width, height), margin = image.size, max(image.size) // 4
    mirrored = np.pad(np.asarray(image), ((margin, margin), (margin, margin), (0, 0)), "symmetric")
    turned = Image.fromarray(mirrored).rotate(DEGREES, Image.Resampling.BICUBIC)
    return turned.crop((margin, margin, margin + width, margin + height))


def cropped(image: Image.Image) -> Image.Image:
    """The upper left part, in the photo's proportions: the product is larger and off-centre."""
    width, height = (round(KEPT**0.5 * side) for side in image.size)
    return image.crop((0, 0, width, height))


# Each maps the RGB pixels of a photo to the bytes of a changed one.
CHANGES: dict[str, Callable[[Image.Image], bytes]] = {
    "stored as PNG": png,
    "grey": lambda image: png(image.convert("L")),
    "half the light": lambda image: png(exposed(image, 0.5)),
    "twice the light": lambda image: png(exposed(image, 2)),
    f"blurred, sigma {100 * BLUR:g} % of the side": lambda image: png(blurred(image)),
    "JPEG of quality 30": jpeg,
    f"rotated by {DEGREES}°": lambda image: png(rotated(image)),
    "a third of the area cropped away": lambda image: png(cropped(image)),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "versions", nargs="+", type=Path, metavar="version", help="folder of a version"
    )
    parser.add_argument("--data", type=Path, default=Path("data/grocery"), help="(%(default)s)")
    parser.add_argument(
        "--results", type=Path, default=Path("docs/robustness.jsonl"), help="(%(default)s)"
    )
    arguments = parser.parse_args()
    dataset = read_dataset(arguments.data)
    measured = [row for version in arguments.versions for row in measure(version, dataset)]
    before = (
        [json.loads(line) for line in arguments.results.open()]
        if arguments.results.exists()
        else []
    )
    new = {row["version"] for row in measured}
    rows = sorted(
        [*measured, *(row for row in before if row["version"] not in new)],
        key=lambda row: int(row["version"]),
    )
    arguments.results.write_text("".join(json.dumps(row) + "\n" for row in rows))
    print(table(rows))


def measure(version: Path, dataset: Dataset) -> list[Row]:
    """Measure a version. Returns: a row for the unchanged val photos and one for each change.

    cosine: between changed and unchanged photo, the median over photos. same_product: the share of
    photos whose nearest train photo shows the same product as the unchanged photo's, right or
    wrong. fine, coarse: Recall@1.

    Raises: VersionError, EngineError; DataError if the data set has no val.
    """
    with published_code(version) as code:
        embedder = code.Embedder(version, cores=cores())

    def embed(photos: Photos, encoded: Callable[[Path], bytes]) -> Vectors:
        return np.stack(embedder.embed_photos([encoded(path) for path in photos.paths], UNLIMITED))

    unchanged = embed_split("", dataset, "val", partial(embed, encoded=read_photo))
    assert not unchanged.exclude_self, (
        "val shows other products than train, and each changed photo would find its original"
    )

    def row(change: str, queries: Vectors) -> Row:
        recall = replace(unchanged, queries=queries).recall_at_1()
        products = [
            unchanged.gallery_photos.fine[nearest(q, unchanged.gallery, 1)[0]]
            for q in (queries, unchanged.queries)
        ]
        return {
            "version": int(version.name),
            "engine": embedder.engine,
            "photos": len(queries),
            "change": change,
            "cosine": round(float(np.median((queries * unchanged.queries).sum(axis=1))), 4),
            "same_product": round(float(np.mean(products[0] == products[1])), 4),
            "fine": round(recall["fine"], 4),
            "coarse": round(recall["coarse"], 4),
        }

    rows = [row("unchanged", unchanged.queries)]
    for change, encode in CHANGES.items():
        rows.append(row(change, embed(unchanged.query_photos, partial(changed, encode=encode))))
    embedder.close()
    return rows


def changed(path: Path, encode: Callable[[Image.Image], bytes]) -> bytes:
    with Image.open(path) as image:
        return encode(ImageOps.exif_transpose(image).convert("RGB"))


def table(rows: Sequence[Row]) -> str:
    """The results in Markdown: one line per change, with the versions side by side."""
    versions = list(dict.fromkeys(row["version"] for row in rows))
    of = {(row["version"], row["change"]): row for row in rows}
    columns: dict[str, Callable[[Row], str]] = {
        "cosine": lambda row: f"{row['cosine']:.3f}",
        "same neighbour": lambda row: f"{row['same_product']:.3f}",
        "Recall@1": lambda row: f"{row['fine']:.3f} / {row['coarse']:.3f}",
    }
    head = [f"{name}, version {version}" for name in columns for version in versions]
    lines = [f"| val photos | {' | '.join(head)} |", "| --- |" + " --- |" * len(head)]
    for change in dict.fromkeys(row["change"] for row in rows):
        cells = [
            cell(of[version, change]) if (version, change) in of else "-"
            for cell in columns.values()
            for version in versions
        ]
        lines.append(f"| {change} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
