"""The report's line charts, in the units of their SVG drawings, which are CSS pixels."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from npair.scoring.verification import OperatingPoint, Verification

SIZE = (400, 230)
ROC_SIZE = (520, 330)
RECALL = "share right"

Points = list[tuple[float, float]]


def training_charts(log: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Chart the rows of a run's log; the val split only if it was scored."""
    if not log:
        return []
    epochs = [row["epoch"] for row in log]
    hours = np.cumsum([row["seconds"] for row in log]) / 3600
    scored = [i for i, row in enumerate(log) if "val" in row]
    loss = list(zip(epochs, (row["loss"] for row in log), strict=True))
    batch = [row["batch_recall"] for row in log]
    recalls = {"": list(zip(epochs, batch, strict=True))}
    charts = [
        _chart("Loss", ("epoch", "loss, log scale"), {"": loss}, log_y=True),
        _chart("Recall in training batches", ("epoch", RECALL), recalls, y_range=(0, 1)),
    ]
    progress = {"batches": list(zip(hours, batch, strict=True))}
    if scored:
        kinds = log[scored[0]]["val"]
        recalls = {
            kind if len(kinds) > 1 else "": [(epochs[i], log[i]["val"][kind]) for i in scored]
            for kind in kinds
        }
        charts.append(_chart("Recall@1 on val photos", ("epoch", RECALL), recalls, y_range=(0, 1)))
        name = "val, fine" if len(kinds) > 1 else "val"
        progress[name] = [(hours[i], log[i]["val"]["fine"]) for i in scored]
    return [*charts, _chart("Progress over time", ("hours", RECALL), progress, y_range=(0, 1))]


def roc_chart(found: Verification | None) -> dict[str, Any] | None:
    """Chart TAR by FAR on a logarithmic axis, with the operating points marked."""
    if found is None:
        return None
    points = [(point.far, point.tar) for point in found.curve if point.far > 0]
    marks: dict[str, OperatingPoint | None] = {
        "EER": OperatingPoint(found.eer_threshold, found.eer, 1 - found.eer),
        "FAR 1 %": found.far_1_percent,
        "FAR 0.1 %": found.far_01_percent,
    }
    drawn = [(name, at.far, at.tar) for name, at in marks.items() if at and at.far > 0]
    return _chart(
        "ROC",
        ("share of different pairs accepted (FAR), log scale", "same pairs accepted (TAR)"),
        {"": points},
        x_range=(min([*(far for far, _ in points), 0.1]), 1),
        y_range=(0, 1),
        log_x=True,
        marks=drawn,
        size=ROC_SIZE,
    )


def _chart(
    title: str,
    labels: tuple[str, str],
    series: dict[str, Points],
    *,
    x_range: tuple[float, float] | None = None,
    y_range: tuple[float, float] | None = None,
    log_x: bool = False,
    log_y: bool = False,
    marks: Iterable[tuple[str, float, float]] = (),
    size: tuple[int, int] = SIZE,
) -> dict[str, Any]:
    """Place lines, ticks and marks for the template.

    labels: of the axes, x and y.
    x_range, y_range: given for axes of shares, which are labelled in percent. Otherwise an axis
    spans its values, x from 0.
    """
    points = [point for line in series.values() for point in line]
    xs, ys = np.array(points, dtype=float).T
    width, height = size
    x_limits, y_limits = x_range or (0, xs.max()), y_range or (ys.min(), ys.max())
    x_at, x_ticks = _axis(x_limits, (46, width - 22), log_x, percent=x_range is not None)
    y_at, y_ticks = _axis(y_limits, (height - 40, 26), log_y, percent=y_range is not None)
    return {
        "title": title,
        "x_label": labels[0],
        "y_label": labels[1],
        "width": width,
        "height": height,
        "x_ticks": x_ticks,
        "y_ticks": y_ticks,
        "series": [
            {"name": name, "points": [(x_at(x), y_at(y)) for x, y in line]}
            for name, line in series.items()
        ],
        "ends": {name: line[-1][1] for name, line in series.items()},
        "marks": [(name, x_at(x), y_at(y)) for name, x, y in marks],
    }


def _axis(
    limits: tuple[float, float], pixels: tuple[float, float], log: bool, percent: bool
) -> tuple[Callable[[float], float], list[tuple[float, str]]]:
    """Return a function that places a value on an axis, and the ticks as (place, label)."""
    low, high = (max(limit, 1e-6) for limit in limits) if log else limits
    if high <= low:
        low, high = low - 0.5 * abs(low or 1), high + 0.5 * abs(high or 1)
    if log:
        multiples = (1, 2, 5) if high < 100 * low else (1,)
        values = [m * 10.0**e for e in range(-6, 7) for m in multiples]
    else:
        rough = (high - low) / 5
        steps = (m * 10.0**e for e in range(-9, 10) for m in (1, 2, 2.5, 5))
        step = next(step for step in steps if step >= rough * 0.999)
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        values = [step * i for i in range(first, last + 1)]
    scale = math.log if log else float

    def at(value: float) -> float:
        share = (scale(max(value, low) if log else value) - scale(low)) / (scale(high) - scale(low))
        return round(pixels[0] + share * (pixels[1] - pixels[0]), 1)

    ticks = [value for value in values if low * (1 - 1e-9) <= value <= high * (1 + 1e-9)]
    return at, [(at(value), f"{100 * value:g} %" if percent else f"{value:g}") for value in ticks]
