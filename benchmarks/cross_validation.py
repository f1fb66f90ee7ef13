"""Recall of the recipe on photos of other visits, by cross-validation.

    .venv/bin/python benchmarks/cross_validation.py --epochs 17 --frozen-stages 0 3 5
    .venv/bin/python benchmarks/cross_validation.py --layers trained whitened

Trains and scores on folds of lookalikes, each held back once, with each number of frozen stages and
each embedding layer. A run whose result is on file is skipped, so the command can be stopped and
started again.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from training_runs import Row, add_layers, parser_of, rows_of, train_and_embed

from npair.data.folds import write_folds
from npair.data.pixels import PREVIEW, decode_dataset
from npair.data.sources import read_dataset
from npair.scoring.intervals import over_runs
from npair.training.run import TrainConfig

FOLDS = 3
MEASURES = ("fine", "coarse", "map_at_r", "eer")


def main() -> None:
    parser = parser_of(__doc__ or "", "cross-validation")
    parser.add_argument("--epochs", type=int, default=0, help="(chosen by npair train)")
    parser.add_argument(
        "--frozen-stages",
        type=int,
        nargs="+",
        default=[TrainConfig().frozen_stages],
        metavar="N",
        help="numbers of stages to compare (that of npair train)",
    )
    add_layers(parser)
    arguments = parser.parse_args()
    configs = {
        (variant_of(stages, arguments.epochs, layer), 0): TrainConfig(
            frozen_stages=stages, epochs=arguments.epochs, embedding_layer=layer, evaluations=0
        )
        for stages in arguments.frozen_stages
        for layer in arguments.layers
    }
    folds = partial(lookalike_folds, ["train", "val"], arguments)
    print(table(rows_of(arguments, configs, folds, run_one)))


def table(rows: Sequence[Row]) -> str:
    """The variants' means and 95 % intervals over folds in Markdown."""
    lines = [
        "| variant | folds | Recall@1 fine | coarse | MAP@R | EER |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for variant in dict.fromkeys(row["variant"] for row in rows):
        own = [row for row in rows if row["variant"] == variant]
        if len(own) < 2:
            continue  # one fold has no interval
        cells = [
            "{:.3f} ± {:.3f}".format(*over_runs([row[name] for row in own])) for name in MEASURES
        ]
        lines.append(f"| {variant} | {len(own)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def variant_of(frozen_stages: int, epochs: int, layer: str) -> str:
    """Name a variant. epochs: 0 for as many as ``npair train`` chooses."""
    return f"{frozen_stages} frozen stages, {epochs or 'default'} epochs, {layer} layer"


def lookalike_folds(splits: Sequence[str], arguments: argparse.Namespace) -> Mapping[int, Path]:
    """Write the table of each fold of these splits. Returns: their paths."""
    dataset, pixels, _ = decode_dataset(read_dataset(arguments.data), PREVIEW, arguments.cache)
    return dict(enumerate(write_folds(dataset, pixels, FOLDS, splits, arguments.runs / "folds")))


def run_one(variant: str, config: TrainConfig, table: Path, runs: Path, cache: Path) -> Row:
    """Train on a fold's table and score its held-back photos."""
    found, epochs = train_and_embed(variant, config, table, runs, cache)
    scores = found.evaluate()
    assert scores.coarse is not None
    assert scores.fine.map_at_r is not None
    assert scores.verification is not None
    return {
        "epochs": epochs,
        "fine": round(scores.fine.recall_at_1.value, 4),
        "coarse": round(scores.coarse.recall_at_1.value, 4),
        "map_at_r": round(scores.fine.map_at_r.value, 4),
        "eer": round(scores.verification.eer, 4),
    }


if __name__ == "__main__":
    main()
