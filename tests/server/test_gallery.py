"""Build, interrupt, change, search and damage galleries on the real server."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lancedb
import numpy as np
import pytest
from filelock import FileLock
from support.models import ROOT, SHIPPED
from support.photos import folders, photo, table
from support.servers import running

from npair.client import Embeddings, InvalidPhotoError, NpairClient, UnavailableError
from npair.data.catalogue import read_catalogue
from npair.gallery import build as building
from npair.gallery import gallery
from npair.gallery.build import Built, build
from npair.gallery.gallery import Gallery, GalleryError, PhotoGoneError, path_of
from npair.releasing.config import with_release

OLD, NEW = SHIPPED.name, str(int(SHIPPED.name) + 1)


@pytest.fixture(scope="module")
def client() -> Iterator[NpairClient]:
    """Yield a client of a server with the shipped version."""
    with running() as (_, urls), NpairClient(urls["http"]) as client:
        yield client


@pytest.fixture(scope="module")
def newer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NpairClient]:
    """Yield a gRPC client of a server with the shipped version and the next one, its default."""
    models = tmp_path_factory.mktemp("models")
    model = Path(shutil.copytree(SHIPPED.parent, models / "npair"))
    shutil.copytree(model / OLD, model / NEW)
    config = (model / "config.pbtxt").read_text()
    hashes = {
        "manifest_version": NEW,
        "manifest_sha256": "f" * 64,
        f"manifest_sha256_{OLD}": manifest_of(config),
    }
    (model / "config.pbtxt").write_text(with_release(config, [int(OLD), int(NEW)], hashes))
    with running(MODEL_REPOSITORY=str(models)) as (_, urls), NpairClient(urls["grpc"]) as client:
        yield client


@pytest.fixture(scope="module")
def made(client: NpairClient, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Gallery:
    folder = tmp_path_factory.mktemp("index")
    build(dataset, folder, client)
    return Gallery(folder)


def manifest_of(config: str) -> str:
    return next(line for line in config.splitlines() if '"manifest_sha256"' in line).split('"')[-2]


def stored(folder: Path) -> dict[str, str]:
    """Map the active table's photos to their labels; fail if a photo occurs twice."""
    rows = Gallery(folder).table.search().select(["photo", "label"]).to_list()
    labels = {str(path_of(row["photo"], folder)): row["label"] for row in rows}
    assert len(labels) == len(rows)
    return labels


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def labels_of(source: Path) -> dict[Path, str]:
    return {path: entry.label for path, entry in read_catalogue(source).entries.items()}


class TestBuild:
    def test_each_photo_is_found_by_itself(
        self, client: NpairClient, dataset: Path, tmp_path: Path
    ) -> None:
        built = build(dataset, tmp_path, client)
        assert built == Built(OLD, 36, 36, {})
        made = Gallery(tmp_path)
        config = client.manifest_sha256(OLD)
        assert (made.model, made.version, made.manifest_sha256) == ("npair", OLD, config)
        for path, label in labels_of(dataset).items():
            best, second = made.search(path, client, k=2)
            assert (best.photo, best.label) == (str(path), label)
            assert best.cosine == pytest.approx(1, abs=1e-3)
            assert second.cosine < best.cosine

    def test_only_what_changed_is_embedded(self, client: NpairClient, tmp_path: Path) -> None:
        photos, index = folders(tmp_path / "photos", classes=3, photos=4), tmp_path / "index"
        assert build(photos, index, client).embedded == 12
        assert build(photos, index, client) == Built(OLD, 12, 0, {})
        (gone := photos / "class 0/0.png").unlink()
        photo(photos / "class 0/1.png", 999)
        (photos / "class 0/2.png").rename(photos / "class 1/moved.png")
        photo(photos / "class 2/new.png", 1000)
        built = build(photos, index, client)
        assert (built.photos, built.embedded, built.missing) == (13, 2, (str(gone),))
        assert stored(index).keys() - set(map(str, labels_of(photos))) == {str(gone)}
        assert build(photos, index, client, prune=True) == Built(OLD, 12, 0, {}, removed=1)
        assert stored(index) == {str(path): label for path, label in labels_of(photos).items()}
        assert build(photos, index, client).embedded == 0

    def test_a_label_that_changed_is_stored(self, client: NpairClient, tmp_path: Path) -> None:
        photo(tmp_path / "a.png")
        for label in ("before", "after"):
            build(
                table(tmp_path, f"path,label,split\na.png,{label},train\na.png,{label},val\n"),
                tmp_path / "index",
                client,
            )
            assert stored(tmp_path / "index") == {str(tmp_path / "a.png"): label}

    def test_bad_photos_are_named_and_left_out(self, client: NpairClient, tmp_path: Path) -> None:
        photos, index = folders(tmp_path / "photos", classes=2, photos=2), tmp_path / "index"
        bad, spoilt = photos / "class 0/bad.jpg", photos / "class 1/0.png"
        bad.write_bytes(b"text")
        built = build(photos, index, client)
        assert (built.photos, built.embedded, list(built.left_out)) == (4, 4, [str(bad)])
        assert "not a JPEG" in built.left_out[str(bad)]
        spoilt.write_bytes(b"")
        for prune, count in ((False, 4), (True, 3)):
            built = build(photos, index, client, prune=prune)
            assert (built.photos, built.embedded, built.removed) == (count, 0, 4 - count)
            assert list(built.left_out) == [str(bad), str(spoilt)]
        assert str(spoilt) not in stored(index)

    def test_moved_photos_are_found_at_one_place_all_the_time(
        self, client: NpairClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Moving the folder renames every photo, which needs neither new vectors nor --prune."""
        photos, index = folders(tmp_path / "photos", classes=2, photos=3), tmp_path / "index"
        build(photos, index, client)
        before, store = stored(index), building._Update._store
        seen = [before]

        def look(*arguments: Any) -> None:
            store(*arguments)
            seen.append(stored(index))

        monkeypatch.setattr(building._Update, "_store", look)
        assert build(photos.rename(tmp_path / "moved"), index, client) == Built(OLD, 6, 0, {})
        after = {str(path): label for path, label in labels_of(tmp_path / "moved").items()}
        assert [moment for moment, _ in itertools.groupby(seen)] == [before, after]

    def test_what_was_embedded_before_a_failure_is_kept(
        self, client: NpairClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        photos, index = folders(tmp_path / "photos", classes=1, photos=9), tmp_path / "index"
        with monkeypatch.context() as patch:
            stream = NpairClient.stream

            def ending(self: NpairClient, images: Any) -> Iterator[Any]:
                yield from itertools.islice(stream(self, images), 5)
                raise UnavailableError("gone")

            patch.setattr(NpairClient, "stream", ending)
            patch.setattr(
                NpairClient, "embed", lambda *_: Embeddings(np.zeros((1, 128), np.float32), OLD)
            )
            with pytest.raises(UnavailableError):
                build(photos, index, client)
        assert build(photos, index, client) == Built(OLD, 9, 4, {})

    def test_what_is_passed_over_is_said(self, client: NpairClient, tmp_path: Path) -> None:
        photos, index = tmp_path / "photos", tmp_path / "index"
        for name in ("1.jfif", "2.JPE", "@eaDir/1.jfif/SYNOPHOTO_THUMB_M.jpg", "._1.jfif"):
            photo(photos / name)
        for name in ("1.txt", "2.txt"):
            (photos / name).touch()
        ignored = f"2 .txt such as {photos / '1.txt'}, {photos / '._1.jfif'}, {photos / '@eaDir'}"
        assert build(photos, index, client) == Built(OLD, 2, 2, {}, ignored=ignored)
        for name in ("1.jfif", "2.JPE"):
            (photos / name).unlink()
        with pytest.raises(GalleryError, match=r"no photos in .*, but 2 \.txt such as"):
            build(photos, index, client)

    def test_tables_of_somebody_else_stay(self, client: NpairClient, tmp_path: Path) -> None:
        photo(tmp_path / "photos/a.png")
        lancedb.connect(tmp_path / "index").create_table("mine", [{"x": 1}])
        build(tmp_path / "photos", tmp_path / "index", client)
        assert "mine" in lancedb.connect(tmp_path / "index").list_tables().tables

    def test_nothing_to_build(self, client: NpairClient, tmp_path: Path) -> None:
        (tmp_path / "photos").mkdir()
        with pytest.raises(GalleryError, match="no photos in"):
            build(tmp_path / "photos", tmp_path / "index", client)
        (tmp_path / "photos/bad.jpg").write_bytes(b"text")
        with pytest.raises(GalleryError, match=r"none of the photos .*bad\.jpg: .*not a JPEG"):
            build(tmp_path / "photos", tmp_path / "index", client)
        with pytest.raises(GalleryError, match="there is no gallery"):
            Gallery(tmp_path / "index")

    def test_names_that_are_hard_to_write(self, client: NpairClient, tmp_path: Path) -> None:
        photos, index = tmp_path / "photos", tmp_path / "index"
        names = [b"it's.png", b"two\nlines.png", b"\xff.png", b"100%25.png", "naïve.png".encode()]
        paths = [photo(photos / os.fsdecode(name), number) for number, name in enumerate(names)]
        assert build(photos, index, client).embedded == len(names)
        made = Gallery(index)
        assert sorted(made.photo(sha256(path)) for path in paths) == sorted(paths)
        for path in paths[:-1]:
            path.unlink()
        built = build(photos, index, client, prune=True)
        assert (built.photos, built.removed) == (1, len(names) - 1)
        assert list(stored(index)) == [str(photos / "naïve.png")]

    def test_one_at_a_time(self, client: NpairClient, tmp_path: Path) -> None:
        photo(tmp_path / "photos/a.png")
        with (
            FileLock(tmp_path / "build.lock"),
            pytest.raises(GalleryError, match="another process builds"),
        ):
            build(tmp_path / "photos", tmp_path, client)
        assert build(tmp_path / "photos", tmp_path, client).photos == 1


def test_goes_on_where_it_was_killed(client: NpairClient, tmp_path: Path) -> None:
    photos, index, rows = folders(tmp_path / "photos", classes=10, photos=80), tmp_path / "index", 8
    code = (
        "from pathlib import Path; from npair.gallery import build;"
        f"from npair.client import NpairClient; build.ROWS = {rows};"
        f"client = NpairClient({client.url!r}, batch_size=8);"
        f"build.build(Path({str(photos)!r}), Path({str(index)!r}), client)"
    )
    kept = 0
    for _ in range(3):
        process = subprocess.Popen(
            [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(ROOT / "src")}
        )
        while count(index) < kept + 4 * rows and process.poll() is None:
            time.sleep(0.002)
        process.kill()
        assert process.wait() == -9, "it must not have come to its end"
        assert kept < count(index) < 800, "what was stored stays"
        kept = count(index)
    with pytest.raises(GalleryError, match="there is no gallery"):
        Gallery(index)
    assert build(photos, index, client) == Built(OLD, 800, 800 - kept, {})
    assert stored(index) == {str(path): label for path, label in labels_of(photos).items()}


def count(index: Path) -> int:
    """Count the rows of the only table, complete or not."""
    database = lancedb.connect(index)
    names = database.list_tables().tables if index.exists() else []
    try:
        return sum(database.open_table(name).count_rows() for name in names)
    except ValueError:  # the folder exists before the table
        return 0


class TestVersions:
    def test_switch_in_one_step_and_back(
        self,
        client: NpairClient,
        newer: NpairClient,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        photos, index = folders(tmp_path / "photos", classes=2, photos=3), tmp_path / "index"
        build(photos, index, client)
        seen = []

        def look(_: object) -> None:
            """Search once the new table is complete, just before the switch."""
            seen.append(
                (
                    Gallery(index).version,
                    len(Gallery(index).search(photos / "class 0/0.png", newer)),
                )
            )

        with monkeypatch.context() as patch:
            patch.setattr(building, "index", look)
            assert build(photos, index, newer) == Built(NEW, 6, 6, {})
        assert seen == [(OLD, 5)]
        assert (Gallery(index).version, Gallery(index).manifest_sha256) == (NEW, "f" * 64)
        assert build(photos, index, client) == Built(OLD, 6, 0, {}), "the one before is kept"
        assert Gallery(index).version == OLD

    def test_a_gallery_that_is_open_follows(
        self, client: NpairClient, newer: NpairClient, tmp_path: Path
    ) -> None:
        photos, index = folders(tmp_path / "photos", classes=1, photos=2), tmp_path / "index"
        build(photos, index, client)
        opened = Gallery(index)
        build(photos, index, newer)
        assert len(opened.search(photos / "class 0/0.png", newer)) == 2
        assert opened.version == NEW

    def test_an_open_gallery_tells_that_it_is_stale(
        self, client: NpairClient, newer: NpairClient, tmp_path: Path
    ) -> None:
        photos, index = folders(tmp_path / "photos", classes=1, photos=2), tmp_path / "index"
        for made_by in (client, newer):
            build(photos, index, made_by, prune=True)
            opened = Gallery(index)
            build(photos, index, made_by)
            assert not opened.stale(), "nothing has changed"
            path = photo(photos / "new.png", len(opened))
            build(photos, index, made_by)
            assert opened.stale()
            path.unlink()
        build(photos, index, client, prune=True)
        assert opened.stale()

    def test_unserved(self, client: NpairClient, newer: NpairClient, tmp_path: Path) -> None:
        path = photo(tmp_path / "photos/a.png")
        build(tmp_path / "photos", tmp_path / "index", newer)
        message = (
            f"version {NEW} of model npair is not served, but {OLD} is; build the gallery by that"
            " one: npair index"
        )
        with pytest.raises(GalleryError, match=message):
            Gallery(tmp_path / "index").search(path, client)

    def test_another_version_of_that_number(
        self, client: NpairClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path, index = photo(tmp_path / "photos/a.png"), tmp_path / "index"
        with monkeypatch.context() as patch:
            patch.setattr(NpairClient, "manifest_sha256", lambda *_: "0" * 64)
            build(tmp_path / "photos", index, client)
        with pytest.raises(
            GalleryError, match=f"is of another version {OLD} than is served; build it anew"
        ):
            Gallery(index).search(path, client)
        assert build(tmp_path / "photos", index, client).embedded == 1, (
            "their vectors are not mixed"
        )
        assert len(Gallery(index).search(path, client)) == 1

    def test_half_built_ones_go(
        self, client: NpairClient, newer: NpairClient, tmp_path: Path
    ) -> None:
        photos, index = folders(tmp_path / "photos", classes=1, photos=2), tmp_path / "index"
        building.create(index, ("npair", "0", ""), 128)
        build(photos, index, client)
        build(photos, index, newer)
        assert {path.name.split("-")[1] for path in index.glob("*.lance")} == {OLD, NEW}

    def test_another_model(self, client: NpairClient, tmp_path: Path) -> None:
        path = photo(tmp_path / "photos/a.png")
        build(tmp_path / "photos", tmp_path / "index", client)
        with (
            NpairClient(client.url, model="other") as other,
            pytest.raises(GalleryError, match="is of model npair, not other"),
        ):
            Gallery(tmp_path / "index").search(path, other)


class TestSearch:
    def test_is_exact_where_there_are_few(
        self, made: Gallery, client: NpairClient, dataset: Path
    ) -> None:
        paths = [str(path) for path in labels_of(dataset)]
        vectors, _ = client.embed(paths)
        found = made.nearest(vectors[0], 10)
        expected = np.argsort(-(vectors @ vectors[0]))[:10]
        assert [hit.photo for hit in found] == [paths[number] for number in expected]
        assert [hit.cosine for hit in found] == pytest.approx(
            (vectors @ vectors[0])[expected].tolist(), abs=1e-5
        )

    def test_more_than_there_are(self, made: Gallery, client: NpairClient, dataset: Path) -> None:
        found = made.search(next(iter(labels_of(dataset))), client, k=1000)
        assert sorted(hit.photo for hit in found) == sorted(map(str, labels_of(dataset)))

    def test_hits_lead_to_photos_and_vectors(
        self, made: Gallery, client: NpairClient, dataset: Path
    ) -> None:
        path = next(iter(labels_of(dataset)))
        hit = made.search(path, client, k=1)[0]
        assert hit.columns == {}
        assert made.photo(hit.id) == path
        vectors, _ = client.embed(path)
        assert made.vector(hit.id) == pytest.approx(vectors[0], abs=1e-3)
        assert made.nearest(made.vector(hit.id), 1) == [hit._replace(cosine=pytest.approx(1))]
        assert len(made) == 36
        for unknown in ("0" * 64, "", "' OR '' = '"):
            with pytest.raises(PhotoGoneError, match="has no photo"):
                made.photo(unknown)

    def test_wrong_queries(self, made: Gallery, client: NpairClient, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="k must be at least 1"):
            made.search(SHIPPED / "golden/photo.jpg", client, k=0)
        with pytest.raises(InvalidPhotoError):
            made.search(b"text", client)
        with pytest.raises(FileNotFoundError):
            made.search(tmp_path / "nowhere.jpg", client)

    def test_index_finds_what_comparing_with_all_finds(self, tmp_path: Path) -> None:
        rng = np.random.default_rng(0)
        centres = rng.standard_normal((200, 128), dtype=np.float32)
        vectors = centres[np.arange(6000) % 200] + 1.5 * rng.standard_normal(
            (6000, 128), dtype=np.float32
        )
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        made = building.create(tmp_path, ("npair", "1", "0"), 128)
        rows = [
            {"photo": str(n), "label": str(n % 200), "sha256": "", "vector": vector}
            for n, vector in enumerate(vectors)
        ]
        made.add(rows[:5990])
        building.index(made)
        assert next(iter(made.list_indices())).num_indexed_rows == 5990
        made.add(rows[5990:])
        (tmp_path / "current.json").write_text(json.dumps({"table": made.name}))
        opened, hits = Gallery(tmp_path), 0
        for query in vectors[-50:]:
            exact = set(map(str, np.argsort(-(vectors @ query))[:10]))
            hits += len(exact & {Path(hit.photo).name for hit in opened.nearest(query, 10)})
        assert hits >= 495


def no_pointer(index: Path) -> None:
    (index / "current.json").write_text("{")


def no_table(index: Path) -> None:
    shutil.rmtree(next(index.glob("*.lance")))


def no_data(index: Path) -> None:
    shutil.rmtree(next(index.glob("*.lance")) / "data")


def no_manifest(index: Path) -> None:
    for path in (next(index.glob("*.lance")) / "_versions").iterdir():
        path.write_bytes(path.read_bytes()[:100])


@pytest.mark.parametrize("damage", [no_pointer, no_table, no_data, no_manifest])
def test_damaged(damage: Callable[[Path], None], client: NpairClient, tmp_path: Path) -> None:
    path, index = photo(tmp_path / "photos/a.png"), tmp_path / "index"
    build(tmp_path / "photos", index, client)
    damage(index)
    with pytest.raises(
        GalleryError, match=r"is damaged; delete it, and build it anew: npair index build"
    ):
        Gallery(index).search(path, client)
    shutil.rmtree(index)
    build(tmp_path / "photos", index, client)
    assert len(Gallery(index).search(path, client)) == 1


def test_what_may_not_be_read_is_not_called_damaged(
    made: Gallery, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fake the error, since root may read every file."""

    def refused(_: Path) -> dict[str, str]:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(gallery, "read_pointer", refused)
    with pytest.raises(PermissionError):
        Gallery(made.folder)
