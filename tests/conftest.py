"""What several tests need: a drawn data set, a tiny run trained on it, the version published from that, and real servers."""

from __future__ import annotations

import fcntl
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime, timedelta, timezone
from ipaddress import IPv4Address
from pathlib import Path

import hypothesis
import pytest
import releases
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from npair.cli.next_version import publish_next
from npair.data.dataset import Dataset
from npair.data.pixels import default_cache
from npair.publishing.drawings import draw, encode, write_dataset
from npair.releasing.config import with_release
from npair.releasing.control import Server
from npair.releasing.release import promote
from npair.releasing.repository import open_repository
from npair.serving.manifest import Manifest
from npair.serving.preprocess import Limits, Preprocessing
from npair.training.run import TrainConfig
from npair.training.train import train

ROOT = Path(__file__).parents[1]
SHIPPED = next(
    (ROOT / "model_repository/npair").glob("[0-9]*")
)  # the version that this repository serves
PORTS = ("HTTP_PORT", "GRPC_PORT", "METRICS_PORT")
PREPROCESSING = Preprocessing(size=64, resample="BILINEAR", background=255)
LIMITS = Limits(max_bytes=1_000_000, max_pixels=1_000_000)
TINY = TrainConfig(
    network="compact", epochs=2, classes_per_batch=4, size=64, crop_size=48, evaluations=2
)
PNG = encode(draw(0, 0, 8), "PNG")

# nohup ignores SIGHUP, and a script's background SIGINT, and processes that tests start would inherit that; not so a handler.
for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, lambda *_: None)

# The same examples on every machine; what is new is for tests/fuzz.py to find.
hypothesis.settings.register_profile("npair", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("npair")


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Decoded photos are kept here, in this process and in those that tests start, and not with the user's own."""
    folder = tmp_path_factory.mktemp("cache")
    before = os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = str(folder)
    yield folder
    os.environ.pop("XDG_CACHE_HOME")
    if before is not None:
        os.environ["XDG_CACHE_HOME"] = before


def photo(path: Path, number: int = 0) -> Path:
    """A photo whose bytes are a function of the number: what follows the end of a PNG does not count."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(PNG + number.to_bytes(4, "big"))
    return path


def folders(root: Path, classes: int = 6, photos: int = 5) -> Path:
    for label in range(classes):
        for number in range(photos):
            photo(root / f"class {label}" / f"{number}.png", 100 * label + number)
    return root


def table(root: Path, text: str | bytes, name: str = "photos.csv") -> Path:
    path = root / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def sizes(dataset: Dataset) -> dict[str, int]:
    return {split: len(photos) for split, photos in dataset.splits.items()}


@pytest.fixture
def listed(tmp_path: Path) -> Path:
    """Six drawn products, four train photos and two val photos of each."""
    root = tmp_path / "listed"
    write_dataset(root, products=6, train=4, val=2, size=24)
    return root


Once = Callable[[str, Callable[[Path], object]], Path]


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Once:
    """Make a folder by its name: one worker builds it, the others wait and share it. To be read, not changed."""
    root = tmp_path_factory.getbasetemp()
    root = root.parent / "shared" if "PYTEST_XDIST_WORKER" in os.environ else root / "shared"
    root.mkdir(exist_ok=True)

    def made(name: str, build: Callable[[Path], object]) -> Path:
        folder = root / name
        with (root / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (root / f"{name}.done").exists():
                shutil.rmtree(folder, ignore_errors=True)
                build(folder)
                (root / f"{name}.done").touch()
        return folder

    return made


@pytest.fixture(scope="session")
def dataset(once: Once) -> Path:
    """Six drawn products, four train photos and two val photos of each."""
    return once("drawn", lambda root: write_dataset(root, products=6, train=4, val=2))


@pytest.fixture(scope="session")
def trained(dataset: Path, once: Once) -> Path:
    """The run of a network that was trained for two epochs."""
    return once("tiny", lambda run: train(dataset, run, TINY))


@contextmanager
def without_int8() -> Iterator[None]:
    """Publish in fp32 and bf16 alone: int8 takes most of the time, and the fixture ``published`` has it."""

    def refused(*_: object, **__: object) -> None:
        raise RuntimeError("not for this test")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("npair.publishing.graphs.nncf.quantize", refused)
        yield


def publish_into(
    repository: Path, run: Path, data: Path, *, accept_recall_drop: str = "", accept_cost: str = ""
) -> Path:
    """The folder of the next version."""
    manifest = publish_next(
        open_repository(repository),
        run,
        data,
        cache=default_cache(),
        accept_recall_drop=accept_recall_drop,
        accept_cost=accept_cost,
    )
    return repository / str(manifest.version)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A model's folder without a version."""
    folder = tmp_path / "models" / "npair"
    folder.mkdir(parents=True)
    shutil.copy(ROOT / "model_repository/npair/config.pbtxt", folder)
    return folder


@pytest.fixture(scope="session")
def published(dataset: Path, trained: Path, once: Once) -> Path:
    """A repository (the model's folder) with version 1; to be read, not changed."""

    def build(models: Path) -> None:
        repository = models / "npair"
        repository.mkdir(parents=True)
        shutil.copy(ROOT / "model_repository/npair/config.pbtxt", repository)
        publish_into(repository, trained, dataset)

    return once("published", build) / "npair"


@pytest.fixture(scope="session")
def pair(published: Path, trained: Path, once: Once) -> Path:
    """A model's folder with versions 1 and 2, of which 1 was promoted; to be copied, not changed."""

    def build(folder: Path) -> None:
        shutil.copytree(published, folder)
        releases.two_versions(folder, trained)
        config = folder / "config.pbtxt"
        config.write_text(with_release(config.read_text(), [1], {}))
        promote(open_repository(folder), 1, [])

    return once("pair", build)


@pytest.fixture
def models(pair: Path, tmp_path: Path) -> Path:
    """A copy of ``pair``."""
    return Path(shutil.copytree(pair, tmp_path / "models/npair"))


@pytest.fixture(params=releases.DAMAGES)
def broken(request: pytest.FixtureRequest, models: Path, trained: Path) -> Path:
    """A copy of ``pair`` whose version 2 is broken in one way."""
    releases.DAMAGES[request.param](models / "2", trained)
    return models


@pytest.fixture(scope="module")
def shared(pair: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[releases.Standing]:
    models = Path(shutil.copytree(pair, tmp_path_factory.mktemp("shared") / "npair"))
    with controlled(models) as (server, urls):
        yield models, server, urls


@pytest.fixture
def standing(shared: releases.Standing) -> releases.Standing:
    """A copy of ``pair``, and a server that serves version 1 of it; for tests that leave both versions sound."""
    models, server, _ = shared
    if server.serving() != [1] or not releases.pins(models, 1):
        promote(open_repository(models), 1, [server])
    return shared


@pytest.fixture
def version(published: Path, tmp_path: Path) -> Path:
    """A copy of version 1 for one test to spoil."""
    return Path(shutil.copytree(published / "1", tmp_path / "npair" / "1"))


def rewrite_manifest(folder: Path, **changes: object) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | changes))


def eventually(true: Callable[[], object], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.1)


BREAKS = b"the network fails on this"  # a fault that cannot be made for real: such a network would not be loaded
HANGS = b"the network never ends on this"
BROKEN = f"""

embed_photos = Embedder.embed_photos


def broken(self, photos, limits):
    if {BREAKS!r} in photos:
        raise ArithmeticError("the network's output is zero or not finite")
    if {HANGS!r} in photos:
        threading.Event().wait()
    return embed_photos(self, photos, limits)


Embedder.embed_photos = broken
"""


def let_fail(version: Path) -> None:
    """Change a version so that it is served, fails on BREAKS and hangs on HANGS."""
    with (version / "embedder.py").open("a") as code:
        code.write(BROKEN)
    Manifest.read(version).write(version)


def free_ports() -> dict[str, str]:
    """Neither such as the system gives to whoever connects nor another worker's, which might be taken before a server starts."""
    ports: dict[str, str] = {}
    lowest = 15_000 + 4_000 * (int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:]) % 4)
    with ExitStack() as listeners:
        while len(ports) < len(PORTS):
            port = random.randrange(lowest, lowest + 4_000)
            with suppress(OSError):
                listeners.enter_context(socket.create_server(("127.0.0.1", port)))
                ports[PORTS[len(ports)]] = str(port)
    return ports


def start(*options: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, ROOT / "model/api/serve.py", *options],
        env=os.environ | environment,
        stderr=subprocess.PIPE,
        text=True,
    )


def lines_until_ready(process: subprocess.Popen[str]) -> list[str]:
    """What a starting server says on stderr, up to the line that says that it is ready; fails the test where it ends instead."""
    assert process.stderr is not None
    lines = []
    while line := process.stderr.readline():
        lines.append(line)
        if "ready after" in line:
            return lines
    pytest.fail("the server did not start:\n" + "".join(lines))


@contextmanager
def running(**environment: str) -> Iterator[tuple[subprocess.Popen[str], dict[str, str]]]:
    """A server that is ready, and its URLs by protocol."""
    ports = free_ports()
    process = start(**ports, **environment)
    try:
        lines = [line for line in lines_until_ready(process) if "this CPU has none of" not in line]
        assert len(lines) == 1, f"one line says that it is ready, and nothing else is said: {lines}"
        yield (
            process,
            {
                "http": f"http://127.0.0.1:{ports['HTTP_PORT']}",
                "grpc": f"grpc://127.0.0.1:{ports['GRPC_PORT']}",
            },
        )
    finally:
        process.terminate()
        process.wait(timeout=30)


@contextmanager
def controlled(models: Path) -> Iterator[tuple[Server, dict[str, str]]]:
    """A server of a model's folder, with its control API open, and its URLs by protocol."""
    with running(MODEL_REPOSITORY=str(models.parent), NPAIR_CONTROL_SECRET=releases.SECRET) as (
        _,
        urls,
    ):
        yield Server(urls["http"], "npair", secret=releases.SECRET, timeout=60), urls


def certificate(folder: Path, *hosts: str) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1 or these host names that is its own authority, and its key, both PEM, valid for an hour."""
    key, now, hour = (
        ec.generate_private_key(ec.SECP256R1()),
        datetime.now(timezone.utc),
        timedelta(hours=1),
    )
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "npair")])
    names: list[x509.GeneralName] = [*map(x509.DNSName, hosts)] or [
        x509.IPAddress(IPv4Address("127.0.0.1"))
    ]
    made = (
        x509.CertificateBuilder(
            name, name, key.public_key(), x509.random_serial_number(), now - hour, now + hour
        )
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    paths = folder / "npair.crt", folder / "npair.key"
    paths[0].write_bytes(made.public_bytes(serialization.Encoding.PEM))
    unencrypted = serialization.NoEncryption()
    paths[1].write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, unencrypted
        )
    )
    return paths
