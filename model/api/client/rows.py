"""Rows of a photo and its vector: embedded from files, saved as .npz or .jsonl, and loaded."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import os
import sys
import time
import zipfile
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import IO, Any

import numpy as np

from .client import NpairClient
from .errors import (
    RequestTimeoutError,
    ServerFaultError,
    UnavailableError,
    UnreachableError,
    VersionGoneError,
)
from .photos import Unread, photos_in
from .results import Embedded, Vectors
from .stream import EmbeddingStream

SAVED_SUFFIXES = (".npz", ".jsonl")
Saved = tuple[list[str], Vectors]  # names and vectors of a file
MadeBy = tuple[str, str, str]  # model, version, hash of its manifest or an empty string
UNANSWERED = (UnavailableError, RequestTimeoutError, ServerFaultError)
CLEAR = "\r\033[K"  # the line of a terminal
PROGRESS_SECONDS = 0.5  # between two pictures of it


def say(text: str) -> None:
    print(f"{CLEAR * sys.stderr.isatty()}{text}", file=sys.stderr, flush=True)


def shown(name: Path | str) -> str:
    """Return a name for a line of a terminal; escape line breaks and bytes that are not UTF-8."""
    return str(name) if str(name).isprintable() else ascii(str(name))


class Rows:
    """Embed files and iterate over rows, in order, as embed prints them.

    Files without a vector are named on stderr and counted in ``left_out``.
    done: photos to skip. show_progress: on stderr, if it is a terminal.
    """

    def __init__(
        self,
        client: NpairClient,
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
                self._client.be_patient()
                if result.vector is None:
                    self.left_out += 1
                    say(f"{shown(name)}: {result.reason}")
                    continue
                if made_by is None:
                    manifest = self._client.manifest_sha256(stream.version)
                    made_by = {"version": stream.version, "manifest_sha256": manifest}
                vector = result.vector.tolist()
                yield {"photo": name, "model": self._client.model, **made_by, "embedding": vector}
        except VersionGoneError:
            raise
        except UNANSWERED as error:
            if total == len(self._done) and isinstance(error, UnreachableError):
                raise  # no photo is to blame
            waiting = _unanswered(stream, total - len(self._done), names)
            say(f"no answer for these photos: {', '.join(map(shown, waiting))}")
            raise
        if passed_over:
            most = passed_over.most_common(10)
            kinds = ", ".join(f"{count} {shown(kind)}" for kind, count in most)
            say(f"{passed_over.total()} other files in folders passed over: {kinds}")
        if not total:
            raise ValueError(f"no photos in {', '.join(map(shown, self._paths))}")
        if self.left_out:
            say(f"{self.left_out} of {total} photos left out")

    def _progress(self, results: Iterable[Embedded]) -> Iterator[Embedded]:
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


def _unanswered(stream: EmbeddingStream, first: int, names: Iterator[str]) -> list[str]:
    """Name the photos without an answer. first: the index of the first of the names."""
    batches = list(stream.unanswered.items())
    indices = {index for start, count in batches for index in range(start, start + count)}
    end = max(indices, default=-1) + 1
    return [name for index, name in zip(range(first, end), names, strict=False) if index in indices]


def load_saved(paths: Sequence[Path], client: NpairClient) -> list[Saved]:
    """Load names and vectors of files that embed has written, and pin the client to their version.

    Raises: OSError, or ValueError for another file, and for vectors that must not be compared with
    each other or with those of this server.
    """
    loaded: list[Saved] = []
    manifests: set[str] = set()
    remedy = "embed its photos again"
    for path in paths:
        try:
            saved, (model, version, manifest) = _read_saved(path)
        except OSError:
            raise
        except Exception as error:  # damaged files make numpy and zipfile raise far more
            raise ValueError(f"{path} holds no vectors: {error}") from error
        loaded.append(saved)
        if len({vectors.shape[1] for _, vectors in loaded}) > 1:
            other = f"vectors of {saved[1].shape[1]} numbers, and {paths[0]} others"
            raise ValueError(f"{path} holds {other}; {remedy}")
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


def _read_saved(path: Path) -> tuple[Saved, MadeBy]:
    """Raises: OSError, and almost anything for a damaged file."""
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as saved:
            names, vectors, made_by = saved["names"], saved["vectors"], _made_by(saved)
    else:
        with path.open(encoding="utf-8") as lines:
            rows = [
                (row["photo"], np.array(row["embedding"], np.float32), _made_by(row))
                for row in map(json.loads, lines)
            ]
        if not rows:
            raise ValueError("no rows")
        names, each, origins = zip(*rows, strict=True)
        if len(set(origins)) > 1:
            raise ValueError("rows of several versions")
        vectors, made_by = np.stack(each), origins[0]
    shape = np.shape(vectors)
    if len(shape) != 2 or np.shape(names) != shape[:1]:
        raise ValueError(f"names of the shape {np.shape(names)} for vectors of {shape}")
    if not (np.abs(np.linalg.norm(vectors, axis=1) - 1) < 0.01).all():  # nan is not
        raise ValueError("not all of them have the length 1")
    return ([*map(str, names)], vectors), made_by


@contextlib.contextmanager
def alone(path: Path) -> Iterator[IO[bytes]]:
    """Open a file to read and append, which no other process may open this way meanwhile.

    Raises: OSError, or ValueError if another process has it open.
    """
    while True:
        with path.open("a+b") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ValueError(f"another embed is writing {path}") from error
            if _is_at(path, file):
                yield file
                return


def _is_at(path: Path, file: IO[bytes]) -> bool:
    """Tell whether a file still has its path: who had it before may have finished and moved it."""
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def resume(unfinished: IO[bytes], client: NpairClient) -> set[str]:
    """Read which photos an interrupted run has embedded, and pin the client to its version.

    Remove a last line that was cut off. Raises: ValueError if the file is damaged, or of another
    model or version.
    """
    done: set[str] = set()
    remedy = "delete it to begin again"
    unfinished.seek(0)
    for line in iter(unfinished.readline, b""):
        if not line.endswith(b"\n"):
            unfinished.truncate(unfinished.tell() - len(line))
            break
        try:
            row = json.loads(line)
            made_by = model, version, manifest = _made_by(row)
            name = row["photo"]
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            raise ValueError(f"{unfinished.name} is damaged; {remedy}") from error
        if not done:
            expected = (client.model, client.version or version, manifest)
            client.version = version
        if made_by != expected:
            other = f"{model} version {version}"
            raise ValueError(f"{unfinished.name} has vectors of {other}; {remedy}")
        done.add(name)
    if (
        done
        and version in client.versions()
        and manifest != (client.manifest_sha256(version) or "")
    ):
        other = f"another version {version} than is served"
        raise ValueError(f"{unfinished.name} has vectors of {other}; {remedy}")
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
