from __future__ import annotations

import dataclasses
import resource
import shutil
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image
from support.photos import PNG, folders, photo, sizes, with_much_text

import npair.data.dataset
from npair.data import pixels
from npair.data.dataset import DataError, HoldOut, hold_out_val
from npair.data.files import LIMITS, digest_of
from npair.data.folds import write_folds
from npair.data.pixels import PREVIEW, decode_dataset, decode_photos, default_cache
from npair.data.sources import read_dataset
from npair.publishing.drawings import draw, encode
from npair.serving import code_of
from npair.serving.preprocess import Limits, Preprocessing, decode

SMALL = Preprocessing(size=16, resample="BILINEAR", background=255)


def test_the_decoders_code_is_what_decoding_imports() -> None:
    listing = "print(*(name for name in sys.modules if name.startswith('npair.serving.')))"
    command = [sys.executable, "-c", f"import sys, npair.serving.preprocess; {listing}"]
    imported = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    files = code_of("preprocess")
    assert {f"npair.serving.{file.stem}" for file in files} == set(imported)
    assert len(files) == len(imported)


class TestDecodeDataset:
    def test_pixels_are_what_serving_decodes(self, listed: Path, tmp_path: Path) -> None:
        dataset, pixels, findings = decode_dataset(read_dataset(listed), SMALL, tmp_path / "cache")
        assert dataset.val is not None
        assert pixels.array.shape == (36, 16, 16, 3)
        assert pixels.array.dtype == np.uint8
        for path, row in zip(dataset.val.paths, pixels.of(dataset.val), strict=True):
            np.testing.assert_array_equal(
                pixels.array[row], decode(path.read_bytes(), SMALL, LIMITS)
            )
        assert len(findings.lines()) == 1
        assert "tiny, 6 classes with 4 train photos" in findings.lines()[0]

    @pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA", "I;16"])
    def test_takes_every_kind_of_png(self, listed: Path, tmp_path: Path, mode: str) -> None:
        image = (
            Image.fromarray(np.full((9, 9), 40_000, np.uint16))
            if mode == "I;16"
            else draw(1, 1, 9).convert(mode)
        )
        path = listed / "train/product-1/0.jpg"
        path.write_bytes(encode(image, "PNG"))
        assert (
            path in decode_dataset(read_dataset(listed), SMALL, tmp_path / "cache")[0].train.paths
        )

    def test_leaves_out_what_cannot_be_decoded(self, tmp_path: Path) -> None:
        root = folders(tmp_path / "root")
        for name, content in {"empty": b"", "text": b"text", "half": PNG[:60]}.items():
            (root / f"class 0/{name}.png").write_bytes(content)
        dataset = read_dataset(root)
        (root / "class 1/0.png").unlink()
        (root / "class 1/1.png").unlink()
        (root / "class 1/1.png").mkdir()
        for _ in range(2):  # first decoded, then read from the cache
            kept, pixels, findings = decode_dataset(dataset, SMALL, tmp_path / "cache")
            reasons = {path.name: reason for path, reason in findings.corrupt}
            assert reasons.keys() == {"empty.png", "text.png", "half.png", "0.png", "1.png"}
            assert (reasons["0.png"], reasons["1.png"]) == (
                "No such file or directory",
                "Is a directory",
            )
            assert sum(sizes(kept).values()) == len(pixels.rows) == 28
            assert "cannot be decoded" in findings.lines()[0]
        assert all(reasons.values())

    def test_deals_with_duplicates_of_every_kind(self, tmp_path: Path) -> None:
        for split, numbers in {"train": range(5), "val": range(5, 8), "test": range(8, 11)}.items():
            for number in numbers:
                for label in "ab":
                    photo(tmp_path / split / label / f"{number}.png", 100 * ord(label) + number)
        copy = shutil.copy(tmp_path / "train/a/0.png", tmp_path / "train/a/copy.png")
        leak = shutil.copy(tmp_path / "val/a/5.png", tmp_path / "train/a/leak.png")
        late = shutil.copy(tmp_path / "test/a/8.png", tmp_path / "val/a/late.png")
        wrong = shutil.copy(tmp_path / "val/b/6.png", tmp_path / "train/a/wrong.png")
        photo(tmp_path / "train/alone/1.png", 1)
        kept, _, findings = decode_dataset(read_dataset(tmp_path), SMALL, tmp_path / ".cache")
        assert findings.copies == (copy,)
        assert findings.leaks == (leak, late)
        assert findings.contradicting == ((wrong, tmp_path / "val/b/6.png"),)
        assert findings.lone == ("alone",)
        assert sizes(kept) == {"train": 11, "val": 5, "test": 6}
        assert (findings.classes, findings.median) == (3, 5)
        assert [path.name for path in findings.ignored] == []
        assert len(findings.lines()) == 5

    def test_a_copy_shows_the_same_however_it_is_written(self, tmp_path: Path) -> None:
        """It is one at every size that training and publishing decode at."""
        first, second, third = (
            photo(tmp_path / f"{place}.png", number)
            for number, place in enumerate(("train/a/1", "train/b/1", "val/a/2"))
        )
        for number in range(4):
            photo(tmp_path / f"train/{'ab'[number % 2]}/more {number}.png", 10 + number)
        copy = first.with_name("copy.webp")
        with Image.open(first) as image:
            copy.write_bytes(encode(image, "WEBP", lossless=True))
        leak = third.with_name("2.png").rename(tmp_path / "train/a/leak.png")
        third.write_bytes(with_much_text(leak.read_bytes()))
        wrong = second.with_name("wrong.png")
        wrong.write_bytes(with_much_text(first.read_bytes()))
        for size in (16, 48):
            preprocessing = dataclasses.replace(SMALL, size=size)
            dataset = read_dataset(tmp_path)
            kept, _, findings = decode_dataset(dataset, preprocessing, tmp_path / ".cache")
            assert findings.contradicting == ((first, copy, wrong),)
            assert (findings.copies, findings.leaks) == ((), (leak,))
            assert sizes(kept) == {"train": 5, "val": 1}

    def test_photos_of_one_colour_are_named(self, tmp_path: Path) -> None:
        """Such are white strokes on a transparent ground, which is laid over white."""
        root = folders(tmp_path / "root")
        for name, alpha in (("transparent", 0), ("strokes", 255)):
            image = Image.new("RGBA", (9, 9), (255, 255, 255, 0))
            image.putpixel((4, 4), (255, 255, 255, alpha))
            image.save(root / f"class 0/{name}.png")
        _, _, findings = decode_dataset(read_dataset(root), SMALL, tmp_path / "cache")
        assert {path.stem for path in findings.blank} == {"transparent", "strokes"}
        assert [path.stem for path in findings.copies] == ["transparent"]
        assert "Photos of one colour alone, which show nothing: " in "".join(findings.lines())

    def test_copies_do_not_decide_what_is_val(self, tmp_path: Path) -> None:
        """Nor do photos that cannot be read, if the data set has no splits."""
        root = folders(tmp_path / "once", photos=10)
        copied = Path(shutil.copytree(root, tmp_path / "copied"))
        for path in list(copied.rglob("*.png")):
            for copy in range(3):
                shutil.copy(path, path.with_name(f"{path.stem}-{copy}.png"))
            path.with_name(f"{path.stem}-corrupt.png").write_bytes(b"")
        once, again = (
            decode_dataset(read_dataset(folder), SMALL, tmp_path / "cache")[0]
            for folder in (root, copied)
        )
        assert sizes(once) == sizes(again) == {"train": 54, "val": 6}

    def test_names_the_first_few(self, tmp_path: Path) -> None:
        root = folders(tmp_path / "root")
        for number in range(7):
            (root / f"class 0/{number}\n.png").touch()
        findings = decode_dataset(read_dataset(root), SMALL, tmp_path / "cache")[2]
        assert findings.lines()[0].endswith(r"4\n.png' (the photo is empty (0 bytes)) and 2 more.")
        assert findings.lines()[0].isprintable()

    def test_refuses_fewer_than_two_classes(self, tmp_path: Path) -> None:
        root = folders(tmp_path / "root", classes=2, photos=2)
        (root / "class 0/0.png").write_bytes(b"")
        with pytest.raises(
            DataError, match=r"at least two classes .* 1 remained .*0.png \(the photo is empty"
        ):
            decode_dataset(read_dataset(root), SMALL, tmp_path / "cache")
        dataset = read_dataset(root)
        shutil.rmtree(root)
        with pytest.raises(DataError, match=r"0 remained"):
            decode_dataset(dataset, SMALL, tmp_path / "cache")


class TestCache:
    @pytest.fixture
    def decoded(self, monkeypatch: pytest.MonkeyPatch) -> list[int]:
        """Record the size in bytes of each decoded photo."""
        sizes: list[int] = []

        def counted(
            photo: bytes, preprocessing: Preprocessing, limits: Limits
        ) -> npt.NDArray[np.uint8]:
            sizes.append(len(photo))
            return decode(photo, preprocessing, limits)

        monkeypatch.setattr(pixels, "decode", counted)
        return sizes

    def test_serves_the_same_photos_however_split_and_named(
        self, tmp_path: Path, decoded: list[int]
    ) -> None:
        root = folders(tmp_path / "root")
        _, first, _ = decode_dataset(read_dataset(root), PREVIEW, tmp_path / "cache")
        (root / "class 0").rename(root / "renamed")
        dataset, second, _ = decode_dataset(
            read_dataset(root), PREVIEW, tmp_path / "cache", HoldOut("class", seed=1)
        )
        assert len(decoded) == 30
        np.testing.assert_array_equal(first.array, second.array)
        assert len(set(second.of(dataset.train))) == len(dataset.train)
        for table in write_folds(dataset, second, 3, ["train", "val"], tmp_path / "folds"):
            decode_dataset(read_dataset(table), PREVIEW, tmp_path / "cache")
        assert len(decoded) == 30

    def test_is_made_anew_for_other_photos_or_preprocessing(
        self, tmp_path: Path, decoded: list[int]
    ) -> None:
        root = folders(tmp_path / "root")
        decode_dataset(read_dataset(root), PREVIEW, tmp_path / "cache")
        decode_dataset(
            read_dataset(root), dataclasses.replace(PREVIEW, background=0), tmp_path / "cache"
        )
        photo(root / "class 0/0.png", 77_777)
        decode_dataset(read_dataset(root), PREVIEW, tmp_path / "cache")
        assert len(decoded) == 90

    @pytest.mark.parametrize("suffix", [".npy", ".json"])
    @pytest.mark.parametrize("damage", ["cut", "empty", "flipped", "garbage", "gone"])
    def test_is_made_anew_where_it_is_damaged(
        self, tmp_path: Path, decoded: list[int], suffix: str, damage: str
    ) -> None:
        root = folders(tmp_path / "root")
        (root / "class 0/0.png").write_bytes(b"corrupt")
        before = np.array(decode_dataset(read_dataset(root), PREVIEW, tmp_path / "cache")[1].array)
        (file,) = (tmp_path / "cache").glob(f"*{suffix}")
        content = file.read_bytes()
        file.unlink()
        if damage != "gone":
            flipped = content[:-20] + bytes([content[-20] ^ 1]) + content[-19:]
            file.write_bytes(
                {
                    "cut": content[:-9],
                    "empty": b"",
                    "flipped": flipped,
                    "garbage": b"\x93NUMPY garbage",
                }[damage]
            )
        decoded.clear()
        np.testing.assert_array_equal(
            decode_dataset(read_dataset(root), PREVIEW, tmp_path / "cache")[1].array, before
        )
        assert len(decoded) == 30

    def test_two_processes_may_write_at_once(self, tmp_path: Path) -> None:
        dataset = read_dataset(folders(tmp_path / "root"))
        with ProcessPoolExecutor(2) as pool:
            loads = [
                pool.submit(decode_dataset, dataset, PREVIEW, tmp_path / "cache") for _ in range(4)
            ]
            assert all(len(process.result()[1].array) == 30 for process in loads)
        assert len(list((tmp_path / "cache").iterdir())) == 2

    def test_a_full_disk_leaves_nothing_behind(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        dataset = read_dataset(folders(tmp_path / "root"))
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        try:
            with pytest.raises(
                DataError, match=r"cannot hold 1 MB of decoded photos \(File too large\); make room"
            ):
                decode_dataset(dataset, PREVIEW, tmp_path / "cache")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert not list((tmp_path / "cache").iterdir())
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
        with pytest.raises(DataError, match=r"No space left on device"):
            decode_dataset(dataset, PREVIEW, tmp_path / "cache")
        assert not list((tmp_path / "cache").iterdir())

    def test_refuses_a_cache_that_is_no_folder(self, tmp_path: Path) -> None:
        (tmp_path / "cache").touch()
        with pytest.raises(DataError, match=r"cache cannot hold .* \(File exists\)"):
            decode_dataset(read_dataset(folders(tmp_path / "root")), PREVIEW, tmp_path / "cache")

    def test_refuses_a_photo_that_changes_meanwhile(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        dataset = read_dataset(folders(tmp_path / "root"))
        monkeypatch.setattr(npair.data.dataset, "digest_of", lambda path: "0" * 63 + path.name[0])
        with pytest.raises(DataError, match=r"png changed while it was read"):
            decode_dataset(dataset, PREVIEW, tmp_path / "cache")

    def test_hashes_each_photo_once(
        self, tmp_path: Path, decoded: list[int], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        hashed: list[Path] = []

        def counted(path: Path) -> str:
            hashed.append(path)
            return digest_of(path)

        monkeypatch.setattr(npair.data.dataset, "digest_of", counted)
        read = read_dataset(folders(tmp_path / "root"))
        dataset, _, _ = decode_dataset(read, PREVIEW, tmp_path / "cache")
        decode_dataset(dataset, dataclasses.replace(PREVIEW, size=8), tmp_path / "cache")
        dataset.fingerprint()
        assert len(decoded) == 60
        assert sorted(hashed) == sorted(read.train.paths)
        assert dataset.fingerprint() == hold_out_val(read, HoldOut()).fingerprint()

    def test_is_made_anew_for_another_decoder(
        self, tmp_path: Path, decoded: list[int], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        dataset = read_dataset(folders(tmp_path / "root"))
        decode_dataset(dataset, PREVIEW, tmp_path / "cache")
        monkeypatch.setattr(pixels, "code_of", lambda _: [Path(__file__)])
        decode_dataset(dataset, PREVIEW, tmp_path / "cache")
        assert len(decoded) == 60

    def test_lies_where_the_user_keeps_caches(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        assert default_cache() == tmp_path / "npair"
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setenv("HOME", str(tmp_path))
        assert default_cache() == tmp_path / ".cache/npair"

    def test_hundreds_of_classes(self, tmp_path: Path) -> None:
        dataset, pixels, findings = decode_dataset(
            read_dataset(folders(tmp_path / "root", 900, 6)), PREVIEW, tmp_path / "cache"
        )
        assert sizes(dataset) == {"train": 4_500, "val": 900}
        assert len(pixels.array) == 5_400
        assert not findings.lines()


class TestDecodePhotos:
    def test_is_what_serving_decodes(self, listed: Path) -> None:
        paths = read_dataset(listed).train.paths
        np.testing.assert_array_equal(
            decode_photos(paths, SMALL)[3], decode(paths[3].read_bytes(), SMALL, LIMITS)
        )

    def test_names_the_bad_file(self, listed: Path, tmp_path: Path) -> None:
        (tmp_path / "bad.jpg").write_bytes(b"text")
        with pytest.raises(DataError, match=r"bad.jpg: text, not a JPEG"):
            decode_photos([*read_dataset(listed).train.paths, tmp_path / "bad.jpg"], SMALL)
