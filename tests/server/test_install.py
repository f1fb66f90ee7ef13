"""Build the wheel, install it with each extra into a clean environment, and run its commands."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from http.server import HTTPServer, SimpleHTTPRequestHandler
from pathlib import Path

import pytest
import s3fs
from support import architectures
from support.commands import commands
from support.models import ROOT, SHIPPED
from support.s3 import environment_of, moto
from support.servers import running

import npair

BIN = Path(sys.executable).parent
REPOSITORY = SHIPPED.parent
TRAIN = "train --data {dataset} --run {run} --epochs 1 --size 64 --crop-size 48 --network"
# For each extra, a command that needs it, and its output once the extra is installed.
CALLS = {
    "evaluate": ("evaluate --data {dataset} --url {url} --report x.html", "report: x.html"),
    "release": ("verify --repository {repository}", "golden set off by"),
    "tune": ("tune --data {dataset} --picture x.svg", "starts servers by serve.py of a checkout"),
    "train": (f"{TRAIN} compact", "report: of-train/report.html"),
    "pretrained": (f"{TRAIN} {{checkpoint}}", "report: of-pretrained/report.html"),
    "index": ("index build {dataset}/train --url {url}", "24 photos in gallery"),
    "s3": ("versions --offline --repository s3://bucket/models/npair", "* pinned by config.pbtxt"),
    "gs": ("versions --offline --repository gs://bucket/models/npair", "it has no config.pbtxt"),
}
# No command needs one of these alone; make test-bulk tries the last.
OTHERS = {"dev", "photos", "heic", "web", "bulk"}
# Extras that share an environment, since each brings what the ones before it lack.
TOGETHER = [
    ("evaluate",),
    ("release",),
    ("tune",),
    ("train", "pretrained"),
    ("index",),
    ("s3", "gs"),
]

Result = subprocess.CompletedProcess[str]


class Environment:
    """A virtual environment with the wheel. Commands run in the folder ``here``."""

    def __init__(self, folder: Path, here: Path, wheel: Path) -> None:
        self.folder, self.here = folder, here
        self.uv("venv", "--clear", "--python", sys.executable, folder)
        self.install(wheel)

    def uv(self, *arguments: str | Path) -> None:
        subprocess.run([BIN / "uv", "--quiet", *arguments], check=True, cwd=self.here)

    def install(self, *requirements: str | Path) -> None:
        """Install, with the Makefile's torch if any torch is needed: PyPI's brings CUDA."""
        if re.search(r"\[(train|pretrained)\]", str(requirements)):
            requirements += tuple((Path(sys.prefix) / "wheels").glob("torch-*.whl"))
        self.uv("pip", "install", "--python", self.folder, *requirements)

    def run(self, name: str, *arguments: str, **variables: str) -> Result:
        # Not PYTHONPATH, which could name this checkout. All environments have one place, and so
        # one cache of bytecode.
        environment = {key: os.environ[key] for key in ("PATH", "HOME", "XDG_CACHE_HOME")}
        environment["PYTHONPYCACHEPREFIX"] = str(self.folder.with_name("bytecode"))
        return subprocess.run(
            [self.folder / "bin" / name, *arguments],
            check=False,
            capture_output=True,
            text=True,
            cwd=self.here,
            env=environment | variables,
        )

    def npair(self, *arguments: str, **variables: str) -> Result:
        result = self.run("npair", *arguments, **variables)
        assert "Traceback" not in result.stderr, result.stderr
        return result

    def check_helps(self) -> None:
        """Print the help of every command, in one process."""
        code = (
            "import contextlib, sys\nfrom npair.cli import main\nfor words in sys.argv[1:]:\n"
            "    sys.argv = [*words.split(), '--help']\n"
            "    with contextlib.suppress(SystemExit):\n        main()"
        )
        names = [name for name, _ in commands()]
        helps = self.run("python", "-c", code, *names)
        assert helps.returncode == 0, helps.stderr
        assert [name for name in names if f"usage: {name} " not in helps.stdout] == []


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the sdist and the wheel, unless NPAIR_DIST names the folder that has them."""
    if built := os.environ.get("NPAIR_DIST"):
        return Path(built).resolve()
    folder = tmp_path_factory.mktemp("dist")
    environment = os.environ | {"PATH": f"{BIN}:{os.environ['PATH']}"}
    subprocess.run([ROOT / "scripts/build-dist.sh", folder], check=True, env=environment)
    return folder


@pytest.fixture(scope="module")
def wheel(dist: Path) -> Path:
    return next(dist.glob("*.whl"))


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with running() as (_, urls):
        yield urls["http"]


@pytest.fixture
def environment(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, wheel: Path
) -> Environment:
    folder = tmp_path_factory.getbasetemp() / "install"
    folder.mkdir(exist_ok=True)
    return Environment(folder / "venv", tmp_path, wheel)


@pytest.fixture(scope="module")
def stores() -> Iterator[dict[str, str]]:
    """Yield variables that lead s3:// to config.pbtxt in a bucket, and gs:// to nothing."""
    nothing = HTTPServer(("127.0.0.1", 0), SimpleHTTPRequestHandler)
    threading.Thread(target=nothing.serve_forever, daemon=True).start()
    with moto() as endpoint:
        bucket = s3fs.S3FileSystem(skip_instance_cache=True)
        bucket.mkdir("bucket")
        bucket.put_file(str(REPOSITORY / "config.pbtxt"), "bucket/models/npair/config.pbtxt")
        emulator = f"http://127.0.0.1:{nothing.server_port}"
        yield environment_of(endpoint) | {"STORAGE_EMULATOR_HOST": emulator}
    nothing.shutdown()


def test_the_plain_package(environment: Environment, url: str) -> None:
    assert environment.npair("--version").stdout == f"npair {npair.__version__}\n"
    environment.check_helps()
    embedded = environment.npair("embed", str(SHIPPED / "golden/photo.jpg"), "--url", url)
    assert f'"version": "{SHIPPED.name}"' in embedded.stdout, embedded.stderr
    listed = environment.npair("versions", "--repository", str(REPOSITORY), NPAIR_URL=url)
    assert f"{SHIPPED.name} *     serving" in listed.stdout, listed.stderr


def test_what_is_inside(dist: Path, wheel: Path) -> None:
    """Both hold the package as git has it; the wheel was built from the sdist."""
    listed = subprocess.run(
        ["git", "ls-files", "src/npair"], cwd=ROOT, check=True, capture_output=True, text=True
    )
    # The client is a link in git, and files here.
    client = (ROOT / "model/api/client").glob("*.py")
    source = {f"npair/client/{path.name}" for path in client}
    source |= {name.removeprefix("src/") for name in listed.stdout.split()} - {"npair/client"}
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        assert names == source
    with tarfile.open(next(dist.glob("*.tar.gz"))) as packed:
        held = {name.partition("/")[2] for name in packed.getnames()}
    assert {f"src/{name}" for name in source} <= held
    assert {"CHANGELOG.md", "LICENSE", "NOTICE", "README.md"} <= held
    assert not [name for name in held if name.startswith(("model_repository/", "tests/"))]


def test_every_extra_is_tried(wheel: Path) -> None:
    (built,) = importlib.metadata.distributions(path=[str(wheel)])
    extras = set(built.metadata.get_all("Provides-Extra") or ())
    assert {*CALLS, *OTHERS} == extras
    assert [*CALLS] == [extra for extras in TOGETHER for extra in extras]
    assert {parser.get_default("extra") for _, parser in commands()} <= {*extras, "", None}


@pytest.mark.parametrize("extras", TOGETHER, ids=", ".join)
def test_a_command_names_its_extra_and_runs_with_it(
    extras: tuple[str, ...],
    environment: Environment,
    dataset: Path,
    url: str,
    stores: dict[str, str],
) -> None:
    checkpoint = environment.here / "checkpoint"
    if "pretrained" in extras:
        architectures.checkpoint(checkpoint, architectures.ARCHITECTURES["vit"])
    places = {"dataset": dataset, "url": url, "repository": REPOSITORY, "checkpoint": checkpoint}
    for extra in extras:
        call, expected = CALLS[extra]
        command = call.format(run=f"of-{extra}", **places).split()
        refused = environment.npair(*command, **stores)
        printed = re.search(r"pip install '(.+)'", refused.stderr)
        assert refused.returncode == 1
        assert printed, refused.stderr
        assert printed[1] == f"npair[{extra}]"

        environment.install(printed[1])
        done = environment.npair(*command, **stores)
        assert expected in done.stdout + done.stderr
        if extra == "train":  # publishing a network takes minutes
            imported = environment.run("python", "-c", "import npair.publishing.publish")
            assert imported.returncode == 0, imported.stderr
