"""Why OpenVINO and simplejpeg: compare engines and JPEG decoders on one core.

    PYTHONPATH=model/api .venv/bin/python benchmarks/alternatives.py --photos data/grocery

The alternatives are installed into their own environment. Prints two tables in Markdown:
milliseconds per photo, the least of five interleaved rounds; Recall@1 on val; and the megabytes of
the installed packages without their dependencies. Recall@1 of npair's engines, and of all that
compute the same as its reference, is the manifest's.

Needs: Linux, the .venv of `make install`, g++ for torch.compile and, the first time, a package
index.
"""

from __future__ import annotations

import io
import logging
import operator
import os
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import import_module, metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from machine import ROOT, VERSION, command_line, python_of, say
from PIL import Image, ImageOps
from torch import nn

from npair.data.dataset import Dataset
from npair.data.files import parallel_map, read_photo
from npair.data.sources import read_dataset
from npair.scoring.evaluate import embed_split
from npair.serving.embedder import UNLIMITED, Embedder, unit
from npair.serving.engine import BATCH, EngineError, cores, load_graph
from npair.serving.preprocess import Preprocessing, decode

CALIBRATION_PHOTOS, TIMED_PHOTOS = 100, 12
SMALLEST_TOLERANCE = (
    1e-4  # as in npair.publishing.graphs: a distance that fp32 rounding does not reach
)
HEAD = "| Recall@1 fine | coarse | MB |"
Pixels = npt.NDArray[np.uint8]
Engine = Callable[[Pixels], npt.NDArray[np.float32]]
Decoder = Callable[[bytes], Pixels]


def main() -> None:
    parser = command_line(__doc__, "the data set that the version was trained on")
    arguments = parser.parse_args()
    python = python_of("alternatives", ROOT / ".venv/peers")
    if Path(sys.executable) != python:
        # Given to torch.compile as an option, freezing would come too late for its tracer.
        settings = {
            "PYTHONPATH": f"{ROOT}/src:{ROOT}/model/api",
            "OMP_NUM_THREADS": "1",
            "TORCHINDUCTOR_FREEZING": "1",
        }
        os.execve(python, [str(python), *sys.argv], os.environ | settings)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    dataset = read_dataset(arguments.photos)
    embedder = Embedder(VERSION, cores=cores())
    if dataset.fingerprint() != embedder.manifest.training["data"]["fingerprint"]:
        sys.exit(
            f"{arguments.photos} is not the data set that the version was trained on, so the "
            "Recall@1 of its manifest cannot be compared"
        )
    photos = {path: read_photo(path) for split in dataset.splits.values() for path in split.paths}
    decoders, network = (
        decoders_of(embedder.preprocessing),
        partial(embedder.network, all_cores=False),
    )
    costs = least(
        {name: (decoder, list(photos.values())[::30]) for name, (decoder, _) in decoders.items()}
    )
    rows = []
    for name, (decoder, packages) in decoders.items():
        pixels = dict(
            zip(photos, parallel_map(decoder, list(photos.values()), "decode"), strict=True)
        )
        recall = recall_at_1(embedder, network, dataset, pixels)
        rows.append(row(name, [costs[name]], recall, packages))
    print(
        f"| decoder, before {embedder.engine} | ms a photo {HEAD}\n|" + " --- |" * 5,
        *rows,
        sep="\n",
        flush=True,
    )

    # From here on, use the pixels of the last decoder, npair's.
    chosen = np.linspace(0, len(dataset.train) - 1, CALIBRATION_PHOTOS).astype(int)
    calibration = np.stack([pixels[dataset.train.paths[row]] for row in chosen])
    engines, known = engines_of(embedder, calibration), embedder.manifest.engines
    parts = {n: [calibration[i : i + n] for i in range(0, TIMED_PHOTOS, n)] for n in (1, BATCH)}
    costs = least(
        {f"{name} {n}": (engine, parts[n]) for name, (engine, _) in engines.items() for n in parts}
    )
    reference, rows = unit(engines["npair: torch"][0](parts[BATCH][0])), []
    for name, (engine, packages) in engines.items():
        distance = np.linalg.norm(unit(engine(parts[BATCH][0])) - reference, axis=1).max()
        same = known.get(name.removeprefix("npair: ")) or (
            known["torch"] if distance < SMALLEST_TOLERANCE else None
        )
        recall = (same and same.recall_at_1) or recall_at_1(embedder, engine, dataset, pixels)
        alone, together = (costs[f"{name} {n}"] / n for n in parts)
        rows.append(row(name, [alone, together], recall, packages))
    print(f"\n| engine | ms a photo | {BATCH} at a time {HEAD}\n|" + " --- |" * 6, *rows, sep="\n")


def decoders_of(preprocessing: Preprocessing) -> dict[str, tuple[Decoder, Sequence[str]]]:
    cv2, full, opencv = (
        import_module("cv2"),
        import_module("simplejpeg").decode_jpeg,
        "opencv-python-headless",
    )
    cv2.setNumThreads(1)
    size, resample = (
        (preprocessing.size, preprocessing.size),
        Image.Resampling[preprocessing.resample],
    )
    eighths = partial(
        full, min_height=preprocessing.size, min_width=preprocessing.size, min_factor=1
    )

    def pillow(photo: bytes) -> Pixels:
        image = Image.open(io.BytesIO(photo))
        image.draft(None, size)
        return np.asarray(ImageOps.fit(image.convert("RGB"), size, resample))

    def fit(pixels: Pixels) -> Pixels:
        return np.asarray(ImageOps.fit(Image.fromarray(pixels), size, resample))

    def resize(pixels: Pixels, interpolation: int) -> Pixels:
        side = min(pixels.shape[:2])
        top, left = ((length - side) // 2 for length in pixels.shape[:2])
        resized: Pixels = cv2.resize(
            pixels[top : top + side, left : left + side], size, interpolation=interpolation
        )
        return resized

    def imdecode(photo: bytes) -> Pixels:
        return resize(
            cv2.imdecode(np.frombuffer(photo, np.uint8), cv2.IMREAD_COLOR_RGB), cv2.INTER_AREA
        )

    return {
        "Pillow": (pillow, ["pillow"]),
        "simplejpeg, then Pillow": (lambda photo: fit(full(photo)), ["simplejpeg", "pillow"]),
        "OpenCV, area": (imdecode, [opencv]),
        "simplejpeg by eighths, then OpenCV": (
            lambda photo: resize(eighths(photo), cv2.INTER_LINEAR),
            ["simplejpeg", opencv],
        ),
        "simplejpeg by eighths, then Pillow": (
            lambda photo: fit(eighths(photo)),
            ["simplejpeg", "pillow"],
        ),
        "npair: simplejpeg by eighths, then cykooz-resizer": (
            partial(decode, preprocessing=preprocessing, limits=UNLIMITED),
            ["simplejpeg", "cykooz-resizer", "pillow"],
        ),
    }


def engines_of(embedder: Embedder, calibration: Pixels) -> dict[str, tuple[Engine, Sequence[str]]]:
    """The engines by name, each on one thread, with the packages that it needs."""
    engines: dict[str, tuple[Engine, Sequence[str]]] = {}
    for name, entry in embedder.manifest.engines.items():
        try:
            engine = load_graph(
                entry.library, embedder.folder / entry.graph, entry.precision, threads=1, cores=1
            )
            engines[f"npair: {name}"] = partial(engine, all_cores=False), [entry.library]
        except EngineError as error:
            say(f"without {name}: {error}")
    graph = embedder.folder / "network.pt2"
    if shutil.which(os.environ.get("CXX", "g++")):
        engines["torch.compile, fp32"] = compiled(torch.export.load(graph).module()), ["torch"]
        engines["torch.compile, int8"] = (
            compiled(torch_int8(graph, calibration)),
            ["torch", "torchao"],
        )
    else:
        say("without torch.compile, which needs g++")
    return engines | onnx_runtime(graph, calibration)


def compiled(module: nn.Module) -> Engine:
    network = torch.inference_mode()(torch.compile(module, dynamic=False))
    return lambda pixels: network(torch.from_numpy(pixels)).numpy()


def torch_int8(graph: Path, calibration: Pixels) -> nn.Module:
    """Static quantisation for x86 as torchao documents it."""
    pt2e = import_module("torchao.quantization.pt2e.quantize_pt2e")
    x86 = import_module("torchao.quantization.pt2e.quantizer.x86_inductor_quantizer")
    module: Any = torch.export.load(graph).module()
    aten = torch.ops.aten
    sources = {
        aten.conv2d.default: nn.Conv2d,
        aten.relu.default: nn.ReLU,
        aten.add.Tensor: operator.add,
    }
    for node in list(module.graph.nodes):
        if node.target in sources:  # the quantiser reads it, and a loaded graph has lost it
            node.meta["source_fn_stack"] = [(node.name, sources[node.target])]
        if (
            node.target is aten.conv2d.default
        ):  # the two views share weights, into which it would fold the normalisation twice
            weight = nn.Parameter(operator.attrgetter(node.args[1].target)(module).detach().clone())
            module.register_parameter(f"{node.name}_weight", weight)
            with module.graph.inserting_before(node):
                node.update_arg(1, module.graph.get_attr(f"{node.name}_weight"))
    quantizer = x86.X86InductorQuantizer().set_global(
        x86.get_default_x86_inductor_quantization_config()
    )
    prepared = pt2e.prepare_pt2e(module, quantizer)
    with torch.inference_mode():
        for photo in calibration:
            prepared(torch.from_numpy(photo[None]))
    quantised: nn.Module = pt2e.convert_pt2e(prepared)
    return quantised


def onnx_runtime(graph: Path, calibration: Pixels) -> dict[str, tuple[Engine, Sequence[str]]]:
    onnxruntime, quantization = (
        import_module("onnxruntime"),
        import_module("onnxruntime.quantization"),
    )
    options, rest = onnxruntime.SessionOptions(), ({"photos": photo[None]} for photo in calibration)
    options.intra_op_num_threads = 1
    with tempfile.TemporaryDirectory() as scratch:
        fp32, fused, int8 = (Path(scratch) / f"{name}.onnx" for name in ("fp32", "fused", "int8"))
        torch.onnx.export(torch.export.load(graph), dynamo=True, verbose=False).save(fp32)  # type: ignore[union-attr]
        import_module("onnxruntime.quantization.shape_inference").quant_pre_process(
            fp32, fused, skip_symbolic_shape=True
        )
        # Activations are int8 by default, which takes its kernels twice as long.
        types = {
            "activation_type": quantization.QuantType.QUInt8,
            "weight_type": quantization.QuantType.QInt8,
        }
        quantization.quantize_static(
            fused,
            int8,
            SimpleNamespace(get_next=lambda: next(rest, None)),
            per_channel=True,
            **types,
        )
        sessions = {file.stem: onnxruntime.InferenceSession(file, options) for file in (fp32, int8)}

    def engine(session: Any) -> Engine:
        return lambda pixels: session.run(None, {"photos": pixels})[0]

    return {
        f"ONNX Runtime, {name}": (engine(session), ["onnxruntime"])
        for name, session in sessions.items()
    }


def least(calls: Mapping[str, tuple[Callable[[Any], Any], Sequence[Any]]]) -> dict[str, float]:
    """Milliseconds per call: the least of five interleaved rounds, after one to warm up.

    Other work on the machine only adds time, so the least is the best estimate.
    """
    times: dict[str, list[float]] = {key: [] for key in calls}
    for _ in range(6):
        for key, (function, inputs) in calls.items():
            began = time.perf_counter()
            for value in inputs:
                function(value)
            times[key].append(1e3 * (time.perf_counter() - began) / len(inputs))
    return {key: min(rounds[1:]) for key, rounds in times.items()}


def recall_at_1(
    embedder: Embedder, engine: Engine, dataset: Dataset, pixels: Mapping[Path, Pixels]
) -> dict[str, float]:
    """Recall@1 by fine and coarse labels, with train as the gallery.

    Computed on all cores, which does not change the result.
    """
    embedder.network = lambda pixels, all_cores: engine(pixels)  # noqa: ARG005
    return embed_split(
        "",
        dataset,
        "val",
        lambda some: embedder.embed(np.stack([pixels[path] for path in some.paths])),
    ).recall_at_1()


def row(
    name: str, milliseconds: Sequence[float], recall: Mapping[str, float], packages: Sequence[str]
) -> str:
    files = [
        Path(str(file.locate())) for package in packages for file in metadata.files(package) or ()
    ]
    megabytes = sum(file.stat().st_size for file in files if file.exists()) / 1e6
    times = " | ".join(f"{time:.2f}" for time in milliseconds)
    return f"| {name} | {times} | {recall['fine']:.3f} | {recall['coarse']:.3f} | {megabytes:.0f} |"


if __name__ == "__main__":
    main()
