"""Decode and refuse photos; model/api/test_model_api.py compares formats on a real server."""

from __future__ import annotations

import base64
import contextlib
import ctypes
import dataclasses
import io
import random
import struct
import subprocess
import sys
import threading
import time
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from fuzz import PHOTOS, Hostile
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo
from support.jpegs import many_scans, segment
from support.photos import LIMITS, PREPROCESSING, chunk

from npair.publishing.drawings import draw, encode
from npair.serving import preprocess
from npair.serving.jpeg import MAX_SCANS, MAX_SEGMENTS
from npair.serving.preprocess import Limits, Preprocessing, decode
from npair.serving.refusal import PhotoError

FORMATS = ("JPEG", "PNG", "WEBP")
PHOTO = draw(0, 0, 200)
SHARP = Preprocessing(size=208, resample="BILINEAR", background=255)
LARGE = Limits(max_bytes=10_000_000, max_pixels=10_000_000)


def decoded(photo: bytes) -> npt.NDArray[np.uint8]:
    return decode(photo, PREPROCESSING, LIMITS)


def by_pillow(photo: bytes) -> npt.NDArray[np.uint8]:
    """Crop the central square and scale it to SHARP's size with Pillow."""
    image = ImageOps.fit(
        Image.open(io.BytesIO(photo)).convert("RGB"), (208, 208), Image.Resampling.BILINEAR
    )
    return np.asarray(ImageOps.exif_transpose(image))


def test_central_square_scaled() -> None:
    stripes = Image.new("RGB", (300, 100), "red")
    stripes.paste("blue", (100, 0, 200, 100))
    pixels = decoded(encode(stripes, "PNG"))
    assert pixels.shape == (64, 64, 3)
    assert pixels.dtype == np.uint8
    assert (pixels == (0, 0, 255)).all(axis=2).mean() > 0.9


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (500, 1), (64, 64), (999, 1001)])
def test_any_shape(size: tuple[int, int]) -> None:
    assert (decoded(encode(Image.new("RGB", size, "lime"), "PNG")) == (0, 255, 0)).all()
    assert (decoded(encode(Image.new("L", size, 99), "JPEG")) == 99).all()


def test_limits_are_inclusive() -> None:
    photo = encode(PHOTO, "JPEG")
    exact = Limits(max_bytes=len(photo), max_pixels=200 * 200)
    assert decode(photo, PREPROCESSING, exact).shape == (64, 64, 3)
    with pytest.raises(
        PhotoError, match=f"{len(photo)} bytes, more than the limit of {len(photo) - 1}"
    ):
        decode(photo, PREPROCESSING, dataclasses.replace(exact, max_bytes=len(photo) - 1))
    with pytest.raises(PhotoError, match="200x200 pixels, more than the limit of 39999"):
        decode(photo, PREPROCESSING, dataclasses.replace(exact, max_pixels=39_999))


def test_16_bit_grey_is_scaled_not_clipped() -> None:
    ramp = np.linspace(0, 65535, 64 * 64, dtype=np.uint16).reshape(64, 64)
    pixels = decoded(encode(Image.fromarray(ramp), "PNG"))
    np.testing.assert_array_equal(pixels[..., 0], ramp >> 8)


def test_transparent_pixels_show_the_background() -> None:
    photo = encode(Image.new("RGBA", (50, 50), (255, 0, 0, 0)), "PNG")
    assert (decoded(photo) == 255).all()
    assert (decode(photo, dataclasses.replace(PREPROCESSING, background=7), LIMITS) == 7).all()


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_damaged_exif_does_not_spoil_the_photo() -> None:
    plain, spoiled = (
        encode(PHOTO, "JPEG"),
        encode(PHOTO, "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xffgarbage"),
    )
    np.testing.assert_array_equal(decoded(plain), decoded(spoiled))


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize(
    "size", [(1, 1), (100, 300), (208, 208), (237, 348), (348, 348), (1100, 900), (1500, 300)]
)
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": "4:4:4"}], ids=str)
def test_jpegs_are_scaled_as_by_pillow(
    size: tuple[int, int], mode: str, options: dict[str, Any]
) -> None:
    photo = encode(draw(0, 0).convert(mode).resize(size), "JPEG", quality=90, **options)
    difference = decode(photo, SHARP, LARGE).astype(int) - by_pillow(photo)
    assert np.abs(difference).mean() < 2
    assert abs(difference.mean()) < 0.5


def test_orientation_counts_after_scaled_decoding() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    photo = encode(PHOTO.resize((800, 600)), "JPEG", quality=90, exif=exif)
    assert np.abs(decode(photo, SHARP, LARGE).astype(int) - by_pillow(photo)).mean() < 2


def tiff(order: str, *entries: bytes) -> bytes:
    """Build EXIF data of these entries, big-endian (">") or little-endian ("<")."""
    start = b"MM\0*" if order == ">" else b"II*\0"
    return start + struct.pack(order + "IH", 8, len(entries)) + b"".join(entries) + bytes(4)


def xmp(orientation: int) -> bytes:
    return b'<rdf:Description tiff:Orientation="%d"/>' % orientation


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("order", "<>")
def test_photos_are_turned_as_by_pillow(name: str, orientation: int, order: str) -> None:
    image = PHOTO.resize((64, 64))
    text = PngInfo()
    text.add_itxt("XML:com.adobe.xmp", xmp(orientation).decode())
    only_xmp: dict[str, Any] = {"pnginfo": text} if name == "PNG" else {"xmp": xmp(orientation)}
    exif = tiff(
        order,
        struct.pack(order + "HHIHH", 0x0100, 3, 1, 5, 0),
        struct.pack(order + "HHIHH", 0x0112, 3, 1, orientation, 0),
    )
    upright = decoded(encode(image, name))
    for options in (
        {"exif": b"Exif\0\0" + exif},
        only_xmp,
        {**only_xmp, "exif": b"Exif\0\0" + tiff(order)},
    ):
        photo = encode(image, name, **options)
        pillow = Image.open(io.BytesIO(photo))
        pillow.load()
        expected = Image.fromarray(upright)
        expected.info = pillow.info
        np.testing.assert_array_equal(decoded(photo), np.asarray(ImageOps.exif_transpose(expected)))


def test_exif_data_in_the_text_of_a_png_turns_it() -> None:
    exif = tiff("<", struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0))
    text = with_chunks(
        chunk(
            b"zTXt",
            b"Raw profile type exif\0\0" + zlib.compress(b"\nexif\n38\n" + exif.hex().encode()),
        )
    )
    np.testing.assert_array_equal(decoded(text), np.rot90(decoded(PHOTOS["RGB.png"]), -1))


@pytest.mark.parametrize(
    "exif",
    [
        b"",
        b"II*\0",
        b"II*\0\xff\xff\xff\xff",
        tiff("<")[:9],
        tiff("<", struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0))[:-9],  # cut within the orientation
        tiff("<", struct.pack("<HHII", 0x0112, 3, 1000, 0)),  # 1000 orientations
        tiff("<", struct.pack("<HHI4s", 0x0112, 2, 2, b"6")),  # as text
        b"XX\0*" + tiff(">", struct.pack(">HHIHH", 0x0112, 3, 1, 6, 0))[4:],
    ],
)
def test_malformed_exif_data_turn_nothing(exif: bytes) -> None:
    np.testing.assert_array_equal(
        decoded(with_chunks(chunk(b"eXIf", exif))), decoded(PHOTOS["RGB.png"])
    )


def test_what_browsers_show_is_taken() -> None:
    """Accept zeros between segments, which libjpeg warns about, and bytes after the end."""
    photo = encode(PHOTO, "JPEG", quality=90)
    quantisation = photo.index(b"\xff\xdb")
    for odd in (photo[:quantisation] + b"\0\0" + photo[quantisation:], photo + b"more"):
        assert np.abs(decode(odd, SHARP, LARGE).astype(int) - by_pillow(photo)).mean() < 2


@pytest.mark.parametrize("keep", [0.05, 0.2, 0.5, 0.9, 0.99])
def test_truncated_jpegs_are_refused(keep: float) -> None:
    photo = encode(PHOTO, "JPEG", quality=90)
    with pytest.raises(PhotoError, match="truncated"):
        decoded(photo[: int(keep * len(photo))])


def outcome(photo: bytes) -> object:
    """Return the shape and dtype of the pixels, or "refused"; pass on other exceptions."""
    try:
        pixels = decoded(photo)
    except PhotoError:
        return "refused"
    return pixels.shape, str(pixels.dtype)


TAKEN = ((64, 64, 3), "uint8")


@given(
    st.sampled_from(
        [b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF", b"RIFF\0\0\0\0WEBP", *PHOTOS.values()]
    ),
    st.binary(max_size=200),
)
def test_anything_is_decoded_or_refused(start: bytes, content: bytes) -> None:
    """Ignore bytes after the end of a photo; refuse files that only begin like one."""
    assert outcome(start + content) == (TAKEN if len(start) > 12 else "refused")


@pytest.mark.filterwarnings("ignore")
@given(st.sampled_from(sorted(PHOTOS)), st.integers(0, 1 << 32))
@settings(max_examples=1000)
def test_changed_files_are_decoded_or_refused(name: str, number: int) -> None:
    assert outcome(Hostile(random.Random(number)).spoiled(PHOTOS[name])) in (TAKEN, "refused")


@pytest.mark.parametrize("name", sorted(PHOTOS))
def test_every_truncation_is_decoded_or_refused(name: str) -> None:
    outcomes = {outcome(PHOTOS[name][:length]) for length in range(len(PHOTOS[name]) + 1)}
    assert outcomes == {TAKEN, "refused"}


@given(
    st.sampled_from(
        [("JPEG", mode) for mode in ("RGB", "L", "CMYK")]
        + [("PNG", mode) for mode in ("RGB", "L", "1", "P", "RGBA", "LA", "I;16")]
        + [("WEBP", mode) for mode in ("RGB", "RGBA")]
    ),
    st.tuples(st.integers(1, 300), st.integers(1, 300)),
    st.integers(0, 9),
)
def test_every_mode_size_and_orientation_is_taken(
    kind: tuple[str, str], size: tuple[int, int], orientation: int
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = draw(0, 0, 40).convert("L" if kind[1] == "I;16" else kind[1]).resize(size)
    if kind[1] == "I;16":
        image = Image.fromarray(np.asarray(image).astype(np.uint16) * 257)
    assert outcome(encode(image, kind[0], exif=exif)) == TAKEN


def other_formats() -> dict[str, bytes]:
    """Write a file in each format that Pillow reads and writes but npair refuses."""
    Image.init()
    files = {}
    for name in sorted(set(Image.OPEN) & set(Image.SAVE) - {*FORMATS, "MPO"}):
        for mode in ("RGB", "L", "1", "P", "F"):
            with contextlib.suppress(Exception):  # the format may lack this mode
                files[name] = encode(draw(0, 0, 64).convert(mode), name)
                break
    return files


OTHERS = other_formats()


@pytest.mark.parametrize("name", OTHERS)
def test_other_formats_are_refused(name: str) -> None:
    assert Image.open(io.BytesIO(OTHERS[name])).format == name, "the file is of that format"
    with pytest.raises(PhotoError, match="not a JPEG, PNG or WebP"):
        decoded(OTHERS[name])


@pytest.mark.parametrize(
    ("start", "reason"),
    [
        (b"II*\0\x10\0\0\0CR\2\0", "a camera's raw file.*export it as JPEG"),
        (b"\0\0\0\x18ftypcrx ", "a camera's raw file"),
        (b"\0\0\0\x24ftypheic\0\0\0\0mif1", "a HEIC.*Most Compatible"),
        (b"\0\0\0\x20ftypavif", "an AVIF"),
        (b"\0\0\0\x20ftypisom", "a video.*send one picture"),
        (b"\0\0\0\x14ftypqt  ", "a video"),
        (b"\x1aE\xdf\xa3\x01", "a video"),
        (b"RIFF\x10\0\0\0AVI LIST", "a video"),
        (b"RIFF\x10\0\0\0WAVEfmt ", "a sound"),
        (b"RIFF\x10\0\0\0WEBXVP8 ", "another RIFF file"),
        (b"\xff\x0a\x12", "a JPEG XL"),
        (b"\0\0\0\x0cJXL \r\n\x87\n", "a JPEG XL"),
        (b"\0\0\0\x0cjP  \r\n\x87\n", "a JPEG 2000"),
        (b"\xff\x4f\xff\x51\0", "a JPEG 2000"),
        (b"8BPS\0\1", "a Photoshop file"),
        (b"%PDF-1.7", "a PDF"),
        (b'<?xml version="1.0"?>\n<!DOCTYPE svg PUBLIC "x">\n<svg xmlns="x"/>', "an SVG"),
        (b"\n<!DOCTYPE html><html>403", "a web page.*download the photo"),
        (b"<HTML><body>", "a web page"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0",
            "a Git LFS pointer.*git lfs pull",
        ),
        (b"PK\3\4\x14\0", "an archive.*unpack it"),
        (b"\x1f\x8b\x08", "an archive"),
        (b"7z\xbc\xaf\x27\x1c", "an archive"),
        (b"Rar!\x1a\7\1\0", "an archive"),
        (b"a.jpg".ljust(257, b"\0") + b"ustar", "an archive"),
        (b"\x7fELF\2\1", "a program"),
        (b"MZ\x90\0", "a program"),
        (bytes(1000), "nothing but zeros"),
        (b"\0", "nothing but zeros"),
        (b' {"error": "not found"}', "JSON"),
        (b"not found", "text, .*send the photo itself, or its base64"),
        ("pas trouv\u00e9".encode(), "text"),
        (b"\x01\x02\x03", "of a kind that is not known here, .*convert it"),
    ],
)
def test_refusals_name_what_was_sent(start: bytes, reason: str) -> None:
    with pytest.raises(PhotoError, match=rf"^{reason}") as caught:
        decoded(start)
    assert "not a JPEG, PNG or WebP" in str(caught.value)
    assert caught.value.reason == "not_an_image"


def test_a_data_set_has_no_photos_as_text() -> None:
    with pytest.raises(PhotoError, match="text, not a JPEG, PNG or WebP"):
        decoded(base64.b64encode(PHOTOS["RGB.jpg"]))


def test_most_formats_that_pillow_reads_were_tried() -> None:
    assert len(OTHERS) > 15
    assert {"GIF", "TIFF", "BMP", "ICO", "PPM", "TGA", "EPS"} <= set(OTHERS)


def test_polyglots_count_as_what_they_begin_with() -> None:
    """Trailing content neither turns another file into a photo nor changes a photo."""
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("evil.py", "boom")
    rest = [archive.getvalue(), b"<html><script>", b"%PDF-1.7", *OTHERS.values()]
    for photo in PHOTOS.values():
        for other in rest:
            np.testing.assert_array_equal(decoded(photo + other), decoded(photo))
            with pytest.raises(PhotoError, match="not a JPEG, PNG or WebP"):
                decoded(other + photo)


def test_the_first_of_several_pictures_counts() -> None:
    several = encode(PHOTO, "MPO", save_all=True, append_images=[PHOTO.rotate(90)])
    assert b"MPF\0" in several
    np.testing.assert_allclose(decoded(several), decoded(encode(PHOTO, "JPEG")), atol=20)


def with_chunks(*chunks: bytes) -> bytes:
    """Insert chunks after the header of a PNG."""
    photo = PHOTOS["RGB.png"]
    return photo[:33] + b"".join(chunks) + photo[33:]


def segments(kind: int, content: bytes, start: bytes = b"") -> bytes:
    """Replace a JPEG's first segment by segments of this kind, each beginning with start."""
    photo, step = PHOTOS["RGB.jpg"], 65_533 - len(start)
    parts = [start + content[i : i + step] for i in range(0, len(content), step)]
    return (
        photo[:2]
        + b"".join(struct.pack(">BBH", 0xFF, kind, len(part) + 2) + part for part in parts)
        + photo[20:]
    )


def huge_exif(entries: int = 100, size: int = 900_000) -> bytes:
    """Build EXIF data in which every entry's value is all of the data."""
    tags = b"".join(struct.pack("<HHII", 1000 + entry, 7, size, 0) for entry in range(entries))
    return (b"II*\0" + struct.pack("<IH", 8, entries) + tags).ljust(size + 8, b"\0")


def rationals() -> bytes:
    """Build rotated EXIF data whose 200 entries share the same numbers.

    Pillow would take 2.3 MB for each entry.
    """
    entries = (struct.pack("<HHII", 1000 + entry, 5, 8_000, 0) for entry in range(200))
    return tiff("<", struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0), *entries).ljust(64_000, b"\0")


def animated(width: int, height: int) -> bytes:
    """Return an animated WebP that claims this size."""
    photo = bytearray(PHOTOS["animated.webp"])
    photo[24:30] = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    return bytes(photo)


BOMBS = {
    "png of 60000 x 60000": with_chunks()[:8]
    + chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0))
    + with_chunks()[33:],
    "webp of 16383 x 16383": animated(16_383, 16_383),
    "compressed text": with_chunks(chunk(b"zTXt", b"x\0\0" + zlib.compress(bytes(200_000_000), 9))),
    "compressed international text": with_chunks(
        chunk(b"iTXt", b"x\0\1\0\0\0" + zlib.compress(bytes(200_000_000), 9))
    ),
    "compressed profile": with_chunks(
        chunk(b"iCCP", b"x\0\0" + zlib.compress(bytes(200_000_000), 9))
    ),
    "more pixels than declared": with_chunks(chunk(b"IDAT", zlib.compress(bytes(200_000_000), 9))),
    "png exif": with_chunks(chunk(b"eXIf", huge_exif())),
    "png raw profile": with_chunks(
        chunk(
            b"zTXt",
            b"Raw profile type exif\0\0"
            + zlib.compress(b"\nexif\n1\n" + huge_exif(200, 450_000).hex().encode()),
        )
    ),
    "jpeg exif": segments(0xE1, huge_exif(), b"Exif\0\0"),
    "webp exif": encode(PHOTO, "WEBP", exif=huge_exif()),
    "png rationals": with_chunks(chunk(b"eXIf", rationals())),
    "jpeg rationals": segments(0xE1, rationals(), b"Exif\0\0"),
    "webp rationals": encode(PHOTO, "WEBP", exif=rationals()),
    "jpeg pictures": segments(0xE2, rationals(), b"MPF\0"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", BOMBS)
def test_bombs_take_little_memory(name: str) -> None:
    """Each bomb would take far more memory if it were unpacked."""
    photo = BOMBS[name]
    assert len(photo) < LIMITS.max_bytes
    status = Path("/proc/self/status")
    # Return free memory to the system, since reusing it would not show in the peak.
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    before = int(status.read_text().split("VmHWM:")[1].split()[0])
    outcome(photo)
    assert int(status.read_text().split("VmHWM:")[1].split()[0]) - before < 40_000


def test_exif_data_that_is_too_long_still_turns_a_photo() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = encode(PHOTO, "PNG", exif=exif)
    long = encode(PHOTO, "PNG", exif=exif.tobytes() + bytes(900_000))
    np.testing.assert_array_equal(decoded(long), decoded(turned))
    assert (decoded(turned) != decoded(encode(PHOTO, "PNG"))).any()


def test_scans_are_limited() -> None:
    assert outcome(many_scans(MAX_SCANS)) == TAKEN
    with pytest.raises(PhotoError, match=f"more than the limit of {MAX_SCANS} scans"):
        decoded(many_scans(MAX_SCANS + 1))
    # Do not count lookalikes of scans in trailing data or in a thumbnail.
    assert outcome(PHOTOS["RGB.jpg"] + b"\xff\xda" * 1000) == TAKEN
    assert outcome(segments(0xE2, b"\xff\xda" * 1000)) == TAKEN


@pytest.mark.parametrize("code", [0x00, 0x01, 0x02, 0xBF, 0xD0, 0xD7, 0xD8])
def test_scans_behind_markers_without_a_length_count(code: int) -> None:
    """After a marker without a length, count the next scan at once.

    libjpeg finds the scan there or gives up.
    """
    header, first, *others = many_scans(2 * MAX_SCANS).split(b"\xff\xda")
    with pytest.raises(
        PhotoError,
        match=f"more than the limit of {MAX_SCANS} scans|marker {code:02X} where none may be",
    ):
        decoded(header + b"\xff\xda" + bytes([0xFF, code, 0xFF, 0xDA]).join([first, *others]))


def test_scans_are_counted_in_linear_time() -> None:
    """Skip fill bytes that no marker follows without scanning them again."""
    start = time.perf_counter()
    assert (
        outcome(segments(0xE2, b"\xff\xda" * 1000)[:-2] + b"\xff" * 200_000 + b"\0\xff\xd9")
        == TAKEN
    )
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize("content", [b"", b"Exif\0\0" + bytes(4)])
def test_segments_are_limited(content: bytes) -> None:
    photo = PHOTOS["RGB.jpg"]
    many = segment(0xE1, content) * (MAX_SEGMENTS - 20)
    assert outcome(photo[:2] + many + photo[2:]) == TAKEN
    with pytest.raises(PhotoError, match=f"more than the limit of {MAX_SEGMENTS} segments"):
        decoded(photo[:2] + 2 * many + photo[2:])


def test_large_photos_are_decoded_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preprocess, "LARGE", 200 * 200)
    lock = threading.Lock()
    with ThreadPoolExecutor(2) as pool:
        with lock:
            waits = pool.submit(
                decode, encode(PHOTO.resize((201, 200)), "PNG"), PREPROCESSING, LIMITS, lock
            )
            assert decode(encode(PHOTO, "PNG"), PREPROCESSING, LIMITS, lock).shape == (64, 64, 3)
            with pytest.raises(TimeoutError):
                waits.result(timeout=0.3)
        assert waits.result(timeout=30).shape == (64, 64, 3)
    assert not lock.locked()


def test_want_of_memory_is_not_blamed_on_the_photo() -> None:
    """Decode in a process that cannot allocate the 75 MB of pixels."""
    code = """
import io, resource, sys
from PIL import Image
from npair.serving.preprocess import Limits, Preprocessing, decode
photo = io.BytesIO()
Image.new("RGB", (5000, 5000)).save(photo, "PNG")
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (32 << 20), resource.RLIM_INFINITY))
try:
    decode(photo.getvalue(), Preprocessing(64, "BILINEAR", 255), Limits(1 << 30, 1 << 30))
except MemoryError:
    print("no memory")
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "no memory\n"
