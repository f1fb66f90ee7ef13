"""The client against servers that misbehave, each a real socket. What a real npair server does is tested in model/api."""

from __future__ import annotations

import http.server
import json
import os
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from conftest import ROOT, SHIPPED, certificate, eventually, running

from npair.client import (
    IN_FLIGHT,
    PIXEL,
    AccessDeniedError,
    EmbeddingStream,
    InvalidPhotoError,
    InvalidRequestError,
    NpairClient,
    NpairError,
    RequestTimeoutError,
    RequestTooLargeError,
    ServerFaultError,
    Thresholds,
    UnavailableError,
    VersionGoneError,
)
from npair.serving.preprocess import Limits, Preprocessing, decode

PHOTOS = list[bytes]


class FakeServer(http.server.ThreadingHTTPServer):
    """Speaks just enough of the protocol to be told how to fail: ``answer`` gets the photos of a request."""

    daemon_threads = True

    def __init__(self, answer: Callable[[PHOTOS, str], tuple[int, str]]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answer = answer
        self.batches: list[PHOTOS] = []
        self.paths: list[str] = []
        self.authorizations: list[str | None] = []


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        assert isinstance(self.server, FakeServer)
        body = self.rfile.read(int(self.headers["Content-Length"]))
        content, photos = body[int(self.headers["Inference-Header-Content-Length"]) :], []
        while content:
            length = int.from_bytes(content[:4], "little")
            photos.append(content[4 : 4 + length])
            content = content[4 + length :]
        self.server.batches.append(photos)
        self.server.paths.append(self.path)
        self.reply(photos)

    def do_GET(self) -> None:
        self.reply([])

    def reply(self, photos: PHOTOS) -> None:
        assert isinstance(self.server, FakeServer)
        self.server.authorizations.append(self.headers["Authorization"])
        status, text = self.server.answer(photos, self.path)
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: object) -> None:
        pass


def embeddings(photos: PHOTOS, version: str = "1") -> tuple[int, str]:
    """Vectors that tell which photo they are of: the first component is the photo's length."""
    data = [float(value) for photo in photos for value in [len(photo), *[0] * 127]]
    output = {"name": "EMBEDDING", "datatype": "FP32", "shape": [len(photos), 128], "data": data}
    return 200, json.dumps({"model_name": "npair", "model_version": version, "outputs": [output]})


def embeddings_of(version: str, photos: PHOTOS, _path: str) -> tuple[int, str]:
    return embeddings(photos, version)


@contextmanager
def serving(
    answer: Callable[[PHOTOS, str], tuple[int, str]], tls: ssl.SSLContext | None = None
) -> Iterator[tuple[str, FakeServer]]:
    server = FakeServer(answer)
    if tls:
        server.socket = tls.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"{'https' if tls else 'http'}://127.0.0.1:{server.server_port}", server
    server.shutdown()


class TestBatches:
    def test_by_count_in_order(self) -> None:
        with serving(lambda photos, _: embeddings(photos)) as (url, server), NpairClient(url, batch_size=3) as client:
            vectors = client.embed([b"x" * n for n in range(1, 9)]).vectors
        assert vectors[:, 0].tolist() == list(range(1, 9))
        assert sorted(map(len, server.batches)) == [2, 3, 3]

    def test_by_bytes_and_a_large_photo_alone(self) -> None:
        with serving(lambda photos, _: embeddings(photos)) as (url, server), NpairClient(url, batch_bytes=10) as client:
            client.embed([b"x" * n for n in (4, 6, 1, 99, 5, 5, 1)])
        assert sorted(list(map(len, batch)) for batch in server.batches) == [[1], [1], [4, 6], [5, 5], [99]]

    def test_paths_bytes_and_open_files(self, tmp_path: Path) -> None:
        path = tmp_path / "a.jpg"
        path.write_bytes(b"12345")
        with serving(lambda photos, _: embeddings(photos)) as (url, _), NpairClient(url) as client, path.open("rb") as file:
            assert client.embed([path, str(path), b"123", file]).vectors[:, 0].tolist() == [5, 5, 3, 5]
            assert client.embed(path).vectors.shape == (1, 128)
            assert client.embed(b"123").vectors.shape == (1, 128)

    def test_reads_photos_as_it_goes(self) -> None:
        taken = 0

        def photos() -> Iterator[bytes]:
            nonlocal taken
            for _ in range(100):
                taken += 1
                yield b"x"

        with serving(lambda photos, _: embeddings(photos)) as (url, _), NpairClient(url, batch_size=4) as client:
            next(iter(client.stream(photos())))
            assert taken <= 5

    def test_several_batches_at_a_time_in_order(self) -> None:
        """The earlier a batch was sent, the later it is answered; no more are under way than memory should hold."""
        under_way, most, lock = 0, 0, threading.Lock()

        def answer(photos: PHOTOS, _: str) -> tuple[int, str]:
            nonlocal under_way, most
            with lock:
                under_way += 1
                most = max(most, under_way)
            time.sleep(0.3 if len(photos[0]) % 2 else 0.01)
            with lock:
                under_way -= 1
            return embeddings(photos)

        with serving(answer) as (url, _), NpairClient(url, batch_size=1) as client:
            vectors = client.embed([b"x" * n for n in range(1, 13)]).vectors
        assert vectors[:, 0].tolist() == list(range(1, 13))
        assert 1 < most <= IN_FLIGHT

    def test_nothing_is_left_of_many_calls(self) -> None:
        """Nor of the threads that embed several batches at a time."""

        def files() -> int:
            return len(list(Path("/proc/self/fd").iterdir()))

        with serving(lambda photos, _: embeddings(photos)) as (url, _), NpairClient(url, version="1", batch_size=1) as client:
            client.embed([b"a", b"b", b"c"])
            before = files()
            for _ in range(20):
                client.embed([b"a", b"b", b"c"])
            eventually(lambda: files() < before + 10)

    def test_a_photo_that_is_too_large_for_a_proxy_is_named(self) -> None:
        def proxy(photos: PHOTOS, _: str) -> tuple[int, str]:
            return (413, "<html>") if sum(map(len, photos)) > 10 else embeddings(photos)

        with serving(proxy) as (url, _), NpairClient(url, batch_bytes=10) as client:
            results = list(client.stream([b"small", b"x" * 11, b"small"]))
            assert [result.vector is None for result in results] == [False, True, False]
            assert "too large for the server, or for a proxy before it" in str(results[1].reason)
        with serving(proxy) as (url, _), NpairClient(url) as client, pytest.raises(RequestTooLargeError):
            client.embed([b"small", b"small", b"small"])

    def test_a_fault_ends_the_stream(self) -> None:
        def answer(photos: PHOTOS, _: str) -> tuple[int, str]:
            return (500, '{"error": "boom"}') if photos == [b"bad"] else embeddings(photos)

        with serving(answer) as (url, server), NpairClient(url, batch_size=1) as client:
            with pytest.raises(ServerFaultError, match="boom"):
                client.embed([b"a", b"bad", *[b"c"] * 50])
            assert len(server.batches) <= 2 + IN_FLIGHT

    def test_later_batches_stay_with_the_first_version(self) -> None:
        """A new version goes live after the first batch: unpinned requests would get it."""
        answered: list[str] = []

        def answer(photos: PHOTOS, path: str) -> tuple[int, str]:
            version = path.split("/versions/")[1].split("/", maxsplit=1)[0] if "/versions/" in path else str(3 + len(answered))
            answered.append(version)
            return embeddings(photos, version)

        with serving(answer) as (url, _), NpairClient(url, batch_size=1) as client:
            assert client.embed([b"a", b"b", b"c"]).version == "3"
        assert answered == ["3", "3", "3"]


def changing(after: int) -> Callable[[PHOTOS, str], tuple[int, str]]:
    """A server of version 1, which is gone after so many batches, when it serves version 2."""
    left = iter(range(after))

    def answer(photos: PHOTOS, path: str) -> tuple[int, str]:
        if path.endswith("/models/npair"):
            return 200, '{"name": "npair", "versions": ["2"]}'
        if path.endswith("/config"):
            told = {"manifest_version": "2", "manifest_sha256": "abc"}
            return 200, json.dumps({"parameters": {key: {"string_value": value} for key, value in told.items()}})
        old = next(left, None) is not None
        if "/versions/1/" in path and not old:
            return 400, '{"error": "Request for unknown model: \'npair\' version 1 is not found"}'
        return embeddings(photos, "1" if old else "2")

    return answer


class TestVersionGone:
    def test_a_call_starts_over_whole(self) -> None:
        with serving(changing(after=2)) as (url, server), NpairClient(url, batch_size=1) as client:
            vectors, version = client.embed([b"x" * n for n in range(1, 6)])
        assert version == "2"
        assert vectors[:, 0].tolist() == [1, 2, 3, 4, 5]
        assert len(server.batches) >= 2 + 5

    def test_a_pinned_call_does_not(self) -> None:
        gone = pytest.raises(VersionGoneError, match="version 1 of model npair is not served, but 2 is")
        with serving(changing(after=0)) as (url, _), NpairClient(url, version="1") as client, gone:
            client.embed([b"a"])

    def test_files_are_embedded_anew(self, tmp_path: Path) -> None:
        for number in range(100):
            (tmp_path / f"{number:03}.jpg").write_bytes(b"x" * (number + 1))
        out = tmp_path / "out.npz"
        with serving(changing(after=2)) as (url, _):
            result = subprocess.run(
                [sys.executable, ROOT / "model/api/client.py", "embed", tmp_path, "--out", out, "--url", url],
                check=True,
                capture_output=True,
                text=True,
            )
        assert "all photos are embedded anew" in result.stderr
        with np.load(out) as saved:
            assert (str(saved["version"]), str(saved["manifest_sha256"])) == ("2", "abc")
            assert saved["vectors"][:, 0].tolist() == list(range(1, 101))


class TestErrors:
    def test_bad_photos_are_named_by_their_place_in_the_call(self) -> None:
        def answer(photos: PHOTOS, _: str) -> tuple[int, str]:
            bad = [f"IMAGE[{index}]: broken; very; IMAGE" for index, photo in enumerate(photos) if photo == b"bad"]
            return (400, json.dumps({"error": "; ".join(bad)})) if bad else embeddings(photos)

        with serving(answer) as (url, _), NpairClient(url, batch_size=2) as client:
            with pytest.raises(InvalidPhotoError, match="photo 1: broken") as caught:
                client.embed([b"a", b"bad", b"bad", b"bad", b"c"])
            assert caught.value.reasons == dict.fromkeys((1, 2, 3), "broken; very; IMAGE")
            outcomes = [result.reason is None for result in client.stream([b"a", b"bad", b"bad", b"bad", b"c"])]
            assert outcomes == [True, False, False, False, True]

    @pytest.mark.parametrize(
        ("status", "body", "expected"),
        [
            (500, '{"error": "stub is not healthy"}', ServerFaultError),
            (404, '{"error": "unknown model"}', InvalidRequestError),
            (400, '{"error": "unexpected shape"}', InvalidRequestError),
            (413, "<html>Request Entity Too Large</html>", InvalidPhotoError),
            (401, '{"error": "a key is needed"}', AccessDeniedError),
            (403, "<html>Forbidden</html>", AccessDeniedError),
            (429, '{"error": "too many requests"}', UnavailableError),
            (503, '{"error": "busy"}', UnavailableError),
            (400, '{"error": "Request for unknown model: npair has no available versions"}', UnavailableError),  # it stops
            (502, "<html>Bad gateway</html>", UnavailableError),
            (200, '{"model_name": "npair", "model_version": "1", "outputs": []}', ServerFaultError),
        ],
    )
    def test_mapped(self, status: int, body: str, expected: type[NpairError]) -> None:
        with serving(lambda *_: (status, body)) as (url, server), NpairClient(url, retries=1) as client:
            with pytest.raises(expected):
                client.embed(b"photo")
            assert len(server.batches) == (2 if expected is UnavailableError else 1), "only an unavailable server is asked again"

    def test_retries_until_the_server_is_there(self) -> None:
        answers = iter([(503, '{"error": "starting"}'), (503, '{"error": "starting"}')])
        with serving(lambda photos, _: next(answers, embeddings(photos))) as (url, _), NpairClient(url) as client:
            assert client.embed(b"photo").vectors.shape == (1, 128)

    def test_retries_for_the_configuration_too(self) -> None:
        answers = iter([(429, "<html>"), (503, '{"error": "starting"}')])
        with serving(lambda *_: next(answers, (200, '{"parameters": {}}'))) as (url, _), NpairClient(url) as client:
            assert client.thresholds() is None

    def test_a_connection_to_a_machine_that_is_gone_ends(self) -> None:
        """What is not received within 10 s ends it, by the option of its socket."""
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
            with NpairClient(f"grpc://127.0.0.1:{port}", timeout=0.5) as client:
                assert not client.ready()
                limits = []
                for descriptor in Path("/proc/self/fd").iterdir():
                    with suppress(OSError), socket.socket(fileno=os.dup(int(descriptor.name))) as connection:
                        if connection.getpeername()[1:2] == (port,):
                            limits.append(connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT))
        assert limits == [10_000]

    @pytest.mark.parametrize("version", ["", 8])
    def test_version_as_others_write_it(self, version: Any) -> None:
        with NpairClient("http://127.0.0.1:9", version=version) as client:
            assert client.version == (str(version) or None)

    @pytest.mark.parametrize("scheme", ["http", "grpc"])
    def test_nobody_listens(self, scheme: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
        with NpairClient(f"{scheme}://127.0.0.1:{port}", retries=1) as client:
            with pytest.raises(UnavailableError):
                client.embed(b"photo")
            assert not client.ready()

    def test_a_server_that_was_away_for_long_is_found_at_once(self) -> None:
        """gRPC looks for it each second, and not after 1, 1.6, 2.6, ... s."""
        with socket.create_server(("127.0.0.1", 0)) as listener:

            def hang_up() -> None:
                for _ in range(10):
                    listener.accept()[0].close()

            calls = ThreadPoolExecutor(1).submit(hang_up)
            with NpairClient(f"grpc://127.0.0.1:{listener.getsockname()[1]}", retries=0) as client:
                eventually(lambda: client.ready() or calls.done())

    @pytest.mark.parametrize("scheme", ["http", "grpc"])
    def test_no_answer_in_time_is_not_repeated(self, scheme: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as silent:
            began = time.monotonic()
            with (
                NpairClient(f"{scheme}://127.0.0.1:{silent.getsockname()[1]}", timeout=0.5) as client,
                pytest.raises(RequestTimeoutError),
            ):
                client.embed(b"photo")
            assert time.monotonic() - began < 5

    @pytest.mark.parametrize("scheme", ["http", "grpc"])
    def test_connection_that_breaks_off(self, scheme: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:

            def hang_up() -> None:
                while True:
                    try:
                        listener.accept()[0].close()
                    except OSError:
                        return

            threading.Thread(target=hang_up, daemon=True).start()
            with (
                NpairClient(f"{scheme}://127.0.0.1:{listener.getsockname()[1]}", retries=1) as client,
                pytest.raises(UnavailableError),
            ):
                client.embed(b"photo")

    @pytest.mark.parametrize(
        "arguments",
        [
            *({"url": "ftp://a"}, {"url": "localhost:8000"}, {"timeout": 0}, {"retries": -1}, {"batch_size": 0}),
            *(
                {"url": "http://a:x"},
                {"url": "http://user:secret@a:1"},
                {"batch_bytes": 0},
                {"api_key": "two words"},
                {"api_key": "clé"},
                {"ca": "/nowhere.pem"},
                {"ca": __file__},
            ),
            {"cert": (__file__, __file__)},
        ],
    )
    def test_senseless_arguments(self, arguments: dict[str, object]) -> None:
        with pytest.raises(ValueError, match="must") as refused:
            NpairClient(**arguments)  # type: ignore[arg-type]
        assert "secret" not in str(refused.value)

    def test_wrong_photos(self, tmp_path: Path) -> None:
        with serving(lambda photos, _: embeddings(photos)) as (url, server), NpairClient(url) as client:
            with pytest.raises(ValueError, match="no photo"):
                client.embed([])
            with pytest.raises(FileNotFoundError):
                client.embed([b"a", tmp_path / "missing.jpg"])
            with pytest.raises(TypeError, match="not int"):
                client.embed([7])  # type: ignore[list-item]
            with pytest.raises(LookupError):
                EmbeddingStream(client, []).version  # noqa: B018
            assert server.batches == []


def test_shows_its_certificate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And its copies do, and command lines."""
    cert, key = certificate(tmp_path)
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=cert)
    tls.load_cert_chain(cert, key)
    tls.verify_mode = ssl.CERT_REQUIRED
    with serving(lambda photos, _: embeddings(photos), tls) as (url, _):
        with NpairClient(url, ca=cert, cert=(cert, key)) as client, client.copy() as copy:
            assert copy.embed(b"abc").vectors[0, 0] == 3
        with NpairClient(url, ca=cert, retries=0) as client, pytest.raises(UnavailableError):
            client.embed(b"abc")
        command = [sys.executable, str(ROOT / "model/api/client.py"), "ready", "--url", url]
        monkeypatch.setenv("NPAIR_CA", str(cert))
        monkeypatch.setenv("NPAIR_CERT", str(cert))
        monkeypatch.setenv("NPAIR_KEY", str(key))
        assert subprocess.run(command, check=False).returncode == 0
        both = tmp_path / "both.pem"
        both.write_text(cert.read_text() + key.read_text())
        monkeypatch.setenv("NPAIR_CERT", str(both))
        monkeypatch.delenv("NPAIR_KEY")
        assert subprocess.run(command, check=False).returncode == 0


class TestApiKey:
    def test_goes_with_every_call_of_every_connection(self) -> None:
        def answer(photos: PHOTOS, path: str) -> tuple[int, str]:
            return (200, "{}") if path.endswith("/config") else embeddings(photos)

        with serving(answer) as (url, server), NpairClient(url, api_key="abc", batch_size=1) as client:
            client.embed([b"x"] * 9)
            client.thresholds()
            client.ready()
            client._served()
        assert server.authorizations == ["Bearer abc"] * 12

    def test_none_is_sent_where_none_is_given(self) -> None:
        with serving(lambda photos, _: embeddings(photos)) as (url, server), NpairClient(url) as client:
            client.embed(b"x")
        assert server.authorizations == [None]

    def test_a_wrong_one_says_nothing_of_the_model(self) -> None:
        denied = pytest.raises(AccessDeniedError, match="a key is needed")
        with serving(lambda *_: (401, '{"error": "a key is needed"}')) as (url, _), NpairClient(url) as client, denied:
            client.ready()

    def test_grpc(self) -> None:
        """A server that lets nobody pass, but notes who it was."""
        seen: list[str | None] = []

        class Refusing(grpc.GenericRpcHandler):  # type: ignore[misc]
            def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
                seen.append(dict(details.invocation_metadata).get("authorization"))
                return grpc.unary_unary_rpc_method_handler(
                    lambda _, context: context.abort(grpc.StatusCode.UNAUTHENTICATED, "a key is needed")
                )

        with ThreadPoolExecutor(1) as pool:
            server = grpc.server(pool, handlers=[Refusing()])
            port = server.add_insecure_port("127.0.0.1:0")
            server.start()
            with NpairClient(f"grpc://127.0.0.1:{port}", api_key="abc") as client:
                with pytest.raises(AccessDeniedError, match="a key is needed"):
                    client.embed(b"x")
                with pytest.raises(AccessDeniedError), client.copy() as copy:
                    copy.thresholds()
            server.stop(None).wait()
        assert seen == ["Bearer abc"] * 2, "it is not asked again"


def test_ready_asks_with_a_photo_that_decodes() -> None:
    photo = decode(PIXEL, Preprocessing(size=8, resample="BILINEAR", background=255), Limits(max_bytes=100, max_pixels=1))
    assert (photo == 255).all()


class TestCommandLine:
    def run(self, url: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, ROOT / "model/api/client.py", *arguments, "--url", url]
        return subprocess.run(command, check=False, capture_output=True, text=True)

    @pytest.fixture
    def photos(self, tmp_path: Path) -> Path:
        for name, length in (("b.jpg", 2), ("a.png", 3), ("deep/c.WEBP", 4), ("notes.txt", 5)):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_bytes(b"x" * length)
        return tmp_path

    def test_embeds_folders_in_order(self, photos: Path) -> None:
        with serving(lambda photos, _: embeddings(photos)) as (url, _):
            result = self.run(url, "embed", photos)
        rows = [json.loads(line) for line in result.stdout.splitlines()]
        assert result.returncode == 0
        assert [Path(row["photo"]).name for row in rows] == ["a.png", "b.jpg", "c.WEBP"]
        assert [row["embedding"][0] for row in rows] == [3, 2, 4]
        assert {row["version"] for row in rows} == {"1"}

    def test_bad_files_are_named_and_counted_and_the_rest_is_kept(self, photos: Path, tmp_path: Path) -> None:
        def answer(photos: PHOTOS, _: str) -> tuple[int, str]:
            bad = [f"IMAGE[{index}]: broken" for index, photo in enumerate(photos) if len(photo) == 2]
            return (400, json.dumps({"error": "; ".join(bad)})) if bad else embeddings(photos)

        with serving(answer) as (url, _):
            result = self.run(url, "embed", photos, photos / "missing.jpg", "--out", tmp_path / "out.npz", "--json")
        assert result.returncode == 1
        assert "b.jpg: broken" in result.stderr
        assert "missing.jpg: cannot be read: No such file" in result.stderr
        assert "2 of 4 photos left out" in result.stderr
        assert json.loads(result.stdout) | {"out": ""} == {
            "out": "",
            "embedded": 2,
            "left_out": 2,
            "model": "npair",
            "version": "1",
        }
        with np.load(tmp_path / "out.npz") as saved:
            assert saved["vectors"].shape == (2, 128)
            assert [Path(name).name for name in saved["names"]] == ["a.png", "c.WEBP"]

    @pytest.fixture
    def hundred(self, tmp_path: Path) -> Path:
        """Photos 1.jpg to 100.jpg, named in the order of their lengths, in two folders."""
        for length in range(1, 101):
            path = tmp_path / "shop" / ("a" if length < 40 else "b") / f"{length:03}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"x" * length)
        return tmp_path / "shop"

    def interrupted(self, folder: Path, out: Path) -> subprocess.CompletedProcess[str]:
        """The server fails from the third batch on."""

        def answer(photos: PHOTOS, _: str) -> tuple[int, str]:
            return (500, '{"error": "full"}') if photos and len(photos[0]) > 64 else embeddings(photos)

        with serving(answer) as (url, _):
            return self.run(url, "embed", folder, "--out", out)

    @pytest.mark.parametrize("suffix", ["npz", "jsonl"])
    def test_goes_on_after_an_interruption(self, hundred: Path, suffix: str) -> None:
        out, unfinished = hundred.parent / f"out.{suffix}", hundred.parent / f"out.{suffix}.unfinished"
        first = self.interrupted(hundred, out)
        assert first.returncode == 3
        assert f"64 photos are in {unfinished}" in first.stderr
        assert not out.exists()
        with unfinished.open("a") as lines:
            lines.write('{"photo": "cut o')  # as by a full disk
        with serving(lambda photos, _: embeddings(photos)) as (url, server):
            second = self.run(url, "embed", hundred, "--out", out)
        assert second.returncode == 0, second.stderr
        assert sum(map(len, server.batches)) == 100 - 64
        assert all("/versions/1/" in path for path in server.paths), "the version of the vectors that are there already"
        assert not unfinished.exists()
        if suffix == "npz":
            with np.load(out) as saved:
                names, vectors, version = saved["names"].tolist(), saved["vectors"], str(saved["version"])
            assert vectors.dtype == np.float32
        else:
            rows = [json.loads(line) for line in out.read_text().splitlines()]
            names, vectors, version = (
                [row["photo"] for row in rows],
                np.array([row["embedding"] for row in rows]),
                rows[0]["version"],
            )
        assert [Path(name).name for name in names] == [f"{length:03}.jpg" for length in range(1, 101)]
        assert vectors[:, 0].tolist() == list(range(1, 101))
        assert version == "1"

    def test_does_not_mix_what_it_goes_on_from(self, hundred: Path) -> None:
        out = hundred.parent / "out.npz"
        self.interrupted(hundred, out)
        unfinished = hundred.parent / "out.npz.unfinished"
        kept = unfinished.read_bytes()
        for arguments, reason in (
            ([hundred / "b"], "is of another command"),
            ([hundred, "--version", "2"], "has vectors of npair version 1"),
        ):
            result = self.run("http://127.0.0.1:9", "embed", *arguments, "--out", out)
            assert result.returncode == 2
            assert reason in result.stderr
        gone = self.run("http://127.0.0.1:9", "embed", hundred, "--out", out)
        assert gone.returncode == 3
        assert unfinished.read_bytes() == kept
        unfinished.write_text("[]\n")
        assert "is damaged" in self.run("http://127.0.0.1:9", "embed", hundred, "--out", out).stderr

    def test_memory_does_not_grow_with_the_photos(self, tmp_path: Path) -> None:
        """8,000 photos more, of 20 kB, whose vectors and names alone have 5 MB."""
        (tmp_path / "photo").write_bytes(b"x" * 20_000)

        def peak(number: int) -> int:
            folder = tmp_path / str(number)
            for index in range(number):
                path = folder / f"{index // 1000}" / f"{index}.jpg"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.hardlink_to(tmp_path / "photo")
            code = (
                "import resource, runpy, sys\ndel sys.argv[0]\ntry: runpy.run_path(sys.argv[0], run_name='__main__')\n"
                "finally: print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)"
            )
            client, out = ROOT / "model/api/client.py", tmp_path / f"{number}.npz"
            command: list[str | Path] = [sys.executable, "-c", code, client, "embed", folder, "--out", out, "--url", url]
            result = subprocess.run(command, capture_output=True, text=True, check=True)
            return int(result.stderr.split()[-1])

        _, reply = embeddings([b"photo"] * 32)  # of a full batch, which all are
        with serving(lambda *_: (200, reply)) as (url, _):
            assert peak(8320) - peak(320) < 3000  # kB

    @pytest.mark.parametrize("command", ["rank", "compare"])
    def test_refuses_saved_vectors_of_another_version(self, photos: Path, tmp_path: Path, command: str) -> None:
        photo = photos / "a.png"
        saved = [tmp_path / "one.npz", tmp_path / "two.npz"]
        for version, path in zip("12", saved, strict=True):
            with serving(partial(embeddings_of, version)) as (url, _):
                assert self.run(url, "embed", photo, "--out", path).returncode == 0
        with np.load(saved[1]) as two:
            np.savez(tmp_path / "elsewhere.npz", **{**two, "manifest_sha256": "another"})
            np.savez(tmp_path / "strange.npz", **{**two, "model": "another"})
        beside = [photo] if command == "rank" else []

        def answer(photos: PHOTOS, path: str) -> tuple[int, str]:
            return (200, "{}") if path.endswith("/config") else embeddings(photos, "2" if "/versions/2/" in path else "9")

        with serving(answer) as (url, _):
            mixed = self.run(url, command, *beside, *saved)
            elsewhere = self.run(url, command, *beside, saved[1], tmp_path / "elsewhere.npz")
            strange = self.run(url, command, photo, tmp_path / "strange.npz")
            unpinned = self.run(url, command, photo, saved[1], "--version", "1")
            pinned = self.run(url, command, photo, saved[1], "--json")
        with serving(changing(after=0)) as (url, _):
            other = self.run(url, command, photo, saved[1])
        assert json.loads(pinned.stdout)["version"] == "2"
        for refused, reason in (
            (mixed, "holds vectors of version 2, not 1"),
            (elsewhere, "elsewhere.npz holds vectors of another version 2 than is served or saved beside it"),
            (strange, "holds vectors of model another, not npair"),
            (unpinned, "holds vectors of version 2, not 1"),
            (other, "holds vectors of another version 2 than is served"),
        ):
            assert refused.returncode == 2
            assert reason in refused.stderr

    def test_compare_takes_saved_vectors_of_one_photo(self, photos: Path, tmp_path: Path) -> None:
        def answer(photos: PHOTOS, path: str) -> tuple[int, str]:
            return (200, "{}") if path.endswith("/config") else embeddings(photos)

        with serving(answer) as (url, server):
            for name in ("a.png", "b.jpg"):
                assert self.run(url, "embed", photos / name, "--out", tmp_path / f"{name}.npz").returncode == 0
            assert self.run(url, "embed", photos, "--out", tmp_path / "many.npz").returncode == 0
            before = len(server.batches)
            both = self.run(url, "compare", tmp_path / "a.png.npz", tmp_path / "b.jpg.npz", "--json")
            assert len(server.batches) == before, "saved vectors are not embedded again"
            one = self.run(url, "compare", photos / "b.jpg", tmp_path / "a.png.npz", "--json")
            many = self.run(url, "compare", photos / "b.jpg", tmp_path / "many.npz")
        assert json.loads(both.stdout) == json.loads(one.stdout) == {"cosine": 6.0, "version": "1", "same_product": None}
        assert many.returncode == 2
        assert "many.npz holds the vectors of 3 photos, and compare takes one" in many.stderr

    def test_key_and_authority_come_from_the_environment(self, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("NPAIR_API_KEY", "abc")
        with serving(lambda photos, _: embeddings(photos)) as (url, server):
            assert self.run(url, "ready").returncode == 0
        assert server.authorizations == ["Bearer abc"]
        monkeypatch.setenv("NPAIR_CA", "/nowhere.pem")
        result = self.run("https://127.0.0.1:9", "ready")
        assert result.returncode == 2
        assert "/nowhere.pem is not: " in result.stderr
        assert "abc" not in result.stderr
        monkeypatch.delenv("NPAIR_CA")
        with serving(lambda *_: (401, '{"error": "a key is needed"}')) as (url, _):
            denied = self.run(url, "embed", photos)
        assert denied.returncode == 3
        assert "AccessDeniedError: a key is needed" in denied.stderr

    def test_server_failures(self, photos: Path) -> None:
        with serving(lambda *_: (500, '{"error": "stub is not healthy"}')) as (url, _):
            for arguments in (("embed", photos), ("compare", photos / "a.png", photos / "b.jpg"), ("ready",)):
                result = self.run(url, *arguments)
                assert result.returncode == 3
                assert "Traceback" not in result.stderr

    @pytest.mark.parametrize(
        "arguments",
        [
            *(("embed", "{}", "--out", "x.csv"), ("embed", "{}", "--out", "{}/no/x.npz"), ("rank", "{}/a.png", "{}", "-k", "0")),
            *(("rank", "{}/a.png", "{}/notes.npz"), ("rank", "{}/a.png", "{}/empty.npz"), ()),
        ],
    )
    def test_wrong_usage(self, photos: Path, arguments: tuple[str, ...]) -> None:
        (photos / "notes.npz").write_bytes(b"text")
        (photos / "empty.npz").touch()
        result = self.run("http://127.0.0.1:9", *(argument.format(photos) for argument in arguments))
        assert result.returncode == 2
        assert "Traceback" not in result.stderr


def test_compare_gives_a_verdict_with_the_served_thresholds(tmp_path: Path) -> None:
    """A real server whose configuration has thresholds, over both protocols; golden photos show different products."""
    shutil.copytree(ROOT / "model_repository", tmp_path / "models")
    config = tmp_path / "models/npair/config.pbtxt"
    golden = sorted((tmp_path / "models/npair").glob("[0-9]*/golden/*.jpg"))
    version = golden[0].parts[-3]
    lines = [line for line in config.read_text().splitlines() if "threshold" not in line]
    values = {"thresholds_version": version, "threshold_far_1_percent": "0.25", "threshold_far_01_percent": "1.5"}
    lines += [f'parameters {{ key: "{key}" value: {{ string_value: "{value}" }} }}' for key, value in values.items()]
    config.write_text("\n".join(lines))

    def compare(url: str, a: Path, b: Path, *options: str) -> str:
        command: list[str | Path] = [sys.executable, ROOT / "model/api/client.py", "compare", "--url", url, *options, a, b]
        return str(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    with running(MODEL_REPOSITORY=str(tmp_path / "models")) as (_, urls):
        for url in urls.values():
            with NpairClient(url) as client:
                assert client.thresholds() == Thresholds(version, 0.25, 1.5)
            same = compare(url, golden[0], golden[0])
            assert same == "same product: cosine 1.0000 >= 0.2500, which 1 % of pairs of different products reach\n"
            strict = json.loads(compare(url, golden[0], golden[0], "--far", "0.1", "--json"))
            assert strict["same_product"] is False
            assert (strict["threshold"], strict["far"]) == (1.5, 0.001)


def test_compare_without_thresholds_gives_no_verdict() -> None:
    photo = SHIPPED / "golden/photo.jpg"
    with serving(lambda sent, path: (200, "{}") if path.endswith("/config") else embeddings(sent)) as (url, _):
        command: list[str | Path] = [sys.executable, ROOT / "model/api/client.py", "compare", "--url", url, photo, photo]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert "no verdict: the server's configuration has no such threshold for version 1" in said
