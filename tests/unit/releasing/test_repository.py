"""A repository on disk holds complete versions only, despite races and killed publishers."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from npair.releasing import RepositoryError
from npair.releasing import folder as folder_module
from npair.releasing.folder import Folder
from npair.releasing.object_store import Store
from npair.releasing.repository import open_repository

PUBLISHER = """
import sys, time
from npair.releasing.repository import open_repository
with open_repository(sys.argv[1]).new_version() as (number, folder):
    print(number, flush=True)
    for part in range(100):
        (folder / f"{part}.bin").write_bytes(bytes(1000))
        time.sleep(float(sys.argv[2]) / 100)
    (folder / "manifest.json").write_text("{}")
"""


def publisher(folder: Path, seconds: float) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", PUBLISHER, folder, str(seconds)], stdout=subprocess.PIPE, text=True
    )


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_version_appears_whole(repository: Path) -> None:
    opened = open_repository(repository)
    with opened.new_version() as (number, folder):
        assert number == 1
        assert folder.parent == repository
        assert not folder.name[0].isdigit(), "Triton would take it for a version"
        assert list(folder.iterdir()) == []
        (folder / "golden").mkdir()
        (folder / "golden/a.jpg").write_bytes(b"123")
        (folder / "manifest.json").write_text("{}")
        assert opened.versions() == {}
        assert opened.unfinished() == [folder.name]
    assert opened.versions() == {1: True}
    assert opened.unfinished() == []
    assert opened.size(1) == 5
    assert (repository / "1").stat().st_mode & 0o777 == 0o755
    with opened.version(1) as there:
        assert (there / "golden/a.jpg").read_bytes() == b"123"


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=repr
)
def test_nothing_is_left_of_a_failure(repository: Path, error: BaseException) -> None:
    def publish() -> None:
        with open_repository(repository).new_version() as (_, folder):
            (folder / "network.bin").write_bytes(b"1")
            raise error

    with pytest.raises(type(error)):
        publish()
    assert names(repository) == {"config.pbtxt"}


def test_publishers_side_by_side_get_numbers_of_their_own(repository: Path) -> None:
    processes = [publisher(repository, 1.0) for _ in range(4)]
    numbers = [process.communicate()[0].strip() for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0, 0]
    assert len(set(numbers)) == 4
    assert {
        str(number)
        for number, complete in open_repository(repository).versions().items()
        if complete
    } == set(numbers)
    assert names(repository) == {"config.pbtxt", *numbers}


def test_killed_publishers_leave_nothing_that_counts(repository: Path) -> None:
    for turn in range(12):
        process = publisher(repository, 0.2)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(0.02 * turn)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert all(open_repository(repository).versions().values()), "half a version"
    alive = publisher(repository, 2.0)
    assert alive.stdout is not None
    alive.stdout.readline()
    alive.send_signal(signal.SIGSTOP)
    with open_repository(repository).new_version() as (_, folder):
        (folder / "manifest.json").write_text("{}")
    assert len(open_repository(repository).unfinished()) == 1, (
        "what the killed ones left is removed, and not what is being written"
    )
    alive.send_signal(signal.SIGCONT)
    assert alive.wait() == 0
    assert not open_repository(repository).unfinished()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Return a model folder on a disk of 1 MB."""
    if os.geteuid():
        pytest.skip("mounting a small disk needs root")
    folder = tmp_path / "small/npair"
    folder.parent.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder.parent], check=True)
    try:
        folder.mkdir()
        (folder / "config.pbtxt").write_text("as it was")
        yield folder
    finally:
        subprocess.run(["umount", folder.parent], check=True)


def test_full_disk(small_disk: Path) -> None:
    opened = open_repository(small_disk)

    def publish() -> None:
        with opened.new_version() as (_, folder):
            for part in range(1000):
                (folder / f"{part}.bin").write_bytes(bytes(10_000))

    with pytest.raises(OSError, match="No space left"):
        publish()
    assert names(small_disk) == {"config.pbtxt"}
    with contextlib.suppress(OSError), (small_disk / "filler").open("wb", buffering=0) as filler:
        while True:
            filler.write(bytes(4096))
    with pytest.raises(OSError, match="No space left"):
        opened.write("config.pbtxt", bytes(100_000))
    assert opened.read("config.pbtxt") == b"as it was"
    assert names(small_disk) == {"config.pbtxt", "filler"}


def test_readers_find_old_or_new(repository: Path) -> None:
    opened, contents, stop = (
        open_repository(repository),
        (b"a" * 100_000, b"b" * 100_000),
        threading.Event(),
    )
    opened.write("config.pbtxt", contents[0])
    seen: set[bytes] = set()

    def read() -> None:
        while not stop.is_set():
            seen.add(opened.read("config.pbtxt"))

    reader = threading.Thread(target=read)
    reader.start()
    for turn in range(200):
        opened.write("config.pbtxt", contents[turn % 2])
    stop.set()
    reader.join()
    assert seen == set(contents)


def test_removed_whole(repository: Path) -> None:
    opened = open_repository(repository)
    with opened.new_version() as (number, folder):
        (folder / "manifest.json").write_text("{}")
    opened.remove(number)
    assert names(repository) == {"config.pbtxt"}
    (repository / "7").mkdir()
    assert opened.versions() == {7: False}, "a folder without a manifest"
    with opened.new_version() as (number, folder):
        assert number == 8
        (folder / "manifest.json").write_text("{}")


def test_servers_of_other_users_can_read_it(repository: Path) -> None:
    """Publish world-readable files even with a strict umask."""
    before = os.umask(0o077)
    try:
        opened = open_repository(repository)
        with opened.new_version() as (_, folder):
            (folder / "golden").mkdir()
            (folder / "golden/a.jpg").write_bytes(b"123")
            (folder / "manifest.json").write_text("{}")
        opened.write("config.pbtxt", b"")
    finally:
        os.umask(before)
    modes = {
        path.relative_to(repository).as_posix(): path.stat().st_mode & 0o777
        for path in repository.rglob("*")
    }
    files = dict.fromkeys(("config.pbtxt", "1/manifest.json", "1/golden/a.jpg"), 0o644)
    assert modes == files | {"1": 0o755, "1/golden": 0o755}


def test_publishers_and_removers_side_by_side(repository: Path) -> None:
    """Publishers remove abandoned folders without disturbing each other."""

    def publish_and_remove() -> int:
        turns, end = 0, time.monotonic() + 1
        while time.monotonic() < end:
            with open_repository(repository).new_version() as (number, folder):
                (folder / "manifest.json").write_text("{}")
            open_repository(repository).remove(number)
            turns += 1
        return turns

    with ThreadPoolExecutor(3) as threads:
        assert all(
            future.result() for future in [threads.submit(publish_and_remove) for _ in range(3)]
        )
    assert names(repository) == {"config.pbtxt"}


def test_cleaning_spares_what_is_claimed_meanwhile(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A publisher claims the number after a cleaner opens its folder and before it locks it."""
    opened, locked = Folder(repository), folder_module._lock
    (repository / "staging-1").mkdir()
    with contextlib.ExitStack() as other:

        def late(handle: int) -> bool:
            monkeypatch.undo()
            other.enter_context(opened.new_version())[1].joinpath("manifest.json").write_text("{}")
            return locked(handle)

        monkeypatch.setattr(folder_module, "_lock", late)
        opened._clean()
    assert opened.versions() == {1: True}


def test_a_number_that_was_published_meanwhile(repository: Path) -> None:
    """If another publisher takes the number first, the claim fails and leaves nothing behind."""
    opened = open_repository(repository)
    assert isinstance(opened, Folder)
    (repository / "1").mkdir()
    assert opened._claim(1) is None
    assert names(repository) == {"config.pbtxt", "1"}


def test_a_linked_version_is_removed_without_its_files(repository: Path) -> None:
    (repository.parent / "elsewhere").mkdir()
    (repository / "3").symlink_to("../elsewhere")
    open_repository(repository).remove(3)
    assert names(repository) == {"config.pbtxt"}
    assert (repository.parent / "elsewhere").is_dir()


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks(
    repository: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """Some network mounts have none."""

    def refused(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", refused)
    opened = open_repository(repository)
    for use in (opened.new_version, opened.exclusive):
        with pytest.raises(RepositoryError, match="file system has no locks"), use():
            pass
    assert names(repository) == {"config.pbtxt"}


def test_one_at_a_time(repository: Path) -> None:
    first, second = open_repository(repository), open_repository(repository)
    with (
        first.exclusive(),
        pytest.raises(RepositoryError, match="another process releases or retires"),
        second.exclusive(),
    ):
        pass
    with second.exclusive():
        pass


class TestALockThatStays:
    """A store that cannot be reached when the lock is released hides nothing that was done."""

    @pytest.fixture
    def store(self, monkeypatch: pytest.MonkeyPatch) -> Store:
        def ask(_: Store, operation: str, *_arguments: object, **_options: object) -> None:
            if operation == "rm_file":
                raise RepositoryError("s3://b/npair cannot be reached: timeout")

        monkeypatch.setattr(Store, "_ask", ask)
        store = Store.__new__(Store)  # without support for S3
        store.location, store.root = "s3://b/npair", "b/npair"
        return store

    def test_success(self, store: Store, capsys: pytest.CaptureFixture[str]) -> None:
        with store.exclusive():
            pass
        assert "the lock s3://b/npair.releasing is left" in capsys.readouterr().err

    def test_failure(self, store: Store, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(ValueError, match="golden set"), store.exclusive():
            raise ValueError("golden set")
        assert "the lock s3://b/npair.releasing is left" in capsys.readouterr().err


def test_what_is_no_repository(tmp_path: Path) -> None:
    with pytest.raises(RepositoryError, match=r"has no config\.pbtxt"):
        open_repository(tmp_path)
