"""One published version: a folder that is verified before it answers, and then turns photos into embeddings.

Layout of a version folder, all of it listed with SHA-256 in ``manifest.json``::

    model.py embedder.py engine.py                 the code that serves it
    text.py preprocess.py jpeg.py png.py metadata.py colour.py refusal.py
    network.pt2                                    the reference graph with its weights: uint8 [N, size, size, 3] -> fp32 [N, D]
    network.xml network-int8.xml                   the same for OpenVINO, with their weights in .bin
    golden/                                        photos and, in embeddings.npy, the fp32 reference embeddings of each
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import itertools
import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from .engine import BATCH, EngineError, load
from .preprocess import Limits, Preprocessing, decode
from .refusal import PhotoError
from .text import photo_of

Answer = TypeVar("Answer")
Pixels = npt.NDArray[np.uint8]
Vector = npt.NDArray[np.float32]
Vectors = npt.NDArray[np.float32]

UNLIMITED = Limits(max_bytes=1 << 40, max_pixels=1 << 40)


class VersionError(RuntimeError):
    """A version folder that must not serve; the message says which part of it is wrong."""


@dataclass(frozen=True)
class Work:
    """What was done for some photos.

    photos: how many embeddings were made. decode, network: seconds that threads spent in each, summed over those at work at once.
    norm: the sum of the embeddings' lengths before they were scaled to 1, whose mean moves when another kind of photos arrives.
    """

    photos: int = 0
    decode: float = 0.0
    network: float = 0.0
    norm: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(
            *(getattr(self, field.name) + getattr(other, field.name) for field in fields(self))
        )


class Embedder:
    """A verified version, loaded for inference on the CPU by the first of its engines that works here as it did when published.

    engine: that engine's name. passed_over: the reasons why those before it did not do, by name.
    golden_distance: the largest Euclidean distance between a golden photo's embedding and the published one.
    golden_norm: the mean length of the golden photos' embeddings before they were scaled to 1.
    work: all that was done since the version was loaded.
    """

    def __init__(self, folder: Path, *, cores: int, instances: int = 1, engine: str = "") -> None:
        """Verify the files' hashes, load a graph and embed the golden set.

        cores: how many CPU cores there are for this and the other instances of the version, which are processes of their own.
        engine: the only one to try; else the manifest's, in their order.
        Raises: VersionError where the folder is incomplete or changed, or no engine works as it did when the version was published;
        EngineError where the one that was asked for cannot run on this machine.
        """
        self.folder = folder
        self.manifest = read_manifest(folder)
        verify_files(folder, self.manifest)
        self.preprocessing = Preprocessing(**self.manifest["preprocessing"])
        if engine and engine not in self.manifest["engines"]:
            raise VersionError(
                f"{folder} has no engine {engine}, only {', '.join(self.manifest['engines'])}"
            )
        self.cores, self.threads = cores, max(1, cores // instances)
        self.pool = ThreadPoolExecutor(self.threads)
        self.lock = (folder / "manifest.json").open("rb")
        self.working, self.large = threading.Lock(), threading.Lock()
        self.passed_over: dict[str, str] = {}
        for name in [engine] if engine else self.manifest["engines"]:
            self.work = Work()
            try:
                self.golden_distance = self._load(name)
            except (EngineError, VersionError, ArithmeticError) as error:
                if engine:
                    raise
                self.passed_over[name] = str(error)
            else:
                self.engine, self.golden_norm, self.work = (
                    name,
                    self.work.norm / self.work.photos,
                    Work(),
                )
                return
        raise VersionError(f"{folder}: no engine works: " + "; ".join(self.passed_over.values()))

    def embed_photos(self, photos: Sequence[bytes], limits: Limits) -> list[Vector | PhotoError]:
        """Decode and embed encoded photos, or their base64 text: for each its float32 [D] of unit length, or why there is none.

        Raises: ArithmeticError where the network's output has no direction.
        """

        def embed(photos: Sequence[bytes], alone: bool) -> list[Vector | PhotoError]:
            began = time.perf_counter()
            decoded = [self._decode(photo, limits) for photo in photos]
            self._count(Work(decode=time.perf_counter() - began))
            good = [pixels for pixels in decoded if not isinstance(pixels, PhotoError)]
            vectors = iter(self._embed(good, alone))
            return [
                pixels if isinstance(pixels, PhotoError) else next(vectors) for pixels in decoded
            ]

        return self._spread(embed, photos)

    def embed(self, pixels: npt.NDArray[np.uint8]) -> Vectors:
        """uint8 [N, size, size, 3] -> float32 [N, D], rows of unit length. Raises: ArithmeticError where a row has no direction."""
        vectors: list[Vector] = self._spread(self._embed, pixels)
        return np.stack(vectors)

    def close(self) -> None:
        self.pool.shutdown()
        self.lock.close()

    def _load(self, name: str) -> float:
        """Load an engine's graph and measure its golden distance.

        Raises: EngineError where it cannot run on this machine, VersionError where the distance is beyond the published tolerance.
        """
        engine, golden = self.manifest["engines"][name], self.manifest["golden"]
        try:
            self.network = load(
                engine["library"],
                self.folder / engine["graph"],
                engine["precision"],
                self.threads,
                self.cores,
            )
        except EngineError as error:
            raise EngineError(f"engine {name}: {error}") from error
        expected = np.load(self.folder / golden["embeddings"], allow_pickle=False)
        photos = [(self.folder / photo).read_bytes() for photo in golden["photos"]]
        pixels = np.stack([decode(photo, self.preprocessing, UNLIMITED) for photo in photos])
        # Each photo alone, then all of them on every thread: there are graphs for both, and after this they are warm.
        alone = [self._embed([photo], True) for photo in pixels]
        actual = np.concatenate([*alone, self.embed(np.tile(pixels, (self.threads, 1, 1, 1)))])
        if actual.shape[1] != expected.shape[1]:
            raise VersionError(
                f"{self.folder}: golden embeddings have {actual.shape[1]} numbers, published ones {expected.shape[1]}"
            )
        distance = float(
            np.linalg.norm(actual - np.tile(expected, (1 + self.threads, 1)), axis=1).max()
        )
        if not distance <= engine["tolerance"]:
            raise VersionError(
                f"{self.folder}: engine {name}: golden embeddings differ by {distance:.2g}, more than {engine['tolerance']:.2g}"
            )
        return distance

    def _spread(self, embed: Callable[[Any, bool], list[Answer]], items: Any) -> list[Answer]:
        """Answers of parts of the items, in order: of BATCH items as long as there are enough for every thread, then of one."""
        with self._at_work(alone=len(items) == 1) as alone:
            if len(items) == 1:
                return embed(items, alone)
            full = len(items) // (BATCH * self.threads) * BATCH * self.threads
            parts = [items[i : i + BATCH] for i in range(0, full, BATCH)] + [
                items[i : i + 1] for i in range(full, len(items))
            ]
            return [
                answer
                for answers in self.pool.map(embed, parts, itertools.repeat(False))
                for answer in answers
            ]

    @contextlib.contextmanager
    def _at_work(self, *, alone: bool) -> Iterator[bool]:
        """Lets the other instances know, by a lock on the manifest, and yields whether none of them is: then all cores are free."""
        for kind in [fcntl.LOCK_EX, fcntl.LOCK_SH] if alone else [fcntl.LOCK_SH]:
            with contextlib.suppress(OSError):  # another has it, or the file system knows no locks
                fcntl.flock(self.lock, kind | fcntl.LOCK_NB)
                break
        else:
            kind = fcntl.LOCK_UN
        try:
            yield kind == fcntl.LOCK_EX
        finally:
            with contextlib.suppress(OSError):
                fcntl.flock(self.lock, fcntl.LOCK_UN)

    def _decode(self, photo: bytes, limits: Limits) -> Pixels | PhotoError:
        try:
            return decode(photo_of(photo, limits), self.preprocessing, limits, self.large)
        except PhotoError as error:
            # A new one: the frames of its traceback, and of its cause's, would keep the photos, and the memory that the server
            # shares, until the garbage collector comes.
            return PhotoError(error.reason, str(error))

    def _embed(self, pixels: Sequence[Pixels], alone: bool) -> list[Vector]:
        """The vectors of BATCH photos at once, or of any other number one by one."""
        vectors: list[Vector] = []
        for part in [pixels] if len(pixels) == BATCH else [[photo] for photo in pixels]:
            began = time.perf_counter()
            embeddings = self.network(np.stack(part), alone=alone)
            seconds = time.perf_counter() - began
            vectors.extend(unit(embeddings))
            self._count(
                Work(
                    len(part), network=seconds, norm=float(np.linalg.norm(embeddings, axis=1).sum())
                )
            )
        return vectors

    def _count(self, work: Work) -> None:
        with self.working:
            self.work += work


def unit(embeddings: Vectors) -> Vectors:
    """Rows scaled to length 1. Raises: ArithmeticError where one has no direction."""
    norms = np.linalg.norm(embeddings, axis=1, keepdims=True)
    if not (np.isfinite(norms).all() and norms.all()):
        raise ArithmeticError("the network's output is zero or not finite")
    return np.divide(embeddings, norms)


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
            raise VersionError(
                f"{folder}: {name} has changed since it was published: SHA-256 {actual}, published {expected}"
            )
