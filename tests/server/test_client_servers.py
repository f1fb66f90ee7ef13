"""Use the client on real servers: from threads, processes, and behind a load balancer."""

from __future__ import annotations

import asyncio
import io
import random
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import pillow_heif
import pytest
from PIL import Image
from support.models import ROOT, SHIPPED
from support.servers import free_ports, lines_until_ready, running, start

from npair.client import AsyncNpairClient, NpairClient, Vectors
from npair.client.formats import encoded_photo
from npair.releasing.config import with_release

PHOTO = SHIPPED / "golden/photo.jpg"


@pytest.fixture(scope="module")
def urls() -> Iterator[dict[str, str]]:
    """Start a real server and yield its URL for each protocol."""
    with running() as (_, urls):
        yield urls


class Balancer:
    """Forward each TCP connection to a random port in ``live``."""

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
    """Replace two real servers behind one address, one after the other, by another version."""
    old, new = str(ROOT / "model_repository"), str(tmp_path / "models")
    shutil.copytree(published, tmp_path / "models/npair")
    config = tmp_path / "models/npair/config.pbtxt"
    config.write_text(with_release(config.read_text(), [1], {}))
    photos, expected = [PHOTO.read_bytes()] * 12, dict[str, Vectors]()
    balancers = {"http": Balancer(), "grpc": Balancer()}
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
        url = f"{protocol}://127.0.0.1:{balancers[protocol].port}"
        with NpairClient(url, batch_size=2) as client:
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
            time.sleep(1)  # until the balancer notices
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
            loader = DataLoader(Photos(client), 2, num_workers=2, multiprocessing_context=method)
            assert [batch.shape for batch in loader] == [(2, 128), (2, 128)], method
        assert embed(client) == 3


if __name__ == "__main__":
    main()
"""


def test_a_converted_photo_is_embedded_like_its_png(urls: dict[str, str]) -> None:
    with Image.open(PHOTO) as opened:
        image = opened.convert("RGB").resize((240, 240))
    files = {kind: io.BytesIO() for kind in ("PNG", "TIFF", "BMP", "HEIF", "AVIF", "GIF")}
    pillow_heif.register_heif_opener()
    for kind, file in files.items():
        image.save(file, kind, **{"quality": 95} if kind in ("HEIF", "AVIF") else {})
        file.seek(0)
    with NpairClient(urls["http"]) as client:
        png, *others = client.embed(map(encoded_photo, files.values())).vectors
    cosines = dict(zip(list(files)[1:], np.array(others) @ png, strict=True))
    for kind, least in (
        ("TIFF", 1.0),
        ("BMP", 1.0),
        ("HEIF", 0.995),
        ("AVIF", 0.995),
        ("GIF", 0.95),
    ):
        assert cosines[kind] >= least - 1e-3, cosines


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
        """Fork or spawn children that use a client which their parent has used."""
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
