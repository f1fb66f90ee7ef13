"""Build and search a gallery on a real S3 server, from several processes at once."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import s3fs
from support.models import ROOT, SHIPPED
from support.s3 import in_place_of_aws, seaweed
from support.servers import free_ports, running
from support.vectors import bulk_file, units

from npair import cli
from npair.client import NpairClient
from npair.gallery import lease
from npair.gallery.build import build
from npair.gallery.gallery import Gallery
from npair.gallery.location import Bucket, GalleryError, GalleryStoreError
from npair.gallery.transfer import export_vectors, import_vectors
from npair.releasing.config import with_release
from npair.releasing.release import client_parameters
from npair.serving.manifest import Manifest

OLD, NEW = int(SHIPPED.name), int(SHIPPED.name) + 1
ROLLED = """

_unit = unit


def unit(embeddings):
    return np.roll(_unit(embeddings), 1, axis=1)
"""
SEARCHER = """
import json, sys
from pathlib import Path
from npair.client import NpairClient
from npair.gallery.gallery import Gallery
index, url, photo, refresh = sys.argv[1:]
with NpairClient(url) as client:
    opened = Gallery(index, refresh=float(refresh))
    while True:
        hit = opened.search(Path(photo), client, 1)[0]
        print(json.dumps([opened.version, hit.cosine, hit.photo]), flush=True)
"""
HOLDER = """
import sys, time
from npair.gallery import lease
from npair.gallery.location import Bucket
lease.BEAT, lease.EXPIRY = 0.2, 2.0
bucket = Bucket(sys.argv[1])
with bucket.exclusive():
    print("held", flush=True)
    while True:
        time.sleep(0.1)
        bucket.check()
"""


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Start an S3 server that replaces AWS in this process and its children; yield a bucket."""
    with (
        seaweed(tmp_path_factory.mktemp("seaweed")) as environment,
        in_place_of_aws(environment),
    ):
        s3fs.S3FileSystem(skip_instance_cache=True).mkdir("bucket")
        yield "s3://bucket"


@pytest.fixture
def index(bucket: str, request: pytest.FixtureRequest) -> str:
    return f"{bucket}/{request.node.originalname}"


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "BEAT", 0.2)
    monkeypatch.setattr(lease, "EXPIRY", 2.0)


def started(code: str, *arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline()


def npair(*arguments: object) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["npair", "index", *map(str, arguments)])
        return cli.main()


@pytest.fixture(scope="module")
def two_versions(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Serve the shipped version, and the next one, whose vectors are those of the first, rolled.

    A search that mixes them finds nothing that resembles its query.
    """
    models = tmp_path_factory.mktemp("models")
    shipped = ROOT / "model_repository/npair"
    compiled = shutil.ignore_patterns("__pycache__")
    model = Path(shutil.copytree(shipped, models / "npair", ignore=compiled))
    newer = Path(shutil.copytree(model / str(OLD), model / str(NEW)))
    with (newer / "embedder.py").open("a") as code:
        code.write(ROLLED)
    manifest = Manifest.read(newer)
    manifest.version = NEW
    golden = newer / manifest.golden.embeddings
    np.save(golden, np.roll(np.load(golden), 1, axis=1))
    manifest.write(newer)
    values = client_parameters((newer / "manifest.json").read_bytes())
    before = client_parameters((model / str(OLD) / "manifest.json").read_bytes())
    values[f"manifest_sha256_{OLD}"] = before["manifest_sha256"]
    config = (model / "config.pbtxt").read_text()
    (model / "config.pbtxt").write_text(with_release(config, [OLD, NEW], values))
    with running(MODEL_REPOSITORY=str(models)) as (_, urls):
        yield urls["grpc"]


def test_two_search_while_a_third_builds_for_another_version(
    index: str, two_versions: str, dataset: Path
) -> None:
    """Each answer has the photo itself on top, so that no query meets another version's vectors."""
    photo = min(dataset.rglob("*.jpg"))
    with NpairClient(two_versions) as newer, newer.copy() as older:
        older.version = str(OLD)
        assert newer.embed(photo).vectors[0] @ older.embed(photo).vectors[0] < 0.9
        assert build(dataset, index, older).version == str(OLD)
        searchers = [started(SEARCHER, index, two_versions, photo, refresh) for refresh in (0, 1)]
        try:
            first = [json.loads(line(searcher)) for searcher in searchers]
            built = [build(dataset, index, client) for client in (newer, older, newer)]
            time.sleep(3)
        finally:
            for searcher in searchers:
                searcher.send_signal(signal.SIGINT)
            ended = [searcher.communicate(timeout=60) for searcher in searchers]
    assert [(each.version, each.embedded) for each in built] == [
        (str(NEW), built[0].photos),
        (str(OLD), 0),
        (str(NEW), 0),
    ]
    for before, (out, said) in zip(first, ended, strict=True):
        answers = [before, *(json.loads(answer) for answer in out.splitlines())]
        assert said.splitlines()[-1:] == ["KeyboardInterrupt"], said
        assert min(cosine for _, cosine, _ in answers) > 0.99
        assert {found for _, _, found in answers} == {str(photo)}
        assert answers[0][0] == str(OLD)
        assert answers[-1][0] == str(NEW)


def test_built_changed_and_searched_from_the_command_line(
    index: str, two_versions: str, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = Path(shutil.copytree(dataset / "train", tmp_path / "photos"))
    options = ("--index", index, "--url", two_versions)
    assert npair("build", photos, *options) == 0
    assert f"photos in {index}, embedded by version {NEW}" in capsys.readouterr().out
    path = min(photos.rglob("*.jpg"))
    assert npair("search", path, "-k", 1, *options) == 0
    assert capsys.readouterr().out.startswith("1.0000  ")
    moved = photos.rename(tmp_path / "moved")
    path = moved / path.relative_to(photos)
    assert npair("search", path, "-k", 1, "--photos", moved, *options) == 0
    assert str(path) in capsys.readouterr().out
    path.unlink()
    assert npair("build", moved, "--prune", *options) == 0
    assert "0 of them now, 0 left out, 0 missing, 1 removed" in capsys.readouterr().out


class TestBuilders:
    @pytest.mark.usefixtures("quick")
    def test_one_at_a_time(self, index: str, tmp_path: Path) -> None:
        bulk_file(tmp_path / "part-0.parquet", units(3))
        holder = started(HOLDER, index)
        assert line(holder) == "held\n"
        named = rf"process {holder.pid}, since 20\S+ builds the gallery in {index}; wait for it"
        with pytest.raises(GalleryError, match=named):
            import_vectors(tmp_path, index)
        holder.send_signal(signal.SIGINT)
        holder.wait(timeout=30)
        began = time.monotonic()
        assert import_vectors(tmp_path, index).photos == 3
        assert time.monotonic() - began < 30, "it was freed, and not waited for"
        holder.communicate()

    @pytest.mark.usefixtures("quick")
    def test_a_killed_one_is_replaced_and_a_suspended_one_knows(
        self, index: str, tmp_path: Path
    ) -> None:
        bulk_file(tmp_path / "part-0.parquet", units(3))
        for ending in (signal.SIGKILL, signal.SIGSTOP):
            holder = started(HOLDER, index)
            assert line(holder) == "held\n"
            holder.send_signal(ending)
            assert import_vectors(tmp_path, index).photos == 3
            holder.send_signal(signal.SIGCONT)
            _, said = holder.communicate(timeout=30)
        assert "this process did not renew" in said.splitlines()[-1]
        assert import_vectors(tmp_path, index).photos == 3, "what woke up took nothing back"

    def test_of_many_one_switches(self, index: str) -> None:
        places = [Bucket(index) for _ in range(8)]
        for turn in range(5):
            tag = places[0].tag()

            def switched(number: int, tag: str | None = tag, turn: int = turn) -> bool:
                try:
                    places[number].switch({"table": f"{turn}-{number}"}, tag)
                except GalleryError as error:
                    assert "another process has built the gallery in" in str(error)  # noqa: PT017
                    return False
                return True

            with ThreadPoolExecutor(len(places)) as threads:
                won = list(threads.map(switched, range(len(places))))
            assert won.count(True) == 1
            assert places[0].pointer() == {"table": f"{turn}-{won.index(True)}"}

    def test_a_lost_answer_is_no_defeat(self, index: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """The first put succeeds, so the store rejects the library's repetition."""
        place, ask = Bucket(index), Bucket._ask

        def twice(self: Bucket, operation: str, *arguments: object, **options: object) -> object:
            if arguments[:1] == ("put_object",):
                ask(self, operation, *arguments, **options)
            return ask(self, operation, *arguments, **options)

        monkeypatch.setattr(Bucket, "_ask", twice)
        for table in ("a", "b"):
            place.switch({"table": table}, place.tag())
            assert place.pointer() == {"table": table}


def test_versions_of_bulk_through_the_store(index: str, bucket: str, tmp_path: Path) -> None:
    bulk_file(tmp_path / "part-0.parquet", units(50), refused=1)
    assert import_vectors(tmp_path, index).photos == 50
    assert export_vectors(index, f"{bucket}/parts") == 50
    assert import_vectors(f"{bucket}/parts", f"{index}-copy").photos == 50
    opened = Gallery(index, refresh=3600)
    assert opened.nearest(units(50)[7], 1)[0].photo == "photos/class 1/7.jpg"
    bulk_file(tmp_path / "part-0.parquet", units(4), version=14)
    with pytest.raises(GalleryError, match="do not mix"):
        import_vectors(tmp_path, index)
    import_vectors(tmp_path, index, switch=True)
    assert not opened.follow(), "looked for within the hour"
    assert opened.follow(now=True)
    assert (opened.version, len(opened)) == ("14", 4)


def no_credentials(patch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        patch.delenv(name)
    patch.setenv("AWS_EC2_METADATA_DISABLED", "true")


def nobody_listens(patch: pytest.MonkeyPatch) -> None:
    patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_ports()['HTTP_PORT']}")


@pytest.mark.parametrize(
    ("place", "spoil", "reason"),
    [
        (
            "s3://no-such-bucket/gallery",
            lambda _: None,
            "there is no bucket no-such-bucket at http",
        ),
        ("s3://bucket/nothing", lambda _: None, "there is no gallery in s3://bucket/nothing"),
        ("gs://bucket/gallery", lambda _: None, "is neither a folder nor s3://BUCKET/PREFIX"),
        ("s3://", lambda _: None, "is neither a folder nor s3://BUCKET/PREFIX"),
        (
            "s3://bucket/gallery",
            lambda patch: patch.setenv("AWS_SECRET_ACCESS_KEY", "wrong"),
            "refuses: .*; see AWS_ACCESS_KEY_ID",
        ),
        ("s3://bucket/gallery", no_credentials, "cannot be reached: Unable to locate credentials"),
        ("s3://bucket/gallery", nobody_listens, "cannot be reached: Could not connect to"),
    ],
)
def test_what_is_wrong_is_said_at_once(
    bucket: str,
    place: str,
    spoil: Callable[[pytest.MonkeyPatch], None],
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert bucket
    spoil(monkeypatch)
    began = time.monotonic()
    with in_place_of_aws({}), pytest.raises(GalleryError, match=reason):
        Gallery(place)
    assert time.monotonic() - began < 30


def test_a_store_that_goes_away(tmp_path: Path) -> None:
    bulk_file(tmp_path / "bulk/part-0.parquet", units(3))
    (tmp_path / "store").mkdir()
    with seaweed(tmp_path / "store") as environment, in_place_of_aws(environment):
        s3fs.S3FileSystem(skip_instance_cache=True).mkdir("bucket")
        import_vectors(tmp_path / "bulk", "s3://bucket/gallery")
        opened = Gallery("s3://bucket/gallery", refresh=0)
        assert opened.nearest(units(3)[0], 1)
    with pytest.raises(GalleryStoreError, match="cannot be reached"):
        opened.nearest(units(3)[0], 1)
