"""A gallery of embedded photos, in a LanceDB database on disk or on S3, to search by photo.

    current.json                  names the table to search, the one before, and the photos' folder
    npair-5-8931af96574e.lance/   one version's table, a row for each photo

Vectors of two versions must never be compared, so each version of the model has its own table. A
row has the photo's name, label, other columns of the catalogue as JSON, SHA-256 and vector. Names
are relative to the gallery's folder, so that both can be moved together; in a bucket, to the root.
What was imported has the name id://ID, and the SHA-256 of its id.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from urllib.parse import quote, unquote_to_bytes

import numpy as np

from npair.client import NpairClient, Photo, Vectors, VersionGoneError
from npair.gallery.location import GalleryError, Where, locate, readable

MADE_BY = ("model", "version", "manifest_sha256")
PROBES = 64  # index parts read per search; benchmarks/gallery.py measures cost and recall
MOST = 100_000  # hits of a search; LanceDB counts rows, REFINED times as many, in 32 bits
REFINED = 10  # of quantised vectors, this many times k are compared again as they were embedded
IMPORTED = "id://"  # begins no path: a path has no empty part
ID = re.compile("[0-9a-f]{64}")  # anything else could be SQL

T = TypeVar("T")


class PhotoGoneError(GalleryError, LookupError):
    """The gallery has no such photo, or its file is gone."""


class Hit(NamedTuple):
    """A photo of the gallery and its cosine similarity to the query.

    id: SHA-256 of the file's bytes, so that a photo keeps it over builds and moves; copies share
    it. photo: the file's path. columns: the other columns of the catalogue.
    """

    id: str
    cosine: float
    label: str
    photo: str
    columns: dict[str, str]


class Gallery:
    """A gallery to search. model, version, manifest_sha256: the origin of its vectors.

    Calls on one object must not overlap; ``copy.copy`` is cheap.
    """

    def __init__(
        self, folder: Where, photos: Path | None = None, refresh: float | None = None
    ) -> None:
        """folder: the gallery's, or s3://BUCKET/PREFIX. photos: where the photos' folder is now, if
        it was moved without the gallery. refresh: look for a newer build at most this often, in
        seconds; by default 0 on a disk, and 5 on S3, where each look is a request. If a search
        fails, it looks at once.

        Raises: GalleryError if the gallery is missing or damaged.
        """
        self.folder, self._photos = folder, photos
        self._location = locate(folder)
        self.refresh = self._location.refresh if refresh is None else refresh
        self._open(self._pointer())

    def _pointer(self) -> dict[str, str]:
        self._looked = time.monotonic()
        with readable(self._location):
            pointer = self._location.pointer()
        if "table" not in pointer:
            raise GalleryError(f"there is no gallery in {self.folder}; npair index build makes one")
        return pointer

    def _open(self, pointer: dict[str, str]) -> None:
        with readable(self._location):
            self._built_from = pointer["photos"]
            self.table = self._location.database(self.refresh).open_table(pointer["table"])
            self._refined = any(index.index_type == "IvfPq" for index in self.table.list_indices())
            metadata = self.table.schema.metadata
            made_by = (metadata[key.encode()].decode() for key in MADE_BY)
            self.model, self.version, self.manifest_sha256 = made_by

    def follow(self, *, now: bool = False) -> bool:
        """Open the table that another process has built since, if the last look is old enough.

        now: however old it is. Returns: whether it is another. Raises: GalleryError.
        """
        if not now and time.monotonic() - self._looked < self.refresh:
            return False
        pointer = self._pointer()
        if pointer["table"] == self.table.name:
            return False
        self._open(pointer)
        return True

    def _following(self, ask: Callable[[], T]) -> T:
        """Ask, and if that fails for a table that is not the one to search any more, ask again."""
        self.follow()
        try:
            return ask()
        except GalleryError:
            if not self.follow(now=True):
                raise
        return ask()

    def __len__(self) -> int:
        with readable(self._location):
            return int(self.table.count_rows())

    def search(self, photo: Photo, client: NpairClient, k: int = 5) -> list[Hit]:
        """Return the k most similar photos, nearest first, or all if there are fewer.

        The client's server embeds the photo with the gallery's version, even if the client is
        pinned to another.
        Raises: GalleryError if the server does not serve that version or the gallery is damaged,
        ValueError if k is not 1 to MOST, client.NpairError, OSError if the photo cannot be read.
        """
        if not 1 <= k <= MOST:
            raise ValueError(f"k must be 1 to {MOST}, got {k}")
        return self._following(lambda: self._search(photo, client, k))

    def _search(self, photo: Photo, client: NpairClient, k: int) -> list[Hit]:
        if client.model != self.model:
            raise GalleryError(
                f"the gallery in {self.folder} is of model {self.model}, not {client.model};"
                " name another folder"
            )
        with pinned_to(self.version, client) as pinned:
            vector = pinned.embed(photo).vectors[0]
            served = pinned.manifest_sha256(self.version) or ""
        if served != self.manifest_sha256:
            raise GalleryError(
                f"the gallery in {self.folder} is of another version {self.version} than is served:"
                " their manifests differ; build it again"
            )
        return self.nearest(vector, k)

    def nearest(self, vector: Vectors, k: int, without: str = "") -> list[Hit]:
        """Return the k rows most similar to a vector of the gallery's version, float32 [128].

        without: the id of a photo to leave out, with all its copies.
        Raises: GalleryError, ValueError if that is no id.
        """
        if without and not ID.fullmatch(without):
            raise ValueError(f"{without!r} is no id of a photo")
        with readable(self._location):
            query: Any = self.table.search(vector)  # typed as a search for text
            if without:
                query = query.where(f"sha256 != '{without}'", prefilter=True)
            query = query.distance_type("cosine").nprobes(PROBES).limit(k)
            if self._refined:
                query = query.refine_factor(REFINED)
            names = ["photo", "label", "columns", "sha256", "_distance"]
            rows = query.select(names).to_list()
            return [
                Hit(
                    row["sha256"],
                    1 - row["_distance"],
                    row["label"],
                    self.place(row["photo"]),
                    json.loads(row["columns"]),
                )
                for row in rows
            ]

    def vector(self, photo_id: str) -> Vectors:
        """Return a photo's vector, float32 [128]. Raises: PhotoGoneError, GalleryError."""
        rows = self._following(lambda: self._rows(photo_id, "vector"))
        return np.asarray(rows[0]["vector"], np.float32)

    def photo(self, photo_id: str) -> Path:
        """Return the path of a photo's file. Raises: PhotoGoneError, GalleryError."""
        rows = self._following(lambda: self._rows(photo_id, "photo"))
        places = [self.place(row["photo"]) for row in rows]
        for place in places:
            if (path := Path(place)).is_file():
                return path
        raise PhotoGoneError(
            f"{places[0]} is gone; put it back, build the gallery again, or say where the photos"
            " are"
        )

    def place(self, name: str) -> str:
        """Return what users know a row by: its photo's path, or what was imported as its id."""
        place = place_of(name, self._location.base)
        if self._photos is None or name.startswith(IMPORTED):
            return place
        path, root = Path(place), path_of(self._built_from, self._location.base)
        moved = self._photos / path.relative_to(root) if path.is_relative_to(root) else path
        return str(moved)

    def _rows(self, photo_id: str, column: str) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = []
        if ID.fullmatch(photo_id):
            with readable(self._location):
                query = self.table.search().where(f"sha256 = '{photo_id}'")
                rows = query.select([column]).to_list()
        if not rows:
            raise PhotoGoneError(f"the gallery in {self.folder} has no photo {photo_id!r}")
        return rows


def name_of(path: Path, folder: Path) -> str:
    """Return the name under which a gallery stores an absolute path: relative to its folder, with
    '%' and bytes that are not UTF-8 percent-encoded.
    """
    relative = os.path.relpath(path, folder.resolve())
    return re.sub("[%\udc80-\udcff]", lambda match: quote(os.fsencode(match[0])), relative)


def path_of(name: str, folder: Path) -> Path:
    """Return the absolute path of a stored name."""
    path = os.fsdecode(unquote_to_bytes(name))
    return Path(os.path.normpath(folder.resolve() / path))


def place_of(name: str, folder: Path) -> str:
    """Return what users know a row by: a path, or what was imported as its id."""
    return name.removeprefix(IMPORTED) if name.startswith(IMPORTED) else str(path_of(name, folder))


def storable(text: str) -> str:
    """Escape what UTF-8 cannot hold: bytes of a file's name that are not UTF-8."""
    return text.encode(errors="backslashreplace").decode()


@contextlib.contextmanager
def pinned_to(version: str, client: NpairClient) -> Iterator[NpairClient]:
    """Provide a copy of the client pinned to a version. Raises: GalleryError if that is gone."""
    with client.copy() as pinned:
        pinned.version = version
        try:
            yield pinned
        except VersionGoneError as error:
            remedy = "rebuild the gallery with the served version: npair index build"
            raise GalleryError(f"{error}; {remedy}") from error
