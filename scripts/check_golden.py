"""Embed a version's golden photos by the installed npair.client, and compare them as published.

Usage: check_golden.py URL MODEL_FOLDER; any Python that has npair installed.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

from npair.client import NpairClient


def main(url: str, model: Path) -> None:
    with NpairClient(url, timeout=300) as client:
        (version,) = client.versions()
        folder = model / version
        golden = json.loads((folder / "manifest.json").read_text())["golden"]
        vectors, _ = client.embed([folder / photo for photo in golden["photos"]])
    distances = np.linalg.norm(vectors - np.load(folder / golden["embeddings"]), axis=1)
    print(f"{url}: version {version}: golden embeddings differ by {distances.max():.4f} at most")
    assert distances.max() <= golden["tolerance"], f"more than {golden['tolerance']:.4f}"


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
