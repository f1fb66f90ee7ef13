"""No content type, size or path may crash Triton's HTTP front end, on either port."""

from __future__ import annotations

import re
import resource
import socket
import subprocess
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import fuzz
import pytest
from supervisor.launch import MAX_REQUEST_BYTES
from support.models import ROOT

PAGES = [
    ROOT / name
    for name in subprocess.run(
        ["git", "ls-files"], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True
    ).stdout.splitlines()
    if name.endswith((".md", ".sh", ".yml", "Makefile", "Dockerfile.cpu"))
]
SENDS_A_BODY = re.compile(
    r"\bcurl\b.* (--data|--json|--form|--upload-file|-[dFT]\b)|\bwget\b.* --(post|body)-"
)


@pytest.fixture(scope="module")
def server() -> Iterator[fuzz.Server]:
    """Start a server with a login shell's limit on open files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(1_024, hard), hard))
    try:
        with fuzz.running("http") as server:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            yield server
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def form(path: str, size: int, content_type: str) -> bytes:
    """Return a request whose body is a single form key, the worst case for the stack.

    A photo without the bytes & and = looks like this.
    """
    head = [
        f"POST {path} HTTP/1.1",
        "Connection: close",
        f"Content-Type: {content_type}",
        "Inference-Header-Content-Length: 0",
        f"Content-Length: {size}\r\n\r\n",
    ]
    return "\r\n".join(head).encode() + bytes(size)


class TestForms:
    """Triton's HTTP library copies each form twice to a thread's stack."""

    @pytest.mark.parametrize("size", [5_000_000, 20_000_000, MAX_REQUEST_BYTES])
    @pytest.mark.parametrize(
        ("path", "status"),
        [
            (fuzz.INFER, "400"),
            ("/v2/health/live", "405"),
            ("/v2/models/npair", "405"),
            ("/nope", "404"),
            ("/v2/repository/index", "403"),
            ("/v2/systemsharedmemory/status", "403"),
        ],
    )
    def test_http_port(self, server: fuzz.Server, path: str, status: str, size: int) -> None:
        assert server.http(form(path, size, fuzz.FORM)) == status
        server.check()

    @pytest.mark.parametrize("size", [5_000_000, 20_000_000, MAX_REQUEST_BYTES])
    @pytest.mark.parametrize("path", ["/metrics", "/nope"])
    def test_metrics_port(self, server: fuzz.Server, path: str, size: int) -> None:
        assert server.metrics(form(path, size, fuzz.FORM)) == "405"
        server.check()

    @pytest.mark.parametrize(
        "content_type", [fuzz.FORM.upper(), f"{fuzz.FORM}; charset=utf-8", f"{fuzz.FORM}x"]
    )
    def test_other_spellings(self, server: fuzz.Server, content_type: str) -> None:
        assert server.http(form("/nope", 5_000_000, content_type)) == "404"
        server.check()


@pytest.mark.parametrize("port", ["HTTP_PORT", "METRICS_PORT"])
def test_connections_that_are_only_held(server: fuzz.Server, port: str) -> None:
    with ExitStack() as connections:
        for _ in range(2_000):
            connections.enter_context(
                socket.create_connection(
                    ("127.0.0.1", int(server.ports[port])), timeout=fuzz.SECONDS
                )
            )
        server.check()


@pytest.mark.parametrize(("target", "runs"), [("http", 8_000), ("metrics", 2_000)])
def test_hostile_requests(server: fuzz.Server, target: str, runs: int) -> None:
    """Send requests of another seed than the default of `tests/fuzz/fuzz.py`."""
    outcomes: Counter[str] = Counter()
    for first in range(0, runs, fuzz.BLOCK):
        numbers = range(first, first + fuzz.BLOCK)
        wrong = fuzz.problem(
            server, target, (fuzz.request(target, 17, number) for number in numbers), outcomes
        )
        assert not wrong, (
            f"{wrong}; repeat with python tests/fuzz/fuzz.py {target} "
            f"--seed 17 --first {first} --runs {fuzz.BLOCK}"
        )
    assert {"200", "405"} <= set(outcomes), outcomes


def commands(page: Path) -> list[str]:
    """Return a page's lines of code, joined at backslashes."""
    text = page.read_text().replace("\\\n", " ")
    return "\n".join(
        re.findall(r"^```.*?^```", text, re.MULTILINE | re.DOTALL)
        if page.suffix == ".md"
        else [text]
    ).splitlines()


def test_what_the_docs_send_to_triton_names_its_content_type() -> None:
    sending = [
        (page.name, line)
        for page in PAGES
        for line in commands(page)
        if SENDS_A_BODY.search(line) and "127.0.0.1:8080" not in line  # npair web
    ]
    assert {"README.md", "hostile-input.md"} <= {page for page, _ in sending}
    assert [
        line for line in sending if "Content-Type: application/octet-stream" not in line[1]
    ] == []
