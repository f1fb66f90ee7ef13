"""Expose the client's transports to faults of networks and servers, on real sockets."""

from __future__ import annotations

import os
import socket
import ssl
import struct
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
import pytest
from support.fake_server import client_of, serving
from support.servers import eventually
from support.tls import certificate

from npair.client import (
    AccessDeniedError,
    HttpTransport,
    InvalidRequestError,
    NpairClient,
    NpairError,
    RequestTimeoutError,
    ServerFaultError,
    UnavailableError,
)


def address(listener: socket.socket) -> str:
    return f"127.0.0.1:{listener.getsockname()[1]}"


def fails(url: str, expected: type[NpairError], **options: Any) -> None:
    with NpairClient(url, **options) as client, pytest.raises(expected):
        client.embed(b"photo")


class TestTime:
    """Silent and absent servers."""

    @pytest.mark.parametrize("scheme", ["http", "grpc"])
    def test_closing_ends_the_calls_of_other_threads(self, scheme: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as silent, ThreadPoolExecutor(1) as pool:
            client = NpairClient(f"{scheme}://{address(silent)}", timeout=60)
            call = pool.submit(client.embed, b"x")
            with silent.accept()[0]:
                time.sleep(0.3)
                client.close()
                assert isinstance(call.exception(timeout=30), RuntimeError)

    @pytest.mark.parametrize("scheme", ["http", "grpc"])
    def test_no_answer_in_time_is_not_repeated(self, scheme: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as silent:
            began = time.monotonic()
            fails(f"{scheme}://{address(silent)}", RequestTimeoutError, timeout=0.5)
            assert time.monotonic() - began < 5

    @pytest.mark.parametrize("start", [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n"])
    def test_an_answer_that_never_ends_is_none(self, start: bytes) -> None:
        """Each byte comes in time; the whole answer would take minutes."""

        def trickle() -> None:
            with listener.accept()[0] as connection, suppress(OSError):
                connection.recv(1 << 20)
                connection.sendall(start)
                while True:
                    connection.sendall(b"x")
                    time.sleep(0.2)

        with socket.create_server(("127.0.0.1", 0)) as listener:
            threading.Thread(target=trickle, daemon=True).start()
            began = time.monotonic()
            fails(f"http://{address(listener)}", RequestTimeoutError, timeout=1)
            assert time.monotonic() - began < 20

    def test_a_connection_to_a_machine_that_is_gone_ends(self) -> None:
        """TCP_USER_TIMEOUT ends a connection if data is not acknowledged within 10 s."""
        limits = []
        with (
            socket.create_server(("127.0.0.1", 0)) as listener,
            NpairClient(f"grpc://{address(listener)}", timeout=0.5) as client,
        ):
            assert not client.ready()
            for descriptor in Path("/proc/self/fd").iterdir():
                with suppress(OSError), socket.socket(fileno=os.dup(int(descriptor.name))) as end:
                    if end.getpeername()[1:2] == listener.getsockname()[1:2]:
                        limits.append(end.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT))
        assert limits == [10_000]

    def test_a_server_that_was_away_for_long_is_found_at_once(self) -> None:
        """gRPC reconnects every second instead of backing off by 1, 1.6, 2.6, ... s."""
        with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(1) as pool:

            def hang_up() -> None:
                for _ in range(10):
                    listener.accept()[0].close()

            calls = pool.submit(hang_up)
            with NpairClient(f"grpc://{address(listener)}", retries=0) as client:
                eventually(lambda: client.ready() or calls.done())

    @pytest.mark.parametrize("scheme", ["http", "grpc"])
    def test_nobody_listens(self, scheme: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            url = f"{scheme}://{address(listener)}"
        fails(url, UnavailableError, retries=1)
        with NpairClient(url) as client:
            assert not client.ready()


class TestAnswers:
    """Cut-off, reset and foreign answers, sent by real sockets."""

    @contextmanager
    def answering(self, content: bytes, *, reset: bool = False) -> Iterator[tuple[str, list[int]]]:
        """Answer every request with content and hang up; yield the address and the calls."""
        calls: list[int] = []
        linger = struct.pack("ii", 1, 0)  # discard unsent data

        def answer() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection, suppress(OSError):
                    calls.append(len(connection.recv(1 << 20)))
                    connection.sendall(content)
                    if reset:
                        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                    else:
                        connection.shutdown(socket.SHUT_WR)
                        connection.recv(1 << 20)

        with socket.create_server(("127.0.0.1", 0)) as listener:
            threading.Thread(target=answer, daemon=True).start()
            yield address(listener), calls
            listener.shutdown(socket.SHUT_RDWR)

    HEAD = b"HTTP/1.1 200 OK\r\n"
    LONG = HEAD + b"Content-Length: 1000\r\n\r\n"

    @pytest.mark.parametrize(
        ("content", "expected"),
        [
            (b"", UnavailableError),
            (b"HTTP/1.1 200", UnavailableError),
            (LONG + b"{", UnavailableError),
            (HEAD + b"Transfer-Encoding: chunked\r\n\r\nff\r\n{", UnavailableError),
            (b"SSH-2.0-OpenSSH_9.2\r\n", ServerFaultError),
            (b"\0" * 100_000, ServerFaultError),
            (LONG.replace(b"1000", b"2") + b"{}", ServerFaultError),
            (LONG.replace(b"1000", b"4") + b"null", ServerFaultError),
            (LONG.replace(b"1000", b"5") + b"<html", ServerFaultError),
            (
                HEAD + b"Content-Length: 2\r\nInference-Header-Content-Length: x\r\n\r\n{}",
                ServerFaultError,
            ),
        ],
    )
    def test_http(self, content: bytes, expected: type[NpairError]) -> None:
        with self.answering(content) as (server, calls):
            fails(f"http://{server}", expected, retries=0)
        assert len(calls) == 1

    @pytest.mark.parametrize("content", [b"", LONG + b"{"])
    def test_http_reset(self, content: bytes) -> None:
        with self.answering(content, reset=True) as (server, _):
            fails(f"http://{server}", UnavailableError, retries=0)

    @pytest.mark.parametrize("content", [b"", b"SSH-2.0-OpenSSH_9.2\r\n", LONG + b"{"])
    def test_grpc(self, content: bytes) -> None:
        with self.answering(content) as (server, _):
            fails(f"grpc://{server}", UnavailableError, retries=0, timeout=5)

    @pytest.mark.parametrize("scheme", ["https", "grpcs"])
    def test_no_tls(self, scheme: str) -> None:
        with self.answering(b"HTTP/1.1 400 Bad Request\r\n\r\n") as (server, _):
            fails(f"{scheme}://{server}", UnavailableError, retries=0)

    @pytest.mark.parametrize("scheme", ["http", "grpc"])
    def test_connections_that_break_off_at_once(self, scheme: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:

            def hang_up() -> None:
                with suppress(OSError):
                    while True:
                        listener.accept()[0].close()

            threading.Thread(target=hang_up, daemon=True).start()
            fails(f"{scheme}://{address(listener)}", UnavailableError, retries=1)

    @pytest.mark.parametrize("scheme", ["http", "https", "grpc", "grpcs"])
    def test_a_name_that_is_not_found(self, scheme: str) -> None:
        fails(f"{scheme}://npair.invalid:1", UnavailableError, retries=0)

    @pytest.mark.parametrize(
        ("spoken", "asked", "expected"),
        [
            ("http", "grpc", "gRPC is not spoken there; an HTTP port needs http://"),
            ("http", "https", "TLS is not spoken there; http:// and grpc:// do without"),
            ("http", "grpcs", "TLS is not spoken there"),
            ("grpc", "http", "HTTP is not spoken there; a gRPC port needs grpc://"),
            ("grpc", "https", "TLS is not spoken there"),
            ("grpc", "grpcs", "TLS is not spoken there"),
        ],
    )
    def test_another_protocol_is_named(self, spoken: str, asked: str, expected: str) -> None:
        with ExitStack() as stack:
            if spoken == "http":
                url, _ = stack.enter_context(serving())
                port = url.rpartition(":")[2]
            else:
                server = grpc.server(stack.enter_context(ThreadPoolExecutor(1)))
                port = server.add_insecure_port("127.0.0.1:0")
                server.start()
                stack.callback(lambda: server.stop(None).wait())
            client = stack.enter_context(NpairClient(f"{asked}://127.0.0.1:{port}", retries=0))
            with pytest.raises(NpairError, match=expected):
                client.check()

    @pytest.mark.parametrize("scheme", ["http", "grpc"])
    def test_a_machine_that_does_not_answer(self, scheme: str) -> None:
        """Fill the queue of a listener, so that the kernel drops what follows."""
        with ExitStack() as stack:
            listener = stack.enter_context(socket.socket())
            listener.bind(("127.0.0.1", 0))
            listener.listen(0)
            for _ in range(4):
                waiting = stack.enter_context(socket.socket())
                waiting.setblocking(False)
                with suppress(BlockingIOError):
                    waiting.connect(listener.getsockname())
            began = time.monotonic()
            fails(f"{scheme}://{address(listener)}", RequestTimeoutError, timeout=6)
            assert time.monotonic() - began < 15

    @pytest.mark.parametrize("scheme", ["http", "grpc"])
    def test_a_bug_stays_what_it_is(self, scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
        tries = []

        def bug(*_: object) -> None:
            tries.append(1)
            raise ZeroDivisionError

        monkeypatch.setattr("npair.client.transports._tensor", bug)
        with NpairClient(f"{scheme}://127.0.0.1:9") as client, pytest.raises(ZeroDivisionError):
            client.embed(b"photo")
        assert len(tries) == 1


class TestCertificates:
    def test_one_that_is_not_trusted(self, tmp_path: Path) -> None:
        tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        tls.load_cert_chain(*certificate(tmp_path))
        refused = pytest.raises(UnavailableError, match="CERTIFICATE_VERIFY_FAILED")
        with client_of(tls=tls, retries=0) as (client, _), refused:
            client.embed(b"photo")

    def test_those_of_the_system_are_trusted(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Whatever the protocol. SSL_CERT_FILE names others, for Python and OpenSSL."""
        cert, key = certificate(tmp_path)
        tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        tls.load_cert_chain(cert, key)
        credentials = grpc.ssl_server_credentials([(key.read_bytes(), cert.read_bytes())])
        with serving(tls=tls) as (url, _), ThreadPoolExecutor(1) as pool:
            server = grpc.server(pool)
            port = server.add_secure_port("127.0.0.1:0", credentials)
            server.start()
            monkeypatch.setenv("SSL_CERT_FILE", str(cert))
            with NpairClient(url) as client:
                client.check()
            # It answers that it does not have the method.
            fails(f"grpcs://127.0.0.1:{port}", InvalidRequestError, retries=0)
            server.stop(None).wait()

    def test_the_client_and_its_copies_show_theirs(self, tmp_path: Path) -> None:
        cert, key = certificate(tmp_path)
        tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=cert)
        tls.load_cert_chain(cert, key)
        tls.verify_mode = ssl.CERT_REQUIRED
        with serving(tls=tls) as (url, _):
            with NpairClient(url, ca=cert, cert=(cert, key)) as client, client.copy() as copy:
                assert copy.embed(b"abc").vectors[0, 0] == 3
            fails(url, UnavailableError, ca=cert, retries=0)

    def test_those_of_a_name_hold_for_each_of_its_addresses(self, tmp_path: Path) -> None:
        """Releasing calls every server behind a name."""
        cert, key = certificate(tmp_path, "npair.invalid")
        tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        tls.load_cert_chain(cert, key)
        trust = ssl.create_default_context(cafile=cert)
        with serving(tls=tls) as (_, server):
            transport = HttpTransport(
                f"https://npair.invalid:{server.server_port}",
                "npair",
                timeout=30,
                headers={"authorization": "abc"},
                tls=trust,
                address="127.0.0.1",
            )
            assert transport.infer([b"abc"], "", "").vectors[0, 0] == 3
            transport.close()
        assert server.authorizations == ["abc"]


def test_grpc_takes_an_api_key() -> None:
    """The server refuses every call but records its key."""
    seen: list[str | None] = []

    def refuse(_: object, context: grpc.ServicerContext) -> None:
        context.abort(grpc.StatusCode.UNAUTHENTICATED, "a key is needed")

    class Refusing(grpc.GenericRpcHandler):  # type: ignore[misc]
        def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
            seen.append(dict(details.invocation_metadata).get("authorization"))
            return grpc.unary_unary_rpc_method_handler(refuse)

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
