"""Run the npair command as users do; test_train.py covers training."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.characters import write_characters
from support.models import SHIPPED, TINY_OPTIONS
from support.servers import running

from npair.cli.evaluate import embed_run
from npair.data.pixels import decode_dataset
from npair.data.sources import read_dataset
from npair.scoring.evaluate import evaluate
from npair.scoring.retrieval import LabelledVectors
from npair.serving.embedder import Embedder
from npair.training.run import TrainConfig, read_run


def npair(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [Path(sys.executable).with_name("npair"), *arguments],
        check=False,
        capture_output=True,
        text=True,
    )


def test_evaluate_scores_what_is_served(dataset: Path, cache: Path, tmp_path: Path) -> None:
    embedder = Embedder(SHIPPED, cores=2)
    loaded, pixels, _ = decode_dataset(read_dataset(dataset), embedder.preprocessing, cache)
    val, train = loaded.splits["val"], loaded.train
    queries, gallery = (embedder.embed(pixels.array[pixels.of(photos)]) for photos in (val, train))
    expected = evaluate(
        LabelledVectors(queries, val.fine, val.coarse),
        LabelledVectors(gallery, train.fine, train.coarse),
    ).as_dict()
    with running() as (_, urls):
        for protocol in ("http", "grpc"):
            picture, report = tmp_path / f"{protocol}.png", tmp_path / f"{protocol}.html"
            result = npair(
                "evaluate",
                "--data",
                dataset,
                "--url",
                urls[protocol],
                "--json",
                "--picture",
                picture,
                "--report",
                report,
            )
            assert result.returncode == 0, result.stderr
            scores = json.loads(result.stdout)
            assert scores["embedded_by"].startswith(f"version {SHIPPED.name}")
            assert scores["fine"] == expected["fine"]
            assert scores["coarse"] == expected["coarse"]
            with Image.open(picture) as image:
                assert min(image.size) > 500
                assert np.asarray(image).std() > 10
            assert "</html>" in report.read_text()


def test_evaluate_scores_a_run(dataset: Path, trained: Path, cache: Path) -> None:
    preprocessing = TrainConfig(**read_run(trained)["train"]).preprocessing()
    read, pixels, _ = decode_dataset(read_dataset(dataset), preprocessing, cache)
    val = embed_run(trained, read, pixels, "val")
    nearest = (val.queries @ val.gallery.T).argmax(axis=1)
    recall = np.mean(val.gallery_photos.fine[nearest] == val.query_photos.fine)
    result = npair("evaluate", "--data", dataset, "--run", trained, "--json")
    assert result.returncode == 0, result.stderr
    scores = json.loads(result.stdout)
    assert scores["protocol"] == "gallery"
    assert scores["fine"]["recall_at_1"]["value"] == recall
    table = npair("evaluate", "--data", dataset, "--run", trained)
    assert f"recall at 1   {recall:.3f} (" in table.stdout
    assert "equal error rate" in table.stdout


def test_train_scores_unseen_classes_among_each_other(dataset: Path, tmp_path: Path) -> None:
    shutil.copytree(dataset / "val", tmp_path / "photos")
    run = tmp_path / "run"
    result = npair(
        "train", "--data", tmp_path / "photos", "--run", run, *TINY_OPTIONS, "--split-by=class"
    )
    assert result.returncode == 0, result.stderr
    assert "2 of 6 classes with two photos or more are val" in result.stderr
    assert "4 photos of 2 classes against each other" in result.stdout
    assert "</html>" in (run / "report.html").read_text()


def test_train_without_a_val_split(dataset: Path, tmp_path: Path) -> None:
    shutil.copytree(dataset, tmp_path / "data")
    (tmp_path / "data/val.txt").unlink()
    result = npair("train", "--data", tmp_path / "data", "--run", tmp_path / "run", *TINY_OPTIONS)
    assert result.returncode == 0, result.stderr
    assert "val was not scored, so there is no report; the data have no val split" in result.stderr


def test_train_prints_the_command_that_makes_a_report(dataset: Path, tmp_path: Path) -> None:
    run = tmp_path / "a run"
    result = npair("train", "--data", dataset, "--run", run, *TINY_OPTIONS, "--evaluations=0")
    program, *words = shlex.split(result.stderr.rpartition("to make one: ")[2])
    assert program == "npair", result.stderr
    assert npair(*words).returncode == 0
    assert "</html>" in (run / "report.html").read_text()


def test_train_says_what_it_chose_for_drawings(tmp_path: Path) -> None:
    write_characters(tmp_path / "characters", characters=60, drawings=5)
    result = npair(
        "train", "--data", tmp_path / "characters", "--run", tmp_path / "run", "--epochs", "2"
    )
    assert result.returncode == 0, result.stderr
    assert (
        "240 train, 60 val, 60 classes; split by photo, seed 0: 0.1 of each class's photos are val,"
        in result.stderr
    )
    assert "96 x 96 pixels" in result.stderr
    assert "2 epochs of 2 batches of 60 classes" in result.stderr
    assert "augmentation drawing with crops of 80 pixels" in result.stderr
    assert "60 photos of 60 classes against 240 gallery photos" in result.stdout
    assert "alphabet-01/character-29" in (tmp_path / "run/report.html").read_text()


def test_evaluate_names_splits(dataset: Path, trained: Path) -> None:
    result = npair("evaluate", "--data", dataset, "--run", trained, "--split", "test")
    assert result.returncode == 1
    assert "no split test; it has train, val" in result.stderr


def test_data_check_names_what_is_wrong(dataset: Path, tmp_path: Path) -> None:
    shutil.copytree(dataset, tmp_path / "data")
    (tmp_path / "data/val/product-0/4.jpg").write_bytes(b"text")
    result = npair("data", "check", "--data", tmp_path / "data")
    assert result.returncode == 0
    assert "train: 24 photos of 6 classes\nval: 11 photos of 6 classes" in result.stdout
    assert "cannot be decoded" in result.stdout
    assert "4.jpg (text, not a JPEG" in result.stdout


def test_data_folds_are_data_sets(dataset: Path, tmp_path: Path) -> None:
    result = npair(
        "data",
        "folds",
        "--data",
        dataset,
        "--folds",
        "2",
        "--of",
        "train",
        "val",
        "--out",
        tmp_path,
    )
    assert result.returncode == 0, result.stderr
    tables = result.stdout.split()
    assert len(tables) == 2
    checked = npair("data", "check", "--data", tables[0])
    sizes = [
        int(number)
        for number in re.findall(r"(?:train|val): (\d+) photos of 6 classes", checked.stdout)
    ]
    assert sum(sizes) == 36
    assert min(sizes) >= 12
    assert "by colours alone" in checked.stdout


@pytest.mark.parametrize("url", ["http://127.0.0.1:9", "grpc://127.0.0.1:9"])
def test_evaluate_without_a_server(
    url: str, dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NPAIR_URL", url)
    began = time.monotonic()
    result = npair("evaluate", "--data", dataset)
    assert time.monotonic() - began < 15  # 3 on an idle machine
    assert result.returncode == 1
    assert f"npair: {url}: " in result.stderr
    assert "Connection refused" in result.stderr
    assert "Traceback" not in result.stderr


def test_verify(version: Path) -> None:
    result = npair("verify", version)
    assert result.returncode == 0
    assert re.search(r": files as published\n(.*\n)*  torch: golden set off by", result.stdout)
    (version / "model.py").write_text("")
    result = npair("verify", version)
    assert result.returncode == 1
    assert f"npair: {version}: model.py has changed since it was published" in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [(), ("serve",), ("train",), ("train", "--data", "x", "--run", "y", "--epochs", "many")],
)
def test_wrong_usage(arguments: tuple[str, ...]) -> None:
    result = npair(*arguments)
    assert result.returncode == 2
    assert "usage: npair" in result.stderr
