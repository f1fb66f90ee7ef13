"""Files of the commands: photos in folders or to convert, vectors in .npz and .jsonl."""

from __future__ import annotations

import io
import itertools
import json
import os
import re
import sys
import time
import warnings
import zipfile
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from PIL import Image
if TYPE_CHECKING or __package__:
    from . import client as library
else:  # outside the package
    import client as library

SUFFIXES = {
    *(".apng", ".jfif", ".jpe", ".jpeg", ".jpg", ".png", ".webp"),  # sent as they are
    *(".avif", ".avifs", ".bmp", ".dib", ".gif", ".heic", ".heics", ".heif", ".hif"),  # converted
    *(".tif", ".tiff"),
}
# Other photos, cameras' raw files among them. They are left out by name, so that it is noticed.
OTHER_SUFFIXES = {
    *(".3fr", ".arw", ".cr2", ".cr3", ".dng", ".erf", ".j2k", ".jp2", ".jpf", ".jpx", ".jxl"),
    *(".jxr", ".mrw", ".nef", ".nrw", ".orf", ".pef", ".psd", ".raf", ".raw", ".rw2", ".rwl"),
    *(".sr2", ".srw", ".svg", ".tga", ".x3f"),
}
SAVED_SUFFIXES = (".npz", ".jsonl")
STDIN = Path("-")
PATIENT_RETRIES = 8  # half a minute or more, in which a full or restarted server recovers
# Thumbnails, deleted files and snapshots of Synology, QNAP, macOS and Windows; case does not count.
SYSTEM_FOLDERS = {
    *("@eadir", "#recycle", "#snapshot", "@recycle", "@recently-snapshot"),
    *("__macosx", "lost+found", "$recycle.bin", "system volume information"),
}
Saved = tuple[list[str], library.Vectors]  # names and vectors of a file
MadeBy = tuple[str, str, str]  # model, version, hash of its manifest or an empty string
UNANSWERED = (library.UnavailableError, library.RequestTimeoutError, library.ServerFaultError)
DAMAGED = (LookupError, ValueError, TypeError, AttributeError, EOFError, zipfile.BadZipFile)
CLEAR = "\r\033[K"  # the line of a terminal
PROGRESS_SECONDS = 0.5  # between two pictures of it
# How the files begin that are converted, by format.
CONVERTED = {
    "AVIF": rb".{4}ftypavi[fs]",
    "HEIC": rb".{4}ftyp(?:hei[cmsx]|hev[cmsx]|mif1|msf1)",
    "GIF": rb"GIF8[79]a",
    "BMP": rb"BM.{4}\0{4}",
    "TIFF": rb"II\*\0(?!.{4}CR)|MM\0\*|II\+\0|MM\0\+",  # CR: raw files of Canon
}
SERVED = re.compile(rb"\xff\xd8\xff|\x89PNG|RIFF.{4}WEBP", re.DOTALL)
MAX_PIXELS = 64_000_000  # the server's limit for its own formats
# A larger photo is halved before it is encoded, so that its PNG has at most 16 MB. Networks see
# less than a megapixel.
SENT_PIXELS = 4_000_000
ENCODING: dict[str, Any] = {"quality": 98, "subsampling": 0, "compress_level": 1}  # JPEG's, PNG's


def encoded_photo(photo: Path | IO[bytes]) -> bytes:
    """Read a photo; convert it to PNG (CMYK to JPEG) if it is AVIF, HEIC, GIF, BMP or TIFF.

    The content decides, not the name. Any other content is returned as it is, for the server to
    accept or refuse. Orientation, transparency and colour profile are kept, and the server applies
    them as in its own formats. Takes the first frame or page, and halves the sides of a photo
    until it has at most SENT_PIXELS.

    photo: a path, or a seekable binary file.
    Raises: OSError; ValueError with a reason and a remedy if the photo cannot be converted.
    """
    if isinstance(photo, Path):
        with photo.open("rb") as file:
            return encoded_photo(file)
    start = photo.read(32)
    photo.seek(0)
    matches = (kind for kind, begin in CONVERTED.items() if re.match(begin, start, re.DOTALL))
    kind = next(matches, None)
    if kind is None:
        return photo.read()
    try:
        from PIL import AvifImagePlugin, Image  # noqa: F401, PLC0415  # with AVIF: Pillow 11.3

        if kind == "HEIC":
            from pillow_heif import register_heif_opener  # noqa: PLC0415

            register_heif_opener()
    except ImportError as error:
        remedy = "run pip install --upgrade 'npair[heic]', or save it as JPEG"
        raise ValueError(f"{kind} is converted by Pillow and pillow-heif; {remedy}") from error
    try:
        formats = ["AVIF", "HEIF"] if kind == "HEIC" else [kind]  # mif1 and msf1 may be either
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(photo, formats=formats) as image:
                return _converted(image)
    except MemoryError:
        raise
    except Exception as error:  # damaged files make Pillow raise far more than OSError
        problem = f"the {kind} photo cannot be converted ({' '.join(str(error).split())})"
        raise ValueError(f"{problem}; save it as JPEG") from error


def _converted(image: Image.Image) -> bytes:
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(
            f"{image.width}x{image.height} pixels, more than the limit of {MAX_PIXELS}"
        )
    if getattr(image, "tag_v2", {}).get(254, 0) & 1:  # NewSubfileType: a reduced image
        raise ValueError("a camera's raw file, of which only the preview could be read")
    if image.mode in ("I", "F", "LAB"):
        raise ValueError(f"pixels of the kind {image.mode}")
    metadata = {"exif": image.info.get("exif", b""), "icc_profile": image.info.get("icc_profile")}
    mode = image.mode
    if mode.startswith("I;16"):  # as the server reads a PNG of 16 bits
        image = image.convert("I").point(lambda value: value / 256).convert("L")
    elif image.has_transparency_data:
        image = image.convert("LA" if mode == "LA" else "RGBA")
    elif mode != "CMYK":
        image = image.convert("L" if mode in ("1", "L") else "RGB")
    while image.width * image.height > SENT_PIXELS:
        image = image.reduce(2)
    encoded = io.BytesIO()  # PNG has no CMYK
    image.save(encoded, "JPEG" if mode == "CMYK" else "PNG", **ENCODING, **metadata)
    return encoded.getvalue()


def say(text: str) -> None:
    print(f"{CLEAR * sys.stderr.isatty()}{text}", file=sys.stderr, flush=True)


class Unread:
    """A photo for NpairClient.stream, which reads it when its batch is due."""

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)

    def read(self) -> bytes:
        """Raises: OSError; ValueError with a reason."""
        if self._path == STDIN:
            return encoded_photo(io.BytesIO(sys.stdin.buffer.read()))
        content = encoded_photo(self._path)
        if self._path.suffix.lower() in OTHER_SUFFIXES and not SERVED.match(content):
            raise ValueError("neither the server nor this command reads it; save it as JPEG")
        return content


class Rows:
    """Embed files and iterate over rows, in order, as embed prints them.

    Files without a vector are named on stderr and counted in ``left_out``.
    done: photos to skip. show_progress: on stderr, if it is a terminal.
    """

    def __init__(
        self,
        client: library.NpairClient,
        paths: Sequence[Path],
        done: Collection[str] = (),
        show_progress: bool = True,
    ) -> None:
        self._client, self._paths, self._done = client, paths, done
        self._show_progress = show_progress and sys.stderr.isatty()
        self.left_out = 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        passed_over = Counter[str]()
        found = map(str, photos_in(self._paths, passed_over))
        names, photos = itertools.tee(name for name in found if name not in self._done)
        stream, total, made_by = self._client.stream(map(Unread, photos)), len(self._done), None
        try:
            for result, name in zip(self._progress(stream), names, strict=True):
                total += 1
                self._client.retries = max(self._client.retries, PATIENT_RETRIES)
                if result.vector is None:
                    self.left_out += 1
                    say(f"{name}: {result.reason}")
                    continue
                if made_by is None:
                    manifest = self._client.manifest_sha256(stream.version)
                    made_by = {"version": stream.version, "manifest_sha256": manifest}
                vector = result.vector.tolist()
                yield {"photo": name, "model": self._client.model, **made_by, "embedding": vector}
        except library.VersionGoneError:
            raise
        except UNANSWERED as error:
            if total == len(self._done) and isinstance(error, library.UnreachableError):
                raise  # no photo is to blame
            waiting = _unanswered(stream, total - len(self._done), names)
            say(f"no answer for these photos: {', '.join(waiting)}")
            raise
        if passed_over:
            kinds = ", ".join(f"{count} {kind}" for kind, count in passed_over.most_common(10))
            say(f"{passed_over.total()} other files in folders passed over: {kinds}")
        if not total:
            raise ValueError(f"no photos in {', '.join(map(str, self._paths))}")
        if self.left_out:
            say(f"{self.left_out} of {total} photos left out")

    def _progress(self, results: Iterable[library.Embedded]) -> Iterator[library.Embedded]:
        """Show a bar, once it takes long enough to matter."""
        if not self._show_progress:
            yield from results
            return
        total, began, shown = sum(1 for _ in photos_in(self._paths)), time.monotonic(), 0.0
        for count, result in enumerate(results, 1):
            yield result
            passed = time.monotonic() - began
            if passed - shown > PROGRESS_SECONDS:
                shown, done = passed, count + len(self._done)
                left = timedelta(seconds=round((total - done) * passed / count))
                bar = "#" * (30 * done // total)
                line = f"[{bar:30}] {done} of {total} photos, {count / passed:.0f}/s, {left} left"
                print(f"{CLEAR}{line}", end="", file=sys.stderr, flush=True)
        print(end=CLEAR, file=sys.stderr, flush=True)


def photos_in(
    paths: Iterable[Path],
    passed_over: Counter[str] | None = None,
    visited: set[str] | None = None,
) -> Iterator[Path]:
    """Yield the paths, and for a folder the photos in it and below, sorted by name.

    Skips hidden files and folders, ``._`` files among them, and SYSTEM_FOLDERS. Follows symlinks,
    and visits no folder twice. npair.data.sources.find_photos has the same rule.

    passed_over: counts the other files of folders, except hidden ones, by suffix.
    visited: the real paths of folders that are not visited again.
    """
    passed_over = Counter() if passed_over is None else passed_over
    for path in paths:
        if not path.is_dir():
            yield path
            continue
        known = {os.path.realpath(path)} if visited is None else visited
        names = _names_in(path, passed_over, known)
        yield from photos_in((path / name for name in names), passed_over, known)


def _names_in(folder: Path, passed_over: Counter[str], visited: set[str]) -> list[str]:
    """Return the sorted names of a folder's photos, and of folders that are new to ``visited``."""
    names = []
    with os.scandir(folder) as entries:
        # Real folders first, so that a symlink to one of them is the one that is skipped.
        ordered = sorted(entries, key=lambda entry: (entry.is_symlink(), entry.name))
    for entry in ordered:
        file = Path(entry) if entry.is_symlink() else entry  # a Path bears circular symlinks
        suffix = Path(entry.name).suffix.lower()
        if entry.name.startswith(".") or entry.name.casefold() in SYSTEM_FOLDERS:
            continue
        if file.is_dir():
            if (real := os.path.realpath(entry)) not in visited:
                visited.add(real)
                names.append(entry.name)
        elif not file.is_file() and Path(entry).exists():  # a pipe or a device
            continue
        elif suffix in SUFFIXES | OTHER_SUFFIXES:  # a broken symlink as well: it will be named
            names.append(entry.name)
        else:
            passed_over[suffix or "without a suffix"] += 1
    return sorted(names)


def _unanswered(stream: library.EmbeddingStream, first: int, names: Iterator[str]) -> list[str]:
    """Name the photos without an answer. first: the index of the first of the names."""
    batches = list(stream.unanswered.items())
    indices = {index for start, count in batches for index in range(start, start + count)}
    end = max(indices, default=-1) + 1
    return [name for index, name in zip(range(first, end), names, strict=False) if index in indices]


def load(paths: Sequence[Path], client: library.NpairClient) -> list[Saved]:
    """Load names and vectors of files that embed has written, and pin the client to their version.

    Raises: OSError, or ValueError for another file, and for vectors that must not be compared with
    each other or with those of this server.
    """
    loaded: list[Saved] = []
    manifests: set[str] = set()
    remedy = "embed its photos again"
    for path in paths:
        try:
            saved, (model, version, manifest) = _load(path)
        except DAMAGED as error:
            raise ValueError(f"{path} holds no vectors: {error}") from error
        loaded.append(saved)
        if model != client.model:
            raise ValueError(f"{path} holds vectors of model {model}, not {client.model}")
        if client.version not in (None, version):
            mismatch = f"version {version}, not {client.version}"
            raise ValueError(f"{path} holds vectors of {mismatch}; {remedy}")
        client.version = version
        if not manifests and version in client.versions():
            manifests.add(client.manifest_sha256(version) or "")
        manifests.add(manifest)
        if len(manifests) > 1:
            mismatch = f"another version {version} than is served or saved beside it"
            raise ValueError(f"{path} holds vectors of {mismatch}; {remedy}")
    return loaded


def _load(path: Path) -> tuple[Saved, MadeBy]:
    """Raises: OSError, DAMAGED."""
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as saved:
            return (saved["names"].tolist(), saved["vectors"]), _made_by(saved)
    with path.open(encoding="utf-8") as lines:
        rows = [
            (str(row["photo"]), np.array(row["embedding"], np.float32), _made_by(row))
            for row in map(json.loads, lines)
        ]
    if not rows:
        raise ValueError("no rows")
    names, vectors, origins = zip(*rows, strict=True)
    if len(set(origins)) > 1:
        raise ValueError("rows of several versions")
    return (list(names), np.stack(vectors)), origins[0]


def resume(unfinished: Path, client: library.NpairClient) -> set[str]:
    """Read which photos an interrupted run has embedded, and pin the client to its version.

    Remove a last line that was cut off. Raises: ValueError if the file is damaged, or of another
    model or version.
    """
    done: set[str] = set()
    if not unfinished.exists():
        return done
    remedy = "delete it to begin again"
    with unfinished.open("r+b") as lines:
        for line in iter(lines.readline, b""):
            if not line.endswith(b"\n"):
                lines.truncate(lines.tell() - len(line))
                break
            try:
                row = json.loads(line)
                made_by = model, version, manifest = _made_by(row)
                name = row["photo"]
            except (ValueError, LookupError, TypeError) as error:
                raise ValueError(f"{unfinished} is damaged; {remedy}") from error
            if not done:
                expected = (client.model, client.version or version, manifest)
                client.version = version
            if made_by != expected:
                raise ValueError(f"{unfinished} has vectors of {model} version {version}; {remedy}")
            done.add(name)
    if (
        done
        and version in client.versions()
        and manifest != (client.manifest_sha256(version) or "")
    ):
        other = f"another version {version} than is served"
        raise ValueError(f"{unfinished} has vectors of {other}; {remedy}")
    return done


def _made_by(row: Mapping[str, Any]) -> MadeBy:
    manifest = row["manifest_sha256"]
    return str(row["model"]), str(row["version"]), "" if manifest is None else str(manifest)


def write_npz(lines: Path, out: Path) -> None:
    """Write what np.savez would, without holding the rows in memory.

    Arrays: names [n], vectors float32 [n, D], model, version, manifest_sha256.
    """

    def rows() -> Iterator[dict[str, Any]]:
        with lines.open(encoding="utf-8") as file:
            yield from map(json.loads, file)

    count, longest = 0, 1
    for row in rows():
        count, longest = count + 1, max(longest, len(row["photo"]))
    columns = {
        "names": ("photo", np.dtype((np.str_, longest)), (count,)),
        "vectors": ("embedding", np.dtype("<f4"), (count, len(row["embedding"]))),
    }
    unfinished = out.with_name(out.name + ".partial")
    try:
        with zipfile.ZipFile(unfinished, "w") as archive:
            for name, (key, dtype, shape) in columns.items():
                with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                    header = {"descr": dtype.str, "fortran_order": False, "shape": shape}
                    np.lib.format.write_array_header_1_0(file, header)  # type: ignore[no-untyped-call]
                    for row in rows():
                        file.write(np.array(row[key], dtype).tobytes())
            for name, value in zip(
                ("model", "version", "manifest_sha256"), _made_by(row), strict=True
            ):
                with archive.open(f"{name}.npy", "w") as file:
                    array = np.array(value)
                    np.lib.format.write_array(file, array, allow_pickle=False)  # type: ignore[no-untyped-call]
        unfinished.replace(out)
    finally:
        unfinished.unlink(missing_ok=True)
