"""One published version: a folder that is verified, and then turns photos into embeddings.

Layout of a version folder; ``manifest.json`` lists every other file with its SHA-256::

    model.py embedder.py manifest.py engine.py     the code that serves it
    text.py preprocess.py jpeg.py scaling.py png.py metadata.py colour.py refusal.py
    network.pt2                     the reference graph and its weights:
                                    uint8 [N, size, size, 3] -> fp32 [N, D]
    network.xml network-int8.xml    the same for OpenVINO, with their weights in .bin
    golden/                         photos, and their fp32 reference embeddings
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from .engine import BATCH, EngineError, load_graph
from .manifest import NAME, Manifest, VersionError
from .preprocess import Limits, decode
from .refusal import PhotoError
from .text import photo_of

Answer = TypeVar("Answer")
Pixels = npt.NDArray[np.uint8]
Vector = npt.NDArray[np.float32]
Vectors = npt.NDArray[np.float32]

UNLIMITED = Limits(max_bytes=1 << 40, max_pixels=1 << 40)


@dataclass(frozen=True)
class Work:
    """What embedding some photos took.

    photos: number of embeddings.
    decode, network: seconds in each, summed over threads.
    norm: sum of the embeddings' lengths before normalisation. Its mean shifts when a different
    kind of photo arrives.
    """

    photos: int = 0
    decode: float = 0.0
    network: float = 0.0
    norm: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(
            *(getattr(self, each.name) + getattr(other, each.name) for each in fields(self))
        )


class Embedder:
    """A verified version, ready to embed on the CPU with the first of its engines that works here.

    engine: the name of that engine.
    passed_over: why each engine before it does not work, by name.
    golden_distance: the largest Euclidean distance of a golden photo's embedding from the
    published one.
    golden_norm: mean length of the golden embeddings before normalisation.
    work: the total since the version was loaded.
    """

    def __init__(self, folder: Path, *, cores: int, instances: int = 1, engine: str = "") -> None:
        """Verify the hashes of the files, load a graph and embed the golden set.

        cores: CPU cores for all instances of the version together; each is a process.
        engine: the only engine to try; by default, the manifest's in their order.
        Raises: VersionError if the folder is incomplete or changed, or no engine works as it did
        when published; EngineError if the given engine cannot run on this machine.
        """
        self.folder = folder
        self.manifest = Manifest.read(folder)
        self.manifest.check(folder)
        self.preprocessing = self.manifest.preprocessing
        engines = self.manifest.engines
        if engine and engine not in engines:
            raise VersionError(f"{folder} has no engine {engine}, only {', '.join(engines)}")
        self.cores, self.threads = cores, max(1, cores // instances)
        self.pool = ThreadPoolExecutor(self.threads)
        self.lock_file = (folder / NAME).open("rb")
        self.work_lock, self.large_photo_lock = threading.Lock(), threading.Lock()
        self.passed_over: dict[str, str] = {}
        for name in [engine] if engine else engines:
            self.work = Work()
            try:
                self.golden_distance = self._start(name)
            except (EngineError, VersionError, ArithmeticError) as error:
                if engine:
                    raise
                self.passed_over[name] = str(error)
            else:
                self.engine = name
                self.golden_norm, self.work = self.work.norm / self.work.photos, Work()
                return
        raise VersionError(f"{folder}: no engine works: " + "; ".join(self.passed_over.values()))

    def embed_photos(self, photos: Sequence[bytes], limits: Limits) -> list[Vector | PhotoError]:
        """Decode and embed encoded photos, or their base64 text.

        Returns: for each photo its embedding, float32 [D] of unit length, or why there is none.
        Raises: ArithmeticError if the network's output has no direction.
        """

        def decode_and_embed(photos: Sequence[bytes], all_cores: bool) -> list[Vector | PhotoError]:
            began = time.perf_counter()
            decoded = [self._decode(photo, limits) for photo in photos]
            self._count(Work(decode=time.perf_counter() - began))
            good = [pixels for pixels in decoded if not isinstance(pixels, PhotoError)]
            vectors = iter(self._run(good, all_cores))
            return [each if isinstance(each, PhotoError) else next(vectors) for each in decoded]

        return self._spread(decode_and_embed, photos)

    def embed(self, pixels: Pixels) -> Vectors:
        """Embed decoded photos: uint8 [N, size, size, 3] -> float32 [N, D], rows of unit length.

        Raises: ArithmeticError if a row has no direction.
        """
        vectors: list[Vector] = self._spread(self._run, pixels)
        return np.stack(vectors)

    def close(self) -> None:
        """End the threads and release the lock file."""
        self.pool.shutdown()
        self.lock_file.close()

    def _start(self, name: str) -> float:
        """Load an engine's graph and return its golden distance.

        Raises: EngineError if it cannot run on this machine; VersionError if the distance exceeds
        the published tolerance.
        """
        engine = self.manifest.engines[name]
        try:
            self.network = load_graph(
                engine.library,
                self.folder / engine.graph,
                engine.precision,
                threads=self.threads,
                cores=self.cores,
            )
        except EngineError as error:
            raise EngineError(f"engine {name}: {error}") from error
        photos, expected = self.manifest.golden.read(self.folder)
        pixels = np.stack([decode(photo, self.preprocessing, UNLIMITED) for photo in photos])
        # Run both the graph for all cores and the graphs of every thread, which warms them up.
        one_by_one = [self._run([photo], True) for photo in pixels]
        actual = np.concatenate([*one_by_one, self.embed(np.tile(pixels, (self.threads, 1, 1, 1)))])
        if actual.shape[1] != expected.shape[1]:
            raise VersionError(
                f"{self.folder}: golden embeddings have {actual.shape[1]} numbers,"
                f" published ones {expected.shape[1]}"
            )
        differences: Vectors = actual - np.tile(expected, (1 + self.threads, 1))
        distance = float(np.linalg.norm(differences, axis=1).max())
        if not distance <= engine.tolerance:
            raise VersionError(
                f"{self.folder}: engine {name}: golden embeddings differ by {distance:.2g},"
                f" more than {engine.tolerance:.2g}"
            )
        return distance

    def _spread(self, embed: Callable[[Any, bool], list[Answer]], items: Any) -> list[Answer]:
        """Embed items on all threads, in batches of BATCH while every thread gets one, then singly.

        Returns: the answers, in order.
        """
        with self._working(want_all_cores=len(items) == 1) as all_cores:
            if len(items) == 1:
                return embed(items, all_cores)
            full = len(items) // (BATCH * self.threads) * BATCH * self.threads
            batches = [items[start : start + BATCH] for start in range(0, full, BATCH)]
            singles = [items[start : start + 1] for start in range(full, len(items))]
            run = self.pool.map if self.threads > 1 else map
            parts = run(embed, batches + singles, itertools.repeat(False))
            return [answer for answers in parts for answer in answers]

    @contextlib.contextmanager
    def _working(self, *, want_all_cores: bool) -> Iterator[bool]:
        """Tell the other instances that this one works, by a lock on the manifest.

        Yields whether no other instance works, so that all cores are free; False unless wanted.
        """
        for kind in [fcntl.LOCK_EX, fcntl.LOCK_SH] if want_all_cores else [fcntl.LOCK_SH]:
            # Another instance has the lock, or the file system does not support locks.
            with contextlib.suppress(OSError):
                fcntl.flock(self.lock_file, kind | fcntl.LOCK_NB)
                break
        else:
            kind = fcntl.LOCK_UN
        try:
            yield kind == fcntl.LOCK_EX
        finally:
            with contextlib.suppress(OSError):
                fcntl.flock(self.lock_file, fcntl.LOCK_UN)

    def _decode(self, photo: bytes, limits: Limits) -> Pixels | PhotoError:
        try:
            return decode(
                photo_of(photo, limits), self.preprocessing, limits, self.large_photo_lock
            )
        except PhotoError as error:
            # A copy without traceback: its frames would keep the photo's memory, which is shared
            # with the server, until the next garbage collection.
            return PhotoError(error.reason, str(error))

    def _run(self, pixels: Sequence[Pixels], all_cores: bool) -> list[Vector]:
        """Run the network on a batch of BATCH photos, or on any other number one by one."""
        vectors: list[Vector] = []
        for part in [pixels] if len(pixels) == BATCH else [[photo] for photo in pixels]:
            began = time.perf_counter()
            embeddings = self.network(part, all_cores=all_cores)
            seconds = time.perf_counter() - began
            vectors.extend(unit(embeddings))
            norm = float(np.linalg.norm(embeddings, axis=1).sum())
            self._count(Work(len(part), network=seconds, norm=norm))
        return vectors

    def _count(self, work: Work) -> None:
        with self.work_lock:
            self.work += work


def unit(embeddings: Vectors) -> Vectors:
    """Scale rows to length 1. Raises: ArithmeticError if a row is zero or not finite."""
    norms = np.linalg.norm(embeddings, axis=1, keepdims=True)
    if not (np.isfinite(norms).all() and norms.all()):
        raise ArithmeticError("the network's output is zero or not finite")
    return np.divide(embeddings, norms)
