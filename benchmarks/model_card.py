"""Print the card of a published version in Markdown, from its manifest and the results in docs/.

.venv/bin/python benchmarks/model_card.py model_repository/npair/19 > docs/model-card.md
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import cross_validation
import jinja2
import robustness
import unseen

from npair.networks.network import build_network, multiply_adds
from npair.scoring.evaluate import Evaluation
from npair.scoring.report import DEFINITIONS
from npair.scoring.retrieval import MEASURES
from npair.training.run import read_run

HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("version", type=Path, help="folder of a version")
    print(card(parser.parse_args().version))


def card(version: Path) -> str:
    """The card in Markdown.

    Raises: OSError, KeyError if the manifest of a scored version, or a result in docs/, is missing.
    """
    manifest = json.loads((version / "manifest.json").read_bytes())
    scores = Evaluation.from_dict(manifest["metrics"]["val"])
    training = read_run(version)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,
    )
    return environment.get_template("model_card.md.j2").render(
        manifest=manifest,
        megabytes=sum(
            (version / name).stat().st_size for name in [*manifest["files"], "manifest.json"]
        )
        / 1e6,
        millions=multiply_adds(build_network(training["network"]), training["train"]["size"]) / 1e6,
        scores=scores,
        measures=[
            (DEFINITIONS[name][0], getattr(scores.fine, name), getattr(scores.coarse, name))
            for name in MEASURES
        ],
        frozen_stages=training["train"]["frozen_stages"],
        cross_validation=cross_validation.table(rows("cross-validation.jsonl")),
        scored=rows("scored.jsonl"),
        robustness=robustness.table(rows("robustness.jsonl")),
        unseen=unseen.table(rows("unseen.jsonl")),
    )


def rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (HERE.parent / "docs" / name).read_text().splitlines()]


if __name__ == "__main__":
    main()
