"""The benchmarks' own arithmetic; what they measure is in the docs."""

from __future__ import annotations

import json
from typing import Any

from ablation import table
from conftest import ROOT, SHIPPED
from model_card import card


def test_ablation_compares_runs_of_the_same_fold_and_seed() -> None:
    def row(variant: str, fold: int, fine: float) -> dict[str, Any]:
        scores = {"coarse": 0.5, "map_at_r": 0.25, "eer": 0.1}
        return {"variant": variant, "seed": 0, "fold": fold, "fine": fine, **scores}

    rows = [row("baseline", 0, 0.3), row("baseline", 1, 0.5), row("N = 15", 1, 0.6), row("N = 15", 0, 0.4)]
    header, _, baseline, smaller = table([*rows, row("N = 60", 0, 0.9), row("N = 15", 2, 0.9)]).splitlines()
    assert "difference" in header
    assert baseline == "| baseline | 2 | 0.400 |  | 0.500 | 0.250 | 0.100 |"
    assert smaller == "| N = 15 | 2 | 0.500 | +0.100 ± 0.000 | 0.500 | 0.250 | 0.100 |"


def test_docs_hold_what_the_results_say() -> None:
    rows = [json.loads(line) for line in (ROOT / "docs/ablation.jsonl").open()]
    assert table(rows) in (ROOT / "docs/training.md").read_text()
    assert (ROOT / "docs/model-card.md").read_text() == card(SHIPPED) + "\n"
