"""Check docs/security.md on a real server: ports, the secret, TLS and Triton releases."""

from __future__ import annotations

import http.client
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from urllib.request import urlopen

import grpc
import numpy as np
import pytest
import tritonclient.grpc
from supervisor.api import CONTROL_HEADER
from supervisor.launch import Triton, command, find_triton, given_secret
from supervisor.logs import log
from supervisor.options import parse
from supervisor.preflight import ServeError
from supervisor.procfs import children
from supervisor.supervise import Supervisor
from support.models import ROOT, SHIPPED
from support.servers import PORTS, free_ports, lines_until_ready, start
from support.tls import certificate
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import InferenceServerException

from npair.client import NpairClient, UnavailableError
from npair.releasing import ReleaseError
from npair.releasing.control import control_secret

PAGE = (ROOT / "docs/security.md").read_text()
SECRET = "open sesame"
PHOTO = SHIPPED / "golden/photo.jpg"


class Server(NamedTuple):
    """A verbose server with a control secret and TLS.

    pid is Triton's process; lines are those of stderr until the server was ready.
    """

    process: subprocess.Popen[str]
    pid: int
    lines: list[str]
    host: str
    urls: dict[str, str]
    metrics: str
    ca: Path


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    cert, key = certificate(tmp_path_factory.mktemp("tls"))
    ports = free_ports()
    http_port, grpc_port, metrics_port = (ports[name] for name in PORTS)
    process = start(
        "--verbose",
        **ports,
        NPAIR_CONTROL_SECRET=SECRET,
        GRPC_TLS_CERT=str(cert),
        GRPC_TLS_KEY=str(key),
    )
    try:
        lines = lines_until_ready(process)
        urls = {"http": f"http://127.0.0.1:{http_port}", "grpc": f"grpcs://127.0.0.1:{grpc_port}"}
        metrics = f"http://127.0.0.1:{metrics_port}/metrics"
        yield Server(
            process, children(process.pid)[0], lines, f"127.0.0.1:{http_port}", urls, metrics, cert
        )
    finally:
        process.terminate()
        process.wait(timeout=30)


def http_status(server: Server, method: str, path: str, secret: str = "") -> int:
    connection = http.client.HTTPConnection(server.host, timeout=30)
    connection.request(
        method,
        path,
        b"{}" if method == "POST" else None,
        {CONTROL_HEADER: secret} if secret else {},
    )
    status = connection.getresponse().status
    connection.close()
    return status


@pytest.fixture(scope="module")
def stub(server: Server) -> Iterator[service_pb2_grpc.GRPCInferenceServiceStub]:
    address, credentials = (
        server.urls["grpc"].removeprefix("grpcs://"),
        grpc.ssl_channel_credentials(server.ca.read_bytes()),
    )
    with grpc.secure_channel(address, credentials) as channel:
        yield service_pb2_grpc.GRPCInferenceServiceStub(channel)


def is_closed(stub: service_pb2_grpc.GRPCInferenceServiceStub, method: str) -> bool:
    streams = method == "ModelStreamInfer"
    request = (
        service_pb2.ModelInferRequest() if streams else getattr(service_pb2, f"{method}Request")()
    )
    try:
        answer = getattr(stub, method)(iter([request]) if streams else request, timeout=30)
        return streams and not list(answer)
    except grpc.RpcError as error:
        return "restricted" in error.details()


HTTP_ROUTES = re.findall(r"^\| `(GET|POST) (\S+)` \| (open|closed) \|", PAGE, re.MULTILINE)
GRPC_METHODS = {
    method: state
    for methods, state in re.findall(
        r"^\| (`[A-Z][a-z].*?`) \| (open|closed) \|", PAGE, re.MULTILINE
    )
    for method in re.findall(r"`(\w+)`", methods)
}


class TestPorts:
    @pytest.mark.parametrize(("method", "path", "state"), HTTP_ROUTES)
    def test_http(self, server: Server, method: str, path: str, state: str) -> None:
        status = http_status(server, method, path)
        assert (status == 403) == (state == "closed")
        assert status != 404

    def test_grpc(self, stub: service_pb2_grpc.GRPCInferenceServiceStub) -> None:
        closed = {method for method in GRPC_METHODS if is_closed(stub, method)}
        assert closed == {method for method, state in GRPC_METHODS.items() if state == "closed"}

    def test_every_method_is_listed(self) -> None:
        assert set(GRPC_METHODS) == set(
            service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods_by_name
        )

    def test_metrics(self, server: Server) -> None:
        assert b"nv_inference_count" in urlopen(server.metrics).read()
        assert http_status(server, "GET", "/metrics") == 404


class TestSecret:
    def test_opens_control_apis(self, server: Server) -> None:
        assert http_status(server, "POST", "/v2/repository/index", SECRET) == 200
        assert http_status(server, "POST", "/v2/repository/index", "wrong") == 403
        header = f"triton-grpc-protocol-{CONTROL_HEADER}"
        client = tritonclient.grpc.InferenceServerClient(
            server.urls["grpc"].removeprefix("grpcs://"), ssl=True, root_certificates=str(server.ca)
        )
        assert client.get_model_repository_index(headers={header: SECRET}).models
        for headers in ({}, {header: "wrong"}, {CONTROL_HEADER: SECRET}):
            with pytest.raises(InferenceServerException, match="restricted"):
                client.get_model_repository_index(headers=headers)
        client.close()

    @pytest.mark.parametrize("page", ["docs/clients.md", "docs/security.md"])
    def test_both_protocols_names_for_it_are_told(self, page: str) -> None:
        text = (ROOT / page).read_text()
        assert f"`{CONTROL_HEADER}`" in text
        assert f"`triton-grpc-protocol-{CONTROL_HEADER}`" in text

    def test_what_is_seen_instead_opens_nothing(self, server: Server) -> None:
        seen = re.findall(
            rf"{CONTROL_HEADER}=([^\0]+)", Path(f"/proc/{server.pid}/cmdline").read_text()
        )
        assert len(seen) == 2, "the flags are there"
        assert all(
            http_status(server, "POST", "/v2/repository/index", text) == 403 for text in seen
        )

    def test_is_in_no_process_but_the_parent(self, server: Server) -> None:
        stubs = children(server.pid)
        assert stubs
        for process in (server.process.pid, server.pid, *stubs):
            assert "sesame" not in Path(f"/proc/{process}/cmdline").read_text()
        for process in (server.pid, *stubs):
            assert "sesame" not in Path(f"/proc/{process}/environ").read_text()

    def test_is_in_no_log(self, server: Server) -> None:
        assert any("http_server.cc" in line for line in server.lines), "all is logged"
        assert "sesame" not in "".join(server.lines)

    def test_where_it_cannot_be_hidden_that_is_said_once(
        self,
        server: Server,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """Simulate Yama's ptrace_scope 3, which can only be set for the whole machine."""

        def refuse(_: int) -> None:
            raise PermissionError(13, "Permission denied")

        said: list[str] = []
        monkeypatch.setattr(log, "warning", said.append)
        monkeypatch.setattr("supervisor.supervise.hide_secret", refuse)
        supervisor = Supervisor(parse([]), Triton(tmp_path, tmp_path, {}, tmp_path))
        supervisor.process = server.process  # type: ignore[assignment]
        line = b'I1127 09:00:00.000000 1 server.cc:1] "one line of several"\n'
        supervisor.relay.run([line, line], supervisor._hide_secret)
        (warning,) = said
        assert "users of this machine can read the secret for control APIs" in warning

    def test_another_users_process_cannot_be_written(self) -> None:
        """If the tests run as root, switch to an unprivileged user first."""
        code = (
            "import os; from supervisor.launch import hide_secret; "
            "os.getuid() or os.setuid(65534); hide_secret(1)"
        )
        command = [sys.executable, "-c", code]
        result = subprocess.run(
            command, cwd=ROOT / "model/api", capture_output=True, text=True, check=False
        )
        assert "PermissionError" in result.stderr

    @pytest.mark.parametrize("secret", [" leading", "two\nlines", "sésame"])
    def test_that_no_header_can_carry(self, monkeypatch: pytest.MonkeyPatch, secret: str) -> None:
        monkeypatch.setenv("NPAIR_CONTROL_SECRET", secret)
        monkeypatch.delenv("NPAIR_CONTROL_SECRET_FILE", raising=False)
        with pytest.raises(
            ServeError, match="NPAIR_CONTROL_SECRET must be one line of printable ASCII"
        ) as caught:
            given_secret()
        assert secret not in str(caught.value)
        with pytest.raises(
            ReleaseError, match="NPAIR_CONTROL_SECRET must hold one line of printable ASCII"
        ) as refused:
            control_secret()
        assert secret not in str(refused.value)

    def test_is_in_no_image(self) -> None:
        """The Dockerfile copies files by name, so unlisted files reach no layer."""
        dockerfile = (ROOT / "model/api/Dockerfile.cpu").read_text()
        assert "NPAIR_" not in dockerfile
        assert not re.search(r"^(COPY|ADD)( --chmod=\d+)? \.", dockerfile, re.MULTILINE)


class TestTls:
    def test_the_same_embeddings(self, server: Server) -> None:
        assert server.urls["grpc"] in server.lines[-1]
        with (
            NpairClient(server.urls["http"]) as plain,
            NpairClient(server.urls["grpc"], ca=server.ca) as client,
        ):
            np.testing.assert_allclose(
                client.embed([PHOTO] * 40).vectors[39], plain.embed(PHOTO).vectors[0], atol=1e-5
            )

    def test_without_the_authority_or_without_tls_there_is_no_answer(self, server: Server) -> None:
        for url in (server.urls["grpc"], server.urls["grpc"].replace("grpcs", "grpc")):
            with NpairClient(url, retries=0, timeout=5) as client, pytest.raises(UnavailableError):
                client.embed(PHOTO)

    def test_clients_need_certificates_where_an_authority_is_given(self, tmp_path: Path) -> None:
        cert, key = certificate(tmp_path)
        ports = free_ports()
        process = start(
            **ports, GRPC_TLS_CERT=str(cert), GRPC_TLS_KEY=str(key), GRPC_TLS_CLIENT_CA=str(cert)
        )
        try:
            lines_until_ready(process)
            address = f"127.0.0.1:{ports['GRPC_PORT']}"
            with (
                NpairClient(f"grpcs://{address}", ca=cert, retries=0) as client,
                pytest.raises(UnavailableError),
            ):
                client.embed(PHOTO)
            with NpairClient(f"grpcs://{address}", ca=cert, cert=(cert, key), retries=0) as client:
                client.embed(PHOTO)
        finally:
            process.terminate()
            process.wait(timeout=30)

    @pytest.mark.parametrize(
        ("given", "reason"),
        [
            (
                {"GRPC_TLS_CERT"},
                "needs a certificate and its key: set --grpc-key (GRPC_TLS_KEY) as well",
            ),
            (
                {"GRPC_TLS_KEY"},
                "needs a certificate and its key: set --grpc-cert (GRPC_TLS_CERT) as well",
            ),
            (
                {"GRPC_TLS_CLIENT_CA"},
                "needs a certificate and its key: set --grpc-cert (GRPC_TLS_CERT) as well",
            ),
            (
                {"GRPC_TLS_CERT", "GRPC_TLS_KEY", "missing"},
                "--grpc-client-ca (GRPC_TLS_CLIENT_CA) cannot be read: ",
            ),
            ({"GRPC_TLS_CERT", "GRPC_TLS_KEY", "binary"}, "is not PEM; convert it with openssl"),
        ],
    )
    def test_incomplete(self, tmp_path: Path, given: set[str], reason: str) -> None:
        cert, key = certificate(tmp_path)
        binary = tmp_path / "ca.der"
        binary.write_bytes(bytes(100))
        files = {"GRPC_TLS_CERT": cert, "GRPC_TLS_KEY": key, "GRPC_TLS_CLIENT_CA": cert}
        environment = {name: str(files[name]) for name in given & set(files)}
        if "missing" in given:
            environment["GRPC_TLS_CLIENT_CA"] = str(tmp_path / "nowhere.pem")
        if "binary" in given:
            environment["GRPC_TLS_CLIENT_CA"] = str(binary)
        process = start(**free_ports(), **environment)
        _, output = process.communicate(timeout=60)
        assert process.returncode == 1
        assert output.startswith("npair: ")
        assert reason in output


class TestRelease:
    DOCKERFILE = (ROOT / "model/api/Dockerfile.cpu").read_text()
    FLOOR = re.findall(r"^ARG TRITON_FLOOR=(.+)$", DOCKERFILE, re.MULTILINE)[0]

    def test_floor_is_what_the_last_bulletin_asks_for(self) -> None:
        fixed = re.findall(
            r"^\| \[\d+\]\(https://github.com/NVIDIA/product-security/.*?\| (\d\d\.\d\d) \|",
            PAGE,
            re.MULTILINE,
        )
        assert len(fixed) >= 10
        assert max(fixed) == self.FLOOR

    def test_the_image_is_above_it_and_nothing_lowers_it(self) -> None:
        line = re.compile(r"^FROM .*/tritonserver:(.*)-py3 AS nvidia$", re.MULTILINE)
        assert line.findall(self.DOCKERFILE)[0] >= self.FLOOR
        for path in [
            ROOT / "Makefile",
            ROOT / "docker-compose.prod.yml",
            *(ROOT / ".github").rglob("*.yml"),
        ]:
            assert "TRITON_FLOOR" not in path.read_text(), path

    @pytest.mark.parametrize(
        ("release", "taken"),
        [
            ("26.07", True),
            ("26.10", True),
            ("27.01", True),
            ("26.06", False),
            ("24.10", False),
            ("", False),
            ("latest", False),
        ],
    )
    def test_the_build_takes(self, release: str, taken: bool) -> None:
        assert 'RUN sh /libraries.sh at-least "$TRITON_FLOOR" && ' in self.DOCKERFILE
        command: list[str | Path] = ["sh", ROOT / "model/api/libraries.sh", "at-least", "26.07"]
        environment = os.environ | {"NVIDIA_TRITON_SERVER_VERSION": release}
        result = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=False
        )
        assert (result.returncode == 0) == taken
        assert taken or "docs/security.md" in result.stderr


class TestFlags:
    """Fake programs print the help of Triton releases with other flags than the installed 2.51."""

    def command(self, folder: Path, *known: str) -> list[str]:
        program = folder / "tritonserver"
        program.write_text(
            "#!/bin/sh\n"
            + "".join(f"echo '  {flag} <string>'\n" for flag in ("--model-repository", *known))
        )
        program.chmod(0o755)
        return command(parse([]), Triton(program, folder, dict(os.environ), folder), "secret")

    CLOSED = ("--http-restricted-api", "--grpc-restricted-protocol")

    def test_requests_are_limited_where_triton_can(self, tmp_path: Path) -> None:
        assert "--http-max-input-size=67108864" in self.command(
            tmp_path, *self.CLOSED, "--http-max-input-size"
        )

    def test_this_one_cannot(self, tmp_path: Path) -> None:
        real = command(parse([]), find_triton(tmp_path), "secret")
        assert not any(flag.startswith("--http-max-input-size") for flag in real), (
            "docs/security.md says that 2.51 lacks this flag"
        )

    def test_what_would_be_open_is_not_started(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with pytest.raises(
            ServeError, match="does not know --grpc-restricted-protocol, and would serve without"
        ):
            self.command(tmp_path, "--http-restricted-api")
        cert, key = certificate(tmp_path)
        monkeypatch.setenv("GRPC_TLS_CERT", str(cert))
        monkeypatch.setenv("GRPC_TLS_KEY", str(key))
        with pytest.raises(
            ServeError,
            match="does not know --grpc-server-cert, --grpc-server-key, --grpc-use-ssl, and",
        ):
            self.command(tmp_path, *self.CLOSED)
