"""Cut each kind of list into pieces, read them back, and refuse what is no list."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
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
from npair.bulk.photos import _members
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


def test_paths_that_lead_nowhere(tmp_path: Path) -> None:
    """One of them leaves the others as they are."""
    expected = {
        "1.png": photo(tmp_path / "1.png").read_bytes(),
        "": "the file cannot be read: ",
        "a\0b.png": "the path cannot be used: Embedded NUL",
        "http://example.org/b.jpg": "the path cannot be used: Unrecognized filesystem type",
        "file:///b.jpg": "the path cannot be used: File URI cannot be relative",
        "s3:///b.jpg": "the path cannot be used: Path cannot start with a separator",
    }
    for each in read(table(tmp_path / "list.parquet", path=list(expected))):
        assert each.read[: len(expected[each.id])] == expected[each.id]


@pytest.mark.parametrize(
    "kind",
    [pa.large_binary(), pa.binary_view(), pa.binary(1), pa.dictionary(pa.int8(), pa.binary())],
)
def test_types_of_bytes(tmp_path: Path, kind: pa.DataType) -> None:
    cells = pa.array([b"1", b"2"]).cast(kind)
    found = read(table(tmp_path / "list.parquet", id=["a", "b"], bytes=cells))
    assert found == [Photo("a", b"1"), Photo("b", b"2")]


def test_files_of_a_table_that_differ(tmp_path: Path) -> None:
    table(tmp_path / "1.parquet", id=["a"], bytes=[b"1"])
    table(tmp_path / "2.parquet", id=pa.array([], pa.string()), bytes=pa.array([], pa.binary()))
    assert read(tmp_path) == [Photo("a", b"1")], "no piece without a row"
    for columns, reason in {
        ("id", "image"): r"2\.parquet needs one column bytes, .* it has id, image",
        ("id", "bytes"): r"2\.parquet: the column bytes is of type string, not bytes",
    }.items():
        table(tmp_path / "2.parquet", **{name: ["x"] for name in columns})
        with pytest.raises(BulkError, match=reason):
            read(tmp_path)


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
    whole = shard(tmp_path / "4.tar", two).read_bytes()
    (tmp_path / "5.tar").write_bytes(whole[:2048])  # without zeros at the end
    damaged = bytearray(whole)
    damaged[1024 + 5] ^= 1  # in the second's header
    (tmp_path / "6.tar").write_bytes(damaged)
    (tmp_path / "7.tar").write_bytes(whole + whole)
    (tmp_path / "8.tar").touch()
    found = read(tmp_path)
    assert found[:7] == [
        Photo("0.tar/a.png", b"1"),
        Photo("0.tar", "the shard is damaged after 1 photos (unexpected end of data)"),
        Photo("1.tar/a.png", b"1"),
        Photo("1.tar", "the shard is damaged after 1 photos (truncated header)"),
        Photo("2.tar", "the shard holds no photo"),
        Photo("3.tar/a.png", b"1"),
        Photo("3.tar/a.png#2", "the shard has it twice"),
    ]
    reasons = {each.id: each.read for each in found[7:] if isinstance(each.read, str)}
    assert reasons == {
        "5.tar": "the shard is damaged after 2 photos (it has no end marker)",
        "6.tar": "the shard is damaged after 1 photos (bad checksum)",
        "7.tar": "the shard is damaged after 2 photos (more data after its end)",
        "8.tar": "the shard is damaged after 0 photos (empty file)",
    }
    assert len(found) == 7 + 2 + 3 + 2 + 3 + 1


def test_members_that_are_no_files(tmp_path: Path) -> None:
    """GNU tar writes the second name of a file as a link."""
    source = tmp_path / "source"
    (source / "d.png").mkdir(parents=True)
    (source / "a.png").write_bytes(b"1")
    os.link(source / "a.png", source / "b.png")
    (source / "c.png").symlink_to("a.png")
    os.mkfifo(source / "e.png")
    with tarfile.open(tmp_path / "1.tar", "w") as tar:
        for path in sorted(source.iterdir()):
            tar.add(path, path.name)
    link = "a link to a.png; tar --dereference --hard-dereference packs the photo itself"
    assert read(tmp_path / "1.tar") == [
        Photo("1.tar/a.png", b"1"),
        Photo("1.tar/b.png", link),
        Photo("1.tar/c.png", link),
        Photo("1.tar/e.png", "no plain file"),
    ]


def fuzzed(rng: random.Random) -> bytes:
    """Return a shard with a few wrong bytes in headers whose checksums are right, or cut off."""
    formats = (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT)
    pax = rng.choice(
        [
            {},
            {"size": rng.choice(["x", "-1", str(1 << 62)])},
            {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "900"},
            {"GNU.sparse.map": f"{-(1 << 62)},{1 << 62},0,100", "GNU.sparse.size": "900"},
        ]
    )
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=rng.choice(formats)) as tar:
        for name in ("a.png", f"{'d' * 90}/\xe9.png", "c.png"):
            member = tarfile.TarInfo(name)
            member.size, member.pax_headers = 900, dict(pax)
            tar.addfile(member, io.BytesIO(rng.randbytes(900)))
    content = stream.getbuffer()
    for _ in range(rng.randrange(3)):
        start = 512 * rng.randrange(10)
        place = rng.choice([rng.randrange(512), rng.randrange(124, 136), 156, rng.randrange(60)])
        content[start + place] = rng.choice([0, 0x80, 0xFF, *b"LSxK19 =", rng.randrange(256)])
        content[start + 148 : start + 156] = b" " * 8
        content[start + 148 : start + 156] = b"%06o\0 " % sum(content[start : start + 512])
    return bytes(content[: rng.choice([len(content), rng.randrange(len(content))])])


def test_members_of_any_shard() -> None:
    """Whatever a shard's headers claim, it is read to its end, or refused. None hangs."""
    rng, whole = random.Random(1), 0
    member = tarfile.TarInfo("notes.txt")
    member.size = 1 << 62
    endless = member.tobuf(tarfile.GNU_FORMAT)
    member.pax_headers = {"comment": "x"}
    nested = member.tobuf(tarfile.PAX_FORMAT)[:1024] * 2000
    for content in (endless, nested, *(fuzzed(rng) for _ in range(600))):
        try:
            list(_members(io.BytesIO(content), len(content), MOST))
            whole += 1
        except tarfile.ReadError:
            pass
    assert 100 < whole < 500


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ({"path": ["a", "b", "a", "a"]}, "1 ids are in several rows, such as a in 3"),
        ({"id": [1, 1], "bytes": [b"", b""]}, "1 ids are in several rows, such as 1 in 2"),
        ({"path": ["a", "b", None]}, "row 2 has no path"),
        ({"path": ["a"], "id": pa.array([None], pa.string())}, "row 0 has no id"),
        ({"file": ["a"], "bytes": [b""]}, "needs a column path, .* it has file, bytes"),
        (
            {"id": [1], "bytes": ["UE5H"]},
            "list.parquet: the column bytes is of type string, not bytes",
        ),
        (
            {"id": [1], "bytes": [{"bytes": b"", "path": "a"}]},
            r"the column bytes is of type struct<.*, not bytes",
        ),
        ({"path": [["a"]]}, r"the column path is of type list<.*, not text or numbers"),
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
        ".": "holds tables such as text.parquet and shards such as mixed.tar and photos such as a",
    }.items():
        with pytest.raises(BulkError, match=reason):
            read(tmp_path / name)
    with pytest.raises(BulkError, match="ftp://host/photos cannot be used"):
        open_source("ftp://host/photos")


@pytest.mark.parametrize(("stray", "kind"), [("b.tar", "shards"), ("b.parquet", "tables")])
def test_photos_beside_another_kind(tmp_path: Path, stray: str, kind: str) -> None:
    """None is passed over. If the others come after the list was cut, they are no part of it."""
    photo(tmp_path / "a.png")
    cut = open_source(str(tmp_path))
    if kind == "tables":
        table(tmp_path / stray, path=["a.png"])
    else:
        shard(tmp_path / stray, {"b.png": b"1"})
    with pytest.raises(BulkError, match=f"holds {kind} such as {stray} and photos such as a.png"):
        open_source(str(tmp_path))
    assert open_source(str(tmp_path), cut.kind) == cut
    assert open_source(str(tmp_path / stray)).kind == kind


def test_names_that_are_not_text(tmp_path: Path) -> None:
    photo(tmp_path / "caf\udce9.png")
    with pytest.raises(BulkError, match=r"caf\\udce9.png' is not UTF-8"):
        read(tmp_path)


def test_members_whose_names_are_not_text(tmp_path: Path) -> None:
    one = shard(tmp_path / "1.tar", {"caf\udce9.png": b"1", "caf\xe9.png": b"2"})
    assert read(one) == [Photo(r"1.tar/caf\xe9.png", b"1"), Photo("1.tar/caf\xe9.png", b"2")]
