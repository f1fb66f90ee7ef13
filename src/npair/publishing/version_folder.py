"""A trained network as a version folder for Triton: code, graphs, golden set, metrics, manifest."""

from __future__ import annotations

import contextlib
import importlib.metadata
import shutil
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import npair.serving
from npair.data.dataset import Dataset, HoldOut
from npair.data.pixels import Pixels, decode_dataset
from npair.data.sources import read_dataset
from npair.networks.network import EMBEDDING_DIM, EmbeddingNetwork, build_network
from npair.publishing import PublishError
from npair.publishing.gates import Hits
from npair.publishing.golden import write_golden
from npair.publishing.graphs import (
    ENGINES,
    REFERENCE,
    Choice,
    calibration_rows,
    choose,
    export,
    reference_hits,
    staged_engines,
    write_graphs,
)
from npair.releasing.verify import SCHEMA
from npair.serving import code_of
from npair.serving.engine import EngineError, cores, cpu_info, refuse_pickles
from npair.serving.manifest import (
    NAME,
    Embedding,
    Golden,
    Manifest,
    Preprocessing,
)
from npair.training.checkpoint import load_network
from npair.training.run import TrainConfig, git_commit, read_run
from npair.training.whitening import fit_embedding

CODE = tuple(path.name for path in code_of("model"))
LIBRARIES = ("torch", "openvino", "numpy", "pillow", "simplejpeg", "cykooz-resizer")


@dataclass(frozen=True)
class Source:
    """What a version is made of.

    training: the run's config.json. pixels: of the photos of the cleaned data set, decoded as they
    will be served.
    """

    training: dict[str, Any]
    network: EmbeddingNetwork
    preprocessing: Preprocessing
    dataset: Dataset
    pixels: Pixels


def read_source(run: Path, data: Path, cache: Path) -> Source:
    """Read a run, or an earlier version, and the data set that it was trained on.

    Raises: PublishError, RunError, DataError, VersionError.
    """
    training = read_run(run)
    published = (run / NAME).exists()
    network = restore(run) if published else load_network(run)
    config = TrainConfig(**training["train"])
    training["train"] = asdict(config)
    preprocessing = config.preprocessing()
    hold_out = HoldOut.of(config)
    dataset, pixels, _ = decode_dataset(read_dataset(data), preprocessing, cache, hold_out)
    if dataset.fingerprint() != training["data"]["fingerprint"]:
        raise PublishError(f"{run} was not trained on {data}; name the data that it was trained on")
    # Versions from before this option have the layer that was trained.
    if published and config.embedding_layer == "whitened":
        fit_embedding(network, pixels, dataset.train)
    return Source(training, network, preprocessing, dataset, pixels)


@dataclass(frozen=True)
class Staging:
    """A folder that is to become a version, and what it is made of. Raises: as each step does."""

    folder: Path
    source: Source
    model: str
    version: int

    def reference(self) -> dict[str, Any]:
        """Write the serving code, the reference graph and the golden set, and embed val.

        Returns: ``golden``, the fields of manifest.Golden, and ``hits``.
        Raises: PublishError, VersionError.
        """
        source = self.source
        for name in CODE:
            shutil.copyfile(Path(npair.serving.__path__[0]) / name, self.folder / name)
        graph = self.folder / ENGINES[REFERENCE]["graph"]
        export(source.network, source.preprocessing.size, graph)
        golden = write_golden(self.folder, source.network, source.preprocessing)
        self.describe(golden, dict.fromkeys(ENGINES.keys() - {REFERENCE}, "not yet converted"))
        hits = reference_hits(self.folder, source.dataset, source.pixels)
        return {"golden": asdict(golden), "hits": hits}

    def graphs(self) -> dict[str, str]:
        """Write the other graphs. Returns: why an engine has none, by its name."""
        rows = self.source.pixels.of(self.source.dataset.train)
        rows = rows[calibration_rows(len(rows))]
        with contextlib.redirect_stdout(sys.stderr):  # progress bars
            return write_graphs(self.folder, self.source.pixels.array[rows])

    def describe(self, golden: Golden, failed: Mapping[str, str]) -> Manifest:
        """Write a manifest without measurements, and return it. failed: as graphs returns it."""
        engines, refused = staged_engines(failed)
        manifest = Manifest(
            schema=SCHEMA,
            model=self.model,
            version=self.version,
            created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            git_commit=git_commit(),
            libraries={name: importlib.metadata.version(name) for name in LIBRARIES},
            engines=engines,
            engines_refused=refused,
            preprocessing=self.source.preprocessing,
            embedding=Embedding(EMBEDDING_DIM),
            training=self.source.training,
            golden=golden,
            files={},
        )
        manifest.write(self.folder)
        return manifest

    def choose(self, manifest: Manifest, reference: Hits) -> Choice:
        """Measure the engines. Raises: PublishError, VersionError."""
        source = self.source
        return choose(self.folder, manifest.engines, source.dataset, source.pixels, reference)

    def complete(self, manifest: Manifest, choice: Choice) -> None:
        """Complete and write the manifest, and remove the graphs that no engine uses."""
        manifest.engines, manifest.metrics = choice.engines, choice.metrics
        manifest.engines_refused = manifest.engines_refused | choice.refused
        manifest.thresholds = choice.thresholds
        manifest.engines_measured_on = (
            f"{cores()} cores of {cpu_info('model name') or 'an unknown CPU'}"
        )
        # For readers who see answers but not the engine that gave them.
        manifest.golden.tolerance = max(engine.tolerance for engine in choice.engines.values())
        used = {engine.graph for engine in choice.engines.values()}
        for graph in {engine["graph"] for engine in ENGINES.values()} - used:
            for path in ((self.folder / graph), (self.folder / graph).with_suffix(".bin")):
                path.unlink(missing_ok=True)
        manifest.write(self.folder)


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
