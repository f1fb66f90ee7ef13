"""Cut each kind of list into pieces, read them back, and refuse what is no list."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
from pathlib import Path
from typing import Any

import lancedb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.photos import PNG, photo

from npair.bulk import BulkError
from npair.bulk.lists import open_source
from npair.bulk.source import Photo

MOST = len(PNG) + 10


def read(location: Path | str, rows: int = 2) -> list[Photo]:
    """Read a list through its pieces, as actors of other processes do."""
    source = open_source(str(location))
    travelled = pickle.loads(pickle.dumps(source))
    pieces = list(source.pieces(rows))
    found = []
    for size, content in pieces:
        photos = list(travelled.photos(json.loads(json.dumps(content)), MOST))
        assert source.unit == "bytes" or len(photos) == size <= rows
        found += photos
    return found


def table(file: Path, /, **columns: Any) -> Path:
    pq.write_table(pa.table(columns), file, row_group_size=2)
    return file


def shard(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def test_folder(tmp_path: Path) -> None:
    for name in ("b/2.png", "a.JPG", "b/1.png", "c.heic", "notes.txt", ".hidden.png"):
        photo(tmp_path / name)
    (tmp_path / "gone.jpg").symlink_to("nowhere")
    photos = {each.id: each.read for each in read(tmp_path)}
    assert photos == {
        **dict.fromkeys(
            ("a.JPG", "b/1.png", "b/2.png", "c.heic"), (tmp_path / "a.JPG").read_bytes()
        ),
        "gone.jpg": "there is no such file",
    }


def test_more_than_the_limit_is_cut_off(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(bytes(3 * MOST))
    assert [len(each.read) for each in read(tmp_path)] == [MOST + 1]


def test_table_of_paths(tmp_path: Path) -> None:
    first, second = photo(tmp_path / "photos/1 #%.png", 1), photo(tmp_path / "2.png", 2)
    paths = ["photos/1 #%.png", str(second), "missing.png"]
    expected = [first.read_bytes(), second.read_bytes(), "there is no such file"]
    by_path = read(table(tmp_path / "list.parquet", path=paths))
    assert [(each.id, each.read) for each in by_path] == list(zip(paths, expected, strict=True))
    by_id = read(table(tmp_path / "list.parquet", path=[paths[0]] * 3, id=[1, 2, 3]))
    assert [each.id for each in by_id] == ["1", "2", "3"]


@pytest.mark.parametrize("kind", ["parquet", "lance"])
def test_table_of_bytes(tmp_path: Path, kind: str) -> None:
    columns = {"id": ["a", "b", "c"], "bytes": [b"1", None, b"3"], "label": ["x", "y", "z"]}
    if kind == "lance":
        lancedb.connect(tmp_path).create_table("list", pa.table(columns))
    else:
        table(tmp_path / "list.parquet", **columns)
    found = read(tmp_path / f"list.{kind}")
    assert sorted(found) == [Photo("a", b"1"), Photo("b", b""), Photo("c", b"3")]


def test_lance_table_of_paths(tmp_path: Path) -> None:
    photo(tmp_path / "1.png")
    database = lancedb.connect(tmp_path)
    opened = database.create_table("list", pa.table({"path": ["1.png"]}))
    source = open_source(str(tmp_path / "list.lance"))
    opened.add(pa.table({"path": ["2.png"]}))
    assert [size for size, _ in source.pieces(9)] == [1], "as it was"
    assert open_source(str(tmp_path / "list.lance")).stamp != source.stamp


def test_shards(tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    folder.mkdir()
    one = shard(folder / "1.tar", {"a.png": b"1", "a.json": b"{}", "b/c.jpg": b"2"})
    shard(folder / "2.tar", {"a.png": b"3"})
    assert read(folder) == [
        Photo("1.tar/a.png", b"1"),
        Photo("1.tar/b/c.jpg", b"2"),
        Photo("2.tar/a.png", b"3"),
    ]
    assert read(one)[0] == Photo("1.tar/a.png", b"1")


def test_shards_that_are_wrong(tmp_path: Path) -> None:
    two = {"a.png": b"1", "b.png": b"2"}
    for name, end in {"0.tar": 1536, "1.tar": 1030}.items():  # in the second's content, header
        (tmp_path / name).write_bytes(shard(tmp_path / name, two).read_bytes()[:end])
    shard(tmp_path / "2.tar", {"notes.txt": b""})
    with tarfile.open(tmp_path / "3.tar", "w") as tar:
        for content in (b"1", b"2"):
            member = tarfile.TarInfo("a.png")
            member.size = 1
            tar.addfile(member, io.BytesIO(content))
    found = read(tmp_path)
    assert found == [
        Photo("0.tar/a.png", b"1"),
        Photo("0.tar", "the shard is damaged after 1 photos (unexpected end of data)"),
        Photo("1.tar/a.png", b"1"),
        Photo("1.tar", "the shard is damaged after 1 photos (it has no end marker)"),
        Photo("2.tar", "the shard holds no photo"),
        Photo("3.tar/a.png", b"1"),
        Photo("3.tar/a.png#2", "the shard has it twice"),
    ]


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ({"path": ["a", "b", "a", "a"]}, "1 ids are in several rows, such as a in 3"),
        ({"id": [1, 1], "bytes": [b"", b""]}, "1 ids are in several rows, such as 1 in 2"),
        ({"path": ["a", "b", None]}, "row 2 has no path"),
        ({"path": ["a"], "id": pa.array([None], pa.string())}, "row 0 has no id"),
        ({"file": ["a"], "bytes": [b""]}, "needs a column path, .* it has file, bytes"),
    ],
)
def test_tables_that_are_wrong(tmp_path: Path, columns: dict[str, Any], reason: str) -> None:
    with pytest.raises(BulkError, match=reason):
        read(table(tmp_path / "list.parquet", **columns))


def test_what_is_no_list(tmp_path: Path) -> None:
    (tmp_path / "text.parquet").write_text("no Parquet")
    photo(tmp_path / "a.png")
    shard(tmp_path / "mixed.tar", {})
    for name, reason in {
        "text.parquet": "cannot be used",
        "a.png": "is one photo",
        "none.lance": "cannot be read as a table of LanceDB",
        ".": "holds .parquet and .tar files",
    }.items():
        with pytest.raises(BulkError, match=reason):
            read(tmp_path / name)
    with pytest.raises(BulkError, match="ftp://host/photos cannot be used"):
        open_source("ftp://host/photos")


def test_names_that_are_not_text(tmp_path: Path) -> None:
    photo(tmp_path / "caf\udce9.png")
    with pytest.raises(BulkError, match=r"caf\\udce9.png' is not UTF-8"):
        read(tmp_path)


def test_members_whose_names_are_not_text(tmp_path: Path) -> None:
    one = shard(tmp_path / "1.tar", {"caf\udce9.png": b"1", "caf\xe9.png": b"2"})
    assert read(one) == [Photo(r"1.tar/caf\xe9.png", b"1"), Photo("1.tar/caf\xe9.png", b"2")]
