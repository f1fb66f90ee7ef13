"""The folder that ``npair bulk`` writes: rows of one list, embedded by one version.

    vectors/part-*.parquet       see ``schema``
    vectors/_bulk.json           what they are, and whether they are complete
    vectors.unfinished/          until then: the list's pieces, and Ray's checkpoints

Readers of Parquet pass over names that begin with an underscore.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import NamedTuple

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
from pyarrow import fs

from npair.bulk import BulkError
from npair.bulk.schema import PREFIX
from npair.bulk.source import Piece
from npair.bulk.storage import absolute, files_in, locate, reachable

ABOUT = "_bulk.json"
PLAN = pa.schema({"piece": pa.int64(), "size": pa.int64(), "content": pa.string()})
PIECES = 500  # in a row group of the plan
COMMITTED, PENDING = ".parquet", ".pending.parquet"  # Ray's checkpoints


@dataclass(frozen=True)
class About:
    """What an output holds. model, version, manifest: see ``schema``; precision: of the vectors.

    source: the list's location. stamp, unit: see ``Source``.
    rows, refused: None until it is complete.
    """

    model: str
    version: int
    manifest: str
    precision: str
    source: str
    stamp: str
    unit: str
    rows: int | None = None
    refused: int | None = None


class Progress(NamedTuple):
    """How much of the list is written, in the source's unit."""

    done: int
    total: int


class Output:
    """An output to begin, to continue and to complete."""

    def __init__(self, location: str) -> None:
        """location: a folder or a prefix, which may be missing. Raises: BulkError."""
        self.location = absolute(location)
        self.system, self.path = locate(self.location)
        if "/" not in self.path:
            raise BulkError(f"{location} is a bucket; name a folder in it, such as {location}/out")
        self.state = f"{self.path}.unfinished"
        self.plan, self.checkpoints = f"{self.state}/pieces.parquet", f"{self.state}/checkpoints"
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
            strange = files_in(self.system, self.path)
        if strange:
            raise BulkError(
                f"{self.location} holds {strange[0].base_name}, which npair bulk has not written;"
                " name an empty or missing folder"
            )
        return None

    def begin(self, about: About, pieces: Iterable[Piece]) -> None:
        """Write the list's pieces, and then what the output will hold.

        Raises: BulkError, also if there is no piece.
        """
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

    def resume(self) -> Progress:
        """Settle the checkpoints of a job that was killed, and return what is written.

        Where a store cannot rename, Ray copies a pending checkpoint and then deletes it. If it was
        killed in between, Ray would take the rows for unwritten and for written at once, and lose
        them.
        """
        with reachable(self.location):
            names = {file.path for file in files_in(self.system, self.checkpoints)}
            for path in names:
                if path.removesuffix(PENDING) + COMMITTED in names - {path}:
                    self.system.delete_file(path)
            committed = [path for path in names if not path.endswith(PENDING)]
            done = set[int]()
            if committed:
                table = ds.dataset(committed, filesystem=self.system, format="parquet")
                for batch in table.to_batches(columns=["piece"]):
                    done.update(batch["piece"].unique().to_pylist())
        sizes = self._sizes()
        return Progress(sum(sizes[piece] for piece in done), sum(sizes.values()))

    def complete(self, about: About) -> About:
        """Check that each row is there once, and write so.

        Raises: BulkError if rows of a piece are missing, or there twice.
        """
        sizes, files = self._sizes(), [file.path for file in self.parts()]
        written: dict[int, tuple[str, int]] = {}
        twice, refused = set[int](), 0
        with reachable(self.location):
            table = ds.dataset(files, filesystem=self.system, format="parquet")
            for batch in table.to_batches(columns=["piece", "reason", "__filename"]):
                by = pa.table(batch).group_by(["piece", "__filename"])
                for group in by.aggregate([([], "count_all"), ("reason", "count")]).to_pylist():
                    piece, file = group["piece"], group["__filename"]
                    first, rows = written.get(piece, (file, 0))
                    if first != file:
                        twice.add(piece)
                    written[piece] = first, rows + group["count_all"]
                    refused += group["reason_count"]
        short = [
            piece
            for piece, size in sizes.items()
            if piece not in written or (about.unit == "photos" and written[piece][1] < size)
        ]
        if short or twice:
            raise BulkError(
                f"{self.location} lacks rows of {len(short)} pieces and has {len(twice)} pieces"
                " twice: did two jobs write to it at once? Delete it, and run again"
            )
        about = replace(about, rows=sum(rows for _, rows in written.values()), refused=refused)
        with reachable(self.location):
            self._write(about)
        self.tidy()
        return about

    def tidy(self) -> None:
        """Delete what only an unfinished output needs."""
        with reachable(self.location):
            if self.system.get_file_info(self.state).type != fs.FileType.NotFound:
                self.system.delete_dir(self.state)

    def parts(self) -> list[fs.FileInfo]:
        """List the files with rows."""
        return [
            file for file in files_in(self.system, self.path) if file.base_name.startswith(PREFIX)
        ]

    def _write(self, about: About) -> None:
        """Write what the output holds, in one step."""
        unfinished = f"{self.state}/{ABOUT}"
        with self.system.open_output_stream(unfinished) as file:
            file.write(json.dumps(asdict(about), indent=2).encode())
        self.system.move(unfinished, self._about)

    def _sizes(self) -> dict[int, int]:
        """Return the size of each piece."""
        try:
            table = pq.read_table(self.plan, filesystem=self.system, columns=["piece", "size"])
        except FileNotFoundError as error:
            raise BulkError(
                f"{self.location} is unfinished, but {self.state} is gone; delete both, and run"
                " again"
            ) from error
        return dict(zip(table["piece"].to_pylist(), table["size"].to_pylist(), strict=True))

    def _refuse_missing_bucket(self) -> None:
        bucket = self.path.partition("/")[0]
        if "://" not in self.location:
            return
        with reachable(self.location):
            if self.system.get_file_info(bucket).type == fs.FileType.NotFound:
                raise BulkError(f"{self.location}: there is no bucket {bucket}; make it first")
