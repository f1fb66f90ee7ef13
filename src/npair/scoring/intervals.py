"""How sure the numbers are: 95 % confidence intervals of a score and of a difference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.stats import binomtest  # comes with scikit-learn
from scipy.stats import t as student_t

RESAMPLES = 1000
SEED = 0

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A mean over queries with its 95 % bootstrap interval, which has no width for one class."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Difference:
    """By how much the share of hits changed on the same queries, with its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:+.3f} ({self.low:+.3f} to {self.high:+.3f})"


def difference(before: npt.ArrayLike, after: npt.ArrayLike) -> Difference:
    """Compare the hits of two networks on the same queries, bool [q] each.

    The interval is exact, however few the queries: of those whose outcome changed, it takes the
    share that became hits with its interval by Clopper & Pearson (Biometrika 1934). It lies on one
    side of zero if and only if McNemar's exact test (Psychometrika 1947) rejects at 5 % that
    chance alone changed them. The queries count as independent.
    """
    old, new = np.asarray(before, dtype=bool), np.asarray(after, dtype=bool)
    won, lost = int(np.sum(new & ~old)), int(np.sum(old & ~new))
    if not won + lost:
        return Difference(0.0, 0.0, 0.0)
    share = binomtest(won, won + lost).proportion_ci(0.95, "exact")
    value, low, high = (
        (won + lost) / len(old) * (2 * part - 1)
        for part in (won / (won + lost), share.low, share.high)
    )
    return Difference(value, low, high)


def bootstrap(outcomes: Floats, classes: npt.NDArray[np.int64]) -> list[Estimate | None]:
    """Estimate the mean of each column of [q, m], NaN left out; None for a column of NaN alone.

    Draws classes with replacement (the cluster bootstrap: Davison & Hinkley, Bootstrap Methods and
    their Application, 1997, section 3.8). Photos of a class are alike: drawing queries one by one
    would treat them as independent and make the intervals too narrow.
    classes: the class of each query, numbered from 0, int64 [q].
    """
    count, measures = int(classes.max()) + 1, outcomes.shape[1]
    columns = np.concatenate([np.nan_to_num(outcomes), ~np.isnan(outcomes)], axis=1)
    totals = np.stack(
        [np.bincount(classes, weights=column, minlength=count) for column in columns.T], axis=1
    )

    def means(weights: Floats) -> Floats:
        sums, counts = np.split(weights @ totals, [measures])
        return np.divide(sums, counts, out=np.full(measures, np.nan), where=counts > 0)

    rng = np.random.default_rng(SEED)
    draws = (rng.integers(count, size=count) for _ in range(RESAMPLES))
    weights = (np.bincount(draw, minlength=count).astype(np.float64) for draw in draws)
    bounds = [2.5, 97.5]
    resampled = np.stack([means(weight) for weight in weights])
    return [
        None
        if np.isnan(value)
        else Estimate(float(value), *map(float, np.nanpercentile(of, bounds)))
        for value, of in zip(means(np.ones(count)), resampled.T, strict=True)
    ]


def over_runs(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean of runs that differ by their fold or their seed, and half the width of its
    95 % confidence interval (Student's t).

    Raises: ValueError for fewer than two values, which say nothing about spread.
    """
    if len(values) < 2:
        raise ValueError(f"an interval over runs needs at least two, got {len(values)}")
    standard_error = np.std(values, ddof=1) / np.sqrt(len(values))
    half_width = student_t.ppf(0.975, len(values) - 1) * standard_error
    return float(np.mean(values)), float(half_width)
