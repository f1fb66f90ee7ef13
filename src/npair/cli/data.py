"""npair data: fetch, check or divide a data set."""
# ruff: noqa: PLC0415  # commands import their libraries when they run

from __future__ import annotations

import argparse
from pathlib import Path

from npair.cli.options import (
    Commands,
    add_command,
    add_data,
    add_group,
    add_splits,
    load_dataset,
    number,
    say,
)

EXTRA = "evaluate"


def add_commands(commands: Commands) -> None:
    steps = add_group(commands, "data", "fetch, check or divide a data set")
    grocery = add_command(steps, "grocery", _grocery, "fetch the Grocery Store Dataset", EXTRA)
    grocery.add_argument(
        "folder",
        type=Path,
        nargs="?",
        default=Path("data/grocery"),
        help="where to put it (default: %(default)s)",
    )

    check = add_command(steps, "check", _check, "list what training would leave out", EXTRA)
    add_data(check)
    add_splits(check)

    folds = add_command(
        steps, "folds", _folds, "write a table for each fold of a cross-validation", EXTRA
    )
    add_data(folds)
    add_splits(folds)
    folds.add_argument(
        "--folds",
        type=number(int, least=2),
        default=3,
        metavar="K",
        help="number of folds (default: %(default)s)",
    )
    folds.add_argument(
        "--of", nargs="+", default=["train"], metavar="SPLIT", help="splits to divide (train)"
    )
    folds.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder for fold-0.csv and so on"
    )


def _grocery(arguments: argparse.Namespace) -> int:
    from npair.data.grocery import fetch_grocery

    print(fetch_grocery(arguments.folder))
    return 0


def _check(arguments: argparse.Namespace) -> int:
    from npair.data.folds import found_by_colour
    from npair.data.pixels import PREVIEW
    from npair.scoring.evaluate import queries_and_gallery

    dataset, pixels, findings = load_dataset(arguments, PREVIEW)
    for name, photos in dataset.splits.items():
        print(f"{name}: {len(photos)} photos of {len(set(photos.fine))} classes")
    print(f"splits: {dataset.made}", *findings.lines(), sep="\n")
    for name in dataset.splits:
        queries, gallery = queries_and_gallery(dataset, name)
        if gallery is not queries:
            share = found_by_colour(queries, gallery, pixels)
            print(
                f"by colours alone, the nearest train photo of {share:.2f} of the {name} photos has"
                " their class: the higher, the less a score says about photos from elsewhere"
            )
    return 0


def _folds(arguments: argparse.Namespace) -> int:
    from npair.data.folds import write_folds
    from npair.data.pixels import PREVIEW

    dataset, pixels, findings = load_dataset(arguments, PREVIEW)
    for line in findings.lines():
        say(line)
    for table in write_folds(dataset, pixels, arguments.folds, arguments.of, arguments.out):
        print(table)
    return 0
