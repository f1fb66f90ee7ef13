"""The networks that peers serve: the shipped one in two ways, and two in wide use.

bench.py sets the environment variables MODE, VERSION (the shipped version's folder), THREADS and
CLIP_FOLDER.

    python network.py LIST FILE.npy

Embeds the photos that LIST names, one path per line, without a server, and writes float32 [N, D].
"""

from __future__ import annotations

import io
import json
import os
import sys
from pathlib import Path

import numpy as np

VERSION, THREADS = Path(os.environ["VERSION"]), int(os.environ["THREADS"])


class Eager:
    """The shipped network on Pillow and torch in fp32, with the memory layout best for CPUs."""

    def __init__(self) -> None:
        import torch

        self.torch = torch
        torch.set_num_threads(THREADS)
        network, self.size = self.build()
        self.network = network.to(memory_format=torch.channels_last)

    def build(self):
        size = json.loads((VERSION / "manifest.json").read_bytes())["preprocessing"]["size"]
        return self.torch.export.load(VERSION / "network.pt2").module(), size

    def forward(self, pixels):
        """uint8 [N, size, size, 3] -> float32 [N, D]."""
        return self.network(pixels)

    def decode(self, photo: bytes) -> np.ndarray:
        from PIL import Image, ImageOps

        image = Image.open(io.BytesIO(photo)).convert("RGB")
        return np.asarray(ImageOps.fit(image, (self.size, self.size), Image.Resampling.BILINEAR))

    def embed(self, pixels: list[np.ndarray]) -> np.ndarray:
        """uint8 [size, size, 3] each -> float32 [N, D] of unit length."""
        self.torch.set_num_threads(THREADS)  # set per calling thread
        with self.torch.inference_mode():
            return self.torch.nn.functional.normalize(
                self.forward(self.torch.from_numpy(np.stack(pixels)))
            ).numpy()


class ResNet50(Eager):
    """ResNet-50 with random weights at its usual 224 x 224."""

    def build(self):
        from transformers import ResNetConfig, ResNetModel

        self.torch.manual_seed(0)  # the same weights in every worker
        return ResNetModel(ResNetConfig()).eval(), 224  # its defaults are those of ResNet-50

    def forward(self, pixels):
        images = (
            pixels.permute(0, 3, 1, 2) / 255 - 0.45
        ) / 0.225  # about ImageNet's mean and deviation
        return self.network(images).pooler_output.flatten(1)


class Clip:
    """CLIP ViT-B/32 with random weights.

    CLIP_FOLDER has the layout of a folder from the hub, for servers that load one.
    """

    def __init__(self) -> None:
        import torch
        from transformers import CLIPModel, CLIPProcessor

        folder = Path(os.environ["CLIP_FOLDER"])
        if not folder.exists():
            part = folder.with_name(folder.name + ".part")
            write_clip(part)
            part.rename(folder)
        torch.set_num_threads(THREADS)
        self.torch, self.model = torch, CLIPModel.from_pretrained(folder)
        self.processor = CLIPProcessor.from_pretrained(folder)

    def decode(self, photo: bytes):
        from PIL import Image

        return Image.open(io.BytesIO(photo))

    def embed(self, images: list) -> np.ndarray:
        """Pillow's images -> float32 [N, 512] of unit length."""
        with self.torch.inference_mode():
            pixels = self.processor(images=images, return_tensors="pt")
            return self.torch.nn.functional.normalize(
                self.model.get_image_features(**pixels)
            ).numpy()


def write_clip(folder: Path) -> None:
    """Write configuration, weights, processor and a tokenizer.

    The tokenizer knows only letters; a server requires one.
    """
    import torch
    from transformers import (
        CLIPConfig,
        CLIPImageProcessor,
        CLIPModel,
        CLIPProcessor,
        CLIPTokenizerFast,
    )
    from transformers.models.clip.tokenization_clip import bytes_to_unicode

    folder.mkdir(parents=True, exist_ok=True)
    letters = list(bytes_to_unicode().values())
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary, merges = folder / "vocab.json", folder / "merges.txt"
    vocabulary.write_text(json.dumps({word: number for number, word in enumerate(words)}))
    merges.write_text("#version: 0.2\n")
    torch.manual_seed(0)
    CLIPModel(CLIPConfig()).save_pretrained(folder)  # its defaults are those of ViT-B/32
    CLIPProcessor(
        CLIPImageProcessor(), CLIPTokenizerFast(str(vocabulary), str(merges))
    ).save_pretrained(folder)


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


def load() -> Eager | Clip | Npair:
    return {"eager": Eager, "npair": Npair, "ResNet-50": ResNet50, "CLIP ViT-B/32": Clip}[
        os.environ["MODE"]
    ]()


if __name__ == "__main__":
    paths, file = sys.argv[1:]
    network = load()
    photos = [Path(path).read_bytes() for path in Path(paths).read_text().splitlines()]
    np.save(file, np.concatenate([network.embed([network.decode(photo)]) for photo in photos]))
