"""Import what ``npair bulk`` wrote, refuse what it did not, export and import again."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.vectors import bulk_file, units

from npair import cli
from npair.gallery import build, transfer
from npair.gallery.gallery import Gallery, PhotoGoneError
from npair.gallery.location import Folder, GalleryError
from npair.gallery.transfer import Imported, export_vectors, import_vectors

ID = r"photos/class 2/2\.jpg"


def npair(*arguments: object) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["npair", "index", *map(str, arguments)])
        return cli.main()


@pytest.mark.parametrize("kind", [np.float16, np.float32])
def test_vectors_are_found_by_themselves(kind: type, tmp_path: Path) -> None:
    vectors = units(40)
    bulk_file(tmp_path / "bulk/part-0.parquet", vectors[:30].astype(kind), refused=2)
    bulk_file(tmp_path / "bulk/part-1.parquet", vectors[30:].astype(kind), first=32)
    bulk_file(tmp_path / "bulk/part-2.parquet", vectors[:0].astype(kind), refused=1, first=50)
    done = import_vectors(tmp_path / "bulk", tmp_path / "gallery")
    assert done == Imported("npair", "13", photos=40, imported=40, left_out=3)
    made = Gallery(tmp_path / "gallery")
    assert made.manifest_sha256 == f"{13:064x}"
    for row, vector in ((0, vectors[0]), (33, vectors[31])):
        hit = made.nearest(vector, 1)[0]
        assert (hit.photo, hit.label) == (f"photos/class {row % 3}/{row}.jpg", f"class {row % 3}")
        assert hit.cosine == pytest.approx(1, abs=1e-3)
        assert made.vector(hit.id) == pytest.approx(vector, abs=1e-3)
        with pytest.raises(PhotoGoneError, match=rf"{row}\.jpg is gone"):
            made.photo(hit.id)


def test_imported_again_is_there_once(tmp_path: Path) -> None:
    source, index = tmp_path / "bulk", tmp_path / "gallery"
    bulk_file(source / "part-0.parquet", units(20))
    import_vectors(source, index)
    bulk_file(source / "part-0.parquet", units(20, seed=1))
    bulk_file(source / "part-1.parquet", units(5, seed=2), first=20)
    assert import_vectors(source, index).photos == 25
    assert Gallery(index).nearest(units(20, seed=1)[7], 1)[0].cosine == pytest.approx(1)
    (source / "part-0.parquet").unlink()
    assert import_vectors(source, index).photos == 25, "what a source lacks stays"


def test_goes_on_where_it_failed(tmp_path: Path) -> None:
    source, index = tmp_path / "bulk", tmp_path / "gallery"
    bulk_file(source / "part-0.parquet", units(20))
    last = bulk_file(source / "part-1.parquet", units(20, seed=1), first=20)
    whole = last.read_bytes()
    last.write_bytes(whole[:-1000])
    with pytest.raises(GalleryError, match=r"part-1\.parquet cannot be read"):
        import_vectors(source, index)
    with pytest.raises(GalleryError, match="there is no gallery"):
        Gallery(index)
    last.write_bytes(whole)
    assert import_vectors(source, index).photos == 40


class TestVersions:
    def test_do_not_mix(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        index = tmp_path / "gallery"
        bulk_file(tmp_path / "old/part-0.parquet", units(9))
        bulk_file(tmp_path / "new/part-0.parquet", units(7, seed=1), version=14)
        import_vectors(tmp_path / "old", index)
        with pytest.raises(GalleryError, match=r"is of version 13 .* are of version 14 .*--switch"):
            import_vectors(tmp_path / "new", index)
        opened = Gallery(index)
        assert (opened.version, len(opened)) == ("13", 9)
        assert npair("import", tmp_path / "new", "--index", index, "--switch") == 0
        assert "7 photos in" in (said := capsys.readouterr().out)
        assert "embedded by version 14: 7 of them imported now, 0 left out" in said
        assert opened.follow()
        assert (opened.version, len(opened)) == ("14", 7)

    @pytest.mark.parametrize("where", ["rows", "files"])
    def test_of_several_nothing_is_searched(
        self, where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(transfer, "ROWS", 4)
        path = bulk_file(tmp_path / "bulk/part-0.parquet", units(9))
        other = bulk_file(tmp_path / "bulk/part-1.parquet", units(9), version=14, first=9)
        if where == "rows":
            pq.write_table(pa.concat_tables(map(pq.read_table, (path, other))), path)
            other.unlink()
        with pytest.raises(GalleryError, match="has vectors of another version than") as refused:
            import_vectors(tmp_path / "bulk", tmp_path / "gallery")
        assert "Traceback" not in str(refused.value)
        with pytest.raises(GalleryError, match="there is no gallery"):
            Gallery(tmp_path / "gallery")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda table: table.drop_columns(["manifest"]), "has no column manifest; see npair bulk"),
        (lambda table: changed(table, "vector", 2 * units(4)), "their length is not 1"),
        (lambda table: changed(table, "vector", np.full((4, 128), np.nan, np.float32)), "is not 1"),
        (lambda table: changed(table, "id", [None, "a", "b", "c"]), "has rows without an id"),
        (lambda table: changed(table, "id", ["a", "b", "c", "c"]), "has the id c 2 times"),
        (lambda table: table.append_column("label", [["a", "b", None, "d"]]), f"no label for {ID}"),
        *(
            (
                lambda table, text=text: table.append_column("columns", [["{}", None, text, ""]]),
                f"has columns of {ID} that are no JSON object of strings",
            )
            for text in ("red", "[]", '["a"]', '{"price": 3}', r'{"file": "\udce9"}', "[" * 99_999)
        ),
        (
            lambda table: retyped(table, "id", pa.array([1, 2, 3, 4])),
            r"part-0\.parquet has int64 in the column id, which needs strings",
        ),
        (
            lambda table: retyped(table, "vector", pa.array([["0.5"]] * 4)),
            r"part-0\.parquet has list<.*string> in the column vector, which needs lists of floats",
        ),
        (
            lambda table: retyped(table, "vector", pa.array([[1.0], [1.0], [1.0], [0.6, 0.8]])),
            r"part-0\.parquet has vectors of 2 numbers, and the rows before have 1",
        ),
        (lambda table: changed(table, "reason", ["bad"] * 4), "none of the 4 rows in .* has a vec"),
    ],
)
def test_what_is_not_taken(change, reason: str, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    path = bulk_file(tmp_path / "bulk/part-0.parquet", units(4))
    pq.write_table(change(pq.read_table(path)), path)
    with pytest.raises(GalleryError, match=reason):
        import_vectors(tmp_path / "bulk", tmp_path / "gallery")
    bulk_file(path, units(4))
    assert import_vectors(tmp_path / "bulk", tmp_path / "gallery").photos == 4


def test_an_id_twice(tmp_path: Path) -> None:
    """Refused in a file for a gallery that has rows, and in two files for a new gallery."""
    index = tmp_path / "gallery"
    for name in ("one", "two"):
        path = bulk_file(tmp_path / f"{name}/part-0.parquet", units(4))
    bulk_file(tmp_path / "two/part-1.parquet", units(4), first=3)
    with pytest.raises(GalleryError, match="1 ids are in several files; nothing was imported"):
        import_vectors(tmp_path / "two", index)
    import_vectors(tmp_path / "one", index)
    for ids in ([f"new/{number}.jpg" for number in (1, 1, 2, 3)], ["photos/class 0/0.jpg"] * 4):
        pq.write_table(changed(pq.read_table(path), "id", ids), path)
        with pytest.raises(GalleryError, match=rf"has the id {ids[0]} \d times"):
            import_vectors(tmp_path / "two", index)
    assert len(Gallery(index)) == 4


@pytest.mark.parametrize("first", [64, 128])
def test_vectors_of_another_dimension(first: int, tmp_path: Path) -> None:
    """Refused in a later file, and for a gallery that is searched; what is left of it goes."""
    source, index = tmp_path / "bulk", tmp_path / "gallery"
    dimensions = (first, 192 - first)
    for number, dimension in enumerate(dimensions):
        half = units(4)[:, :dimension]
        vectors = half / np.linalg.norm(half, axis=1, keepdims=True)
        table = pq.read_table(bulk_file(source / f"part-{number}.parquet", units(4), first=4))
        table = retyped(table, "vector", pa.array(list(vectors)))
        pq.write_table(table, source / f"part-{number}.parquet")
    said = r"part-1\.parquet has vectors of {1} numbers, and the rows before have {0}$"
    with pytest.raises(GalleryError, match=said.format(*dimensions)):
        import_vectors(source, index)
    (source / "part-0.parquet").rename(tmp_path / "other.parquet")
    assert import_vectors(source, index).photos == 4
    (tmp_path / "other.parquet").rename(source / "part-1.parquet")
    said = r"part-1\.parquet cannot be imported: .* has vectors of {1} numbers, not {0};"
    with pytest.raises(GalleryError, match=said.format(*dimensions)):
        import_vectors(source, index)
    assert len(Gallery(index)) == 4


def changed(table: pa.Table, name: str, values: object) -> pa.Table:
    kind = table.schema.field(name).type
    return retyped(table, name, pa.array(list(values), kind))  # type: ignore[call-overload]


def retyped(table: pa.Table, name: str, array: pa.Array) -> pa.Table:
    return table.set_column(table.schema.get_field_index(name), name, array)


def test_copies_are_left_out(tmp_path: Path) -> None:
    """Rows with one id are as many as a photo has copies, more than the neighbours asked for."""
    bulk_file(tmp_path / "bulk/part-0.parquet", units(30))
    import_vectors(tmp_path / "bulk", tmp_path / "gallery")
    opened = Gallery(tmp_path / "gallery")
    first, second = opened.nearest(units(30)[0], 2)
    vector = opened.vector(first.id)
    copies = [{"sha256": first.id, "vector": vector, "photo": f"{n}"} for n in range(20)]
    opened.table.add([row | {"label": "", "columns": "{}"} for row in copies])
    assert {hit.id for hit in opened.nearest(vector, 3)} == {first.id}
    assert opened.nearest(vector, 1, without=first.id) == [second]
    with pytest.raises(ValueError, match="is no id"):
        opened.nearest(vector, 1, without="' OR ''='")


def test_no_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert npair("import", tmp_path / "nowhere", "--index", tmp_path / "gallery") == 1
    assert capsys.readouterr().err == f"npair: no Parquet files in {tmp_path / 'nowhere'}\n"


def test_exported_and_imported_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bulk_file(tmp_path / "bulk/part-0.parquet", units(30), refused=1)
    assert npair("import", tmp_path / "bulk", "--index", tmp_path / "a", "--json") == 1
    said = capsys.readouterr()
    assert json.loads(said.out)["left_out"] == 1
    table = Gallery(tmp_path / "a").table
    table.update(values={"columns": json.dumps({"price": "3.50"}), "label": "Fuji"})
    assert npair("export", tmp_path / "out", "--index", tmp_path / "a") == 0
    assert "30 photos of" in capsys.readouterr().out
    with pytest.raises(GalleryError, match=r"cannot be written: .* is not empty"):
        export_vectors(tmp_path / "a", tmp_path / "out")
    assert import_vectors(tmp_path / "out", tmp_path / "b").photos == 30
    first, second = (Gallery(tmp_path / name).nearest(units(30)[3], 5) for name in "ab")
    assert first == second
    assert (first[0].label, first[0].columns) == ("Fuji", {"price": "3.50"})


def test_a_long_interval_answers_although_the_table_is_gone(tmp_path: Path) -> None:
    """Two builds within the interval drop the table that is open."""
    index = tmp_path / "gallery"
    for version in (13, 14, 15):
        bulk_file(tmp_path / f"{version}/part-0.parquet", units(3), version=version)
    import_vectors(tmp_path / "13", index)
    opened = Gallery(index, refresh=3600)
    photo = opened.nearest(units(3)[0], 1)[0].id
    import_vectors(tmp_path / "14", index, switch=True)
    assert not opened.follow()
    opened.vector(photo)
    assert opened.version == "13", "not looked for within the interval"
    import_vectors(tmp_path / "15", index, switch=True)
    opened.vector(photo)
    assert opened.version == "15"


def test_many_vectors_are_quantised_and_compared_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "WHOLE", 5000)
    monkeypatch.setattr(transfer, "ROWS", 1000)
    centres = units(60)
    noise = 0.9 * units(6000, seed=1)
    vectors = centres[np.arange(6000) % 60] + noise
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    bulk_file(tmp_path / "bulk/part-0.parquet", vectors)
    import_vectors(tmp_path / "bulk", tmp_path / "gallery")
    opened, found = Gallery(tmp_path / "gallery"), 0
    assert [index.index_type for index in opened.table.list_indices()] == ["IvfPq"]
    for query in vectors[:50]:
        exact = {f"photos/class {row % 3}/{row}.jpg" for row in np.argsort(-(vectors @ query))[:10]}
        hits = opened.nearest(query, 10)
        assert hits[0].cosine == pytest.approx(1, abs=1e-5), "not the quantised one"
        found += len(exact & {hit.photo for hit in hits})
    assert found >= 475
    assert Folder(tmp_path / "gallery").pointer()["photos"] == ""
