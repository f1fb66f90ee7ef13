"""Check the benchmarks' arithmetic and that the docs quote their results."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import photos_per_product
import pytest
import robustness
import unseen
from ablation import table
from bench_report import report
from contestants import ALL, OTHERS, Contestant, Setting
from machine import VERSION
from model_card import card
from PIL import Image
from robustness import CHANGES, exposed, measure
from support.models import ROOT, SHIPPED, TINY
from training_runs import IMAGENET
from unseen import across_groups, product_folds
from wrk import Load

from npair.data.dataset import Photos
from npair.data.pixels import Pixels
from npair.data.sources import read_dataset
from npair.publishing.drawings import draw
from npair.scoring.evaluate import EmbeddedSplit


def test_ablation_compares_runs_of_the_same_fold_and_seed() -> None:
    def row(variant: str, fold: int, fine: float) -> dict[str, Any]:
        scores = {"coarse": 0.5, "map_at_r": 0.25, "eer": 0.1}
        return {"variant": variant, "seed": 0, "fold": fold, "fine": fine, **scores}

    rows = [
        row("baseline", 0, 0.3),
        row("baseline", 1, 0.5),
        row("N = 15", 1, 0.6),
        row("N = 15", 0, 0.4),
    ]
    header, _, baseline, smaller = table(
        [*rows, row("N = 60", 0, 0.9), row("N = 15", 2, 0.9)]
    ).splitlines()
    assert "difference" in header
    assert baseline == "| baseline | 2 | 0.400 |  | 0.500 | 0.250 | 0.100 |"
    assert smaller == "| N = 15 | 2 | 0.500 | +0.100 ± 0.000 | 0.500 | 0.250 | 0.100 |"


def test_report_compares_with_the_best_peer_another_version_and_other_networks(
    tmp_path: Path,
) -> None:
    peers = {peer.name: peer for peer in ALL}

    def contestant(
        server: str, mode: str, rate: float, p50: float, version: Path = VERSION
    ) -> Contestant:
        loads = [Load(1, 1000 / p50, p50, p50), Load(32, rate, 1.0, 1.0)]
        return Contestant(
            peers[server],
            mode,
            Setting(1, 1),
            version,
            lone=p50,
            loads=loads,
            megabytes=[1.0],
            first_answer=[1.0],
        )

    lines = report(
        [
            contestant("npair", "npair", 600, 3),
            contestant("npair", "npair", 400, 6, tmp_path / "9"),
            contestant("FastAPI", "eager", 50, 20),
            contestant("LitServe", "eager", 100, 30),
            *(contestant(server, network, 20, 60) for network, server in OTHERS.items()),
        ],
        [625.0],
    )
    assert "npair reaches 0.96" in lines
    assert (
        "Best peer as documented: LitServe, of which npair has 6.00 times the photos/s, "
        "and 0.10 of the p50 at one" in lines
    )
    assert (
        "npair, version 9: npair has 1.50 times the photos/s, "
        "and 0.50 of the p50 at one connection." in lines
    )
    assert (
        "infinity, CLIP ViT-B/32: npair has 30.00 times the photos/s, "
        "and 0.05 of the p50 at one connection." in lines
    )
    assert "decoder inside" not in lines  # the other version is no peer


def test_docs_hold_what_the_results_say() -> None:
    rows = [json.loads(line) for line in (ROOT / "docs/ablation.jsonl").open()]
    assert table(rows) in (ROOT / "docs/training.md").read_text()
    assert (ROOT / "docs/model-card.md").read_text() == card(SHIPPED) + "\n"


def test_documented_commands_start() -> None:
    """Start all in one process, since libraries take long to import.

    Those with fewer folders in PYTHONPATH come first, and find no module of the others.
    """
    pages = [ROOT / "Makefile", *ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]
    pages += ROOT.glob("benchmarks/*.py")
    command = re.compile(r"(?:PYTHONPATH=(\S+)\s+)?\S*python\s+(benchmarks/\w+\.py)")
    commands = sorted({found for page in pages for found in command.findall(page.read_text())})
    assert len(commands) > 15
    code = (
        "import contextlib, runpy, sys\nfor folders, script in COMMANDS:\n"
        "    sys.path[:0] = ['benchmarks', *filter(None, folders.split(':'))]\n"
        "    sys.argv = [script, '--help']\n"
        "    with contextlib.suppress(SystemExit):\n"
        "        runpy.run_path(script, run_name='__main__')"
    ).replace("COMMANDS", repr(commands))
    helps = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    ).stdout
    assert [name for _, name in commands if f"usage: {Path(name).name} " not in helps] == []


@pytest.mark.parametrize(
    ("benchmark", "on_file", "others", "missing"),
    [
        (
            unseen,
            ["--epochs", "34", "--layers", "trained"],
            ["--epochs", "5", "--layers", "whitened"],
            {"from scratch, 5 epochs, whitened layer", "from ImageNet, 5 epochs, whitened layer"},
        ),
        (photos_per_product, ["--version", "14"], ["--version", "v/16"], {"version 16"}),
    ],
)
def test_rows_on_file_stand_for_the_same_options_alone(
    benchmark: ModuleType,
    on_file: list[str],
    others: list[str],
    missing: set[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: set[str] = set()

    def rows_of(
        _: Namespace, configs: dict[tuple[str, int], Any], *__: Any, **___: Any
    ) -> list[Any]:
        asked.update(variant for variant, _ in configs)
        return []

    monkeypatch.setattr(benchmark, "rows_of", rows_of)
    file = ROOT / f"docs/{benchmark.__name__}.jsonl"
    done = {json.loads(line)["variant"] for line in file.open()}
    for options, left in ((on_file, set()), (others, missing)):
        asked.clear()
        monkeypatch.setattr(sys, "argv", [benchmark.__name__, *options])
        benchmark.main()
        assert asked - done == left


def pixels_of(encoded: bytes) -> npt.NDArray[np.int64]:
    return np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB")).astype(np.int64)


def test_photos_are_changed_as_said() -> None:
    photo = draw(1, 0, 96)
    before = np.asarray(photo).astype(np.int64)
    changed = dict(
        zip(
            ("png", "grey", "half", "twice", "blurred", "jpeg", "rotated", "cropped"),
            CHANGES.values(),
            strict=True,
        )
    )
    after = {name: pixels_of(change(photo)) for name, change in changed.items()}
    assert np.array_equal(after["png"], before)
    assert (after["grey"] == after["grey"][..., :1]).all()
    assert not np.array_equal(after["grey"], before)
    assert after["half"].mean() < before.mean() < after["twice"].mean()
    assert after["blurred"].std() < before.std()
    assert 0 < np.abs(after["jpeg"] - before).mean() < 16
    assert after["rotated"].shape == before.shape
    assert after["rotated"].any(axis=2).all()  # no black corners
    assert after["cropped"].shape[0] * after["cropped"].shape[1] == pytest.approx(
        96 * 96 * 2 / 3, rel=0.02
    )
    assert np.array_equal(
        after["cropped"], before[: len(after["cropped"]), : after["cropped"].shape[1]]
    )


def test_exposure_is_of_linear_light() -> None:
    grey = Image.new("RGB", (1, 1), (188, 188, 188))  # half of white's light
    assert exposed(grey, 1).getpixel((0, 0)) == (188, 188, 188)
    assert exposed(grey, 0.5).getpixel((0, 0)) == (137, 137, 137)  # a quarter
    assert exposed(grey, 2).getpixel((0, 0)) == (255, 255, 255)
    assert exposed(Image.new("RGB", (1, 1), (250, 5, 0)), 2).getpixel((0, 0)) == (
        255,
        10,
        0,
    )  # near black, sRGB is linear


def test_robustness_compares_changed_photos_with_their_originals(dataset: Path) -> None:
    rows = {row["change"]: row for row in measure(SHIPPED, read_dataset(dataset))}
    assert list(rows) == ["unchanged", *CHANGES]
    assert rows["unchanged"]["cosine"] == pytest.approx(1, abs=1e-4)
    assert rows["unchanged"]["same_product"] == 1
    assert rows["grey"]["cosine"] < rows["stored as PNG"]["cosine"]
    assert all(row["photos"] == 12 for row in rows.values())


def test_versions_stand_side_by_side() -> None:
    def row(version: int, change: str, cosine: float) -> dict[str, Any]:
        return {
            "version": version,
            "change": change,
            "cosine": cosine,
            "same_product": 0.5,
            "fine": 0.25,
            "coarse": 0.75,
        }

    rows = [
        row(1, "unchanged", 1),
        row(1, "grey", 0.2),
        row(2, "unchanged", 1),
        row(2, "grey", 0.9),
        row(2, "blurred", 0.8),
    ]
    head, _, unchanged, grey, blurred = robustness.table(rows).splitlines()
    assert head.startswith("| val photos | cosine, version 1 | cosine, version 2 |")
    assert (
        unchanged == "| unchanged | 1.000 | 1.000 | 0.500 | 0.500 | 0.250 / 0.750 | 0.250 / 0.750 |"
    )
    assert grey.startswith("| grey | 0.200 | 0.900 |")
    assert blurred.startswith("| blurred | - | 0.800 |")


def test_unseen_products_are_in_no_train_split(dataset: Path, tmp_path: Path) -> None:
    written = product_folds(Namespace(data=dataset, runs=tmp_path))
    tables = [read_dataset(table) for table in written.values()]
    found = []
    for folded in tables:
        assert folded.val is not None
        assert not set(folded.train.fine) & set(folded.val.fine)
        # The folds split the 24 photos of train and leave out those of val.
        assert len(folded.train) + len(folded.val) == 24
        found += [folded.val.fine_names[label] for label in np.unique(folded.val.fine)]
    assert sorted(found) == sorted(read_dataset(dataset).train.fine_names)


def test_unseen_products_are_not_found_by_lookalikes() -> None:
    """Score each photo only against photos outside its group of lookalikes.

    Two products have four photos in each of three colours. A photo is nearest to those of its own
    product and colour.
    """
    product, colour = (part.ravel() for part in np.mgrid[0:2, 0:3].repeat(4, axis=2))
    paths = tuple(Path(f"{index}.png") for index in range(24))
    photos = Photos(paths, product, product, ("a", "b"), ("a", "b"))
    previews = Pixels(
        np.broadcast_to(255 * np.eye(3, dtype=np.uint8)[colour][:, None, None], (24, 4, 4, 3)),
        {path: i for i, path in enumerate(paths)},
    )
    seen = np.eye(6, dtype=np.float32)[3 * product + colour]
    vectors = (
        0.8 * seen + 0.6 * np.roll(np.eye(6, dtype=np.float32), 3, axis=1)[3 * product + colour]
    )  # the other product's photos of this colour are the next nearest
    found = EmbeddedSplit("colours", photos, vectors, photos, vectors)
    assert found.recall_at_1()["fine"] == 1
    scores = across_groups(found, previews)
    assert scores["queries"] == 24
    assert scores["fine"] <= 0.5


def test_unseen_trains_and_scores_or_only_scores(dataset: Path, tmp_path: Path) -> None:
    table = product_folds(Namespace(data=dataset, runs=tmp_path))[0]
    places = table, tmp_path, tmp_path / "cache"
    scratch = unseen.run_one("from scratch", TINY, *places)
    assert scratch["epochs"] == TINY.epochs
    assert (tmp_path / "from-scratch-seed-0-fold-0" / "checkpoint.pt").exists()
    imagenet = unseen.run_one(IMAGENET, unseen.VARIANTS[IMAGENET], *places)
    assert imagenet["epochs"] == 0
    assert scratch["queries"] == imagenet["queries"] == 8
    assert 0 <= imagenet["fine"] <= imagenet["coarse"] <= 1


def test_unseen_differences_are_from_imagenet_alone_on_the_same_fold() -> None:
    def row(variant: str, fold: int, fine: float) -> dict[str, Any]:
        return {
            "variant": variant,
            "fold": fold,
            "fine": fine,
            "coarse": 0.5,
            "map_at_r": 0.25,
        }

    rows = [
        row("ImageNet alone", 0, 0.3),
        row("ImageNet alone", 1, 0.3),
        row("from ImageNet", 1, 0.4),
        row("from ImageNet", 0, 0.4),
    ]
    _, _, alone, trained = unseen.table([*rows, row("from scratch", 0, 0.1)]).splitlines()
    assert alone == "| ImageNet alone | 0.300 ± 0.000 |  | 0.500 ± 0.000 | 0.250 ± 0.000 |"
    assert (
        trained
        == "| from ImageNet | 0.400 ± 0.000 | +0.100 ± 0.000 | 0.500 ± 0.000 | 0.250 ± 0.000 |"
    )


def test_draws_of_photos_are_nested(dataset: Path, tmp_path: Path) -> None:
    arguments = Namespace(data=dataset, runs=tmp_path, cache=tmp_path / "cache", photos=[2, 1])
    drawn = {
        photos: read_dataset(table)
        for photos, table in photos_per_product.draws(arguments, 0).items()
    }
    assert [*drawn] == [1, 2, "all"]
    products = len(drawn["all"].train.fine_names)
    assert [len(draw.train) for draw in drawn.values()] == [products, 2 * products, 24]
    sets = [set(draw.train.paths) for draw in drawn.values()]
    assert sets[0] < sets[1] < sets[2]
    assert len({draw.splits["val"].paths for draw in drawn.values()}) == 1


def test_each_variant_searches_the_drawn_photos(dataset: Path, tmp_path: Path) -> None:
    arguments = Namespace(data=dataset, runs=tmp_path, cache=tmp_path / "cache", photos=[2])
    draws = photos_per_product.draws(arguments, 0)
    configs = {**photos_per_product.VARIANTS, photos_per_product.TRAINED: TINY}
    rows = {
        (variant, photos): photos_per_product.run_one(
            variant, config, table, tmp_path, tmp_path / "cache", version=SHIPPED
        )
        for variant, config in configs.items()
        for photos, table in draws.items()
    }
    published = photos_per_product.PUBLISHED
    assert rows[published, 2]["gallery"] < rows[published, "all"]["gallery"] == 24
    assert rows[photos_per_product.TRAINED, 2]["epochs"] == TINY.epochs


def test_photos_of_a_product_stand_below_each_other() -> None:
    def row(variant: str, photos: int | str, seed: int, fine: float) -> dict[str, Any]:
        scores = {"gallery": 81, "fine": fine, "fine_95": [fine - 0.05, fine + 0.05], "coarse": 0.5}
        return {"variant": variant, "photos": photos, "seed": seed, **scores}

    rows = [
        row("trained on them", "all", 0, 0.8),
        row("trained on them", 2, 0, 0.2),
        row("trained on them", 2, 1, 0.4),
        row("ImageNet alone", 2, 0, 0.1),
    ]
    _, _, two, whole, _, note = photos_per_product.table(rows).splitlines()
    assert two == "| 2 | 81 | 0.300 / 0.500 | 0.100 / 0.500 |"
    assert whole == "| all | 81 | 0.800 / 0.500 |  |"
    assert note.endswith("± 0.050")
