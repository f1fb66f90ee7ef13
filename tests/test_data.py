from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from conftest import PREPROCESSING

from npair.data import LIMITS, DataError, NPairSampler, load_pixels, read_split
from npair.serving.preprocess import decode

LABELS = np.repeat(np.arange(10), 5)


class TestReadSplit:
    def test_reads_labels_and_paths(self, dataset: Path) -> None:
        photos = read_split(dataset, "train")
        assert len(photos) == 24
        assert photos.fine.tolist() == [product for product in range(6) for _ in range(4)]
        assert photos.coarse.tolist() == [product // 2 for product in photos.fine]

    def test_a_name_may_hold_commas(self, tmp_path: Path) -> None:
        (tmp_path / "a, b.jpg").touch()
        (tmp_path / "train.txt").write_text("a, b.jpg, 3, 1\n\n")
        assert read_split(tmp_path, "train").fine.tolist() == [3]

    @pytest.mark.parametrize(
        ("listing", "reason"),
        [
            ("a.jpg, 1\n", "train.txt:1: expected"),
            ("a.jpg, 1, 2\na.jpg, one, 2\n", "train.txt:2: expected"),
            ("b.jpg, 1, 2\n", "train.txt:1: no photo"),
            ("\n", "lists no photo"),
        ],
    )
    def test_names_the_bad_line(self, tmp_path: Path, listing: str, reason: str) -> None:
        (tmp_path / "a.jpg").touch()
        (tmp_path / "train.txt").write_text(listing)
        with pytest.raises(DataError, match=reason):
            read_split(tmp_path, "train")

    def test_missing_list(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"val.txt is missing"):
            read_split(tmp_path, "val")

    def test_fingerprint_changes_with_a_label_and_with_a_photo(self, dataset: Path, tmp_path: Path) -> None:
        photos = read_split(dataset, "val")
        relabelled = dataclasses.replace(photos, fine=photos.fine + 1)
        (tmp_path / "other.jpg").write_bytes(b"other")
        changed = dataclasses.replace(photos, paths=(tmp_path / "other.jpg", *photos.paths[1:]))
        assert len({photos.fingerprint(), relabelled.fingerprint(), changed.fingerprint()}) == 3
        assert photos.fingerprint() == read_split(dataset, "val").fingerprint()


class TestLoadPixels:
    def test_is_what_serving_decodes(self, dataset: Path) -> None:
        paths = read_split(dataset, "val").paths
        pixels = load_pixels(paths, PREPROCESSING)
        np.testing.assert_array_equal(pixels[3], decode(paths[3].read_bytes(), PREPROCESSING, LIMITS))

    def test_names_the_bad_file(self, dataset: Path, tmp_path: Path) -> None:
        (tmp_path / "bad.jpg").write_bytes(b"text")
        with pytest.raises(DataError, match=r"bad.jpg: not a JPEG"):
            load_pixels([*read_split(dataset, "val").paths, tmp_path / "bad.jpg"], PREPROCESSING)


class TestNPairSampler:
    def test_batches_hold_distinct_classes_and_two_photos_of_each(self) -> None:
        batches = list(NPairSampler(LABELS, 6, seed=0).epoch(0))
        assert len(batches) == len(LABELS) // 12
        for anchors, positives in batches:
            assert len(set(LABELS[anchors])) == len(anchors) == 6
            np.testing.assert_array_equal(LABELS[anchors], LABELS[positives])
            assert (anchors != positives).all()

    def test_is_a_function_of_seed_and_epoch(self) -> None:
        def drawn(seed: int, epoch: int) -> list[list[int]]:
            return [anchors.tolist() for anchors, _ in NPairSampler(LABELS, 6, seed).epoch(epoch)]

        assert drawn(0, 3) == drawn(0, 3)
        assert drawn(0, 3) != drawn(0, 4)
        assert drawn(0, 3) != drawn(1, 3)

    def test_draws_every_photo_in_time(self) -> None:
        sampler = NPairSampler(LABELS, 6, seed=0)
        drawn = {int(index) for epoch in range(30) for pair in sampler.epoch(epoch) for index in np.concatenate(pair)}
        assert drawn == set(range(len(LABELS)))

    def test_leaves_out_classes_of_one_photo(self) -> None:
        labels = np.array([0, 0, 1, 2, 2])
        anchors, _ = next(iter(NPairSampler(labels, 60, seed=0).epoch(0)))
        assert set(labels[anchors]) == {0, 2}

    def test_refuses_fewer_than_two_classes(self) -> None:
        with pytest.raises(DataError, match="at least two classes"):
            NPairSampler(np.array([0, 0, 0, 1]), 60, seed=0)
