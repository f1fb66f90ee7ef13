"""Read catalogues: tables with columns of the user's own, and folders."""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path

import pytest
from support.photos import folders, photo, table

from npair.data.catalogue import Entry, read_catalogue
from npair.data.dataset import DataError


def labels_of(source: Path) -> dict[Path, str]:
    return {path: entry.label for path, entry in read_catalogue(source).entries.items()}


class TestTables:
    @pytest.mark.parametrize("suffix", [".csv", ".tsv"])
    @pytest.mark.parametrize("delimiter", [",", ";", "\t"])
    def test_columns_come_with_the_photo(self, tmp_path: Path, delimiter: str, suffix: str) -> None:
        """One label is enough, and any separator that spreadsheets use."""
        path = photo(tmp_path / "photos/a.png")
        rows = (
            "Path,Label,Price,SKU,,",
            "photos/a.png,x,3.50, 12 ,,",
            ",,,,,",
            '"b.png",x,,"1\n2",,',
        )
        text = "\ufeff" + "\r\n".join(rows).replace(",", delimiter)
        catalogue = read_catalogue(table(tmp_path, text, f"photos{suffix}"))
        assert (catalogue.root, catalogue.ignored) == (tmp_path, "")
        assert catalogue.entries == {
            path: Entry("x", {"Price": "3.50", "SKU": "12"}),
            tmp_path / "b.png": Entry("x", {"Price": "", "SKU": "1\n2"}),
        }

    @pytest.mark.parametrize(
        ("rows", "reason"),
        [
            (
                "a.png,x,1\nb.png,x,1\na.png,y,1\n",
                r":4: .*a\.png has the label 'y', but 'x' in line 2",
            ),
            ("a.png,x,1\n./a.png,x,2\n", r":3: .*a\.png has the price '2', but '1' in line 2"),
            ("a.png,x,1\nb/../a.png,x,2\n", r":3: .*a\.png has the price '2', but '1' in line 2"),
            ("a.png,,1\n", ":2: no label; fill the cell, or remove the line"),
            (" ,x,1\n", ":2: no path; fill the cell, or remove the line"),
            ("a.png,x\n", ":2: 2 cells in 3 columns"),
            ("pipe.png,x,1\n", r":2: .*pipe\.png is no file; remove the line"),
            (".,x,1\n", ":2: .* is no file; remove the line"),
        ],
    )
    def test_names_the_bad_line(self, tmp_path: Path, rows: str, reason: str) -> None:
        photo(tmp_path / "a.png")
        photo(tmp_path / "b/c.png")
        os.mkfifo(tmp_path / "pipe.png")
        with pytest.raises(DataError, match=rf"photos\.csv{reason}"):
            read_catalogue(table(tmp_path, f"path,label,price\n{rows}"))

    def test_two_columns_of_one_name(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"csv:1: two columns are called 'price'; rename one"):
            read_catalogue(table(tmp_path, "path,label,price,price\n"))

    def test_a_photo_may_be_in_two_splits(self, tmp_path: Path) -> None:
        path = photo(tmp_path / "a.png")
        rows = "path,label,split\na.png,x,train\na.png,x,val\n"
        assert read_catalogue(table(tmp_path, rows)).entries == {
            path: Entry("x", {"split": "train"})
        }

    def test_missing_files_stay_listed(self, tmp_path: Path) -> None:
        names = ("gone/a.png", f"{'b' * 5000}.png")
        rows = "".join(f"{name},x\n" for name in names)
        assert [*labels_of(table(tmp_path, f"path,label\n{rows}"))] == [
            tmp_path / name for name in names
        ]


class TestFolders:
    def test_folders_and_what_lies_beside_them(self, tmp_path: Path) -> None:
        root = folders(tmp_path, classes=1, photos=1)
        loose, deep, hidden, other = (
            photo(root / name)
            for name in ("loose.png", "kind/class/deep.png", ".hidden.png", "kind/other.HEIC")
        )
        assert labels_of(root) == {
            root / "class 0/0.png": "class 0", loose: "", deep: "kind/class", other: "kind",
        }  # fmt: skip
        assert str(hidden) in read_catalogue(root).ignored

    def test_splits_are_no_labels(self, tmp_path: Path) -> None:
        paths = [photo(tmp_path / split / "class/a.png") for split in ("train", "test")]
        assert labels_of(tmp_path) == dict.fromkeys(paths, "class")
        toy = photo(tmp_path / "toy/a.png")
        assert labels_of(tmp_path) == {**dict.fromkeys(paths, "class"), toy: "toy"}

    def test_in_either_unicode_form_are_one(self, tmp_path: Path) -> None:
        paths = [
            photo(tmp_path / unicodedata.normalize(form, "Crème") / "a.png")
            for form in ("NFC", "NFD")
        ]
        assert labels_of(tmp_path) == dict.fromkeys(paths, unicodedata.normalize("NFC", "Crème"))

    def test_lists(self, listed: Path) -> None:
        assert len(labels_of(listed)) == 36
        table(listed, "nowhere.jpg, 0, 0", "val.txt")
        with pytest.raises(DataError, match=r"val\.txt:1: no photo"):
            labels_of(listed)
