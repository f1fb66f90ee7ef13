"""Runs that can be stopped and started again, for the benchmarks that train."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import nn

from npair.cli.evaluate import embed_run
from npair.data.pixels import decode_dataset, default_cache
from npair.data.sources import read_dataset
from npair.networks.network import embed, new_network
from npair.scoring.evaluate import EmbeddedSplit, embed_split
from npair.training.run import TrainConfig, git_commit, read_run
from npair.training.train import train

IMAGENET = "ImageNet alone"
LITE0 = TrainConfig(network="efficientnet-lite0", size=192, evaluations=0)
Row = dict[str, Any]
# Trains and scores a variant's configuration: (variant, config, table, runs, cache) -> its results.
RunOne = Callable[[str, TrainConfig, Path, Path, Path], Row]


def parser_of(
    description: str, name: str, variants: Collection[str] = ()
) -> argparse.ArgumentParser:
    """Create a parser for the options that ``rows_of`` reads, except the variants' own."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=Path("data/grocery"), help="(%(default)s)")
    parser.add_argument(
        "--runs", type=Path, default=Path("runs") / name, help="folder for the runs (%(default)s)"
    )
    parser.add_argument(
        "--cache", type=Path, default=default_cache(), help="of decoded photos (%(default)s)"
    )
    parser.add_argument(
        "--results", type=Path, default=Path("docs") / f"{name}.jsonl", help="(%(default)s)"
    )
    parser.add_argument(
        "--jobs",
        type=int,
        default=2,
        help="runs at a time, each on its share of the cores (%(default)s)",
    )
    parser.add_argument("--table", action="store_true", help="only print the table of the results")
    if variants:
        parser.add_argument(
            "--variants",
            nargs="+",
            choices=variants,
            default=variants,
            metavar="NAME",
            help="(all)",
        )
    return parser


def add_layers(parser: argparse.ArgumentParser) -> None:
    layer = TrainConfig().embedding_layer
    parser.add_argument(
        "--layers",
        nargs="+",
        choices=("trained", "whitened"),
        default=[layer],
        metavar="LAYER",
        help=f"embedding layers to compare (default: {layer})",
    )


def rows_of(
    arguments: argparse.Namespace,
    configs: Mapping[tuple[str, int], TrainConfig],
    tables: Callable[[], Mapping[Any, Path]],
    run_one: RunOne,
    *,
    part: str = "fold",
) -> list[Row]:
    """Run each named config with its seed on each table, unless its result is on file.

    tables: writes the tables of the data, each for its value of ``part``.
    run_one: called in a process of its own. Each new row is appended to the results as soon as it
    is there.

    Returns: all rows, old and new; with ``--table``, the old ones.
    """
    results: Path = arguments.results
    rows = [json.loads(line) for line in results.open()] if results.exists() else []
    if arguments.table:
        return rows
    done = {(row["variant"], row["seed"], row[part]) for row in rows}
    commit = git_commit()  # of the code that runs; the rows that are written change the tree
    threads = max(1, torch.get_num_threads() // arguments.jobs)
    pool = ProcessPoolExecutor(
        arguments.jobs, get_context("spawn"), torch.set_num_threads, (threads,)
    )
    places = arguments.runs, arguments.cache
    futures = {
        pool.submit(run_one, variant, replace(config, seed=seed), table, *places): {
            "variant": variant,
            "seed": seed,
            part: value,
        }
        for value, table in tables().items()
        for (variant, seed), config in configs.items()
        if (variant, seed, value) not in done
    }
    try:
        for future in as_completed(futures):
            rows.append({**futures[future], **future.result(), "commit": commit})
            with results.open("a") as file:
                file.write(json.dumps(rows[-1]) + "\n")
            print(rows[-1], flush=True)
    finally:
        pool.shutdown(cancel_futures=True)
    return rows


def train_and_embed(
    variant: str, config: TrainConfig, table: Path, runs: Path, cache: Path
) -> tuple[EmbeddedSplit, int]:
    """Train on a table. Returns: its val photos, embedded; and the epochs trained."""
    run = runs / f"{variant}-seed-{config.seed}-{table.stem}".replace(" ", "-")
    shutil.rmtree(run, ignore_errors=True)
    if not train(table, run, config, cache=cache):
        raise KeyboardInterrupt  # half a run is no result
    settled, log = (
        TrainConfig(**read_run(run)["train"]),
        [json.loads(line) for line in (run / "log.jsonl").open()],
    )
    dataset, pixels, _ = decode_dataset(read_dataset(table), settled.preprocessing(), cache)
    return embed_run(run, dataset, pixels, "val"), len(log)


def embed_untrained(variant: str, config: TrainConfig, table: Path, cache: Path) -> EmbeddedSplit:
    """Embed a table's val photos by the features that a pretrained network starts from."""
    network, _ = new_network(config.network, config.width, views=1)
    network.embedding = nn.Identity()  # type: ignore[assignment]
    dataset, pixels, _ = decode_dataset(read_dataset(table), config.preprocessing(), cache)
    return embed_split(
        variant, dataset, "val", lambda photos: embed(network, pixels.array, pixels.of(photos))
    )
