"""npair train: train a network and report on it."""
# ruff: noqa: PLC0415  # commands import their libraries when they run

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from pathlib import Path

from npair.cli.evaluate import present, score_run
from npair.cli.options import Commands, add_command, add_config_option, add_data, command_line, say
from npair.client.cli import EXIT_INTERRUPTED
from npair.training.run import TrainConfig, read_run


def add_commands(commands: Commands) -> None:
    train = add_command(
        commands,
        "train",
        _train,
        "train a network on the train split and report on val",
        extra="train",
    )
    add_data(train)
    train.add_argument(
        "--run",
        type=Path,
        required=True,
        metavar="DIR",
        help="folder for the configuration, log, checkpoint and report",
    )
    train.add_argument(
        "--resume",
        action="store_true",
        help="continue from the run's checkpoint, with the run's own configuration",
    )
    for field in dataclasses.fields(TrainConfig):
        add_config_option(train, field)


def _train(arguments: argparse.Namespace) -> int:
    names = [field.name for field in dataclasses.fields(TrainConfig)]
    config = TrainConfig(**{name: getattr(arguments, name) for name in names})
    config.refuse_idle_options()
    from npair.training.train import train

    run: Path = arguments.run
    if not train(arguments.data, run, config, resume=arguments.resume, cache=arguments.cache):
        return EXIT_INTERRUPTED
    if int(os.environ.get("RANK", "0")):  # torchrun's first process alone reports
        return 0
    last_epoch = (run / "log.jsonl").read_text().splitlines()[-1]
    if "val" not in json.loads(last_epoch):
        remedy = "the data have no val split"
        if not read_run(run)["train"]["evaluations"]:
            report = ("--report", run / "report.html")
            evaluate = command_line("evaluate", "--data", arguments.data, "--run", run, *report)
            remedy = f"to make one: {evaluate}"
        say(f"val was not scored, so there is no report; {remedy}")
        return 0
    present(score_run(arguments, "val"), report=run / "report.html")
    return 0
