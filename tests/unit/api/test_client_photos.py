"""Convert photos of other formats; compare the pixels that the network takes."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import sysconfig
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pillow_heif
import pytest
from PIL import Image
from support import profiles
from support.models import ROOT, SHIPPED

from npair.client.formats import MAX_BYTES, MAX_PIXELS, SENT_PIXELS, encoded_photo
from npair.client.photos import Unread, photos_in
from npair.data.sources import find_photos
from npair.serving.preprocess import Limits, Preprocessing, decode

pillow_heif.register_heif_opener()
LIMITS = Limits(max_bytes=20_000_000, max_pixels=MAX_PIXELS)
PHOTO = Image.open(SHIPPED / "golden/photo.jpg").convert("RGB").resize((120, 96))
PHOTO.info.clear()
GREY = PHOTO.convert("L")
# Mean differences, in steps of 255, that the encoders of these formats cause.
LOSSES = {"HEIF": 3, "AVIF": 3, "TIFF": 0.5}
# Pictures that neither we nor Pillow wrote, one in several formats.
FOREIGN = Path(sysconfig.get_path("stdlib"), "test/imghdrdata")


def seen(photo: bytes) -> npt.NDArray[np.int64]:
    white = Preprocessing(size=64, resample="BILINEAR", background=255)
    return decode(photo, white, LIMITS).astype(int)


def written(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    lossy = {"quality": 95} if kind in ("HEIF", "AVIF") else {}
    image.save(file, kind, **lossy | options)
    return file.getvalue()


def converted(image: Image.Image, kind: str, **options: Any) -> bytes:
    return encoded_photo(io.BytesIO(written(image, kind, **options)))


def difference(one: bytes, two: bytes) -> float:
    return float(np.abs(seen(one) - seen(two)).mean())


def turned() -> dict[str, Any]:
    exif = Image.Exif()
    exif[0x0112] = 6
    return {"exif": exif.tobytes()}


def transparent() -> Image.Image:
    image = PHOTO.copy()
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    return image


@pytest.mark.parametrize(
    ("image", "options"),
    [
        (PHOTO, {}),
        (GREY, {}),
        (PHOTO, turned()),
        (PHOTO, {"icc_profile": profiles.DISPLAY_P3}),
        (transparent(), {}),
    ],
    ids=["plain", "grey", "turned", "wide gamut", "transparent"],
)
@pytest.mark.parametrize("kind", ["HEIF", "AVIF", "TIFF"])
def test_pixels_orientation_colours_and_transparency_stay(
    image: Image.Image, options: dict[str, Any], kind: str
) -> None:
    expected = written(image, "PNG", **options)
    assert difference(converted(image, kind, **options), expected) <= LOSSES[kind]


@pytest.mark.parametrize(
    ("image", "kind", "expected"),
    [
        (PHOTO, "BMP", PHOTO),
        (PHOTO.quantize(64), "GIF", PHOTO.quantize(64)),
        (PHOTO.quantize(64), "TIFF", PHOTO.quantize(64)),
        (PHOTO.convert("1"), "TIFF", PHOTO.convert("1")),
        (Image.fromarray(np.asarray(GREY).astype(np.uint16) * 257), "TIFF", GREY),
    ],
)
def test_other_kinds_of_pixels(image: Image.Image, kind: str, expected: Image.Image) -> None:
    assert difference(converted(image, kind), written(expected, "PNG")) == 0


def test_inks_stay_inks() -> None:
    inks = PHOTO.convert("CMYK")
    expected = written(inks, "JPEG", quality=100, subsampling=0, icc_profile=profiles.PRINTER)
    assert difference(converted(inks, "TIFF", icc_profile=profiles.PRINTER), expected) < 1


def test_the_first_frame() -> None:
    black = Image.new("RGB", PHOTO.size)
    for kind in ("GIF", "TIFF", "AVIF", "HEIF"):
        photo = converted(
            PHOTO.quantize(64).convert("RGB"), kind, save_all=True, append_images=[black]
        )
        assert difference(photo, written(PHOTO, "PNG")) < 5


# A GIF's pixels are either transparent or not.
@pytest.mark.parametrize(("suffix", "most"), [("bmp", 0), ("tiff", 0), ("gif", 15)])
@pytest.mark.skipif(not FOREIGN.exists(), reason="this Python came without its tests")
def test_foreign_files(suffix: str, most: float) -> None:
    png = (FOREIGN / "python.png").read_bytes()
    assert difference(encoded_photo(FOREIGN / f"python.{suffix}"), png) <= most


@pytest.mark.parametrize("content", [b"", b"text", b"BMW", b"\xff\xd8\xff", b"\0\0\0 ftypmp42"])
def test_other_content_stays(content: bytes) -> None:
    assert encoded_photo(io.BytesIO(content)) == content


def test_the_content_decides(tmp_path: Path) -> None:
    for suffix in (".jpg", ".gif", ""):
        path = tmp_path / f"photo{suffix}"
        path.write_bytes(written(PHOTO, "BMP"))
        assert encoded_photo(path).startswith(b"\x89PNG")
        path.write_bytes(written(PHOTO, "JPEG"))
        assert encoded_photo(path) == path.read_bytes()


class TestSize:
    def test_a_large_photo_is_scaled_down(self) -> None:
        large = PHOTO.resize((3000, 2000))
        photo = converted(large, "TIFF")
        width, height = Image.open(io.BytesIO(photo)).size
        assert width * height <= SENT_PIXELS
        assert difference(photo, written(large, "PNG")) < 0.5

    def test_noise_stays_within_the_server_s_bytes(self) -> None:
        noise = np.random.default_rng(0).integers(0, 256, (2000, 2000, 4), np.uint8)
        assert len(converted(Image.fromarray(noise), "TIFF")) < LIMITS.max_bytes

    def test_too_many_pixels(self) -> None:
        with pytest.raises(ValueError, match=r"9000x9000 pixels, more than .*; save it as"):
            converted(Image.new("1", (9000, 9000)), "TIFF", compression="group4")

    @pytest.mark.parametrize(
        ("name", "start", "reason"),
        [
            ("photo.jpg", b"\xff\xd8\xff", "200000000 bytes, more than the limit of 100000000"),
            ("photo.heic", b"\0\0\0 ftypheic", "200000000 bytes, more than the limit"),
            ("disk.raw", b"", "neither the server nor this command reads it"),
        ],
    )
    def test_a_huge_file_is_not_read(
        self, name: str, start: bytes, reason: str, tmp_path: Path
    ) -> None:
        path = tmp_path / name
        path.write_bytes(start)
        os.truncate(path, 200_000_000)
        tracemalloc.start()
        with pytest.raises(ValueError, match=reason):
            Unread(path).read()
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert most < 1_000_000

    def test_nor_is_a_device_that_never_ends(self) -> None:
        assert len(encoded_photo(Path("/dev/zero"))) == MAX_BYTES


class TestRefused:
    @pytest.mark.parametrize("kind", ["HEIF", "AVIF", "GIF", "TIFF", "BMP"])
    @pytest.mark.parametrize("share", [0.1, 0.9])
    def test_damaged(self, kind: str, share: float) -> None:
        whole = written(PHOTO, kind)
        with pytest.raises(ValueError, match=r"photo cannot be converted .*; save it as JPEG"):
            encoded_photo(io.BytesIO(whole[: int(len(whole) * share)]))

    def test_the_preview_of_a_raw_file(self) -> None:
        with pytest.raises(ValueError, match="a camera's raw file"):
            converted(PHOTO, "TIFF", tiffinfo={254: 1})

    @pytest.mark.parametrize("mode", ["I", "F"])
    def test_pixels_without_a_scale(self, mode: str) -> None:
        with pytest.raises(ValueError, match=f"pixels of the kind {mode}"):
            converted(PHOTO.convert("L").convert(mode), "TIFF")

    @pytest.mark.parametrize(("kind", "missing"), [("GIF", "PIL"), ("HEIF", "pillow_heif")])
    def test_without_the_library_the_remedy_is_named(
        self, kind: str, missing: str, tmp_path: Path
    ) -> None:
        path = tmp_path / "photo"
        path.write_bytes(written(PHOTO, kind))
        script = (
            "import sys\nfrom pathlib import Path\n"
            f"sys.path.insert(0, {str(ROOT / 'model/api')!r})\nsys.modules[{missing!r}] = None\n"
            f"from client.formats import encoded_photo\nencoded_photo(Path({str(path)!r}))"
        )
        result = subprocess.run(
            [sys.executable, "-c", script], check=False, capture_output=True, text=True
        )
        assert "pip install --upgrade 'npair[heic]'" in result.stderr.splitlines()[-1]


def test_folders_are_searched_by_the_rule_of_training(tmp_path: Path) -> None:
    for name in ("a/1.jpg", "b/2.jpg", "b/._3.jpg", ".hidden/4.jpg", "@eaDir/5.jpg", "b/c/6.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/7.jpg").touch()
    root = tmp_path / "root"
    for name in ("a", "b", ".hidden", "@eaDir"):
        (root / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).rename(root / name)
    links = {
        "0-to-a": root / "a",  # a folder that is visited by its own name
        "b/c/loop": root,
        "outside": tmp_path / "elsewhere",
        "itself": root / "itself",
        "photo.jpg": tmp_path / "elsewhere/7.jpg",
    }
    for name, target in links.items():
        (root / name).symlink_to(target)
    found = [str(path.relative_to(root)) for path in photos_in([root])]
    assert found == ["a/1.jpg", "b/2.jpg", "b/c/6.png", "outside/7.jpg", "photo.jpg"]
    assert sorted(root / name for name in found) == find_photos(root)[0]


def test_what_is_given_twice_is_found_once(tmp_path: Path) -> None:
    for name in ("a/1.jpg", "a/b/2.jpg", "3.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "link").symlink_to(tmp_path / "a")
    one, two, three = (tmp_path / name for name in ("a/1.jpg", "a/b/2.jpg", "3.jpg"))
    assert [*photos_in([three, one, three])] == [three, one]
    assert [*photos_in([two, tmp_path / "a", one, tmp_path / "link"])] == [two, one]
    assert [*photos_in([tmp_path / "a/b", tmp_path])] == [two, three, one]
    assert [*photos_in([Path("-"), Path("-")])] == [Path("-")] * 2
