"""Run bulk jobs on a real Ray: killed and continued, over S3, of versions that must not run."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import s3fs
from supervisor import procfs
from support.models import SHIPPED, rewrite_manifest
from support.photos import PNG
from support.s3 import moto

from npair.bulk import BulkError
from npair.bulk.job import cluster, run
from npair.bulk.lists import open_source
from npair.bulk.output import Output
from npair.bulk.schema import schema
from npair.releasing.verify import published_code
from npair.serving.manifest import Manifest
from npair.serving.preprocess import Limits

GOLDEN = SHIPPED / "golden/photo.jpg"
PHOTOS, ROWS = 24, 4


def command(photos: object, out: object, *options: str, version: object = SHIPPED) -> list[str]:
    words = ("bulk", str(photos), "--version", str(version), "--out", str(out), "--rows", str(ROWS))
    return [sys.executable, "-m", "npair", *words, "--actors", "1", *options]


def family(pid: int) -> list[int]:
    """List a process and its descendants."""
    try:
        children = procfs.children(pid)
    except OSError:
        return []
    return [pid, *(below for child in children for below in family(child))]


def kill(process: subprocess.Popen[str]) -> None:
    """Kill a job with all processes of its Ray, at once."""
    for pid in family(process.pid):
        os.kill(pid, signal.SIGKILL)
    process.wait()


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write copies of a photo and two files that are none."""
    folder = tmp_path_factory.mktemp("photos")
    for number in range(PHOTOS - 2):
        shutil.copy(GOLDEN, folder / f"{number:02}.jpg")
    (folder / "empty.png").touch()
    (folder / "text.jpg").write_text("no photo")
    return folder


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    with moto():
        s3fs.S3FileSystem(skip_instance_cache=True).mkdir("bucket")
        yield "s3://bucket"


def test_killed_and_continued(photos: Path, bucket: str) -> None:
    store = s3fs.S3FileSystem(skip_instance_cache=True, use_listings_cache=False)
    store.put(str(photos), "bucket/photos", recursive=True)
    out = f"{bucket}/out"
    process = subprocess.Popen(command(f"{bucket}/photos", out), text=True)
    while len(store.glob(f"{out}/part-*.parquet")) < 2:
        assert process.poll() is None
        time.sleep(0.05)
    kill(process)
    done = subprocess.run(
        command(f"{bucket}/photos", out, "--json"), check=True, capture_output=True, text=True
    )
    assert done.stderr.strip().endswith("of s3://bucket/out are done; continuing"), done.stderr
    told = json.loads(done.stdout)
    assert (told["rows"], told["refused"]) == (PHOTOS, 2)
    assert 0 < told["now"]["photos"] <= PHOTOS - 2 * ROWS
    assert not store.exists("bucket/out/_unfinished")
    check_rows("bucket/out", store)
    again = subprocess.run(
        command(f"{bucket}/photos", out), check=True, capture_output=True, text=True
    )
    assert "24 rows in s3://bucket/out" in again.stdout


def test_an_actor_that_dies(photos: Path, tmp_path: Path) -> None:
    """Another takes its piece. No worker of Ray takes cores from actors for reading or writing."""
    out = tmp_path / "out"
    process = subprocess.Popen(command(photos, out, "--json"), stdout=subprocess.PIPE, text=True)
    while not list(out.glob("part-*.parquet")):
        assert process.poll() is None
        time.sleep(0.05)
    titles = {pid: Path(f"/proc/{pid}/cmdline").read_text() for pid in family(process.pid)}
    workers = {pid: title for pid, title in titles.items() if title.startswith("ray::")}
    (actor,) = (pid for pid, title in workers.items() if "MapWorker" in title)
    os.kill(actor, signal.SIGKILL)
    told = json.loads(process.communicate()[0])
    assert (process.returncode, told["rows"], told["refused"]) == (0, PHOTOS, 2)
    assert len(workers) <= 6, "the actor, three of Ray Data, and Ray's two agents of a node"


def test_a_local_ray_whatever_the_environment_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with cluster(None, 1) as actors:
        assert actors == 1


def test_requests_to_the_store(bucket: str, caplog: pytest.LogCaptureFixture) -> None:
    """Count what docs/scale.md reckons with: two for a path, two for a shard of a thousand."""
    store = s3fs.S3FileSystem(skip_instance_cache=True)
    shard = io.BytesIO()
    with tarfile.open(fileobj=shard, mode="w") as tar:
        for number in range(1000):
            member = tarfile.TarInfo(f"{number}.png")
            member.size = len(PNG)
            tar.addfile(member, io.BytesIO(PNG))
    store.pipe({"bucket/one/1.png": PNG, "bucket/shards/1.tar": shard.getvalue()})
    for name, photos in {"one": 1, "shards": 1000}.items():
        source = open_source(f"{bucket}/{name}")
        (piece,) = source.pieces(ROWS)
        caplog.clear()
        with caplog.at_level("INFO", logger="werkzeug"):
            assert len(list(source.photos(piece.content, 10**6))) == photos
        methods = [re.findall("HEAD|GET|PUT|POST", line)[0] for line in caplog.messages]
        assert methods == ["HEAD", "GET"]


def check_rows(out: str, store: s3fs.S3FileSystem) -> None:
    """Compare rows with what the version's own code says of the same photos."""
    table = pq.read_table(out, filesystem=store).sort_by("id")
    manifest = Manifest.read(SHIPPED)
    assert table.schema.equals(schema(128, "fp32"))
    assert table["id"].to_pylist() == [*(f"{n:02}.jpg" for n in range(22)), "empty.png", "text.jpg"]
    assert table["version"].unique().to_pylist() == [manifest.version]
    with published_code(SHIPPED) as code:
        embedder = code.Embedder(SHIPPED, cores=1)
        contents = [GOLDEN.read_bytes(), b"", b"no photo"]
        vector, *refusals = embedder.embed_photos(contents, Limits(10**9, 10**9))
    assert table["reason"].to_pylist() == [None] * 22 + list(map(str, refusals))
    vectors = np.array(table["vector"].to_pylist(), np.float32)
    assert np.abs(vectors[:22] - vector).max() < 1e-6
    assert not vectors[22:].any()


def test_a_version_that_fails_its_golden_set(photos: Path, tmp_path: Path) -> None:
    version = tmp_path / "1"
    shutil.copytree(SHIPPED, version, ignore=shutil.ignore_patterns("__pycache__"))
    manifest = Manifest.read(version)
    vectors = np.load(version / manifest.golden.embeddings)
    np.save(version / manifest.golden.embeddings, vectors[:, ::-1])
    manifest.write(version)
    done = subprocess.run(
        command(photos, tmp_path / "out", version=version),
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert "cannot run the version: " in done.stderr
    assert "golden embeddings differ by" in done.stderr


def begun(photos: Path, out: Path, **changes: Any) -> None:
    """Begin an output as a job does that is killed before its first piece is written."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("npair.bulk.job.cluster", None)
        with pytest.raises(TypeError):
            run(str(photos), str(SHIPPED), str(out), **changes)


def test_outputs_are_not_mixed(photos: Path, tmp_path: Path) -> None:
    out, other, served = tmp_path / "out", tmp_path / "other", int(SHIPPED.name)
    begun(photos, out)
    shutil.copytree(SHIPPED, other, ignore=shutil.ignore_patterns("__pycache__"))
    rewrite_manifest(other, version=served + 1)
    (tmp_path / "others").mkdir()
    (tmp_path / "others/1.png").write_bytes(PNG)
    for (named, version), reason in [
        ((photos, other), rf"holds vectors of version {served} .* not of version {served + 1} "),
        ((tmp_path / "others", SHIPPED), f"is unfinished, with the list {photos};"),
    ]:
        with pytest.raises(BulkError, match=reason):
            run(str(named), str(version), str(out))
    with pytest.raises(BulkError, match=r"is unfinished, in fp32; .* --precision fp32"):
        run(str(photos), str(SHIPPED), str(out), precision="fp16")
    shutil.rmtree(Output(str(out)).state)
    with pytest.raises(BulkError, match=r"is unfinished, but has no _unfinished; delete"):
        run(str(photos), str(SHIPPED), str(out))


def test_files_that_come_later(photos: Path, tmp_path: Path) -> None:
    """A job that was cut from shards goes on with shards, and ends if there are none any more."""
    shards, out = tmp_path / "shards", tmp_path / "out"
    shards.mkdir()
    with tarfile.open(shards / "1.tar", "w") as tar:
        tar.add(GOLDEN, "1.jpg")
    begun(shards, out)
    shutil.copy(GOLDEN, shards / "a.jpg")
    begun(shards, out)
    (shards / "1.tar").unlink()
    with pytest.raises(BulkError, match=r"is unfinished, .*, which has changed since"):
        run(str(shards), str(SHIPPED), str(out))
    with pytest.raises(BulkError, match="lies in the list"):
        run(str(photos), str(SHIPPED), str(photos / "out"))


def test_what_cannot_be_used(photos: Path, tmp_path: Path, bucket: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "version").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full/notes.txt").touch()
    damaged = tmp_path / "damaged"
    shutil.copytree(SHIPPED, damaged, ignore=shutil.ignore_patterns("__pycache__"))
    (damaged / "network.bin").write_bytes(b"")
    out = tmp_path / "out"
    for (named, version, place), reason in [
        ((tmp_path / "empty", SHIPPED, out), "does not exist, or holds no photos"),
        ((tmp_path / "missing", SHIPPED, out), "does not exist, or holds no photos"),
        ((photos, tmp_path / "version", out), "is no version's folder: it has no manifest.json"),
        ((photos, damaged, out), r"network.bin has changed since it was published"),
        ((photos, SHIPPED, tmp_path / "full"), "holds notes.txt, which npair bulk has not written"),
        ((photos, SHIPPED, bucket), "is a bucket; name a folder in it"),
        ((photos, SHIPPED, "s3://nowhere/out"), "there is no bucket nowhere"),
        ((photos, SHIPPED, "ftp://host/out"), "ftp://host/out cannot be used"),
    ]:
        with pytest.raises(BulkError, match=reason):
            run(str(named), str(version), str(place))
