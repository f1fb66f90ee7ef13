"""Begin an output, continue it and complete it, without Ray."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import fs

from npair.bulk import BulkError
from npair.bulk.output import About, Output, Progress, part
from npair.bulk.schema import schema
from npair.bulk.source import Piece
from npair.bulk.storage import write_whole

ABOUT = About("npair", 14, "0" * 64, "fp32", "list", "", "photos")
SIZES = (3, 3, 2)


def rows(piece: int, count: int) -> pa.Table:
    """Return rows of which the first has a reason."""
    columns: dict[str, Any] = {
        "id": [f"{piece}/{row}" for row in range(count)],
        "vector": [[0.0] * 128] * count,
        "reason": ["no photo"] + [None] * (count - 1),
        "model": ["npair"] * count,
        "version": [14] * count,
        "manifest": ["0" * 64] * count,
        "piece": [piece] * count,
    }
    return pa.table(columns, schema=schema(128, "fp32"))


@pytest.fixture
def output(tmp_path: Path) -> Output:
    begun = Output(str(tmp_path / "out"))
    begun.begin(ABOUT, [Piece(size, f"content {number}") for number, size in enumerate(SIZES)])
    return begun


def test_pieces_are_written_once(output: Output) -> None:
    output.write(1, rows(1, 3))
    left, progress = output.resume()
    assert [piece["piece"] for piece in left] == [0, 2]
    assert json.loads(left[1]["content"]) == "content 2"
    assert progress == Progress(3, 8)
    for piece in (1, 0, 2):  # the first again, as by an actor that was taken for dead
        output.write(piece, rows(piece, SIZES[piece]))
    assert output.resume() == ([], Progress(8, 8))
    about = output.complete(ABOUT)
    assert (about.rows, about.refused) == (8, 3)
    assert output.about() == about
    assert not Path(output.state).exists()
    ids = pq.read_table(output.location)["id"].to_pylist()
    assert ids == [f"{piece}/{row}" for piece, size in enumerate(SIZES) for row in range(size)]


@pytest.mark.parametrize("count", [0, 2, 4])
def test_rows_too_few_or_too_many(output: Output, count: int) -> None:
    for piece in (0, 2):
        output.write(piece, rows(piece, SIZES[piece]))
    if count:
        output.write(1, rows(1, count))
    with pytest.raises(BulkError, match=f"too few or too many rows in 1 pieces, such as {part(1)}"):
        output.complete(ABOUT)
    Path(output.path, part(1)).unlink(missing_ok=True)
    assert len(output.resume()[0]) == 1


def test_files_of_no_piece(output: Output) -> None:
    Path(output.path, "part-c0ffee-00000000.parquet").touch()
    for use in (output.resume, lambda: output.complete(ABOUT)):
        with pytest.raises(BulkError, match=r"holds part-c0ffee-00000000\.parquet, which is of"):
            use()


def test_a_folder_that_only_a_job_has_used(tmp_path: Path) -> None:
    """A volume of its own has lost+found, and files are renamed only within one."""
    begun = Output(str(tmp_path))
    (tmp_path / "lost+found").mkdir(mode=0)
    (tmp_path / "_unfinished").mkdir()
    (tmp_path / "_unfinished/pieces.parquet").touch()  # of a job that was killed as it began
    assert begun.about() is None
    begun.begin(ABOUT, [Piece(3, "content")])
    assert {path.name for path in tmp_path.iterdir()} == {
        *("lost+found", "_unfinished", "_bulk.json")
    }
    begun.write(0, rows(0, 3))
    assert pq.read_table(tmp_path).num_rows == 3, "readers pass over the rest"
    assert begun.resume()[0] == []


def test_an_output_of_another_release(output: Output) -> None:
    """0.2.0 kept its state beside the output, and no kind of the list."""
    told = {key: value for key, value in asdict(ABOUT).items() if key != "kind"}
    Path(output.path, "_bulk.json").write_text(json.dumps(told))
    shutil.rmtree(output.state)
    assert output.about() == ABOUT
    with pytest.raises(BulkError, match=r"has no _unfinished; .*/out\.unfinished if npair 0\.2\.0"):
        output.resume()


def test_an_output_in_its_list(tmp_path: Path) -> None:
    for out in ("", "list/out"):
        begun = Output(str(tmp_path / out))
        with pytest.raises(BulkError, match="lies in the list"):
            begun.begin(replace(ABOUT, source=str(tmp_path)), [Piece(1, "content")])
    assert not list(tmp_path.iterdir())


def test_a_file_is_whole_or_as_before(tmp_path: Path) -> None:
    path, scratch = tmp_path / "file", tmp_path / "scratch"
    path.write_text("before")
    with pytest.raises(FileNotFoundError):
        write_whole(fs.LocalFileSystem(), str(path), pa.py_buffer(b"after"), str(scratch))
    assert path.read_text() == "before"
    scratch.mkdir()
    write_whole(fs.LocalFileSystem(), str(path), pa.py_buffer(b"after"), str(scratch))
    assert path.read_text() == "after"
    assert not list(scratch.iterdir())
