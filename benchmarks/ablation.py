"""What each part of the training recipe is worth, by cross-validation under a reduced protocol.

    python benchmarks/ablation.py --data data/grocery --out runs/ablation --results docs/ablation.jsonl

Every variant differs from the baseline, the defaults of npair train at a smaller size and fewer epochs, in what its name says, and
is trained on the same folds of the train split with the same seeds; val is not touched. Runs whose results are already there are
not repeated, so the command can be stopped and started again. It ends by printing the table of docs/training.md; with --table it
does nothing else.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch

from npair.data import read_dataset
from npair.evaluate import embed_run
from npair.folds import write_folds
from npair.metrics import over_seeds
from npair.pixels import default_cache, load
from npair.run import TrainConfig, git_commit
from npair.train import train

FOLDS, SEEDS = 3, 2
PROTOCOL = TrainConfig(size=96, crop_size=80, epochs=40, evaluations=0)
VARIANTS: dict[str, dict[str, Any]] = {
    "baseline": {},
    "no norm penalty": {"norm_penalty": 0.0},
    "norm penalty x 4": {"norm_penalty": 8e-3},
    "cosine loss, temperature 0.1": {"loss": "cosine"},
    "cosine loss, temperature 0.05": {"loss": "cosine", "temperature": 0.05},
    "(N+1)-tuplet loss, N = 8": {"loss": "tuplet"},
    "N = 15": {"classes_per_batch": 15},
    "N = 60": {"classes_per_batch": 60},
    "hard class mining, N = 15 of C = 60": {"classes_per_batch": 15, "mine_from": 60},
    "hard class mining, N = 30 of C = 60": {"mine_from": 60},
    "no augmentation": {"augmentation": "none"},
    "crop and affine alone": {"augmentation": "drawing"},
}
MEASURES = ("fine", "coarse", "map_at_r", "eer")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data/grocery"))
    parser.add_argument("--out", type=Path, default=Path("runs/ablation"), help="folder for the runs (%(default)s)")
    parser.add_argument("--results", type=Path, default=Path("docs/ablation.jsonl"), help="(%(default)s)")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, each on its share of the cores (%(default)s)")
    parser.add_argument("--table", action="store_true", help="only print the table of the results")
    arguments = parser.parse_args()
    if not arguments.table:
        run_all(arguments.data, arguments.out, arguments.results, arguments.jobs)
    print(table([json.loads(line) for line in arguments.results.read_text().splitlines()]))


def run_all(data: Path, out: Path, results: Path, jobs: int) -> None:
    """Train what the results do not hold yet, the first seed of every variant first."""
    done = {(row["variant"], row["fold"], row["seed"]) for row in map(json.loads, results.open())} if results.exists() else set()
    dataset, pixels, _ = load(read_dataset(data), PROTOCOL.preprocessing(), default_cache())
    tables = write_folds(dataset, pixels, FOLDS, ["train"], out / "folds")
    missing = [key for key in itertools.product(range(SEEDS), range(FOLDS), VARIANTS) if (key[2], key[1], key[0]) not in done]
    threads = max(1, torch.get_num_threads() // jobs)
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(run_one, tables[key[1]], out, key, threads) for key in missing]
        for number, future in enumerate(as_completed(futures), start=1):
            with results.open("a") as file:
                file.write(json.dumps(future.result()) + "\n")
            print(f"{number} of {len(missing)}: {future.result()}", flush=True)


def run_one(fold_table: Path, out: Path, key: tuple[int, int, str], threads: int) -> dict[str, Any]:
    """Train one variant on one fold and score the photos that the fold held back."""
    seed, fold, variant = key
    torch.set_num_threads(threads)
    config = replace(PROTOCOL, seed=seed, **VARIANTS[variant])
    run = out / f"{variant} {fold} {seed}".replace(" ", "-").replace("/", "-")
    shutil.rmtree(run, ignore_errors=True)
    train(fold_table, run, config)
    dataset, pixels, _ = load(read_dataset(fold_table), config.preprocessing(), default_cache())
    scores = embed_run(run, dataset, pixels, "val").evaluate()
    log = [json.loads(line) for line in (run / "log.jsonl").open()]
    assert scores.fine.map_at_r is not None
    assert scores.verification is not None
    return {
        "variant": variant,
        "fold": fold,
        "seed": seed,
        "fine": round(scores.fine.recall_at_1.value, 4),
        "coarse": round(scores.coarse.recall_at_1.value, 4),
        "map_at_r": round(scores.fine.map_at_r.value, 4),
        "eer": round(scores.verification.eer, 4),
        "minutes": round(sum(row["seconds"] for row in log) / 60, 2),
        "commit": git_commit(),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: means over folds and seeds; the difference is from the baseline of the same fold and seed, with a 95 % interval."""
    baseline = {(row["fold"], row["seed"]): row for row in rows if row["variant"] == "baseline"}
    lines = [
        "| variant | runs | Recall@1 fine | difference | Recall@1 coarse | MAP@R | EER | time |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for variant in VARIANTS:
        own = [row for row in rows if row["variant"] == variant]
        if len(own) < 2:
            continue
        fine, coarse, map_at_r, eer = (float(np.mean([row[measure] for row in own])) for measure in MEASURES)
        pairs = [(row, baseline[row["fold"], row["seed"]]) for row in own if (row["fold"], row["seed"]) in baseline]
        mean, half = over_seeds([row["fine"] - base["fine"] for row, base in pairs])
        difference = f"{mean:+.3f} ± {half:.3f}" if variant != "baseline" else ""
        time = np.mean([row["minutes"] / base["minutes"] for row, base in pairs])
        lines.append(
            f"| {variant} | {len(own)} | {fine:.3f} | {difference} | {coarse:.3f} | {map_at_r:.3f} | {eer:.3f} | x {time:.1f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
