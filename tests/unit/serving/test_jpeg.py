"""Check which JPEGs reach the decoder and in what form; test_preprocess.py checks pixels."""

from __future__ import annotations

import io
import struct

import numpy as np
import numpy.typing as npt
import pytest
import simplejpeg
from PIL import Image, ImageOps
from support.jpegs import ARITHMETIC, GRADIENT, lossless, segment
from support.photos import LIMITS, PREPROCESSING

from npair.publishing.drawings import draw, encode
from npair.serving import scaling
from npair.serving.jpeg import EOI, read
from npair.serving.preprocess import decode
from npair.serving.refusal import PhotoError

PHOTO = encode(draw(0, 0, 200), "JPEG", quality=90)
PROGRESSIVE = encode(draw(0, 0, 200), "JPEG", quality=90, progressive=True)


def decoded(photo: bytes) -> npt.NDArray[np.uint8]:
    return decode(photo, PREPROCESSING, LIMITS)


def with_frame(frame: bytes, marker: int = 0xC0) -> bytes:
    """Replace PHOTO's frame header."""
    start = PHOTO.index(b"\xff\xc0")
    return PHOTO[:start] + segment(marker, frame) + PHOTO[start + 19 :]


FRAME = PHOTO[PHOTO.index(b"\xff\xc0") + 4 :][:15]


@pytest.mark.parametrize("components", [1, 3])
@pytest.mark.parametrize(
    ("marker", "name"),
    [
        *((marker, "lossless JPEG") for marker in (0xC3, 0xCB)),
        *(
            (marker, "hierarchical JPEG")
            for marker in (0xC5, 0xC6, 0xC7, 0xCD, 0xCE, 0xCF, 0xDE, 0xDF)
        ),
        (0xF7, "JPEG-LS"),
    ],
)
def test_frames_of_other_kinds_reach_no_decoder(components: int, marker: int, name: str) -> None:
    """Decoders that scale a lossless frame overflow their buffers."""
    photo = lossless(components, marker=marker)
    frame = photo.index(bytes([0xFF, marker]))
    for between in (b"", b"\0\1\xff\0", b"\xff" * 9):
        odd = photo[:frame] + between + photo[frame:]
        with pytest.raises(
            PhotoError,
            match=rf"a {name}.*, which is not read; save it as a baseline or progressive JPEG",
        ):
            decoded(odd)


@pytest.mark.parametrize("marker", [0xC3, 0xCB, 0xC0, 0xC2])
def test_a_second_frame_cannot_hide(marker: int) -> None:
    """Find a second frame wherever libjpeg would: around scans, after markers without length."""
    frame = segment(marker, FRAME)
    scan = PHOTO.index(b"\xff\xda")
    places = {
        "first": PHOTO[:2] + frame + PHOTO[2:],
        "before the scan": PHOTO[:scan] + frame + PHOTO[scan:],
        "behind zeros": PHOTO[:scan] + bytes(9) + frame + PHOTO[scan:],
        "behind the scan": PHOTO[:-2] + frame + EOI,
        "behind fill bytes": PHOTO[:-2] + b"\xff" * 9 + frame + EOI,
        "behind a restart marker": PHOTO[:-2] + b"\xff\xd0" + frame + EOI,
        "behind an escaped FF": PHOTO[:-2] + b"\xff\xff\0" + frame + EOI,
        "within the scan": PHOTO[: scan + 200] + frame + PHOTO[scan + 200 :],
        "in a comment that ends early": PHOTO[:2]
        + segment(0xFE, b"")[:3]
        + b"\2"
        + frame
        + PHOTO[2:],
    }
    for place, photo in places.items():
        with pytest.raises(PhotoError, match=r"lossless|a second frame"):
            print(place, decoded(photo))


def test_what_only_looks_like_a_frame_is_none() -> None:
    frame = segment(0xC3, FRAME)
    for photo in (
        PHOTO + frame,
        PHOTO[:2] + segment(0xE1, frame) + segment(0xFE, frame) + PHOTO[2:],
    ):
        np.testing.assert_array_equal(decoded(photo), decoded(PHOTO))


@pytest.mark.parametrize("marker", [0x01, 0x02, 0xBF, 0xC8, 0xD0, 0xD8, 0xDC, 0xF0, 0xFD])
def test_markers_that_belong_nowhere_are_refused(marker: int) -> None:
    with pytest.raises(PhotoError, match=f"marker {marker:02X} where none may be"):
        decoded(PHOTO[:2] + bytes([0xFF, marker, 0, 4, 0, 0]) + PHOTO[2:])


@pytest.mark.parametrize(
    ("frame", "reason"),
    [
        (b"\x0c" + FRAME[1:], "a JPEG of 12 bits for each colour, which is not read; save it as"),
        (FRAME[:5] + b"\2" + FRAME[6:12], "a JPEG of 2 colours, which is not read"),
        (FRAME[:1] + bytes(2) + FRAME[3:], "does not say its size before its pixels"),
        (FRAME[:3] + bytes(2) + FRAME[5:], "does not say its size before its pixels"),
        (FRAME[:-1], "frame header of the wrong length"),
        (b"", "frame header of the wrong length"),
    ],
)
def test_other_depths_colours_and_sizes_are_refused(frame: bytes, reason: str) -> None:
    with pytest.raises(PhotoError, match=reason):
        decoded(with_frame(frame))


SCAN = bytes([3, 1, 0, 2, 0x11, 3, 0x11, 0, 63, 0])


@pytest.mark.parametrize(
    ("scan", "reason"),
    [
        (b"", "a scan header of the wrong length"),
        (bytes([0, 0, 63, 0]), "a scan header of the wrong length"),
        (SCAN[:-2], "a scan header of the wrong length"),
        (SCAN + bytes(2), "a scan header of the wrong length"),
        (bytes([5, *[1, 0] * 5, 0, 63, 0]), "a scan header of the wrong length"),
        (bytes([255, *[1, 0] * 32_764, 0, 255, 1]), "a scan header of the wrong length"),
        (SCAN[:-2] + bytes([64, 0]), "a scan of coefficients that do not exist"),
    ],
)
def test_scan_headers_that_libjpeg_refuses_are_refused(scan: bytes, reason: str) -> None:
    """Each of them would be gone through component by component, and index by index."""
    start = PROGRESSIVE.index(b"\xff\xda")
    with pytest.raises(PhotoError, match=reason):
        decoded(PROGRESSIVE[:start] + segment(0xDA, scan))


def test_many_frame_headers_take_no_memory() -> None:
    with pytest.raises(PhotoError, match="wrong length"):
        decoded(PHOTO[:2] + segment(0xC0, FRAME + bytes(60_000)) * 15 + PHOTO[2:])


def test_extended_sequential_is_taken() -> None:
    np.testing.assert_array_equal(decoded(with_frame(FRAME, 0xC1)), decoded(PHOTO))


@pytest.mark.parametrize("photo", ARITHMETIC, ids=["sequential", "progressive"])
def test_arithmetic_coding_is_taken(photo: bytes) -> None:
    expected = np.asarray(GRADIENT.resize((64, 64), Image.Resampling.BILINEAR)).astype(int)
    assert np.abs(decoded(photo)[..., 0] - expected).mean() < 4
    # The decoder would fill in zeros for missing data.
    with pytest.raises(PhotoError, match="ends too early"):
        decoded(photo[:-2])


def test_the_decoder_sees_only_what_makes_the_pixels() -> None:
    junk = segment(0xE1, b"Exif\0\0secret") + segment(0xFE, b"secret") + b"secret"
    content = read(PHOTO[:2] + junk + PHOTO[2:] + b"secret").content
    assert b"secret" not in content
    np.testing.assert_array_equal(
        np.asarray(Image.open(io.BytesIO(content))), np.asarray(Image.open(io.BytesIO(PHOTO)))
    )


@pytest.mark.parametrize("sampling", [(0x21, 0x12, 0x11), (0x31, 0x11, 0x11)])
def test_odd_sampling_is_taken(sampling: tuple[int, int, int]) -> None:
    """Decode by Pillow, since simplejpeg rejects this sampling."""
    units = sum((value >> 4) * (value & 15) for value in sampling)
    frame = struct.pack(">BHHB", 8, 8, 24, 3) + b"".join(
        bytes([c, value, 0]) for c, value in enumerate(sampling)
    )
    tables = segment(0xDB, bytes([0] + [1] * 64)) + b"".join(
        segment(0xC4, bytes([kind, 1, *[0] * 15, 0])) for kind in (0, 16)
    )
    scan = segment(0xDA, bytes([3, 0, 0, 1, 0, 2, 0, 0, 63, 0])) + bytes(units)
    assert (decoded(b"\xff\xd8" + segment(0xC0, frame) + tables + scan + EOI) == 128).all()


@pytest.mark.parametrize("photo", [PHOTO, PROGRESSIVE], ids=["baseline", "progressive"])
class TestDamage:
    def test_without_its_end_marker_it_is_sound(self, photo: bytes) -> None:
        for end in (-2, -1):
            np.testing.assert_array_equal(decoded(photo[:end]), decoded(photo))

    def test_less_than_that_is_truncated(self, photo: bytes) -> None:
        for end in range(-60, -4):
            with pytest.raises(PhotoError, match="truncated or damaged"):
                decoded(photo[:end])

    def test_destroyed_data_are_refused(self, photo: bytes) -> None:
        middle = len(photo) // 2
        destroyed = {
            "line ends": photo.replace(b"\n", b"\r\n"),
            "zeros": photo[:middle] + bytes(2000) + photo[middle + 2000 :],
            "a block is missing": photo[:middle] + photo[middle + 512 :],
            "a block comes twice": photo[:middle] + photo[middle - 512 :],
        }
        for content in destroyed.values():
            with pytest.raises(PhotoError, match="damaged"):
                decoded(content)

    def test_what_follows_the_end_does_not_count(self, photo: bytes) -> None:
        np.testing.assert_array_equal(
            decoded(photo + b"\xff\xd8\xff\xe0\0\x10film" + bytes(9)), decoded(photo)
        )

    def test_padding_before_the_end_does_not_count(self, photo: bytes) -> None:
        for padding in (b"\0", b"\0\0\0\0", b"\xff\xff"):
            np.testing.assert_array_equal(decoded(photo[:-2] + padding + EOI), decoded(photo))


def test_progressive_without_its_last_scans_is_truncated() -> None:
    """The decoder accepts missing scans, since a coarse photo may be intended."""
    scans = [i for i in range(len(PROGRESSIVE)) if PROGRESSIVE.startswith(b"\xff\xda", i)]
    assert len(scans) == 10
    for scan in scans:
        with pytest.raises(PhotoError, match="truncated or damaged"):
            decoded(PROGRESSIVE[:scan])


def test_harmless_oddities_are_taken() -> None:
    """Accept missing scan parameters in a sequential JPEG and an unknown JFIF version.

    libjpeg only warns about them.
    """
    scan = PHOTO.index(b"\xff\xda")
    end = scan + 2 + int.from_bytes(PHOTO[scan + 2 : scan + 4], "big")
    np.testing.assert_array_equal(
        decoded(PHOTO[: end - 3] + bytes(3) + PHOTO[end:]), decoded(PHOTO)
    )
    assert PHOTO[6:11] == b"JFIF\0"
    np.testing.assert_array_equal(decoded(PHOTO[:11] + b"\7" + PHOTO[12:]), decoded(PHOTO))


@pytest.mark.parametrize("resample", ["BOX", "BILINEAR", "BICUBIC", "LANCZOS"])
@pytest.mark.parametrize("size", [(3, 70), (64, 64), (72, 71), (100, 90), (65, 999)])
@pytest.mark.parametrize(("mode", "colours"), [("L", "GRAY"), ("RGB", "RGB"), ("CMYK", "CMYK")])
def test_pixels_are_scaled_as_by_pillow(
    monkeypatch: pytest.MonkeyPatch, mode: str, colours: str, size: tuple[int, int], resample: str
) -> None:
    """Agree up to rounding, which both do once for each direction."""
    photo = encode(draw(0, 0).convert(mode).resize(size), "JPEG", quality=90)
    pixels = simplejpeg.decode_jpeg(photo, colours, min_width=64, min_height=64)
    image = Image.fromarray(255 - pixels if mode == "CMYK" else pixels.squeeze(), mode)
    expected = np.asarray(ImageOps.fit(image, (64, 64), Image.Resampling[resample]))
    assert np.abs(read(photo).decode(64, resample).astype(int) - expected).max() <= 2
    monkeypatch.setattr(scaling, "resizer", None)  # as on Arm
    scaled = read(photo).decode(64, resample).astype(int)
    assert np.abs(scaled - expected).max() <= 2 * (mode == "CMYK")  # inverted later here
