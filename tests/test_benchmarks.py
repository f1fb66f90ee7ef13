"""The benchmarks' own arithmetic; what they measure is in the docs."""

from __future__ import annotations

from typing import Any

from ablation import table


def test_ablation_compares_runs_of_the_same_fold_and_seed() -> None:
    def row(variant: str, fold: int, fine: float, minutes: float) -> dict[str, Any]:
        scores = {"coarse": 0.5, "map_at_r": 0.25, "eer": 0.1}
        return {"variant": variant, "seed": 0, "fold": fold, "fine": fine, "minutes": minutes, **scores}

    rows = [row("baseline", 0, 0.3, 2.0), row("baseline", 1, 0.5, 4.0), row("N = 15", 1, 0.6, 4.0), row("N = 15", 0, 0.4, 4.0)]
    header, _, baseline, smaller = table([*rows, row("N = 60", 0, 0.9, 1.0), row("N = 15", 2, 0.9, 1.0)]).splitlines()
    assert "difference" in header
    assert baseline == "| baseline | 2 | 0.400 |  | 0.500 | 0.250 | 0.100 | x 1.0 |"
    assert smaller == "| N = 15 | 2 | 0.500 | +0.100 ± 0.000 | 0.500 | 0.250 | 0.100 | x 1.5 |"
