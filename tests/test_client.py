"""The client against servers that misbehave, each a real socket. What a real npair server does is tested in model/api."""

from __future__ import annotations

import asyncio
import copy
import http.server
import inspect
import json
import os
import pickle
import random
import shutil
import signal
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from conftest import (
    ROOT,
    SHIPPED,
    certificate,
    eventually,
    free_ports,
    lines_until_ready,
    running,
    start,
)

from npair.client import (
    IN_FLIGHT,
    PIXEL,
    AccessDeniedError,
    AsyncNpairClient,
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
    Vectors,
    VersionGoneError,
)
from npair.releasing.config import with_release
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
        with (
            serving(lambda photos, _: embeddings(photos)) as (url, server),
            NpairClient(url, batch_size=3) as client,
        ):
            vectors = client.embed([b"x" * n for n in range(1, 9)]).vectors
        assert vectors[:, 0].tolist() == list(range(1, 9))
        assert sorted(map(len, server.batches)) == [2, 3, 3]

    def test_by_bytes_and_a_large_photo_alone(self) -> None:
        with (
            serving(lambda photos, _: embeddings(photos)) as (url, server),
            NpairClient(url, batch_bytes=10) as client,
        ):
            client.embed([b"x" * n for n in (4, 6, 1, 99, 5, 5, 1)])
        assert sorted(list(map(len, batch)) for batch in server.batches) == [
            [1],
            [1],
            [4, 6],
            [5, 5],
            [99],
        ]

    def test_paths_bytes_and_open_files(self, tmp_path: Path) -> None:
        path = tmp_path / "a.jpg"
        path.write_bytes(b"12345")
        with (
            serving(lambda photos, _: embeddings(photos)) as (url, _),
            NpairClient(url) as client,
            path.open("rb") as file,
        ):
            assert client.embed([path, str(path), b"123", file]).vectors[:, 0].tolist() == [
                5,
                5,
                3,
                5,
            ]
            assert client.embed(path).vectors.shape == (1, 128)
            assert client.embed(b"123").vectors.shape == (1, 128)

    def test_reads_photos_as_it_goes(self) -> None:
        taken = 0

        def photos() -> Iterator[bytes]:
            nonlocal taken
            for _ in range(100):
                taken += 1
                yield b"x"

        with (
            serving(lambda photos, _: embeddings(photos)) as (url, _),
            NpairClient(url, batch_size=4) as client,
        ):
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

        with (
            serving(lambda photos, _: embeddings(photos)) as (url, _),
            NpairClient(url, version="1", batch_size=1) as client,
        ):
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
        with (
            serving(proxy) as (url, _),
            NpairClient(url) as client,
            pytest.raises(RequestTooLargeError),
        ):
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
            version = (
                path.split("/versions/")[1].split("/", maxsplit=1)[0]
                if "/versions/" in path
                else str(3 + len(answered))
            )
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
            return 200, json.dumps(
                {"parameters": {key: {"string_value": value} for key, value in told.items()}}
            )
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
        gone = pytest.raises(
            VersionGoneError, match="version 1 of model npair is not served, but 2 is"
        )
        with serving(changing(after=0)) as (url, _), NpairClient(url, version="1") as client, gone:
            client.embed([b"a"])

    def test_files_are_embedded_anew(self, tmp_path: Path) -> None:
        for number in range(100):
            (tmp_path / f"{number:03}.jpg").write_bytes(b"x" * (number + 1))
        out = tmp_path / "out.npz"
        with serving(changing(after=2)) as (url, _):
            result = subprocess.run(
                [
                    sys.executable,
                    ROOT / "model/api/client.py",
                    "embed",
                    tmp_path,
                    "--out",
                    out,
                    "--url",
                    url,
                ],
                check=True,
                capture_output=True,
                text=True,
            )
        assert "all photos are embedded anew" in result.stderr
        with np.load(out) as saved:
            assert (str(saved["version"]), str(saved["manifest_sha256"])) == ("2", "abc")
            assert saved["vectors"][:, 0].tolist() == list(range(1, 101))


@pytest.fixture(scope="module")
def urls() -> Iterator[dict[str, str]]:
    """A real server's, by protocol."""
    with running() as (_, urls):
        yield urls


PHOTO = SHIPPED / "golden/photo.jpg"


class TestConnections:
    """Each connection of a FakeServer has a thread of its own."""

    def test_are_kept(self) -> None:
        used: set[int] = set()

        def answer(photos: PHOTOS, _: str) -> tuple[int, str]:
            used.add(threading.get_ident())
            time.sleep(0.01)
            return embeddings(photos)

        with serving(answer) as (url, server), NpairClient(url, batch_size=1) as client:
            for _ in range(5):
                client.embed([b"x"] * 20)
        assert len(server.batches) == 100
        assert len(used) <= 1 + IN_FLIGHT

    def test_a_new_one_before_a_call_is_repeated(self) -> None:
        """A server that drains says this for as long as the connection is open."""
        draining = set[int]()

        def answer(photos: PHOTOS, _: str) -> tuple[int, str]:
            if not draining or threading.get_ident() in draining:
                draining.add(threading.get_ident())
                return (
                    404,
                    '{"error": "Request for unknown model: \'npair\' has no available versions"}',
                )
            return embeddings(photos)

        with serving(answer) as (url, _), NpairClient(url, retries=1) as client:
            assert client.embed(b"x").version == "1"

    def test_one_that_the_server_has_closed_meanwhile(self) -> None:
        def answer(photos: PHOTOS, _: str) -> tuple[int, str]:
            threading.Timer(0.1, hang_up).start()
            return embeddings(photos)

        def hang_up() -> None:
            for connection in connections:
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

        connections: list[socket.socket] = []
        with serving(answer) as (url, server), NpairClient(url, retries=0) as client:
            answer_one = server.process_request_thread

            def remember(connection: Any, address: Any) -> None:
                connections.append(connection)
                answer_one(connection, address)

            server.process_request_thread = remember  # type: ignore[method-assign, assignment]
            client.embed(b"x")
            time.sleep(0.3)
            assert client.embed(b"x").version == "1"

    def test_each_reaches_another_version(self) -> None:
        """As behind a balancer while versions change: all vectors of a call are of one, and no call fails."""
        numbers, versions = iter(range(10**6)), dict[int, str]()

        def answer(photos: PHOTOS, path: str) -> tuple[int, str]:
            mine = versions.setdefault(threading.get_ident(), "12"[next(numbers) % 2])
            if path.endswith("/models/npair"):
                return 200, json.dumps({"name": "npair", "versions": [mine]})
            if "/versions/" in path and f"/versions/{mine}/" not in path:
                return (
                    400,
                    '{"error": "Request for unknown model: \'npair\' version 0 is not found"}',
                )
            status, text = embeddings([b"x" * int(mine)] * len(photos), mine)
            return status, text

        with (
            serving(answer) as (url, _),
            ThreadPoolExecutor(4) as pool,
            NpairClient(url, batch_size=2) as client,
        ):
            for vectors, version in pool.map(client.embed, [[b"x"] * 12] * 40):
                assert set(vectors[:, 0]) == {int(version)}

    def test_an_answer_of_another_version_than_was_asked_for(self) -> None:
        fault = pytest.raises(ServerFaultError, match="asked for version 1, got 2")
        with (
            serving(partial(embeddings_of, "2")) as (url, _),
            NpairClient(url, version="1") as client,
            fault,
        ):
            client.embed(b"x")

    def test_a_closed_client_says_so(self) -> None:
        with serving(lambda photos, _: embeddings(photos)) as (url, server):
            with NpairClient(url) as client:
                client.embed(b"x")
            client.close()
            with pytest.raises(RuntimeError, match="the client is closed"):
                client.embed(b"x")
        assert len(server.batches) == 1

    @pytest.mark.parametrize("scheme", ["http", "grpc"])
    def test_closing_ends_the_calls_of_other_threads(self, scheme: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as silent, ThreadPoolExecutor(1) as pool:
            client = NpairClient(f"{scheme}://127.0.0.1:{silent.getsockname()[1]}", timeout=60)
            call = pool.submit(client.embed, b"x")
            with silent.accept()[0]:
                time.sleep(0.3)
                client.close()
                assert isinstance(call.exception(timeout=30), RuntimeError)


class Balancer:
    """A TCP port whose new connections go to one of the ports in ``live``, by chance; open ones stay where they are."""

    def __init__(self) -> None:
        self.live: list[str] = []
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=100)
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            threading.Thread(
                target=self._connect, args=(self._listener.accept()[0],), daemon=True
            ).start()

    def _connect(self, client: socket.socket) -> None:
        with (
            client,
            suppress(OSError),
            socket.create_connection(("127.0.0.1", int(random.choice(self.live)))) as server,
        ):
            for end in (client, server):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            threading.Thread(target=self._copy, args=(server, client), daemon=True).start()
            self._copy(client, server)

    def _copy(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while content := source.recv(65536):
                sink.sendall(content)
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


def test_a_rolling_restart_fails_no_call(published: Path, tmp_path: Path) -> None:
    """Two real servers behind an address are replaced, one after the other, by servers of another version."""
    old, new = str(ROOT / "model_repository"), str(tmp_path / "models")
    shutil.copytree(published, tmp_path / "models/npair")
    config = tmp_path / "models/npair/config.pbtxt"
    config.write_text(with_release(config.read_text(), [1], {}))
    photos, balancers, expected = (
        [PHOTO.read_bytes()] * 12,
        {"http": Balancer(), "grpc": Balancer()},
        dict[str, Vectors](),
    )
    processes: list[subprocess.Popen[str]] = []

    def serve(models: str) -> dict[str, str]:
        ports = free_ports()
        processes.append(start(MODEL_REPOSITORY=models, DRAIN_SECONDS="5", **ports))
        lines_until_ready(processes[-1])
        with NpairClient(f"http://127.0.0.1:{ports['HTTP_PORT']}") as client:
            vectors, version = client.embed(photos[:1])
        expected[version] = vectors
        by_protocol = {"http": ports["HTTP_PORT"], "grpc": ports["GRPC_PORT"]}
        for protocol, port in by_protocol.items():
            balancers[protocol].live.append(port)
        return by_protocol

    stop, problems, versions = threading.Event(), list[str](), set[tuple[str, int, str]]()

    def work(protocol: str, count: int) -> None:
        with NpairClient(
            f"{protocol}://127.0.0.1:{balancers[protocol].port}", batch_size=2
        ) as client:
            while not stop.is_set():
                try:
                    vectors, version = client.embed(photos[:count])
                    versions.add((protocol, count, version))
                    if not np.allclose(vectors, expected[version], atol=1e-3):
                        problems.append("mixed")
                except Exception as error:
                    problems.append(repr(error))

    threads = [
        threading.Thread(target=work, args=(protocol, count))
        for protocol in balancers
        for count in (1, 12)
    ]
    try:
        before = [serve(old), serve(old)]
        for thread in threads:
            thread.start()
        for process, ports in zip(processes[:2], before, strict=True):
            process.terminate()
            time.sleep(1)  # until the balancer learns of it
            for protocol, port in ports.items():
                balancers[protocol].live.remove(port)
            process.wait(timeout=60)
            serve(new)
            time.sleep(1)
    finally:
        stop.set()
        for thread in threads:
            if thread.ident:
                thread.join()
        for process in processes:
            process.terminate()
            process.wait(timeout=60)
    assert problems == []
    assert versions == {
        (protocol, count, version)
        for protocol in balancers
        for count in (1, 12)
        for version in expected
    }
    assert len(expected) == 2


PROCESSES = """
import multiprocessing, os, sys, threading

from torch.utils.data import DataLoader, Dataset

from npair.client import NpairClient


class Photos(Dataset):
    def __init__(self, client):
        self.client = client

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return self.client.embed(sys.argv[2]).vectors[0]


def embed(client):
    return len(client.embed([sys.argv[2]] * 3).vectors)


def main():
    with NpairClient(sys.argv[1], batch_size=1, timeout=20) as client:
        assert embed(client) == 3
        busy, stop = threading.Event(), threading.Event()

        def work():
            while not stop.is_set():
                if sys.argv[1].startswith("http"):  # gRPC's calls do not survive it
                    client.embed(sys.argv[2])
                busy.set()

        thread = threading.Thread(target=work)
        thread.start()
        busy.wait()
        children = []
        for _ in range(3):  # as gunicorn does; over HTTP, while a call is under way
            child = os.fork()
            if child == 0:
                with client:
                    os._exit(0 if embed(client) == 3 else 1)
            children.append(child)
        assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]
        stop.set()
        thread.join()
        for method in ("fork", "spawn"):
            with multiprocessing.get_context(method).Pool(2) as pool:
                assert pool.map(embed, [client] * 4) == [3, 3, 3, 3], method
            loader = DataLoader(Photos(client), batch_size=2, num_workers=2, multiprocessing_context=method)
            assert [batch.shape for batch in loader] == [(2, 128), (2, 128)], method
        assert embed(client) == 3


if __name__ == "__main__":
    main()
"""


@pytest.mark.parametrize("scheme", ["http", "grpc"])
class TestThreadsAndProcesses:
    def test_threads_share_a_client(self, urls: dict[str, str], scheme: str) -> None:
        with NpairClient(urls[scheme], batch_size=2) as client, ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(client.embed, [[PHOTO] * 5] * 24))
            expected = client.embed(PHOTO).vectors
        for vectors, _ in answers:
            np.testing.assert_allclose(vectors, np.resize(expected, (5, 128)), atol=1e-3)

    def test_threads_that_come_and_go_leave_nothing(
        self, urls: dict[str, str], scheme: str
    ) -> None:
        with NpairClient(urls[scheme]) as client:
            client.embed(PHOTO)
            before = len(list(Path("/proc/self/fd").iterdir()))
            for _ in range(30):
                thread = threading.Thread(target=client.embed, args=(PHOTO,))
                thread.start()
                thread.join()
            assert len(list(Path("/proc/self/fd").iterdir())) <= before + 2

    def test_processes(self, urls: dict[str, str], scheme: str, tmp_path: Path) -> None:
        """Forked or spawned, with a client that their parent has used."""
        script = tmp_path / "processes.py"
        script.write_text(PROCESSES)
        command: list[str | Path] = [sys.executable, script, urls[scheme], PHOTO]
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr

    def test_asyncio(self, urls: dict[str, str], scheme: str) -> None:
        async def main() -> None:
            async with AsyncNpairClient(urls[scheme], batch_size=2) as client:
                assert await client.ready()
                answers = await asyncio.gather(
                    *(client.embed([PHOTO] * 3) for _ in range(8)), client.embed(PHOTO)
                )
                assert [len(vectors) for vectors, _ in answers] == [3] * 8 + [1]
                thresholds = await client.thresholds()
                assert thresholds is not None
                assert thresholds.version == answers[0].version

        asyncio.run(main())

    def test_proxies_of_the_environment_are_not_used(
        self, urls: dict[str, str], scheme: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name in ("http_proxy", "https_proxy", "grpc_proxy", "all_proxy", "HTTP_PROXY"):
            monkeypatch.setenv(name, "http://127.0.0.1:9")
        monkeypatch.delenv("no_proxy", raising=False)
        with NpairClient(urls[scheme], retries=0) as client:
            assert client.embed(PHOTO).vectors.shape == (1, 128)


def tree(error: type[NpairError]) -> list[type[NpairError]]:
    return [error, *(below for one in error.__subclasses__() for below in tree(one))]


class TestPickle:
    @pytest.mark.parametrize("kind", tree(NpairError))
    @pytest.mark.parametrize(
        "again", [copy.copy, copy.deepcopy, lambda error: pickle.loads(pickle.dumps(error))]
    )
    def test_exceptions(
        self, kind: type[NpairError], again: Callable[[NpairError], NpairError]
    ) -> None:
        error = InvalidPhotoError({3: "broken"}) if kind is InvalidPhotoError else kind("a reason")
        made = again(error)
        assert (type(made), str(made), vars(made)) == (kind, str(error), vars(error))

    def test_a_client_is_its_arguments(self, tmp_path: Path) -> None:
        cert, key = certificate(tmp_path)
        limits: dict[str, Any] = {"timeout": 1.5, "retries": 7, "batch_size": 2, "batch_bytes": 9}
        files: dict[str, Any] = {"ca": cert, "cert": (cert, key)}
        given = {"model": "other", "version": "3", "api_key": "abc"} | limits | files
        with NpairClient("https://127.0.0.1:9", **given) as client:
            made = pickle.loads(pickle.dumps(client))
        given["url"] = "https://127.0.0.1:9"
        assert given.keys() == inspect.signature(NpairClient).parameters.keys()
        assert {name: getattr(made, name) for name in given} == given
        assert not made.ready(), "it is not closed"


class TestErrors:
    def test_bad_photos_are_named_by_their_place_in_the_call(self) -> None:
        def answer(photos: PHOTOS, _: str) -> tuple[int, str]:
            bad = [
                f"IMAGE[{index}]: broken; very; IMAGE"
                for index, photo in enumerate(photos)
                if photo == b"bad"
            ]
            return (400, json.dumps({"error": "; ".join(bad)})) if bad else embeddings(photos)

        with serving(answer) as (url, _), NpairClient(url, batch_size=2) as client:
            with pytest.raises(InvalidPhotoError, match="photo 1: broken") as caught:
                client.embed([b"a", b"bad", b"bad", b"bad", b"c"])
            assert caught.value.reasons == dict.fromkeys((1, 2, 3), "broken; very; IMAGE")
            outcomes = [
                result.reason is None
                for result in client.stream([b"a", b"bad", b"bad", b"bad", b"c"])
            ]
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
            (
                400,
                '{"error": "Request for unknown model: npair has no available versions"}',
                UnavailableError,
            ),  # it stops
            (502, "<html>Bad gateway</html>", UnavailableError),
            (200, '{"model_name": "npair", "model_version": "1", "outputs": []}', ServerFaultError),
        ],
    )
    def test_mapped(self, status: int, body: str, expected: type[NpairError]) -> None:
        with (
            serving(lambda *_: (status, body)) as (url, server),
            NpairClient(url, retries=1) as client,
        ):
            with pytest.raises(expected):
                client.embed(b"photo")
            assert len(server.batches) == (2 if expected is UnavailableError else 1), (
                "only an unavailable server is asked again"
            )

    def test_retries_until_the_server_is_there(self) -> None:
        answers = iter([(503, '{"error": "starting"}'), (503, '{"error": "starting"}')])
        with (
            serving(lambda photos, _: next(answers, embeddings(photos))) as (url, _),
            NpairClient(url) as client,
        ):
            assert client.embed(b"photo").vectors.shape == (1, 128)

    def test_retries_for_the_configuration_too(self) -> None:
        answers = iter([(429, "<html>"), (503, '{"error": "starting"}')])
        with (
            serving(lambda *_: next(answers, (200, '{"parameters": {}}'))) as (url, _),
            NpairClient(url) as client,
        ):
            assert client.thresholds() is None

    def test_a_connection_to_a_machine_that_is_gone_ends(self) -> None:
        """What is not received within 10 s ends it, by the option of its socket."""
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
            with NpairClient(f"grpc://127.0.0.1:{port}", timeout=0.5) as client:
                assert not client.ready()
                limits = []
                for descriptor in Path("/proc/self/fd").iterdir():
                    with (
                        suppress(OSError),
                        socket.socket(fileno=os.dup(int(descriptor.name))) as connection,
                    ):
                        if connection.getpeername()[1:2] == (port,):
                            limits.append(
                                connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT)
                            )
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
                NpairClient(
                    f"{scheme}://127.0.0.1:{silent.getsockname()[1]}", timeout=0.5
                ) as client,
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
                NpairClient(
                    f"{scheme}://127.0.0.1:{listener.getsockname()[1]}", retries=1
                ) as client,
                pytest.raises(UnavailableError),
            ):
                client.embed(b"photo")

    @pytest.mark.parametrize(
        "arguments",
        [
            *(
                {"url": "ftp://a"},
                {"url": "localhost:8000"},
                {"timeout": 0},
                {"retries": -1},
                {"batch_size": 0},
            ),
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
        with (
            serving(lambda photos, _: embeddings(photos)) as (url, server),
            NpairClient(url) as client,
        ):
            with pytest.raises(ValueError, match="no photo"):
                client.embed([])
            with pytest.raises(FileNotFoundError):
                client.embed([b"a", tmp_path / "missing.jpg"])
            with pytest.raises(TypeError, match="not int"):
                client.embed([7])  # type: ignore[list-item]
            with pytest.raises(LookupError):
                EmbeddingStream(client, []).version  # noqa: B018
            assert server.batches == []


class TestTransportErrors:
    """What the network does, on sockets that do it."""

    @contextmanager
    def answering(self, content: bytes, *, reset: bool = False) -> Iterator[tuple[str, list[int]]]:
        """A server that reads a bit, answers this and hangs up. Yields its address, and a list as long as its calls."""
        calls: list[int] = []

        def answer() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection, suppress(OSError):
                    calls.append(len(connection.recv(1 << 20)))
                    connection.sendall(content)
                    if reset:  # what is unsent is dropped
                        connection.setsockopt(
                            socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
                        )
                    else:
                        connection.shutdown(socket.SHUT_WR)
                        connection.recv(1 << 20)

        with socket.create_server(("127.0.0.1", 0)) as listener:
            threading.Thread(target=answer, daemon=True).start()
            yield f"127.0.0.1:{listener.getsockname()[1]}", calls
            listener.shutdown(socket.SHUT_RDWR)

    HEAD = b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n"

    @pytest.mark.parametrize(
        ("content", "expected"),
        [
            (b"", UnavailableError),
            (b"HTTP/1.1 200", UnavailableError),
            (HEAD + b"{", UnavailableError),
            (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nff\r\n{", UnavailableError),
            (b"SSH-2.0-OpenSSH_9.2\r\n", ServerFaultError),
            (b"\0" * 100_000, ServerFaultError),
            (HEAD.replace(b"1000", b"2") + b"{}", ServerFaultError),
            (HEAD.replace(b"1000", b"4") + b"null", ServerFaultError),
            (HEAD.replace(b"1000", b"5") + b"<html", ServerFaultError),
            (
                b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nInference-Header-Content-Length: x\r\n\r\n{}",
                ServerFaultError,
            ),
        ],
    )
    def test_http(self, content: bytes, expected: type[NpairError]) -> None:
        with (
            self.answering(content) as (address, calls),
            NpairClient(f"http://{address}", retries=0) as client,
        ):
            with pytest.raises(expected):
                client.embed(b"photo")
            assert len(calls) == 1

    @pytest.mark.parametrize("content", [b"", HEAD + b"{"])
    def test_http_reset(self, content: bytes) -> None:
        with (
            self.answering(content, reset=True) as (address, _),
            NpairClient(f"http://{address}", retries=0) as client,
            pytest.raises(UnavailableError),
        ):
            client.embed(b"photo")

    @pytest.mark.parametrize("content", [b"", b"SSH-2.0-OpenSSH_9.2\r\n", HEAD + b"{"])
    def test_grpc(self, content: bytes) -> None:
        with (
            self.answering(content) as (address, _),
            NpairClient(f"grpc://{address}", retries=0, timeout=5) as client,
            pytest.raises(UnavailableError),
        ):
            client.embed(b"photo")

    @pytest.mark.parametrize("scheme", ["http", "https", "grpc", "grpcs"])
    def test_a_name_that_is_not_found(self, scheme: str) -> None:
        with (
            NpairClient(f"{scheme}://npair.invalid:1", retries=0) as client,
            pytest.raises(UnavailableError),
        ):
            client.embed(b"photo")

    @pytest.mark.parametrize("scheme", ["https", "grpcs"])
    def test_no_tls(self, scheme: str) -> None:
        with (
            self.answering(b"HTTP/1.1 400 Bad Request\r\n\r\n") as (address, _),
            NpairClient(f"{scheme}://{address}", retries=0) as client,
            pytest.raises(UnavailableError),
        ):
            client.embed(b"photo")

    def test_a_certificate_that_is_not_trusted(self, tmp_path: Path) -> None:
        tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        tls.load_cert_chain(*certificate(tmp_path))
        refused = pytest.raises(UnavailableError, match="CERTIFICATE_VERIFY_FAILED")
        with (
            serving(lambda photos, _: embeddings(photos), tls) as (url, _),
            NpairClient(url, retries=0) as client,
            refused,
        ):
            client.embed(b"photo")

    @pytest.mark.parametrize("scheme", ["http", "grpc"])
    def test_a_bug_stays_what_it_is(self, scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
        tries = []

        def bug(*_: object) -> None:
            tries.append(1)
            raise ZeroDivisionError

        monkeypatch.setattr("npair.client._tensor", bug)
        with NpairClient(f"{scheme}://127.0.0.1:9") as client, pytest.raises(ZeroDivisionError):
            client.embed(b"photo")
        assert len(tries) == 1


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

        with (
            serving(answer) as (url, server),
            NpairClient(url, api_key="abc", batch_size=1) as client,
        ):
            client.embed([b"x"] * 9)
            client.thresholds()
            client.ready()
            client.versions()
        assert server.authorizations == ["Bearer abc"] * 12

    def test_none_is_sent_where_none_is_given(self) -> None:
        with (
            serving(lambda photos, _: embeddings(photos)) as (url, server),
            NpairClient(url) as client,
        ):
            client.embed(b"x")
        assert server.authorizations == [None]

    def test_a_wrong_one_says_nothing_of_the_model(self) -> None:
        denied = pytest.raises(AccessDeniedError, match="a key is needed")
        with (
            serving(lambda *_: (401, '{"error": "a key is needed"}')) as (url, _),
            NpairClient(url) as client,
            denied,
        ):
            client.ready()

    def test_grpc(self) -> None:
        """A server that lets nobody pass, but notes who it was."""
        seen: list[str | None] = []

        class Refusing(grpc.GenericRpcHandler):  # type: ignore[misc]
            def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
                seen.append(dict(details.invocation_metadata).get("authorization"))
                return grpc.unary_unary_rpc_method_handler(
                    lambda _, context: context.abort(
                        grpc.StatusCode.UNAUTHENTICATED, "a key is needed"
                    )
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
    photo = decode(
        PIXEL,
        Preprocessing(size=8, resample="BILINEAR", background=255),
        Limits(max_bytes=100, max_pixels=1),
    )
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

    def test_bad_files_are_named_and_counted_and_the_rest_is_kept(
        self, photos: Path, tmp_path: Path
    ) -> None:
        def answer(photos: PHOTOS, _: str) -> tuple[int, str]:
            bad = [
                f"IMAGE[{index}]: broken" for index, photo in enumerate(photos) if len(photo) == 2
            ]
            return (400, json.dumps({"error": "; ".join(bad)})) if bad else embeddings(photos)

        with serving(answer) as (url, _):
            result = self.run(
                url,
                "embed",
                photos,
                photos / "missing.jpg",
                "--out",
                tmp_path / "out.npz",
                "--json",
            )
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
            return (
                (500, '{"error": "full"}') if photos and len(photos[0]) > 64 else embeddings(photos)
            )

        with serving(answer) as (url, _):
            return self.run(url, "embed", folder, "--out", out)

    def test_which_files_of_folders_are_photos(self, tmp_path: Path) -> None:
        wanted = ["1.jpg", "2.JPE", "3.jfif", "4.webp", "sub/5.jpeg"]
        litter = [
            *(
                "@eaDir/1.jpg/SYNOPHOTO_THUMB_M.jpg",
                "#recycle/1.jpg",
                "@Recycle/1.jpg",
                "__MACOSX/._1.jpg",
                "$RECYCLE.BIN/1.jpg",
            ),
            *(".hidden/1.jpg", "._1.jpg", ".DS_Store"),
        ]
        for name in (*wanted, *litter, "a.HEIC", "sub/b.heic", "Thumbs.db", "README"):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes(b"x")
        with serving(lambda photos, _: embeddings(photos)) as (url, _):
            result = self.run(url, "embed", tmp_path)
            named = self.run(url, "embed", tmp_path / "@eaDir", tmp_path / "README")
        assert result.returncode == 0
        found = [
            str(Path(json.loads(line)["photo"]).relative_to(tmp_path))
            for line in result.stdout.splitlines()
        ]
        assert found == wanted
        assert (
            result.stderr
            == "4 other files in folders passed over: 2 .heic, 1 .db, 1 without a suffix\n"
        )
        assert (len(named.stdout.splitlines()), named.stderr) == (2, ""), (
            "what is named is not passed over"
        )

    def test_photos_that_nobody_answered_are_named(self, hundred: Path) -> None:
        """One of them may be what stops the server."""

        def answer(photos: PHOTOS, _: str) -> tuple[int, str]:
            if photos and len(photos[0]) == 33:
                time.sleep(1)  # the other batches are answered meanwhile
                return 500, '{"error": "stub is not healthy"}'
            return embeddings(photos)

        with serving(answer) as (url, _):
            result = self.run(url, "embed", hundred)
        assert result.returncode == 3
        assert len(result.stdout.splitlines()) == 32
        names = [
            f"{hundred / ('a' if length < 40 else 'b') / f'{length:03}.jpg'}"
            for length in range(33, 65)
        ]
        assert f"no answer for these photos: {', '.join(names)}\n" in result.stderr

    @pytest.mark.parametrize(("scheme", "answered"), [("http", 0), ("http", 1), ("grpc", 0)])
    def test_an_interrupt_does_not_wait_for_answers(
        self, hundred: Path, scheme: str, answered: int
    ) -> None:
        """Neither for a first batch nor for those that threads have sent."""
        with ExitStack() as stack:
            if scheme == "http":
                asked = threading.Event()

                def answer(photos: PHOTOS, path: str) -> tuple[int, str]:
                    if photos and len(photos[0]) > 32 * answered:
                        asked.set()
                        time.sleep(60)
                    return (200, "{}") if path.endswith("/config") else embeddings(photos)

                url, _ = stack.enter_context(serving(answer))
            else:
                silent = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
                url = f"grpc://127.0.0.1:{silent.getsockname()[1]}"
            command: list[str | Path] = [
                sys.executable,
                ROOT / "model/api/client.py",
                "embed",
                hundred,
                "--url",
                url,
            ]
            process = subprocess.Popen(
                command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
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

    @pytest.mark.parametrize("suffix", ["npz", "jsonl"])
    def test_goes_on_after_an_interruption(self, hundred: Path, suffix: str) -> None:
        out, unfinished = (
            hundred.parent / f"out.{suffix}",
            hundred.parent / f"out.{suffix}.unfinished",
        )
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
        assert all("/versions/1/" in path for path in server.paths), (
            "the version of the vectors that are there already"
        )
        assert not unfinished.exists()
        if suffix == "npz":
            with np.load(out) as saved:
                names, vectors, version = (
                    saved["names"].tolist(),
                    saved["vectors"],
                    str(saved["version"]),
                )
            assert vectors.dtype == np.float32
        else:
            rows = [json.loads(line) for line in out.read_text().splitlines()]
            names, vectors, version = (
                [row["photo"] for row in rows],
                np.array([row["embedding"] for row in rows]),
                rows[0]["version"],
            )
        assert [Path(name).name for name in names] == [
            f"{length:03}.jpg" for length in range(1, 101)
        ]
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
            command: list[str | Path] = [
                sys.executable,
                "-c",
                code,
                client,
                "embed",
                folder,
                "--out",
                out,
                "--url",
                url,
            ]
            result = subprocess.run(command, capture_output=True, text=True, check=True)
            return int(result.stderr.split()[-1])

        _, reply = embeddings([b"photo"] * 32)  # of a full batch, which all are
        with serving(lambda *_: (200, reply)) as (url, _):
            assert peak(8320) - peak(320) < 3000  # kB

    @pytest.mark.parametrize("command", ["rank", "compare"])
    def test_refuses_saved_vectors_of_another_version(
        self, photos: Path, tmp_path: Path, command: str
    ) -> None:
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
            return (
                (200, "{}")
                if path.endswith("/config")
                else embeddings(photos, "2" if "/versions/2/" in path else "9")
            )

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
            (
                elsewhere,
                "elsewhere.npz holds vectors of another version 2 than is served or saved beside it",
            ),
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
                assert (
                    self.run(
                        url, "embed", photos / name, "--out", tmp_path / f"{name}.npz"
                    ).returncode
                    == 0
                )
            assert self.run(url, "embed", photos, "--out", tmp_path / "many.npz").returncode == 0
            before = len(server.batches)
            both = self.run(
                url, "compare", tmp_path / "a.png.npz", tmp_path / "b.jpg.npz", "--json"
            )
            assert len(server.batches) == before, "saved vectors are not embedded again"
            one = self.run(url, "compare", photos / "b.jpg", tmp_path / "a.png.npz", "--json")
            many = self.run(url, "compare", photos / "b.jpg", tmp_path / "many.npz")
        assert (
            json.loads(both.stdout)
            == json.loads(one.stdout)
            == {"cosine": 6.0, "version": "1", "same_product": None}
        )
        assert many.returncode == 2
        assert "many.npz holds the vectors of 3 photos, and compare takes one" in many.stderr

    def test_key_and_authority_come_from_the_environment(
        self, photos: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
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
            for arguments in (
                ("embed", photos),
                ("compare", photos / "a.png", photos / "b.jpg"),
                ("ready",),
            ):
                result = self.run(url, *arguments)
                assert result.returncode == 3
                assert "Traceback" not in result.stderr

    @pytest.mark.parametrize(
        "arguments",
        [
            *(
                ("embed", "{}", "--out", "x.csv"),
                ("embed", "{}", "--out", "{}/no/x.npz"),
                ("rank", "{}/a.png", "{}", "-k", "0"),
            ),
            *(("rank", "{}/a.png", "{}/notes.npz"), ("rank", "{}/a.png", "{}/empty.npz"), ()),
        ],
    )
    def test_wrong_usage(self, photos: Path, arguments: tuple[str, ...]) -> None:
        (photos / "notes.npz").write_bytes(b"text")
        (photos / "empty.npz").touch()
        result = self.run(
            "http://127.0.0.1:9", *(argument.format(photos) for argument in arguments)
        )
        assert result.returncode == 2
        assert "Traceback" not in result.stderr


def test_compare_gives_a_verdict_with_the_served_thresholds(tmp_path: Path) -> None:
    """A real server whose configuration has thresholds, over both protocols; golden photos show different products."""
    shutil.copytree(ROOT / "model_repository", tmp_path / "models")
    config = tmp_path / "models/npair/config.pbtxt"
    golden = sorted((tmp_path / "models/npair").glob("[0-9]*/golden/*.jpg"))
    version = golden[0].parts[-3]
    lines = [line for line in config.read_text().splitlines() if "threshold" not in line]
    values = {
        "thresholds_version": version,
        "threshold_far_1_percent": "0.25",
        "threshold_far_01_percent": "1.5",
    }
    lines += [
        f'parameters {{ key: "{key}" value: {{ string_value: "{value}" }} }}'
        for key, value in values.items()
    ]
    config.write_text("\n".join(lines))

    def compare(url: str, a: Path, b: Path, *options: str) -> str:
        command: list[str | Path] = [
            sys.executable,
            ROOT / "model/api/client.py",
            "compare",
            "--url",
            url,
            *options,
            a,
            b,
        ]
        return str(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    with running(MODEL_REPOSITORY=str(tmp_path / "models")) as (_, urls):
        for url in urls.values():
            with NpairClient(url) as client:
                assert client.thresholds() == Thresholds(version, 0.25, 1.5)
            same = compare(url, golden[0], golden[0])
            assert (
                same
                == "same product: cosine 1.0000 >= 0.2500, which 1 % of pairs of different products reach\n"
            )
            strict = json.loads(compare(url, golden[0], golden[0], "--far", "0.1", "--json"))
            assert strict["same_product"] is False
            assert (strict["threshold"], strict["far"]) == (1.5, 0.001)


def test_compare_without_thresholds_gives_no_verdict() -> None:
    photo = SHIPPED / "golden/photo.jpg"
    with serving(
        lambda sent, path: (200, "{}") if path.endswith("/config") else embeddings(sent)
    ) as (url, _):
        command: list[str | Path] = [
            sys.executable,
            ROOT / "model/api/client.py",
            "compare",
            "--url",
            url,
            photo,
            photo,
        ]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert "no verdict: the server's configuration has no such threshold for version 1" in said
