"""Time and memory of evaluating many photos against each other.

.venv/bin/python benchmarks/metrics_at_scale.py --photos 200000

The photos are synthetic clusters, since only their number matters.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from pathlib import Path

import numpy as np

from npair.scoring.evaluate import evaluate
from npair.scoring.retrieval import LabelledVectors

PHOTOS_PER_CLASS = 40
CLASSES_PER_KIND = 20


def clustered(photos: int, dimension: int) -> LabelledVectors:
    """Draw unit vectors around a random centre for each class.

    The centres of the classes lie around a centre for each kind of product.
    """
    rng = np.random.default_rng(0)
    fine = np.arange(photos) // PHOTOS_PER_CLASS
    coarse = fine // CLASSES_PER_KIND
    kinds, classes = (
        rng.standard_normal((labels[-1] + 1, dimension), dtype=np.float32)
        for labels in (coarse, fine)
    )
    vectors = 2 * rng.standard_normal((photos, dimension), dtype=np.float32)
    vectors += classes[fine]
    vectors += kinds[coarse]
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return LabelledVectors(vectors, fine, coarse)


def resident_megabytes() -> float:
    """Resident memory now. The peak would include that of drawing the photos. Linux only."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 1e6


def peak_megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6  # Linux counts KiB


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--photos", type=int, default=200_000)
    parser.add_argument("--dimension", type=int, default=128)
    arguments = parser.parse_args()
    photos = clustered(arguments.photos, arguments.dimension)
    before, began = resident_megabytes(), time.monotonic()
    evaluation = evaluate(photos)
    print(
        json.dumps(
            {
                "photos": arguments.photos,
                "dimension": arguments.dimension,
                "classes": evaluation.fine_classes,
                "seconds": round(time.monotonic() - began, 1),
                "megabytes_over_baseline": round(peak_megabytes() - before),
                "baseline_megabytes": round(before),
                "recall_at_1": evaluation.fine.recall_at_1.value,
                "map_at_r": evaluation.fine.map_at_r.value if evaluation.fine.map_at_r else None,
                "nmi": evaluation.nmi,
                "eer": evaluation.verification.eer if evaluation.verification else None,
            }
        )
    )


if __name__ == "__main__":
    main()
