"""Tell what OpenVINO makes of a version's graphs on this processor, at each precision asked for.

Prints how far golden embeddings come out from the published ones, and by which kernels the
convolutions run. It needs only what serves: `precisions.py MODEL_FOLDER/VERSION`.
"""

from __future__ import annotations

import collections
import importlib
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np

HINTS = {"network.xml": ("f32", "f16", "bf16"), "network-int8.xml": ("f32", "f16")}


def main(folder: Path) -> None:
    package = types.ModuleType("version")
    package.__path__ = [str(folder)]
    sys.modules["version"] = package
    embedder, engine, preprocess = (
        importlib.import_module(f"version.{name}") for name in ("embedder", "engine", "preprocess")
    )
    manifest = embedder.Manifest.read(folder)
    photos, published = manifest.golden.read(folder)
    pixels = [
        preprocess.decode(photo, manifest.preprocessing, embedder.UNLIMITED) for photo in photos
    ]
    core = engine.import_openvino().Core()
    print("OpenVINO here:", *core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"))
    for graph, hints in HINTS.items():
        for hint in hints:
            compiled = compile_graph(core, folder / graph, hint)
            vectors = embedder.unit(np.concatenate([compiled([each[None]])[0] for each in pixels]))
            distance = np.linalg.norm(vectors - published, axis=1).max()
            used = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
            print(f"{graph}, {hint} asked for, {used} used: golden distance {distance:.4f}")
            for kernel, count in kernels(compiled).most_common():
                print(f"    {count} convolutions by {kernel}", flush=True)


def compile_graph(core: Any, graph: Path, hint: str) -> Any:
    model = core.read_model(graph)
    model.reshape([1, *list(model.input().partial_shape)[1:]])
    return core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": hint})


def kernels(compiled: Any) -> collections.Counter[str]:
    found = (node.get_rt_info() for node in compiled.get_runtime_model().get_ordered_ops())
    return collections.Counter(
        str(info["primitiveType"].value)
        for info in found
        if info["layerType"].value == "Convolution"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
