"""Two versions whose vectors cannot be taken for each other's, and clients that call them."""

from __future__ import annotations

import shutil
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

import numpy as np
from observing import prepared

from npair.client import NpairClient, Vectors
from npair.publishing.drawings import draw, encode
from npair.releasing.release import promote
from npair.releasing.repository import open_repository
from npair.serving.manifest import Manifest
from support.clients import Clients
from support.models import SHIPPED

OLDER, NEWER = int(SHIPPED.name), int(SHIPPED.name) + 1
PHOTOS = [encode(draw(product, 0, 64), "JPEG") for product in range(24)]
BATCH = 4  # a call of all photos then takes six requests, on several connections at once
NEGATIVE = """

positive = unit


def unit(embeddings):
    return -positive(embeddings)
"""
HEAD = [
    "| change | times | call | answered | failed | mixed |",
    "| --- | ---: | --- | ---: | ---: | ---: |",
]


def two_versions(folder: Path) -> Path:
    """Write the shipped network with the current code, and a version that negates its embeddings.

    Returns: the model's folder.
    """
    model = prepared(folder, "") / "npair"
    newer = Path(shutil.copytree(model / str(OLDER), model / str(NEWER)))
    with (newer / "embedder.py").open("a") as code:
        code.write(NEGATIVE)
    manifest = Manifest.read(newer)
    golden = newer / manifest.golden.embeddings
    np.save(golden, -np.load(golden))
    manifest.version = NEWER
    manifest.write(newer)
    promote(open_repository(model), OLDER, [])
    return model


def expected_vectors(url: str) -> dict[str, Vectors]:
    """Return what each of the two versions must answer for PHOTOS, while OLDER is served."""
    with NpairClient(url) as client:
        vectors, version = client.embed(PHOTOS)
    assert version == str(OLDER)
    return {str(OLDER): vectors, str(NEWER): -vectors}


class Traffic(Clients):
    """Calls of one photo and of all photos over both protocols, by clients with default retries.

    The clients pause between calls, so that the servers get CPU time to start.

    urls: the service's, by protocol. expected: see ``expected_vectors``.
    answered, failed, mixed: number of correct calls of each kind, of those that raised, and of
    those whose vectors are not all of the version that they name. problems: the failed and mixed
    calls and their times.
    """

    def __init__(self, urls: Mapping[str, str], expected: Mapping[str, Vectors]) -> None:
        self.expected = expected
        self.answered, self.failed, self.mixed = Counter[str](), Counter[str](), Counter[str]()
        self.problems: list[str] = []
        self.began = time.monotonic()
        super().__init__(
            *(
                partial(self._call, f"{name}, {protocol}", url, photos)
                for protocol, url in urls.items()
                for name, photos in (("one photo", PHOTOS[:1]), ("six batches", PHOTOS))
            )
        )

    def _call(self, kind: str, url: str, photos: list[bytes], stopping: threading.Event) -> None:
        with NpairClient(url, batch_size=BATCH) as client:
            while not stopping.is_set():
                time.sleep(0.05)
                sent = time.monotonic() - self.began
                try:
                    vectors, version = client.embed(photos)
                    cosines = (vectors * self.expected[version][: len(photos)]).sum(1)
                    if cosines.min() > 0.99:
                        self.answered[kind] += 1
                        continue
                    count, problem = self.mixed, f"wrong vectors of version {version}: {cosines}"
                except Exception as error:
                    count, problem = self.failed, repr(error)
                count[kind] += 1
                self.problems.append(
                    f"{kind}, {sent:.2f} to {time.monotonic() - self.began:.2f} s: {problem}"
                )

    def rows(self, change: str, times: int) -> Iterator[str]:
        """Yield a row below HEAD for each kind of call."""
        for kind in sorted(self.answered | self.failed | self.mixed):
            counts = (f"{count[kind]:,}" for count in (self.answered, self.failed, self.mixed))
            yield f"| {change} | {times} | {kind} | {' | '.join(counts)} |"


def change_under_load(
    name: str,
    change: Callable[[], object],
    times: int,
    *,
    urls: Mapping[str, str],
    expected: Mapping[str, Vectors],
    rows: list[str],
) -> None:
    """Make a change several times during Traffic, print when, and add to the table's rows.

    Fails the test if a call failed or was mixed, or if a kind of call was never answered.
    """
    with Traffic(urls, expected) as traffic:
        for number in range(times):
            began = time.monotonic() - traffic.began
            change()
            ended = time.monotonic() - traffic.began
            print(f"{name} {number + 1}: {began:.2f} to {ended:.2f} s", file=sys.stderr)
        time.sleep(1)
    rows += traffic.rows(name, times)
    assert not traffic.problems, "\n".join(traffic.problems)
    assert len(traffic.answered) == len(traffic.threads), "a kind of call was never answered"
