"""Photos as training reads them: checked, and decoded once into a cache on disk."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import distributions
from pathlib import Path

import numpy as np
import numpy.typing as npt

from npair.data.checks import Findings, clean
from npair.data.dataset import DataError, Dataset, HoldOut, Photos
from npair.data.files import LIMITS, digest_of_json, parallel_map, read_photo
from npair.serving import code_of
from npair.serving.preprocess import Preprocessing, decode
from npair.serving.refusal import PhotoError

# Enough to tell which photos are sound, their colours, and which show the same.
PREVIEW = Preprocessing(size=32, resample="BILINEAR", background=255)


@dataclass(frozen=True)
class Pixels:
    """Decoded photos: uint8 [m, size, size, 3], RGB, read-only, mapped from disk; rows by path."""

    array: npt.NDArray[np.uint8]
    rows: dict[Path, int]

    def of(self, photos: Photos) -> npt.NDArray[np.int64]:
        """Return the rows of these photos, int64 [n]. Raises: KeyError for any other photo."""
        return np.array([self.rows[path] for path in photos.paths], dtype=np.int64)


def default_cache() -> Path:
    """Return the folder for decoded photos: ``npair`` in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "npair"


def decode_dataset(
    dataset: Dataset, preprocessing: Preprocessing, cache: Path, hold_out: HoldOut | None = None
) -> tuple[Dataset, Pixels, Findings]:
    """Decode all photos and leave out those that would spoil training or its scores.

    If the data set has no splits, divide what remains as ``hold_out`` or its defaults say.
    Keeps the pixels in the folder ``cache`` and finds them there if photos, preprocessing and
    decoder are the same; names, labels and splits do not count. Photos whose digests the data set
    holds are not hashed again. No more than a few photos are in memory at a time.
    Copies are found in previews, so that no preprocessing changes which photos are kept: training
    and publishing, which decode at different sizes, must agree.

    Returns: the data set without what the findings say was left out; the pixels of its photos; the
    findings.
    Raises: DataError if fewer than two classes with two photos each remain in train, if they are
    too few to be divided, or if the cache cannot be written.
    """
    paths = list(dict.fromkeys(path for photos in dataset.splits.values() for path in photos.paths))

    def digest_or_error(path: Path) -> str | OSError:
        try:
            return dataset.digest(path)
        except OSError as error:
            return error

    digests: dict[Path, str] = {}
    corrupt: dict[Path, str] = {}
    for path, digest in zip(paths, parallel_map(digest_or_error, paths, "read"), strict=True):
        if isinstance(digest, OSError):
            corrupt[path] = str(digest.strerror)
        else:
            digests[path] = digest
    sources = dict(sorted((digest, path) for path, digest in digests.items()))
    array, reasons = _cached(sources, preprocessing, cache)
    corrupt |= {path: reasons[digest] for path, digest in digests.items() if digest in reasons}
    row_of = {digest: row for row, digest in enumerate(sources)}
    rows = {path: row_of[digest] for path, digest in digests.items() if path not in corrupt}
    preview, _ = _cached(sources, PREVIEW, cache)
    previews = {path: preview[row] for path, row in rows.items()}
    kept, findings = clean(dataset, digests, previews, corrupt, hold_out or HoldOut())
    return kept, Pixels(array, rows), findings


def decode_photos(paths: Sequence[Path], preprocessing: Preprocessing) -> npt.NDArray[np.uint8]:
    """Decode a few photos into memory: uint8 [n, size, size, 3]. Raises: DataError, OSError."""
    pixels = np.empty((len(paths), preprocessing.size, preprocessing.size, 3), dtype=np.uint8)
    decode_one = partial(decode_photo, preprocessing=preprocessing)
    for row, photo in enumerate(parallel_map(decode_one, paths, "decode")):
        pixels[row] = photo
    return pixels


def decode_photo(path: Path, preprocessing: Preprocessing) -> npt.NDArray[np.uint8]:
    """Decode a photo as training does: uint8 [size, size, 3]. Raises: DataError, OSError."""
    try:
        return decode(read_photo(path), preprocessing, LIMITS)
    except PhotoError as error:
        raise DataError(f"{path}: {error}") from error


def _cached(
    sources: Mapping[str, Path], preprocessing: Preprocessing, cache: Path
) -> tuple[npt.NDArray[np.uint8], dict[str, str]]:
    """Read photos from the cache, decoding them into it first if need be.

    sources: a path for each digest.
    Returns: pixels [m, size, size, 3], a row for each digest; why some digests have none.
    """
    libraries = ("pillow", "simplejpeg", "cykooz-resizer")
    decoder = [
        *(file.read_text(encoding="utf-8") for file in code_of("preprocess")),
        *(found.version for name in libraries for found in distributions(name=name)),
        asdict(preprocessing),
        asdict(LIMITS),
    ]
    key = digest_of_json([list(sources), decoder])
    shape = (len(sources), preprocessing.size, preprocessing.size, 3)
    found = _read_cache(cache / f"{key}.npy", shape)
    if found is None:
        try:
            cache.mkdir(parents=True, exist_ok=True)
            _write_cache(sources, preprocessing, cache / f"{key}.npy")
        except OSError as error:
            megabytes = np.prod(shape) // 1_000_000 + 1
            raise DataError(
                f"{cache} cannot hold {megabytes} MB of decoded photos ({error.strerror}); make"
                " room, or name another cache folder"
            ) from error
        found = _read_cache(cache / f"{key}.npy", shape)
    if found is None:
        raise DataError(f"{cache} does not hold what was written there; name another cache folder")
    return found


def _read_cache(
    file: Path, shape: tuple[int, ...]
) -> tuple[npt.NDArray[np.uint8], dict[str, str]] | None:
    """Return what was cached, or None if it is missing or damaged."""
    try:
        array = np.load(file, mmap_mode="r")
        described = json.loads(file.with_suffix(".json").read_text())
        corrupt: dict[str, str] = described["corrupt"]
        sound = array.shape == shape and described["sha256"] == _checksum(file, corrupt)
    except Exception:  # numpy and JSON raise many kinds of errors for damaged files
        return None
    return (array, corrupt) if sound else None


def _write_cache(sources: Mapping[str, Path], preprocessing: Preprocessing, file: Path) -> None:
    """Decode photos into a file. Raises: OSError if it does not fit; nothing is left behind."""

    def decode_source(source: tuple[str, Path]) -> npt.NDArray[np.uint8] | PhotoError:
        digest, path = source
        photo = read_photo(path)
        if hashlib.sha256(photo).hexdigest() != digest:
            raise DataError(f"{path} changed while it was read; start again")
        try:
            return decode(photo, preprocessing, LIMITS)
        except PhotoError as error:
            return error

    shape = (len(sources), preprocessing.size, preprocessing.size, 3)
    corrupt = {}
    # Rename a file only once it is complete.
    with tempfile.TemporaryDirectory(dir=file.parent, prefix="unfinished-") as staging:
        staged = Path(staging) / file.name
        with staged.open("wb") as array:  # not mapped: a full disk would end the process by SIGBUS
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(array, header)  # type: ignore[no-untyped-call]
            if shutil.disk_usage(staging).free < np.prod(shape):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            photos = parallel_map(decode_source, list(sources.items()), "decode")
            for digest, photo in zip(sources, photos, strict=True):
                if isinstance(photo, PhotoError):
                    corrupt[digest] = str(photo)
                    array.write(bytes(shape[1] * shape[2] * 3))
                else:
                    array.write(photo.tobytes())
        described = {"sha256": _checksum(staged, corrupt), "corrupt": corrupt}
        staged.with_suffix(".json").write_text(json.dumps(described))
        staged.replace(file)
        staged.with_suffix(".json").replace(file.with_suffix(".json"))


def _checksum(file: Path, corrupt: Mapping[str, str]) -> str:
    digest = hashlib.sha256(json.dumps(corrupt, sort_keys=True).encode())
    with file.open("rb") as pixels:
        while block := pixels.read(1_000_000):
            digest.update(block)
    return digest.hexdigest()
