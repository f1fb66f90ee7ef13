"""Control several servers at once, behind a host name and over TLS."""

from __future__ import annotations

import contextlib
import http.server
import os
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.models import SHIPPED
from support.releases import SECRET, Standing, pins
from support.servers import free_ports, lines_until_ready, start
from support.tls import certificate

from npair.releasing import ReleaseError
from npair.releasing.control import Server
from npair.releasing.release import bring_along, check_server, promote, rollback
from npair.releasing.repository import open_repository

Resolve = Callable[..., None]


@pytest.fixture
def resolve(monkeypatch: pytest.MonkeyPatch) -> Resolve:
    """Resolve made-up host names; a real resolver would need the machine's settings."""
    real = socket.getaddrinfo

    def known(host: str, *addresses: str) -> None:
        before = socket.getaddrinfo

        def lookup(name: Any, *arguments: Any, **options: Any) -> Any:
            if name != host:
                return before(name, *arguments, **options)
            return [
                answer for address in addresses for answer in real(address, *arguments, **options)
            ]

        monkeypatch.setattr(socket, "getaddrinfo", lookup)

    return known


class TestHostsOfSeveralServers:
    @pytest.mark.parametrize(
        ("host", "answers", "asked"),
        [
            (
                "npair.test",
                ["::1", "127.0.0.2", "127.0.0.1", "127.0.0.2"],
                ["127.0.0.1", "127.0.0.2"],
            ),
            ("npair.test", ["::2", "::1"], ["::1", "::2"]),
            ("localhost", ["127.0.0.2", "::1", "127.0.0.1"], ["127.0.0.1"]),
            ("127.0.0.1", ["127.0.0.1"], ["127.0.0.1"]),
        ],
    )
    def test_each_address_is_one(
        self, resolve: Resolve, host: str, answers: list[str], asked: list[str]
    ) -> None:
        resolve(host, *answers)
        servers = Server.all_of(f"http://{host}:8000", "npair")
        assert [server.address for server in servers] == asked
        names = [
            f"http://{host}:8000 ({address})" if address != host else f"http://{host}:8000"
            for address in asked
        ]
        assert [server.url for server in servers] == names

    def test_unknown_hosts(self) -> None:
        with pytest.raises(
            ReleaseError, match=r"^http://nowhere\.invalid:8000: the host cannot be found: "
        ):
            Server.all_of("http://nowhere.invalid:8000", "npair")

    def test_all_of_them_change_at_once(
        self, standing: Standing, resolve: Resolve, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        models, first, _ = standing
        repository, port = open_repository(models), first.parts.port
        with contextlib.ExitStack() as stack:
            others = []
            for address in ("127.0.0.2", "127.0.0.3"):
                ports = free_ports() | {"HTTP_PORT": str(port)}
                others.append(
                    start(
                        **ports,
                        BIND_ADDRESS=address,
                        MODEL_REPOSITORY=str(models.parent),
                        NPAIR_CONTROL_SECRET=SECRET,
                    )
                )
                stack.callback(others[-1].wait, 30)
                stack.callback(others[-1].terminate)
            for process in others:
                lines_until_ready(process)
            resolve("npair.test", "127.0.0.3", "127.0.0.2", "127.0.0.1")
            resolve("more.test", "127.0.0.1", "127.0.0.4", "127.0.0.5")
            servers, more = (
                Server.all_of(f"http://{host}:{port}", "npair", secret=SECRET, timeout=60)
                for host in ("npair.test", "more.test")
            )
            away = [
                rf"more\.test:{port} \({address}\) does not answer"
                for address in ("127.0.0.4", "127.0.0.5")
            ]
            with pytest.raises(ReleaseError, match=".*; .*".join(away)):
                promote(repository, 2, more)
            assert pins(models, 1)

            load, together = Server.load, threading.Barrier(3)

            def load_together(server: Server) -> None:
                together.wait(60)
                load(server)

            monkeypatch.setattr(Server, "load", load_together)
            promote(repository, 2, servers)
            assert [server.serving() for server in servers] == [[2], [2], [2]]
            assert [*map(dict.keys, (check_server(repository, server) for server in servers))] == [
                {2},
                {2},
                {2},
            ]
            others[0].terminate()
            others[0].wait(30)
            with pytest.raises(
                ReleaseError, match=rf"^http://npair\.test:{port} \(127\.0\.0\.2\) does not answer"
            ):
                rollback(repository, servers)
            monkeypatch.setattr(Server, "load", load)
            rollback(repository, [servers[0], servers[2]])
            assert (servers[0].serving(), servers[2].serving()) == ([1], [1])

    def test_a_name_stands_for_all_servers_that_have_it_or_get_it(
        self, standing: Standing, tmp_path: Path
    ) -> None:
        """The resolver is the machine's, with a file of hosts that only the command sees."""
        models, first, _ = standing
        hosts, port = tmp_path / "hosts", first.parts.port
        hosts.write_text("127.0.0.1 npair-pods localhost\n127.0.0.2 npair-pods\n")
        private = ["unshare", "--map-root-user", "--mount", "sh", "-euc"]
        private += ['mount --bind "$1" /etc/hosts; shift; exec "$@"', "sh", str(hosts)]
        if subprocess.run([*private, "true"], check=False).returncode != 0:
            pytest.skip("this machine lets no process have mounts of its own")
        with contextlib.ExitStack() as stack:
            for address in ("127.0.0.2", "127.0.0.3"):
                process = start(
                    **free_ports() | {"HTTP_PORT": str(port)},
                    BIND_ADDRESS=address,
                    MODEL_REPOSITORY=str(models.parent),
                    NPAIR_CONTROL_SECRET=SECRET,
                )
                stack.callback(process.wait, 30)
                stack.callback(process.terminate)
                lines_until_ready(process)
            url = f"http://npair-pods:{port}"
            command = [*private, sys.executable, "-m", "npair", "promote", "2", "--url", url]
            promotion = subprocess.Popen(
                [*command, "--repository", models, "--settle", "5"],
                env=os.environ | {"NPAIR_CONTROL_SECRET": SECRET},
                stdout=subprocess.PIPE,
                text=True,
            )
            assert promotion.stdout is not None
            changed = f"served by {url} (127.0.0.1), {url} (127.0.0.2)"
            assert promotion.stdout.readline() == f"version 2 is {changed}\n"
            third = Server(url, "npair", address="127.0.0.3")
            assert third.serving() == [1]
            with hosts.open("a") as file:
                file.write("127.0.0.3 npair-pods\n")
            assert promotion.stdout.read() == f"and served by {url} (127.0.0.3)\n"
            assert promotion.wait(30) == 0
            assert third.serving() == [2]

    def test_a_server_that_joins_and_does_not_answer_is_named(self) -> None:
        gone = Server("http://127.0.0.1:9", "npair", secret=SECRET)
        reason = r"^not all servers that joined have changed: http://127\.0\.0\.1:9 does not answer"
        with pytest.raises(ReleaseError, match=reason):
            bring_along(open_repository(SHIPPED.parent), [], lambda: [gone], 0)

    def test_tls_is_by_name(
        self, tmp_path: Path, resolve: Resolve, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Use a fake server, since Triton leaves TLS over HTTP to a proxy."""
        cert, key = certificate(tmp_path, "npair.test")
        monkeypatch.setenv("SSL_CERT_FILE", str(cert))
        hosts = []

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                hosts.append(self.headers["Host"])
                self.send_response(200)
                self.end_headers()
                self.wfile.write(b'{"versions": ["7"]}')

            def log_message(self, *_: object) -> None:
                pass

        with http.server.ThreadingHTTPServer(("127.0.0.2", 0), Handler) as front:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(cert, key)
            front.socket = context.wrap_socket(front.socket, server_side=True)
            threading.Thread(target=front.serve_forever, daemon=True).start()
            for host in ("npair.test", "other.test"):
                resolve(host, "127.0.0.2")
            (right,), (wrong,) = (
                Server.all_of(f"https://{name}.test:{front.server_port}", "npair")
                for name in ("npair", "other")
            )
            assert right.serving() == [7]
            assert hosts == [f"npair.test:{front.server_port}"]
            reason = (
                r"other\.test:\d+ \(127\.0\.0\.2\) does not answer: .*certificate verify failed"
            )
            with pytest.raises(ReleaseError, match=reason):
                wrong.serving()
            front.shutdown()
