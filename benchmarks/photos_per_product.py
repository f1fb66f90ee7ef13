"""How many photos a product needs.

    .venv/bin/python benchmarks/photos_per_product.py --data data/grocery

Draws 2, 4, 8 and 16 photos of each product from train, each draw from within the next larger one; a
product with fewer photos keeps all. Each draw is the gallery in which the photos of val are
searched for, and the photos that the variant "trained on them" is trained on.

Variants: "ImageNet alone" uses the 1,280 features of EfficientNet-Lite0 without training; "the
published version", named in the results by its number, has been trained on all photos of train, so
that its gallery alone grows; "trained on them" is npair train with its defaults.

A run whose result is on file is skipped, so the command can be stopped and started again. At the
end, it prints the table of docs/training.md; with --table it does nothing else.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np
from training_runs import IMAGENET, LITE0, Row, embed_untrained, parser_of, rows_of, train_and_embed

from npair.data.dataset import Dataset
from npair.data.folds import write_table
from npair.data.pixels import PREVIEW, decode_dataset
from npair.data.sources import read_dataset
from npair.publishing.publish import embedding
from npair.releasing.verify import published_code
from npair.scoring.evaluate import embed_split
from npair.serving.engine import cores
from npair.training.run import TrainConfig

PUBLISHED, TRAINED = "the published version", "trained on them"
VARIANTS = {
    IMAGENET: LITE0,
    PUBLISHED: TrainConfig(),
    TRAINED: TrainConfig(evaluations=0),
}
ALL = "all"


def main() -> None:
    parser = parser_of(__doc__ or "", "photos_per_product", VARIANTS)
    parser.add_argument(
        "--photos", type=int, nargs="+", default=[2, 4, 8, 16], help="of a product (2 4 8 16)"
    )
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0], help="of the draws and of training (0)"
    )
    parser.add_argument(
        "--version",
        type=Path,
        default=Path("model_repository/npair/19"),
        help="folder of the published version (%(default)s)",
    )
    arguments = parser.parse_args()
    rows: list[Row] = []
    for seed in arguments.seeds:
        configs = {
            (f"version {arguments.version.name}" if name == PUBLISHED else name, seed): config
            for name, config in VARIANTS.items()
            if name in arguments.variants
        }
        rows = rows_of(
            arguments,
            configs,
            partial(draws, arguments, seed),
            partial(run_one, version=arguments.version),
            part="photos",
        )
    print(table(rows))


def draws(arguments: argparse.Namespace, seed: int) -> Mapping[int | str, Path]:
    """Write a table for each number of photos: the drawn photos are train, and val is val."""
    dataset, _, _ = decode_dataset(read_dataset(arguments.data), PREVIEW, arguments.cache)
    arguments.runs.mkdir(parents=True, exist_ok=True)
    tables: dict[int | str, Path] = {}
    for photos in [*sorted(arguments.photos), ALL]:
        tables[photos] = arguments.runs / f"{photos}-photos-seed-{seed}.csv"
        count = len(dataset.train) if photos == ALL else photos
        _write_draw(tables[photos], dataset, count, seed)
    return tables


def _write_draw(table: Path, dataset: Dataset, photos: int, seed: int) -> None:
    rng, train, val = np.random.default_rng(seed), dataset.train, dataset.splits["val"]
    drawn = [
        rng.permutation(np.flatnonzero(train.fine == product))[:photos]
        for product in range(len(train.fine_names))
    ]
    parts = [train.select(np.sort(np.concatenate(drawn))), val]
    splits = np.repeat(["train", "val"], [len(part) for part in parts])
    write_table(table, parts, splits)


def run_one(
    variant: str, config: TrainConfig, table: Path, runs: Path, cache: Path, *, version: Path
) -> Row:
    """Search for the photos of val among those of a draw."""
    epochs = 0
    if variant == TRAINED:
        found, epochs = train_and_embed(variant, config, table, runs, cache)
        scores = found.evaluate()
    elif variant == IMAGENET:
        scores = embed_untrained(variant, config, table, cache).evaluate()
    else:
        with published_code(version) as code:
            embedder = code.Embedder(version, cores=cores())
            scores = embed_split(
                variant, read_dataset(table), "val", embedding(embedder)
            ).evaluate()
            embedder.close()
    assert scores.coarse is not None
    recall = scores.fine.recall_at_1
    return {
        "epochs": epochs,
        "gallery": scores.gallery,
        "fine": round(recall.value, 4),
        "fine_95": [round(recall.low, 4), round(recall.high, 4)],
        "coarse": round(scores.coarse.recall_at_1.value, 4),
    }


def table(rows: list[Row]) -> str:
    """The results in Markdown, means over seeds, and how far chance can move them."""
    variants = dict.fromkeys(row["variant"] for row in rows)
    lines = [
        f"| photos of a product | in all | {' | '.join(variants)} |",
        "| --- | --- |" + " --- |" * len(variants),
    ]
    for photos in [*sorted({row["photos"] for row in rows} - {ALL}), ALL]:
        of_draw = [row for row in rows if row["photos"] == photos]
        cells = []
        for variant in variants:
            own = [[row["fine"], row["coarse"]] for row in of_draw if row["variant"] == variant]
            cells.append("{:.3f} / {:.3f}".format(*np.mean(own, axis=0)) if own else "")
        if of_draw:
            lines.append(f"| {photos} | {of_draw[0]['gallery']:,} | {' | '.join(cells)} |")
    wide = max((high - low for low, high in (row["fine_95"] for row in rows)), default=0) / 2
    return "\n".join([*lines, "", f"95 % intervals of product recall: at most ± {wide:.3f}"])


if __name__ == "__main__":
    main()
