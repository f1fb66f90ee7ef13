"""Start Triton by serve.py: paths, addresses, stack size and the secret."""

from __future__ import annotations

import http.client
import http.server
import os
import resource
import shutil
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import tritonclient.grpc
from supervisor import launch
from supervisor.api import CONTROL_HEADER
from supervisor.launch import METRICS_ADDRESS, scratch_folder, stack_bytes
from supervisor.preflight import ServeError, in_url
from support.models import ROOT, SHIPPED
from support.servers import PORTS, free_ports, lines_until_ready, running, start
from support.supervised import SERVE, child_of, control, ended, health, stopped, stubs_of
from tritonclient.utils import InferenceServerException

from npair.client import InvalidPhotoError, NpairClient


def listening(pid: int, ports: dict[str, str]) -> set[str]:
    """Return the addresses listening on these ports in pid's namespace, as written in URLs."""
    found = set()
    for file, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
        for line in Path(f"/proc/{pid}/net/{file}").read_text().splitlines()[1:]:
            local, state = line.split()[1], line.split()[3]
            address, port = local.split(":")
            if state == "0A" and str(int(port, 16)) in ports.values():
                words = bytes.fromhex(address)
                packed = b"".join(
                    words[start : start + 4][::-1] for start in range(0, len(words), 4)
                )
                found.add(in_url(socket.inet_ntop(family, packed).removeprefix("::ffff:")))
    return found


def form_status(url: str, size: int) -> int:
    """Send a golden photo padded to size, form-encoded as by curl, and return the HTTP status."""
    photo = (SHIPPED / "golden/photo.jpg").read_bytes()
    headers = {
        "Content-Type": "application/x-www-form-urlencoded",
        "Inference-Header-Content-Length": "0",
    }
    request = urllib.request.Request(url, photo.ljust(size, b"x"), headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


class TestStack:
    """Triton's HTTP library copies form-encoded bodies to a thread's stack on every path."""

    def test_the_largest_form_encoded_bodies_do_not_end_the_server(self) -> None:
        ports = free_ports()
        process = start(**ports)
        urls = [
            f"http://127.0.0.1:{ports['HTTP_PORT']}{path}"
            for path in ("/v2/models/npair/infer", "/nope", "/v2/repository/index")
        ]
        urls += [
            f"http://127.0.0.1:{ports['METRICS_PORT']}{path}" for path in ("/metrics", "/nope")
        ]
        try:
            lines_until_ready(process)
            server = child_of(process)
            statuses = {
                size: [form_status(url, size) for url in urls]
                for size in (1_000, 5_000_000, 20_000_000, 64 << 20)
            }
            assert statuses[5_000_000] == [200, 404, 403, 405, 405], "the photo is embedded"
            assert statuses[20_000_000] == statuses[1_000] == statuses[5_000_000]
            assert statuses[64 << 20] == [400, 404, 403, 405, 405], (
                "more bytes than a photo may have"
            )
            assert form_status(urls[0], 0) == 200
            assert child_of(process) == server
        finally:
            stopped(process)

    @pytest.mark.parametrize(
        ("before", "given"),
        [
            ((8 << 20, resource.RLIM_INFINITY), 256 << 20),
            ((8 << 20, 256 << 20), 256 << 20),
            ((resource.RLIM_INFINITY, resource.RLIM_INFINITY), 256 << 20),
            ((512 << 20, resource.RLIM_INFINITY), 512 << 20),
            ((8 << 20, 64 << 20), 64 << 20),
        ],
    )
    def test_of_each_limit(
        self, before: tuple[int, int], given: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(resource, "getrlimit", lambda _: before)
        assert stack_bytes() == given


def test_too_small_limits_are_said() -> None:
    limits = ("--stack=8388608:67108864", "--nofile=256:256")
    limited = ["prlimit", *limits, sys.executable, str(SERVE)]
    environment = os.environ | free_ports()
    with subprocess.Popen(limited, env=environment, stderr=subprocess.PIPE, text=True) as process:
        try:
            said = "".join(lines_until_ready(process))
        finally:
            process.terminate()
    assert "WARNING: the stack's hard limit is 64 MiB" in said
    assert "form-encoded requests of more than about 32 MiB" in said
    assert "docker run --ulimit stack=268435456" in said
    assert "WARNING: the hard limit of open files is 256" in said
    assert "connections beyond about 192 go unanswered" in said
    assert "docker run --ulimit nofile=65536" in said


class TestPaths:
    """Triton starts its stubs by an unquoted bash command line."""

    @pytest.mark.parametrize(
        "name", ["my clone", "O'Brien", "npair (1)", "a&b;c", "a$b:c", "Téléchargements"]
    )
    def test_no_character_of_a_path_matters(self, tmp_path: Path, name: str) -> None:
        repository = shutil.copytree(ROOT / "model_repository", tmp_path / name / "models")
        with running(
            MODEL_REPOSITORY=str(repository), TMPDIR=str(tmp_path / name), NPAIR_CONTROL_SECRET="s"
        ) as (_, urls):
            config = repository / "npair/config.pbtxt"
            config.write_text(config.read_text().replace('"20000000"', '"10"'))
            assert control(urls["http"], "load") == 200
            with (
                NpairClient(urls["http"]) as client,
                pytest.raises(InvalidPhotoError, match="the limit of 10;"),
            ):
                client.embed(SHIPPED / "golden/photo.jpg")

    def test_python_in_such_a_folder(self, tmp_path: Path) -> None:
        """Start from a .venv in a clone with an odd name; a symbolic link stands in for it."""
        venv = tmp_path / "my clone" / "l'été:1"
        venv.parent.mkdir()
        venv.symlink_to(sys.prefix)
        ports = free_ports()
        process = subprocess.Popen(
            [venv / "bin/python", SERVE],
            env=os.environ | ports,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            lines_until_ready(process)
        finally:
            stopped(process)

    def test_no_folder_for_links(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("TMPDIR", str(tmp_path / "nowhere"))
        monkeypatch.setattr(launch, "SCRATCH_PARENTS", ("/proc",))
        with pytest.raises(ServeError, match="/proc cannot be written; set TMPDIR to a folder"):
            scratch_folder()
        monkeypatch.setenv("TMPDIR", str(tmp_path))
        with scratch_folder() as scratch:
            assert Path(scratch).parent == tmp_path


@pytest.mark.parametrize(
    ("host", "called", "listens"),
    [
        ("127.0.0.1", "127.0.0.1", "127.0.0.1"),
        ("0.0.0.0", "127.0.0.1", "0.0.0.0"),
        ("localhost", "127.0.0.1", "127.0.0.1"),
        ("::1", "[::1]", "[::1]"),
        ("[::1]", "[::1]", "[::1]"),
        ("::", "[::1]", "[::]"),
    ],
)
def test_on_all_ports(host: str, called: str, listens: str) -> None:
    if ":" in host:
        try:
            socket.create_server(("::1", 0), family=socket.AF_INET6).close()
        except OSError as error:
            pytest.skip(f"this machine has no ::1: {error}")
    ports = free_ports()
    http_port, grpc_port, metrics_port = (ports[name] for name in PORTS)
    process = start(**ports, BIND_ADDRESS=host)
    try:
        line = lines_until_ready(process)[-1]
        assert f"at http://{listens}:{http_port} and grpc://{listens}:{grpc_port}, " in line
        assert f", metrics at http://{listens}:{metrics_port}/" in line
        everywhere = {"0.0.0.0", "[::]"}  # gRPC may bind to either
        assert listening(child_of(process), ports) <= (
            everywhere if listens in everywhere else {listens}
        )
        for url in (f"http://{called}:{http_port}", f"grpc://{called}:{grpc_port}"):
            with NpairClient(url) as client:
                assert len(client.embed(SHIPPED / "golden/photo.jpg").vectors) == 1
        with urllib.request.urlopen(
            f"http://{called}:{metrics_port}/metrics", timeout=10
        ) as answer:
            assert answer.status == 200
        assert health(http_port, BIND_ADDRESS=host).returncode == 0
        environment = Path(f"/proc/{stubs_of(process)[0]}/environ").read_bytes().split(b"\0")
        assert f"{METRICS_ADDRESS}={called}:{metrics_port}".encode() in environment
    finally:
        stopped(process)


def test_unreadable_secret(tmp_path: Path) -> None:
    code, output = ended(**free_ports(), NPAIR_CONTROL_SECRET_FILE=str(tmp_path / "nowhere"))
    assert code == 1
    assert "NPAIR_CONTROL_SECRET_FILE cannot be read" in output


def test_control_apis_open_with_the_secret_alone(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("open sesame\n")
    with running(NPAIR_CONTROL_SECRET_FILE=str(tmp_path / "secret")) as (process, urls):

        def index(secret: str) -> int:
            connection = http.client.HTTPConnection(urls["http"].removeprefix("http://"))
            connection.request("POST", "/v2/repository/index", "{}", {CONTROL_HEADER: secret})
            status = connection.getresponse().status
            connection.close()
            return status

        assert index("open sesame") == 200
        assert index("wrong") == 403
        client = tritonclient.grpc.InferenceServerClient(urls["grpc"].removeprefix("grpc://"))
        assert client.get_model_repository_index(
            headers={f"triton-grpc-protocol-{CONTROL_HEADER}": "open sesame"}
        ).models
        with pytest.raises(InferenceServerException, match="restricted"):
            client.get_model_repository_index()
        assert client.get_model_config("npair").config.name == "npair"
        client.close()
        assert "sesame" not in stopped(process)[1]
