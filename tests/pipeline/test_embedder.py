"""Load complete versions; refuse incomplete, changed or foreign ones with the reason."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from support.models import rewrite_manifest
from support.photos import LIMITS

from npair.publishing.drawings import draw, encode
from npair.serving import engine
from npair.serving.embedder import Embedder
from npair.serving.engine import EngineError
from npair.serving.manifest import VersionError
from npair.serving.preprocess import decode
from npair.serving.refusal import PhotoError


@pytest.mark.parametrize("name", ["torch", "openvino-fp32"])
@pytest.mark.parametrize("threads", [1, 2])
def test_embeds_any_number_of_photos(version: Path, name: str, threads: int) -> None:
    embedder = Embedder(version, cores=threads, engine=name)
    photos = [encode(draw(n, 0), "JPEG") for n in range(19)]
    pixels = np.stack([decode(photo, embedder.preprocessing, LIMITS) for photo in photos])
    reference = (
        torch.export.load(version / "network.pt2").module()(torch.from_numpy(pixels)).detach()
    )
    expected = torch.nn.functional.normalize(reference).numpy()
    for number in (1, 2, 4, 7, 8, 19):
        vectors = embedder.embed(pixels[:number])
        assert vectors.shape == (number, 128)
        assert vectors.dtype == np.float32
        # OpenVINO stores weights in fp16; square roots of small features, and a layer fitted to few
        # photos, are sensitive to that.
        np.testing.assert_allclose(vectors, expected[:number], atol=2e-2)
        embedded = embedder.embed_photos(photos[:number], LIMITS)
        np.testing.assert_array_equal(np.stack(embedded), vectors)  # type: ignore[arg-type]


def test_a_bad_photo_keeps_its_place(version: Path) -> None:
    embedder = Embedder(version, cores=2)
    photos = [encode(draw(n, 0), "JPEG") for n in range(9)]
    expected = embedder.embed_photos(photos, LIMITS)
    for bad in range(9):
        answers = embedder.embed_photos(
            [b"no photo" if n == bad else photo for n, photo in enumerate(photos)], LIMITS
        )
        assert [n for n, answer in enumerate(answers) if isinstance(answer, PhotoError)] == [bad]
        for n in set(range(9)) - {bad}:
            np.testing.assert_allclose(answers[n], expected[n], atol=1e-4)  # type: ignore[arg-type]
    (only,) = embedder.embed_photos([b""], LIMITS)
    assert isinstance(only, PhotoError)
    assert (only.__traceback__, only.__cause__, only.__context__) == (None, None, None), (
        "their frames would keep the photos"
    )


@pytest.mark.parametrize(
    "name", ["model.py", "network.pt2", "golden/photo.jpg", "golden/embeddings.npy"]
)
def test_one_changed_bit(version: Path, name: str) -> None:
    content = bytearray((version / name).read_bytes())
    content[len(content) // 2] ^= 1
    (version / name).write_bytes(content)
    with pytest.raises(VersionError, match=f"{name} has changed since it was published"):
        Embedder(version, cores=1)


def test_truncated_graph(version: Path) -> None:
    with (version / "network.pt2").open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(VersionError, match=r"network.pt2 has changed"):
        Embedder(version, cores=1)


def test_missing_file(version: Path) -> None:
    (version / "preprocess.py").unlink()
    with pytest.raises(VersionError, match=r"preprocess.py cannot be read"):
        Embedder(version, cores=1)


@pytest.mark.parametrize("content", [None, b"", b"{", b"\xff"])
def test_unreadable_manifest(version: Path, content: bytes | None) -> None:
    (version / "manifest.json").unlink()
    if content is not None:
        (version / "manifest.json").write_bytes(content)
    with pytest.raises(VersionError, match=r"manifest.json cannot be read"):
        Embedder(version, cores=1)


def test_other_golden_embeddings(version: Path) -> None:
    golden = np.load(version / "golden/embeddings.npy")
    np.save(version / "golden/embeddings.npy", np.roll(golden, 1, axis=1))
    rewrite_manifest(version, files={})
    with pytest.raises(
        VersionError,
        match=r"no engine works: .*: golden embeddings differ.* torch: golden embeddings differ",
    ):
        Embedder(version, cores=1)


def test_golden_embeddings_of_another_dimension(version: Path) -> None:
    np.save(version / "golden/embeddings.npy", np.load(version / "golden/embeddings.npy")[:, :64])
    rewrite_manifest(version, files={})
    with pytest.raises(VersionError, match="have 128 numbers, published ones 64"):
        Embedder(version, cores=1)


def test_nan_never_passes_for_an_embedding(version: Path) -> None:
    embedder = Embedder(version, cores=1)
    embedder.network = lambda pixels, **_: np.full((len(pixels), 128), np.nan, np.float32)
    with pytest.raises(ArithmeticError, match="not finite"):
        embedder.embed(np.zeros((3, 64, 64, 3), np.uint8))


class TestEngines:
    """Put an engine first that fails in some way."""

    @staticmethod
    def put_first(version: Path, **changes: object) -> None:
        engines = json.loads((version / "manifest.json").read_bytes())["engines"]
        rewrite_manifest(
            version, engines={"first": {**engines["openvino-fp32"], **changes}, **engines}
        )

    def test_without_its_instructions(self, version: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Simulate an older CPU, since this one may have the instructions."""
        self.put_first(version, precision="int8")
        monkeypatch.setattr(engine, "cpu_flags", lambda: frozenset({"sse4_1"}))
        embedder = Embedder(version, cores=1)
        assert embedder.engine != "first"
        assert embedder.passed_over["first"] == "engine first: this CPU has none of avx2"
        with pytest.raises(EngineError, match="engine first: this CPU has none of"):
            Embedder(version, cores=1, engine="first")

    def test_without_its_library(self, version: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "openvino", None)
        embedder = Embedder(version, cores=1)
        assert embedder.engine == "torch"
        assert "openvino is not installed" in embedder.passed_over["openvino-fp32"]

    def test_beyond_its_tolerance(self, version: Path) -> None:
        self.put_first(version, tolerance=0)
        embedder = Embedder(version, cores=1)
        assert embedder.engine != "first"
        assert "engine first: golden embeddings differ by" in embedder.passed_over["first"]
        with pytest.raises(VersionError, match="engine first: golden embeddings differ by"):
            Embedder(version, cores=1, engine="first")

    def test_of_an_unknown_name(self, version: Path) -> None:
        with pytest.raises(VersionError, match=r"has no engine best, only .*torch"):
            Embedder(version, cores=1, engine="best")


def test_serves_without_torch(version: Path) -> None:
    code = "import sys; sys.modules['torch'] = None;"
    code += "from npair.serving.embedder import Embedder, Path;"
    code += f"print(Embedder(Path({str(version)!r}), cores=1, engine='openvino-fp32').engine)"
    result = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    )
    assert result.stdout == "openvino-fp32\n"


def test_weights_are_never_unpickled(
    version: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("something was unpickled")

    for module, name in (
        (pickle, "load"),
        (pickle, "loads"),
        (pickle, "Unpickler"),
        (torch, "load"),
    ):
        monkeypatch.setattr(module, name, refuse)
    engine.load_graph("torch", version / "network.pt2", "fp32", threads=1, cores=1)
    monkeypatch.undo()

    class Weights(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + 1

    # Saving pickles the example inputs.
    torch.export.save(torch.export.export(Weights(), (torch.zeros(2),)), tmp_path / "pickled.pt2")
    with pytest.raises(EngineError, match="holds pickled data"):
        engine.load_graph("torch", tmp_path / "pickled.pt2", "fp32", threads=1, cores=1)


def test_tells_nobody(version: Path) -> None:
    """Never import OpenVINO's telemetry package, which sends an event at import."""
    code = "from npair.serving.embedder import Embedder, Path;"
    code += f"Embedder(Path({str(version)!r}), cores=1, engine='openvino-fp32');"
    code += "import openvino.tools.ovc as ovc; print(type(ovc.telemetry).__module__)"
    result = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    )
    assert result.stdout == "openvino.tools.ovc.telemetry_stub\n"
