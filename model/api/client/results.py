"""What the client returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Vectors = npt.NDArray[np.float32]


class Embeddings(NamedTuple):
    """Unit vectors, float32 [n, 128], in the order of the photos, and the version that made them.

    Do not compare vectors of two versions.
    """

    vectors: Vectors
    version: str


class Thresholds(NamedTuple):
    """Cosines at which photos count as the same product, measured when ``version`` was published.

    At these, 1 % and 0.1 % of the pairs of different products count as the same (false acceptance
    rate, FAR); None if too few pairs were measured.
    """

    version: str
    far_1_percent: float | None
    far_01_percent: float | None


@dataclass(frozen=True)
class Embedded:
    """The outcome of one photo: a vector, float32 [128], or the reason for its absence."""

    index: int
    vector: Vectors | None = None
    reason: str | None = None
