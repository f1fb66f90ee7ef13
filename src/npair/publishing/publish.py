"""Publish a trained network as a version, compared with the version that is pinned."""

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
from npair.data.files import digest_of, read_photo
from npair.publishing import PublishError
from npair.publishing.graphs import milliseconds
from npair.publishing.version_folder import LIBRARIES, write_version
from npair.releasing.verify import published_code, verify
from npair.scoring.evaluate import compare
from npair.scoring.retrieval import Vectors
from npair.serving.embedder import UNLIMITED, Embedder
from npair.serving.engine import cores
from npair.serving.manifest import NAME, Accepted, Comparison, Manifest

RECALL_DROP = 0.01  # of Recall@1 on val, below the pinned version's, for fine or coarse labels
COST_RISE = 1.5  # times the pinned version's milliseconds per photo, or bytes
TIMED_PHOTOS = 64
PINS = Path(__file__).parents[3] / "model/api"


def publish(
    run: Path,
    data: Path,
    folder: Path,
    *,
    model: str,
    version: int,
    pinned: Path | None,
    cache: Path,
    accept_recall_drop: str = "",
    accept_cost: str = "",
    say: Callable[[str], None] = lambda _: None,
) -> Manifest:
    """Write a version from a run's averaged weights or an earlier version's, and verify it.

    folder: an empty folder; discard what is in it if this raises.
    pinned: the folder of the version that is pinned, if any.
    cache: keeps the measurements of a refused version, so that accepting it takes seconds.
    accept_recall_drop, accept_cost: why a version may be published although it finds less than the
    pinned one, or is slower or larger, beyond the tolerance; the manifest keeps the reason.
    say: called with a sentence for each stage.
    Raises: PublishError, ReleaseError, RunError, DataError, VersionError.
    """
    check_libraries()
    key = _fingerprint(run, data, pinned, model, version)
    refused = cache / "refused" / key
    if refused.is_dir():
        say(f"version {version} was measured before and refused; taking it from {refused}")
        shutil.copytree(refused, folder, dirs_exist_ok=True)
        manifest = Manifest.read(folder)
    else:
        dataset, manifest = write_version(
            folder, run, data, cache, model=model, version=version, say=say
        )
        if pinned:
            say(f"comparing with version {Manifest.read(pinned).version}")
            manifest.compared_with = compare_with(pinned, folder, manifest, dataset)
            manifest.write(folder)
    if compared := manifest.compared_with:
        problems = refusals(compared)
        reasons = {"recall": accept_recall_drop, "cost": accept_cost}
        flags = {"recall": "--accept-recall-drop", "cost": "--accept-cost"}
        if unexplained := [what for what in problems if not reasons[what]]:
            _keep(folder, refused)
            why = "; ".join(problems[what] for what in unexplained)
            options = " ".join(f"{flags[what]} REASON" for what in unexplained)
            raise PublishError(
                f"{why}; nothing was published ({options} publishes it all the same)"
            )
        for what, problem in problems.items():
            setattr(compared, f"accepted_{what}", Accepted(problem, reasons[what]))
        manifest.write(folder)
    verify(folder)
    shutil.rmtree(refused, ignore_errors=True)
    return manifest


def _fingerprint(run: Path, data: Path, pinned: Path | None, model: str, version: int) -> str:
    """Hash everything that a version is made of and compared with."""
    network = run / NAME if (run / NAME).exists() else run / "checkpoint.pt"
    sources = sorted(Path(__file__).parents[1].rglob("*.py"))
    files = [network, *([pinned / NAME] if pinned else []), *sources]
    digests = [digest_of(file) if file.is_file() else "" for file in files]
    libraries = [installed(name) for name in LIBRARIES]
    parts = [digests, str(data.absolute()), model, version, cores(), libraries]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _keep(folder: Path, refused: Path) -> None:
    """Keep the version that was refused last, in place of an earlier one."""
    shutil.rmtree(refused.parent, ignore_errors=True)
    with contextlib.suppress(OSError):  # a full disk must not hide why the version was refused
        unfinished = refused.with_suffix(".unfinished")
        shutil.copytree(folder, unfinished)
        unfinished.rename(refused)


def check_libraries() -> None:
    """Raise PublishError if the libraries, which affect golden sets, are not those that serve."""
    files = list(PINS.glob("requirements*.txt"))
    if not files:
        raise PublishError(
            f"{PINS} is missing, which pins the serving libraries:"
            " publish with the npair of a checkout (make install)"
        )
    for name in LIBRARIES:
        pattern = re.compile(rf"^{name}==([^\s;+]+)", re.MULTILINE)
        for pin in filter(None, (pattern.search(file.read_text()) for file in files)):
            if pin[1] != (here := installed(name).partition("+")[0]):
                raise PublishError(
                    f"{name} is {here} here and {pin[1]} where versions are served;"
                    " run: make install"
                )


def compare_with(pinned: Path, folder: Path, manifest: Manifest, dataset: Dataset) -> Comparison:
    """Compare the recall on val, the cost of a photo and the size of two versions on this machine.

    manifest: the new version's, which has its recall.
    """
    with published_code(pinned) as code:
        old, new = code.Embedder(pinned, cores=cores()), Embedder(folder, cores=cores())
    photos = [read_photo(path) for path in dataset.train.paths[:TIMED_PHOTOS]]
    recalls = compare("", dataset, "val", embedding(old)).recall_at_1() if dataset.val else {}
    costs = milliseconds(
        {
            "old": partial(old.embed_photos, limits=UNLIMITED),
            "new": partial(new.embed_photos, limits=UNLIMITED),
        },
        photos,
    )
    old.close()
    new.close()
    found = manifest.recall_at_1()
    return Comparison(
        version=Manifest.read(pinned).version,
        recall_at_1={kind: [recall, found[kind]] for kind, recall in recalls.items()},
        milliseconds=[costs["old"], costs["new"]],
        bytes=[
            sum(path.stat().st_size for path in each.rglob("*") if path.is_file())
            for each in (pinned, folder)
        ],
    )


def embedding(embedder: Any) -> Callable[[Photos], Vectors]:
    """Return a function that embeds photo files with a version's own decoder."""

    def embed(photos: Photos) -> Vectors:
        vectors: list[Any] = []
        for start in range(0, len(photos), TIMED_PHOTOS):
            part = [read_photo(path) for path in photos.paths[start : start + TIMED_PHOTOS]]
            vectors.extend(embedder.embed_photos(part, UNLIMITED))
        return np.stack(vectors)

    return embed


def refusals(compared: Comparison) -> dict[str, str]:
    """Return why the new version needs to be accepted, by "recall" and "cost"."""
    problems = {}
    pinned = f"version {compared.version}"
    for kind, (old, new) in compared.recall_at_1.items():
        if old - new > RECALL_DROP:
            problems["recall"] = (
                f"Recall@1 on val, of {kind} labels, is {new:.3f}; {pinned} has {old:.3f}"
            )
    costs = ("ms a photo", compared.milliseconds), ("bytes", compared.bytes)
    for unit, (before, after) in costs:
        if after > COST_RISE * before:
            problems["cost"] = f"it takes {after:,} {unit}; {pinned} takes {before:,}"
    return problems
