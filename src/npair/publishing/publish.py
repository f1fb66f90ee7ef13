"""Publish a trained network as a version, compared with the version that is pinned."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import distributions
from importlib.metadata import version as installed
from pathlib import Path
from typing import Any

import numpy as np

from npair.data.dataset import Dataset, Photos
from npair.data.files import digest_of, digest_of_json, read_photo
from npair.publishing import PublishError
from npair.publishing.gates import UNPROVEN, Gate, Hits
from npair.publishing.graphs import Choice, milliseconds
from npair.publishing.steps import Steps
from npair.publishing.version_folder import LIBRARIES, Staging, read_source
from npair.releasing.verify import published_code, verify
from npair.scoring.evaluate import embed_split
from npair.scoring.retrieval import Vectors
from npair.serving.embedder import UNLIMITED, Embedder
from npair.serving.engine import cores
from npair.serving.manifest import NAME, Comparison, Golden, Manifest

TIMED_PHOTOS = 64
UNPUBLISHED = "unpublished"  # in the cache
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
    """Write a version, scored on val by the code that will serve it, and verify it.

    run: the folder of the run whose averaged weights are published, or of an earlier version, to
    publish its network with the present serving code.
    data: the data set of the run; without val, the version has no metrics and no thresholds.
    folder: an empty folder; discard what is in it if this raises.
    pinned: the folder of the version that is pinned, if any.
    cache: keeps what was computed, so that the next try goes on from there; see ``Steps``.
    accept_recall_drop, accept_cost: why a version may be published although it finds less than the
    pinned one beyond chance, or is slower or larger; the manifest keeps the reason.
    say: called with a sentence for each stage and each warning.
    Raises: PublishError, ReleaseError, RunError, DataError, VersionError.
    """
    check_libraries()
    say(f"reading {run} and its photos")
    source = read_source(run, data, cache)
    gate = Gate(Manifest.read(pinned).version, accept_recall_drop, accept_cost) if pinned else None
    with Steps(folder, cache / UNPUBLISHED, _key(run, data, pinned), say) as steps:
        before: Hits = {}
        if pinned and gate and source.dataset.val:
            before = steps.once(
                "pinned",
                f"embedding val with version {gate.pinned}, which is pinned",
                partial(_hits, pinned, source.dataset),
            )
        staging = Staging(folder, source, model, version)
        exported = steps.once(
            "reference", "exporting the network, and embedding val with it", staging.reference
        )
        if gate:  # before the minutes of quantising: other engines find about the same
            gate.check_recall(before, exported["hits"])
        golden, reference = Golden(**exported["golden"]), exported["hits"]
        failed = steps.once(
            "graphs", "converting the network for OpenVINO, and quantising it", staging.graphs
        )
        manifest = staging.describe(golden, failed)
        choice = Choice.from_dict(
            steps.once(
                "engines",
                f"measuring the cost and recall of {', '.join(manifest.engines)}",
                lambda: staging.choose(manifest, reference).as_dict(),
            )
        )
        for doubt in choice.doubts:
            say(UNPROVEN.format(doubt))
        staging.complete(manifest, choice)
        if pinned and gate:
            costs = steps.once(
                "costs",
                f"comparing its cost with that of version {gate.pinned}",
                partial(_costs, pinned, folder, source.dataset),
            )
            recalls = {kind: [_mean(of), _mean(choice.hits[kind])] for kind, of in before.items()}
            compared = Comparison(version=gate.pinned, recall_at_1=recalls, **costs)
            for line in gate.tell_recall(before, choice.hits):
                say(line)
            compared.accepted_recall = gate.check_recall(before, choice.hits)
            compared.accepted_cost = gate.check_cost(compared)
            manifest.compared_with = compared
            manifest.write(folder)
        say("verifying it")
        verify(folder)
    return manifest


def _key(run: Path, data: Path, pinned: Path | None) -> str:
    """Hash everything that a version is made of and compared with, except its number."""
    network = run / NAME if (run / NAME).exists() else run / "checkpoint.pt"
    sources = sorted(Path(__file__).parents[1].rglob("*.py"))
    files = [network, *([pinned / NAME] if pinned else []), *sources]
    digests = [digest_of(file) if file.is_file() else "" for file in files]
    libraries = [installed(name) for name in LIBRARIES]
    return digest_of_json([digests, str(data.absolute()), cores(), libraries])


def check_libraries() -> None:
    """Raise PublishError if the libraries, which affect golden sets, are not those that serve."""
    files = list(PINS.glob("requirements*.txt"))
    if not files:
        raise PublishError(
            f"{PINS} is missing, which pins the serving libraries:"
            " publish with the npair of a checkout (make install)"
        )
    if missing := [name for name in LIBRARIES if not [*distributions(name=name)]]:
        raise PublishError(
            f"{', '.join(missing)} is missing here; run: make install, on x86-64, where versions"
            " for Arm are published as well"
        )
    for name in LIBRARIES:
        pattern = re.compile(rf"^{name}==([^\s;+]+)", re.MULTILINE)
        for pin in filter(None, (pattern.search(file.read_text()) for file in files)):
            if pin[1] != (here := installed(name).partition("+")[0]):
                raise PublishError(
                    f"{name} is {here} here and {pin[1]} where versions are served;"
                    " run: make install"
                )


def _hits(pinned: Path, dataset: Dataset) -> Hits:
    """Embed val and its gallery by a version's own code."""
    with published_code(pinned) as code:
        embedder = code.Embedder(pinned, cores=cores())
    hits = embed_split("", dataset, "val", embedding(embedder)).hits()
    embedder.close()
    return {kind: found.tolist() for kind, found in hits.items()}


def _costs(pinned: Path, folder: Path, dataset: Dataset) -> dict[str, Any]:
    """Measure both versions on this machine: milliseconds per photo, from its bytes on; bytes."""
    with published_code(pinned) as code:
        old, new = code.Embedder(pinned, cores=cores()), Embedder(folder, cores=cores())
    photos = [read_photo(path) for path in dataset.train.paths[:TIMED_PHOTOS]]
    costs = milliseconds(
        {
            "old": partial(old.embed_photos, limits=UNLIMITED),
            "new": partial(new.embed_photos, limits=UNLIMITED),
        },
        photos,
    )
    old.close()
    new.close()
    sizes = [
        sum(path.stat().st_size for path in each.rglob("*") if path.is_file())
        for each in (pinned, folder)
    ]
    return {"milliseconds": [costs["old"], costs["new"]], "bytes": sizes}


def _mean(hits: Sequence[bool]) -> float:
    return float(np.mean(hits))


def embedding(embedder: Any) -> Callable[[Photos], Vectors]:
    """Return a function that embeds photo files with a version's own decoder."""

    def embed(photos: Photos) -> Vectors:
        vectors: list[Any] = []
        for start in range(0, len(photos), TIMED_PHOTOS):
            part = [read_photo(path) for path in photos.paths[start : start + TIMED_PHOTOS]]
            vectors.extend(embedder.embed_photos(part, UNLIMITED))
        return np.stack(vectors)

    return embed
