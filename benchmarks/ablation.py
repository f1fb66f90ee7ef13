"""The contribution of each part of the training recipe, by cross-validation.

    .venv/bin/python benchmarks/ablation.py --data data/grocery

The protocol is reduced: the baseline is the defaults of npair train at a smaller size and with
fewer epochs. Each variant changes the one thing that its name says. All are trained on the same
folds of the train split with the same seeds; val is not touched. At the end, the command prints the
table of docs/training.md; with --table it does nothing else.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from cross_validation import lookalike_folds, run_one
from training_runs import Row, parser_of, rows_of

from npair.scoring.intervals import over_runs
from npair.training.run import TrainConfig

SEEDS = 1
PROTOCOL = TrainConfig(network="compact", size=96, crop_size=80, views=1, epochs=40, evaluations=0)
VARIANTS: dict[str, dict[str, Any]] = {
    "baseline": {},
    "N = 30": {"classes_per_batch": 30},
    "N = 15": {"classes_per_batch": 15},
    "no norm penalty": {"norm_penalty": 0.0},
    "cosine loss, temperature 0.1": {"loss": "cosine"},
    "(N+1)-tuplet loss, N = 8": {"loss": "tuplet"},
    "N = 30, mined from C = 80": {"classes_per_batch": 30, "mine_from": 80},
    "no augmentation": {"augmentation": "none"},
    "crop and affine alone": {"augmentation": "drawing"},
    "two views of 128 pixels": {"size": 128, "views": 2},
}


def main() -> None:
    arguments = parser_of(__doc__ or "", "ablation", VARIANTS).parse_args()
    configs = {
        (name, seed): replace(PROTOCOL, **VARIANTS[name])
        for seed in range(SEEDS)
        for name in arguments.variants
    }
    folds = partial(lookalike_folds, ["train"], arguments)
    print(table(rows_of(arguments, configs, folds, run_one)))


def table(rows: list[Row]) -> str:
    """The results in Markdown: means over folds and seeds.

    Each difference, with a 95 % interval, is from the baseline of the same fold and seed.
    """
    baseline = {(row["fold"], row["seed"]): row for row in rows if row["variant"] == "baseline"}
    lines = [
        "| variant | runs | Recall@1 fine | difference | Recall@1 coarse | MAP@R | EER |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for variant in VARIANTS:
        own = [
            row
            for row in rows
            if row["variant"] == variant and (row["fold"], row["seed"]) in baseline
        ]
        if len(own) < 2:
            continue
        fine, coarse, map_at_r, eer = (
            float(np.mean([row[name] for row in own]))
            for name in ("fine", "coarse", "map_at_r", "eer")
        )
        pairs = [(row, baseline[row["fold"], row["seed"]]) for row in own]
        mean, half = over_runs([row["fine"] - base["fine"] for row, base in pairs])
        difference = f"{mean:+.3f} ± {half:.3f}" if variant != "baseline" else ""
        lines.append(
            f"| {variant} | {len(own)} | {fine:.3f} | {difference} | {coarse:.3f} "
            f"| {map_at_r:.3f} | {eer:.3f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
