"""The benchmarks' own arithmetic; what they measure is in the docs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ablation import table
from bench import ALL, OTHERS, Contestant, Load, Setting, report
from conftest import ROOT, SHIPPED
from costs import VERSION
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


def test_report_compares_with_the_best_peer_another_version_and_other_networks(tmp_path: Path) -> None:
    peers = {peer.name: peer for peer in ALL}

    def contestant(server: str, mode: str, rate: float, p50: float, version: Path = VERSION) -> Contestant:
        loads = [Load(1, 1000 / p50, p50, p50), Load(32, rate, 1.0, 1.0)]
        return Contestant(peers[server], mode, Setting(1, 1), version, lone=p50, loads=loads, megabytes=[1.0], first_answer=[1.0])

    lines = report(
        [
            contestant("npair", "npair", 600, 3),
            contestant("npair", "npair", 400, 6, tmp_path / "9"),
            contestant("FastAPI", "eager", 50, 20),
            contestant("LitServe", "eager", 100, 30),
            *(contestant(server, network, 20, 60) for network, server in OTHERS.items()),
        ],
        [625.0],
    )
    assert "npair reaches 0.96" in lines
    assert "Best peer as documented: LitServe, of which npair has 6.00 times the photos/s, and 0.10 of the p50 at one" in lines
    assert "npair, version 9: npair has 1.50 times the photos/s, and 0.50 of the p50 at one connection." in lines
    assert "infinity, CLIP ViT-B/32: npair has 30.00 times the photos/s, and 0.05 of the p50 at one connection." in lines
    assert "decoder inside" not in lines  # the other version is no peer


def test_docs_hold_what_the_results_say() -> None:
    rows = [json.loads(line) for line in (ROOT / "docs/ablation.jsonl").open()]
    assert table(rows) in (ROOT / "docs/training.md").read_text()
    assert (ROOT / "docs/model-card.md").read_text() == card(SHIPPED) + "\n"
