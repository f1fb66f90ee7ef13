"""Sound and broken versions, and helpers that inspect them."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from npair.client import Vectors
from npair.data.pixels import decode_photos
from npair.networks.network import EmbeddingNetwork, embed
from npair.publishing.graphs import export, write_graphs
from npair.releasing.config import pinned
from npair.releasing.control import Server
from npair.serving.manifest import Engine, Manifest
from npair.training.checkpoint import load_network

SECRET = "a-secret"
Standing = tuple[Path, Server, dict[str, str]]


def golden(models: Path, number: int) -> tuple[list[Path], Vectors]:
    """Return the paths of a version's golden photos and their embeddings."""
    folder = models / str(number)
    entry = Manifest.read(folder).golden
    return [folder / photo for photo in entry.photos], entry.read(folder)[1]


def digest(version: Path) -> str:
    return hashlib.sha256((version / "manifest.json").read_bytes()).hexdigest()


def pins(models: Path, number: int) -> bool:
    return pinned((models / "config.pbtxt").read_text())[-1] == number


def only_openvino(folder: Path) -> None:
    manifest = Manifest.read(folder)
    manifest.engines = {"openvino-fp32": manifest.engines["openvino-fp32"]}
    manifest.write(folder)


def other_network(folder: Path, run: Path) -> None:
    """Turn a copy of version 1 into version 2: another last layer, and only OpenVINO in fp32."""
    network = load_network(run)
    torch.nn.init.normal_(network.embedding.weight, generator=torch.Generator().manual_seed(1))
    export(network, 64, folder / "network.pt2")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nncf.quantize", None)  # quantising is slow
        write_graphs(folder, np.zeros((1, 64, 64, 3), np.uint8))
    manifest = Manifest.read(folder)
    manifest.version = 2
    photos = [folder / photo for photo in manifest.golden.photos]
    pixels = decode_photos(photos, manifest.preprocessing)
    np.save(folder / manifest.golden.embeddings, embed(network, pixels))
    manifest.write(folder)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _wrong_hash(folder: Path, _: Path) -> None:
    manifest = Manifest.read(folder)
    manifest.files["network.pt2"] = hashlib.sha256(b"").hexdigest()
    (folder / "manifest.json").write_bytes(manifest.encode())


def _no_python(folder: Path, _: Path) -> None:
    (folder / "model.py").write_text("def execute(:\n")
    Manifest.read(folder).write(folder)


def _other_graph(change: Callable[[EmbeddingNetwork], object]) -> Callable[[Path, Path], None]:
    def spoil(folder: Path, run: Path) -> None:
        network = load_network(run)
        change(network)
        export(network, 64, folder / "network.pt2")
        manifest = Manifest.read(folder)
        torch_engine = Engine(library="torch", graph="network.pt2", precision="fp32", tolerance=0.1)
        manifest.engines = {"torch": torch_engine}
        manifest.write(folder)

    return spoil


def _not_a_number(network: EmbeddingNetwork) -> None:
    torch.nn.init.constant_(network.embedding.bias, float("nan"))


def _narrower(network: EmbeddingNetwork) -> None:
    network.embedding = torch.nn.Linear(network.embedding.in_features, 64)  # type: ignore[assignment]


# Ways to break a version, given its folder and the run that trained its network.
DAMAGES: dict[str, Callable[[Path, Path], None]] = {
    "truncated": lambda folder, _: truncate(folder / "network.pt2"),
    "flipped": lambda folder, _: flip(next(iter(folder.glob("network*.bin")))),
    "hash": _wrong_hash,
    "syntax": _no_python,
    "nan": _other_graph(_not_a_number),
    "dimension": _other_graph(_narrower),
    "manifest": lambda folder, _: truncate(folder / "manifest.json"),
}


def two_versions(folder: Path, trained: Path) -> None:
    """Add version 2 to a model's folder that has version 1; leave both with the fastest engine.

    Deriving version 2 from version 1 saves the minute that training and publishing take.
    """
    only_openvino(folder / "1")
    shutil.copytree(folder / "1", folder / "2")
    other_network(folder / "2", trained)
