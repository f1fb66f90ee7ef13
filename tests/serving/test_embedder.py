"""A version that is incomplete, changed or different refuses to load, with the reason."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import LIMITS, rewrite_manifest

from npair.drawings import draw, encode
from npair.serving.embedder import Embedder, VersionError, load_graph, read_manifest
from npair.serving.preprocess import decode


def test_embeds(version: Path) -> None:
    embedder = Embedder(version, threads=1)
    pixels = np.stack([decode(encode(draw(n, 0), "JPEG"), embedder.preprocessing, LIMITS) for n in range(3)])
    vectors = embedder.embed(pixels)
    assert vectors.shape == (3, 128)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(embedder.embed(pixels[1:2]), vectors[1:2], atol=1e-5)


@pytest.mark.parametrize("name", ["model.py", "network.pt2", "golden/photo.jpg", "golden/embeddings.npy"])
def test_one_changed_bit(version: Path, name: str) -> None:
    content = bytearray((version / name).read_bytes())
    content[len(content) // 2] ^= 1
    (version / name).write_bytes(content)
    with pytest.raises(VersionError, match=f"{name} has changed since it was published"):
        Embedder(version, threads=1)


def test_truncated_graph(version: Path) -> None:
    with (version / "network.pt2").open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(VersionError, match=r"network.pt2 has changed"):
        Embedder(version, threads=1)


def test_missing_file(version: Path) -> None:
    (version / "preprocess.py").unlink()
    with pytest.raises(VersionError, match=r"preprocess.py cannot be read"):
        Embedder(version, threads=1)


@pytest.mark.parametrize("content", [None, b"", b"{", b"\xff"])
def test_unreadable_manifest(version: Path, content: bytes | None) -> None:
    (version / "manifest.json").unlink()
    if content is not None:
        (version / "manifest.json").write_bytes(content)
    with pytest.raises(VersionError, match=r"manifest.json cannot be read"):
        Embedder(version, threads=1)


def test_other_golden_embeddings(version: Path) -> None:
    golden = np.load(version / "golden/embeddings.npy")
    np.save(version / "golden/embeddings.npy", np.roll(golden, 1, axis=1))
    rewrite_manifest(version, files={})
    with pytest.raises(VersionError, match="golden embeddings differ"):
        Embedder(version, threads=1)


def test_golden_embeddings_of_another_dimension(version: Path) -> None:
    np.save(version / "golden/embeddings.npy", np.load(version / "golden/embeddings.npy")[:, :64])
    rewrite_manifest(version, files={})
    with pytest.raises(VersionError, match="have shape"):
        Embedder(version, threads=1)


def test_nan_never_passes_for_an_embedding(version: Path) -> None:
    embedder = Embedder(version, threads=1)
    embedder.network = lambda pixels: torch.full((len(pixels), 128), torch.nan)  # type: ignore[assignment]
    with pytest.raises(ArithmeticError, match="not finite"):
        embedder.measure_golden_distance()


def test_weights_are_never_unpickled(version: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("something was unpickled")

    for module, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")):
        monkeypatch.setattr(module, name, refuse)
    load_graph(version / read_manifest(version)["engine"]["graph"])
    monkeypatch.undo()

    class Weights(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + 1

    torch.export.save(torch.export.export(Weights(), (torch.zeros(2),)), tmp_path / "pickled.pt2")  # with its example inputs
    with pytest.raises(VersionError, match="holds pickled data"):
        load_graph(tmp_path / "pickled.pt2")
