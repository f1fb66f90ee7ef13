"""A trained network as a version folder for Triton: code, graphs, golden set, metrics, manifest."""

from __future__ import annotations

import contextlib
import importlib.metadata
import shutil
import sys
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path

import torch

import npair.serving
from npair.data.dataset import Dataset
from npair.data.pixels import decode_dataset
from npair.data.sources import read_dataset
from npair.networks.network import EMBEDDING_DIM, EmbeddingNetwork, build_network
from npair.publishing import PublishError
from npair.publishing.golden import write_golden
from npair.publishing.graphs import ENGINES, REFERENCE, choose, export, staged_engines, write_graphs
from npair.serving import code_of
from npair.serving.engine import EngineError, cores, cpu_info, refuse_pickles
from npair.serving.manifest import NAME, Embedding, Manifest
from npair.training.checkpoint import load_network
from npair.training.run import TrainConfig, git_commit, read_run

SCHEMA = 3
CODE = tuple(path.name for path in code_of("model"))
LIBRARIES = ("torch", "openvino", "numpy", "pillow", "simplejpeg", "cykooz-resizer")


def write_version(
    folder: Path,
    run: Path,
    data: Path,
    cache: Path,
    *,
    model: str,
    version: int,
    say: Callable[[str], None],
) -> tuple[Dataset, Manifest]:
    """Write a version into an empty folder, scored on val by the code that will serve it.

    run: the folder of the run whose averaged weights are published, or of an earlier version, to
    publish its network with the present serving code.
    data: the data set of the run; without val, the version has no metrics and no thresholds.
    say: called with a sentence for each stage.
    Returns: the cleaned data set, and the manifest.
    Raises: PublishError, RunError, DataError, VersionError.
    """
    training = read_run(run)
    network = restore(run) if (run / NAME).exists() else load_network(run)
    config = TrainConfig(**training["train"])
    preprocessing = config.preprocessing()
    dataset = read_dataset(
        data, split_by=config.split_by, val_share=config.val_share, seed=config.seed
    )
    dataset, pixels, _ = decode_dataset(dataset, preprocessing, cache)
    if dataset.fingerprint() != training["data"]["fingerprint"]:
        raise PublishError(f"{run} was not trained on {data}")
    for name in CODE:
        shutil.copyfile(Path(npair.serving.__path__[0]) / name, folder / name)
    say("exporting the network, and quantising it to int8")
    export(network, preprocessing.size, folder / ENGINES[REFERENCE]["graph"])
    with contextlib.redirect_stdout(sys.stderr):  # progress bars
        failed = write_graphs(folder, pixels.array[pixels.of(dataset.train)])
    engines, refused = staged_engines(failed)
    manifest = Manifest(
        schema=SCHEMA,
        model=model,
        version=version,
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        git_commit=git_commit(),
        libraries={name: importlib.metadata.version(name) for name in LIBRARIES},
        engines=engines,
        engines_refused=refused,
        preprocessing=preprocessing,
        embedding=Embedding(EMBEDDING_DIM),
        training=training,
        golden=write_golden(folder, network, preprocessing),
        files={},
    )
    manifest.write(folder)
    say(f"measuring the cost and recall of {', '.join(engines)}")
    choice = choose(folder, engines, dataset, pixels)
    manifest.engines = choice.engines
    manifest.engines_refused = refused | choice.refused
    manifest.engines_measured_on = (
        f"{cores()} cores of {cpu_info('model name') or 'an unknown CPU'}"
    )
    # For readers who see answers but not the engine that gave them.
    manifest.golden.tolerance = max(engine.tolerance for engine in choice.engines.values())
    if choice.compared:
        evaluation = choice.compared.evaluate()
        manifest.metrics = {"val": evaluation.as_dict()}
        manifest.thresholds = evaluation.thresholds()
    used = {engine.graph for engine in choice.engines.values()}
    for graph in {engine["graph"] for engine in ENGINES.values()} - used:
        for path in ((folder / graph), (folder / graph).with_suffix(".bin")):
            path.unlink(missing_ok=True)
    manifest.write(folder)
    return dataset, manifest


def restore(version: Path) -> EmbeddingNetwork:
    """Restore the network of a version.

    Raises: PublishError, RunError; VersionError if the folder differs from the published one.
    """
    Manifest.read(version).check(version)
    graph = version / ENGINES[REFERENCE]["graph"]
    try:
        refuse_pickles(graph)
    except EngineError as error:
        raise PublishError(str(error)) from error
    network = build_network(read_run(version)["network"])
    network.load_state_dict(torch.export.load(graph).state_dict)
    return network.eval()
