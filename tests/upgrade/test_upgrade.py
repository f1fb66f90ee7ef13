"""What docs/upgrading.md promises, between this checkout and an earlier one: make test-upgrade.

The earlier ones are the newest release before this commit, or REVISIONS. Their code and models come
out of git, and run in this environment.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from support import releases
from support.models import ROOT, SHIPPED
from support.servers import free_ports, lines_until_ready, running

from npair.client import NpairClient


def git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def revisions() -> list[str]:
    if given := os.environ.get("REVISIONS", "").split():
        return given
    merged = ("--sort=-version:refname", "--merged", "HEAD", "--no-contains", "HEAD")
    return [tag for tag in git("tag", *merged, "v*").split() if "rc" not in tag][:1]


@dataclass(frozen=True)
class Earlier:
    """An earlier checkout, with the version that it serves."""

    root: Path

    @property
    def shipped(self) -> Path:
        return next((self.root / "model_repository/npair").glob("[0-9]*"))

    def run(self, *arguments: str | Path, **variables: str) -> str:
        environment = os.environ | {"PYTHONPATH": f"{self.root / 'src'}"} | variables
        words = [str(part) for part in (sys.executable, *arguments)]
        done = subprocess.run(
            words, cwd=self.root, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    @contextlib.contextmanager
    def server(self) -> Iterator[str]:
        """Start its own serve.py. Yields: the URL."""
        ports = free_ports()
        command = [sys.executable, str(self.root / "model/api/serve.py")]
        environment = os.environ | ports
        with subprocess.Popen(
            command, cwd=self.root, env=environment, stderr=subprocess.PIPE, text=True
        ) as process:
            try:
                lines_until_ready(process)
                yield f"http://127.0.0.1:{ports['HTTP_PORT']}"
            finally:
                process.terminate()


@pytest.fixture(scope="module", params=revisions() or [""], ids=lambda name: name or "none")
def earlier(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Earlier:
    if not request.param:
        pytest.skip("there is no release before this commit: name some in REVISIONS")
    folder = tmp_path_factory.mktemp("earlier")
    archive = ["git", "archive", request.param, "src", "model", "model_repository"]
    with subprocess.Popen(archive, cwd=ROOT, stdout=subprocess.PIPE) as packed:
        subprocess.run(["tar", "--extract"], cwd=folder, stdin=packed.stdout, check=True)
    assert packed.returncode == 0
    return Earlier(folder)


@pytest.fixture(scope="module")
def served(earlier: Earlier) -> Iterator[str]:
    """Serve the earlier version by this checkout's serve.py. Yields: the URL."""
    with running(MODEL_REPOSITORY=str(earlier.shipped.parents[1])) as (_, urls):
        yield urls["http"]


def photos(version: Path) -> list[Path]:
    return sorted((version / "golden").glob("*.[jpw]*g*"))


def distances(embedded: npt.NDArray[Any], version: Path) -> npt.NDArray[Any]:
    """Get how far embeddings of golden photos are from the version's, in parts of what may be."""
    manifest = json.loads((version / "manifest.json").read_text())["golden"]
    names = [Path(name).name for name in manifest["photos"]]
    expected = np.load(version / manifest["embeddings"])
    order = [names.index(path.name) for path in photos(version)]
    away = np.linalg.norm(embedded - expected[order], axis=1)
    return np.asarray(away / manifest["tolerance"])


def npair(*arguments: str | Path, **variables: str) -> str:
    command = [sys.executable, "-m", "npair", *map(str, arguments)]
    done = subprocess.run(
        command, env=os.environ | variables, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_earlier_client_and_this_server(earlier: Earlier) -> None:
    code = (
        "import json, sys; from client import NpairClient\n"
        "with NpairClient(sys.argv[1]) as client:\n"
        "    embedded = client.embed(sys.argv[2:])\n"
        "print(json.dumps([embedded.version, embedded.vectors.tolist()]))"
    )
    with running() as (_, urls):
        for url in urls.values():
            printed = earlier.run(
                "-c", code, url, *photos(SHIPPED), PYTHONPATH=str(earlier.root / "model/api")
            )
            version, vectors = json.loads(printed)
            assert version == SHIPPED.name
            assert (distances(np.array(vectors), SHIPPED) <= 1).all()


def test_this_client_and_the_earlier_server(earlier: Earlier) -> None:
    with earlier.server() as url, NpairClient(url) as client:
        embedded = client.embed(photos(earlier.shipped))
        assert embedded.version == earlier.shipped.name
        assert (distances(embedded.vectors, earlier.shipped) <= 1).all()
        assert client.thresholds() is not None


def test_the_earlier_version_of_the_model(earlier: Earlier, served: str) -> None:
    """It is checked and served as it was published."""
    verified = npair("verify", "--repository", earlier.shipped.parent, "--url", served)
    assert "golden set off by" in verified
    with NpairClient(served) as client:
        embedded = client.embed(photos(earlier.shipped))
    assert (distances(embedded.vectors, earlier.shipped) <= 1).all()


def test_promotion_and_rollback(earlier: Earlier, tmp_path: Path) -> None:
    """A server changes from the earlier version to this one and back, while it runs."""
    old, new = earlier.shipped, SHIPPED
    if old.name == new.name:
        pytest.skip("both serve the same version of the model")
    model = tmp_path / "npair"
    shutil.copytree(old.parent, model)
    shutil.copytree(new, model / new.name)
    secret = {"NPAIR_CONTROL_SECRET": releases.SECRET}
    with running(MODEL_REPOSITORY=str(tmp_path), **secret) as (_, urls):
        place = ("--repository", model, "--url", urls["http"])
        with NpairClient(urls["http"]) as client:
            for command, version in ((("promote", new.name), new), (("rollback",), old)):
                npair(*command, *place, **secret)
                embedded = client.embed(photos(version))
                assert embedded.version == version.name
                assert (distances(embedded.vectors, version) <= 1).all()


def test_the_earlier_gallery(earlier: Earlier, served: str, tmp_path: Path) -> None:
    """It is searched as it is, and built on without embedding again."""
    folder, gallery = tmp_path / "photos", tmp_path / "gallery"
    for path in photos(earlier.shipped):
        (folder / path.stem).mkdir(parents=True)
        shutil.copy(path, folder / path.stem)
    place = ("--index", gallery, "--url", served)
    earlier.run("-c", "from npair.cli import main; main()", "index", "build", folder, *place)
    query = folder / "photo/photo.jpg"
    before = npair("index", "search", query, *place)
    assert before.splitlines()[0].split()[1] == "photo"
    assert " 0 of them now" in npair("index", "build", folder, *place)
    assert npair("index", "search", query, *place).splitlines()[0] == before.splitlines()[0]


def test_saved_vectors(earlier: Earlier, served: str, tmp_path: Path) -> None:
    """What the earlier client has saved, this one ranks."""
    saved = tmp_path / "saved.npz"
    client = earlier.root / "model/api/client.py"
    folder = earlier.shipped / "golden"
    earlier.run(client, "embed", *photos(earlier.shipped), "--out", saved, "--url", served)
    ranked = npair("rank", folder / "photo.jpg", saved, "--url", served)
    assert "photo.jpg" in ranked.splitlines()[0]
