from __future__ import annotations

import io
import shutil
import tarfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from npair.data.dataset import DataError
from npair.data.grocery import COMMIT, GROCERY, Release, fetch_grocery
from npair.data.sources import read_dataset
from npair.publishing.drawings import write_dataset


@dataclass
class Host:
    """A server of one archive, which stops after ``sent`` bytes unless that is None."""

    release: Release
    archive: bytes
    sent: int | None = None


def packed(folder: Path, **other: bytes) -> bytes:
    """Pack a folder as GitHub packs a repository, and add other members."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        archive.add(folder, "GroceryStoreDataset-abc")
        link = tarfile.TarInfo("GroceryStoreDataset-abc/link")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
        for name, content in other.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    root = tmp_path / "repository"
    write_dataset(root / "dataset", products=3, train=2, val=1, size=24)
    shutil.copy(root / "dataset/train.txt", root / "dataset/test.txt")
    (root / "LICENSE").write_text("MIT")
    dataset = read_dataset(root)
    known = replace(dataset, splits={split: dataset.splits[split] for split in ("train", "val")})
    host = Host(Release("", {"train": 6, "val": 3, "test": 6}, known.fingerprint()), packed(root))

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(host.archive)))
            self.end_headers()
            self.wfile.write(host.archive[: host.sent])

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        host.release = replace(host.release, url=f"http://127.0.0.1:{server.server_port}/archive")
        yield host
        server.shutdown()
        thread.join()


def test_fetches_once_and_checks_what_is_there(
    host: Host, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "data/grocery"
    assert fetch_grocery(folder, host.release) == folder
    assert len(read_dataset(folder).train) == 6
    assert {path.name for path in folder.iterdir()} == {"dataset", "LICENSE"}
    assert [path.name for path in folder.parent.iterdir()] == ["grocery"]
    fetch_grocery(folder, replace(host.release, url="http://127.0.0.1:1"))
    assert "already holds" in capsys.readouterr().err
    (folder / "dataset/train/product-0/0.jpg").write_bytes(b"changed")
    with pytest.raises(
        DataError, match="photos or labels that are not the data set's; move it away"
    ):
        fetch_grocery(folder, host.release)


def test_refuses_other_photos(host: Host, tmp_path: Path) -> None:
    for release, reason in (
        (replace(host.release, fingerprint="0" * 64), "photos or labels that are not"),
        (replace(host.release, photos=GROCERY.photos), r"instead of \{'train': 2640"),
    ):
        with pytest.raises(DataError, match=reason):
            fetch_grocery(tmp_path / "grocery", release)
    assert [path.name for path in tmp_path.iterdir()] == ["repository"]


@pytest.mark.parametrize("share", [0, 0.001, 0.5, 0.8])
def test_an_interrupted_download_leaves_nothing(host: Host, tmp_path: Path, share: float) -> None:
    host.sent = int(share * len(host.archive))
    reason = "could not be fetched from .* try again, or fetch it by hand: git clone https://github"
    with pytest.raises(DataError, match=reason):
        fetch_grocery(tmp_path / "grocery", host.release)
    assert [path.name for path in tmp_path.iterdir()] == ["repository"]


@pytest.mark.parametrize("archive", [b"", b"<html>", b"\x1f\x8b\x08 garbage"])
def test_refuses_what_is_no_archive(host: Host, tmp_path: Path, archive: bytes) -> None:
    host.archive = archive
    with pytest.raises(DataError, match="could not be fetched"):
        fetch_grocery(tmp_path / "grocery", host.release)


def test_writes_nothing_outside_of_the_folder(host: Host, tmp_path: Path) -> None:
    host.archive = packed(tmp_path / "repository", **{"top/../../../outside": b"hostile"})
    with pytest.raises(DataError, match="outside of the folder"):
        fetch_grocery(tmp_path / "deep/grocery", host.release)
    assert not list(tmp_path.rglob("outside"))


def test_says_what_to_do_without_a_network(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=rf"127.0.0.1:1 .*refused.* git -C .*grocery checkout {COMMIT}"
    ):
        fetch_grocery(tmp_path / "grocery", replace(GROCERY, url="http://127.0.0.1:1"))
    assert not list(tmp_path.iterdir())
