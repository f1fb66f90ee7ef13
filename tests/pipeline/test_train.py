from __future__ import annotations

import dataclasses
import json
import resource
import shutil
import signal
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.characters import write_characters
from support.models import TINY, TINY_OPTIONS
from support.photos import with_much_text

from npair.cli.evaluate import embed_run, score_run
from npair.data.pixels import decode_dataset, default_cache
from npair.data.sources import read_dataset
from npair.networks.network import new_network
from npair.publishing.drawings import draw, encode, write_dataset
from npair.training.checkpoint import TrainingState, load_network, moving_average
from npair.training.defaults import choose_defaults, default_epochs, inspect_photo
from npair.training.run import RunError, TrainConfig
from npair.training.train import batch_recall, interruption, schedule, train


def weights(run: Path) -> torch.Tensor:
    return torch.cat([parameter.flatten() for parameter in load_network(run).parameters()])


def command(dataset: Path, run: Path, *options: str) -> list[str]:
    return [
        sys.executable,
        "-m",
        "npair",
        "train",
        "--data",
        str(dataset),
        "--run",
        str(run),
        *TINY_OPTIONS,
        *options,
    ]


def read_log(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def test_learns_to_tell_drawn_products_apart(tmp_path: Path) -> None:
    """Training on drawings must far exceed its start and chance, which is 1 in 6."""
    write_dataset(tmp_path, products=6, train=8, val=4)
    config = dataclasses.replace(TINY, epochs=20, classes_per_batch=6, evaluations=1)
    assert train(tmp_path, tmp_path / "run", config)
    log = read_log(tmp_path / "run")
    assert len(log) == 20
    assert log[-1]["loss"] < 0.5 * log[0]["loss"]
    assert ["val" in row for row in log] == [False] * 19 + [True]
    assert log[-1]["val"]["fine"] >= 0.4


def test_seed_decides_the_weights(dataset: Path, trained: Path, tmp_path: Path) -> None:
    train(dataset, tmp_path / "same", TINY)
    train(dataset, tmp_path / "other", dataclasses.replace(TINY, seed=1))
    torch.testing.assert_close(weights(tmp_path / "same"), weights(trained))
    assert not torch.allclose(weights(tmp_path / "other"), weights(trained))


def test_ctrl_c_keeps_a_checkpoint_and_resuming_ends_where_the_whole_run_does(
    dataset: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    interrupted = subprocess.Popen(
        command(dataset, run, "--epochs=16"), stderr=subprocess.PIPE, text=True
    )
    assert interrupted.stderr is not None
    for line in interrupted.stderr:
        if line.lstrip().startswith("epoch   2"):
            break
    interrupted.send_signal(signal.SIGINT)
    output = interrupted.stderr.read()
    assert interrupted.wait(timeout=60) == 130, output
    assert "go on with --resume" in output
    step = torch.load(run / "checkpoint.pt", weights_only=True)["step"]
    assert 0 < step < 16 * 3

    assert (
        subprocess.run(
            command(dataset, run, "--resume"), check=False, capture_output=True
        ).returncode
        == 0
    )
    whole = dataclasses.replace(TINY, epochs=16)
    assert train(dataset, tmp_path / "whole", whole)
    torch.testing.assert_close(weights(run), weights(tmp_path / "whole"), rtol=1e-3, atol=1e-4)


def test_what_is_ignored_does_not_interrupt() -> None:
    """A shell ignores SIGINT in processes that a script starts in the background."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with interruption() as interrupted:
            signal.raise_signal(signal.SIGINT)
            assert not interrupted()
            signal.raise_signal(signal.SIGTERM)
            assert interrupted()
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    "variant",
    [{"loss": "cosine"}, {"loss": "tuplet"}, {"mine_from": 6}, {"augmentation": "none"}],
    ids=str,
)
def test_variants_learn(variant: dict[str, Any], dataset: Path, tmp_path: Path) -> None:
    config = dataclasses.replace(TINY, epochs=12, evaluations=0, **variant)
    assert train(dataset, tmp_path / "run", config)
    log = read_log(tmp_path / "run")
    assert log[-1]["loss"] < log[0]["loss"]
    assert not any("val" in row for row in log), "val is not looked at"


def test_early_stopping_keeps_the_best_network(dataset: Path, tmp_path: Path) -> None:
    config = dataclasses.replace(
        TINY, epochs=30, evaluations=30, patience=2, embedding_layer="trained"
    )
    assert train(dataset, tmp_path / "run", config)
    recalls = [row["val"]["fine"] for row in read_log(tmp_path / "run")]
    assert len(recalls) < 30
    assert len(recalls) - 1 - recalls.index(max(recalls)) == 2, (
        "two evaluations without a better one"
    )
    dataset_, pixels, _ = decode_dataset(
        read_dataset(dataset), TINY.preprocessing(), default_cache()
    )
    kept = embed_run(tmp_path / "run", dataset_, pixels, "val").evaluate()
    assert kept.fine.recall_at_1.value == max(recalls)
    assert train(dataset, tmp_path / "run", config, resume=True), "a run that stopped has ended"
    assert len(read_log(tmp_path / "run")) == len(recalls)


def test_chooses_by_the_data(dataset: Path, tmp_path: Path) -> None:
    photos = read_dataset(dataset).train
    chosen = choose_defaults(TrainConfig(), photos)
    assert (chosen.network, chosen.augmentation) == ("efficientnet-lite0", "photo")
    assert (chosen.size, chosen.crop_size, chosen.views, chosen.learning_rate) == (
        128,
        112,
        1,
        4e-4,
    )
    chosen = choose_defaults(TrainConfig(network="compact"), photos)
    assert (chosen.size, chosen.crop_size, chosen.views, chosen.augmentation) == (
        128,
        80,
        2,
        "photo",
    )
    chosen = choose_defaults(TrainConfig(network="facebook/dinov2-small", size=210), photos)
    assert (chosen.size, chosen.crop_size, chosen.views, chosen.learning_rate) == (
        210,
        210,
        1,
        1e-4,
    )
    write_characters(tmp_path, characters=2, drawings=3)
    chosen = choose_defaults(TrainConfig(), read_dataset(tmp_path).train)
    assert chosen.network == "compact"
    assert (chosen.size, chosen.crop_size, chosen.views, chosen.augmentation) == (
        96,
        80,
        1,
        "drawing",
    )


@pytest.mark.parametrize("network", ["auto", "compact"])
def test_augmentation_chooses_nothing_else(network: str, dataset: Path) -> None:
    photos = read_dataset(dataset).train
    chosen = choose_defaults(TrainConfig(network=network), photos)
    for augmentation in ("drawing", "none"):
        other = choose_defaults(TrainConfig(network=network, augmentation=augmentation), photos)
        assert other == dataclasses.replace(chosen, augmentation=augmentation)


def test_counts_the_classes_that_it_trains_on(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = dataclasses.replace(TINY, epochs=1, evaluations=0, split_by="class")
    assert train(dataset / "train", tmp_path / "run", config)
    assert "16 train, 8 val, 4 classes; split by class" in capsys.readouterr().err


def test_epochs_follow_the_number_of_photos() -> None:
    assert [default_epochs("compact", photos) for photos in (24, 2_640, 10**6)] == [400, 300, 10]
    assert [default_epochs("efficientnet-lite0", n) for n in (24, 2_640, 10**6)] == [150, 68, 10]


def test_a_run_interrupted_after_every_step_has_the_log_of_the_whole(
    dataset: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(embeddings: torch.Tensor) -> torch.Tensor:
        signal.raise_signal(signal.SIGINT)
        return batch_recall(embeddings)

    config = dataclasses.replace(TINY, epochs=2, evaluations=2)
    (tmp_path / "run").mkdir()
    shutil.copy(trained / "log.jsonl", tmp_path / "run")  # of a run without a checkpoint
    monkeypatch.setattr("npair.training.train.batch_recall", interrupted)
    assert not train(dataset, tmp_path / "run", config)
    while not train(dataset, tmp_path / "run", config, resume=True):
        pass
    rows, whole = read_log(tmp_path / "run"), read_log(trained)
    assert [(row["epoch"], "val" in row) for row in rows] == [(1, True), (2, True)]
    averages = [row["loss"] for row in whole]
    assert [row["loss"] for row in rows] == pytest.approx(averages, rel=1e-2), "of all steps"


def test_a_resumed_run_has_a_row_for_each_epoch(
    dataset: Path, trained: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    rows = (run / "log.jsonl").read_text()
    one_too_many = rows.splitlines()[-1].replace('"epoch": 2', '"epoch": 3')
    (run / "log.jsonl").write_text(f"{rows}{one_too_many}\n{one_too_many[:40]}")
    assert train(dataset, run, TINY, resume=True)
    assert (run / "log.jsonl").read_text() == rows


def test_a_checkpoint_that_does_not_fit_leaves_nothing(tmp_path: Path) -> None:
    network, _ = new_network("compact", width=8, views=1)
    state = TrainingState.start(network, TrainConfig(), torch.device("cpu"))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(
            RunError, match=r"checkpoint\.pt cannot be written .*make room, and start"
        ):
            state.save(tmp_path / "checkpoint.pt")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert list(tmp_path.iterdir()) == []


def test_chooses_by_every_photo_that_training_reads(tmp_path: Path) -> None:
    png = encode(draw(0, 0, 64), "PNG")
    (tmp_path / "text.png").write_bytes(with_much_text(png))
    (tmp_path / "cut.jpg").write_bytes(encode(draw(0, 0, 64), "JPEG")[:-2])
    (tmp_path / "bad.png").write_bytes(png[:60])
    found = [inspect_photo(tmp_path / name) for name in ("text.png", "cut.jpg", "bad.png")]
    assert found == [(None, True), (64, True), None]


def test_does_not_write_over_a_run(dataset: Path, trained: Path) -> None:
    with pytest.raises(RunError, match="already holds a run"):
        train(dataset, trained, TINY)


def test_does_not_resume_on_other_data(trained: Path, tmp_path: Path) -> None:
    write_dataset(tmp_path, products=4, train=2, val=1)
    with pytest.raises(RunError, match="not those that"):
        train(tmp_path, trained, TINY, resume=True)


def test_does_not_score_photos_that_a_run_was_trained_on(
    dataset: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Data with splits of its own is scored, with a warning if the run was trained on other."""
    arguments = Namespace(run=trained, data=dataset, cache=None)
    assert "warning" not in " ".join(score_run(arguments, "val").findings)
    arguments.data = dataset / "train"
    with pytest.raises(RunError, match="may have been trained on photos of val; name the data"):
        score_run(arguments, "val")
    arguments.data = tmp_path
    write_dataset(tmp_path, products=4, train=2, val=1)
    assert score_run(arguments, "val").findings[-1].startswith(f"warning: {trained} was not")
    assert "photos that it was trained on may be in val" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"network": "auto", "size": 0, "width": 48}, "--width does nothing with --network eff"),
        ({"mine_from": 4}, "--mine-from 4 mines nothing, .* takes 4 classes of 4; lower"),
        ({"mine_from": 9, "classes_per_batch": 8}, "nothing, since a batch takes 6 classes of 6"),
        ({"evaluations": 9, "epochs": 9, "patience": 3}, "--patience needs val photos, but"),
    ],
    ids=str,
)
def test_refuses_what_does_nothing_with_the_data(
    options: dict[str, Any], reason: str, dataset: Path, tmp_path: Path
) -> None:
    shutil.copytree(dataset, tmp_path / "data")
    (tmp_path / "data/val.txt").unlink()
    with pytest.raises(RunError, match=reason):
        train(tmp_path / "data", tmp_path / "run", dataclasses.replace(TINY, **options))
    assert not (tmp_path / "run").exists()


def test_does_not_resume_nothing(dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="is not a run"):
        train(dataset, tmp_path, TINY, resume=True)


def test_command_line_says_what_is_wrong(tmp_path: Path) -> None:
    result = subprocess.run(
        command(tmp_path, tmp_path / "run"), check=False, capture_output=True, text=True
    )
    assert result.returncode == 1
    assert result.stderr.startswith("npair: ")
    assert "holds no photo" in result.stderr
    assert "Traceback" not in result.stderr


def test_moving_average_forgets_the_beginning_of_a_short_run() -> None:
    average, now = moving_average(0.998), [torch.tensor(0.0)]
    short, long = [torch.tensor(1.0)], [torch.tensor(1.0)]
    for count in range(1, 50):
        average(short, now, torch.tensor(count))
    average(long, now, torch.tensor(100_000))
    assert short[0] < 1e-6
    assert long[0].item() == pytest.approx(0.998)


def test_schedule_warms_up_and_ends_at_zero() -> None:
    rates = [schedule(step / 1000, 0.1) for step in range(1001)]
    assert rates[0] < 0.02
    assert max(rates) == pytest.approx(1, abs=0.02)
    assert np.argmax(rates) == pytest.approx(100, abs=2)
    assert rates[-1] == pytest.approx(0, abs=1e-6)
