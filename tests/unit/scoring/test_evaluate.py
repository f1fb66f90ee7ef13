from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.photos import PNG, with_much_text

from npair.cli.evaluate import Scored, present
from npair.data.dataset import DataError, Dataset
from npair.data.files import LIMITS
from npair.data.sources import read_dataset
from npair.publishing.drawings import draw, encode
from npair.scoring.evaluate import EmbeddedSplit, queries_and_gallery
from npair.scoring.pictures import CELL, THUMBNAIL, draw_neighbours, thumbnail
from npair.serving.preprocess import Preprocessing, decode

RAMP = np.linspace(0, 65_535, 96 * 96).astype(np.uint16).reshape(96, 96)
UNUSUAL = {  # photos that Pillow's Image.open refuses, or shows otherwise than decode
    "huge": encode(draw(0, 0, 240), "JPEG"),
    "no end marker": encode(draw(0, 0, 96), "JPEG")[:-2],
    "much text": with_much_text(PNG),
    "transparent": encode(Image.new("RGBA", (96, 96)), "PNG"),
    "16 bits": encode(Image.fromarray(RAMP), "PNG"),
}


@pytest.mark.parametrize("kind", UNUSUAL)
def test_a_thumbnail_is_what_the_network_sees(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 25_000)  # a thumbnail's size, not the huge one's
    (tmp_path / "photo").write_bytes(UNUSUAL[kind])
    encoded = base64.b64decode(thumbnail(tmp_path / "photo").partition(",")[2])
    with Image.open(io.BytesIO(encoded)) as image:
        shown = np.asarray(image).astype(int)
    seen = decode(UNUSUAL[kind], Preprocessing(THUMBNAIL, "BILINEAR", background=255), LIMITS)
    assert np.abs(shown - seen).mean() < 4


def test_draws_a_readable_picture(dataset: Path, tmp_path: Path) -> None:
    queries, gallery = queries_and_gallery(read_dataset(dataset), "val")
    perfect = np.eye(6, dtype=np.float32)
    embedded = EmbeddedSplit(
        "nothing", queries, perfect[queries.fine], gallery, perfect[gallery.fine]
    )
    assert embedded.evaluate().fine.recall_at_1.value == 1
    draw_neighbours(embedded, tmp_path / "picture.png", rows=3, neighbours=4)
    with Image.open(tmp_path / "picture.png") as picture:
        colours = {colour for _, colour in picture.convert("RGB").getcolors(1 << 24) or []}
    assert (0, 128, 0) in colours, "neighbours of the same product are framed in green"
    assert (255, 0, 0) not in colours


def test_scores_are_printed_even_if_no_report_can_be_written(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    queries, gallery = queries_and_gallery(read_dataset(dataset), "val")
    vectors = np.eye(6, dtype=np.float32)
    embedded = EmbeddedSplit("it", queries, vectors[queries.fine], gallery, vectors[gallery.fine])
    for as_json in (True, False):
        with pytest.raises(OSError, match="No such file"):
            present(Scored(embedded, "val", []), report=tmp_path / "no/1.html", as_json=as_json)
    printed = capsys.readouterr().out
    assert '"embedded_by": "it"' in printed
    assert "it on val\n12 photos of 6 classes" in printed


@pytest.mark.parametrize("exclude_self", [True, False])
def test_draws_no_more_photos_than_there_are(
    exclude_self: bool, dataset: Path, tmp_path: Path
) -> None:
    few = read_dataset(dataset).train.select(range(3))
    gallery, vectors = few.select(range(3)), np.eye(3, dtype=np.float32)
    others = vectors if exclude_self else vectors.copy()
    draw_neighbours(EmbeddedSplit("", few, vectors, gallery, others), tmp_path / "picture.png")
    with Image.open(tmp_path / "picture.png") as picture:
        assert picture.width // CELL == 1 + 3 - exclude_self
        assert picture.height // CELL == 3


def test_unseen_classes_are_compared_with_each_other(dataset: Path) -> None:
    read = read_dataset(dataset)
    train, val = read.splits["train"], read.splits["val"]
    seen, unseen = (
        train.select(np.flatnonzero(train.fine < 3)),
        val.select(np.flatnonzero(val.fine >= 3)),
    )
    queries, gallery = queries_and_gallery(Dataset({"train": seen, "val": unseen}, ""), "val")
    assert queries is gallery is unseen
    vectors = np.eye(6, dtype=np.float32)[unseen.fine]
    assert (
        EmbeddedSplit("nothing", queries, vectors, gallery, vectors).evaluate().protocol == "self"
    )


def test_refuses_a_photo_that_can_be_compared_with_nothing(dataset: Path) -> None:
    train = read_dataset(dataset).train
    seen, one = (train.select(np.flatnonzero(train.fine == label)) for label in (0, 1))
    with pytest.raises(DataError, match=r"val is a single photo, .*\.jpg, whose class train lacks"):
        queries_and_gallery(Dataset({"train": seen, "val": one.select([0])}, ""), "val")


def test_names_the_splits_there_are(dataset: Path) -> None:
    with pytest.raises(DataError, match="no split test; it has train, val"):
        queries_and_gallery(read_dataset(dataset), "test")
