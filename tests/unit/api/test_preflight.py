"""Refuse to start on unsupported machines and with bad settings."""

from __future__ import annotations

import ast
import os
import platform
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from supervisor.preflight import ServeError, address_of, check_platform
from support.servers import PORTS, free_ports
from support.supervised import SERVE, ended


class TestRefusals:
    @pytest.mark.parametrize("name", PORTS)
    def test_taken_port(self, name: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            code, output = ended(**free_ports() | {name: str(listener.getsockname()[1])})
        assert code == 1
        assert re.fullmatch(
            rf"npair: cannot listen on 127\.0\.0\.1:\d+: .*in use; set {name} to a free port\n",
            output,
        )

    def test_one_port_for_two(self) -> None:
        ports = free_ports()
        code, output = ended(**ports | {"GRPC_PORT": ports["HTTP_PORT"]})
        assert code == 1
        assert "GRPC_PORT" in output

    @pytest.mark.parametrize("address", ["203.0.113.1", "nowhere.invalid"])
    def test_address_of_another_machine(self, address: str) -> None:
        code, output = ended(**free_ports(), BIND_ADDRESS=address)
        assert code == 1
        assert output.endswith("; set BIND_ADDRESS to an address of this machine\n")

    @pytest.mark.parametrize("given", ["nowhere", "models/npair", "models/npair/config.pbtxt"])
    def test_missing_repository(self, tmp_path: Path, given: str) -> None:
        (tmp_path / "models/npair").mkdir(parents=True)
        (tmp_path / "models/npair/config.pbtxt").touch()
        code, output = ended(MODEL_REPOSITORY=str(tmp_path / given))
        assert code == 1
        assert output == (
            f"npair: no model repository at {tmp_path}/{given}: it has no npair/config.pbtxt; "
            "set MODEL_REPOSITORY to the folder that holds npair/\n"
        )

    def test_repository_that_cannot_be_read(self) -> None:
        """Root may read every file, but no name is longer than 255 bytes."""
        code, output = ended(MODEL_REPOSITORY=256 * "a")
        assert code == 1
        assert re.search(r"config\.pbtxt cannot be read: .*; let user \d+ read", output)
        assert output.count("\n") == 1

    @pytest.mark.parametrize("given", ["http://models/npair", "file:///models"])
    def test_repository_at_an_unknown_place(self, given: str) -> None:
        code, output = ended(MODEL_REPOSITORY=given)
        assert code == 1
        assert f"must be a folder, or in a bucket at s3:// or gs://, got {given}" in output

    @pytest.mark.parametrize(
        ("endpoint", "reason"),
        [
            ("http://127.0.0.1:1", "Connection refused"),
            ("https://nowhere.invalid", "Name or service not known"),
            ("http://127.0.0.1:port", "Port could not be cast"),
            ("ftp://127.0.0.1", "'ftp'"),
        ],
    )
    def test_object_store_that_is_away(self, endpoint: str, reason: str) -> None:
        """By the variable that other S3 clients take, and in Triton's own form."""
        bucket = {"MODEL_REPOSITORY": "s3://bucket/models", "AWS_ENDPOINT_URL": endpoint}
        for environment in (bucket, {"MODEL_REPOSITORY": f"s3://{endpoint}/bucket/models"}):
            code, output = ended(**environment)
            assert code == 1
            assert f"cannot be reached at {endpoint}/bucket/models: " in output
            assert reason in output
            assert output.count("\n") == 1

    def test_port_that_only_root_may_use(self) -> None:
        command = ["setpriv", "--bounding-set=-net_bind_service", sys.executable, str(SERVE)]
        result = subprocess.run(
            command,
            env=os.environ | free_ports() | {"HTTP_PORT": "1"},
            check=False,
            capture_output=True,
            text=True,
        )
        assert result.returncode == 1
        assert result.stderr.endswith(":1: Permission denied; set HTTP_PORT to a port above 1023\n")


class TestPlatform:
    @pytest.mark.parametrize(
        ("name", "value", "reason"),
        [
            ("machine", "riscv64", "Linux on x86-64 or Arm, and this is Linux on riscv64"),
            ("libc_ver", ("glibc", "2.31"), "needs glibc 2.35 or newer, and this is glibc 2.31"),
            ("libc_ver", ("", ""), "this is another libc"),
        ],
    )
    def test_platform(
        self, monkeypatch: pytest.MonkeyPatch, name: str, value: object, reason: str
    ) -> None:
        """This machine is supported, so simulate another."""
        monkeypatch.setattr(platform, name, lambda: value)
        with pytest.raises(ServeError, match=reason):
            check_platform()

    @pytest.mark.parametrize(
        ("machine", "version", "supported"),
        [
            ("x86_64", (3, 9, 0), "3.10 to 3.12"),
            ("x86_64", (3, 13, 0), "3.10 to 3.12"),
            ("aarch64", (3, 10, 0), "3.11 to 3.12"),
            ("aarch64", (3, 13, 0), "3.11 to 3.12"),
        ],
    )
    def test_python(
        self,
        monkeypatch: pytest.MonkeyPatch,
        machine: str,
        version: tuple[int, int, int],
        supported: str,
    ) -> None:
        monkeypatch.setattr(platform, "machine", lambda: machine)
        monkeypatch.setattr(sys, "version_info", version)
        with pytest.raises(ServeError, match=f"needs Python {supported}, and this is"):
            check_platform()

    def test_arm(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(platform, "machine", lambda: "aarch64")
        monkeypatch.setattr(sys, "version_info", (3, 11, 0))
        check_platform()


@pytest.mark.parametrize("file", [SERVE, *SERVE.with_name("supervisor").glob("*.py")])
def test_an_old_python_can_read_it(file: Path) -> None:
    """An old Python must parse the file to report what is missing."""
    ast.parse(file.read_text(), feature_version=(3, 8))


def test_a_name_with_both_kinds_stands_for_ipv4(monkeypatch: pytest.MonkeyPatch) -> None:
    """This machine's names may lack one address family, so fake the resolver."""
    found = [
        (socket.AF_INET6, 1, 6, "", ("fd00::7", 0, 0, 0)),
        (socket.AF_INET, 1, 6, "", ("10.0.0.7", 0)),
    ]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    assert address_of("host") == "10.0.0.7"
    found.pop()
    assert address_of("host") == "fd00::7"
