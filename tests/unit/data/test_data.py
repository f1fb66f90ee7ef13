from __future__ import annotations

import ast
import dataclasses
import errno
import os
import shutil
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.models import ROOT
from support.photos import PREPROCESSING, folders, photo, sizes, table

from npair.client import photos as client_photos
from npair.data.dataset import SPLIT_NAMES, DataError, Dataset, HoldOut, hold_out_val
from npair.data.files import OTHER_SUFFIXES, SUFFIXES, summary
from npair.data.pixels import decode_dataset
from npair.data.sources import SYSTEM_FOLDERS, find_photos, read_dataset

NFC, NFD = (unicodedata.normalize(form, "Crème") for form in ("NFC", "NFD"))
# Split names used by Roboflow, Keras, Hugging Face and fastai, in various spellings.
SPELLINGS = [
    *(("train", "valid"), ("train", "validation"), ("training", "dev")),
    *(("Train", "Val"), ("TRAINING", "Testing"), ("train", "Test")),
]


class TestReadLists:
    def test_reads_labels_paths_and_names(self, listed: Path) -> None:
        dataset = read_dataset(listed)
        assert sizes(dataset) == {"train": 24, "val": 12}
        assert dataset.train.fine.tolist() == [product for product in range(6) for _ in range(4)]
        assert dataset.train.coarse.tolist() == [product // 2 for product in dataset.train.fine]
        assert dataset.train.fine_names == tuple(f"product-{product}" for product in range(6))
        assert dataset.train.coarse_names == ("0", "1", "2")
        assert dataset.made == "as listed in train.txt and val.txt"
        assert dataset.val is not None
        assert dataset.val.fine_names is dataset.train.fine_names

    def test_names_come_from_classes_csv(self, listed: Path) -> None:
        header = "Class Name (str),Class ID (int),Coarse Class Name (str),Coarse Class ID (int)\n"
        table(listed, header + "Äpfel,0,Obst,0\nsame,1,Obst,0\nsame,2,Saft,1\n", "classes.csv")
        train = read_dataset(listed).train
        assert train.fine_names == (
            "Äpfel",
            "same (1)",
            "same (2)",
            "product-3",
            "product-4",
            "product-5",
        )
        assert train.coarse_names == ("Obst", "Saft", "2")
        table(listed, "Class Name (str)\napple\n", "classes.csv")
        with pytest.raises(
            DataError, match=r"classes.csv:1: the header must name the column 'Class ID \(int\)'"
        ):
            read_dataset(listed)

    def test_finds_the_subfolder_dataset(self, listed: Path, tmp_path: Path) -> None:
        shutil.move(listed, tmp_path / "clone/dataset")
        assert len(read_dataset(tmp_path / "clone").train) == 24

    def test_a_name_may_hold_commas(self, tmp_path: Path) -> None:
        photo(tmp_path / "a, ö.jpg")
        table(tmp_path, "\ufeffa, ö.jpg, 3, 1\r\n\r\n", "train.txt")
        assert read_dataset(tmp_path).train.fine_names == (tmp_path.name,)

    @pytest.mark.parametrize(
        ("listing", "reason"),
        [
            ("a.jpg, 1\n", "train.txt:1: expected"),
            ("a.jpg, 1, 2\na.jpg, one, 2\n", "train.txt:2: expected"),
            ("b.jpg, 1, 2\n", "train.txt:1: no photo"),
            ("\n", "lists no photo"),
            (b"\xff.jpg, 1, 2\n", "not UTF-8"),
            ("a.jpg, 1, 2\ra.jpg, one, 2\r", "train.txt:2: expected"),
        ],
    )
    def test_names_the_bad_line(self, tmp_path: Path, listing: str | bytes, reason: str) -> None:
        (tmp_path / "a.jpg").touch()
        table(tmp_path, listing, "train.txt")
        with pytest.raises(DataError, match=reason):
            read_dataset(tmp_path)

    def test_reads_what_excel_for_macs_writes(self, listed: Path) -> None:
        header = "Class ID (int),Class Name (str),Coarse Class ID (int),Coarse Class Name (str)\n"
        table(listed, f"{header}0,apple,0,fruit\n", "classes.csv")
        fingerprint = read_dataset(listed).fingerprint()
        for name in ("train.txt", "val.txt", "classes.csv"):
            table(listed, (listed / name).read_bytes().replace(b"\n", b"\r"), name)
        assert read_dataset(listed).fingerprint() == fingerprint

    def test_missing_list(self, listed: Path) -> None:
        (listed / "train.txt").unlink()
        with pytest.raises(
            DataError, match=r"train.txt is missing.* If val.txt is no such list, move it away"
        ):
            read_dataset(listed)

    @pytest.mark.parametrize(("train", "other"), SPELLINGS)
    def test_splits_by_any_name(self, listed: Path, train: str, other: str) -> None:
        (listed / "train.txt").rename(listed / f"{train}.txt")
        (listed / "val.txt").rename(listed / f"{other}.txt")
        dataset = read_dataset(listed)
        assert sizes(dataset) == {"train": 24, SPLIT_NAMES[other.lower()]: 12}
        assert dataset.made == f"as listed in {train}.txt and {other}.txt"
        shutil.copy(listed / f"{other}.txt", listed / f"{other.swapcase()}.TXT")
        with pytest.raises(DataError, match=rf"are both the {SPLIT_NAMES[other.lower()]} split"):
            read_dataset(listed)


class TestReadFolders:
    def test_each_folder_with_photos_is_a_class(self, tmp_path: Path) -> None:
        for number, name in enumerate(
            ["fruit/apple/fuji, ü/a.JPG", "fruit/apple/b.jpeg", "fruit/c.webp", "x\n/d.jfif"]
        ):
            photo(tmp_path / name, number)
        train = read_dataset(tmp_path).train
        assert train.fine_names == ("fruit", "fruit/apple", "fruit/apple/fuji, ü", "x")
        assert train.coarse_names == train.fine_names
        assert train.coarse.tolist() == train.fine.tolist()

    def test_parents_are_coarse_where_every_class_has_one(self, tmp_path: Path) -> None:
        for number, name in enumerate(["fruit/apple/fuji", "fruit/apple/gala", "drinks/milk"]):
            photo(tmp_path / name / "1.jpg", number)
        train = read_dataset(tmp_path).train
        assert train.fine_names == ("drinks/milk", "fruit/apple/fuji", "fruit/apple/gala")
        assert [train.coarse_names[label] for label in train.coarse] == [
            "drinks",
            "fruit/apple",
            "fruit/apple",
        ]

    def test_a_folder_around_all_classes_is_no_coarse_label(self, tmp_path: Path) -> None:
        for split in ("train", "val"):
            folders(tmp_path / split / "products", classes=2)
        train = read_dataset(tmp_path).train
        assert train.fine_names == ("products/class 0", "products/class 1")
        assert not train.has_coarse

    def test_top_folders_can_be_the_splits(self, tmp_path: Path) -> None:
        for split in ("train", "test"):
            folders(tmp_path / split, classes=2)
        (tmp_path / "README").touch()
        dataset = read_dataset(tmp_path)
        assert sizes(dataset) == {"train": 10, "test": 10}
        assert (dataset.made, dataset.val) == ("as in the folders train and test", None)
        assert dataset.train.fine_names == ("class 0", "class 1")

    @pytest.mark.parametrize(("train", "other"), SPELLINGS)
    def test_splits_by_any_name_whatever_lies_beside_them(
        self, tmp_path: Path, train: str, other: str
    ) -> None:
        for name in (train, other):
            folders(tmp_path / name, classes=2)
        for name in (
            "samples/logo.jpg",
            "samples/more/logo.jpg",
            "README images/1.png",
            "__MACOSX/train/class 0/1.png",
        ):
            photo(tmp_path / name, 99)
        photo(tmp_path / other / "of no class.png", 99)
        dataset = read_dataset(tmp_path)
        assert sizes(dataset) == {"train": 10, SPLIT_NAMES[other.lower()]: 10}
        assert dataset.made == f"as in the folders {train} and {other}"
        assert dataset.train.fine_names == ("class 0", "class 1")
        assert [str(path.relative_to(tmp_path)) for path in dataset.ignored] == sorted(
            ["README images", "__MACOSX", "samples", f"{other}/of no class.png"]
        )

    @pytest.mark.parametrize(
        ("places", "reason"),
        [
            (["train/a", "val/a", "valid/a"], "val and valid are both the val split; merge them"),
            (["train/a", "Train/b", "test/a"], "Train and train are both the train split"),
            (
                ["train/a", "train/b", "samples"],
                "train looks like a split, but beside it are other folders",
            ),
            (
                ["a", "b", "Test/a", "Test/b"],
                "Test looks like a split, but beside it are other folders and no other",
            ),
            (["a", "b", "validation"], "validation looks like a split"),
            (["val/a", "val/b"], "train holds no photo in a folder of its class"),
            (["test/a", "valid/b"], "train holds no photo in a folder of its class"),
            (
                ["photos/train/a", "photos/valid/a"],
                "photos holds train and valid, which look like splits, but not at the top",
            ),
            (
                ["a/train", "a/dev", "b/train", "b/dev"],
                "a holds dev and train, which look like splits, but not at the top",
            ),
        ],
    )  # fmt: skip
    def test_refuses_what_may_be_splits_or_classes(
        self, tmp_path: Path, places: list[str], reason: str
    ) -> None:
        for number, place in enumerate(places):
            folders(tmp_path / place, classes=1, photos=2) if "/" in place else photo(
                tmp_path / place / "1.png", number
            )
        for place in places:
            photo(tmp_path / place / "1.png", 99)
        with pytest.raises(DataError, match=reason):
            read_dataset(tmp_path)

    @pytest.mark.parametrize("name", ["train", "Training"])
    def test_a_class_may_be_called_train(self, tmp_path: Path, name: str) -> None:
        for number, path in enumerate(
            [f"{name}/1.png", "bus/1.png", "car/1.png", "bus/train/1.png"]
        ):
            photo(tmp_path / path, number)
        assert set(read_dataset(tmp_path).train.fine_names) == {name, "bus", "car", "bus/train"}

    def test_a_label_in_either_unicode_form_is_one_class(self, tmp_path: Path) -> None:
        for number, name in enumerate([NFC, NFD, f"{NFD} ", "other", "a  b", "a b"]):
            photo(tmp_path / "train" / name / "1.png", number)
        train = read_dataset(tmp_path).train
        assert train.fine_names == (NFC, "a b", "other")
        assert sorted(train.fine.tolist()) == [0, 0, 0, 1, 1, 2]

    @pytest.mark.parametrize(
        "name", ["@eaDir", "__MACOSX", "lost+found", "#recycle", "$RECYCLE.BIN", ".hidden"]
    )
    def test_does_not_look_into_what_systems_keep(self, tmp_path: Path, name: str) -> None:
        folders(tmp_path, classes=2)
        photo(tmp_path / name / "IMG_1.jpg/SYNOPHOTO_THUMB_M.jpg")
        photo(tmp_path / "class 0" / name / "IMG_1.jpg")
        dataset = read_dataset(tmp_path)
        assert sum(sizes(dataset).values()) == 10
        assert set(dataset.ignored) == {tmp_path / name, tmp_path / "class 0" / name}

    def test_ignores_what_is_no_photo(self, tmp_path: Path) -> None:
        folders(tmp_path, classes=2)
        photo(tmp_path / "of no class.png")
        photo(tmp_path / ".hidden/1.png")
        photo(tmp_path / "class 0/._1.png")
        for name in (".DS_Store", "._1.heic", "notes.txt"):
            (tmp_path / "class 0" / name).touch()
        os.mkfifo(tmp_path / "class 0/pipe.png")
        dataset = read_dataset(tmp_path)
        assert sum(sizes(dataset).values()) == 10
        assert {path.name for path in dataset.ignored} == {
            "of no class.png", ".hidden", "._1.png", ".DS_Store", "._1.heic", "notes.txt",
            "pipe.png"
        }  # fmt: skip

    def test_photos_that_it_cannot_decode_are_counted_apart(self, tmp_path: Path) -> None:
        """So is one behind a link that leads nowhere: a disk may be missing."""
        folders(tmp_path / "root", classes=2)
        for name in ("1.heic", "2.HEIC", "3.gif", "4.dng", "._5.heic", "6.txt"):
            (tmp_path / "root/class 0" / name).touch()
        (tmp_path / "root/class 0/dangling.png").symlink_to("nowhere")
        dataset, _, findings = decode_dataset(
            read_dataset(tmp_path / "root"), PREPROCESSING, tmp_path / "cache"
        )
        assert sum(sizes(dataset).values()) == 10
        lines = "\n".join(findings.lines())
        assert "Left out 4 photos, since training reads .jpg, " in lines
        assert "2 .heic such as" in lines.splitlines()[0]
        assert "6.txt" not in lines.splitlines()[0]
        assert "dangling.png (No such file or directory)" in lines

    def test_says_what_a_folder_holds_instead(self, tmp_path: Path) -> None:
        for name in ("1.heic", "2.heic"):
            (tmp_path / "class").mkdir(exist_ok=True)
            (tmp_path / "class" / name).touch()
        with pytest.raises(DataError, match=r"Not read: 2 \.heic such as .*1\.heic"):
            read_dataset(tmp_path)

    def test_follows_symlinks_but_not_in_circles(self, tmp_path: Path) -> None:
        folders(tmp_path / "elsewhere", classes=2)
        root = tmp_path / "root"
        folders(root, classes=1)
        (root / "linked").symlink_to(tmp_path / "elsewhere")
        (root / "class 0/up").symlink_to(root)
        (root / "alias").symlink_to(root / "class 0")
        assert read_dataset(root).train.fine_names == (
            "class 0",
            "linked/class 0",
            "linked/class 1",
        )

    def test_refuses_a_folder_that_it_cannot_read(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def walk(
            _root: Path, followlinks: bool, onerror: Callable[[OSError], None]
        ) -> list[object]:
            assert followlinks
            onerror(PermissionError(errno.EACCES, "Permission denied", "secret"))
            return []

        monkeypatch.setattr(os, "walk", walk)
        with pytest.raises(DataError, match="secret: Permission denied"):
            read_dataset(tmp_path)

    @pytest.mark.parametrize("name", ["nothing", "nothing.csv", "file.txt"])
    def test_refuses_what_is_no_source(self, tmp_path: Path, name: str) -> None:
        (tmp_path / "file.txt").touch()
        with pytest.raises(DataError, match="neither a folder nor a"):
            read_dataset(tmp_path / name)

    def test_refuses_an_empty_folder(self, tmp_path: Path) -> None:
        photo(tmp_path / "1.png")
        with pytest.raises(DataError, match="holds no photo in a folder of its class"):
            read_dataset(tmp_path)
        photo(tmp_path / "train/1.png")
        folders(tmp_path / "val")
        with pytest.raises(DataError, match="train holds no photo in a folder of its class"):
            read_dataset(tmp_path)


class TestReadTable:
    def test_reads_what_spreadsheets_write(self, tmp_path: Path) -> None:
        root = folders(tmp_path / "photos, ü")
        path = root / "class 1/0.png"
        rows = (
            '"photos, ü/class 0/0.png","a, b", Obst,train\r\n'
            f'"{path.absolute()}",c,Saft ,val\r\n,,,\r\n'
        )
        dataset = read_dataset(table(tmp_path, "\ufeffpath,label,coarse,split\r\n" + rows))
        assert sizes(dataset) == {"train": 1, "val": 1}
        assert dataset.train.fine_names == ("a, b", "c")
        assert dataset.train.coarse_names == ("Obst", "Saft")
        assert dataset.made == "as the column split of photos.csv says"

    def test_reads_tabs(self, tmp_path: Path) -> None:
        rows = "".join(
            f"{path}\t{path.parent.name}\n" for path in sorted(folders(tmp_path).rglob("*.png"))
        )
        dataset = read_dataset(table(tmp_path, "path\tlabel\n" + rows, "photos.tsv"))
        assert sizes(dataset) == {"train": 30}
        assert dataset.train.coarse_names == dataset.train.fine_names

    @pytest.mark.parametrize(
        ("text", "reason"),
        [
            (
                "path|label\na.png|x\n",
                r"csv:1: the header must name the column 'path'; it names path\|label",
            ),
            ("", "csv:1: the header .* it names none"),
            ("path,label,label\n", "csv:1: two columns are called 'label'"),
            ("path,label\na.png,x\n\na.png,\n", "csv:4: no label"),
            ("path,label,split\na.png,x,\n", "csv:2: no split; fill the cell, or drop the column"),
            ("path,label,split\na.png,x,holdout\n", "csv:2: the split is 'holdout'"),
            (
                "path,label,split\na.png,x,train\na.png,y,val\na.png,y,Valid\n",
                "csv:4: the split is 'valid', which is 'val' above",
            ),
            (
                "path,label,subset\na.png,x,train\na.png,y,Valid\n",
                "csv:1: the column 'subset' holds splits; call it split",
            ),
            (
                "path,label,split,Split\na.png,x,train,train\n",
                "csv:1: two columns are called 'split'",
            ),
            ("path,label,split\na.png,x,val\n", "no train photo"),
            ("path,label\na.png,x,y\n", "csv:2: 3 cells in 2 columns"),
            ('path,label\n"a.png,x\n', "csv:2: unexpected end of data"),
            ('path,label\n"a.png",x\n"b\nc.png"",y\na.png,x\n', "csv:3: "),
            ('path,label\na.png,"x\ny"\na.png,\n', "csv:4: no label"),
            ("path,label\nb.png,x\n", "csv:2: no photo at"),
            (f"path,label\n{'b' * 5000}.png,x\n", "csv:2: no photo at"),
            ("path,label\na.png,x\na.png,ä\n".encode("latin-1"), "csv:3: this is not UTF-8 text"),
            ("path,label\ra.png,x\ra.png,ä\r".encode("latin-1"), "csv:3: this is not UTF-8 text"),
            ("path,label\ra.png,x\r\ra.png,\r", "csv:4: no label"),
            pytest.param(f"path,{'x' * 200_000}\n", "csv:1: field larger than", id="long name"),
            pytest.param(f"path,label\na,{'x' * 200_000}\n", "csv:2: field larger", id="long cell"),
            ("path,label\na.png,x\n".encode("utf-16"), "csv:1: this is not UTF-8 text"),
            ("path,label\na.png,x\n".encode("utf-16-le"), "csv:1: this is not UTF-8 text"),
        ],
    )
    def test_names_the_bad_line(self, tmp_path: Path, text: str | bytes, reason: str) -> None:
        photo(tmp_path / "a.png")
        with pytest.raises(DataError, match=reason):
            read_dataset(table(tmp_path, text))

    @pytest.mark.parametrize(("train", "other"), SPELLINGS)
    def test_splits_by_any_name(self, tmp_path: Path, train: str, other: str) -> None:
        photo(tmp_path / "a.png")
        header, row = "Path,Label,Split,subset\n", "a.png,x,{},\n"
        text = header + "".join(map(row.format, (train, f" {other} ", other.upper())))
        assert sizes(read_dataset(table(tmp_path, text))) == {
            "train": 1,
            SPLIT_NAMES[other.lower()]: 2,
        }

    def test_a_label_in_either_unicode_form_is_one_class(self, tmp_path: Path) -> None:
        photo(tmp_path / "a.png")
        rows = f"a.png,{NFC},a  b\na.png,{NFD},a b\na.png,other,{NFD}\n"
        train = read_dataset(
            table(tmp_path, "path,label,coarse,split\n" + rows.replace("\n", ",train\n"))
        ).train
        assert (train.fine_names, train.coarse_names) == ((NFC, "other"), (NFC, "a b"))


@pytest.mark.parametrize(("written", "on_disk"), [(NFC, NFD), (NFD, NFC)])
def test_listed_paths_are_found_in_either_unicode_form(
    tmp_path: Path, written: str, on_disk: str
) -> None:
    paths = [photo(tmp_path / f"{on_disk}/{on_disk} {number}.png", number) for number in range(2)]
    listing = "".join(f"{written}/{written} {number}.png, {number}, 0\n" for number in range(2))
    lists = read_dataset(table(tmp_path, listing, "train.txt").parent)
    rows = "".join(f"{written}/{written} {number}.png,{number},train\n" for number in range(2))
    of_table = read_dataset(table(tmp_path, f"path,label,split\n{rows}"))
    assert lists.train.paths == of_table.train.paths == tuple(paths)
    with pytest.raises(DataError, match="no photo at"):
        read_dataset(table(tmp_path, f"path,label\n{written}/nothing.png,x\n"))


def test_names_in_classes_csv_are_compared_in_one_unicode_form(listed: Path) -> None:
    header = "Class ID (int),Class Name (str),Coarse Class ID (int),Coarse Class Name (str)\n"
    table(listed, f"{header}0,{NFC},0,{NFD}\n1,{NFD},1,{NFC}\n", "classes.csv")
    train = read_dataset(listed).train
    assert train.fine_names[:2] == (f"{NFC} (0)", f"{NFC} (1)")
    assert train.coarse_names[:2] == (f"{NFC} (0)", f"{NFC} (1)")


def test_the_summary_counts_what_was_passed_over() -> None:
    paths = [
        Path(name)
        for name in (
            "a/1.heic",
            "a/2.HEIC",
            "a/.x",
            "a/.y.png",
            "a/.z",
            "@eaDir",
            "README",
            "1.a",
            "1.b",
            "1.c",
        )
    ]
    assert (
        summary(paths)
        == "3 hidden such as a/.x, 2 .heic such as a/1.heic, @eaDir, README, 1.a and 2 more kinds"
    )


def test_suffixes_of_photos_stand_in_one_place() -> None:
    """The client has more, which it converts; see test_the_client_reads_the_same_files."""
    sources = [
        path
        for folder in ("src", "model/api", "benchmarks", "scripts")
        for path in (ROOT / folder).rglob("*.py")
        if path != ROOT / "model/api/client/photos.py"
    ]
    nodes = [node for path in sources for node in ast.walk(ast.parse(path.read_text()))]
    literals = [node.elts for node in nodes if isinstance(node, ast.Tuple | ast.List | ast.Set)]
    found = [
        [element.value for element in literal if isinstance(element, ast.Constant)]
        for literal in literals
    ]
    suffixes = [values for values in found if ".webp" in values or ".png" in values]
    assert suffixes == [[*SUFFIXES]]


def test_the_client_reads_the_same_files(tmp_path: Path) -> None:
    """The client stands alone, so that it walks by code of its own."""
    assert client_photos.SYSTEM_FOLDERS == SYSTEM_FOLDERS
    assert {*SUFFIXES, *OTHER_SUFFIXES} == client_photos.SUFFIXES | client_photos.OTHER_SUFFIXES
    root, elsewhere = tmp_path / "root", folders(tmp_path / "elsewhere", classes=1, photos=2)
    for name in ("a/1.JPG", "a/2.heic", "a/3.dng", "a/4.txt", "a/._5.jpg", "a/.DS_Store", "a/6"):
        photo(root / name)
    for name in ("@eaDir/1.jpg", ".hidden/1.jpg", "b/__MACOSX/1.jpg", "b/1.gif", "a.jpg/1.jpg"):
        photo(root / name)
    for name, target in {
        "linked": elsewhere, "again": elsewhere, "circle": root, "alias": root / "a",
        "a/7.png": Path("nowhere"), "a/8.png": Path("8.png"), "a/gone": Path("nowhere"),
        "a/9.png": root / "a/1.JPG",
    }.items():  # fmt: skip
        (root / name).symlink_to(target)
    os.mkfifo(root / "a/pipe.png")
    found = find_photos(root)
    assert sorted(client_photos.photos_in([root])) == sorted(found.photos + found.others)
    assert [path.relative_to(root) for path in found.others] == [
        Path("a/2.heic"), Path("a/3.dng"), Path("b/1.gif")
    ]  # fmt: skip
    names = ["a.jpg/1.jpg", "a/1.JPG", "a/7.png", "a/8.png", "a/9.png"]
    names += [f"again/class 0/{number}.png" for number in range(2)]
    assert sorted(str(path.relative_to(root)) for path in found.photos) == names


def divided(root: Path, **options: Any) -> Dataset:
    return hold_out_val(read_dataset(root), HoldOut(**options))


def contents(dataset: Dataset, split: str) -> set[tuple[str, bytes]]:
    return {(path.parent.name, path.read_bytes()) for path in dataset.splits[split].paths}


class TestSplit:
    def test_by_photo_takes_a_share_of_each_class(self, tmp_path: Path) -> None:
        root = folders(tmp_path, classes=2, photos=20)
        for number in range(2):
            photo(root / "pair" / f"{number}.png", 900 + number)
        dataset = divided(root, val_share=0.2, seed=3)
        assert dataset.val is not None
        assert np.bincount(dataset.train.fine).tolist() == [16, 16, 2]
        assert np.bincount(dataset.val.fine).tolist() == [4, 4]
        assert dataset.made == (
            "split by photo, seed 3: 0.2 of each class's photos are val, at least one of each class"
            " with three"
        )
        assert not set(dataset.train.paths) & set(dataset.val.paths)

    def test_by_class_takes_whole_classes_that_have_pairs(self, tmp_path: Path) -> None:
        """A query without another photo of its class is a miss, whatever the network does."""
        for number in range(40):
            photo(tmp_path / "root" / f"lone {number}" / "1.png", 9_000 + number)
        dataset = divided(folders(tmp_path / "root"), split_by="class")
        assert dataset.val is not None
        assert len(set(dataset.val.fine)) == 2
        assert not set(dataset.train.fine) & set(dataset.val.fine)
        assert np.bincount(dataset.val.fine).max() == len(dataset.val) // 2 == 5
        assert dataset.made == (
            "split by class, seed 0: 2 of 6 classes with two photos or more are val"
        )

    def test_a_large_share_leaves_pairs_in_train(self, tmp_path: Path) -> None:
        root = folders(tmp_path, classes=4)
        assert np.bincount(divided(root, val_share=0.99).train.fine).tolist() == [2, 2, 2, 2]
        assert len(set(divided(root, val_share=0.99, split_by="class").train.fine)) == 2

    def test_is_a_function_of_the_seed(self, tmp_path: Path) -> None:
        root = folders(tmp_path)
        first, again, other = (divided(root, seed=seed).train.paths for seed in (0, 0, 1))
        assert first == again != other

    @pytest.mark.parametrize(("split_by", "most"), [("photo", 1), ("class", 10)])
    def test_what_is_added_moves_few_photos(self, split_by: str, most: int, tmp_path: Path) -> None:
        """A network that was trained before can be compared on val with one trained after."""
        root = folders(tmp_path, classes=20, photos=10)
        before = divided(root, split_by=split_by)
        for number in range(10):
            photo(root / "a class" / f"{number}.png", 9_000 + number)
        for number in range(5):
            photo(root / "class 10" / f"a {number}.png", 9_100 + number)
        after = divided(root, split_by=split_by)
        assert len(contents(after, "val") & contents(before, "train")) <= most
        if split_by == "photo":
            others = contents(after, "val") ^ contents(before, "val")
            assert {label for label, _ in others} == {"a class", "class 10"}

    def test_names_do_not_decide(self, tmp_path: Path) -> None:
        root = folders(tmp_path)
        before = contents(divided(root), "val")
        for path in root.rglob("*.png"):
            path.rename(path.with_name(f"{9 - int(path.stem)} renamed.png"))
        assert contents(divided(root), "val") == before

    def test_refuses_too_few_classes(self, tmp_path: Path) -> None:
        photo(tmp_path / "lone" / "1.png", 9_000)
        with pytest.raises(
            DataError, match=r"by class needs at least 4 classes .*, found 3: class 0, class 1"
        ):
            divided(folders(tmp_path, classes=3), split_by="class")
        with pytest.raises(DataError, match="share of val is 1"):
            divided(tmp_path, val_share=1)

    def test_says_that_no_class_has_a_photo_to_spare(self, tmp_path: Path) -> None:
        dataset = divided(folders(tmp_path, photos=2))
        assert (dataset.val, dataset.made) == (None, "no photo is val, since no class has three")


class TestFingerprint:
    def test_changes_with_a_label_a_split_and_a_photo(self, listed: Path) -> None:
        dataset = read_dataset(listed)
        train = dataset.train
        names = dataclasses.replace(train, fine_names=("other", *train.fine_names[1:]))
        swapped = {"train": dataset.splits["val"], "val": train}
        seen = {
            dataset.fingerprint(),
            Dataset({"train": names}, "").fingerprint(),
            Dataset(swapped, "").fingerprint(),
        }
        photo(train.paths[0])
        assert len(seen | {dataset.fingerprint()}) == 4

    def test_does_not_change_with_the_place(self, listed: Path, tmp_path: Path) -> None:
        there = read_dataset(listed).fingerprint()
        assert read_dataset(Path(shutil.move(listed, tmp_path / "moved"))).fingerprint() == there
