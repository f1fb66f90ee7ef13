"""The results of the client's calls."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Vectors = npt.NDArray[np.float32]

# Parameters of the model's configuration: the version that was measured, and its thresholds.
THRESHOLD_PARAMETERS = ("thresholds_version", "threshold_far_1_percent", "threshold_far_01_percent")


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
class Configuration:
    """The parameters of the model's configuration."""

    parameters: dict[str, str]

    def thresholds(self) -> Thresholds | None:
        """Return the served version's similarity thresholds, or None."""
        version, *cosines = map(self.parameters.get, THRESHOLD_PARAMETERS)
        if not version:
            return None
        return Thresholds(version, *(float(cosine) if cosine else None for cosine in cosines))

    def manifest_sha256(self, version: str) -> str | None:
        """Return the hash that tells a served version from others of its number, or None."""
        if self.parameters.get("manifest_version") == version:
            return self.parameters.get("manifest_sha256")
        return self.parameters.get(f"manifest_sha256_{version}")  # served beside a newer version


@dataclass(frozen=True)
class Embedded:
    """The outcome of one photo: a vector, float32 [128], or the reason for its absence."""

    index: int
    vector: Vectors | None = None
    reason: str | None = None
