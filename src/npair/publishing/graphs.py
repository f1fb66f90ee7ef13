"""The graphs of a version: export, conversion, quantisation, and the choice of engines.

An engine is a library that computes a graph at some precision. A version may use those that find
about as much as the reference, the fastest first.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sized
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.export import Dim

from npair.data.dataset import Dataset, Photos
from npair.data.pixels import Pixels
from npair.networks.network import EmbeddingNetwork
from npair.publishing import PublishError
from npair.publishing.gates import Hits, recall_drops
from npair.publishing.golden import UNMEASURED, distance_with
from npair.scoring.evaluate import EmbeddedSplit, embed_split
from npair.scoring.retrieval import Vectors
from npair.serving.embedder import Embedder
from npair.serving.engine import BATCH, EngineError, cores, import_openvino
from npair.serving.manifest import Engine, RefusedEngine

openvino = import_openvino()
os.environ["NNCF_CI"] = "1"  # turns off its telemetry
import nncf  # noqa: E402
from nncf.quantization.range_estimator import RangeEstimatorParametersSet  # noqa: E402
from openvino.tools.ovc.logger import get_logger_state, restore_logger_state  # noqa: E402

REFERENCE = "torch"
# Arguments of manifest.Engine and manifest.RefusedEngine.
ENGINES: dict[str, dict[str, Any]] = {
    "openvino-int8": {"library": "openvino", "graph": "network-int8.xml", "precision": "int8"},
    "openvino-bf16": {"library": "openvino", "graph": "network.xml", "precision": "bf16"},
    "openvino-fp32": {"library": "openvino", "graph": "network.xml", "precision": "fp32"},
    REFERENCE: {"library": "torch", "graph": "network.pt2", "precision": "fp32"},
}
MAX_BATCH = 64
ALLOWED_DROP = 0.005  # of Recall@1 on val, below the reference's
CALIBRATION_PHOTOS = 300

# Kernels, and so rounding, differ between instruction sets. These settings make torch compute as on
# an older CPU.
INSTRUCTION_SETS: dict[str, dict[str, str]] = {
    "sse4.1": {"ONEDNN_MAX_CPU_ISA": "SSE41", "ATEN_CPU_CAPABILITY": "default"},
    "avx2": {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"},
}
# Tolerance, as a multiple of the largest measured distance. In fp32, ten times is still far from
# the effect of a wrong weight; the other two are as far as rounding can go.
MARGINS = {"fp32": 10.0, "bf16": 2.0, "int8": 1.5}
# 1e-4 between unit vectors is a cosine of 0.999999995: far above rounding in fp32, and far below
# the effect of a wrong weight or decoder.
SMALLEST_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Choice:
    """The engines of a version, the fastest first, and those it must not use, by name.

    hits, metrics, thresholds: of val, found by the fastest; empty and None without val.
    doubts: recall drops of engines in use that val cannot tell from chance, in sentences.
    """

    engines: dict[str, Engine]
    refused: dict[str, RefusedEngine]
    hits: Hits
    metrics: dict[str, Any] | None
    thresholds: dict[str, float | None] | None
    doubts: list[str]

    def as_dict(self) -> dict[str, Any]:
        """Return what JSON can hold."""
        return asdict(self)

    @classmethod
    def from_dict(cls, stored: dict[str, Any]) -> Choice:
        """Restore what as_dict returned, also after JSON."""
        engines = {name: Engine(**engine) for name, engine in stored["engines"].items()}
        refused = {name: RefusedEngine(**engine) for name, engine in stored["refused"].items()}
        return cls(**(stored | {"engines": engines, "refused": refused}))


def export(network: EmbeddingNetwork, size: int, path: Path) -> None:
    """Write the reference graph, weights as raw bytes, nothing pickled.

    The graph takes uint8 [N, size, size, 3] to fp32 [N, D], for 1 <= N <= MAX_BATCH.
    """
    example = torch.zeros(2, size, size, 3, dtype=torch.uint8)
    batch = Dim("batch", min=1, max=MAX_BATCH)
    with torch.no_grad():
        program = torch.export.export(network.eval(), (example,), dynamic_shapes=({0: batch},))
    program.example_inputs = None  # would be pickled
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # names folders of this machine
    torch.export.save(program, path)


def write_graphs(folder: Path, photos: npt.NDArray[np.uint8]) -> dict[str, str]:
    """Convert the reference graph for the other engines, and quantise it to int8.

    photos: uint8 [N, size, size, 3], from the train split, for calibration: CALIBRATION_PHOTOS
    are enough.
    Returns: why an engine has no graph, by its name.
    """
    nncf.set_log_level(logging.ERROR)
    log_state = get_logger_state()
    try:
        model = openvino.convert_model(torch.export.load(folder / ENGINES[REFERENCE]["graph"]))
        model.reshape([-1, *photos.shape[1:]])
        path = folder / ENGINES["openvino-fp32"]["graph"]
        openvino.save_model(model, path, compress_to_fp16=True)
    except Exception as error:  # of any kind, if OpenVINO does not know an operation
        restore_logger_state(log_state)  # OpenVINO does so only if it succeeds
        reason = f"OpenVINO cannot take the graph: {error}"
        return {name: reason for name in ENGINES if name != REFERENCE}
    try:
        quantised = _quantised(model, photos)
        path = folder / ENGINES["openvino-int8"]["graph"]
        openvino.save_model(quantised, path, compress_to_fp16=False)
    except Exception as error:
        return {"openvino-int8": f"NNCF cannot quantise the graph: {error}"}
    return {}


def _quantised(model: Any, calibration: npt.NDArray[np.uint8]) -> Any:
    # Histogram ranges and layer-by-layer bias correction take half a minute, and come much closer
    # to the reference than NNCF's defaults.
    return nncf.quantize(
        model,
        nncf.Dataset(list(calibration[:, None])),
        preset=nncf.QuantizationPreset.MIXED,
        subset_size=len(calibration),
        fast_bias_correction=False,
        advanced_parameters=nncf.AdvancedQuantizationParameters(
            activations_range_estimator_params=RangeEstimatorParametersSet.HISTOGRAM,
            # Weights of 7 bits: CPUs without VNNI add pairs of products in 16 bits.
            overflow_fix=nncf.OverflowFix.ENABLE,
        ),
    )


def staged_engines(failed: Mapping[str, str]) -> tuple[dict[str, Engine], dict[str, RefusedEngine]]:
    """Describe the engines to be measured, and the failed ones, each with its reason."""
    engines = {
        name: Engine(**engine, tolerance=UNMEASURED)
        for name, engine in ENGINES.items()
        if name not in failed
    }
    refused = {name: RefusedEngine(**ENGINES[name], reason=why) for name, why in failed.items()}
    return engines, refused


def calibration_rows(count: int) -> npt.NDArray[np.int64]:
    """Spread the photos for ``write_graphs`` evenly over a train split of ``count`` photos."""
    return np.linspace(0, count - 1, min(count, CALIBRATION_PHOTOS)).astype(np.int64)


def reference_hits(folder: Path, dataset: Dataset, pixels: Pixels) -> Hits:
    """Check the reference graph of a staged version, and embed val with it.

    Returns: its hits, empty without val. Raises: PublishError, VersionError.
    """
    embedders, _ = _start(folder, [REFERENCE])
    embedder = embedders[REFERENCE]
    hits = _hits(_embed_val(embedder, dataset, pixels)) if dataset.val else {}
    embedder.close()
    return hits


def choose(
    folder: Path, engines: Iterable[str], dataset: Dataset, pixels: Pixels, reference: Hits
) -> Choice:
    """Measure the engines of a staged version and choose those that it may use.

    bf16 and int8 must not be used if their Recall@1 on val, of fine or of coarse labels, is more
    than ALLOWED_DROP below the reference's and chance does not explain it; without val, they cannot
    be judged.
    reference: what ``reference_hits`` returned.
    Raises: PublishError, VersionError.
    """
    embedders, refused = _start(folder, engines)
    older = {
        name: distance_with(folder, REFERENCE, environment)
        for name, environment in INSTRUCTION_SETS.items()
    }
    photos = pixels.array[pixels.of(dataset.train)[: 8 * BATCH * cores()]]
    costs = milliseconds({name: each.embed for name, each in embedders.items()}, photos)
    embedded = {
        name: _embed_val(embedder, dataset, pixels)
        for name, embedder in embedders.items()
        if dataset.val and name != REFERENCE
    }
    hits: dict[str, Hits] = {name: {} for name in embedders}
    hits |= {name: _hits(split) for name, split in embedded.items()}
    hits[REFERENCE] = reference
    kept: dict[str, Engine] = {}
    doubts: list[str] = []
    for name in sorted(embedders, key=costs.__getitem__):
        distances = (older if name == REFERENCE else {}) | {
            "native": embedders[name].golden_distance
        }
        precision = ENGINES[name]["precision"]
        tolerance = max(MARGINS[precision] * max(distances.values()), SMALLEST_TOLERANCE)
        measured: dict[str, Any] = {
            **ENGINES[name],
            "milliseconds": costs[name],
            "recall_at_1": {kind: float(np.mean(of)) for kind, of in hits[name].items()}
            if dataset.val
            else None,
            "golden_distances": distances,
        }
        found = recall_drops(reference, hits[name], f"the reference, {REFERENCE},", ALLOWED_DROP)
        reason = "; ".join(drop.text for drop in found if drop.proven)
        if precision != "fp32" and not dataset.val:
            reason = "without val photos, its recall is unknown"
        if precision != "fp32" and reason:
            refused[name] = RefusedEngine(**measured, reason=reason)
        else:
            kept[name] = Engine(**measured, tolerance=tolerance)
            doubts += [f"{name}: {drop.text}" for drop in found]
    fastest, metrics, thresholds = next(iter(kept)), None, None
    if dataset.val:
        split = embedded.get(fastest) or _embed_val(embedders[fastest], dataset, pixels)
        evaluation = split.evaluate()
        metrics, thresholds = {"val": evaluation.as_dict()}, evaluation.thresholds()
    for embedder in embedders.values():
        embedder.close()
    return Choice(kept, refused, hits[fastest], metrics, thresholds, doubts)


def _start(
    folder: Path, engines: Iterable[str]
) -> tuple[dict[str, Embedder], dict[str, RefusedEngine]]:
    """Load the engines that run here, and tell why others do not.

    Raises: PublishError if the reference is not among them, or is not the network.
    """
    embedders: dict[str, Embedder] = {}
    refused: dict[str, RefusedEngine] = {}
    for name in engines:
        try:
            embedders[name] = Embedder(folder, cores=cores(), engine=name)
        except (EngineError, ArithmeticError) as error:
            refused[name] = RefusedEngine(**ENGINES[name], reason=str(error))
    if REFERENCE not in embedders:
        raise PublishError(f"the exported graph does not work: {refused[REFERENCE].reason}")
    if not (distance := embedders[REFERENCE].golden_distance) <= SMALLEST_TOLERANCE:
        raise PublishError(
            "the exported graph is not the network: its golden embeddings are off by"
            f" {distance:.2g}"
        )
    return embedders, refused


def milliseconds(calls: Mapping[str, Callable[[Any], object]], photos: Sized) -> dict[str, float]:
    """Time calls that take all photos, in milliseconds per photo.

    Each gets the least of five interleaved rounds, since other load can only add to it.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(5):
        for name, call in calls.items():
            began = time.perf_counter()
            call(photos)
            times[name].append(1e3 * (time.perf_counter() - began) / len(photos))
    return {name: round(min(rounds), 3) for name, rounds in times.items()}


def _embed_val(embedder: Embedder, dataset: Dataset, pixels: Pixels) -> EmbeddedSplit:
    """Embed val and its gallery with the code that will serve."""

    def embed(photos: Photos) -> Vectors:
        return embedder.embed(pixels.array[pixels.of(photos)])

    return embed_split("the published code", dataset, "val", embed)


def _hits(split: EmbeddedSplit) -> Hits:
    return {kind: hits.tolist() for kind, hits in split.hits().items()}
