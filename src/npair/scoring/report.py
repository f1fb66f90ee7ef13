"""One evaluation as one HTML file: numbers, curves, photos and their provenance."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import numpy.typing as npt

from npair.data.dataset import Photos, spread
from npair.scoring.charts import roc_chart, training_charts
from npair.scoring.embedding_map import embedding_map
from npair.scoring.evaluate import EmbeddedSplit, Evaluation
from npair.scoring.intervals import Estimate
from npair.scoring.pictures import thumbnail
from npair.scoring.retrieval import Labels

NEIGHBOURS = 5
EXAMPLES = 8  # rows of evenly spread queries
FAILURES = 6
CONFUSIONS = 8
CLASS_ROWS = 1000
LIBRARIES = ("npair", "torch", "numpy", "scikit-learn", "pillow")

DEFINITIONS = {
    "recall_at_1": ("Recall@1", "The nearest photo has the query's label."),
    "recall_at_2": ("Recall@2", "At least one of the 2 nearest photos has it."),
    "recall_at_4": ("Recall@4", "At least one of the 4 nearest photos has it."),
    "recall_at_8": ("Recall@8", "At least one of the 8 nearest photos has it."),
    "knn_accuracy": ("5-NN accuracy", "Most of the 5 nearest have it; summed cosines decide ties."),
    "r_precision": ("R-precision", "The share of the R nearest that has it, if R have it in all."),
    "map_at_r": ("MAP@R", "R-precision that favours right photos first (Musgrave et al., 2020)."),
}


def write_report(
    path: Path,
    embedded: EmbeddedSplit,
    evaluation: Evaluation,
    *,
    run: dict[str, Any] | None,
    log: list[dict[str, Any]],
    findings: list[str],
) -> None:
    """Write a self-contained HTML file: no script, nothing from the network, photos inside.

    evaluation: of ``embedded``.
    run, log: a run's config.json and the rows of its log.jsonl; None and empty if unknown.
    findings: facts about the data, in sentences.
    Raises: DataError or OSError for a photo that cannot be read, OSError for a path that cannot be
    written.
    """
    queries, gallery = embedded.query_photos, embedded.gallery_photos
    exclude_self = embedded.exclude_self
    ranked, cosines = embedded.nearest(min(NEIGHBOURS, len(gallery) - exclude_self))
    right = gallery.fine[ranked] == queries.fine[:, None]

    def row(query: int) -> dict[str, Any]:
        return {
            "query": _photo(queries, query),
            "neighbours": [
                _photo(gallery, index) | {"cosine": float(cosine), "right": bool(same)}
                for index, cosine, same in zip(
                    ranked[query], cosines[query], right[query], strict=True
                )
            ],
        }

    def confusion(query: int, count: int) -> dict[str, Any]:
        return {
            "query": _photo(queries, query),
            "neighbour": _photo(gallery, ranked[query, 0]),
            "count": count,
            "of": int(np.sum(queries.fine == queries.fine[query])),
        }

    wrong = np.flatnonzero(~right[:, 0])
    wrong = wrong[np.argsort(-cosines[wrong, 0], kind="stable")]  # the most confident first
    confusions = _confusions(queries.fine[wrong], gallery.fine[ranked[wrong, 0]])
    examples = spread(len(queries), EXAMPLES)
    classes = _classes(queries, gallery, right[:, 0], exclude_self)
    sides = [(embedded.queries, queries), (embedded.gallery, gallery)]
    page = _template().render(
        title=embedded.embedded_by,
        evaluation=evaluation,
        definitions=DEFINITIONS,
        training=training_charts(log),
        roc=roc_chart(evaluation.verification),
        examples=[row(int(query)) for query in examples],
        failures=[row(int(wrong[i])) for i in sorted(i for i, _ in confusions)[:FAILURES]],
        wrong=len(wrong),
        confusions=[confusion(int(wrong[i]), count) for i, count in confusions[:CONFUSIONS]],
        classes=classes[:CLASS_ROWS],
        class_count=len(classes),
        map=embedding_map(sides[:1] if exclude_self else sides),
        run=run,
        findings=findings,
        libraries={
            found.name: found.version
            for name in LIBRARIES  # without torch, where a server was scored
            for found in importlib.metadata.distributions(name=name)
        },
    )
    # A class is named after its folder, whose name may hold bytes that are not UTF-8.
    path.write_text(page, encoding="utf-8", errors="backslashreplace")


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": _percent, "interval": _interval}
    return environment.get_template("report.html.j2")


def _percent(share: float) -> str:
    """Format a share with one decimal, or two below 1 %: 63.5 %, 0.12 %."""
    return f"{100 * share:.{1 if share >= 0.01 or share == 0 else 2}f} %"


def _interval(estimate: Estimate) -> str:
    return f"{100 * estimate.low:.1f} to {100 * estimate.high:.1f}"


def _photo(photos: Photos, index: int) -> dict[str, Any]:
    name = photos.fine_names[photos.fine[index]]
    return {"name": name, "source": thumbnail(photos.paths[index])}


def _confusions(labels: Labels, taken_for: Labels) -> list[tuple[int, int]]:
    """Return the first index and the number of each pair of labels, the commonest first."""
    pairs = np.stack([labels, taken_for], axis=1)
    _, first, counts = np.unique(pairs, axis=0, return_index=True, return_counts=True)
    order = np.lexsort((first, -counts))
    return list(zip(first[order].tolist(), counts[order].tolist(), strict=True))


def _classes(
    queries: Photos, gallery: Photos, hits: npt.NDArray[np.bool_], exclude_self: bool
) -> list[dict[str, Any]]:
    """Compute the Recall@1 of each class, the worst first.

    hits: whether each query's nearest neighbour is right, [q].
    """
    rows = []
    for label in np.unique(queries.fine):
        members = np.flatnonzero(queries.fine == label)
        rows.append(
            {
                "name": queries.fine_names[label],
                "kind": queries.coarse_names[queries.coarse[members[0]]],
                "queries": len(members),
                "gallery": int(np.sum(gallery.fine == label)) - exclude_self,
                "recall": float(hits[members].mean()),
            }
        )
    return sorted(rows, key=lambda row: (row["recall"], -row["queries"]))
