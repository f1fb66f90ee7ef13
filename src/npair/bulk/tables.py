"""Lists in a table with a row for each photo: Parquet files, or a table of LanceDB."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq
from pyarrow import fs

from npair.bulk import BulkError
from npair.bulk.photos import fetch
from npair.bulk.source import Photo, Piece, below
from npair.bulk.storage import locate, reachable
from npair.data.files import shown

ROWS = 64  # of a table of bytes in memory
OFFSETS = 10_000  # rows of a Lance table per request for ids and paths


@dataclass(frozen=True)
class Parquet:
    """Parquet files. Paths in them are relative to the folder of the file or files.

    columns: those of the ids and of the photos, which is "path" or "bytes".
    """

    location: str
    files: tuple[str, ...]
    columns: tuple[str, str]
    stamp: str
    kind: str = "tables"
    unit: str = "photos"

    @classmethod
    def open(cls, location: str, files: Sequence[fs.FileInfo]) -> Parquet:
        system, root = locate(location)
        paths = tuple(file.path for file in files)
        with reachable(location):
            names = ds.dataset(list(paths), filesystem=system, format="parquet").schema.names
        stamp = [f"{below(file.path, root)} {file.size} {file.mtime_ns}" for file in files]
        return cls(location, paths, columns_of(location, names), "; ".join(stamp))

    def pieces(self, rows: int) -> Iterator[Piece]:
        system, _ = locate(self.location)
        with reachable(self.location):
            table = ds.dataset(list(self.files), filesystem=system, format="parquet")
            fragments = list(table.get_fragments())
            for fragment in fragments:
                refuse_types(fragment.path, fragment.physical_schema, self.columns)
            yield from cut(self.location, table.to_batches, self.columns, rows)
            if self.columns[1] == "bytes":
                for fragment in fragments:
                    for group in fragment.row_groups:
                        if group.num_rows:
                            content = {"file": fragment.path, "group": group.id}
                            yield Piece(group.num_rows, content)

    def photos(self, content: Any, most: int) -> Iterator[Photo]:
        if "paths" in content:
            one_file = self.location.endswith(".parquet")
            folder = self.location.rpartition("/")[0] if one_file else self.location
            yield from fetch(folder, content["ids"], content["paths"], most)
            return
        system, _ = locate(self.location)
        with reachable(content["file"]), system.open_input_file(content["file"]) as file:
            table = pq.ParquetFile(file, buffer_size=1 << 20)
            for batch in table.iter_batches(ROWS, [content["group"]], list(self.columns)):
                yield from photos_of(batch, self.columns)


@dataclass(frozen=True)
class Lance:
    """A table of LanceDB, as it is when the list is read. Paths are relative to its folder."""

    location: str
    columns: tuple[str, str]
    version: int
    kind: str = "tables"
    unit: str = "photos"

    @property
    def stamp(self) -> str:
        return str(self.version)

    @classmethod
    def open(cls, location: str) -> Lance:
        with reachable(location):
            table = _lance(location)
            columns = columns_of(location, table.schema.names)
            refuse_types(location, table.schema, columns)
            return cls(location, columns, table.version)

    def pieces(self, rows: int) -> Iterator[Piece]:
        with reachable(self.location):
            table = _lance(self.location, self.version)
            count = table.count_rows()

            def batches(columns: list[str]) -> Iterator[pa.RecordBatch]:
                for start in range(0, count, OFFSETS):
                    offsets = list(range(start, min(start + OFFSETS, count)))
                    yield from table.take_offsets(offsets).select(columns).to_arrow().to_batches()

            yield from cut(self.location, batches, self.columns, rows)
            if self.columns[1] == "bytes":
                for start in range(0, count, rows):
                    end = min(start + rows, count)
                    yield Piece(end - start, {"start": start, "end": end})

    def photos(self, content: Any, most: int) -> Iterator[Photo]:
        if "paths" in content:
            folder = self.location.rpartition("/")[0]
            yield from fetch(folder, content["ids"], content["paths"], most)
            return
        with reachable(self.location):
            table = _lance(self.location, self.version)
            for start in range(content["start"], content["end"], ROWS):
                offsets = list(range(start, min(start + ROWS, content["end"])))
                rows = table.take_offsets(offsets).select(list(self.columns)).to_arrow()
                for batch in rows.to_batches():
                    yield from photos_of(batch, self.columns)


def columns_of(location: str, names: Sequence[str]) -> tuple[str, str]:
    """Return a table's columns of ids and of photos. Raises: BulkError."""
    if "path" in names:
        return ("id" if "id" in names else "path"), "path"
    if "id" in names and "bytes" in names:
        return "id", "bytes"
    raise BulkError(
        f"{location} needs a column path, or the columns id and bytes; it has {', '.join(names)}"
    )


def refuse_types(location: str, schema: pa.Schema, columns: tuple[str, str]) -> None:
    """Raise BulkError if a table lacks a column, or has it in a type that cannot be read."""
    for name in columns:
        index = schema.get_field_index(name)  # -1 also if there are several
        if index < 0:
            raise BulkError(
                f"{location} needs one column {name}, as other files of the list have; it has"
                f" {', '.join(schema.names)}"
            )
        kind, needed = schema.field(index).type, "bytes" if name == "bytes" else "text or numbers"
        if not (_is_binary(kind) if name == "bytes" else _has_text(kind)):
            raise BulkError(f"{location}: the column {name} is of type {kind}, not {needed}")


def _is_binary(kind: pa.DataType) -> bool:
    stored = kind.value_type if pa.types.is_dictionary(kind) else kind
    checks = ("is_binary", "is_large_binary", "is_binary_view", "is_fixed_size_binary")
    return any(getattr(pa.types, check)(stored) for check in checks)


def _has_text(kind: pa.DataType) -> bool:
    try:
        pa.nulls(0, kind).cast(pa.string())
    except pa.ArrowNotImplementedError:
        return False
    return True


def cut(location: str, batches: Any, columns: tuple[str, str], rows: int) -> Iterator[Piece]:
    """Check a table's ids; if it has paths, cut its rows into pieces.

    batches: called with the columns to read. Raises: BulkError for empty cells and equal ids.
    """
    wanted = list(dict.fromkeys(columns if columns[1] == "path" else columns[:1]))
    seen, waiting = [], []
    row = 0
    for batch in batches(columns=wanted):
        cells = {name: batch[name].cast(pa.string()) for name in wanted}
        for name, column in cells.items():
            if column.null_count:
                row += pc.index(column.is_null(), True).as_py()
                raise BulkError(f"{location}: row {row} has no {name}; fill it, or leave it out")
        row += len(batch)
        seen.append(cells[columns[0]])
        if columns[1] == "path":
            waiting.append(pa.table({"ids": cells[columns[0]], "paths": cells["path"]}))
    refuse_copies(location, pa.chunked_array(seen, pa.string()))
    if waiting:
        table = pa.concat_tables(waiting)
        for start in range(0, len(table), rows):
            part = table.slice(start, rows)
            yield Piece(len(part), part.to_pydict())


def refuse_copies(location: str, ids: pa.ChunkedArray) -> None:
    """Raise BulkError if an id occurs twice."""
    if pc.count_distinct(ids).as_py() == len(ids):
        return
    counts = pa.table(ids.value_counts().flatten(), ["id", "rows"])
    copies = counts.filter(pc.field("rows") > 1)
    raise BulkError(
        f"{location}: {len(copies)} ids are in several rows, such as"
        f" {shown(copies['id'][0].as_py())} in {copies['rows'][0]}; give each photo its own"
    )


def photos_of(batch: pa.RecordBatch, columns: tuple[str, str]) -> Iterator[Photo]:
    """Yield the photos of a table of bytes. An empty cell is an empty photo."""
    ids, contents = batch[columns[0]].cast(pa.string()).to_pylist(), batch[columns[1]].to_pylist()
    return (Photo(name, content or b"") for name, content in zip(ids, contents, strict=True))


def _lance(location: str, version: int | None = None) -> Any:
    try:
        import lancedb  # noqa: PLC0415 - of another extra
    except ImportError as error:
        raise BulkError(f"{location} is read by LanceDB: pip install 'npair[index]'") from error
    folder, _, name = location.removesuffix(".lance").rpartition("/")
    options = {}
    if endpoint := os.environ.get("AWS_ENDPOINT_URL"):  # which LanceDB calls by another name
        options = {"aws_endpoint": endpoint, "allow_http": "true"}
    try:
        database = lancedb.connect(folder, storage_options=options if "://" in folder else None)
        table = database.open_table(name)
        if version is not None:
            table.checkout(version)
    except (ValueError, RuntimeError) as error:
        raise BulkError(f"{location} cannot be read as a table of LanceDB: {error}") from error
    return table
