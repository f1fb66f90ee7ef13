"""Build a gallery, or bring it up to date: embed what is new, keep what is missing unless told.

A new version's table is filled beside the current one, and replaces it in one step.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import lancedb
import pyarrow as pa
from tqdm import tqdm

from npair.client import PIXEL, NpairClient, Vectors
from npair.client.photos import Unread
from npair.data.catalogue import Catalogue, read_catalogue
from npair.data.files import parallel_map, shown
from npair.gallery.gallery import MADE_BY, name_of, pinned_to, place_of, storable
from npair.gallery.location import GalleryError, Location, Where, locate, readable, writable

ROWS = 1000  # per write: the most that are embedded again after a crash
EXACT = 5000  # rows up to which a full scan is faster than an index
WHOLE = 1_000_000  # rows up to which the index holds whole vectors; above, SUB_VECTORS bytes each
SUB_VECTORS = 16
BLOCK = 1 << 20  # bytes of a file that are hashed at a time
READ = timedelta(hours=1)  # replaced data stay this long for searches that have started


class Built(NamedTuple):
    """The outcome of a build.

    photos: how many the gallery holds, of which ``embedded`` were new or changed. left_out:
    reasons by photo. missing: photos of the gallery that the source does not have; kept. removed:
    how many of these were removed instead. contradicting: copies of a photo that have different
    labels; kept. ignored: other files and folders of the source, in words.
    """

    version: str
    photos: int
    embedded: int
    left_out: dict[str, str]
    missing: tuple[str, ...] = ()
    removed: int = 0
    contradicting: tuple[tuple[str, ...], ...] = ()
    ignored: str = ""


class _Row(NamedTuple):
    """What a row says about a photo besides its vector. columns: JSON, sorted."""

    label: str
    columns: str
    sha256: str


def build(source: Path, folder: Where, client: NpairClient, *, prune: bool = False) -> Built:
    """Embed a source's photos into a gallery, with the version that the client's server serves.

    Photos that an earlier build stored, even a killed one, are not embedded again unless their
    bytes have changed; a file that was moved keeps its vector. The old version's table is searched
    until the new one's is complete, and then kept, so that going back costs nothing.

    source: see ``data.read_catalogue``. folder: the gallery's, made if need be, or
    s3://BUCKET/PREFIX.
    prune: remove the gallery's photos that the source does not have, or that cannot be embedded any
    more; otherwise they stay.
    Raises: GalleryError, also if another version would lose photos and ``prune`` is not set;
    data.DataError if the source cannot be read, client.NpairError.
    """
    catalogue = read_catalogue(
        source.parent.resolve() / source.name if source.is_file() else source.resolve()
    )
    if not catalogue.entries:
        ignored = f", but {catalogue.ignored}" * bool(catalogue.ignored)
        raise GalleryError(f"no photos in {source}{ignored}")
    location = locate(folder)
    location.prepare()
    with location.exclusive():
        example, version = client.embed(PIXEL)
        with pinned_to(version, client) as pinned:
            made_by = (client.model, version, pinned.manifest_sha256(version) or "")
            with readable(location):
                tag, pointer = location.tag(), location.pointer()
                table = create(location, made_by, example.shape[1])
                update = _Update(location, table, pointer.get("table"), catalogue)
            if not prune:
                update.refuse_loss(update.missing, "not in the source", version)
            left_out = update.embed(pinned)
            failed = [name for name in update.current if update.place(name) in left_out]
            if not prune:
                update.refuse_loss(failed, "left out", version)
            removed = update.remove(failed if prune else (), keep_missing=not prune)
        count = table.count_rows()
        if not count:
            photo, reason = next(iter(left_out.items()))
            raise GalleryError(
                f"none of the photos in {source} could be embedded, such as {shown(photo)}:"
                f" {reason}"
            )
        finish(location, table, pointer, tag, name_of(catalogue.root, location.base))
    return Built(
        version,
        count,
        update.embedded,
        left_out,
        () if prune else tuple(map(update.place, update.missing)),
        removed,
        update.contradicting(),
        catalogue.ignored,
    )


def create(location: Location, made_by: Sequence[str], dimension: int) -> lancedb.table.Table:
    """Open the table of a version, or create it.

    made_by: model, version and manifest_sha256, which all are part of the table's name.
    Raises: GalleryError if the gallery's vectors of that version have another dimension.
    """
    columns = {
        **dict.fromkeys(("photo", "label", "columns", "sha256"), pa.string()),
        "vector": pa.list_(pa.float32(), dimension),
    }
    model, version, manifest = made_by
    name = f"{model}-{version}-{manifest[:12] or 'unknown'}"
    opened = location.database()
    if name in opened.list_tables().tables:
        table = opened.open_table(name)
        if (own := table.schema.field("vector").type.list_size) == dimension:
            return table
        if name in location.pointer().values():
            raise GalleryError(
                f"the gallery in {location} has vectors of {own} numbers, not {dimension}; name"
                " another gallery (--index), or delete it"
            )
        opened.drop_table(name)  # an import that was refused has left it
    schema = pa.schema(columns.items(), dict(zip(MADE_BY, made_by, strict=True)))
    return opened.create_table(name, schema=schema)


def index(table: lancedb.table.Table) -> None:
    """Index a large table if it has rows without an index; searches scan these."""
    count = table.count_rows()
    indices = table.list_indices()
    if count > EXACT and min((index.num_unindexed_rows or 0 for index in indices), default=count):
        known: dict[str, Any] = {"distance_type": "cosine", "num_partitions": math.isqrt(count)}
        config = (
            lancedb.index.IvfPq(**known, num_sub_vectors=SUB_VECTORS)
            if count > WHOLE
            else lancedb.index.IvfFlat(**known)
        )
        table.create_index("vector", config=config)


def finish(
    location: Location,
    table: lancedb.table.Table,
    pointer: Mapping[str, str],
    tag: str | None,
    photos: str,
) -> None:
    """Index a table, make it the one to search, and drop all others but the one before.

    pointer, tag: as they were when the build began. photos: the folder's name.
    Raises: GalleryError if another process has switched since.
    """
    with writable(location):
        table.optimize(cleanup_older_than=READ)
        index(table)
    switched = {"table": table.name, "before": pointer.get("table", ""), "photos": photos}
    if pointer.get("table") == table.name:
        switched["before"] = pointer.get("before", "")
    with writable(location):
        if switched != pointer:
            location.switch(switched, tag)
        opened = location.database()
        for other in set(opened.list_tables().tables) - {table.name, switched["before"]}:
            if re.fullmatch(r".+-\d+-([0-9a-f]{12}|unknown)", other):  # spare what others made
                opened.drop_table(other)


class _Update:
    """The difference between a source and a gallery.

    wanted: the source's rows by name. stored: those of the table that is filled. current: those of
    the table that is searched, often the same. moved: the former name of photos of the source that
    the gallery has under another. missing: names of the gallery that the source does not have.
    """

    def __init__(
        self,
        location: Location,
        table: lancedb.table.Table,
        current: str | None,
        catalogue: Catalogue,
    ) -> None:
        self.location, self.table, folder = location, table, location.base
        self.paths = {name_of(path, folder): path for path in catalogue.entries}
        digests = parallel_map(_digest, list(catalogue.entries), "read")
        self.wanted = {
            name: _Row(storable(entry.label), json.dumps(entry.columns, sort_keys=True), digest)
            for name, entry, digest in zip(
                self.paths, catalogue.entries.values(), digests, strict=True
            )
        }
        self.stored = _rows(table)
        self.current: dict[str, _Row] = {}
        if current is not None:
            same = current == table.name
            self.current = self.stored if same else _rows(location.database().open_table(current))
        self.embedded = 0
        self.moved: dict[str, str] = {}
        self.missing: list[str] = []
        by_digest: dict[str, list[str]] = defaultdict(list)
        for name in reversed(self.wanted):
            if name not in self.current:
                by_digest[self.wanted[name].sha256].append(name)
        for name, row in self.current.items():
            if name in self.wanted:
                continue
            if by_digest[row.sha256]:
                self.moved[by_digest[row.sha256].pop()] = name
            else:
                self.missing.append(name)

    def place(self, name: str) -> str:
        return place_of(name, self.location.base)

    def refuse_loss(self, names: Iterable[str], why: str, version: str) -> None:
        """Raise GalleryError if a new version's table would lack photos that are searched now."""
        if lost := [name for name in names if name not in self.stored]:
            raise GalleryError(
                f"the gallery in {self.location} stays as it is, since version {version} would lose"
                f" {len(lost)} of its photos, which are {why}, such as"
                f" {shown(self.place(lost[0]))}; bring them back, or go without them: --prune"
            )

    def embed(self, client: NpairClient) -> dict[str, str]:
        """Store the rows that are new or changed, in atomic steps, and with those vectors that the
        table has already.

        Returns: reasons by photo that was left out.
        """
        new = [name for name, row in self.wanted.items() if self.stored.get(name) != row]
        known = {row.sha256 for row in self.stored.values()}
        again = [name for name in new if self.wanted[name].sha256 in known]
        for start in range(0, len(again), ROWS):
            names = again[start : start + ROWS]
            vectors = self._vectors({self.wanted[name].sha256 for name in names})
            self._store({name: vectors[self.wanted[name].sha256] for name in names})
        fresh = [name for name in new if self.wanted[name].sha256 not in known]
        left_out: dict[str, str] = {}
        rows: dict[str, Vectors] = {}
        try:
            results = client.stream(Unread(str(self.paths[name])) for name in fresh)
            done = len(self.wanted) - len(fresh)
            total = len(self.wanted)
            for result in tqdm(results, "embed", total, initial=done, unit="photo", disable=None):
                name = fresh[result.index]
                if result.vector is None:
                    left_out[self.place(name)] = str(result.reason)
                else:
                    rows[name] = result.vector
                    self.embedded += 1
                if len(rows) == ROWS:
                    full, rows = rows, {}  # first, so that an interruption stores none twice
                    self._store(full)
        finally:
            self._store(rows)
        return left_out

    def _vectors(self, digests: Iterable[str]) -> dict[str, Vectors]:
        query = self.table.search().where(f"sha256 IN ({_quoted(digests)})")
        columns = query.select(["sha256", "vector"]).to_arrow()
        vectors = columns["vector"].combine_chunks().flatten().to_numpy().reshape(len(columns), -1)
        return dict(zip(columns["sha256"].to_pylist(), vectors, strict=True))

    def _store(self, vectors: Mapping[str, Vectors]) -> None:
        """Store rows in one step, and remove those under their former names."""
        rows: list[dict[str, Any]] = [
            {"photo": name, **self.wanted[name]._asdict(), "vector": vector}
            for name, vector in vectors.items()
        ]
        former = [self.moved[name] for name in vectors if self.moved.get(name) in self.stored]
        with writable(self.location):
            if former or any(name in self.stored for name in vectors):
                merge = self.table.merge_insert("photo").when_matched_update_all()
                merge = merge.when_not_matched_insert_all()
                if former:
                    merge = merge.when_not_matched_by_source_delete(f"photo IN ({_quoted(former)})")
                merge.execute(rows)
            elif rows:
                self.table.add(rows)

    def remove(self, failed: Iterable[str], *, keep_missing: bool) -> int:
        """Delete rows that neither the source nor the searched table has, old names of moved
        photos, and rows whose photo failed or, unless told to keep these, is missing.

        failed: names of photos that could not be embedded.
        Returns: how many of the gallery's photos are removed.
        """
        lost = {*failed, *(() if keep_missing else self.missing)}
        rows = _rows(self.table)
        unmoved = {former for name, former in self.moved.items() if name not in rows}
        kept = (self.wanted.keys() | {*self.missing, *unmoved}) - lost
        gone = [name for name in rows if name not in kept]
        with writable(self.location):
            for start in range(0, len(gone), ROWS):
                self.table.delete(f"photo IN ({_quoted(gone[start : start + ROWS])})")
        return len(lost)

    def contradicting(self) -> tuple[tuple[str, ...], ...]:
        """Group copies of a photo that have different labels."""
        copies: dict[str, list[str]] = defaultdict(list)
        for name, row in self.wanted.items():
            copies[row.sha256].append(name)
        copies.pop("", None)  # unread
        return tuple(
            tuple(map(self.place, names))
            for names in copies.values()
            if len({self.wanted[name].label for name in names}) > 1
        )


def _rows(table: lancedb.table.Table) -> dict[str, _Row]:
    """Return a table's rows by name."""
    names = ["photo", *_Row._fields]
    columns = table.search().select(names).to_arrow()
    photos, *rest = (columns[name].to_pylist() for name in names)
    return dict(zip(photos, map(_Row, *rest), strict=True))


def _quoted(texts: Iterable[str]) -> str:
    return ", ".join("'" + text.replace("'", "''") + "'" for text in texts)


def _digest(path: Path) -> str:
    """Return the SHA-256 of a whole file: what is converted may be larger than what is served."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(BLOCK):
                digest.update(block)
    except OSError:  # embedding will fail on it and say why
        return ""
    return digest.hexdigest()
