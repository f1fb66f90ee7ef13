"""A gallery of embedded photos with labels, in a LanceDB database on disk, to search by photo.

    current.json                    names the table to search, and the one before
    npair-5-8931af96574e.lance/     one version's table: photo, label, sha256 of the photo, vector

Vectors of two versions must never be compared, so each version of the model has its own table. A
new version's table is filled beside the current one, and replaces it in one step.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from filelock import FileLock, Timeout
from tqdm import tqdm

from npair.client import PIXEL, NpairClient, Photo, Vectors, VersionGoneError
from npair.data.dataset import label_of
from npair.data.files import digest_of, parallel_map, shown
from npair.data.sources import find_photos, read_dataset, split_folders, summary
from npair.data.tables import find_lists

os.environ.setdefault("LANCEDB_LOG", "error")  # its warnings of empty index parts are harmless
import lancedb  # reads the variable when imported

POINTER = "current.json"
MADE_BY = ("model", "version", "manifest_sha256")
ROWS = 1000  # per write: the most that are embedded again after a crash
EXACT = 5000  # rows up to which a full scan is faster than an index
PROBES = 64  # index parts read per search; benchmarks/gallery.py measures cost and recall
READ = timedelta(hours=1)  # replaced data stay this long for searches that have started


class GalleryError(RuntimeError):
    """The gallery cannot be built or searched; the message says what to do."""


class Built(NamedTuple):
    """The outcome of a build.

    photos: how many the gallery holds, of which ``embedded`` were new or changed. left_out:
    reasons by photo. ignored: other files and folders of the source, in words.
    """

    version: str
    photos: int
    embedded: int
    left_out: dict[str, str]
    ignored: str = ""


class PhotoGoneError(GalleryError, LookupError):
    """The gallery has no such photo, or its file is gone."""


class Hit(NamedTuple):
    """A photo of the gallery and its cosine similarity to the query.

    id: SHA-256 of the file's bytes, so that a photo keeps it over builds and moves; copies share
    it. photo: the path, for people. columns: the other columns of the catalogue.
    """

    id: str
    cosine: float
    label: str
    photo: str
    columns: dict[str, str]


class Gallery:
    """A gallery to search. model, version, manifest_sha256: the origin of its vectors."""

    def __init__(self, folder: Path) -> None:
        """Raises: GalleryError if the gallery is missing or damaged."""
        self.folder = folder
        self._open(self._name())

    def _name(self) -> str:
        with _readable(self.folder):
            name = _pointer(self.folder).get("table")
        if name is None:
            raise GalleryError(f"there is no gallery in {self.folder}; npair index build makes one")
        return name

    def _open(self, name: str) -> None:
        with _readable(self.folder):
            self.table = _database(self.folder).open_table(name)
            self._revision = self.table.version
            metadata = self.table.schema.metadata
            made_by = (metadata[key.encode()].decode() for key in MADE_BY)
            self.model, self.version, self.manifest_sha256 = made_by

    def __len__(self) -> int:
        with _readable(self.folder):
            return int(self.table.count_rows())

    def stale(self) -> bool:
        """Tell whether a build has changed the gallery since it was opened.

        Changed rows of the same version are found without opening it again; vectors of another
        version are not. Raises: GalleryError.
        """
        with _readable(self.folder):
            return self._name() != self.table.name or self.table.version != self._revision

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
        with _pinned(client, self.version) as pinned:
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
        with _readable(self.folder):
            query: Any = self.table.search(vector)  # typed as a search for text
            query = query.distance_type("cosine").nprobes(PROBES).limit(k)
            names = {"photo", "label", "sha256", "columns"} & set(self.table.schema.names)
            rows = query.select([*sorted(names), "_distance"]).to_list()
            return [
                Hit(
                    row["sha256"],
                    1 - row["_distance"],
                    row["label"],
                    row["photo"],
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
        names: list[str] = [row["photo"] for row in self._rows(photo_id, "photo")]
        paths = [self.folder / name for name in names]
        for path in paths:
            if path.is_file():
                return path
        raise PhotoGoneError(f"{paths[0]} is gone; put it back, or build the gallery anew")

    def _rows(self, photo_id: str, column: str) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = []
        if re.fullmatch("[0-9a-f]{64}", photo_id):  # anything else could be SQL
            with _readable(self.folder):
                query = self.table.search().where(f"sha256 = '{photo_id}'")
                rows = query.select([column]).to_list()
        if not rows:
            raise PhotoGoneError(f"the gallery in {self.folder} has no photo {photo_id!r}")
        return rows


def build(source: Path, folder: Path, client: NpairClient) -> Built:
    """Embed a source's photos into a gallery, with the version that the client's server serves.

    Photos that an earlier build stored, even a killed one, are not embedded again unless their
    bytes, path or label have changed. Photos that are gone from the source are removed. The old
    version's table is searched until the new one's is complete, and then kept, so that going back
    costs nothing.
    source: see ``labels_of``. folder: the gallery's, made if need be.
    Raises: GalleryError, data.DataError if the source cannot be read, client.NpairError.
    """
    labels, ignored = _labels(source.absolute())
    if not labels:
        raise GalleryError(f"no photos in {source}" + f", but {ignored}" * bool(ignored))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        # The kernel releases the lock if the process dies.
        lock = FileLock(folder / "build.lock", fallback_to_soft=False).acquire(blocking=False)
    except Timeout as error:
        raise GalleryError(
            f"another process builds the gallery in {folder}; wait for it, then try again"
        ) from error
    with lock:
        example, version = client.embed(PIXEL)
        with _pinned(client, version) as pinned:
            made_by = (client.model, version, pinned.manifest_sha256(version) or "")
            with _readable(folder):
                pointer = _pointer(folder)
                table = create(folder, made_by, example.shape[1])
                stored = _stored(table)
            table.optimize(cleanup_older_than=READ)
            digests = parallel_map(_digest, list(labels), "read")
            wanted = {
                shown(path): (shown(label), digest)
                for (path, label), digest in zip(labels.items(), digests, strict=True)
            }
            new = [path for path in labels if stored.get(shown(path)) != wanted[shown(path)]]
            left_out = _embed(table, new, wanted, pinned, stored)
            # Last, so that searches find the old photos until the new ones are stored.
            gone = [photo for photo in stored if photo not in wanted or photo in left_out]
            _delete(table, gone)
        count = table.count_rows()
        if not count:
            photo, reason = next(iter(left_out.items()))
            raise GalleryError(
                f"none of the photos in {source} could be embedded, such as {photo}: {reason}"
            )
        index(table)
        _switch(folder, pointer, table.name)
    return Built(version, count, len(new) - len(left_out), left_out, ignored)


def labels_of(source: Path) -> dict[Path, str]:
    """Return the label of every photo of a source.

    source: anything that ``data.read_dataset`` accepts, with all its splits; or any other folder,
    where the subfolder is the label, empty at the top.
    Raises: data.DataError.
    """
    return _labels(source)[0]


def _labels(source: Path) -> tuple[dict[Path, str], str]:
    """Return ``labels_of`` the source, and in words, its files that are not photos."""
    if not source.is_dir() or find_lists(source) or find_lists(source / "dataset"):
        splits = read_dataset(source).splits.values()
        labels = {
            path: photos.fine_names[fine]
            for photos in splits
            for path, fine in zip(photos.paths, photos.fine, strict=True)
        }
        return labels, ""
    paths, ignored = find_photos(source)
    split_names = split_folders(source, paths)
    labels = {}
    for path in paths:
        folders = path.relative_to(source).parts[:-1]
        if folders and folders[0] in split_names:
            folders = folders[1:]
        labels[path] = "/".join(map(label_of, folders))
    return labels, summary(ignored)


def create(folder: Path, made_by: Sequence[str], dimension: int) -> lancedb.table.Table:
    """Open the table of a version, or create it.

    made_by: model, version and manifest_sha256, which all are part of the table's name.
    """
    columns = {
        **dict.fromkeys(("photo", "label", "sha256"), pa.string()),
        "vector": pa.list_(pa.float32(), dimension),
    }
    schema = pa.schema(columns.items(), dict(zip(MADE_BY, made_by, strict=True)))
    model, version, manifest = made_by
    name = f"{model}-{version}-{manifest[:12] or 'unknown'}"
    return _database(folder).create_table(name, schema=schema, exist_ok=True)


def index(table: lancedb.table.Table) -> None:
    """Index a large table if it has rows without an index; searches scan these."""
    count = table.count_rows()
    indices = table.list_indices()
    if count > EXACT and min((index.num_unindexed_rows or 0 for index in indices), default=count):
        parts = math.isqrt(count)
        config = lancedb.index.IvfFlat(distance_type="cosine", num_partitions=parts)
        table.create_index("vector", config=config)


def _database(folder: Path) -> lancedb.DBConnection:
    """Open the database so that reads see the writes of other processes."""
    return lancedb.connect(folder, read_consistency_interval=timedelta(0))


def _stored(table: lancedb.table.Table) -> dict[str, tuple[str, str]]:
    """Return label and digest by photo."""
    columns = table.search().select(["photo", "label", "sha256"]).to_arrow()
    photos, *rows = (columns[name].to_pylist() for name in ("photo", "label", "sha256"))
    return dict(zip(photos, zip(*rows, strict=True), strict=True))


def _delete(table: lancedb.table.Table, photos: Sequence[str]) -> None:
    for start in range(0, len(photos), ROWS):
        quoted = ("'" + photo.replace("'", "''") + "'" for photo in photos[start : start + ROWS])
        table.delete(f"photo IN ({', '.join(quoted)})")


def _embed(
    table: lancedb.table.Table,
    paths: Sequence[Path],
    wanted: Mapping[str, tuple[str, str]],
    client: NpairClient,
    stored: Collection[str],
) -> dict[str, str]:
    """Embed photos and store them in atomic steps, replacing their earlier rows.

    Returns: reasons by photo that was left out.
    """
    left_out: dict[str, str] = {}
    rows: list[dict[str, Any]] = []
    results = client.stream(paths)
    try:
        done = len(wanted) - len(paths)
        for result in tqdm(results, "embed", len(wanted), initial=done, unit="photo", disable=None):
            photo = shown(paths[result.index])
            if result.vector is None:
                left_out[photo] = str(result.reason)
            else:
                label, digest = wanted[photo]
                row = {"photo": photo, "label": label, "sha256": digest, "vector": result.vector}
                rows.append(row)
            if len(rows) == ROWS:
                _store(table, rows, stored)
                rows = []
    finally:
        _store(table, rows, stored)
    return left_out


def _store(table: lancedb.table.Table, rows: list[dict[str, Any]], stored: Collection[str]) -> None:
    if any(row["photo"] in stored for row in rows):
        merge = table.merge_insert("photo").when_matched_update_all().when_not_matched_insert_all()
        merge.execute(rows)
    elif rows:
        table.add(rows)


def _digest(path: Path) -> str:
    try:
        return digest_of(path)
    except OSError:  # the client will fail on it and say why
        return ""


def _pointer(folder: Path) -> dict[str, str]:
    try:
        return dict(json.loads((folder / POINTER).read_bytes()))
    except FileNotFoundError:
        return {}


def _switch(folder: Path, pointer: dict[str, str], table: str) -> None:
    """Make a table the one to search, and drop all others but the previous one."""
    if pointer.get("table") != table:
        pointer = {"table": table, "before": pointer.get("table", "")}
        unfinished = folder / f"{POINTER}.unfinished"
        unfinished.write_text(json.dumps(pointer), encoding="utf-8")
        os.sync()  # with the table's data, before anything names it
        unfinished.replace(folder / POINTER)
    database = _database(folder)
    for other in set(database.list_tables().tables) - set(pointer.values()):
        if re.fullmatch(r".+-\d+-([0-9a-f]{12}|unknown)", other):  # spare tables that others made
            database.drop_table(other)


@contextlib.contextmanager
def _readable(folder: Path) -> Iterator[None]:
    """Map the errors that LanceDB raises for damaged files to GalleryError."""
    try:
        yield
    except PermissionError:
        raise
    except (LookupError, OSError, RuntimeError, TypeError, ValueError) as error:
        raise GalleryError(
            f"the gallery in {folder} is damaged; delete it, and build it anew: npair index build"
            f" ({error})"
        ) from error


@contextlib.contextmanager
def _pinned(client: NpairClient, version: str) -> Iterator[NpairClient]:
    """Provide a copy of the client pinned to a version. Raises: GalleryError if that is gone."""
    with client.copy() as pinned:
        pinned.version = version
        try:
            yield pinned
        except VersionGoneError as error:
            reason = f"{error}; build the gallery by that one: npair index build"
            raise GalleryError(reason) from error
