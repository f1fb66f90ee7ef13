"""Model versions: the shipped one, tiny ones and broken ones."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

import pytest

from npair.cli.next_version import publish_next
from npair.data.pixels import default_cache
from npair.releasing.repository import open_repository
from npair.serving.manifest import Manifest
from npair.training.run import TrainConfig

ROOT = Path(__file__).parents[2]
# The version that this repository serves.
SHIPPED = next((ROOT / "model_repository/npair").glob("[0-9]*"))
# One view: the graph of two takes twice as long to convert and to quantise.
TINY = TrainConfig(
    network="compact", epochs=2, classes_per_batch=4, size=64, crop_size=48, views=1, evaluations=2
)

TINY_OPTIONS = [  # of npair train
    f"--{field.name.replace('_', '-')}={getattr(TINY, field.name)}"
    for field in fields(TINY)
    if getattr(TINY, field.name) != field.default
]


@contextmanager
def without_int8() -> Iterator[None]:
    """Publish in fp32 and bf16 only: int8 is slow, and the fixture ``published`` covers it."""

    def refused(*_: object, **__: object) -> None:
        raise RuntimeError("not for this test")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("npair.publishing.graphs.nncf.quantize", refused)
        yield


def publish_into(
    repository: Path, run: Path, data: Path, *, accept_recall_drop: str = "", accept_cost: str = ""
) -> Path:
    """Publish the next version; return its folder."""
    manifest = publish_next(
        open_repository(repository, start=True),
        run,
        data,
        cache=default_cache(),
        accept_recall_drop=accept_recall_drop,
        accept_cost=accept_cost,
    )
    return repository / str(manifest.version)


def rewrite_manifest(folder: Path, **changes: object) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | changes))


# Faults in the network have to be simulated: a network that really had them would not be loaded.
BREAKS = b"the network fails on this"
HANGS = b"the network never ends on this"
BROKEN = f"""

embed_photos = Embedder.embed_photos


def broken(self, photos, limits):
    if {BREAKS!r} in photos:
        raise ArithmeticError("the network's output is zero or not finite")
    if {HANGS!r} in photos:
        threading.Event().wait()
    return embed_photos(self, photos, limits)


Embedder.embed_photos = broken
"""


def let_fail(version: Path) -> None:
    """Make a version that still loads fail on BREAKS and hang on HANGS."""
    with (version / "embedder.py").open("a") as code:
        code.write(BROKEN)
    Manifest.read(version).write(version)
