"""One published version: a folder that is verified before it answers, and then turns photos into embeddings.

Layout of a version folder, all of it listed with SHA-256 in ``manifest.json``::

    model.py embedder.py preprocess.py   the code that serves it
    network.pt2                          the exported graph with its weights: uint8 [N, size, size, 3] -> fp32 [N, D]
    golden/                              photos and, in embeddings.npy, the fp32 reference embeddings of each
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from .preprocess import Limits, Preprocessing, decode

UNLIMITED = Limits(max_bytes=1 << 40, max_pixels=1 << 40)


class VersionError(RuntimeError):
    """A version folder that must not serve; the message says which part of it is wrong."""


class Embedder:
    """A verified version, loaded for inference on the CPU."""

    def __init__(self, folder: Path, *, threads: int) -> None:
        """Verify the files' hashes, load the graph and embed the golden set.

        threads: number of CPU threads for the network; process-wide, as torch has only one such setting.
        Raises: VersionError where the folder is incomplete or changed, or its golden set does not come out as it was published.
        """
        torch.set_num_threads(threads)
        self.folder = folder
        self.manifest = read_manifest(folder)
        verify_files(folder, self.manifest)
        self.preprocessing = Preprocessing(**self.manifest["preprocessing"])
        self.network = load_graph(folder / self.manifest["engine"]["graph"])
        self.golden_distance = self.measure_golden_distance()

    def embed(self, pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """uint8 [N, size, size, 3] -> float32 [N, D], rows of unit length. Raises: ArithmeticError where a row has no direction."""
        with torch.inference_mode():
            embeddings: npt.NDArray[np.float32] = self.network(torch.from_numpy(pixels)).numpy()
        norms = np.linalg.norm(embeddings, axis=1, keepdims=True)
        if not (np.isfinite(norms).all() and norms.all()):
            raise ArithmeticError("the network's output is zero or not finite")
        return np.divide(embeddings, norms)

    def measure_golden_distance(self) -> float:
        """The largest Euclidean distance between a golden photo's embedding and the published one.

        Raises: VersionError where it is beyond the published tolerance.
        """
        golden = self.manifest["golden"]
        expected = np.load(self.folder / golden["embeddings"], allow_pickle=False)
        photos = [(self.folder / name).read_bytes() for name in golden["photos"]]
        actual = self.embed(np.stack([decode(photo, self.preprocessing, UNLIMITED) for photo in photos]))
        if actual.shape != expected.shape:
            raise VersionError(f"{self.folder}: golden embeddings have shape {actual.shape}, published ones {expected.shape}")
        distance = float(np.linalg.norm(actual - expected, axis=1).max())
        if not distance <= golden["tolerance"]:
            raise VersionError(f"{self.folder}: golden embeddings differ by {distance:.2g}, more than {golden['tolerance']:.2g}")
        return distance


def read_manifest(folder: Path) -> dict[str, Any]:
    """Raises: VersionError where it is missing or not JSON."""
    try:
        manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_bytes())
    except (OSError, ValueError) as error:
        raise VersionError(f"{folder}: manifest.json cannot be read: {error}") from error
    return manifest


def verify_files(folder: Path, manifest: dict[str, Any]) -> None:
    """Raises: VersionError where a file is missing or its SHA-256 is not the manifest's."""
    for name, expected in manifest["files"].items():
        try:
            actual = hashlib.sha256((folder / name).read_bytes()).hexdigest()
        except OSError as error:
            raise VersionError(f"{folder}: {name} cannot be read: {error}") from error
        if actual != expected:
            raise VersionError(f"{folder}: {name} has changed since it was published: SHA-256 {actual}, published {expected}")


def load_graph(path: Path) -> torch.nn.Module:
    """Load an exported program whose weights are raw bytes. Raises: VersionError for one that would have to be unpickled."""
    with zipfile.ZipFile(path) as archive:
        pickled = [
            item.filename
            for item in archive.infolist()
            if ("/sample_inputs/" in item.filename and item.file_size)
            or (item.filename.endswith("_config.json") and b'"use_pickle": true' in archive.read(item))
        ]
    if pickled:
        raise VersionError(f"{path} holds pickled data ({', '.join(pickled)}); publish it again with npair")
    return torch.export.load(path).module()
