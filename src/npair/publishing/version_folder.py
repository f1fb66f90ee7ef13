"""A trained network as a version folder that Triton can serve: exported graph, golden set, metrics, manifest."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.export import Dim

import npair.serving
from npair.data.dataset import Dataset
from npair.data.pixels import decode_dataset, decode_photos
from npair.data.sources import read_dataset
from npair.networks.network import EMBEDDING_DIM, EmbeddingNetwork, build_network, embed
from npair.publishing.drawings import draw, encode
from npair.publishing.graphs import ENGINES, REFERENCE, UNMEASURED, Manifest, choose, write_graphs
from npair.serving.embedder import read_manifest, verify_files
from npair.serving.engine import EngineError, refuse_pickles
from npair.serving.preprocess import Preprocessing
from npair.training.checkpoint import load_network
from npair.training.run import TrainConfig, git_commit, read_run

SCHEMA = 3
CODE = (
    *("model.py", "embedder.py", "engine.py"),
    *("text.py", "preprocess.py", "jpeg.py", "png.py", "metadata.py", "colour.py", "refusal.py"),
)
LIBRARIES = ("torch", "openvino", "numpy", "pillow", "simplejpeg", "cykooz-resizer")
MAX_BATCH = 64


class PublishError(RuntimeError):
    """A network that must not be published; nothing was written."""


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
    """Write a version into an empty folder: a run's averaged network, scored on val of ``data`` by the code that will serve it.

    run: its folder, or that of an earlier version, whose network is then published anew with the present serving code.
    Without a val split, it has no metrics and no thresholds.
    say: is told what is being done.
    Returns: the data set without what its findings left out, and the manifest.
    Raises: PublishError, RunError, DataError, EnginesError, VersionError.
    """
    training = read_run(run)
    network = restore(run) if (run / "manifest.json").exists() else load_network(run)
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
    manifest: Manifest = {
        "schema": SCHEMA,
        "model": model,
        "version": version,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "git_commit": git_commit(),
        "libraries": {name: importlib.metadata.version(name) for name in LIBRARIES},
        "engines": {
            name: {**engine, "tolerance": UNMEASURED}
            for name, engine in ENGINES.items()
            if name not in failed
        },
        "engines_refused": {
            name: {**ENGINES[name], "reason": reason} for name, reason in failed.items()
        },
        "preprocessing": asdict(preprocessing),
        "embedding": {"dimension": EMBEDDING_DIM},
        "training": training,
        "golden": write_golden(folder, network, preprocessing) | {"tolerance": UNMEASURED},
        "files": {},
    }
    write_manifest(folder, manifest)
    say(f"measuring what {', '.join(manifest['engines'])} cost and find")
    compared = choose(folder, manifest, dataset, pixels)
    # For those who see only answers, and not which engine gave them.
    manifest["golden"]["tolerance"] = max(
        engine["tolerance"] for engine in manifest["engines"].values()
    )
    if compared:
        evaluation = compared.evaluate()
        manifest["metrics"] = {"val": evaluation.as_dict()}
        manifest["thresholds"] = evaluation.thresholds()
    used = {engine["graph"] for engine in manifest["engines"].values()}
    for graph in {engine["graph"] for engine in ENGINES.values()} - used:
        for path in ((folder / graph), (folder / graph).with_suffix(".bin")):
            path.unlink(missing_ok=True)
    write_manifest(folder, manifest)
    return dataset, manifest


def restore(version: Path) -> EmbeddingNetwork:
    """The network of a version's folder. Raises: PublishError, RunError, VersionError where it is not as it was published."""
    verify_files(version, read_manifest(version))
    graph = version / ENGINES[REFERENCE]["graph"]
    try:
        refuse_pickles(graph)
    except EngineError as error:
        raise PublishError(str(error)) from error
    network = build_network(read_run(version)["network"])
    network.load_state_dict(torch.export.load(graph).state_dict)
    return network.eval()


def export(network: EmbeddingNetwork, size: int, path: Path) -> None:
    """Write the graph (uint8 [N, size, size, 3] -> fp32 [N, D], 1 <= N <= MAX_BATCH) with weights as raw bytes, nothing pickled."""
    example = torch.zeros(2, size, size, 3, dtype=torch.uint8)
    batch = Dim("batch", min=1, max=MAX_BATCH)
    with torch.no_grad():
        program = torch.export.export(network.eval(), (example,), dynamic_shapes=({0: batch},))
    program.example_inputs = None  # they alone would be pickled
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # it names folders of the machine that publishes
    torch.export.save(program, path)


def write_golden(
    folder: Path, network: EmbeddingNetwork, preprocessing: Preprocessing
) -> dict[str, Any]:
    """Draw a few photos, one for each way through the decoder, with their fp32 embeddings; returns the manifest's entry."""
    turned = Image.Exif()
    turned[0x0112] = 6
    cut_out = draw(1, 0)
    cut_out.putalpha(
        Image.radial_gradient("L").resize(cut_out.size).point(lambda level: 255 - level)
    )
    golden = folder / "golden"
    golden.mkdir()
    photos = {
        "photo.jpg": encode(draw(0, 0), "JPEG", quality=90),
        "turned.jpg": encode(draw(2, 0).resize((480, 360)), "JPEG", quality=90, exif=turned),
        "grey.png": encode(draw(3, 0).convert("L"), "PNG"),
        "cut-out.webp": encode(cut_out, "WEBP", lossless=True),
    }
    for name, photo in photos.items():
        (golden / name).write_bytes(photo)
    paths = [golden / name for name in photos]
    np.save(golden / "embeddings.npy", embed(network, decode_photos(paths, preprocessing)))
    return {
        "photos": [str(path.relative_to(folder)) for path in paths],
        "embeddings": "golden/embeddings.npy",
    }


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """With the hashes of all other files."""
    manifest["files"] = {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "manifest.json"
    }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
