"""One evaluation as one HTML file that anyone can open: numbers, curves, photos and where they come from."""

from __future__ import annotations

import base64
import importlib.metadata
import io
import itertools
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps
from sklearn.manifold import TSNE

from npair.data.dataset import Photos
from npair.scoring.evaluate import Comparison
from npair.scoring.metrics import MEASURES, Estimate, Evaluation, Labels, OperatingPoint, Vectors, nearest

NEIGHBOURS = 5
EXAMPLES = 8  # rows of evenly spread queries
FAILURES = 6
CONFUSIONS = 8
CLASS_ROWS = 1000
MAP_POINTS = 3000
MAP_PHOTOS = 14
THUMBNAIL = 144  # pixels: sharp at 1.5 times the size at which it is shown
LIBRARIES = ("npair", "torch", "numpy", "scikit-learn", "pillow")

# Sizes in the user units of an SVG, which are CSS pixels where it is shown at its own width.
CHART = (400, 230)
MAP = (960, 620)

DEFINITIONS = {
    "recall_at_1": ("Recall@1", "The nearest photo has the query's label: 1-nearest-neighbour accuracy."),
    "recall_at_2": ("Recall@2", "At least one of the 2 nearest photos has it."),
    "recall_at_4": ("Recall@4", "At least one of the 4 nearest photos has it."),
    "recall_at_8": ("Recall@8", "At least one of the 8 nearest photos has it."),
    "knn_accuracy": ("5-NN accuracy", "Most of the 5 nearest photos have it; equal votes are decided by their summed cosines."),
    "r_precision": ("R-precision", "Of the R nearest photos, the share that has it, where R photos in all have it."),
    "map_at_r": ("MAP@R", "R-precision that also asks for the right photos to come first (Musgrave et al., ECCV 2020)."),
}


Box = tuple[float, float, float, float]  # left, top, right, bottom


def write_report(
    path: Path,
    compared: Comparison,
    evaluation: Evaluation,
    *,
    run: dict[str, Any] | None,
    log: list[dict[str, Any]],
    findings: list[str],
) -> None:
    """Write a self-contained HTML file: no script, nothing from the network, photos as thumbnails inside.

    evaluation: of what was compared.
    run, log: a run's config.json and the rows of its log.jsonl, where there are any. findings: what is to be known of the data.
    Raises: OSError for a photo or a path that cannot be read or written.
    """
    alone = compared.alone
    queries, query_photos = compared.queries, compared.query_photos
    gallery, gallery_photos = compared.gallery, compared.gallery_photos
    neighbours = min(NEIGHBOURS, len(gallery) - alone)
    ranked, cosines = nearest(queries, gallery, neighbours, exclude_self=alone)
    right = gallery_photos.fine[ranked] == query_photos.fine[:, None]

    def row(query: int) -> dict[str, Any]:
        return {
            "query": _photo(query_photos, query),
            "neighbours": [
                _photo(gallery_photos, index) | {"cosine": float(cosine), "right": bool(same)}
                for index, cosine, same in zip(ranked[query], cosines[query], right[query], strict=True)
            ],
        }

    wrong = np.flatnonzero(~right[:, 0])
    wrong = wrong[np.argsort(-cosines[wrong, 0], kind="stable")]
    confusions = _confusions(query_photos.fine[wrong], gallery_photos.fine[ranked[wrong, 0]])
    classes = _classes(query_photos, gallery_photos, ranked[:, 0], alone)
    mapped = [(queries, query_photos)] if alone else [(queries, query_photos), (gallery, gallery_photos)]
    page = _template().render(
        title=compared.embedded_by,
        evaluation=evaluation,
        rows=[(*DEFINITIONS[name], getattr(evaluation.fine, name), getattr(evaluation.coarse, name)) for name in MEASURES],
        training=_training(log),
        roc=_roc(evaluation),
        examples=[row(int(i)) for i in np.unique(np.linspace(0, len(queries) - 1, EXAMPLES).astype(int))],
        failures=[row(int(wrong[i])) for i in sorted(first for first, _ in confusions)[:FAILURES]],
        wrong=len(wrong),
        confusions=[
            {
                "query": _photo(query_photos, wrong[first]),
                "neighbour": _photo(gallery_photos, ranked[wrong[first], 0]),
                "count": count,
                "of": int(np.sum(query_photos.fine == query_photos.fine[wrong[first]])),
            }
            for first, count in confusions[:CONFUSIONS]
        ],
        classes=classes[:CLASS_ROWS],
        class_count=len(classes),
        map=_map(mapped),
        run=run,
        findings=findings,
        libraries={name: importlib.metadata.version(name) for name in LIBRARIES},
    )
    path.write_text(page, encoding="utf-8")


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
    """Three digits, as far as they can be told apart: 63.5 %, 0.12 %."""
    return f"{100 * share:.{1 if share >= 0.01 or share == 0 else 2}f} %"


def _interval(estimate: Estimate) -> str:
    return f"{100 * estimate.low:.1f} to {100 * estimate.high:.1f}"


def _photo(photos: Photos, index: int) -> dict[str, Any]:
    return {"name": photos.fine_names[photos.fine[index]], "source": _thumbnail(photos.paths[index])}


def _thumbnail(path: Path) -> str:
    """The central square, which is what the network sees, as the data URI of a small JPEG."""
    buffer = io.BytesIO()
    with Image.open(path) as image:
        image.draft("RGB", (2 * THUMBNAIL, 2 * THUMBNAIL))
        square = ImageOps.fit(ImageOps.exif_transpose(image).convert("RGB"), (THUMBNAIL, THUMBNAIL))
    square.save(buffer, "JPEG", quality=72, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _confusions(labels: Labels, taken_for: Labels) -> list[tuple[int, int]]:
    """For each pair of labels, commonest first: where it occurs first in these int64 [n], and how often."""
    _, first, counts = np.unique(np.stack([labels, taken_for], axis=1), axis=0, return_index=True, return_counts=True)
    order = np.lexsort((first, -counts))
    return list(zip(first[order].tolist(), counts[order].tolist(), strict=True))


def _classes(query_photos: Photos, gallery_photos: Photos, nearest_of: npt.NDArray[np.int64], alone: bool) -> list[dict[str, Any]]:
    """Recall@1 of each class of the queries, worst first."""
    hits = gallery_photos.fine[nearest_of] == query_photos.fine
    rows = []
    for label in np.unique(query_photos.fine):
        members = np.flatnonzero(query_photos.fine == label)
        rows.append(
            {
                "name": query_photos.fine_names[label],
                "kind": query_photos.coarse_names[query_photos.coarse[members[0]]],
                "queries": len(members),
                "gallery": int(np.sum(gallery_photos.fine == label)) - alone,
                "recall": float(hits[members].mean()),
            }
        )
    return sorted(rows, key=lambda of: (of["recall"], -of["queries"]))


def _training(log: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Charts of a run's log; those of the val split only where it was scored."""
    if not log:
        return []
    epochs, hours = [row["epoch"] for row in log], np.cumsum([row["seconds"] for row in log]) / 3600
    scored = [i for i, row in enumerate(log) if "val" in row]
    batch = [row["batch_recall"] for row in log]
    fine, coarse = ([(epochs[i], log[i]["val"][kind]) for i in scored] for kind in ("fine", "coarse"))
    charts = [
        _chart("Loss", "epoch", {"": list(zip(epochs, (row["loss"] for row in log), strict=True))}, log_y=True),
        _chart("Recall in training batches", "epoch", {"": list(zip(epochs, batch, strict=True))}, y_range=(0, 1)),
    ]
    if scored:
        charts.append(_chart("Recall@1 on val photos", "epoch", {"fine": fine, "coarse": coarse}, y_range=(0, 1)))
    progress = {"batches": list(zip(hours, batch, strict=True)), "val, fine": [(hours[i], log[i]["val"]["fine"]) for i in scored]}
    charts.append(_chart("Progress over time", "hours", {name: of for name, of in progress.items() if of}, y_range=(0, 1)))
    return charts


def _roc(evaluation: Evaluation) -> dict[str, Any] | None:
    found = evaluation.verification
    if found is None:
        return None
    points = [(point.far, point.tar) for point in found.curve if point.far > 0]
    marks: list[tuple[str, OperatingPoint | None]] = [
        ("EER", OperatingPoint(found.eer_threshold, found.eer, 1 - found.eer)),
        ("FAR 1 %", found.far_1_percent),
        ("FAR 0.1 %", found.far_01_percent),
    ]
    drawn = [(name, point.far, point.tar) for name, point in marks if point and point.far > 0]
    smallest = min([*(far for far, _ in points), 0.1])
    return _chart(
        "ROC",
        "share of different pairs accepted (FAR)",
        {"": points},
        x_range=(smallest, 1),
        y_range=(0, 1),
        log_x=True,
        marks=drawn,
        size=(520, 330),
    )


def _chart(
    title: str,
    x_label: str,
    series: dict[str, list[tuple[float, float]]],
    *,
    x_range: tuple[float, float] | None = None,
    y_range: tuple[float, float] | None = None,
    log_x: bool = False,
    log_y: bool = False,
    marks: Iterable[tuple[str, float, float]] = (),
    size: tuple[int, int] = CHART,
) -> dict[str, Any]:
    """What the template needs to draw lines, in the units of the drawing. An axis whose range is given is one of shares; x begins
    at 0 else."""
    xs, ys = (np.array([point[axis] for points in series.values() for point in points], dtype=float) for axis in (0, 1))
    width, height = size
    x_at, x_ticks = _axis(x_range or (0, xs.max()), (46, width - 22), log_x, percent=x_range is not None)
    y_at, y_ticks = _axis(y_range or (ys.min(), ys.max()), (height - 40, 12), log_y, percent=y_range is not None)
    return {
        "title": title,
        "x_label": x_label,
        "width": width,
        "height": height,
        "x_ticks": x_ticks,
        "y_ticks": y_ticks,
        "series": [{"name": name, "points": [(x_at(x), y_at(y)) for x, y in points]} for name, points in series.items()],
        "ends": {name: points[-1][1] for name, points in series.items()},
        "marks": [(name, x_at(x), y_at(y)) for name, x, y in marks],
    }


def _axis(
    limits: tuple[float, float], pixels: tuple[float, float], log: bool, percent: bool
) -> tuple[Callable[[float], float], list[tuple[float, str]]]:
    """Where a value lies on an axis, and the axis's ticks as (place, label)."""
    low, high = (max(limit, 1e-6) for limit in limits) if log else limits
    if high <= low:
        low, high = low - 0.5 * abs(low or 1), high + 0.5 * abs(high or 1)
    if log:
        values = [m * 10.0**e for e in range(-6, 7) for m in ((1, 2, 5) if high < 100 * low else (1,))]
    else:
        rough = (high - low) / 5
        step = next(m * 10.0**e for e in range(-9, 10) for m in (1, 2, 2.5, 5) if m * 10.0**e >= rough * 0.999)
        values = [step * i for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]
    scale = math.log if log else float

    def at(value: float) -> float:
        share = (scale(max(value, low) if log else value) - scale(low)) / (scale(high) - scale(low))
        return round(pixels[0] + share * (pixels[1] - pixels[0]), 1)

    shown = [value for value in values if low * (1 - 1e-9) <= value <= high * (1 + 1e-9)]
    return at, [(at(value), f"{100 * value:g} %" if percent else f"{value:g}") for value in shown]


def _map(sides: list[tuple[Vectors, Photos]]) -> dict[str, Any] | None:
    """t-SNE (van der Maaten & Hinton, JMLR 2008) of queries and gallery together; None for too few photos to draw one."""
    photos = [(side, index) for side, (vectors, _) in enumerate(sides) for index in range(len(vectors))]
    chosen = [photos[i] for i in np.unique(np.linspace(0, len(photos) - 1, MAP_POINTS).astype(int))]
    vectors = np.stack([sides[side][0][index] for side, index in chosen])
    if len(np.unique(vectors, axis=0)) < 4:
        return None
    places = TSNE(perplexity=min(30, (len(vectors) - 1) / 3), init="pca", random_state=0).fit_transform(vectors)
    low, high = places.min(axis=0), places.max(axis=0)
    margin = 30
    places = margin + (places - low) / (high - low) * (np.array(MAP) - 2 * margin)

    def of(i: int) -> Photos:
        photos: Photos = sides[chosen[i][0]][1]
        return photos

    coarse = np.array([of(i).coarse[index] for i, (_, index) in enumerate(chosen)])
    fine = np.array([of(i).fine[index] for i, (_, index) in enumerate(chosen)])
    taken: list[Box] = []
    pictures, labels = [], []
    for i in _far_apart(places, MAP_PHOTOS):
        if box := _beside(places[i], (46, 46), places, taken):
            pictures.append({"box": box, "point": places[i].round(1).tolist(), **_photo(of(i), chosen[i][1])})
    kinds, counts = np.unique(coarse, return_counts=True)
    for kind in kinds[np.argsort(-counts, kind="stable")]:
        members = places[coarse == kind]
        middle = members[np.argmin(np.linalg.norm(members - np.median(members, axis=0), axis=1))]
        name = of(0).coarse_names[kind]
        if box := _beside(middle, (9.2 * len(name), 20), places, taken):
            labels.append({"box": box, "name": name})
    groups = []
    for label in np.unique(fine):
        members = np.flatnonzero(fine == label)
        kind = coarse[members[0]]
        groups.append(
            {
                "name": of(0).fine_names[label],
                "kind": of(0).coarse_names[kind],
                # Hues by the golden angle: neighbours in the list of kinds are far apart in colour.
                "colour": f"hsl({137.5 * int(np.searchsorted(kinds, kind)) % 360:.0f} 60% {38 + 14 * (int(kind) % 2)}%)",
                "points": [(*places[i].round(1).tolist(), chosen[i][0] == 0) for i in members],
            }
        )
    return {"groups": groups, "labels": labels, "pictures": pictures, "width": MAP[0], "height": MAP[1], "points": len(chosen)}


def _beside(
    point: npt.NDArray[np.float32], size: tuple[float, float], places: npt.NDArray[np.float32], taken: list[Box]
) -> Box | None:
    """Take the box of this size near the point that covers the fewest places of the map; None where all of them are taken."""
    best: tuple[int, Box] | None = None
    for gap, right, down in itertools.product((6, 20), (0, 1, -1), (-1, 1, 0)):
        if not (right or down):
            continue
        left, top = (float(point[axis]) + way * (size[axis] / 2 + gap) - size[axis] / 2 for axis, way in ((0, right), (1, down)))
        box = (round(left, 1), round(top, 1), round(left + size[0], 1), round(top + size[1], 1))
        inside = min(box[:2]) >= 4 and box[2] <= MAP[0] - 4 and box[3] <= MAP[1] - 4
        if inside and all(box[2] < other[0] or other[2] < box[0] or box[3] < other[1] or other[3] < box[1] for other in taken):
            covered = int(np.sum(((places > box[:2]) & (places < box[2:])).all(axis=1)))
            if best is None or covered < best[0]:
                best = covered, box
    if best:
        taken.append(best[1])
    return best and best[1]


def _far_apart(places: npt.NDArray[np.float32], count: int) -> list[int]:
    """Indices of points of which each is as far as can be from those before it."""
    found = [0]
    distances = np.full(len(places), np.inf)
    while len(found) < min(count, len(places)):
        distances = np.minimum(distances, np.linalg.norm(places - places[found[-1]], axis=1))
        found.append(int(distances.argmax()))
    return found
