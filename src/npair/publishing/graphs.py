"""The engines that a version may use: a graph for each, and the choice among them by what each costs and what it finds."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sized
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from npair.data.dataset import Dataset, Photos
from npair.data.pixels import Pixels
from npair.scoring.evaluate import Comparison, compare
from npair.scoring.retrieval import Vectors
from npair.serving.embedder import Embedder
from npair.serving.engine import BATCH, EngineError, cores, cpu_info, import_openvino

openvino = import_openvino()
os.environ["NNCF_CI"] = "1"  # else it would tell its maker of its use, over the network
import nncf  # noqa: E402
from nncf.quantization.range_estimator import RangeEstimatorParametersSet  # noqa: E402

Manifest = dict[str, Any]

REFERENCE = "torch"
# The libraries that compute them, their graphs and precisions, as the manifest has them.
ENGINES: dict[str, dict[str, Any]] = {
    "openvino-int8": {"library": "openvino", "graph": "network-int8.xml", "precision": "int8"},
    "openvino-bf16": {"library": "openvino", "graph": "network.xml", "precision": "bf16"},
    "openvino-fp32": {"library": "openvino", "graph": "network.xml", "precision": "fp32"},
    REFERENCE: {"library": "torch", "graph": "network.pt2", "precision": "fp32"},
}
ALLOWED_DROP = 0.005  # of Recall@1 on val, below the reference's
CALIBRATION_PHOTOS = 300

# Kernels differ between instruction sets, and so does rounding. These settings make torch compute as on an older CPU.
INSTRUCTION_SETS: dict[str, dict[str, str]] = {
    "sse4.1": {"ONEDNN_MAX_CPU_ISA": "SSE41", "ATEN_CPU_CAPABILITY": "default"},
    "avx2": {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"},
}
# How much farther off than any of them another CPU may be: in fp32 still far from what a wrong weight does, in the others as far as
# rounding can take it.
MARGINS = {"fp32": 10.0, "bf16": 2.0, "int8": 1.5}
# 1e-4 between unit vectors is a cosine of 0.999999995: far above rounding in fp32, far below what a wrong weight or decoder does.
SMALLEST_TOLERANCE = 1e-4
UNMEASURED = 2.0  # the largest distance between unit vectors: accepts any


class EnginesError(RuntimeError):
    """A staged version that its own code does not serve as it should."""


def write_graphs(folder: Path, photos: npt.NDArray[np.uint8]) -> dict[str, str]:
    """Write the graphs of the other engines beside the reference's.

    photos: uint8 [N, size, size, 3], from the train split, by which the ranges of int8 are set.
    Returns: the engines that have no graph, each with the reason.
    """
    nncf.set_log_level(logging.ERROR)
    chosen = photos[
        np.linspace(0, len(photos) - 1, min(len(photos), CALIBRATION_PHOTOS)).astype(int)
    ]
    failed = {}
    try:
        model = openvino.convert_model(torch.export.load(folder / ENGINES[REFERENCE]["graph"]))
        model.reshape([-1, *photos.shape[1:]])
        openvino.save_model(
            model, folder / ENGINES["openvino-fp32"]["graph"], compress_to_fp16=True
        )
    except Exception as error:  # of any kind, where an operation of the network is not known
        reason = f"OpenVINO cannot take the graph: {error}"
        return {name: reason for name in ENGINES if name != REFERENCE}
    try:
        data = nncf.Dataset(list(chosen[:, None]))
        # Ranges by histogram and biases corrected layer by layer take half a minute, and come far closer to the reference than
        # NNCF's defaults.
        quantised = nncf.quantize(
            model,
            data,
            preset=nncf.QuantizationPreset.MIXED,
            subset_size=len(chosen),
            fast_bias_correction=False,
            advanced_parameters=nncf.AdvancedQuantizationParameters(
                activations_range_estimator_params=RangeEstimatorParametersSet.HISTOGRAM,
                overflow_fix=nncf.OverflowFix.DISABLE,  # for CPUs without VNNI, which int8 is not used on
            ),
        )
        openvino.save_model(
            quantised, folder / ENGINES["openvino-int8"]["graph"], compress_to_fp16=False
        )
    except Exception as error:
        failed["openvino-int8"] = f"NNCF cannot quantise the graph: {error}"
    return failed


def choose(folder: Path, manifest: Manifest, dataset: Dataset, pixels: Pixels) -> Comparison | None:
    """Measure the engines that a staged manifest names, and let it name those that the version may use, the fastest first.

    bf16 and int8 may be used where their Recall@1 on val is no more than ALLOWED_DROP below the reference's, for fine labels and
    for coarse ones; without val there is nothing to judge them by.
    Returns: val and its gallery, embedded by the fastest. Raises: EnginesError, VersionError.
    """
    older = {
        name: reference_distance(folder, settings) for name, settings in INSTRUCTION_SETS.items()
    }
    embedders: dict[str, Embedder] = {}
    refused: Manifest = manifest["engines_refused"]
    for name in manifest["engines"]:
        try:
            embedders[name] = Embedder(folder, cores=cores(), engine=name)
        except (EngineError, ArithmeticError) as error:
            refused[name] = {**ENGINES[name], "reason": str(error)}
    if REFERENCE not in embedders:
        raise EnginesError(f"the exported graph does not work: {refused[REFERENCE]['reason']}")
    if not (off := embedders[REFERENCE].golden_distance) <= SMALLEST_TOLERANCE:
        raise EnginesError(
            f"the exported graph is not the network: its golden embeddings are off by {off:.2g}"
        )
    costs = milliseconds(
        {name: each.embed for name, each in embedders.items()},
        pixels.array[pixels.of(dataset.train)][: 8 * BATCH * cores()],
    )
    comparisons = (
        {name: _compare(embedder, dataset, pixels) for name, embedder in embedders.items()}
        if dataset.val
        else {}
    )
    recalls = {name: compared.recall_at_1() for name, compared in comparisons.items()}

    def refusal(name: str) -> str:
        if ENGINES[name]["precision"] == "fp32":
            return ""
        if not recalls:
            return "without val photos, nothing tells what it finds"
        drop = max(recalls[REFERENCE][kind] - recall for kind, recall in recalls[name].items())
        return f"Recall@1 on val is {drop:.4f} below the reference's" if drop > ALLOWED_DROP else ""

    kept: Manifest = {}
    for name in sorted(embedders, key=costs.__getitem__):
        measured = (older if name == REFERENCE else {}) | {
            "native": embedders[name].golden_distance
        }
        entry = {
            **ENGINES[name],
            "milliseconds": costs[name],
            "recall_at_1": recalls.get(name),
            "golden_distances": measured,
        }
        if reason := refusal(name):
            refused[name] = {**entry, "reason": reason}
        else:
            margin = MARGINS[ENGINES[name]["precision"]]
            kept[name] = {
                **entry,
                "tolerance": max(margin * max(measured.values()), SMALLEST_TOLERANCE),
            }
    manifest["engines"], manifest["engines_measured_on"] = (
        kept,
        f"{cores()} cores of {cpu_info('model name') or 'an unknown CPU'}",
    )
    return comparisons.get(next(iter(kept)))


def milliseconds(calls: Mapping[str, Callable[[Any], object]], photos: Sized) -> dict[str, float]:
    """Milliseconds a photo of calls with all photos: the least of five interleaved rounds, since other work only adds to it."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(5):
        for name, call in calls.items():
            began = time.perf_counter()
            call(photos)
            times[name].append(1e3 * (time.perf_counter() - began) / len(photos))
    return {name: round(min(rounds), 3) for name, rounds in times.items()}


def reference_distance(folder: Path, environment: dict[str, str]) -> float:
    """How far the reference engine's golden set is off in a new process with these variables.

    Raises: EnginesError where the version fails there.
    """
    command = [
        sys.executable,
        "-m",
        "npair",
        "verify",
        str(folder),
        "--json",
        "--engine",
        REFERENCE,
    ]
    result = subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    if result.returncode:
        why = result.stderr.strip() or f"exit code {result.returncode}"
        raise EnginesError(f"the exported version fails its verification with {environment}: {why}")
    distance: float = json.loads(result.stdout)["versions"][str(folder)][REFERENCE][
        "golden_distance"
    ]
    return distance


def _compare(embedder: Embedder, dataset: Dataset, pixels: Pixels) -> Comparison:
    """The val photos and those that they are compared with, embedded by the code that will serve."""

    def embed(photos: Photos) -> Vectors:
        return embedder.embed(pixels.array[pixels.of(photos)])

    return compare("the published code", dataset, "val", embed)
