from __future__ import annotations

import dataclasses
import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import folders, photo, sizes, table

from npair.data import DataError, Dataset, read_dataset


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
        assert train.fine_names == ("Äpfel", "same (1)", "same (2)", "product-3", "product-4", "product-5")
        assert train.coarse_names == ("Obst", "Saft", "2")
        table(listed, "Class Name (str)\napple\n", "classes.csv")
        with pytest.raises(DataError, match=r"classes.csv:1: the header must name the column 'Class ID \(int\)'"):
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
        ],
    )
    def test_names_the_bad_line(self, tmp_path: Path, listing: str | bytes, reason: str) -> None:
        (tmp_path / "a.jpg").touch()
        table(tmp_path, listing, "train.txt")
        with pytest.raises(DataError, match=reason):
            read_dataset(tmp_path)

    def test_missing_list(self, listed: Path) -> None:
        (listed / "train.txt").unlink()
        with pytest.raises(DataError, match=r"train.txt is missing"):
            read_dataset(listed)


class TestReadFolders:
    def test_each_folder_with_photos_is_a_class(self, tmp_path: Path) -> None:
        for number, name in enumerate(["fruit/apple/fuji, ü/a.JPG", "fruit/apple/b.jpeg", "fruit/c.webp", "x\n/d.png"]):
            photo(tmp_path / name, number)
        train = read_dataset(tmp_path).train
        assert train.fine_names == ("fruit", "fruit/apple", "fruit/apple/fuji, ü", "x\n")
        assert train.coarse_names == train.fine_names
        assert train.coarse.tolist() == train.fine.tolist()

    def test_parents_are_coarse_where_every_class_has_one(self, tmp_path: Path) -> None:
        for number, name in enumerate(["fruit/apple/fuji", "fruit/apple/gala", "drinks/milk"]):
            photo(tmp_path / name / "1.jpg", number)
        train = read_dataset(tmp_path).train
        assert train.fine_names == ("drinks/milk", "fruit/apple/fuji", "fruit/apple/gala")
        assert [train.coarse_names[label] for label in train.coarse] == ["drinks", "fruit/apple", "fruit/apple"]

    def test_top_folders_can_be_the_splits(self, tmp_path: Path) -> None:
        for split in ("train", "test"):
            folders(tmp_path / split, classes=2)
        (tmp_path / "README").touch()
        dataset = read_dataset(tmp_path)
        assert sizes(dataset) == {"train": 10, "test": 10}
        assert (dataset.made, dataset.val) == ("as in the folders train and test", None)
        assert dataset.train.fine_names == ("class 0", "class 1")
        photo(tmp_path / "more/1.png")
        assert "train/class 0" in read_dataset(tmp_path).train.fine_names

    def test_ignores_what_is_no_photo(self, tmp_path: Path) -> None:
        folders(tmp_path, classes=2)
        photo(tmp_path / "of no class.png")
        photo(tmp_path / ".hidden/1.png")
        photo(tmp_path / "class 0/._1.png")
        (tmp_path / "class 0/notes.txt").touch()
        (tmp_path / "class 0/dangling.png").symlink_to("nowhere")
        os.mkfifo(tmp_path / "class 0/pipe.png")
        dataset = read_dataset(tmp_path)
        assert sum(sizes(dataset).values()) == 10
        assert {path.name for path in dataset.ignored} == {
            "of no class.png", ".hidden", "._1.png", "notes.txt", "dangling.png", "pipe.png"
        }  # fmt: skip

    def test_follows_symlinks_but_not_in_circles(self, tmp_path: Path) -> None:
        folders(tmp_path / "elsewhere", classes=2)
        root = tmp_path / "root"
        folders(root, classes=1)
        (root / "linked").symlink_to(tmp_path / "elsewhere")
        (root / "class 0/up").symlink_to(root)
        (root / "alias").symlink_to(root / "class 0")
        assert read_dataset(root).train.fine_names == ("class 0", "linked/class 0", "linked/class 1")

    def test_refuses_a_folder_that_it_cannot_read(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def walk(_root: Path, followlinks: bool, onerror: Callable[[OSError], None]) -> list[object]:
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
        rows = f'"photos, ü/class 0/0.png","a, b", Obst,train\r\n"{path.absolute()}",c,Obst ,val\r\n,,,\r\n'
        dataset = read_dataset(table(tmp_path, "\ufeffpath,label,coarse,split\r\n" + rows))
        assert sizes(dataset) == {"train": 1, "val": 1}
        assert dataset.train.fine_names == ("a, b", "c")
        assert dataset.train.coarse_names == ("Obst",)
        assert dataset.made == "as the column split of photos.csv says"

    def test_reads_tabs_and_splits_what_is_not_split(self, tmp_path: Path) -> None:
        rows = "".join(f"{path}\t{path.parent.name}\n" for path in sorted(folders(tmp_path).rglob("*.png")))
        dataset = read_dataset(table(tmp_path, "path\tlabel\n" + rows, "photos.tsv"))
        assert sizes(dataset) == {"train": 24, "val": 6}
        assert dataset.train.coarse_names == dataset.train.fine_names

    @pytest.mark.parametrize(
        ("text", "reason"),
        [
            ("path;label\na.png;x\n", "csv:1: the header must name the column 'path' once; it names path;label"),
            ("", "csv:1: the header .* it names none"),
            ("path,label,label\n", "csv:1: the header must name the column 'label' once"),
            ("path,label\na.png,x\n\na.png,\n", "csv:4: no label"),
            ("path,label,split\na.png,x,\n", "csv:2: no split; fill the cell, or drop the column"),
            ("path,label,split\na.png,x,dev\n", "csv:2: the split is 'dev'"),
            ("path,label,split\na.png,x,val\n", "no train photo"),
            ("path,label\na.png,x,y\n", "csv:2: 3 cells in 2 columns"),
            ('path,label\n"a.png,x\n', "csv:2: unexpected end of data"),
            ("path,label\nb.png,x\n", "csv:2: no photo at"),
            (f"path,label\n{'b' * 5000}.png,x\n", "csv:2: no photo at"),
            ("path,label\na.png,ä\n".encode("latin-1"), "not UTF-8"),
            ("path,label\na.png,x\n".encode("utf-16"), "not UTF-8"),
        ],
    )
    def test_names_the_bad_line(self, tmp_path: Path, text: str | bytes, reason: str) -> None:
        photo(tmp_path / "a.png")
        with pytest.raises(DataError, match=reason):
            read_dataset(table(tmp_path, text))


class TestSplit:
    def test_by_photo_takes_a_share_of_each_class(self, tmp_path: Path) -> None:
        root = folders(tmp_path, classes=2, photos=20)
        for number in range(2):
            photo(root / "pair" / f"{number}.png", 900 + number)
        dataset = read_dataset(root, val_share=0.2, seed=3)
        assert dataset.val is not None
        assert np.bincount(dataset.train.fine).tolist() == [16, 16, 2]
        assert np.bincount(dataset.val.fine).tolist() == [4, 4]
        assert dataset.made == "split by photo, seed 3: 0.2 of each class's photos are val"
        assert not set(dataset.train.paths) & set(dataset.val.paths)

    def test_by_class_takes_whole_classes(self, tmp_path: Path) -> None:
        dataset = read_dataset(folders(tmp_path), split_by="class")
        assert dataset.val is not None
        assert len(set(dataset.val.fine)) == 2
        assert not set(dataset.train.fine) & set(dataset.val.fine)
        assert dataset.made == "split by class, seed 0: 2 of 6 classes are val"

    def test_a_large_share_leaves_pairs_in_train(self, tmp_path: Path) -> None:
        root = folders(tmp_path, classes=4)
        assert np.bincount(read_dataset(root, val_share=0.99).train.fine).tolist() == [2, 2, 2, 2]
        assert len(set(read_dataset(root, val_share=0.99, split_by="class").train.fine)) == 2

    def test_is_a_function_of_the_seed(self, tmp_path: Path) -> None:
        root = folders(tmp_path)
        first, again, other = (read_dataset(root, seed=seed).train.paths for seed in (0, 0, 1))
        assert first == again != other

    def test_refuses_too_few_classes(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="by class needs at least 4 classes, found 3: class 0"):
            read_dataset(folders(tmp_path, classes=3), split_by="class")
        with pytest.raises(DataError, match="by photo needs at least 2 classes, found 1"):
            read_dataset(folders(tmp_path / "class 0", classes=1))
        with pytest.raises(DataError, match="share of val is 1"):
            read_dataset(tmp_path, val_share=1)


class TestFingerprint:
    def test_changes_with_a_label_a_split_and_a_photo(self, listed: Path) -> None:
        dataset = read_dataset(listed)
        train = dataset.train
        names = dataclasses.replace(train, fine_names=("other", *train.fine_names[1:]))
        swapped = {"train": dataset.splits["val"], "val": train}
        seen = {dataset.fingerprint(), Dataset({"train": names}, "").fingerprint(), Dataset(swapped, "").fingerprint()}
        photo(train.paths[0])
        assert len(seen | {dataset.fingerprint()}) == 4

    def test_does_not_change_with_the_place(self, listed: Path, tmp_path: Path) -> None:
        there = read_dataset(listed).fingerprint()
        assert read_dataset(Path(shutil.move(listed, tmp_path / "moved"))).fingerprint() == there
