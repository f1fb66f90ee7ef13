"""What training reads instead of files: photos that were checked, and decoded once into a cache on disk."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from npair.data.dataset import LIMITS, SPLITS, DataError, Dataset, Photos, digest_of, each, read_photo, shown, summary
from npair.serving import colour, jpeg, metadata, png, preprocess
from npair.serving.preprocess import Preprocessing, decode
from npair.serving.refusal import PhotoError

# For those who want to know which photos are sound, and their colours, and no more.
GLANCE = Preprocessing(size=32, resample="BILINEAR", background=255)
FEW_CLASSES, FEW_PHOTOS = 10, 5  # below which a network learns these photos rather than what they show


@dataclass(frozen=True)
class Findings:
    """What is wrong with a data set or worth a look, and was dealt with before training.

    corrupt: files that cannot be decoded, each with the reason; left out.
    copies: further files of the same bytes in the same class and split; left out.
    contradicting: groups of files of the same bytes in different classes; all left out.
    leaks: files of the same bytes as one of the same class in val or test, or, in val, as one in test; left out.
    lone: classes with a single photo in train, which cannot make a pair; they stay.
    classes, median: number of classes in train, and the median of their photos.
    ignored: files and folders that are not photos.
    """

    corrupt: tuple[tuple[Path, str], ...]
    copies: tuple[Path, ...]
    contradicting: tuple[tuple[Path, ...], ...]
    leaks: tuple[Path, ...]
    lone: tuple[str, ...]
    classes: int
    median: float
    ignored: tuple[Path, ...]

    def lines(self) -> list[str]:
        """A sentence for each kind of finding; empty where all is well."""
        kinds = [
            ("Left out, since they cannot be decoded", [f"{shown(path)} ({reason})" for path, reason in self.corrupt]),
            ("Left out as copies of other photos of their class", [shown(name) for name in self.copies]),
            (
                "Left out, since the same photo has different labels",
                [" = ".join(map(shown, group)) for group in self.contradicting],
            ),
            ("Left out, since the same photo is in a split that tests what was learnt", [shown(name) for name in self.leaks]),
            ("Classes with a single train photo, which take no part in training", [shown(name) for name in self.lone]),
            ("Ignored, since they are not photos in a class's folder", [summary(self.ignored)] if self.ignored else []),
        ]
        lines = [f"{what}: {_first(things)}." for what, things in kinds if things]
        if self.classes < FEW_CLASSES or self.median < FEW_PHOTOS:
            lines.append(
                f"The data set is tiny, {self.classes} classes with {self.median:g} train photos each in the median: "
                f"expect little of a network trained on fewer than {FEW_CLASSES} classes or {FEW_PHOTOS} photos of each."
            )
        return lines

    def as_dict(self) -> dict[str, Any]:
        """The same for JSON, complete, paths as strings."""
        return {
            "corrupt": [{"path": str(path), "reason": reason} for path, reason in self.corrupt],
            "copies": list(map(str, self.copies)),
            "contradicting": [list(map(str, group)) for group in self.contradicting],
            "leaks": list(map(str, self.leaks)),
            "lone": list(self.lone),
            "classes": self.classes,
            "median": self.median,
            "ignored": list(map(str, self.ignored)),
        }


def _first(things: Sequence[str]) -> str:
    return ", ".join(things[:5]) + (f" and {len(things) - 5} more" if len(things) > 5 else "")


@dataclass(frozen=True)
class Pixels:
    """Decoded photos: uint8 [m, size, size, 3], RGB, read-only and on disk until used, and the row of each photo."""

    array: npt.NDArray[np.uint8]
    rows: dict[Path, int]

    def of(self, photos: Photos) -> npt.NDArray[np.int64]:
        """The rows of these photos, int64 [n]. Raises: KeyError for a photo that was not loaded."""
        return np.array([self.rows[path] for path in photos.paths], dtype=np.int64)


def default_cache() -> Path:
    """Where decoded photos are kept: ``npair`` in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "npair"


def load(dataset: Dataset, preprocessing: Preprocessing, cache: Path) -> tuple[Dataset, Pixels, Findings]:
    """Decode all photos into the folder ``cache``, or find them there, and leave out what would spoil training or its scores.

    What is cached depends on the photos' bytes, the preprocessing and the decoder, not on names, labels or splits. Memory does
    not grow with the number of photos.

    Returns: the data set without what the findings say was left out; the pixels of its photos; the findings.
    Raises: DataError where fewer than two classes with two photos each remain in train, or the cache cannot be written.
    """
    paths = list(dict.fromkeys(path for photos in dataset.splits.values() for path in photos.paths))
    digests: dict[Path, str] = {}
    reasons: dict[Path, str] = {}
    for path, digest in zip(paths, each(_digest_or_error, paths, "read"), strict=True):
        if isinstance(digest, OSError):
            reasons[path] = str(digest.strerror)
        else:
            digests[path] = digest
    sources = dict(sorted((digest, path) for path, digest in digests.items()))
    array, corrupt = _decoded(sources, preprocessing, cache)
    reasons |= {path: corrupt[digest] for path, digest in digests.items() if digest in corrupt}
    kept, findings = _clean(dataset, digests, reasons)
    usable = int((np.bincount(kept.train.fine) >= 2).sum())
    if usable < 2:
        raise DataError(
            f"training needs at least two classes with two photos each, {usable} remained in train; add photos. "
            + " ".join(findings.lines())
        )
    row_of = {digest: row for row, digest in enumerate(sources)}
    return kept, Pixels(array, {path: row_of[digest] for path, digest in digests.items() if path not in reasons}), findings


def _clean(dataset: Dataset, digests: Mapping[Path, str], reasons: Mapping[Path, str]) -> tuple[Dataset, Findings]:
    """The data set with one copy of each sound photo, in the split that is withheld the longest."""
    places: dict[str, list[tuple[str, int]]] = defaultdict(list)
    for split, photos in dataset.splits.items():
        for index, path in enumerate(photos.paths):
            if path not in reasons:
                places[digests[path]].append((split, index))
    kept: dict[str, list[int]] = {split: [] for split in dataset.splits}
    copies: list[Path] = []
    leaks: list[Path] = []
    contradicting: list[tuple[Path, ...]] = []
    for same in places.values():
        files = tuple(dataset.splits[split].paths[index] for split, index in same)
        if len({int(dataset.splits[split].fine[index]) for split, index in same}) > 1:
            contradicting.append(files)
            continue
        chosen = max(same, key=lambda place: SPLITS.index(place[0]))
        kept[chosen[0]].append(chosen[1])
        for place, path in zip(same, files, strict=True):
            if place != chosen:
                (copies if place[0] == chosen[0] else leaks).append(path)
    splits = {
        split: photos.select(sorted(kept[split])) for split, photos in dataset.splits.items() if kept[split] or split == "train"
    }
    train = splits["train"]
    counts = np.bincount(train.fine, minlength=len(train.fine_names))
    findings = Findings(
        corrupt=tuple(reasons.items()),
        copies=tuple(copies),
        contradicting=tuple(contradicting),
        leaks=tuple(leaks),
        lone=tuple(train.fine_names[label] for label in np.flatnonzero(counts == 1)),
        classes=int((counts > 0).sum()),
        median=float(np.median(counts[counts > 0])) if len(train) else 0.0,
        ignored=dataset.ignored,
    )
    return Dataset(splits, dataset.made, dataset.ignored), findings


def _decoded(
    sources: Mapping[str, Path], preprocessing: Preprocessing, cache: Path
) -> tuple[npt.NDArray[np.uint8], dict[str, str]]:
    """Pixels [m, size, size, 3], a row for each digest in ``sources``, and why some digests have none."""
    decoder = [
        *(Path(str(module.__file__)).read_text(encoding="utf-8") for module in (preprocess, jpeg, png, metadata, colour)),
        version("pillow"),
        version("simplejpeg"),
        version("cykooz-resizer"),
        asdict(preprocessing),
        asdict(LIMITS),
    ]
    key = hashlib.sha256(json.dumps([list(sources), decoder]).encode()).hexdigest()
    shape = (len(sources), preprocessing.size, preprocessing.size, 3)
    found = _read_cache(cache / f"{key}.npy", shape)
    if found is None:
        try:
            cache.mkdir(parents=True, exist_ok=True)
            _write_cache(sources, preprocessing, cache / f"{key}.npy")
        except OSError as error:
            megabytes = np.prod(shape) // 1_000_000 + 1
            raise DataError(
                f"{cache} cannot hold {megabytes} MB of decoded photos ({error.strerror}); make room, or name another cache folder"
            ) from error
        found = _read_cache(cache / f"{key}.npy", shape)
    if found is None:
        raise DataError(f"{cache} does not hold what was written there; name another cache folder")
    return found


def _read_cache(file: Path, shape: tuple[int, ...]) -> tuple[npt.NDArray[np.uint8], dict[str, str]] | None:
    """None where there is no such cache, or not as it was written."""
    try:
        array = np.load(file, mmap_mode="r")
        described = json.loads(file.with_suffix(".json").read_text())
        corrupt: dict[str, str] = described["corrupt"]
        sound = array.shape == shape and described["sha256"] == _checksum(file, corrupt)
    except Exception:  # damage makes numpy and JSON raise all sorts of things
        return None
    return (array, corrupt) if sound else None


def _write_cache(sources: Mapping[str, Path], preprocessing: Preprocessing, file: Path) -> None:
    """Raises: OSError where the folder cannot hold it; nothing is left behind then."""

    def decode_photo(source: tuple[str, Path]) -> npt.NDArray[np.uint8] | PhotoError:
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
    # The name of a file says that it is complete: it gets its name last.
    with tempfile.TemporaryDirectory(dir=file.parent, prefix="unfinished-") as staging:
        staged = Path(staging) / file.name
        with staged.open("wb") as array:  # not mapped: a full disk would then end the process with SIGBUS
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(array, header)  # type: ignore[no-untyped-call]
            if shutil.disk_usage(staging).free < np.prod(shape):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            for digest, photo in zip(sources, each(decode_photo, list(sources.items()), "decode"), strict=True):
                if isinstance(photo, PhotoError):
                    corrupt[digest] = str(photo)
                array.write(bytes(shape[1] * shape[2] * 3) if isinstance(photo, PhotoError) else photo.tobytes())
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


def load_pixels(paths: Sequence[Path], preprocessing: Preprocessing) -> npt.NDArray[np.uint8]:
    """Decode a few photos into memory; uint8 [n, size, size, 3]. Raises: DataError that names the bad file."""

    def decode_photo(path: Path) -> npt.NDArray[np.uint8]:
        try:
            return decode(read_photo(path), preprocessing, LIMITS)
        except PhotoError as error:
            raise DataError(f"{path}: {error}") from error

    pixels = np.empty((len(paths), preprocessing.size, preprocessing.size, 3), dtype=np.uint8)
    for row, photo in enumerate(each(decode_photo, paths, "decode")):
        pixels[row] = photo
    return pixels


def _digest_or_error(path: Path) -> str | OSError:
    try:
        return digest_of(path)
    except OSError as error:
        return error
