"""Photos by class: reading a data set, holding its decoded pixels, and drawing N-pair batches."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from npair.serving.preprocess import Limits, PhotoError, Preprocessing, decode

# Training photos are the user's own: only a file that cannot be a photo is refused.
LIMITS = Limits(max_bytes=100_000_000, max_pixels=200_000_000)


class DataError(ValueError):
    """A data set that cannot be used; the message names the file and the line or the class."""


@dataclass(frozen=True)
class Photos:
    """One split of a data set: paths and, as int64 arrays of shape [n], fine and coarse labels."""

    paths: tuple[Path, ...]
    fine: npt.NDArray[np.int64]
    coarse: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.paths)

    def fingerprint(self) -> str:
        """SHA-256 over every photo's bytes and labels, in order: two data sets are the same if and only if theirs are."""
        digest = hashlib.sha256()
        for path, fine, coarse in zip(self.paths, self.fine, self.coarse, strict=True):
            digest.update(f"{hashlib.sha256(path.read_bytes()).hexdigest()} {fine} {coarse}\n".encode())
        return digest.hexdigest()


def read_split(root: Path, split: str) -> Photos:
    """Read ``root/<split>.txt``: a line per photo, ``path, fine label, coarse label``, the path relative to root.

    Raises: DataError for a missing or empty list, a malformed line or a photo that is not there.
    """
    listing = root / f"{split}.txt"
    if not listing.is_file():
        raise DataError(f"{listing} is missing; it lists the photos of a split, a line each: path, fine label, coarse label")
    paths, labels = [], []
    for number, line in enumerate(listing.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            name, fine, coarse = line.rsplit(",", 2)
            labels.append((int(fine), int(coarse)))
        except ValueError:
            raise DataError(f"{listing}:{number}: expected 'path, fine label, coarse label', got {line!r}") from None
        paths.append(root / name.strip())
        if not paths[-1].is_file():
            raise DataError(f"{listing}:{number}: no photo at {paths[-1]}")
    if not paths:
        raise DataError(f"{listing} lists no photo")
    fine_labels, coarse_labels = np.array(labels, dtype=np.int64).T
    return Photos(tuple(paths), fine_labels, coarse_labels)


def load_pixels(paths: Sequence[Path], preprocessing: Preprocessing) -> npt.NDArray[np.uint8]:
    """Decode all photos with a progress bar; uint8 [n, size, size, 3]. Raises: DataError that names the bad file."""
    pixels = np.empty((len(paths), preprocessing.size, preprocessing.size, 3), dtype=np.uint8)

    def load(index: int) -> None:
        try:
            pixels[index] = decode(paths[index].read_bytes(), preprocessing, LIMITS)
        except PhotoError as error:
            raise DataError(f"{paths[index]}: {error}") from error

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:  # Pillow decodes and scales outside the GIL
        for _ in tqdm(pool.map(load, range(len(paths))), total=len(paths), desc="decode", unit="photo", leave=False):
            pass
    return pixels


class NPairSampler:
    """Draws batches of N distinct classes with two different photos of each (Sohn 2016, section 3.2).

    One pass over an epoch yields about as many photos as the split has. Batches are a function of (seed, epoch) alone, so a resumed
    run draws what an uninterrupted one would have drawn.
    """

    def __init__(self, labels: npt.NDArray[np.int64], classes_per_batch: int, seed: int) -> None:
        """labels: [n]. Raises: DataError where fewer than two classes have two photos."""
        self.seed = seed
        members = (np.flatnonzero(labels == label) for label in np.unique(labels))
        self.members = [indices for indices in members if len(indices) >= 2]
        if len(self.members) < 2:
            raise DataError(f"N-pair batches need at least two classes with two photos each, found {len(self.members)}")
        self.classes_per_batch = min(classes_per_batch, len(self.members))
        self.batches_per_epoch = max(1, sum(map(len, self.members)) // (2 * self.classes_per_batch))

    def epoch(self, epoch: int) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
        """Yields (anchors, positives): int64 [N] indices each, row i of both of the same class."""
        rng = np.random.default_rng((self.seed, epoch))
        for _ in range(self.batches_per_epoch):
            chosen = rng.choice(len(self.members), self.classes_per_batch, replace=False)
            pairs = np.stack([rng.choice(self.members[i], 2, replace=False) for i in chosen])
            yield pairs[:, 0], pairs[:, 1]
