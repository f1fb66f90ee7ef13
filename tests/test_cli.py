"""The npair command, as users call it. Training is in test_train.py."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, running
from PIL import Image

from npair.data import load_pixels, read_split
from npair.evaluate import accuracy
from npair.serving.embedder import Embedder


def npair(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([Path(sys.executable).with_name("npair"), *arguments], check=False, capture_output=True, text=True)


def test_evaluate_scores_what_is_served(dataset: Path, tmp_path: Path) -> None:
    embedder = Embedder(ROOT / "model_repository/npair/1", threads=2)
    splits = [read_split(dataset, split) for split in ("val", "train")]
    vectors = [embedder.embed(load_pixels(split.paths, embedder.preprocessing)) for split in splits]
    expected = accuracy(vectors[0], splits[0], vectors[1], splits[1]).as_dict()
    with running() as (_, urls):
        for protocol, picture in (("http", "a.png"), ("grpc", "b.png")):
            result = npair("evaluate", "--data", dataset, "--url", urls[protocol], "--json", "--picture", tmp_path / picture)
            assert result.returncode == 0, result.stderr
            assert json.loads(result.stdout) == {"version": "1", **expected}
            with Image.open(tmp_path / picture) as image:
                assert min(image.size) > 500
                assert np.asarray(image).std() > 10
        (dataset / "val" / "product-0" / "4.jpg").rename(tmp_path / "kept.jpg")
        (dataset / "val" / "product-0" / "4.jpg").write_bytes(b"text")
        try:
            result = npair("evaluate", "--data", dataset, "--url", urls["http"])
        finally:
            (tmp_path / "kept.jpg").rename(dataset / "val" / "product-0" / "4.jpg")
    assert result.returncode == 1
    assert "4.jpg: not a JPEG" in result.stderr


def test_evaluate_without_a_server(dataset: Path) -> None:
    result = npair("evaluate", "--data", dataset, "--url", "http://127.0.0.1:9")
    assert result.returncode == 1
    assert "Connection refused" in result.stderr
    assert "Traceback" not in result.stderr


def test_verify(version: Path) -> None:
    result = npair("verify", version)
    assert result.returncode == 0
    assert "9 files as published" in result.stdout
    (version / "model.py").write_text("")
    result = npair("verify", version)
    assert result.returncode == 1
    assert f"npair: {version}: model.py has changed since it was published" in result.stderr


@pytest.mark.parametrize("arguments", [(), ("serve",), ("train",), ("train", "--data", "x", "--run", "y", "--epochs", "many")])
def test_wrong_usage(arguments: tuple[str, ...]) -> None:
    result = npair(*arguments)
    assert result.returncode == 2
    assert "usage: npair" in result.stderr


def test_help_needs_no_torch() -> None:
    code = "import sys; sys.argv = ['npair', '--help']; sys.modules['torch'] = None; from npair.cli import main; main()"
    assert "evaluate" in subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
