"""Recall on products that the network has never seen.

    .venv/bin/python benchmarks/unseen.py --data data/grocery

The products of train are dealt at random into three folds. For each fold, the network is trained on
the products of the other two, and the photos of the fold's own products are searched for among each
other. Photos of one visit to a shop are nearly alike and would find each other by their colours
alone. Therefore the photos of each product are divided by colour into three groups of lookalikes
(npair.data.folds), and each third of the photos is searched for among the other two. The variant
"colours alone" shows how much this still gives away.

Val is not touched here, although its photos are known to be of other visits: it has only 296 photos
of 60 products, while train has 2,640 of 81, and it is to be scored once for each version, not for
each change of the recipe.

Variants: "colours alone" embeds a photo as its colour histogram; "ImageNet alone" uses the 1,280
features of EfficientNet-Lite0 without training; "from scratch" and "from ImageNet" are trained by
npair train. A run whose result is on file is skipped, so the command can be stopped and started
again. At the end, it prints the table of the model card; with --table it does nothing else.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from cross_validation import FOLDS
from training_runs import (
    IMAGENET,
    LITE0,
    Row,
    add_layers,
    embed_untrained,
    parser_of,
    rows_of,
    train_and_embed,
)

from npair.data.folds import colour_histograms, folds, write_tables
from npair.data.pixels import PREVIEW, Pixels, decode_dataset
from npair.data.sources import read_dataset
from npair.scoring.evaluate import EmbeddedSplit, embed_split
from npair.scoring.intervals import over_runs
from npair.training.run import TrainConfig

SEED = 0  # of the folds and of training
COLOURS = "colours alone"
VARIANTS = {
    COLOURS: replace(LITE0, size=PREVIEW.size),
    IMAGENET: LITE0,
    "from scratch": TrainConfig(network="compact", evaluations=0),
    "from ImageNet": LITE0,
}


def main() -> None:
    parser = parser_of(__doc__ or "", "unseen", VARIANTS)
    parser.add_argument(
        "--epochs", type=int, default=0, help="of the trained variants (chosen by npair train)"
    )
    add_layers(parser)
    arguments = parser.parse_args()
    configs = {
        (variant_of(name, arguments.epochs, layer), SEED): replace(
            VARIANTS[name], epochs=arguments.epochs, embedding_layer=layer
        )
        for name in arguments.variants
        for layer in arguments.layers
    }
    print(table(rows_of(arguments, configs, partial(product_folds, arguments), run_one)))


def variant_of(name: str, epochs: int, layer: str) -> str:
    """Name a variant. epochs: of the trained ones, 0 for as many as ``npair train`` chooses."""
    untrained = name in (COLOURS, IMAGENET)
    return name if untrained else f"{name}, {epochs or 'default'} epochs, {layer} layer"


def product_folds(arguments: argparse.Namespace) -> Mapping[int, Path]:
    """Write the table of each fold: photos of its own products are val, those of others train."""
    train = read_dataset(arguments.data).train
    fold_of = np.random.default_rng(SEED).permutation(len(train.fine_names)) % FOLDS
    return dict(
        enumerate(write_tables([train], fold_of[train.fine], FOLDS, arguments.runs / "folds"))
    )


def run_one(variant: str, config: TrainConfig, table: Path, runs: Path, cache: Path) -> Row:
    """Embed the photos of a fold's products and score them.

    The network is trained on the photos of the other products, if the variant is a trained one.
    """
    dataset, previews, _ = decode_dataset(read_dataset(table), PREVIEW, cache)
    epochs = 0
    if variant == COLOURS:
        found = embed_split(
            variant, dataset, "val", lambda photos: colour_histograms(photos, previews)
        )
    elif variant == IMAGENET:
        found = embed_untrained(variant, config, table, cache)
    else:
        found, epochs = train_and_embed(variant, config, table, runs, cache)
    return {"epochs": epochs, **across_groups(found, previews)}


def across_groups(found: EmbeddedSplit, previews: Pixels) -> Row:
    """Score each third of the photos, made of groups of lookalikes, among the other two.

    found: photos of unseen products, compared with each other. previews: their pixels, from which
    the groups are made.

    Returns: the means over photos.
    """
    photos, vectors = found.query_photos, found.queries
    group = folds(photos.fine, colour_histograms(photos, previews), FOLDS)
    parts = []
    for number in np.unique(group):
        own, others = np.flatnonzero(group == number), np.flatnonzero(group != number)
        parts.append(
            EmbeddedSplit(
                found.embedded_by,
                photos.select(own),
                vectors[own],
                photos.select(others),
                vectors[others],
            )
        )
    scores = [part.evaluate() for part in parts]
    weights = [part.queries for part in scores]

    def mean(values: list[float]) -> float:
        return round(float(np.average(values, weights=weights)), 4)

    return {
        "queries": sum(weights),
        "fine": mean([part.fine.recall_at_1.value for part in scores]),
        "coarse": mean([part.coarse.recall_at_1.value if part.coarse else 0.0 for part in scores]),
        "map_at_r": mean(
            [part.fine.map_at_r.value if part.fine.map_at_r else 0.0 for part in scores]
        ),
    }


def table(rows: Sequence[Row]) -> str:
    """The results in Markdown: means over folds with 95 % intervals by Student's t.

    Each difference is from ImageNet alone on the same fold.
    """
    imagenet = {row["fold"]: row for row in rows if row["variant"] == IMAGENET}
    lines = [
        "| network | Recall@1 product | difference | Recall@1 kind | MAP@R |",
        "| --- | --- | --- | --- | --- |",
    ]
    for variant in dict.fromkeys(row["variant"] for row in rows):
        own = [row for row in rows if row["variant"] == variant and row["fold"] in imagenet]
        if len(own) < 2:
            continue
        fine, coarse, map_at_r = (
            "{:.3f} ± {:.3f}".format(*over_runs([row[name] for row in own]))
            for name in ("fine", "coarse", "map_at_r")
        )
        mean, half = over_runs([row["fine"] - imagenet[row["fold"]]["fine"] for row in own])
        difference = f"{mean:+.3f} ± {half:.3f}" if variant != IMAGENET else ""
        lines.append(f"| {variant} | {fine} | {difference} | {coarse} | {map_at_r} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
