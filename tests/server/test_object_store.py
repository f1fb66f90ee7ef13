"""Publish to, interrupt, release and serve a repository in an S3 object store."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import s3fs
from moto.s3.responses import S3Response
from supervisor.launch import command, find_triton
from supervisor.options import Options
from support.models import ROOT, SHIPPED, rewrite_manifest
from support.s3 import moto
from support.servers import free_ports, lines_until_ready, start

from npair.releasing import ReleaseError, RepositoryError
from npair.releasing.config import with_release
from npair.releasing.control import Server
from npair.releasing.object_store import Store
from npair.releasing.release import check_server, client_parameters, promote, rollback
from npair.releasing.repository import Repository, open_repository

SECRET = "test"
PUBLISHER = """
import sys, time
from npair.releasing.repository import open_repository
with open_repository(sys.argv[1]).new_version() as (number, folder):
    print(number, flush=True)
    for part in range(100):
        (folder / f"{part}.bin").write_bytes(bytes(1000))
    (folder / "manifest.json").write_text("{}")
    time.sleep(float(sys.argv[2]))
    print("uploading", flush=True)
"""


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    """Start an S3 server that replaces AWS in this process and its children; yield its URL."""
    put, lock = S3Response._key_response_put, threading.Lock()

    def one_at_a_time(*arguments: Any) -> Any:
        """Make conditional writes atomic as in S3; moto checks and writes in two steps."""
        with lock:
            return put(*arguments)

    with moto() as endpoint, pytest.MonkeyPatch.context() as patch:
        patch.setattr(S3Response, "_key_response_put", one_at_a_time)
        yield endpoint


@pytest.fixture
def location(endpoint: str, request: pytest.FixtureRequest) -> str:
    """Create a model folder without versions in the test's own bucket and return its URL."""
    assert endpoint
    bucket = re.sub("[^a-z0-9]+", "-", request.node.name)[:60].strip("-")
    # Share no cache with the code under test.
    store = s3fs.S3FileSystem(skip_instance_cache=True)
    store.mkdir(bucket)
    store.pipe_file(
        f"{bucket}/models/npair/config.pbtxt", (SHIPPED.parent / "config.pbtxt").read_bytes()
    )
    return f"s3://{bucket}/models/npair"


def publisher(location: str, seconds: float = 0) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", PUBLISHER, location, str(seconds)], stdout=subprocess.PIPE, text=True
    )


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def publish(repository: Repository, files: dict[str, bytes]) -> int:
    with repository.new_version() as (number, folder):
        for name, content in files.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(content)
    return number


def objects(location: str) -> set[str]:
    root = location.removeprefix("s3://").removesuffix("/npair")
    return {
        path.removeprefix(f"{root}/npair/")
        for path in s3fs.S3FileSystem(skip_instance_cache=True).find(root)
    }


def test_a_version_appears_complete(location: str) -> None:
    opened, reader = open_repository(location), open_repository(location + "/")
    assert (opened.location, opened.name) == (location, "npair")
    assert reader.versions() == {}
    with opened.new_version() as (number, folder):
        assert number == 1
        assert list(folder.iterdir()) == []
        (folder / "golden").mkdir()
        (folder / "golden/a.jpg").write_bytes(b"123")
        (folder / "manifest.json").write_text("{}")
        assert reader.versions() == {1: False}, "claimed"
        with pytest.raises(RepositoryError, match=rf"process {os.getpid()}.* publishes version 1"):
            reader.remove(1)
    assert reader.versions() == {1: True}
    assert reader.size(1) == 5
    with reader.version(1) as there:
        assert (there / "golden/a.jpg").read_bytes() == b"123"
        assert (there / "manifest.json").read_bytes() == b"{}"
    assert not there.exists()
    assert objects(location) == {"config.pbtxt", "1/manifest.json", "1/golden/a.jpg"}


def test_the_manifest_comes_last(location: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    ask = Store._ask

    def watched(self: Store, operation: str, *arguments: object, **options: object) -> object:
        if operation in ("put_file", "pipe_file"):
            seen.append(
                (
                    str(arguments[operation == "put_file"]).rpartition("/")[2],
                    open_repository(location).versions(),
                )
            )
        return ask(self, operation, *arguments, **options)

    repository = open_repository(location)
    monkeypatch.setattr(Store, "_ask", watched)
    publish(repository, {"a": b"1", "manifest.json": b"{}", "z": b"2"})
    assert [name for name, _ in seen][::4] == ["manifest.json", "manifest.json"]
    assert [versions for _, versions in seen] == [{}, *[{1: False}] * 4]


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=repr
)
def test_nothing_is_left_of_a_failure(location: str, error: BaseException) -> None:
    def fail() -> None:
        with open_repository(location).new_version() as (_, folder):
            (folder / "network.bin").write_bytes(b"1")
            raise error

    with pytest.raises(type(error)):
        fail()
    assert objects(location) == {"config.pbtxt"}


def test_what_did_not_arrive_is_no_version(location: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fake one short upload, since the store rejects truncated ones."""
    ask = Store._ask

    def short(self: Store, operation: str, *arguments: object, **options: object) -> object:
        if operation == "put_file" and str(arguments[0]).endswith("network.bin"):
            return ask(self, "pipe_file", arguments[1], b"1")
        return ask(self, operation, *arguments, **options)

    monkeypatch.setattr(Store, "_ask", short)
    with pytest.raises(
        RepositoryError, match=r"version 1 did not arrive in s3://.* as it was sent"
    ):
        publish(open_repository(location), {"network.bin": b"12", "manifest.json": b"{}"})
    assert objects(location) == {"config.pbtxt"}


def test_publishers_side_by_side_get_numbers_of_their_own(location: str) -> None:
    processes = [publisher(location, 0.5) for _ in range(4)]
    numbers = [process.communicate()[0].split()[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0, 0]
    assert sorted(numbers) == ["1", "2", "3", "4"]
    assert open_repository(location).versions() == {1: True, 2: True, 3: True, 4: True}


def test_one_of_many_creates(location: str) -> None:
    """Publishers rarely race for the same object, so force it."""
    stores = [Store(location) for _ in range(8)]
    with ThreadPoolExecutor(len(stores)) as threads:
        for name in range(20):
            created = list(
                threads.map(
                    lambda store, path=f"{stores[0].root}/{name}": store._create(path, b""), stores
                )
            )
            assert created.count(True) == 1


def test_what_cannot_be_created(endpoint: str) -> None:
    assert endpoint
    # If this counted as another publisher's claim, publishing would try numbers forever.
    with pytest.raises(FileNotFoundError):
        Store("s3://no-such-bucket/models/npair")._create(
            "no-such-bucket/models/npair/1/manifest.json", b""
        )


def test_listings_are_never_stale(location: str) -> None:
    opened, elsewhere = Store(location), s3fs.S3FileSystem(skip_instance_cache=True)
    assert opened.versions() == {}
    elsewhere.pipe_file(f"{opened.root}/fallback.json", b"{}")
    elsewhere.pipe_file(f"{opened.root}/1/manifest.json", b"{}")
    assert not opened._create(f"{opened.root}/fallback.json", b"")
    assert opened.versions() == {1: True}
    assert opened.read("fallback.json") == b"{}"


def test_killed_publishers_leave_nothing_that_counts(location: str) -> None:
    opened = open_repository(location)
    for turn in range(6):
        process = publisher(location)
        assert said(process) == str(turn + 1), "what a killed one left is passed over"
        assert said(process) == "uploading"
        while (
            len([path for path in objects(location) if path.startswith(f"{turn + 1}/")]) <= 2 * turn
        ):
            assert process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert opened.versions() == dict.fromkeys(range(1, 7), False), "none had the time to end"
    assert publish(opened, {"manifest.json": b"{}"}) == 7
    holder = rf"process {process.pid}, since .* publishes version 6 in .* delete {location}\.6\."
    with pytest.raises(RepositoryError, match=holder):
        opened.remove(6)
    for number in range(1, 7):
        delete_claim(location, number)
        opened.remove(number)
    assert objects(location) == {"config.pbtxt", "7/manifest.json"}


def delete_claim(location: str, number: int) -> None:
    s3fs.S3FileSystem(skip_instance_cache=True).rm_file(f"{location}.{number}.publishing")


@pytest.mark.parametrize("complete", [True, False])
def test_a_number_that_was_lost_is_left_alone(location: str, complete: bool) -> None:
    """The claim is deleted as if its publisher had been killed, and the version is retired."""
    opened, other, holder = Store(location), contextlib.ExitStack(), ""
    publisher = opened.new_version()
    number, folder = publisher.__enter__()
    delete_claim(location, number)
    opened.remove(number)
    again, others = other.enter_context(open_repository(location).new_version())
    assert again == number
    for name in ("manifest.json", "network.bin"):
        (folder / name).write_text("1")
        (others / name).write_text("22")
    if complete:
        other.close()
    else:
        holder = f", and user .*, process {os.getpid()}, since .* publishes that number now"
    with pytest.raises(RepositoryError, match=f"was retired while it was being published{holder};"):
        publisher.__exit__(None, None, None)
    other.close()
    assert opened.versions() == {1: True}
    assert opened.size(1) == 4
    assert objects(location) == {"config.pbtxt", "1/manifest.json", "1/network.bin"}


def test_a_store_that_goes_away(location: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    with contextlib.ExitStack() as stack:
        with moto():  # servers in one process share their buckets
            _, folder = stack.enter_context(open_repository(location).new_version())
            (folder / "manifest.json").write_text("{}")
        with pytest.raises(RepositoryError, match="cannot be reached"):
            stack.close()
    assert open_repository(location).versions() == {1: False}


def test_written_in_one_step(location: str) -> None:
    writer, reader = open_repository(location), open_repository(location)
    for content in (b"a" * 100_000, b"b"):
        writer.write("config.pbtxt", content)
        assert reader.read("config.pbtxt") == content
    with pytest.raises(FileNotFoundError):
        reader.read("fallback.json")


def test_removed_never_half(location: str, monkeypatch: pytest.MonkeyPatch) -> None:
    opened, seen = open_repository(location), []
    publish(opened, {"a": b"1", "b": b"2", "manifest.json": b"{}"})
    ask = Store._ask

    def watched(self: Store, operation: str, *arguments: object, **options: object) -> object:
        answer = ask(self, operation, *arguments, **options)
        if operation in ("rm_file", "pipe_file"):
            seen.append(open_repository(location).versions())
        return answer

    monkeypatch.setattr(Store, "_ask", watched)
    opened.remove(1)
    assert seen == [*[{1: False}] * 4, {}]


def test_a_lock_is_known_although_the_answer_was_lost(
    location: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first write succeeds, so the store rejects the library's retry."""
    create = Store._create

    def twice(self: Store, path: str, content: bytes) -> bool:
        assert create(self, path, content)
        return create(self, path, content)

    monkeypatch.setattr(Store, "_create", twice)
    with open_repository(location).exclusive():
        monkeypatch.undo()
        with (
            pytest.raises(RepositoryError, match=rf"user \d+ on .*, process {os.getpid()}, since"),
            Store(location).exclusive(),
        ):
            pass
    with Store(location).exclusive():
        pass


def test_one_at_a_time(location: str) -> None:
    first, second = open_repository(location), open_repository(location)
    holder = (
        f"on .*, process {os.getpid()}, since 20.* releases or retires in {location};"
        f" .* delete {location}.releasing"
    )
    with first.exclusive(), pytest.raises(RepositoryError, match=holder), second.exclusive():
        pass
    with second.exclusive():
        assert objects(location) == {
            "config.pbtxt",
            f"{location.removeprefix('s3://')}.releasing",
        }, "not in the folder"
    assert objects(location) == {"config.pbtxt"}


@pytest.mark.parametrize(
    ("place", "reason"),
    [
        ("s3://no-such-bucket/models/npair", r"has no config\.pbtxt"),
        ("ftp://host/models/npair", "neither a folder nor at s3:// or gs://"),
    ],
)
def test_what_is_no_repository(endpoint: str, place: str, reason: str) -> None:
    assert endpoint
    with pytest.raises(RepositoryError, match=reason):
        open_repository(place)


@pytest.mark.parametrize(("scheme", "package"), [("s3", "s3fs"), ("gs", "gcsfs"), ("s3", "fsspec")])
def test_what_is_missing_is_named(scheme: str, package: str) -> None:
    code = f"""import sys; sys.modules[{package!r}] = None
from npair.releasing import RepositoryError
from npair.releasing.repository import open_repository
try:
    open_repository("{scheme}://bucket/models/npair")
except RepositoryError as error:
    print(error)"""
    result = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    )
    assert f"pip install 'npair[{scheme}]'" in result.stdout


@pytest.fixture
def served(location: str, endpoint: str, tmp_path: Path) -> Iterator[Server]:
    """Serve version 1, a copy of the shipped one, from the store."""
    release(open_repository(location))
    http, grpc, metrics = map(int, free_ports().values())
    place = location.replace("s3://", f"s3://{endpoint}/").removesuffix(
        "/npair"
    )  # Triton's syntax for S3 servers other than AWS
    options = Options(place, http_port=http, grpc_port=grpc, metrics_port=metrics)
    triton = find_triton(tmp_path)
    process = subprocess.Popen(
        command(options, triton, SECRET),
        env=triton.environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield Server(f"http://127.0.0.1:{options.http_port}", "npair", secret=SECRET, timeout=90)
    finally:
        process.terminate()
        process.wait(timeout=30)


def publish_shipped(
    repository: Repository, *, spoil: str = ""
) -> tuple[int, dict[str, str | None]]:
    """Add the shipped version as the next one; return its number and what clients must know."""
    with repository.new_version() as (number, folder):
        shutil.copytree(
            SHIPPED, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__")
        )
        rewrite_manifest(folder, version=number)
        if spoil:
            (folder / spoil).write_text("spoilt")
        return number, client_parameters((folder / "manifest.json").read_bytes())


def release(repository: Repository, *, spoil: str = "") -> int:
    """Publish the shipped version and pin it; return its number."""
    number, values = publish_shipped(repository, spoil=spoil)
    config = repository.read("config.pbtxt").decode()
    repository.write("config.pbtxt", with_release(config, [number], values).encode())
    return number


def test_triton_reads_the_store(location: str, served: Server) -> None:
    repository = open_repository(location)
    with repository.version(1) as folder:
        served.check(folder)  # wait until the server has started
    assert served.serving() == [1]
    assert release(repository) == 2
    assert served.serving() == [1], "nothing is loaded before it is asked for"
    served.load()
    assert check_server(repository, served).keys() == {2}
    assert release(repository, spoil="network.pt2") == 3
    with pytest.raises(ReleaseError, match=r"network\.pt2"):
        served.load()
    assert served.serving() == [2]


def test_served_from_the_store(location: str) -> None:
    """Let serve.py read the golden photo from the store and watch it."""
    repository = open_repository(location)
    release(repository)
    s3fs.S3FileSystem(skip_instance_cache=True).pipe_file(f"{location}.9.publishing", b"another")
    ports = free_ports()
    environment = {
        **ports,
        "MODEL_REPOSITORY": location.removesuffix("/npair"),
        "NPAIR_CONTROL_SECRET": SECRET,
    }
    process = start(**environment)
    try:
        assert "version 1" in lines_until_ready(process)[-1]
        server = Server(
            f"http://127.0.0.1:{ports['HTTP_PORT']}", "npair", secret=SECRET, timeout=90
        )
        health: list[str | Path] = [sys.executable, ROOT / "model/api/serve.py", "--health"]
        assert subprocess.run(health, env=os.environ | environment, check=False).returncode == 0
        number, _ = publish_shipped(repository)
        promote(repository, number, [server])
        assert check_server(repository, server).keys() == {2}
        assert rollback(repository, [server]) == 1
        assert subprocess.run(health, env=os.environ | environment, check=False).returncode == 0, (
            "of what is served now"
        )
    finally:
        process.terminate()
        process.wait(timeout=30)


def test_a_server_that_starts_with_a_broken_pin_says_what_to_do(location: str) -> None:
    release(open_repository(location), spoil="network.pt2")
    process = start(**free_ports(), MODEL_REPOSITORY=location.removesuffix("/npair"))
    _, said_last = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "network.pt2 has changed since it was published" in said_last
    assert "npair rollback --offline pins the one that was served before in s3://" in said_last


@pytest.mark.parametrize(
    ("folder", "reason"),
    [("nowhere/models", "Check account credentials"), ("{}/nowhere", "not a valid directory")],
    ids=["bucket", "folder"],
)
def test_a_server_that_finds_no_repository_ends_at_once(
    location: str, folder: str, reason: str
) -> None:
    bucket = location.split("/")[2]
    process = start(**free_ports(), MODEL_REPOSITORY=f"s3://{folder.format(bucket)}")
    _, said_last = process.communicate(timeout=60)
    assert process.returncode == 1
    assert reason in said_last
    assert said_last.endswith("npair: the model repository was refused, for the reasons above\n")
