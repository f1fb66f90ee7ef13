"""A gallery of embedded photos, in a LanceDB database on disk, to search by photo.

    current.json                  names the table to search, the one before, and the photos' folder
    npair-5-8931af96574e.lance/   one version's table, a row for each photo

Vectors of two versions must never be compared, so each version of the model has its own table. A
row has the photo's name, label, other columns of the catalogue as JSON, SHA-256 and vector. Names
are relative to the gallery's folder, so that both can be moved together. Galleries of npair 0.1
have absolute paths and no columns; the next build changes them.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote, unquote_to_bytes

import lancedb
import numpy as np

from npair.client import NpairClient, Photo, Vectors, VersionGoneError

POINTER = "current.json"
MADE_BY = ("model", "version", "manifest_sha256")
PROBES = 64  # index parts read per search; benchmarks/gallery.py measures cost and recall


class GalleryError(RuntimeError):
    """The gallery cannot be built or searched; the message says what to do."""


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
    """A gallery to search. model, version, manifest_sha256: the origin of its vectors."""

    def __init__(self, folder: Path, photos: Path | None = None) -> None:
        """photos: where the folder that was built last is now, if it was moved by itself.

        Raises: GalleryError if the gallery is missing or damaged.
        """
        self.folder, self._photos = folder, photos
        self._open(self._name())

    def _name(self) -> str:
        with readable(self.folder):
            name = read_pointer(self.folder).get("table")
        if name is None:
            raise GalleryError(f"there is no gallery in {self.folder}; npair index build makes one")
        return name

    def _open(self, name: str) -> None:
        with readable(self.folder):
            self._built_from = read_pointer(self.folder).get("photos")
            self.table = database(self.folder).open_table(name)
            metadata = self.table.schema.metadata
            made_by = (metadata[key.encode()].decode() for key in MADE_BY)
            self.model, self.version, self.manifest_sha256 = made_by

    def __len__(self) -> int:
        with readable(self.folder):
            return int(self.table.count_rows())

    def search(self, photo: Photo, client: NpairClient, k: int = 5) -> list[Hit]:
        """Return the k most similar photos, nearest first, or all if there are fewer.

        The client's server embeds the photo with the gallery's version, even if the client is
        pinned to another.
        Raises: GalleryError if the server does not serve that version or the gallery is damaged,
        ValueError if k < 1, client.NpairError, OSError if the photo cannot be read.
        """
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        if (name := self._name()) != self.table.name:  # another version was built since
            self._open(name)
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
                f"the gallery in {self.folder} is of another version {self.version} than is served;"
                " build it anew"
            )
        return self.nearest(vector, k)

    def nearest(self, vector: Vectors, k: int) -> list[Hit]:
        """Return the k rows most similar to a vector of the gallery's version, float32 [128].

        Raises: GalleryError.
        """
        with readable(self.folder):
            query: Any = self.table.search(vector)  # typed as a search for text
            query = query.distance_type("cosine").nprobes(PROBES).limit(k)
            known = set(self.table.schema.names) - {"vector"}
            rows = query.select([*sorted(known), "_distance"]).to_list()
            return [
                Hit(
                    row["sha256"],
                    1 - row["_distance"],
                    row["label"],
                    str(self._path(row["photo"])),
                    json.loads(row.get("columns") or "{}"),
                )
                for row in rows
            ]

    def vector(self, photo_id: str) -> Vectors:
        """Return a photo's vector, float32 [128]. Raises: PhotoGoneError, GalleryError."""
        vector = self._rows(photo_id, "vector")[0]["vector"]
        return np.asarray(vector, np.float32)

    def photo(self, photo_id: str) -> Path:
        """Return the path of a photo's file. Raises: PhotoGoneError, GalleryError."""
        paths = [self._path(row["photo"]) for row in self._rows(photo_id, "photo")]
        for path in paths:
            if path.is_file():
                return path
        raise PhotoGoneError(
            f"{paths[0]} is gone; put it back, build the gallery anew, or say where the photos are"
        )

    def _path(self, name: str) -> Path:
        path = path_of(name, self.folder)
        if self._photos is None:
            return path
        if self._built_from is None:
            raise GalleryError(
                f"the gallery in {self.folder} does not know which folder its photos were in; build"
                " it anew: npair index build"
            )
        root = path_of(self._built_from, self.folder)
        return self._photos / path.relative_to(root) if path.is_relative_to(root) else path

    def _rows(self, photo_id: str, column: str) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = []
        if re.fullmatch("[0-9a-f]{64}", photo_id):  # anything else could be SQL
            with readable(self.folder):
                query = self.table.search().where(f"sha256 = '{photo_id}'")
                rows = query.select([column]).to_list()
        if not rows:
            raise PhotoGoneError(f"the gallery in {self.folder} has no photo {photo_id!r}")
        return rows


def name_of(path: Path, folder: Path) -> str:
    """Return the name that a gallery's folder stores for an absolute path: relative, as in a URL,
    so that bytes that are not UTF-8 fit into it; only these and '%' are quoted.
    """
    relative = os.path.relpath(path, folder.resolve())
    return re.sub("[%\udc80-\udcff]", lambda match: quote(os.fsencode(match[0])), relative)


def path_of(name: str, folder: Path) -> Path:
    """Return the absolute path of a stored name."""
    if name.startswith("/"):  # from npair 0.1
        return Path(name)
    path = os.fsdecode(unquote_to_bytes(name))
    return Path(os.path.normpath(folder.resolve() / path))


def read_pointer(folder: Path) -> dict[str, str]:
    try:
        return dict(json.loads((folder / POINTER).read_bytes()))
    except FileNotFoundError:
        return {}


def database(folder: Path) -> lancedb.DBConnection:
    """Open the database so that reads see the writes of other processes."""
    return lancedb.connect(folder, read_consistency_interval=timedelta(0))


@contextlib.contextmanager
def readable(folder: Path) -> Iterator[None]:
    """Map the errors that LanceDB raises for damaged files to GalleryError."""
    try:
        yield
    except (PermissionError, GalleryError):
        raise
    except (LookupError, OSError, RuntimeError, TypeError, ValueError) as error:
        raise GalleryError(
            f"the gallery in {folder} is damaged; delete it, and build it anew: npair index build"
            f" ({error})"
        ) from error


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
