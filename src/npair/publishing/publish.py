"""A trained network as the next version of a model: checked against the version that is pinned, and there whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import shutil
from collections.abc import Callable
from functools import partial
from importlib.metadata import version as installed
from pathlib import Path
from typing import Any

import numpy as np

from npair.data.dataset import Dataset, Photos
from npair.data.files import read_photo
from npair.publishing.graphs import milliseconds
from npair.publishing.version_folder import LIBRARIES, PublishError, write_manifest, write_version
from npair.releasing.config import pinned
from npair.releasing.repository import Repository
from npair.releasing.verify import published_code, verify
from npair.scoring.evaluate import compare
from npair.scoring.retrieval import Vectors
from npair.serving.embedder import UNLIMITED, Embedder, read_manifest
from npair.serving.engine import cores

RECALL_DROP = (
    0.01  # of Recall@1 on val, below the pinned version's, for fine labels or for coarse ones
)
COST_RISE = 1.5  # times the pinned version's milliseconds a photo, or bytes
TIMED_PHOTOS = 64
PINS = Path(__file__).parents[3] / "model/api"


def publish(
    run: Path,
    data: Path,
    repository: Repository,
    *,
    cache: Path,
    accept_recall_drop: str = "",
    accept_cost: str = "",
    say: Callable[[str], None] = lambda _: None,
) -> int:
    """Write the next version from a run's averaged network, or from an earlier version's.

    accept_recall_drop, accept_cost: why a version may be published that finds less than the pinned one, or that is slower or
    larger, by more than is tolerated; the manifest keeps it. What was measured is kept in ``cache`` if the version is refused, so
    that publishing it all the same takes seconds.
    say: is told what is being done.
    Returns: its number. Raises: PublishError, ReleaseError, RepositoryError, RunError, DataError, EnginesError, VersionError; then
    there is no such version.
    """
    check_libraries()
    with repository.new_version() as (number, folder):
        pin = _pin(repository)
        with repository.version(pin) if pin else contextlib.nullcontext() as served:
            refused = cache / "refused" / _fingerprint(run, data, repository, number, served)
            if refused.is_dir():
                say(f"version {number} was measured before and refused; taking it from {refused}")
                shutil.copytree(refused, folder, dirs_exist_ok=True)
                manifest = read_manifest(folder)
            else:
                dataset, manifest = write_version(
                    folder, run, data, cache, model=repository.name, version=number, say=say
                )
                if served:
                    say(f"comparing with version {pin}")
                    manifest["compared_with"] = compare_with(served, folder, manifest, dataset)
                write_manifest(folder, manifest)
        reasons = {"recall": accept_recall_drop, "cost": accept_cost}
        flags = {"recall": "--accept-recall-drop", "cost": "--accept-cost"}
        problems = refusals(manifest["compared_with"]) if pin else {}
        if unexplained := [what for what in problems if not reasons[what]]:
            _keep(folder, refused)
            why = "; ".join(problems[what] for what in unexplained)
            options = " ".join(f"{flags[what]} REASON" for what in unexplained)
            raise PublishError(
                f"{why}; nothing was published ({options} publishes it all the same)"
            )
        for what, problem in problems.items():
            manifest["compared_with"][f"accepted_{what}"] = {
                "problem": problem,
                "reason": reasons[what],
            }
        write_manifest(folder, manifest)
        verify(folder)
    shutil.rmtree(refused, ignore_errors=True)
    return number


def _pin(repository: Repository) -> int | None:
    """The newest complete version that is pinned."""
    versions = repository.versions()
    return next(
        (
            pin
            for pin in reversed(pinned(repository.read("config.pbtxt").decode()))
            if versions.get(pin)
        ),
        None,
    )


def _fingerprint(
    run: Path, data: Path, repository: Repository, number: int, served: Path | None
) -> str:
    """Of everything that a version is made of and compared with."""
    network = run / "manifest.json" if (run / "manifest.json").exists() else run / "checkpoint.pt"
    files = [
        network,
        *((served / "manifest.json",) if served else ()),
        *sorted(Path(__file__).parents[1].rglob("*.py")),
    ]
    parts = [
        str(data.absolute()),
        repository.name,
        number,
        cores(),
        *(installed(name) for name in LIBRARIES),
    ]
    digest = hashlib.sha256(json.dumps(parts).encode())
    for file in files:
        digest.update(hashlib.sha256(file.read_bytes() if file.is_file() else b"").digest())
    return digest.hexdigest()


def _keep(folder: Path, refused: Path) -> None:
    """Of refused versions, only the last is worth its room."""
    shutil.rmtree(refused.parent, ignore_errors=True)
    with contextlib.suppress(OSError):  # a full disk must not hide why the version was refused
        unfinished = refused.with_suffix(".unfinished")
        shutil.copytree(folder, unfinished)
        unfinished.rename(refused)


def check_libraries() -> None:
    """Raises: PublishError where libraries are not those that serve, with which golden sets must be measured."""
    files = list(PINS.glob("requirements*.txt"))
    if not files:
        raise PublishError(
            f"{PINS} is missing, which says what libraries serve: publish with the npair of a checkout (make install)"
        )
    for name in LIBRARIES:
        pins = [
            re.search(rf"^{name}==([^\s;+]+)", file.read_text(), re.MULTILINE) for file in files
        ]
        for pin in filter(None, pins):
            if pin[1] != (here := installed(name).partition("+")[0]):
                raise PublishError(
                    f"{name} is {here} here and {pin[1]} where versions are served; run: make install"
                )


def compare_with(
    served: Path, folder: Path, manifest: dict[str, Any], dataset: Dataset
) -> dict[str, Any]:
    """What both versions find in val, what a photo costs each on this machine, from its bytes on, and how large they are.

    manifest: the new version's, which says what that finds.
    Returns: ``version``, the served one's; and ``recall_at_1`` (where there is val), ``milliseconds`` and ``bytes`` of both, as
    [served, new].
    """
    with published_code(served) as code:
        old, new = code.Embedder(served, cores=cores()), Embedder(folder, cores=cores())
    photos = [read_photo(path) for path in dataset.train.paths[:TIMED_PHOTOS]]
    recalls = compare("", dataset, "val", embedding(old)).recall_at_1() if dataset.val else {}
    calls = {
        "old": partial(old.embed_photos, limits=UNLIMITED),
        "new": partial(new.embed_photos, limits=UNLIMITED),
    }
    costs = milliseconds(calls, photos)
    old.close()
    new.close()
    return {
        "version": old.manifest["version"],
        "recall_at_1": {
            kind: [recall, manifest["metrics"]["val"][kind]["recall_at_1"]["value"]]
            for kind, recall in recalls.items()
        },
        "milliseconds": [costs["old"], costs["new"]],
        "bytes": [
            sum(path.stat().st_size for path in each.rglob("*") if path.is_file())
            for each in (served, folder)
        ],
    }


def embedding(embedder: Any) -> Callable[[Photos], Vectors]:
    """By a version's own decoder, from the files on."""

    def embed(photos: Photos) -> Vectors:
        parts = [
            photos.paths[start : start + TIMED_PHOTOS]
            for start in range(0, len(photos), TIMED_PHOTOS)
        ]
        return np.concatenate(
            [
                np.stack(embedder.embed_photos(list(map(read_photo, part)), UNLIMITED))
                for part in parts
            ]
        )

    return embed


def refusals(compared: dict[str, Any]) -> dict[str, str]:
    """Why the new version is not to be published, by what would have to be accepted."""
    problems = {}
    for kind, (old, new) in compared["recall_at_1"].items():
        if old - new > RECALL_DROP:
            problems["recall"] = (
                f"Recall@1 on val, of {kind} labels, is {new:.3f}; version {compared['version']} has {old:.3f}"
            )
    for what, unit in (("milliseconds", "ms a photo"), ("bytes", "bytes")):
        old, new = compared[what]
        if new > COST_RISE * old:
            problems["cost"] = (
                f"it takes {new:,} {unit}; version {compared['version']} takes {old:,}"
            )
    return problems
