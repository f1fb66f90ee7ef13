"""Run the client's commands in separate processes."""

from __future__ import annotations

import fcntl
import io
import json
import os
import pty
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.fake_server import (
    DENIED,
    PHOTOS,
    UNHEALTHY,
    Answer,
    always,
    changing,
    echo,
    embeddings,
    of_version,
    serving,
    unit,
)
from support.models import ROOT, SHIPPED
from support.servers import running
from support.tls import certificate

from npair.client import NpairClient, Thresholds
from npair.client.rows import alone, load_saved

CLIENT = ROOT / "model/api/client.py"
NOBODY = "http://127.0.0.1:9"
Run = subprocess.CompletedProcess[str]


def python(*arguments: str | Path, cwd: Path | None = None) -> Run:
    command = [sys.executable, *arguments]
    return subprocess.run(command, check=False, capture_output=True, text=True, cwd=cwd)


def run(url: str, *arguments: str | Path) -> Run:
    result = python(CLIENT, *arguments, "--url", url)
    assert "Traceback" not in result.stderr
    return result


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Three photos of 2 to 4 bytes, and another file."""
    for name, length in (("b.jpg", 2), ("a.png", 3), ("deep/c.WEBP", 4), ("notes.txt", 5)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x" * length)
    return tmp_path


@pytest.fixture
def hundred(tmp_path: Path) -> Path:
    """Photos 001.jpg to 100.jpg in two folders, each named after its length in bytes."""
    for length in range(1, 101):
        path = tmp_path / "shop" / ("a" if length < 40 else "b") / f"{length:03}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * length)
    return tmp_path / "shop"


class TestScript:
    @pytest.mark.parametrize(
        ("start", "module"),
        [
            (f"run_path({str(CLIENT)!r}", "client"),
            ("run_module('client', alter_sys=True", "client"),
            ("run_module('npair.client', alter_sys=True", "npair.client"),
        ],
    )
    def test_no_module_is_loaded_twice(self, start: str, module: str) -> None:
        """A second copy would define each exception class twice."""
        script = (
            "import gc, runpy, sys\n"
            f"sys.path.insert(0, {str(CLIENT.parent)!r})\n"
            f"sys.argv = ['client.py', 'ready', '--url', {NOBODY!r}]\n"
            f"try: runpy.{start}, run_name='__main__')\n"
            "except SystemExit as ended: code = ended.code\n"
            "classes = [each for each in gc.get_objects() if type(each) is type]\n"
            "print([each.__module__ for each in classes if each.__name__ == 'NpairError'], code)"
        )
        result = python("-c", script)
        assert result.stdout.splitlines()[-1:] == [f"['{module}.errors'] 3"], result.stderr

    def test_the_library_alone(self, tmp_path: Path) -> None:
        shutil.copy(CLIENT, tmp_path)
        result = python(tmp_path / "client.py", "ready")
        assert result.returncode == 2
        assert "client.py: its code is in the folder client" in result.stderr
        shutil.copytree(CLIENT.with_suffix(""), tmp_path / "client")
        assert python("-c", "from client import NpairClient", cwd=tmp_path).returncode == 0
        for start in (["client.py"], ["-m", "client"]):
            assert python(*start, "--help", cwd=tmp_path).returncode == 0


class TestEmbed:
    def test_folders_in_order(self, photos: Path) -> None:
        with serving() as (url, _):
            result = run(url, "embed", photos)
        rows = [json.loads(line) for line in result.stdout.splitlines()]
        assert result.returncode == 0
        assert [Path(row["photo"]).name for row in rows] == ["a.png", "b.jpg", "c.WEBP"]
        assert [row["embedding"][0] for row in rows] == [3, 2, 4]
        assert {row["version"] for row in rows} == {"1"}

    def test_bad_files_are_named_and_counted_and_the_rest_is_kept(
        self, photos: Path, tmp_path: Path
    ) -> None:
        def answer(photos: PHOTOS, path: str) -> tuple[int, str]:
            lengths = enumerate(map(len, photos))
            bad = [f"IMAGE[{index}]: broken" for index, length in lengths if length == 2]
            return (400, json.dumps({"error": "; ".join(bad)})) if bad else echo(photos, path)

        out, missing, huge = tmp_path / "out.npz", photos / "missing.jpg", photos / "huge.jpg"
        huge.touch()
        os.truncate(huge, 3_000_000_000)
        with serving(answer) as (url, _):
            again = [photos / "a.png", missing]
            result = run(url, "embed", photos, missing, *again, "--out", out, "--json")
        assert result.returncode == 1
        assert "huge.jpg: 3000000000 bytes, more than the limit of 100000000" in result.stderr
        assert "b.jpg: broken" in result.stderr
        assert "missing.jpg: cannot be read: No such file" in result.stderr
        assert "3 of 5 photos left out" in result.stderr
        counts = {"embedded": 2, "left_out": 3}
        expected = {"out": str(out), **counts, "model": "npair", "version": "1"}
        assert json.loads(result.stdout) == expected
        with np.load(out) as saved:
            assert saved["vectors"].shape == (2, 128)
            assert [Path(name).name for name in saved["names"]] == ["a.png", "c.WEBP"]

    def test_which_files_of_folders_are_photos(self, tmp_path: Path) -> None:
        wanted = ["1.jpg", "2.JPE", "3.jfif", "4.webp", "a.HEIC", "sub/5.jpeg", "sub/b.avif"]
        litter = [
            *("@eaDir/1.jpg/SYNOPHOTO_THUMB_M.jpg", "#recycle/1.jpg", "@Recycle/1.jpg"),
            *("__MACOSX/._1.jpg", "$RECYCLE.BIN/1.jpg", ".hidden/1.jpg", "._1.jpg", ".DS_Store"),
        ]
        for name in (*wanted, *litter, "c.dng", "Thumbs.db", "README"):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes(b"x")
        with serving() as (url, _):
            result = run(url, "embed", tmp_path)
            named = run(url, "embed", tmp_path / "@eaDir", tmp_path / "README")
        assert result.returncode == 1
        found = [Path(json.loads(line)["photo"]) for line in result.stdout.splitlines()]
        assert [str(path.relative_to(tmp_path)) for path in found] == wanted
        assert result.stderr.splitlines() == [
            f"{tmp_path}/c.dng: neither the server nor this command reads it; save it as JPEG",
            "2 other files in folders passed over: 1 without a suffix, 1 .db",
            "1 of 8 photos left out",
        ]
        assert len(named.stdout.splitlines()) == 2, "a file named explicitly is never skipped"
        assert named.stderr == ""

    def test_photos_that_nobody_answered_are_named(self, hundred: Path) -> None:
        """One of them may be the photo that crashes the server."""

        def answer(photos: PHOTOS, path: str) -> tuple[int, str]:
            if photos and len(photos[0]) == 33:
                time.sleep(1)  # let the server answer the other batches first
                return UNHEALTHY(photos, path)
            return echo(photos, path)

        with serving(answer) as (url, _):
            result = run(url, "embed", hundred)
        assert result.returncode == 3
        assert len(result.stdout.splitlines()) == 32
        names = map(str, sorted(hundred.rglob("*.jpg"))[32:64])
        assert f"no answer for these photos: {', '.join(names)}\n" in result.stderr

    @pytest.mark.parametrize(("scheme", "answered"), [("http", 0), ("http", 1), ("grpc", 0)])
    def test_an_interrupt_does_not_wait_for_answers(
        self, hundred: Path, scheme: str, answered: int
    ) -> None:
        """Neither the first batch nor batches sent by threads delay the exit."""
        asked = threading.Event()

        def answer(photos: PHOTOS, path: str) -> tuple[int, str]:
            if photos and len(photos[0]) > 32 * answered:
                asked.set()
                time.sleep(60)
            return echo(photos, path)

        with ExitStack() as stack:
            if scheme == "http":
                url, _ = stack.enter_context(serving(answer))
            else:
                silent = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
                url = f"grpc://127.0.0.1:{silent.getsockname()[1]}"
            process = subprocess.Popen(
                [sys.executable, CLIENT, "embed", hundred, "--url", url],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
            if scheme == "http":
                assert asked.wait(60)
            else:
                stack.enter_context(silent.accept()[0])
            time.sleep(0.5)
            process.send_signal(signal.SIGINT)
            _, said = process.communicate(timeout=20)
        assert process.returncode == 130
        assert "Traceback" not in said

    def test_memory_does_not_grow_with_the_photos(self, tmp_path: Path) -> None:
        """Add 7,000 photos of 20 kB to a full folder; their vectors and names alone take 4 MB."""
        (tmp_path / "photo").write_bytes(b"x" * 20_000)
        # Do not use getrusage: a process inherits the maximum of its parent.
        script = (
            f"import sys\nsys.path.insert(0, {str(CLIENT.parent)!r})\nfrom client import cli\n"
            "code = cli.main()\nwith open('/proc/self/status') as status:\n"
            "    print(*(line for line in status if 'VmHWM' in line))\nsys.exit(code)"
        )

        def peak(number: int) -> int:
            folder = tmp_path / str(number)
            for index in range(number):
                path = folder / f"{index // 1000}" / f"{index}.jpg"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.hardlink_to(tmp_path / "photo")
            out = tmp_path / f"{number}.npz"
            result = python("-c", script, "embed", folder, "--out", out, "--url", url)
            assert result.returncode == 0, result.stderr
            return int(result.stdout.split()[-2])

        _, reply = embeddings([b"photo"] * 32)  # every batch is full
        with serving(always(200, reply)) as (url, _):
            assert peak(8320) - peak(1312) < 3000  # kB

    @pytest.mark.parametrize("missing", [(), ("tqdm",)])
    def test_shows_its_progress_on_a_terminal(
        self, hundred: Path, missing: tuple[str, ...]
    ) -> None:
        def answer(photos: PHOTOS, path: str) -> tuple[int, str]:
            time.sleep(0.4)
            return echo(photos, path)

        script = (
            f"import sys\nsys.path.insert(0, {str(CLIENT.parent)!r})\n"
            f"sys.modules.update(dict.fromkeys({missing!r}))\nfrom client import cli\n"
            "sys.exit(cli.main())"
        )
        master, terminal = pty.openpty()
        with serving(answer) as (url, _):
            command: list[str | Path] = [sys.executable, "-c", script, "embed", hundred]
            command += ["--url", url]
            done = subprocess.run(command, check=False, stdout=subprocess.PIPE, stderr=terminal)
        os.close(terminal)
        said = os.read(master, 1 << 16).decode()
        os.close(master)
        assert (done.returncode, len(done.stdout.splitlines())) == (0, 100)
        assert "of 100 photos" in said
        assert said.endswith("\r\033[K"), "nothing of it stays"

    def test_reads_a_photo_from_standard_input(self, photos: Path) -> None:
        with serving() as (url, _):
            client: list[str | Path] = [sys.executable, CLIENT]
            done = subprocess.run(
                [*client, "embed", "-", photos / "b.jpg", "--url", url],
                check=True,
                capture_output=True,
                input=b"\xff\xd8\xff" * 9,
            )
            bmp = io.BytesIO()
            Image.new("RGB", (9, 9)).save(bmp, "BMP")
            subprocess.run(
                [*client, "rank", "-", photos, "--url", url],
                check=True,
                capture_output=True,
                input=bmp.getvalue(),
            )
        rows = [json.loads(line) for line in done.stdout.splitlines()]
        assert [(Path(row["photo"]).name, row["embedding"][0]) for row in rows] == [
            ("-", 27),
            ("b.jpg", 2),
        ]

    def test_a_closed_pipe_ends_quietly(self, hundred: Path) -> None:
        with serving() as (url, _):
            process = subprocess.Popen(
                [sys.executable, CLIENT, "embed", hundred, "--url", url],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                pipesize=4096,
            )
            assert process.stdout is not None
            process.stdout.readline()
            process.stdout.close()
            _, said = process.communicate(timeout=60)
        assert (process.returncode, said) == (141, b"")


class TestNoServer:
    @pytest.mark.parametrize("url", [NOBODY, NOBODY.replace("http", "grpc")])
    @pytest.mark.parametrize("command", ["embed", "ready"])
    def test_is_said_at_once_and_for_five_seconds(
        self, photos: Path, url: str, command: str
    ) -> None:
        arguments = [command, photos] if command == "embed" else [command]
        process = subprocess.Popen(
            [sys.executable, CLIENT, *arguments, "--url", url],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert process.stdout is not None
        first = process.stdout.readline()
        noticed = time.monotonic()
        last = process.stdout.readlines()[-1]
        assert process.wait() == 3
        assert f"{url} does not answer (nothing listens there" in first
        assert "trying again" in first
        assert time.monotonic() - noticed < 5
        for part in (url, "nothing listens there", "make serve", "NPAIR_URL"):
            assert part in last
        assert "Error" not in last

    def test_wait_finds_one_that_starts_late(self, photos: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
        with ExitStack() as stack:

            def late() -> None:
                stack.enter_context(serving(port=port))

            timer = threading.Timer(4, late)
            timer.start()
            found = run(f"http://127.0.0.1:{port}", "embed", photos, "--wait", "60")
            timer.join()
        assert found.returncode == 0
        assert "does not answer" in found.stderr


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (always(502, "<html><h1>Bad Gateway</h1>"), "502 Bad Gateway: a proxy's page"),
        (always(503, '{"error": "model \'npair\' is not ready"}'), "model 'npair' is not ready"),
        (
            always(404, '{"error": "Request for unknown model: \'npair\' is not found"}'),
            "model npair: Request for unknown model: 'npair' is not found",
        ),
        (DENIED, "a key is needed; NPAIR_API_KEY holds the key"),
        (UNHEALTHY, "500: stub is not healthy"),
    ],
)
def test_ready_gives_the_reason(answer: Answer, reason: str) -> None:
    with serving(answer) as (url, _):
        result = run(url, "ready", "--wait", "0")
        told = json.loads(run(url, "ready", "--wait", "0", "--json").stdout)
    assert result.returncode == 3
    assert f"npair at {url} is not ready: {reason}" in result.stdout
    assert told["ready"] is False
    assert told["reason"].startswith(reason)


class TestResume:
    def interrupted(self, folder: Path, out: Path) -> Run:
        """Embed the folder on a server that fails from the third batch on."""

        def answer(photos: PHOTOS, path: str) -> tuple[int, str]:
            return (UNHEALTHY if photos and len(photos[0]) > 64 else echo)(photos, path)

        with serving(answer) as (url, _):
            return run(url, "embed", folder, "--out", out)

    @pytest.mark.parametrize("suffix", ["npz", "jsonl"])
    def test_goes_on_after_an_interruption(self, hundred: Path, suffix: str) -> None:
        out = hundred.parent / f"out.{suffix}"
        unfinished = hundred.parent / f"out.{suffix}.unfinished"
        first = self.interrupted(hundred, out)
        assert first.returncode == 3
        assert f"64 photos are in {unfinished}" in first.stderr
        assert not out.exists()
        with unfinished.open("a") as lines:
            lines.write('{"photo": "cut o')  # a full disk cuts a line short
        with serving() as (url, server):
            second = run(url, "embed", hundred, "--out", out)
        assert second.returncode == 0, second.stderr
        assert sum(map(len, server.batches)) == 100 - 64
        assert all("/versions/1/" in path for path in server.paths), "that of the first 64"
        assert not unfinished.exists()
        if suffix == "npz":
            with np.load(out) as saved:
                names, vectors, version = (saved[key] for key in ("names", "vectors", "version"))
            assert vectors.dtype == np.float32
        else:
            rows = [json.loads(line) for line in out.read_text().splitlines()]
            names, version = [row["photo"] for row in rows], rows[0]["version"]
            vectors = np.array([row["embedding"] for row in rows])
        assert [Path(name).name for name in names] == [f"{n:03}.jpg" for n in range(1, 101)]
        assert vectors[:, 0].tolist() == list(range(1, 101))
        assert str(version) == "1"

    def test_all_photos_are_embedded_again_if_the_version_is_gone(self, hundred: Path) -> None:
        out = hundred.parent / "out.npz"
        with serving(changing(after=2)) as (url, _):
            result = run(url, "embed", hundred, "--out", out)
        assert result.returncode == 0
        assert "all photos are embedded again" in result.stderr
        with np.load(out) as saved:
            assert (str(saved["version"]), str(saved["manifest_sha256"])) == ("2", "abc")
            assert saved["vectors"][:, 0].tolist() == list(range(1, 101))

    def test_does_not_mix_what_it_goes_on_from(self, hundred: Path) -> None:
        out = hundred.parent / "out.npz"
        self.interrupted(hundred, out)
        unfinished = hundred.parent / "out.npz.unfinished"
        kept = unfinished.read_bytes()
        for arguments, reason in (
            ([hundred / "b"], "is of another command"),
            ([hundred, "--version", "2"], "has vectors of npair version 1"),
        ):
            result = run(NOBODY, "embed", *arguments, "--out", out)
            assert result.returncode == 2
            assert reason in result.stderr
        assert run(NOBODY, "embed", hundred, "--out", out).returncode == 3
        assert unfinished.read_bytes() == kept
        unfinished.write_text("[]\n")
        assert "is damaged" in run(NOBODY, "embed", hundred, "--out", out).stderr

    @pytest.mark.parametrize("suffix", ["npz", "jsonl"])
    def test_two_at_once_do_not_mix(self, hundred: Path, suffix: str) -> None:
        out = hundred.parent / f"out.{suffix}"
        asked, go_on = threading.Event(), threading.Event()

        def answer(photos: PHOTOS, path: str) -> tuple[int, str]:
            if photos and len(photos[0]) == 33:
                asked.set()
                assert go_on.wait(60)
            return echo(photos, path)

        with serving(answer) as (url, server), ThreadPoolExecutor(1) as pool:
            first = pool.submit(run, url, "embed", hundred, "--out", out)
            assert asked.wait(60)
            second = run(url, "embed", hundred, "--out", out)
            go_on.set()
            done = first.result()
        assert second.returncode == 2
        assert f"another embed is writing {out}.unfinished" in second.stderr
        assert (done.returncode, sum(map(len, server.batches))) == (0, 100), done.stderr

    def test_a_file_that_the_other_has_just_finished_begins_again(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path, locked = tmp_path / "unfinished", fcntl.flock

        def late(file: int, how: int) -> None:
            if not (tmp_path / "out").exists():
                path.replace(tmp_path / "out")
            locked(file, how)

        path.write_bytes(b"rows\n")
        monkeypatch.setattr("fcntl.flock", late)
        with alone(path) as file:
            file.write(b"others\n")
        assert (tmp_path / "out").read_bytes() == b"rows\n"
        assert path.read_bytes() == b"others\n"


class TestSavedVectors:
    @pytest.mark.parametrize("command", ["rank", "compare"])
    def test_of_another_version_are_refused(
        self, photos: Path, tmp_path: Path, command: str
    ) -> None:
        photo = photos / "a.png"
        one, two = saved = [tmp_path / "one.npz", tmp_path / "two.npz"]
        for version, path in zip("12", saved, strict=True):
            with serving(of_version(version, unit=True)) as (url, _):
                assert run(url, "embed", photo, "--out", path).returncode == 0
        elsewhere, strange = tmp_path / "elsewhere.npz", tmp_path / "strange.npz"
        with np.load(two) as arrays:
            np.savez(elsewhere, **{**arrays, "manifest_sha256": "another"})
            np.savez(strange, **{**arrays, "model": "another"})
        beside = [photo] if command == "rank" else []

        def answer(photos: PHOTOS, path: str) -> tuple[int, str]:
            return of_version("2" if "/versions/2/" in path else "9")(photos, path)

        with serving(answer) as (url, _), serving(changing(after=0)) as (other, _):
            pinned = run(url, command, photo, two, "--json")
            assert json.loads(pinned.stdout)["version"] == "2"
            for reason, refused in (
                ("version 2, not 1", run(url, command, *beside, one, two)),
                ("version 2, not 1", run(url, command, photo, two, "--version", "1")),
                (
                    "another version 2 than is served or saved beside it",
                    run(url, command, *beside, two, elsewhere),
                ),
                ("another version 2 than is served", run(other, command, photo, two)),
                ("model another, not npair", run(url, command, photo, strange)),
            ):
                assert refused.returncode == 2
                assert f".npz holds vectors of {reason}" in refused.stderr

    def test_of_json_lines_are_read(self, photos: Path, tmp_path: Path) -> None:
        out, mixed = tmp_path / "out.jsonl", tmp_path / "mixed.jsonl"
        with serving(unit) as (url, server):
            assert run(url, "embed", photos, "--out", out).returncode == 0
            row = json.loads(out.read_text().splitlines()[0])
            mixed.write_text(out.read_text() + json.dumps(row | {"version": "2"}) + "\n")
            before = len(server.batches)
            ranked = json.loads(run(url, "rank", photos / "b.jpg", out, "--json").stdout)
            refused = run(url, "rank", photos / "b.jpg", mixed)
        assert len(server.batches) == before + 1, "only the query is embedded"
        found = [(Path(each["photo"]).name, each["cosine"]) for each in ranked["ranked"]]
        assert [name for name, _ in found] == ["b.jpg", "a.png", "c.WEBP"]
        assert [cosine for _, cosine in found] == pytest.approx([1, 0.9947, 0.9780], abs=1e-4)
        assert refused.returncode == 2
        assert "mixed.jsonl holds no vectors: rows of several versions" in refused.stderr

    def test_compare_takes_those_of_one_photo(self, photos: Path, tmp_path: Path) -> None:
        a, b, many = (tmp_path / name for name in ("a.npz", "b.npz", "many.npz"))
        with serving(unit) as (url, server):
            for source, out in ((photos / "a.png", a), (photos / "b.jpg", b), (photos, many)):
                assert run(url, "embed", source, "--out", out).returncode == 0
            before = len(server.batches)
            both = run(url, "compare", a, b, "--json")
            assert len(server.batches) == before, "saved vectors are not embedded again"
            one = run(url, "compare", photos / "b.jpg", a, "--json")
            several = run(url, "compare", photos / "b.jpg", many)
        expected = {"version": "1", "same_product": None}
        for told in map(json.loads, (both.stdout, one.stdout)):
            assert told.pop("cosine") == pytest.approx(0.9947, abs=1e-4)
            assert told == expected
        assert several.returncode == 2
        reason = "many.npz holds the vectors of 3 photos, and compare takes one"
        assert reason in several.stderr

    def test_damaged_or_strange_ones_are_refused(self, photos: Path, tmp_path: Path) -> None:
        """Whatever is wrong with a file, one line names it."""
        good, lines = tmp_path / "good.npz", tmp_path / "deep.jsonl"
        with serving(unit) as (url, _):
            assert run(url, "embed", photos, "--out", good).returncode == 0
        with np.load(good) as arrays:
            whole = dict(arrays)
        vectors, damaged = whole["vectors"], good.read_bytes()
        method = damaged.index(b"PK\1\2") + 10
        (tmp_path / "method.npz").write_bytes(damaged[:method] + b"\x63" + damaged[method + 1 :])
        flags = method - 2
        (tmp_path / "flags.npz").write_bytes(damaged[:flags] + b"\1" + damaged[flags + 1 :])
        lines.write_text("[" * 100_000)
        for name, changed in {
            "few": {"names": whole["names"][:1]},
            "scalar": {"vectors": np.float32(3)},
            "nan": {"vectors": np.full_like(vectors, np.nan)},
            "long": {"vectors": vectors * 79},
        }.items():
            np.savez(tmp_path / name, **(whole | changed))
        names = ["method.npz", "flags.npz", "few.npz", "scalar.npz", "nan.npz", "long.npz"]
        np.savez(tmp_path / "short", **(whole | {"vectors": vectors[:, :64]}))
        with NpairClient(NOBODY, retries=0) as client:
            for path in [*(tmp_path / name for name in names), lines]:
                with pytest.raises(ValueError, match=f"{path} holds no vectors: "):
                    load_saved([path], client)
            with pytest.raises(ValueError, match="holds vectors of 64 numbers"):
                load_saved([good, tmp_path / "short.npz"], client)
        with serving(unit) as (url, _):
            beside = run(url, "rank", photos / "a.png", tmp_path / "short.npz")
        assert beside.returncode == 2
        assert "vectors of 64 numbers, and the server gives 128" in beside.stderr


class TestCompare:
    def test_gives_a_verdict_with_the_served_thresholds(self, tmp_path: Path) -> None:
        """Ask a real server with configured thresholds over both protocols."""
        shutil.copytree(ROOT / "model_repository", tmp_path / "models")
        config = tmp_path / "models/npair/config.pbtxt"
        golden = sorted((tmp_path / "models/npair").glob("[0-9]*/golden/*.jpg"))
        version = golden[0].parts[-3]
        values = {
            "thresholds_version": version,
            "threshold_far_1_percent": "0.25",
            "threshold_far_01_percent": "1.5",
        }
        lines = [line for line in config.read_text().splitlines() if "threshold" not in line]
        for key, value in values.items():
            lines.append(f'parameters {{ key: "{key}" value: {{ string_value: "{value}" }} }}')
        config.write_text("\n".join(lines))
        with running(MODEL_REPOSITORY=str(tmp_path / "models")) as (_, urls):
            for url in urls.values():
                with NpairClient(url) as client:
                    assert client.thresholds() == Thresholds(version, 0.25, 1.5)
                same = run(url, "compare", golden[0], golden[0]).stdout
                reach = "which 1 % of pairs of different products reach"
                assert same == f"same product: cosine 1.0000 >= 0.2500, {reach}\n"
                told = run(url, "compare", golden[0], golden[0], "--far", "0.1", "--json").stdout
                strict = json.loads(told)
                assert strict["same_product"] is False
                assert (strict["threshold"], strict["far"]) == (1.5, 0.001)

    def test_names_the_photos_that_are_refused(self, photos: Path) -> None:
        def answer(photos: PHOTOS, path: str) -> tuple[int, str]:
            bad = [i for i, photo in enumerate(photos) if len(photo) == 2]
            error = "; ".join(f"IMAGE[{index}]: broken" for index in bad)
            return (400, json.dumps({"error": error})) if bad else echo(photos, path)

        with serving(answer) as (url, _):
            result = run(url, "compare", photos / "b.jpg", photos / "missing.jpg")
        assert result.returncode == 1
        assert f"{photos}/b.jpg: broken; {photos}/missing.jpg: cannot be read" in result.stderr

    def test_gives_no_verdict_without_thresholds(self) -> None:
        photo = SHIPPED / "golden/photo.jpg"
        with serving() as (url, _):
            result = run(url, "compare", photo, photo)
        assert result.returncode == 0
        reason = "the server's configuration has no such threshold for version 1"
        assert f"no verdict: {reason}" in result.stdout


def test_names_stay_within_their_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Line breaks and bytes that are not UTF-8 are escaped, as a strict stdout needs it."""
    monkeypatch.setenv("PYTHONIOENCODING", "utf-8:strict")
    folder, out = tmp_path / "photos", tmp_path / "caf\udce9.npz"
    folder.mkdir()
    for name, length in (("caf\udce9.jpg", 4), ("a\nb.jpg", 3), ("bad\nc.jpg", 2), ("d.x\ny", 1)):
        (folder / name).write_bytes(b"x" * length)

    def answer(photos: PHOTOS, path: str) -> tuple[int, str]:
        lengths = list(map(len, photos))
        broken = json.dumps({"error": f"IMAGE[{lengths.index(2)}]: broken"}) if 2 in lengths else ""
        return (400, broken) if broken else echo(photos, path)

    with serving(answer) as (url, _):
        ranked = run(url, "rank", folder / "a\nb.jpg", folder)
        embedded = run(url, "embed", folder, "--out", out)
        compared = run(url, "compare", folder / "a\nb.jpg", folder / "bad\nc.jpg")
    ends = [line.rpartition("/")[2] for line in ranked.stdout.splitlines()]
    assert ends == [r"caf\udce9.jpg'", r"a\nb.jpg'"]
    passed_over = r"1 other files in folders passed over: 1 '.x\ny'"
    left_out = [rf"'{folder}/bad\nc.jpg': broken", passed_over, "1 of 3 photos left out"]
    assert ranked.stderr.splitlines() == embedded.stderr.splitlines() == left_out
    made = rf"2 photos embedded by npair version 1 in '{tmp_path}/caf\udce9.npz', 1 left out"
    assert embedded.stdout == f"{made}\n"
    assert compared.stderr == rf"client.py compare: '{folder}/bad\nc.jpg': broken" + "\n"


def test_names_that_standard_output_lacks_are_escaped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONIOENCODING", "latin-1")
    (tmp_path / "\u82f9\u679c.jpg").write_bytes(b"x")
    with serving() as (url, _):
        ranked = run(url, "rank", tmp_path / "\u82f9\u679c.jpg", tmp_path)
    assert ranked.returncode == 0, ranked.stderr
    assert ranked.stdout.endswith("/\\u82f9\\u679c.jpg\n")


class TestEnvironment:
    def test_has_the_key_and_the_authority(
        self, photos: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("NPAIR_API_KEY", "abc")
        with serving() as (url, server):
            assert run(url, "ready").returncode == 0
        assert server.authorizations == ["Bearer abc"]
        monkeypatch.setenv("NPAIR_CA", "/nowhere.pem")
        result = run("https://127.0.0.1:9", "ready")
        assert result.returncode == 2
        assert "/nowhere.pem is not: " in result.stderr
        assert "abc" not in result.stderr
        monkeypatch.delenv("NPAIR_CA")
        with serving(DENIED) as (url, _):
            denied = run(url, "embed", photos)
        assert denied.returncode == 3
        assert f"{url}: a key is needed; NPAIR_API_KEY holds the key" in denied.stderr

    def test_has_the_certificate(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        cert, key = certificate(tmp_path)
        both = tmp_path / "both.pem"
        both.write_text(cert.read_text() + key.read_text())
        tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=cert)
        tls.load_cert_chain(cert, key)
        tls.verify_mode = ssl.CERT_REQUIRED
        monkeypatch.setenv("NPAIR_CA", str(cert))
        with serving(tls=tls) as (url, _):
            for shown, its_key in ((cert, str(key)), (both, "")):
                monkeypatch.setenv("NPAIR_CERT", str(shown))
                monkeypatch.setenv("NPAIR_KEY", its_key)
                assert run(url, "ready").returncode == 0


def test_server_failures(photos: Path) -> None:
    two = photos / "a.png", photos / "b.jpg"
    with serving(UNHEALTHY) as (url, _):
        for arguments in (("embed", photos), ("compare", *two), ("ready",)):
            assert run(url, *arguments).returncode == 3


@pytest.mark.parametrize(
    "arguments",
    [
        ("embed", "{}", "--out", "x.csv"),
        ("embed", "{}", "--wait", "-1"),
        ("ready", "--timeout", "inf"),
        ("embed", "{}", "--out", "{}/no/x.npz"),
        ("rank", "{}/a.png", "{}", "-k", "0"),
        ("rank", "{}/a.png", "{}/notes.npz"),
        ("rank", "{}/a.png", "{}/empty.npz"),
        (),
    ],
)
def test_wrong_usage(photos: Path, arguments: tuple[str, ...]) -> None:
    (photos / "notes.npz").write_bytes(b"text")
    (photos / "empty.npz").touch()
    assert run(NOBODY, *(argument.format(photos) for argument in arguments)).returncode == 2
