"""The shipped network for every peer, in two ways: eager PyTorch as documentation shows it, or npair's own engine and decoder.

MODE, VERSION (the version's folder) and THREADS come from the environment, as bench.py sets them.
"""

from __future__ import annotations

import io
import json
import os
from pathlib import Path

import numpy as np

VERSION, THREADS = Path(os.environ["VERSION"]), int(os.environ["THREADS"])


class Eager:
    """Pillow and torch in fp32."""

    def __init__(self) -> None:
        import torch

        self.torch = torch
        torch.set_num_threads(THREADS)
        self.network = torch.export.load(VERSION / "network.pt2").module()
        self.size = json.loads((VERSION / "manifest.json").read_bytes())["preprocessing"]["size"]

    def decode(self, photo: bytes) -> np.ndarray:
        from PIL import Image, ImageOps

        image = Image.open(io.BytesIO(photo)).convert("RGB")
        return np.asarray(ImageOps.fit(image, (self.size, self.size), Image.Resampling.BILINEAR))

    def embed(self, pixels: list[np.ndarray]) -> np.ndarray:
        """uint8 [size, size, 3] each -> float32 [N, 128] of unit length."""
        self.torch.set_num_threads(THREADS)  # of the thread that calls
        with self.torch.inference_mode():
            return self.torch.nn.functional.normalize(self.network(self.torch.from_numpy(np.stack(pixels)))).numpy()


class Npair:
    """The code of npair's own versions."""

    def __init__(self) -> None:
        from npair.serving.embedder import UNLIMITED, Embedder
        from npair.serving.preprocess import decode

        self.embedder = Embedder(VERSION, cores=THREADS)
        self.decode = lambda photo: decode(photo, self.embedder.preprocessing, UNLIMITED)

    def embed(self, pixels: list[np.ndarray]) -> np.ndarray:
        """uint8 [size, size, 3] each -> float32 [N, 128] of unit length."""
        return self.embedder.embed(np.stack(pixels))


def load() -> Eager | Npair:
    return {"eager": Eager, "npair": Npair}[os.environ["MODE"]]()
