"""Build, interrupt, change, search and damage galleries on the real server."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
import signal
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
from PIL import Image
from support.models import ROOT, SHIPPED
from support.photos import folders, photo, table
from support.servers import running

from npair import cli
from npair.client import Embeddings, InvalidPhotoError, NpairClient, UnavailableError
from npair.data.catalogue import read_catalogue
from npair.gallery import build as building
from npair.gallery.build import Built, build
from npair.gallery.gallery import MOST, Gallery, PhotoGoneError, path_of
from npair.gallery.location import Folder, GalleryError
from npair.gallery.transfer import export_vectors, import_vectors
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


def npair(client: NpairClient, *arguments: object) -> int:
    """Run a command of npair index."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["npair", "index", *map(str, arguments), "--url", client.url])
        return cli.main()


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

    def test_labels_are_stored_as_they_are(
        self, client: NpairClient, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Escapes are for terminals. What is not UTF-8 can be neither stored nor exported."""
        photos, index = tmp_path / "photos", tmp_path / "index"
        labels = ["\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645", "\x1b[31mred", "\udcff"]
        paths = [photo(photos / label / "a.png", number) for number, label in enumerate(labels)]
        build(photos, index, client)
        expected = {*labels[:2], r"\udcff"}
        assert set(stored(index).values()) == expected
        assert npair(client, "search", paths[0], "--index", index) == 0
        said = capsys.readouterr().out
        assert "\x1b" not in said
        assert r"'\x1b[31mred'" in said
        assert export_vectors(index, tmp_path / "out") == 3
        import_vectors(tmp_path / "out", tmp_path / "again")
        hits = Gallery(tmp_path / "again").search(paths[2], client)
        assert {hit.label for hit in hits} == expected
        assert f"{photos}/\\udcff/a.png" in [hit.photo for hit in hits]
        shutil.rmtree(photos / labels[2])
        assert build(photos, index, client).missing == (str(paths[2]),)

    def test_one_at_a_time(self, client: NpairClient, tmp_path: Path) -> None:
        photo(tmp_path / "photos/a.png")
        with (
            FileLock(tmp_path / "build.lock"),
            pytest.raises(GalleryError, match="another process builds"),
        ):
            build(tmp_path / "photos", tmp_path, client)
        assert build(tmp_path / "photos", tmp_path, client).photos == 1


class TestNothingVanishes:
    def test_another_source_does_not_replace_the_first(
        self, client: NpairClient, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """The photos have the same names below their sources, and other bytes."""
        first, index = folders(tmp_path / "first", classes=2, photos=3), tmp_path / "index"
        second = photo(tmp_path / "second/class 0/0.png", 999).parents[1]
        assert npair(client, "build", first, "--index", index) == 0
        assert npair(client, "build", second, "--index", index) == 1
        said = capsys.readouterr()
        assert f"6 photos of the gallery are not in {second}: {first}/class 0/0.png" in said.err
        assert "They stay in the gallery. Bring them back, or remove them: --prune" in said.err
        assert "7 photos in" in said.out
        assert "1 of them now, 0 left out, 6 missing, 0 removed" in said.out
        assert set(stored(index)) == {*map(str, labels_of(first)), *map(str, labels_of(second))}
        assert npair(client, "build", second, "--index", index, "--prune") == 0
        assert "0 left out, 0 missing, 6 removed" in capsys.readouterr().out
        assert set(stored(index)) == set(map(str, labels_of(second)))

    def test_a_folder_that_is_not_mounted(self, client: NpairClient, tmp_path: Path) -> None:
        photos, index = folders(tmp_path / "photos", classes=2, photos=3), tmp_path / "index"
        build(photos, index, client)
        (photos / "class 1").rename(tmp_path / "elsewhere")
        (photos / "class 1").mkdir()
        built = build(photos, index, client)
        assert (built.photos, len(built.missing)) == (6, 3)
        with pytest.raises(PhotoGoneError, match="is gone; put it back"):
            Gallery(index).photo(sha256(tmp_path / "elsewhere/0.png"))
        shutil.rmtree(photos / "class 0")
        with pytest.raises(GalleryError, match="no photos in"):
            build(photos, index, client, prune=True)
        (tmp_path / "elsewhere").replace(photos / "class 1")
        folders(photos, classes=1, photos=3)
        assert build(photos, index, client) == Built(OLD, 6, 0, {})

    def test_a_folder_that_vanishes_meanwhile(
        self, client: NpairClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        photos, index = folders(tmp_path / "photos", classes=2, photos=40), tmp_path / "index"
        build(photos, index, client)
        for path in labels_of(photos):
            photo(path, int(sha256(path)[:4], 16) + 10_000)
        store = building._Update._store

        def unmount(update: Any, vectors: Any) -> None:
            store(update, vectors)
            shutil.rmtree(photos, ignore_errors=True)

        monkeypatch.setattr(building, "ROWS", 4)
        monkeypatch.setattr(building._Update, "_store", unmount)
        with NpairClient(client.url, batch_size=4) as slow:
            built = build(photos, index, slow)
        assert built.photos == 80
        assert 0 < built.embedded < 80
        assert built.embedded + len(built.left_out) == 80
        assert set(built.left_out.values()) == {"cannot be read: No such file or directory"}

    def test_other_formats_are_converted_or_named(
        self, client: NpairClient, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        photos, index = tmp_path / "photos", tmp_path / "index"
        photos.mkdir()
        with Image.open(SHIPPED / "golden/photo.jpg") as image:
            for suffix in ("avif", "bmp", "gif", "tiff"):
                image.save(photos / f"photo.{suffix}")
        assert npair(client, "build", photos, "--index", index) == 0
        found = Gallery(index).search(SHIPPED / "golden/photo.jpg", client)
        assert len(found) == 4
        assert all(hit.cosine > 0.9 for hit in found)
        raw, gone = photos / "a.dng", photos / "b.heic"
        raw.write_bytes(b"raw")
        gone.symlink_to("nowhere")
        capsys.readouterr()
        assert npair(client, "build", photos, "--index", index) == 1
        said = capsys.readouterr()
        assert f"left out: {raw}: neither the server nor this command reads it" in said.err
        assert f"left out: {gone}: cannot be read: No such file or directory" in said.err
        assert "0 of them now, 2 left out" in said.out
        assert npair(client, "search", photos / "photo.tiff", "--index", index, "-k", 1) == 0
        assert f"{photos}/photo." in capsys.readouterr().out
        (bad := tmp_path / "bad.jpg").write_bytes(b"text")
        assert npair(client, "search", bad, "--index", index) == 1
        assert capsys.readouterr().err.startswith(f"npair: {bad}: text, not a JPEG")

    def test_a_version_that_would_lose_photos_is_not_switched_to(
        self, client: NpairClient, newer: NpairClient, tmp_path: Path
    ) -> None:
        photos, index = folders(tmp_path / "photos", classes=2, photos=2), tmp_path / "index"
        build(photos, index, client)
        (photos / "class 1/1.png").unlink()
        with pytest.raises(
            GalleryError, match=r"would lose 1 .* not in the source, such as .*1\.png"
        ):
            build(photos, index, newer)
        photo(photos / "class 1/1.png", 101)
        (spoilt := photos / "class 0/0.png").write_bytes(b"")
        with pytest.raises(GalleryError, match=r"would lose 1 .* left out, such as .*0\.png"):
            build(photos, index, newer)
        assert (Gallery(index).version, len(Gallery(index))) == (OLD, 4)
        built = build(photos, index, newer, prune=True)
        assert (built.version, built.photos, built.embedded, built.removed) == (NEW, 3, 0, 1)
        photo(spoilt, 0)
        (photos / "class 0/1.png").unlink()
        assert build(photos, index, newer).missing == (str(photos / "class 0/1.png"),)
        built = build(photos, index, client)
        assert built.photos == 4, "the version before still has the photo that is missing"
        assert built.missing == (str(photos / "class 0/1.png"),)

    def test_a_full_disk(self, client: NpairClient, tmp_path: Path) -> None:
        if os.geteuid():
            pytest.skip("only root may mount a small disk")
        photos = folders(tmp_path / "photos", classes=10, photos=30)
        (tmp_path / "small").mkdir()
        mount = f'mount -t tmpfs -o size=128k none {tmp_path / "small"} && exec "$@"'
        ended = subprocess.run(
            [
                *("unshare", "--mount", "sh", "-c", mount, "sh"),
                *(sys.executable, "-m", "npair", "index", "build", str(photos)),
                *("--index", str(tmp_path / "small"), "--url", client.url),
            ],
            env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
            capture_output=True,
            text=True,
            check=False,
        )
        assert ended.returncode == 1
        assert "cannot be written: " in ended.stderr
        assert "No space left on device" in ended.stderr
        assert ended.stderr.count("\n") == 1


@pytest.mark.parametrize("command", ["build", "search"])
def test_a_server_that_does_not_answer_is_named_at_once(
    command: str, made: Gallery, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = photo(tmp_path / "photos/a.png")
    source = path.parent if command == "build" else path
    url = "http://127.0.0.1:9"
    with NpairClient(url) as nobody:
        began = time.monotonic()
        assert npair(nobody, command, source, "--index", made.folder, "--wait", 1) == 1
        assert time.monotonic() - began < 5
    *retries, end = capsys.readouterr().err.splitlines()
    assert len(retries) == 1
    assert end.startswith(f"npair: {url}: ")
    assert len(made) == 36


class TestCatalogue:
    def test_columns_come_back(
        self, client: NpairClient, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """One class is enough, and what a table says of a photo costs no vector."""
        paths = [photo(tmp_path / f"photos/{number}.png", number) for number in range(2)]
        copy, index = photo(tmp_path / "photos/copy.png", 0), tmp_path / "index"
        for price, embedded in (("3.50", 3), ("4.00", 0)):
            rows = f"photos/0.png,x,{price}\nphotos/1.png,x,\nphotos/copy.png,y,\n"
            built = build(table(tmp_path, f"path,label,price\n{rows}"), index, client)
            assert (built.photos, built.embedded, built.missing) == (3, embedded, ())
            assert built.contradicting == ((str(paths[0]), str(copy)),)
            hits = Gallery(index).search(paths[0], client)
            assert {hit.photo: hit.columns["price"] for hit in hits} == {
                str(paths[0]): price, str(paths[1]): "", str(copy): ""
            }  # fmt: skip
        assert npair(client, "search", paths[0], "--index", index) == 0
        assert f"  x  {paths[0]}  price=4.00\n" in capsys.readouterr().out
        assert npair(client, "search", paths[0], "--index", index, "--json") == 0
        found = json.loads(capsys.readouterr().out)["found"]
        assert {"price": "4.00"} in [hit["columns"] for hit in found]

    def test_rows_that_are_gone_or_name_no_file(self, client: NpairClient, tmp_path: Path) -> None:
        photos, index = folders(tmp_path / "photos", classes=1, photos=3), tmp_path / "index"
        rows = "".join(f"photos/class 0/{number}.png,x\n" for number in range(3))
        build(table(tmp_path, f"path,label\n{rows}"), index, client)
        rows = "photos/class 0/0.png,x\nphotos/class 0/nowhere.png,x\n"
        built = build(table(tmp_path, f"path,label\n{rows}"), index, client)
        assert built.missing == tuple(str(photos / f"class 0/{number}.png") for number in (1, 2))
        assert list(built.left_out) == [str(photos / "class 0/nowhere.png")]
        assert built.photos == 3


class TestMoved:
    def test_with_its_photos_or_alone(
        self, client: NpairClient, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        folders(tmp_path / "a/photos", classes=1, photos=2)
        rows = "path,label\nphotos/class 0/0.png,x\nphotos/class 0/1.png,x\n"
        build(table(tmp_path / "a", rows), tmp_path / "a/index", client)
        there, expected = tmp_path / "b", tmp_path / "b/photos/class 0/0.png"
        (tmp_path / "a").rename(there)
        digest = sha256(expected)
        assert Gallery(there / "index").photo(digest) == expected
        assert build(there / "photos.csv", there / "index", client).embedded == 0
        alone = (there / "index").rename(tmp_path / "index")
        with pytest.raises(PhotoGoneError, match=r"0\.png is gone"):
            Gallery(alone).photo(digest)
        assert Gallery(alone, there).photo(digest) == expected
        assert npair(client, "search", expected, "--index", alone, "--photos", there, "-k", 1) == 0
        assert str(expected) in capsys.readouterr().out


def test_ctrl_c_keeps_what_was_embedded(client: NpairClient, tmp_path: Path) -> None:
    photos, index = folders(tmp_path / "photos", classes=10, photos=40), tmp_path / "index"
    code = "import sys; from npair import cli; from npair.gallery import build; build.ROWS = 8; "
    process = subprocess.Popen(
        [
            *(sys.executable, "-c", f"{code} sys.exit(cli.main())", "index", "build", str(photos)),
            *("--index", str(index), "--url", client.url),
        ],
        env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
        stderr=subprocess.PIPE,
        text=True,
    )
    while count(index) < 16 and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (130, "")
    assert 16 <= (kept := count(index)) < 400
    assert build(photos, index, client) == Built(OLD, 400, 400 - kept, {})


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

    def test_unserved(self, client: NpairClient, newer: NpairClient, tmp_path: Path) -> None:
        path = photo(tmp_path / "photos/a.png")
        build(tmp_path / "photos", tmp_path / "index", newer)
        message = (
            f"version {NEW} of model npair is not served, but {OLD} is; rebuild the gallery with"
            " the served version: npair index build"
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
            GalleryError, match=f"is of another version {OLD} than is served: .*; build it again"
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
        building.create(Folder(index), ("npair", "0", ""), 128)
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
        found = made.search(next(iter(labels_of(dataset))), client, k=MOST)
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
        assert [found.id for found in made.nearest(made.vector(hit.id), 1)] == [hit.id]
        assert len(made) == 36
        for unknown in ("0" * 64, "", "' OR '' = '"):
            with pytest.raises(PhotoGoneError, match="has no photo"):
                made.photo(unknown)

    def test_wrong_queries(self, made: Gallery, client: NpairClient, tmp_path: Path) -> None:
        for k in (0, MOST + 1, 1 << 32):
            with pytest.raises(ValueError, match=f"k must be 1 to {MOST}, got {k}"):
                made.search(SHIPPED / "golden/photo.jpg", client, k=k)
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
        made = building.create(Folder(tmp_path), ("npair", "1", "0"), 128)
        rows = [
            {
                "photo": str(n),
                "label": str(n % 200),
                "columns": "{}",
                "sha256": "",
                "vector": vector,
            }
            for n, vector in enumerate(vectors)
        ]
        made.add(rows[:5990])
        building.index(made)
        assert next(iter(made.list_indices())).num_indexed_rows == 5990
        made.add(rows[5990:])
        (tmp_path / "current.json").write_text(json.dumps({"table": made.name, "photos": ""}))
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
        GalleryError, match=r"is damaged; delete it, and build it again: npair index build"
    ):
        Gallery(index).search(path, client)
    shutil.rmtree(index)
    build(tmp_path / "photos", index, client)
    assert len(Gallery(index).search(path, client)) == 1


def test_what_may_not_be_read_is_not_called_damaged(
    made: Gallery, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fake the error, since root may read every file."""

    def refused(_: Folder) -> dict[str, str]:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Folder, "pointer", refused)
    with pytest.raises(PermissionError):
        Gallery(made.folder)
