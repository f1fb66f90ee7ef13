"""Take vectors into a gallery without embedding again, and give them out, both as Parquet.

The columns are those that `npair bulk` writes: id, vector (float16 or float32), reason, model,
version, manifest. A gallery has two more, which are read if they are there: label, columns (JSON).
Vectors may be lists of fixed size or not: pyarrow cannot read back nulls among the former.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import lancedb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
from tqdm import tqdm

from npair.client import Vectors
from npair.data.files import shown
from npair.gallery.build import create, finish
from npair.gallery.gallery import IMPORTED, Gallery, storable
from npair.gallery.location import GalleryError, Where, locate, readable, writable
from npair.objects import Objects, StoreError

ORIGIN = ("model", "version", "manifest")
NEEDED = ("id", "vector", "reason", *ORIGIN)
OPTIONAL = ("label", "columns")
TEXTS = (pa.string(), pa.large_string(), pa.null())
ROWS = 8192  # in memory at a time
FILE_ROWS = 1_000_000  # of an exported file
UNIT = 0.01  # how far from 1 a vector's length may be: float16 rounds


class Imported(NamedTuple):
    """The outcome of an import.

    photos: how many the gallery holds. imported: how many rows were added or replaced. left_out:
    how many have a reason in place of a vector.
    """

    model: str
    version: str
    photos: int
    imported: int
    left_out: int


def import_vectors(source: Where, folder: Where, *, switch: bool = False) -> Imported:
    """Add vectors to a gallery, or replace those with the same id. What else it holds stays.

    A row's label is the column ``label``, else the last folder in its id. Each file is stored whole
    or not at all; after an interruption, import again.

    source: folder of Parquet files, or its s3:// or gs:// URL. folder: the gallery's, or
    s3://BUCKET/PREFIX; made if need be. switch: let the vectors be of another version than the
    gallery's; they are stored beside its own, which are searched until all are there.
    Raises: GalleryError.
    """
    files = _Files(source)
    location = locate(folder)
    location.prepare()
    with location.exclusive():
        with readable(location):
            tag, pointer = location.tag(), location.pointer()
        table: lancedb.table.Table | None = None
        fresh = False
        for file in tqdm(files.paths, "import", unit="file", disable=None):
            rows = files.rows(file)
            first = next(rows, None)
            if first is None:
                continue
            if table is None:
                if "table" in pointer and not switch:
                    _refuse_other(Gallery(folder), files.origin)
                try:
                    table = create(location, files.origin, files.dimension)
                except GalleryError as error:
                    raise GalleryError(f"{file} cannot be imported: {error}") from None
                fresh = not table.count_rows()
            with writable(location):
                _store(table, first, rows, fresh=fresh)
        if table is None:
            raise GalleryError(f"none of the {files.left_out} rows in {source} has a vector")
        if fresh:
            _refuse_doubles(table, location.database())
        finish(location, table, pointer, tag, pointer.get("photos", ""))
        model, version, _ = files.origin
        return Imported(model, version, table.count_rows(), files.count, files.left_out)


def export_vectors(folder: Where, target: Where) -> int:
    """Write a gallery's rows as Parquet. A row's id is its photo's path, or the imported id; bytes
    of a path that are not UTF-8 are escaped.

    target: new folder, or its s3:// or gs:// URL. Returns: how many rows. Raises: GalleryError.
    """
    gallery = Gallery(folder)
    vectors = gallery.table.schema.field("vector").type
    types = {"id": pa.string(), "vector": vectors, "reason": pa.string(), "model": pa.string()}
    types |= {"version": pa.int64(), **dict.fromkeys(("manifest", *OPTIONAL), pa.string())}
    schema = pa.schema(types.items())
    origin = (gallery.model, int(gallery.version), gallery.manifest_sha256)
    found: Any = gallery.table.search()
    found = found.select(["photo", "label", "columns", "vector"]).to_batches(ROWS)

    def batches() -> Iterator[pa.RecordBatch]:
        for batch in tqdm(found, "export", unit="batch", disable=None):
            columns = {
                "id": [storable(gallery.place(name)) for name in batch["photo"].to_pylist()],
                "vector": batch["vector"],
                "reason": [None] * len(batch),
                **{name: [value] * len(batch) for name, value in zip(ORIGIN, origin, strict=True)},
                **{name: batch[name] for name in OPTIONAL},
            }
            yield pa.record_batch([pa.array(columns[f.name], f.type) for f in schema], schema)

    count = len(gallery)
    filesystem, root = _opened(target)
    try:
        ds.write_dataset(
            batches(),
            root,
            schema=schema,
            filesystem=filesystem,
            format="parquet",
            basename_template="part-{i}.parquet",
            max_rows_per_file=FILE_ROWS,
            max_rows_per_group=FILE_ROWS // 10,
        )
    except (OSError, RuntimeError, pa.ArrowException) as error:
        raise GalleryError(f"{target} cannot be written: {error}") from error
    return count


class _Files:
    """The Parquet files of a folder.

    origin, dimension: model, version and manifest, and the vectors' length, of all rows that were
    read. count, left_out: how many rows were read with and without a vector.
    """

    def __init__(self, folder: Where) -> None:
        """Raises: GalleryError if there are none."""
        self.filesystem, root = _opened(folder)
        try:
            if self.filesystem:
                self.paths = sorted(self.filesystem.glob(f"{root}/*.parquet"))
            else:
                self.paths = sorted(map(str, Path(folder).glob("*.parquet")))
        except Exception as error:  # of the store's library
            raise GalleryError(f"{folder} cannot be read: {error}") from error
        if not self.paths:
            raise GalleryError(f"no Parquet files in {folder}")
        self.origin: tuple[str, ...] = ()
        self.dimension = self.count = self.left_out = 0

    def rows(self, path: str) -> Iterator[pa.RecordBatch]:
        """Yield a file's rows that have a vector, as a gallery stores them.

        Raises: GalleryError for another kind of file, a damaged one, one that cannot be searched,
        or one of another version than those before.
        """
        try:
            dataset = ds.dataset(path, filesystem=self.filesystem, format="parquet")
            known = dataset.schema.names
            if missing := [name for name in NEEDED if name not in known]:
                raise GalleryError(f"{path} has no column {' or '.join(missing)}; see npair bulk")
            _refuse_types(path, dataset.schema)
            embedded = pc.is_null(pc.field("reason"))
            ids = pc.value_counts(dataset.to_table(["id"], filter=embedded)["id"].drop_null())
            if len(doubled := ids.filter(pc.greater(ids.field("counts"), 1))):
                one, times = doubled[0].as_py().values()
                raise GalleryError(f"{path} has the id {shown(one)} {times} times")
            names = [*NEEDED, *(name for name in OPTIONAL if name in known)]
            for batch in dataset.to_batches(columns=names, batch_size=ROWS):
                rows = batch.filter(pc.is_null(batch["reason"]))
                self.left_out += len(batch) - len(rows)
                if len(rows):
                    self._check(path, rows)
                    self.count += len(rows)
                    yield _stored(rows)
        except (OSError, pa.ArrowException) as error:
            raise GalleryError(f"{path} cannot be read: {error}") from error

    def _check(self, path: str, rows: pa.RecordBatch) -> None:
        if rows["id"].null_count or rows["vector"].null_count:
            raise GalleryError(f"{path} has rows without an id, or without a vector and a reason")
        lengths = pc.unique(pc.list_value_length(rows["vector"])).to_pylist()
        self.dimension = self.dimension or lengths[0]
        if others := set(lengths) - {self.dimension}:
            raise GalleryError(
                f"{path} has vectors of {min(others)} numbers, and the rows before have"
                f" {self.dimension}"
            )
        if not (abs(np.linalg.norm(_vectors(rows), axis=1) - 1) < UNIT).all():
            raise GalleryError(f"{path} has vectors that are no embeddings: their length is not 1")
        optional = [name for name in OPTIONAL if name in rows.schema.names]
        for row in rows.select(["id", *optional]).to_pylist():
            if row.get("label", "") is None:
                raise GalleryError(f"{path} has no label for {shown(row['id'])}")
            if not _is_object_of_strings(row.get("columns") or "{}"):
                raise GalleryError(
                    f"{path} has columns of {shown(row['id'])} that are no JSON object of strings"
                )
        each = [pc.unique(rows[name]).to_pylist() for name in ORIGIN]
        origin = tuple(str(values[0] or "") for values in each)
        if max(map(len, each)) > 1 or origin != (self.origin or origin):
            raise GalleryError(
                f"{path} has vectors of another version than the rows before; import the files of"
                " each version into a gallery of its own"
            )
        self.origin = origin


def _refuse_types(path: str, schema: pa.Schema) -> None:
    """Raise GalleryError for ids or labels that are no texts, and vectors that are no numbers."""
    for name in schema.names:
        kind = schema.field(name).type
        of = getattr(kind, "value_type", pa.null())
        if name == "vector":
            fits, needed = pa.types.is_floating(of), "lists of floats"
        else:
            fits = kind in TEXTS or (pa.types.is_dictionary(kind) and of in TEXTS)
            needed = "strings"
        if name in ("id", "vector", *OPTIONAL) and not fits:
            raise GalleryError(f"{path} has {kind} in the column {name}, which needs {needed}")


def _opened(folder: Where) -> tuple[Any, str]:
    """Return the file system of a URL, and the path there; None for a local folder."""
    if "://" not in str(folder):
        return None, str(folder)
    try:
        objects = Objects(str(folder))
    except (ImportError, ValueError, StoreError) as error:
        raise GalleryError(f"{folder} cannot be used: {error}") from error
    return objects.store, objects.root


def _is_object_of_strings(text: Any) -> bool:
    try:
        found = json.loads(text)
        json.dumps(found, ensure_ascii=False).encode()  # what no answer can hold: half a surrogate
    except (TypeError, ValueError, RecursionError):
        return False
    return isinstance(found, dict) and all(isinstance(value, str) for value in found.values())


def _vectors(rows: pa.RecordBatch) -> Vectors:
    flat = rows["vector"].flatten().to_numpy(zero_copy_only=False)
    return np.asarray(flat, np.float32).reshape(len(rows), -1)


def _stored(rows: pa.RecordBatch) -> pa.RecordBatch:
    """Return rows of a file as a gallery stores them."""
    ids = rows["id"].to_pylist()
    vectors = _vectors(rows)
    known = rows.schema.names
    columns = {
        "photo": [IMPORTED + one for one in ids],
        "label": rows["label"] if "label" in known else [PurePosixPath(i).parent.name for i in ids],
        "columns": rows["columns"] if "columns" in known else ["{}"] * len(ids),
        "sha256": [hashlib.sha256(one.encode()).hexdigest() for one in ids],
        "vector": pa.FixedSizeListArray.from_arrays(vectors.ravel(), vectors.shape[1]),
    }
    return pa.record_batch(columns)


def _store(
    table: lancedb.table.Table,
    first: pa.RecordBatch,
    rest: Iterator[pa.RecordBatch],
    *,
    fresh: bool,
) -> None:
    """Store a file's rows in one step. fresh: the table holds nothing but earlier files.

    Raises: what ``rest`` raises, and LanceDB's errors.
    """
    raised: list[GalleryError] = []

    def all_rows() -> Iterator[pa.RecordBatch]:
        yield first
        try:
            yield from rest
        except GalleryError as error:  # LanceDB would make a traceback of it
            raised.append(error)
            raise

    reader = pa.RecordBatchReader.from_batches(first.schema, all_rows())
    try:
        if fresh:
            table.add(reader)
        else:
            merge = table.merge_insert("photo").when_matched_update_all()
            merge.when_not_matched_insert_all().execute(reader)
    except (OSError, RuntimeError, ValueError):
        if raised:
            raise raised[0] from None
        raise


def _refuse_other(gallery: Gallery, origin: tuple[str, ...]) -> None:
    own = (gallery.model, gallery.version, gallery.manifest_sha256)
    if own != origin:
        named = [
            f"version {version} of {model} ({manifest[:12]})"
            for model, version, manifest in (own, origin)
        ]
        raise GalleryError(
            f"the gallery in {gallery.folder} is of {named[0]}, and the vectors are of {named[1]},"
            " which do not mix; name another gallery (--index), or let them take its place"
            " (--switch)"
        )


def _refuse_doubles(table: lancedb.table.Table, database: lancedb.DBConnection) -> None:
    """Drop a table that was filled just now if an id is in several files, and say so."""
    found: Any = table.search()
    names = found.select(["photo"]).to_arrow()["photo"]
    if doubled := len(names) - pc.count_distinct(names).as_py():
        database.drop_table(table.name)
        raise GalleryError(f"{doubled} ids are in several files; nothing was imported")
