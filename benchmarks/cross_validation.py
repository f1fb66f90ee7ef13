"""Recall of the recipe on photos of other visits, by cross-validation.

    python benchmarks/cross_validation.py --data data/grocery --epochs 100

Trains and scores on folds of lookalikes, each held back once. A run whose result is on file is
skipped, so the command can be stopped and started again.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from npair.cli.evaluate import embed_run
from npair.data.folds import write_folds
from npair.data.pixels import PREVIEW, decode_dataset, default_cache
from npair.data.sources import read_dataset
from npair.scoring.evaluate import Comparison
from npair.scoring.intervals import over_seeds
from npair.training.run import TrainConfig, git_commit, read_run
from npair.training.train import train

FOLDS = 3
Row = dict[str, Any]


def main() -> None:
    parser = parser_of(
        __doc__ or "", runs="runs/cross-validation", results="docs/cross-validation.jsonl"
    )
    parser.add_argument("--epochs", type=int, default=100, help="(%(default)s)")
    arguments = parser.parse_args()
    configs = {("recipe", 0): TrainConfig(epochs=arguments.epochs, evaluations=0)}
    rows = run_all(configs, lookalike_folds(["train", "val"], arguments), arguments)
    for kind in ("fine", "coarse"):
        print(
            f"Recall@1 {kind}: "
            f"{' ± '.join(f'{number:.3f}' for number in over_seeds([row[kind] for row in rows]))}"
        )


def parser_of(description: str, *, runs: str, results: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=Path("data/grocery"), help="(%(default)s)")
    parser.add_argument(
        "--runs", type=Path, default=Path(runs), help="folder for the runs (%(default)s)"
    )
    parser.add_argument("--results", type=Path, default=Path(results), help="(%(default)s)")
    parser.add_argument(
        "--jobs",
        type=int,
        default=2,
        help="runs at a time, each on its share of the cores (%(default)s)",
    )
    return parser


def lookalike_folds(splits: Sequence[str], arguments: argparse.Namespace) -> list[Path]:
    """Write the table of each fold of these splits. Returns: their paths."""
    dataset, pixels, _ = decode_dataset(read_dataset(arguments.data), PREVIEW, default_cache())
    return write_folds(dataset, pixels, FOLDS, splits, arguments.runs / "folds")


def run_one(variant: str, config: TrainConfig, table: Path, runs: Path) -> Row:
    """Train on a fold's table and score its held-back photos."""
    found, epochs = train_and_embed(variant, config, table, runs)
    scores = found.evaluate()
    assert scores.fine.map_at_r is not None
    assert scores.verification is not None
    return {
        "epochs": epochs,
        "fine": round(scores.fine.recall_at_1.value, 4),
        "coarse": round(scores.coarse.recall_at_1.value, 4),
        "map_at_r": round(scores.fine.map_at_r.value, 4),
        "eer": round(scores.verification.eer, 4),
    }


def run_all(
    configs: Mapping[tuple[str, int], TrainConfig],
    tables: Sequence[Path],
    arguments: argparse.Namespace,
    run_one: Callable[[str, TrainConfig, Path, Path], Row] = run_one,
) -> list[Row]:
    """Train each named config with its seed on each fold's table, unless its result is on file.

    run_one: trains and scores one run, in its own process. Each new row is appended to the results
    as soon as it is there.

    Returns: all rows, old and new.
    """
    rows = (
        [json.loads(line) for line in arguments.results.open()]
        if arguments.results.exists()
        else []
    )
    done = {(row["variant"], row["seed"], row["fold"]) for row in rows}
    threads = max(1, torch.get_num_threads() // arguments.jobs)
    pool = ProcessPoolExecutor(
        arguments.jobs, get_context("spawn"), torch.set_num_threads, (threads,)
    )
    futures = {
        pool.submit(run_one, variant, replace(config, seed=seed), table, arguments.runs): (
            variant,
            seed,
            fold,
        )
        for (variant, seed), config in configs.items()
        for fold, table in enumerate(tables)
        if (variant, seed, fold) not in done
    }
    try:
        for future in as_completed(futures):
            variant, seed, fold = futures[future]
            rows.append(
                {
                    "variant": variant,
                    "seed": seed,
                    "fold": fold,
                    **future.result(),
                    "commit": git_commit(),
                }
            )
            with arguments.results.open("a") as file:
                file.write(json.dumps(rows[-1]) + "\n")
            print(rows[-1], flush=True)
    finally:
        pool.shutdown(cancel_futures=True)
    return rows


def train_and_embed(
    variant: str, config: TrainConfig, table: Path, runs: Path
) -> tuple[Comparison, int]:
    """Train on a fold's table. Returns: its held-back photos, embedded; and the epochs trained."""
    run = runs / f"{variant}-seed-{config.seed}-{table.stem}".replace(" ", "-")
    shutil.rmtree(run, ignore_errors=True)
    if not train(table, run, config):
        raise KeyboardInterrupt  # half a run is no result
    settled, log = (
        TrainConfig(**read_run(run)["train"]),
        [json.loads(line) for line in (run / "log.jsonl").open()],
    )
    dataset, pixels, _ = decode_dataset(
        read_dataset(table), settled.preprocessing(), default_cache()
    )
    return embed_run(run, dataset, pixels, "val"), len(log)


if __name__ == "__main__":
    main()
