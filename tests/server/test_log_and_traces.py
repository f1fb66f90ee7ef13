"""Check a real server's JSON log and the traces that it sends to a collector."""

from __future__ import annotations

import contextlib
import http.server
import json
import re
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
from support.models import BREAKS, let_fail
from support.servers import eventually, free_ports, lines_until_ready, start

from npair.client import InvalidPhotoError, NpairClient, ServerFaultError
from npair.publishing.drawings import draw, encode
from npair.releasing.config import with_release

PHOTO = encode(draw(0, 0), "JPEG")
HOSTILE = {
    b"new\\nline\\r\\n": "new\nline\r\n",
    b'quo\\"te\\\\': 'quo"te\\',
    b'\\", \\"level\\": \\"error': '", "level": "error',
    b"\\nE1125 15:03:25.517639 1 model.py:8] \\u0022failed: {}": (
        '\nE1125 15:03:25.517639 1 model.py:8] "failed: {}'
    ),
    "ü€😀".encode(): "ü€😀",
    b"\xff\xfe": "(not UTF-8)",
    b"\\u0000": "",
    b"x" * 1_000_000: "x" * 100,
}


class Server:
    """A server with its log lines so far, the collector's spans, and its HTTP and gRPC URLs."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.spans: list[dict[str, Any]] = []
        self.urls: dict[str, str] = {}

    def log(self, **facts: object) -> list[dict[str, Any]]:
        return [line for line in map(json.loads, list(self.lines)) if facts.items() <= line.items()]

    def post(self, body: bytes, headers: dict[str, str]) -> bytes:
        answer: bytes = urlopen(
            Request(f"{self.urls['http']}/v2/models/npair/infer", body, headers), timeout=30
        ).read()
        return answer

    def refuse(self, request_id: bytes) -> None:
        tensor = b'{"name": "IMAGE", "datatype": "BYTES", "shape": [1, 1], "data": ["no photo"]}'
        with pytest.raises(HTTPError, match="400"):
            self.post(b'{"id": "' + request_id + b'", "inputs": [' + tensor + b"]}", {})


@contextlib.contextmanager
def collector(spans: list[dict[str, Any]]) -> Iterator[str]:
    """Receive OpenTelemetry traces as JSON over HTTP; yield the collector's URL."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            for resource in json.loads(self.rfile.read(int(self.headers["Content-Length"])))[
                "resourceSpans"
            ]:
                attributes = flat(resource["resource"])
                spans.extend(
                    {**span, "service": attributes["service.name"]}
                    for scope in resource["scopeSpans"]
                    for span in scope["spans"]
                )
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/v1/traces"
        server.shutdown()


def flat(item: dict[str, Any]) -> dict[str, str]:
    return {entry["key"]: str(*entry["value"].values()) for entry in item.get("attributes", [])}


@pytest.fixture(scope="module")
def server(published: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    models = tmp_path_factory.mktemp("observed")
    shutil.copytree(published, models / "npair", ignore=shutil.ignore_patterns("__pycache__"))
    config = models / "npair/config.pbtxt"
    config.write_text(with_release(config.read_text(), [1], {}))
    let_fail(models / "npair/1")
    seen, ports = Server(), free_ports()
    seen.urls = {
        "http": f"http://127.0.0.1:{ports['HTTP_PORT']}",
        "grpc": f"grpc://127.0.0.1:{ports['GRPC_PORT']}",
    }
    with collector(seen.spans) as url:
        options = {"LOG_FORMAT": "json", "VERBOSE": "1", "TRACE_URL": url, "TRACE_RATE": "1"}
        process = start(**ports, **options, MODEL_REPOSITORY=str(models))
        try:
            seen.lines += lines_until_ready(process)
            assert process.stderr is not None
            reader = threading.Thread(target=seen.lines.extend, args=(process.stderr,))
            reader.start()
            yield seen
        finally:
            process.terminate()
            process.wait(timeout=30)
            reader.join()


class TestLog:
    def test_each_line_is_an_object(self, server: Server) -> None:
        lines = server.log()
        assert {line["source"] for line in lines} == {"npair", "triton"}
        for line in lines:
            assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", line["time"])
            assert line["level"] in ("info", "warning", "error")
        assert any(
            "successfully loaded 'npair'" in line["message"]
            for line in server.log(level="info", source="triton")
        )
        assert any(
            line["message"].startswith("ready after")
            for line in server.log(level="info", source="npair")
        )

    @pytest.mark.parametrize("protocol", ["http", "grpc"])
    def test_a_refused_photo_is_named_by_its_request(
        self, server: Server, protocol: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("uuid.uuid4", lambda: type("Id", (), {"hex": f"of {protocol}"}))
        with NpairClient(server.urls[protocol]) as client, pytest.raises(InvalidPhotoError):
            client.embed([PHOTO, PHOTO[:100]])
        facts = {
            "source": "npair",
            "message": "photo refused",
            "request_id": f"of {protocol}",
            "version": "1",
        }
        eventually(lambda: server.log(**facts, index=1, reason="damaged"))
        assert len(server.log(**facts)) == 1

    @pytest.mark.parametrize("protocol", ["http", "grpc"])
    def test_a_failure_is_named_alike_to_both_sides(self, server: Server, protocol: str) -> None:
        with (
            NpairClient(server.urls[protocol]) as client,
            pytest.raises(ServerFaultError) as failure,
        ):
            client.embed(BREAKS)
        found = re.search(r"\(request (\w{32})\)$", str(failure.value))
        assert found
        eventually(
            lambda: server.log(
                level="error",
                source="npair",
                message="request failed",
                request_id=found[1],
                version="1",
            )
        )

    @pytest.mark.parametrize("request_id", HOSTILE, ids=lambda request_id: repr(request_id[:20]))
    def test_no_id_breaks_or_forges_a_line(self, server: Server, request_id: bytes) -> None:
        time.sleep(1)  # else the rate limit hides the line
        before, errors = len(server.log(message="photo refused")), server.log(level="error")
        server.refuse(request_id)
        eventually(lambda: len(server.log(message="photo refused")) > before)
        line = server.log(message="photo refused")[-1]
        assert line["level"] == "info"
        assert line["reason"] == "not_an_image"
        assert line["request_id"] == HOSTILE[request_id]
        assert server.log(level="error") == errors
        assert all(len(line) < 10_000 for line in server.lines)

    def test_a_flood_is_counted_instead(self, server: Server) -> None:
        time.sleep(1)
        before, began = len(server.lines), time.monotonic()
        for number in range(200):
            server.refuse(b"flood %d" % number)
        seconds = time.monotonic() - began

        def counted() -> int:
            new = [json.loads(line) for line in server.lines[before:]]
            return sum(
                line.get("more", "request_id" in line)
                for line in new
                if line["message"] == "photo refused"
            )

        eventually(lambda: counted() == 200)
        assert len(server.lines) - before < 20 + 15 * seconds, (
            "by two processes, five a second and their sum"
        )

    def test_photos_stay_out_of_it(self, server: Server) -> None:
        secret = b"\x89PNG\r\n\x1a\nsecret content" + PHOTO
        with NpairClient(server.urls["http"]) as client, pytest.raises(InvalidPhotoError):
            client.embed([secret])
        time.sleep(1.5)
        assert not any("secret content" in line for line in server.lines)


class TestTraces:
    def test_continue_the_callers(self, server: Server) -> None:
        trace, parent = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
        server.post(
            PHOTO,
            {"Inference-Header-Content-Length": "0", "traceparent": f"00-{trace}-{parent}-01"},
        )
        eventually(lambda: len([span for span in server.spans if span["traceId"] == trace]) >= 3)
        spans = {span["name"]: span for span in server.spans if span["traceId"] == trace}
        assert {"InferRequest", "npair", "compute"} <= set(spans)
        assert spans["InferRequest"]["parentSpanId"] == parent
        assert spans["npair"]["parentSpanId"] == spans["InferRequest"]["spanId"]
        assert all(span["service"] == "npair" for span in spans.values())

    def test_name_the_request_as_the_log_does(
        self, server: Server, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("uuid.uuid4", lambda: type("Id", (), {"hex": "traced"}))
        with NpairClient(server.urls["grpc"]) as client:
            client.embed(PHOTO)
        eventually(
            lambda: any(flat(span).get("triton.request_id") == "traced" for span in server.spans)
        )
