"""A gallery: photos' embeddings with their labels in a LanceDB database on disk, of which the nearest to a photo are found.

    current.json                    names the table that is searched, and the one before
    npair-5-8931af96574e.lance/     a table for each version of the model: photo, label, sha256 of the photo, vector

Vectors of two versions must never be compared. So each version has a table of its own, which says by what it was made. The table of
a new version is filled beside the one that is searched, and takes its place in one step.
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

import pyarrow as pa
from tqdm import tqdm

from npair.client import PIXEL, NpairClient, Photo, Vectors, VersionGoneError
from npair.data.dataset import label_of
from npair.data.files import digest_of, parallel_map, shown
from npair.data.sources import find_photos, read_dataset, split_folders, summary
from npair.data.tables import find_lists
from npair.releasing.repository import alone

os.environ.setdefault("LANCEDB_LOG", "error")  # it warns of every empty part of an index, which does no harm
import lancedb  # it reads that once, here

POINTER = "current.json"
MADE_BY = ("model", "version", "manifest_sha256")
ROWS = 1000  # stored in one step: the most that a crash makes the next build embed again
EXACT = 5000  # rows, up to which comparing with each of them is quicker than an index
PROBES = 64  # parts of the index that a search reads; benchmarks/gallery.py shows what it costs and finds
READ = timedelta(hours=1)  # what a build replaced stays for as long, for searches that have begun


class GalleryError(RuntimeError):
    """A gallery that cannot be built or searched; the message says what to do."""


class Built(NamedTuple):
    """What a build made. photos: how many there are now, of which ``embedded`` are new or changed. left_out: why, by photo.
    ignored: files and folders in the source that are no photos, in words."""

    version: str
    photos: int
    embedded: int
    left_out: dict[str, str]
    ignored: str = ""


class Found(NamedTuple):
    """A photo of the gallery, and how similar it is."""

    cosine: float
    label: str
    photo: str


class Gallery:
    """The table that is searched. model, version, manifest_sha256: of what made its vectors."""

    def __init__(self, folder: Path) -> None:
        """Raises: GalleryError where there is no gallery, or a damaged one."""
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
            self.model, self.version, self.manifest_sha256 = (self.table.schema.metadata[key.encode()].decode() for key in MADE_BY)

    def search(self, photo: Photo, client: NpairClient, k: int = 5) -> list[Found]:
        """The k most similar photos, the nearest first; all of them where there are fewer. The client's server embeds the photo, by
        the gallery's version, whichever the client is pinned to.

        Raises: GalleryError where the server does not serve that version or the gallery is damaged, ValueError for a k below 1,
        client.NpairError, OSError for a photo that cannot be read.
        """
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        if (name := self._name()) != self.table.name:  # built by another version meanwhile
            self._open(name)
        if client.model != self.model:
            raise GalleryError(f"the gallery in {self.folder} is of model {self.model}, not {client.model}; name another folder")
        with _pinned(client, self.version) as pinned:
            vector = pinned.embed(photo).vectors[0]
            served = pinned.manifest_sha256(self.version) or ""
        if served != self.manifest_sha256:
            raise GalleryError(f"the gallery in {self.folder} is of another version {self.version} than is served; build it anew")
        return self.nearest(vector, k)

    def nearest(self, vector: Vectors, k: int) -> list[Found]:
        """The k rows that are most similar to an embedding (float32 [128]) by the gallery's version. Raises: GalleryError."""
        with _readable(self.folder):
            query: Any = self.table.search(vector)  # typed as if it might search for words
            query = query.distance_type("cosine").nprobes(PROBES).select(["photo", "label", "_distance"]).limit(k)
            return [Found(1 - row["_distance"], row["label"], row["photo"]) for row in query.to_list()]


def build(source: Path, folder: Path, client: NpairClient) -> Built:
    """Make the gallery hold the photos of a source, see ``labels_of``, embedded by the version that the client's server serves.

    What is stored already, the same bytes under the same name and label, is not embedded again, be it of an earlier build or of one
    that was killed; what is gone from the source goes. Until the table of a new version is complete, that of the old one is
    searched; it is kept then, so that going back to that version costs nothing.

    Raises: GalleryError, data.DataError for a source that cannot be read, client.NpairError.
    """
    labels, ignored = _labels(source.absolute())
    if not labels:
        raise GalleryError(f"no photos in {source}" + f", but {ignored}" * bool(ignored))
    folder.mkdir(parents=True, exist_ok=True)
    with alone(folder, GalleryError(f"another process builds the gallery in {folder}; wait for it, then try again")):
        example, version = client.embed(PIXEL)
        with _pinned(client, version) as pinned:
            made_by = (client.model, version, pinned.manifest_sha256(version) or "")
            with _readable(folder):
                pointer = _pointer(folder)
                table = create(folder, made_by, example.shape[1])
                stored = _stored(table)
            table.optimize(cleanup_older_than=READ)
            digests = parallel_map(_digest, list(labels), "read")
            wanted = {shown(path): (shown(label), digest) for (path, label), digest in zip(labels.items(), digests, strict=True)}
            new = [path for path in labels if stored.get(shown(path)) != wanted[shown(path)]]
            left_out = _embed(table, new, wanted, pinned, stored)
            # Not before: until then, searches find what was there.
            _delete(table, [photo for photo in stored if photo not in wanted or photo in left_out])
        count = table.count_rows()
        if not count:
            raise GalleryError(
                f"none of the photos in {source} could be embedded, such as {': '.join(next(iter(left_out.items())))}"
            )
        index(table)
        _switch(folder, pointer, table.name)
    return Built(version, count, len(new) - len(left_out), left_out, ignored)


def labels_of(source: Path) -> dict[Path, str]:
    """Every photo of a source, and its label.

    source: what ``data.read_dataset`` takes, all of its splits; or any other folder, where a photo's label is the folder that it is
    in, empty at the top. Raises: data.DataError.
    """
    return _labels(source)[0]


def _labels(source: Path) -> tuple[dict[Path, str], str]:
    """See ``labels_of``; and what else is there and is no photo, in words."""
    if not source.is_dir() or find_lists(source) or find_lists(source / "dataset"):
        splits = read_dataset(source).splits.values()
        labels = {path: photos.fine_names[fine] for photos in splits for path, fine in zip(photos.paths, photos.fine, strict=True)}
        return labels, ""
    paths, ignored = find_photos(source)
    split_names = split_folders(source, paths)
    labels = {}
    for path in paths:
        folders = path.relative_to(source).parts[:-1]
        labels[path] = "/".join(map(label_of, folders[1:] if folders and folders[0] in split_names else folders))
    return labels, summary(ignored)


def create(folder: Path, made_by: Sequence[str], dimension: int) -> lancedb.table.Table:
    """The table of one version, empty where it is new. made_by: model, version, manifest_sha256; a version of that number with
    another manifest has another table."""
    columns = {"photo": pa.string(), "label": pa.string(), "sha256": pa.string(), "vector": pa.list_(pa.float32(), dimension)}
    schema = pa.schema(columns.items(), dict(zip(MADE_BY, made_by, strict=True)))
    model, version, manifest = made_by
    return _database(folder).create_table(f"{model}-{version}-{manifest[:12] or 'unknown'}", schema=schema, exist_ok=True)


def index(table: lancedb.table.Table) -> None:
    """Have a table searched without comparing with each row. Rows that come later are compared with, until it is indexed again."""
    count = table.count_rows()
    if count > EXACT and min((made.num_unindexed_rows or 0 for made in table.list_indices()), default=count):
        table.create_index("vector", config=lancedb.index.IvfFlat(distance_type="cosine", num_partitions=math.isqrt(count)))


def _database(folder: Path) -> lancedb.DBConnection:
    """Reads see what other processes have written meanwhile."""
    return lancedb.connect(folder, read_consistency_interval=timedelta(0))


def _stored(table: lancedb.table.Table) -> dict[str, tuple[str, str]]:
    """Label and digest by photo."""
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
    """Store photos as their vectors come, each step whole or not at all, in place of what is stored of them. Returns: why photos
    were left out."""
    left_out: dict[str, str] = {}
    rows: list[dict[str, Any]] = []
    results = client.stream(paths)
    try:
        for result in tqdm(results, "embed", len(wanted), initial=len(wanted) - len(paths), unit="photo", disable=None):
            photo = shown(paths[result.index])
            if result.vector is None:
                left_out[photo] = str(result.reason)
            else:
                label, digest = wanted[photo]
                rows.append({"photo": photo, "label": label, "sha256": digest, "vector": result.vector})
            if len(rows) == ROWS:
                _store(table, rows, stored)
                rows = []
    finally:
        _store(table, rows, stored)
    return left_out


def _store(table: lancedb.table.Table, rows: list[dict[str, Any]], stored: Collection[str]) -> None:
    if any(row["photo"] in stored for row in rows):
        table.merge_insert("photo").when_matched_update_all().when_not_matched_insert_all().execute(rows)
    elif rows:
        table.add(rows)


def _digest(path: Path) -> str:
    try:
        return digest_of(path)
    except OSError:  # the client finds that, too, and says why
        return ""


def _pointer(folder: Path) -> dict[str, str]:
    try:
        return dict(json.loads((folder / POINTER).read_bytes()))
    except FileNotFoundError:
        return {}


def _switch(folder: Path, pointer: dict[str, str], table: str) -> None:
    """Have a table searched from now on, in one step. All but the one before are dropped, those that were never complete, too."""
    if pointer.get("table") != table:
        pointer = {"table": table, "before": pointer.get("table", "")}
        unfinished = folder / f"{POINTER}.unfinished"
        unfinished.write_text(json.dumps(pointer), encoding="utf-8")
        os.sync()  # the table, too, before anything names it
        unfinished.replace(folder / POINTER)
    database = _database(folder)
    for other in set(database.list_tables().tables) - set(pointer.values()):
        if re.fullmatch(r".+-\d+-([0-9a-f]{12}|unknown)", other):  # and is no table of somebody else's
            database.drop_table(other)


@contextlib.contextmanager
def _readable(folder: Path) -> Iterator[None]:
    """LanceDB raises all of these for files that are not as it wrote them."""
    try:
        yield
    except PermissionError:
        raise
    except (LookupError, OSError, RuntimeError, TypeError, ValueError) as error:
        raise GalleryError(
            f"the gallery in {folder} is damaged; delete it, and build it anew: npair index build ({error})"
        ) from error


@contextlib.contextmanager
def _pinned(client: NpairClient, version: str) -> Iterator[NpairClient]:
    """A connection that embeds by one version alone. Raises: GalleryError where another is served."""
    with client.copy() as pinned:
        pinned.version = version
        try:
            yield pinned
        except VersionGoneError as error:
            raise GalleryError(f"{error}; build the gallery by that one: npair index build") from error
