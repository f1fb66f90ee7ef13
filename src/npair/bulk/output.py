"""The folder that ``npair bulk`` writes: rows of one list, embedded by one version.

    vectors/part-*.parquet       a file for each piece of the list; see ``schema``
    vectors/_bulk.json           what they are, and whether they are complete
    vectors/_unfinished/         until then: the list's pieces, and files that are being written

All is in one folder, since it may be a volume of its own, and files are renamed only within one.
Readers of Parquet pass over names that begin with an underscore.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq
from pyarrow import fs

from npair.bulk import BulkError
from npair.bulk.schema import DICTIONARIES
from npair.bulk.source import Piece
from npair.bulk.storage import absolute, entries, locate, reachable, write_whole

ABOUT, STATE, PREFIX = "_bulk.json", "_unfinished", "part-"
OF_DISKS = "lost+found"  # in the root of a volume
PLAN = pa.schema({"piece": pa.int64(), "size": pa.int64(), "content": pa.string()})
PIECES = 500  # in a row group of the plan


@dataclass(frozen=True)
class About:
    """What an output holds. model, version, manifest: see ``schema``; precision: of the vectors.

    source: the list's location. stamp, unit, kind: see ``Source``. kind: empty if npair 0.2.0
    wrote it. rows, refused: None until it is complete.
    """

    model: str
    version: int
    manifest: str
    precision: str
    source: str
    stamp: str
    unit: str
    kind: str = ""
    rows: int | None = None
    refused: int | None = None


class Progress(NamedTuple):
    """How much of the list is written, in the source's unit."""

    done: int
    total: int


def part(piece: int) -> str:
    """Return the name of a piece's file: known beforehand, so that no piece has two."""
    return f"{PREFIX}{piece:08}.parquet"


class Output:
    """An output to begin, to continue and to complete."""

    def __init__(self, location: str) -> None:
        """location: a folder or a prefix, which may be missing. Raises: BulkError."""
        self.location = absolute(location)
        self.system, self.path = locate(self.location)
        if "/" not in self.path:
            raise BulkError(f"{location} is a bucket; name a folder in it, such as {location}/out")
        self.state = f"{self.path}/{STATE}"
        self.plan = f"{self.state}/pieces.parquet"
        self._about = f"{self.path}/{ABOUT}"

    def about(self) -> About | None:
        """Return what the output holds, None for nothing.

        Raises: BulkError if it holds what npair bulk has not written.
        """
        self._refuse_missing_bucket()
        with reachable(self.location):
            if self.system.get_file_info(self._about).is_file:
                with self.system.open_input_stream(self._about) as file:
                    return About(**json.loads(file.read()))
        if strange := self._names() - {STATE, OF_DISKS}:
            raise BulkError(
                f"{self.location} holds {min(strange)}, which npair bulk has not written; name an"
                " empty or missing folder"
            )
        return None

    def begin(self, about: About, pieces: Iterable[Piece]) -> None:
        """Write the list's pieces, and then what the output will hold.

        Raises: BulkError, also if there is no piece, or the output lies in the list.
        """
        if f"{self.location}/".startswith(f"{about.source}/"):
            raise BulkError(f"{self.location} lies in the list; name a folder outside of it")
        rows = (
            (number, size, json.dumps(content)) for number, (size, content) in enumerate(pieces)
        )
        with reachable(self.location):
            self.system.create_dir(self.path, recursive=True)
            self.system.create_dir(self.state, recursive=True)
            count = 0
            with pq.ParquetWriter(self.plan, PLAN, filesystem=self.system) as plan:
                while group := list(itertools.islice(rows, PIECES)):
                    columns = map(pa.array, zip(*group, strict=True), PLAN.types)
                    plan.write_table(pa.Table.from_arrays(list(columns), schema=PLAN))
                    count += len(group)
            if not count:
                raise BulkError(f"{about.source} does not exist, or holds no photos")
            self._write(about)

    def resume(self) -> tuple[list[dict[str, Any]], Progress]:
        """Return the pieces that are not written, as rows of PLAN, and how much is.

        Raises: BulkError if there is a file of no piece.
        """
        plan = self._pieces()
        parts = [part(piece) for piece in plan["piece"].to_pylist()]
        written = self._written(parts)
        left = plan.filter(pa.array([name not in written for name in parts], pa.bool_()))
        total, rest = (pc.sum(table["size"]).as_py() or 0 for table in (plan, left))
        return left.to_pylist(), Progress(total - rest, total)

    def write(self, piece: int, rows: pa.Table) -> None:
        """Write the rows of a piece in one step, in place of those that it may have.

        Raises: BulkError.
        """
        content = pa.BufferOutputStream()
        pq.write_table(rows, content, use_dictionary=DICTIONARIES)
        with reachable(self.location):
            path = f"{self.path}/{part(piece)}"
            write_whole(self.system, path, content.getvalue(), self.state)

    def complete(self, about: About) -> About:
        """Check that each row is there once, and write so.

        Raises: BulkError if a piece has too few rows or too many, or a file is of no piece.
        """
        plan = self._pieces(["piece", "size"])
        sizes = dict(zip(plan["piece"].to_pylist(), plan["size"].to_pylist(), strict=True))
        files = [f"{self.path}/{name}" for name in sorted(self._written(map(part, sizes)))]
        rows, refused = dict[int, int](), 0
        with reachable(self.location):
            table = ds.dataset(files, filesystem=self.system, format="parquet")
            for batch in table.to_batches(columns=["piece", "reason"]):
                by = pa.table(batch).group_by("piece")
                for group in by.aggregate([([], "count_all"), ("reason", "count")]).to_pylist():
                    piece = group["piece"]
                    rows[piece] = rows.get(piece, 0) + group["count_all"]
                    refused += group["reason_count"]
        wrong = [
            part(piece)
            for piece, size in sizes.items()
            if piece not in rows or (about.unit == "photos" and rows[piece] != size)
        ]
        if wrong:
            raise BulkError(
                f"{self.location} has too few or too many rows in {len(wrong)} pieces, such as"
                f" {wrong[0]}; delete these files, and run again"
            )
        about = replace(about, rows=sum(rows.values()), refused=refused)
        with reachable(self.location):
            self._write(about)
        self.tidy()
        return about

    def tidy(self) -> None:
        """Delete what only an unfinished output needs."""
        with reachable(self.location):
            if self.system.get_file_info(self.state).type != fs.FileType.NotFound:
                self.system.delete_dir(self.state)

    def _written(self, parts: Iterable[str]) -> set[str]:
        """Return the names of the files with rows. Raises: BulkError if one is not of parts."""
        written = {name for name in self._names() if name.startswith(PREFIX)}
        if strange := written.difference(parts):
            raise BulkError(
                f"{self.location} holds {min(strange)}, which is of another list or release;"
                " delete it, and run again"
            )
        return written

    def _names(self) -> set[str]:
        with reachable(self.location):
            return {each.base_name for each in entries(self.system, self.path)}

    def _write(self, about: About) -> None:
        """Write what the output holds."""
        content = pa.py_buffer(json.dumps(asdict(about), indent=2).encode())
        write_whole(self.system, self._about, content, self.state)

    def _pieces(self, columns: list[str] | None = None) -> pa.Table:
        """Return all pieces, with the columns of PLAN or some of them."""
        try:
            return pq.read_table(self.plan, columns=columns, filesystem=self.system)
        except FileNotFoundError as error:
            raise BulkError(
                f"{self.location} is unfinished, but has no {STATE}; delete what it holds, and"
                f" {self.location}.unfinished if npair 0.2.0 began it, and run again"
            ) from error

    def _refuse_missing_bucket(self) -> None:
        bucket = self.path.partition("/")[0]
        if "://" not in self.location:
            return
        with reachable(self.location):
            if self.system.get_file_info(bucket).type == fs.FileType.NotFound:
                raise BulkError(f"{self.location}: there is no bucket {bucket}; make it first")
