"""The golden set: drawn photos and their reference embeddings, by which a version is checked.

``python -m npair.publishing.golden FOLDER ENGINE`` prints an engine's golden distance.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from npair.data.pixels import decode_photos
from npair.networks.network import EmbeddingNetwork, embed
from npair.publishing import PublishError
from npair.publishing.drawings import draw, encode
from npair.serving.embedder import Embedder
from npair.serving.engine import cores
from npair.serving.manifest import Golden, Preprocessing

UNMEASURED = 2.0  # the largest distance between unit vectors: a tolerance that accepts any


def write_golden(folder: Path, network: EmbeddingNetwork, preprocessing: Preprocessing) -> Golden:
    """Draw a photo for each path through the decoder, and save them with their fp32 embeddings."""
    turned = Image.Exif()
    turned[0x0112] = 6
    cut_out = draw(1, 0)
    mask = Image.radial_gradient("L").resize(cut_out.size)
    cut_out.putalpha(mask.point(lambda level: 255 - level))
    photos = {
        "golden/photo.jpg": encode(draw(0, 0), "JPEG", quality=90),
        "golden/turned.jpg": encode(draw(2, 0).resize((480, 360)), "JPEG", quality=90, exif=turned),
        "golden/grey.png": encode(draw(3, 0).convert("L"), "PNG"),
        "golden/cut-out.webp": encode(cut_out, "WEBP", lossless=True),
    }
    golden = Golden([*photos], "golden/embeddings.npy", UNMEASURED)
    (folder / "golden").mkdir(exist_ok=True)
    for name, photo in photos.items():
        (folder / name).write_bytes(photo)
    pixels = decode_photos([folder / name for name in photos], preprocessing)
    np.save(folder / golden.embeddings, embed(network, pixels))
    return golden


def distance_with(folder: Path, engine: str, environment: Mapping[str, str]) -> float:
    """Measure an engine's golden distance in a new process with these environment variables.

    Raises: PublishError if the version fails there.
    """
    command = [sys.executable, "-m", __name__, str(folder), engine]
    result = subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    if result.returncode:
        lines = result.stderr.strip().splitlines() or [f"exit code {result.returncode}"]
        raise PublishError(f"the exported version fails with {environment}: {lines[-1]}")
    return float(result.stdout)


if __name__ == "__main__":
    print(Embedder(Path(sys.argv[1]), cores=cores(), engine=sys.argv[2]).golden_distance)
