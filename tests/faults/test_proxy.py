"""Run docs/proxy/npair.conf in Debian's nginx before a real server; test what it lets through.

make test-faults
"""

from __future__ import annotations

import getpass
import gzip
import http.client
import json
import re
import shutil
import socket
import ssl
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import tritonclient.grpc
from supervisor.api import CONTROL_HEADER
from supervisor.launch import MAX_REQUEST_BYTES
from supervisor.procfs import children, server_at
from support.clients import Clients
from support.models import ROOT, SHIPPED
from support.servers import free_ports, running
from support.tls import certificate
from tritonclient.utils import InferenceServerException

from npair.client import (
    AccessDeniedError,
    InvalidRequestError,
    NpairClient,
    NpairError,
    UnavailableError,
)

KEY, OTHER_KEY, SECRET = 64 * "a", 64 * "b", "open sesame"
CONFIGURATION = (ROOT / "docs/proxy/npair.conf").read_text()
PHOTOS = [SHIPPED / "golden/photo.jpg", SHIPPED / "golden/grey.png"]
METADATA = "/v2/models/npair"
PAGE = (ROOT / "docs/security.md").read_text()
ROUTES = re.findall(r"^\| `(GET|POST) (\S+)` \| \w+ \| (.*?) \|$", PAGE, re.MULTILINE)


class Proxy(NamedTuple):
    """A running nginx.

    port: where it listens. urls, direct: URLs of the proxy and of the server behind it, by
    protocol. ca: the certificate to trust. log: the access log.
    """

    port: int
    urls: dict[str, str]
    direct: dict[str, str]
    ca: Path
    log: Path

    def client(self, protocol: str, api_key: str | None = KEY, **options: Any) -> NpairClient:
        return NpairClient(self.urls[protocol], ca=self.ca, api_key=api_key, **options)

    def triton(self) -> Any:
        """Return Triton's own gRPC client."""
        address = self.urls["grpc"].removeprefix("grpcs://")
        return tritonclient.grpc.InferenceServerClient(address, ssl=True, root_certificates=self.ca)

    def connect(self) -> ssl.SSLSocket:
        context = ssl.create_default_context(cafile=str(self.ca))
        return context.wrap_socket(
            socket.create_connection(("127.0.0.1", self.port), timeout=60),
            server_hostname="127.0.0.1",
        )

    def ask(
        self, method: str, path: str, key: str | None = KEY, **headers: str
    ) -> tuple[int, bytes]:
        """Send a request without normalising its path; return the status and the body."""
        return self.send(method, path, b"{}" if method == "POST" else None, key, **headers)

    def post(self, path: str, body: bytes, **headers: str) -> tuple[int, bytes]:
        return self.send("POST", path, body, KEY, **headers)

    def send(
        self, method: str, path: str, body: bytes | None, key: str | None, **headers: str
    ) -> tuple[int, bytes]:
        context = ssl.create_default_context(cafile=str(self.ca))
        connection = http.client.HTTPSConnection(
            "127.0.0.1", self.port, timeout=30, context=context
        )
        headers |= {} if key is None else {"Authorization": f"Bearer {key}"}
        connection.request(method, path, body, headers)
        response = connection.getresponse()
        answer = response.status, response.read()
        connection.close()
        return answer


@pytest.fixture(scope="module")
def proxy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    nginx = shutil.which("nginx", path="/usr/sbin:/usr/bin:/usr/local/sbin:/usr/local/bin")
    if nginx is None:
        pytest.fail("these tests need nginx: apt-get install --no-install-recommends nginx")
    folder = tmp_path_factory.mktemp("nginx")
    cert, _ = certificate(folder)
    (folder / "npair-keys.conf").write_text(f'"Bearer {KEY}" shop;\n"Bearer {OTHER_KEY}" other;\n')
    port = free_ports()["HTTP_PORT"]
    with running(NPAIR_CONTROL_SECRET=SECRET) as (_, direct):
        places = {
            "listen 443": f"listen 127.0.0.1:{port}",
            "127.0.0.1:8000": direct["http"].removeprefix("http://"),
            "127.0.0.1:8001": direct["grpc"].removeprefix("grpc://"),
            "/etc/nginx/": f"{folder}/",
            "/var/log/nginx/": f"{folder}/",
        }
        configuration = CONFIGURATION
        for documented, here in places.items():
            assert documented in configuration
            configuration = configuration.replace(documented, here)
        kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        (folder / "nginx.conf").write_text(
            f"daemon off; user {getpass.getuser()}; pid {folder}/pid; "
            f"error_log {folder}/error.log; events {{}}\n"
            f"http {{ {' '.join(f'{kind}_temp_path {folder}/{kind};' for kind in kinds)}\n"
            f"{configuration}}}\n"
        )
        process = subprocess.Popen(
            [nginx, "-p", folder, "-c", folder / "nginx.conf"], stderr=subprocess.PIPE, text=True
        )
        try:
            urls = {"http": f"https://127.0.0.1:{port}", "grpc": f"grpcs://127.0.0.1:{port}"}
            proxy = Proxy(int(port), urls, direct, cert, folder / "npair.log")
            wait_for(process, proxy)
            yield proxy
        finally:
            process.terminate()
            process.wait(timeout=30)


def wait_for(process: subprocess.Popen[str], proxy: Proxy) -> None:
    for _ in range(100):
        if process.poll() is not None:
            pytest.fail(f"nginx did not start: {process.communicate()[1]}")
        with suppress(OSError):
            socket.create_connection(("127.0.0.1", proxy.port)).close()
            return
        time.sleep(0.1)
    pytest.fail("nginx does not listen")


@pytest.fixture(autouse=True)
def rested() -> None:
    """Wait for the rate limit, 20 requests a second, to recover from the test before."""
    time.sleep(0.5)


@pytest.fixture
def exhausted() -> Iterator[None]:
    """Wait longer after a test that used up the burst of 40 requests as well."""
    yield
    time.sleep(2.5)


both = pytest.mark.parametrize("protocol", ["http", "grpc"])


@both
def test_embeddings_are_the_servers_own(proxy: Proxy, protocol: str) -> None:
    with proxy.client(protocol) as through, NpairClient(proxy.direct[protocol]) as direct:
        assert through.ready()
        np.testing.assert_allclose(
            through.embed(PHOTOS).vectors, direct.embed(PHOTOS).vectors, atol=1e-6
        )
        assert through.thresholds() == direct.thresholds()
        assert through.manifest_sha256(SHIPPED.name)
        through.version = SHIPPED.name
        assert through.embed(PHOTOS).version == SHIPPED.name


@both
def test_stream_over_several_connections(proxy: Proxy, protocol: str) -> None:
    with proxy.client(protocol, batch_size=4) as client:
        assert client.embed(PHOTOS * 10).vectors.shape == (20, 128)


@both
@pytest.mark.parametrize("key", [None, 64 * "c", KEY[:-1]])
def test_without_a_valid_key_nothing_passes(proxy: Proxy, protocol: str, key: str | None) -> None:
    with proxy.client(protocol, key) as client:
        with pytest.raises(AccessDeniedError):
            client.embed(PHOTOS)
        with pytest.raises(AccessDeniedError):
            client.thresholds()
        with pytest.raises(AccessDeniedError):
            client.ready()


def test_every_path_needs_a_key(proxy: Proxy) -> None:
    for path in ("/", METADATA, "/v2/health/live", "/v2/repository/index", "/nowhere"):
        status, body = proxy.ask("GET", path, key=None)
        assert status == 401
        assert "Authorization: Bearer KEY" in json.loads(body)["error"]


@both
def test_unknown_authority_and_plain_text(proxy: Proxy, protocol: str) -> None:
    for url in (proxy.urls[protocol], f"{protocol}://127.0.0.1:{proxy.port}"):
        with NpairClient(url, api_key=KEY, retries=0) as client, pytest.raises(NpairError):
            client.embed(PHOTOS)


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion:DeprecationWarning")
def test_old_tls_is_refused(proxy: Proxy) -> None:
    context = ssl.create_default_context(cafile=str(proxy.ca))
    context.minimum_version = ssl.TLSVersion.TLSv1
    context.maximum_version = ssl.TLSVersion.TLSv1_1
    context.set_ciphers("ALL:@SECLEVEL=0")
    with (
        socket.create_connection(("127.0.0.1", proxy.port)) as plain,
        pytest.raises(ssl.SSLError, match=r"(?i)alert"),
    ):
        context.wrap_socket(plain, server_hostname="127.0.0.1")


@pytest.mark.parametrize(
    "path",
    [
        "/v2/repository/index",
        "/v2/repository/models/npair/unload",
        "/v2/systemsharedmemory/status",
        "/v2/cudasharedmemory/status",
        "/v2/trace/setting",
        "/v2/models/npair/trace/setting",
        "/v2/logging",
        "/v2/models/npair/generate",
        "/v2/models/npair/../../repository/index",
        "/v2/models/npair/..%2f..%2frepository/index",
        "/v2/models/npair%0a/infer",
        "/v2/models/npair/infer%0a",
        "/inference.GRPCInferenceService/ModelInfer%0a",
        "//v2/repository//index",
        "/metrics",
        "/",
    ],
)
def test_control_and_unknown_paths_are_not_there(proxy: Proxy, path: str) -> None:
    for method in ("GET", "POST"):
        assert proxy.ask(method, path, **{CONTROL_HEADER: SECRET})[0] == 404
    with NpairClient(proxy.direct["http"]) as client:
        assert client.ready(), "the model was unloaded"


def test_control_over_grpc_is_not_there(proxy: Proxy) -> None:
    with proxy.triton() as client, pytest.raises(Exception, match="UNIMPLEMENTED"):
        client.get_model_repository_index(
            headers={
                "authorization": f"Bearer {KEY}",
                f"triton-grpc-protocol-{CONTROL_HEADER}": SECRET,
            }
        )


@pytest.mark.parametrize(("method", "path", "through"), ROUTES)
def test_what_the_page_says_is_there(proxy: Proxy, method: str, path: str, through: str) -> None:
    statuses = {"with a key": (200, 500), "not there": (404,)}  # 500: infer without a photo
    assert proxy.ask(method, path)[0] in statuses[through]


def test_methods_that_nobody_needs(proxy: Proxy) -> None:
    assert proxy.ask("DELETE", METADATA)[0] == 403


@both
def test_too_large_a_body(proxy: Proxy, protocol: str) -> None:
    large = [bytes(17_000_000)] * 4
    with (
        proxy.client(protocol, batch_bytes=1 << 30) as client,
        pytest.raises(InvalidRequestError, match=r"413|64 MiB"),
    ):
        client.embed(large)
    assert f"client_max_body_size {MAX_REQUEST_BYTES >> 20}m;" in CONFIGURATION


def test_too_large_a_body_in_chunks(proxy: Proxy) -> None:
    """The limit holds for a body whose length no header announces."""
    with proxy.connect() as connection:
        head = (
            f"POST {METADATA}/infer HTTP/1.1\r\nHost: npair\r\nAuthorization: Bearer {KEY}\r\n"
            "Transfer-Encoding: chunked\r\n\r\n"
        )
        connection.sendall(head.encode())
        with suppress(OSError):  # nginx may close the connection meanwhile
            for _ in range(70):
                connection.sendall(b"100000\r\n" + bytes(1 << 20) + b"\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 413 ")


def test_compressed_bodies_and_many_chunks(proxy: Proxy) -> None:
    """nginx keeps from Triton what crashes version 2.51 or makes it leak memory.

    It refuses compressed bodies and joins chunks into one body.
    """
    headers = {"Content-Encoding": "gzip"}
    assert proxy.ask("POST", f"{METADATA}/infer", **headers) == (
        415,
        b'{"error": "send the request without Content-Encoding"}',
    )
    with proxy.connect() as connection:
        head = (
            f"POST {METADATA}/infer HTTP/1.1\r\nHost: npair\r\nAuthorization: Bearer {KEY}\r\n"
            "Transfer-Encoding: chunked\r\n\r\n"
        )
        connection.sendall(head.encode() + b"1\r\n[\r\n" * 100_000 + b"0\r\n\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 500 "), "not JSON"
    with proxy.client("http") as client:
        assert client.embed(PHOTOS).vectors.shape == (2, 128)


@pytest.mark.parametrize("size", [5_000_000, 20_000_000, MAX_REQUEST_BYTES - 1])
def test_forms_are_not_parsed(proxy: Proxy, size: int) -> None:
    """Triton would turn each pair into objects many times its size and copy the body to a stack."""
    triton = server_at(int(proxy.direct["http"].rpartition(":")[2]))
    status, peak = Path(f"/proc/{triton}/status"), Path(f"/proc/{triton}/clear_refs")

    def megabytes(of: str) -> float:
        return int(re.findall(rf"{of}:\s+(\d+)", status.read_text())[0]) / 1000

    peak.write_text("5")  # reset the peak to the resident memory
    before = megabytes("VmRSS")
    body = (b"a=b&" * (size // 4 + 1))[:size]
    headers = {
        "Content-Type": "application/x-www-form-urlencoded",
        "Inference-Header-Content-Length": "0",
    }
    assert proxy.post(f"{METADATA}/infer", body, **headers)[0] == 400
    assert megabytes("VmHWM") - before < 5 * size / 1e6 + 20
    with proxy.client("http") as client:
        assert client.embed(PHOTOS).vectors.shape == (2, 128)


@pytest.mark.parametrize(
    "content_type",
    ["multipart", "application/x-www-form-urlencoded", "application/json", "image/jpeg", ""],
)
def test_a_photo_of_any_content_type(proxy: Proxy, content_type: str) -> None:
    """Each content type gets a whole answer.

    Triton answers "multipart" with a Content-Length of 0 and a body, which would become the start
    of the next answer on the same connection.
    """
    photo = PHOTOS[0].read_bytes()
    for _ in range(3):
        headers = {"Content-Type": content_type, "Inference-Header-Content-Length": "0"}
        status, answer = proxy.post(f"{METADATA}/infer", photo, **headers)
        assert status == 200
        assert len(answer) > 512


def test_json_is_read_whatever_its_content_type(proxy: Proxy) -> None:
    tensor = {"name": "IMAGE", "shape": [1, 1], "datatype": "BYTES", "data": ["no photo"]}
    status, answer = proxy.post(
        f"{METADATA}/infer",
        json.dumps({"inputs": [tensor]}).encode(),
        **{"Content-Type": "application/json"},
    )
    assert status == 400
    assert "not a JPEG" in json.loads(answer)["error"]


def test_compressed_grpc(proxy: Proxy) -> None:
    photo = tritonclient.grpc.InferInput("IMAGE", [1, 1], "BYTES")
    photo.set_data_from_numpy(np.array([[PHOTOS[0].read_bytes()]], dtype=np.object_))
    key = {"authorization": f"Bearer {KEY}"}
    with proxy.triton() as client:
        for algorithm in ("gzip", "deflate"):
            with pytest.raises(
                InferenceServerException, match=r"UNIMPLEMENTED.*without compression"
            ):
                client.infer("npair", [photo], headers=key, compression_algorithm=algorithm)
        assert client.infer("npair", [photo], headers=key).as_numpy("EMBEDDING").shape == (1, 128)


def test_compression_behind_another_header(proxy: Proxy, tmp_path: Path) -> None:
    """Of two equal headers, nginx 1.22 reads the first and gRPC the last."""
    message, content = tmp_path / "message", gzip.compress(b"")
    message.write_bytes(struct.pack(">BI", 1, len(content)) + content)
    headers = [
        f"Authorization: Bearer {KEY}",
        "Content-Type: application/grpc",
        "TE: trailers",
        "grpc-encoding: identity",
    ]
    command = [
        "curl",
        "--silent",
        "--include",
        "--http2",
        "--cacert",
        str(proxy.ca),
        "--data-binary",
        f"@{message}",
    ]
    for header in [*headers, "grpc-encoding: gzip"]:
        command += ["--header", header]
    url = f"{proxy.urls['http']}/inference.GRPCInferenceService/ServerLive"
    assert (
        b"grpc-status: 13"
        in subprocess.run([*command, url], capture_output=True, check=True).stdout
    ), "the compressed message was parsed"


def flood(proxy: Proxy, requests: int) -> list[int]:
    """Send requests of one caller at once; return the statuses of the answers."""
    last = (
        f"GET {METADATA} HTTP/1.1\r\nHost: npair\r\nAuthorization: Bearer {KEY}\r\n"
        "Connection: close\r\n\r\n"
    )
    with proxy.connect() as connection:
        connection.sendall(
            (last.replace("Connection: close\r\n", "") * (requests - 1) + last).encode()
        )
        answers = b"".join(iter(lambda: connection.recv(1 << 16), b""))
    return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d+) ", answers)]


@pytest.mark.usefixtures("exhausted")
def test_rate_of_one_caller_is_limited_and_others_are_served(proxy: Proxy) -> None:
    statuses = flood(proxy, 300)
    assert set(statuses) == {200, 429}
    assert proxy.ask("GET", METADATA, OTHER_KEY)[0] == 200
    for protocol in proxy.urls:
        with proxy.client(protocol) as client:
            assert client.embed(PHOTOS).vectors.shape == (2, 128), (
                "the client does not retry until it is let through"
            )


@both
@pytest.mark.usefixtures("exhausted")
def test_a_client_that_may_not_wait_is_told(proxy: Proxy, protocol: str) -> None:
    def keep_flooding(stopping: threading.Event) -> None:
        while not stopping.is_set():
            flood(proxy, 300)

    with (
        Clients(keep_flooding),
        proxy.client(protocol, retries=0) as client,
        pytest.raises(UnavailableError, match=r"429|too many requests"),
    ):
        list(map(client.embed, 100 * [PHOTOS[0]]))


def test_slow_callers_are_cut_off_and_others_are_served(proxy: Proxy) -> None:
    """Callers that stall after connecting, in the header or in the body do not delay the others."""
    head = f"POST {METADATA}/infer HTTP/1.1\r\nHost: npair\r\nAuthorization: Bearer {KEY}\r\n"
    with (
        socket.create_connection(("127.0.0.1", proxy.port), timeout=60) as silent,
        proxy.connect() as header,
        proxy.connect() as body,
    ):
        header.sendall(head.encode())
        body.sendall(f"{head}Content-Length: 1000\r\n\r\n".encode() + bytes(10))
        slow = [silent, header, body]
        began = time.monotonic()
        with proxy.client("http") as client:
            assert client.embed(PHOTOS).vectors.shape == (2, 128)
        for connection in slow:
            with suppress(ConnectionResetError):
                connection.recv(100)  # times out after 60 s, which fails the test
        assert time.monotonic() - began < 30


def test_a_server_that_is_down_is_unavailable(proxy: Proxy) -> None:
    """Simulate it by pointing the proxy at ports where nothing listens."""
    configuration = proxy.log.with_name("nginx.conf")
    text = configuration.read_text()
    nobody = free_ports()
    for protocol, port in (("http", "HTTP_PORT"), ("grpc", "GRPC_PORT")):
        text = text.replace(proxy.direct[protocol].split("//")[1], f"127.0.0.1:{nobody[port]}")
    before, _ = configuration.read_text(), configuration.write_text(text)
    try:
        reload(proxy)
        for protocol in proxy.urls:
            with proxy.client(protocol, retries=0) as client, pytest.raises(UnavailableError):
                client.embed(PHOTOS)
    finally:
        configuration.write_text(before)
        reload(proxy)
    with proxy.client("http") as client:
        assert client.ready()


def reload(proxy: Proxy) -> None:
    pid = int(proxy.log.with_name("pid").read_text())
    before = children(pid)
    subprocess.run(["kill", "-HUP", str(pid)], check=True)
    for _ in range(100):
        if set(children(pid)).isdisjoint(before):
            return
        time.sleep(0.1)


def test_the_log_names_callers_and_no_key(proxy: Proxy) -> None:
    assert proxy.ask("GET", METADATA)[0] == 200
    log = proxy.log.read_text()
    assert " shop [" in log
    assert KEY not in log + proxy.log.with_name("error.log").read_text()
