"""Lists without a table: photos below a folder or a prefix, and tar shards."""

from __future__ import annotations

import itertools
import tarfile
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
from pyarrow import fs

from npair.bulk import BulkError
from npair.bulk.source import Photo, Piece, below, is_photo
from npair.bulk.storage import files_in, locate, reachable, resolve
from npair.data.sources import find_photos

READERS = 16  # photos that an actor fetches at once, since each waits for the object store
SHARD_BYTES = 64 << 20  # of a shard per request, and in memory
REST_BYTES = 1 << 20  # of what follows a shard's end, at once


@dataclass(frozen=True)
class Folder:
    """Photos below a folder or a prefix, known by their suffixes. Their ids are relative to it."""

    location: str
    kind: str = "photos"
    unit: str = "photos"
    stamp: str = ""

    def pieces(self, rows: int) -> Iterator[Piece]:
        system, root = locate(self.location)
        if isinstance(system, fs.LocalFileSystem) and Path(root).is_dir():
            found = find_photos(Path(root))
            paths = sorted(map(str, found.photos + found.others))
        else:
            with reachable(self.location):
                paths = [file.path for file in files_in(system, root) if is_photo(file.path)]
        if paths == [root]:
            raise BulkError(f"{self.location} is one photo; name a folder, a table or shards")
        names = [below(path, root) for path in paths]
        for start in range(0, len(names), rows):
            part = names[start : start + rows]
            yield Piece(len(part), {"ids": part, "paths": part})

    def photos(self, content: Any, most: int) -> Iterator[Photo]:
        return fetch(self.location, content["ids"], content["paths"], most)


@dataclass(frozen=True)
class Shards:
    """Tar files, each a piece of its own. A photo's id is shard/name.

    sizes: bytes of each shard by its path below the location.
    """

    location: str
    sizes: dict[str, int]
    kind: str = "shards"
    unit: str = "bytes"
    stamp: str = ""

    def pieces(self, rows: int) -> Iterator[Piece]:  # noqa: ARG002 - a shard stays whole
        for shard, size in self.sizes.items():
            yield Piece(size, shard)

    def photos(self, content: Any, most: int) -> Iterator[Photo]:
        location = f"{self.location}/{content}" if content else self.location
        system, path = locate(location)
        shard, copies = content or PurePosixPath(path).name, Counter[str]()
        with reachable(location), system.open_input_stream(path, buffer_size=SHARD_BYTES) as stream:
            try:
                for name, photo in _members(stream, self.sizes[content], most):
                    copies[name] += 1
                    if copies[name] == 1:
                        yield Photo(f"{shard}/{name}", photo)
                    else:
                        yield Photo(f"{shard}/{name}#{copies[name]}", "the shard has it twice")
            except tarfile.TarError as error:
                yield Photo(shard, f"the shard is damaged after {copies.total()} photos ({error})")
            else:
                if not copies:
                    yield Photo(shard, "the shard holds no photo")


class _Header(tarfile.TarInfo):
    """A header of a shard. One that is wrong is an error, where tarfile takes it for the end."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _Header:
        try:
            return super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            if any(buf):
                raise tarfile.ReadError(str(error)) from error
            raise


def _members(stream: Any, size: int, most: int) -> Iterator[tuple[str, bytes | str]]:
    """Yield the photos in a tar file, or why one is not read.

    Raises: tarfile.TarError if the file is damaged or cut off.
    """
    try:
        with tarfile.open(fileobj=stream, mode="r|", tarinfo=_Header) as shard:
            for member in shard:
                # The next header is at shard.offset. tarfile reads on to there: for years, if this
                # one claims 2^62 bytes. The last block may be a shorter one.
                if not member.offset_data <= shard.offset < size + tarfile.BLOCKSIZE:
                    raise tarfile.ReadError("unexpected end of data")
                if is_photo(member.name) and not member.isdir():
                    yield _text(member.name), _content(shard, member, most)
            if size - shard.offset < tarfile.BLOCKSIZE:
                raise tarfile.ReadError("it has no end marker")
            assert shard.fileobj is not None
            while rest := shard.fileobj.read(REST_BYTES):
                if rest.strip(b"\0"):
                    raise tarfile.ReadError("more data after its end")
    except (ValueError, OverflowError, EOFError, RecursionError) as error:
        raise tarfile.ReadError(f"a header makes no sense: {error}") from error


def _content(shard: tarfile.TarFile, member: tarfile.TarInfo, most: int) -> bytes | str:
    """Read a photo of a shard, or return why it is not read."""
    if member.islnk() or member.issym():
        target = _text(member.linkname)
        return f"a link to {target}; tar --dereference --hard-dereference packs the photo itself"
    file = shard.extractfile(member)
    if file is None or member.issparse():  # the map of a sparse file can lead anywhere
        return "no plain file"
    return file.read(most + 1)


def _text(name: str) -> str:
    """Write bytes that are not UTF-8 as text: names in a shard may hold some, rows cannot."""
    return name.encode(errors="surrogateescape").decode(errors="backslashreplace")


def fetch(folder: str, ids: Sequence[str], paths: Sequence[str], most: int) -> Iterator[Photo]:
    """Read photos by several threads, in order. A path is relative to the folder, or a location."""
    waiting: deque[tuple[str, Future[bytes | str]]] = deque()
    with ThreadPoolExecutor(READERS) as pool:
        for name, path in zip(ids, paths, strict=True):
            location = path if "://" in path or path.startswith("/") else f"{folder}/{path}"
            waiting.append((name, pool.submit(_read, location, most)))
            if len(waiting) == 2 * READERS:
                yield _photo(*waiting.popleft())
        yield from itertools.starmap(_photo, waiting)


def _photo(name: str, future: Future[bytes | str]) -> Photo:
    return Photo(name, future.result())


def _read(location: str, most: int) -> bytes | str:
    """Read a photo, or return why this one cannot be read. Raises: BulkError for other faults."""
    with reachable(location):
        try:
            system, path = resolve(location)
            with system.open_input_stream(path) as stream:
                content: bytes = stream.read(most + 1)
                return content
        except FileNotFoundError:
            return "there is no such file"
        except pa.ArrowInvalid as error:
            return f"the path cannot be used: {error}"
        except OSError as error:
            if "://" in location and location.rstrip("/").count("/") > 2:  # else a bucket
                raise
            return f"the file cannot be read: {error.strerror or error}"
