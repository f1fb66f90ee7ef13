"""Search, embed and attack the service of ``npair web`` over HTTP, before a real server."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lancedb
import numpy as np
import pytest
from PIL import ExifTags, Image
from support.models import SHIPPED
from support.photos import folders, table
from support.servers import eventually, running
from support.web import Answer, call, serving

from npair.client import HttpTransport, NpairClient
from npair.gallery.build import build
from npair.gallery.gallery import Gallery
from npair.web import guard
from npair.web import server as configured_as
from npair.web.app import BODIES, LIMITS
from npair.web.search import MAX_PHOTO, SIDE

VERSION = SHIPPED.name
GOLDEN = sorted((SHIPPED / "golden").glob("*.jpg"))
KEY = "k" * 32
TRUNCATED = GOLDEN[0].read_bytes()[:900]
BOUNDARY, END = "npair", b"--npair--\r\n"
FORM = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with running() as (_, urls):
        yield urls["http"]


@pytest.fixture(scope="module")
def client(server: str) -> Iterator[NpairClient]:
    with NpairClient(server) as client:
        yield client


@pytest.fixture(scope="module")
def gallery(client: NpairClient, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gallery")
    build(dataset, folder, client)
    return folder


@pytest.fixture(scope="module")
def web(server: str, gallery: Path) -> Iterator[str]:
    with serving(gallery, server) as url:
        yield url


@pytest.fixture(scope="module")
def photo(dataset: Path) -> bytes:
    return next(dataset.rglob("*.jpg")).read_bytes()


def form(photo: bytes, field: str = "photo") -> bytes:
    disposition = f'Content-Disposition: form-data; name="{field}"; filename="../../a.jpg"'
    head = f"--{BOUNDARY}\r\n{disposition}\r\nContent-Type: image/jpeg\r\n\r\n"
    return head.encode() + photo + b"\r\n" + END


def embeddings(url: str, **fields: Any) -> Answer:
    request = {"model": "npair"} | fields
    return call(url, "/v1/embeddings", json.dumps(request).encode(), {"Content-Type": "text/json"})


def head(path: str, length: int) -> bytes:
    """Return the head of a request whose body is to follow."""
    return f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length}\r\n\r\n".encode()


def text(photo: bytes) -> str:
    return base64.b64encode(photo).decode()


class TestSearch:
    def test_a_photo_finds_itself_first(self, web: str, photo: bytes, gallery: Path) -> None:
        found = call(web, "/search?k=3", photo).json
        assert (found["model"], found["version"]) == ("npair", VERSION)
        first, second, third = found["neighbours"]
        assert first["cosine"] == pytest.approx(1, abs=1e-3)
        assert first["cosine"] > second["cosine"] >= third["cosine"]
        assert first["photo"] == f"/photos/{first['id']}"
        assert Gallery(gallery).photo(first["id"]).read_bytes() == photo

    def test_a_form_is_taken_like_a_raw_photo(self, web: str, photo: bytes) -> None:
        assert call(web, "/search", form(photo), FORM).json == call(web, "/search", photo).json

    def test_curls_default_content_type_is_taken(self, web: str, photo: bytes) -> None:
        headers = {"Content-Type": "application/x-www-form-urlencoded"}
        assert len(call(web, "/search?k=2", photo, headers).json["neighbours"]) == 2

    def test_a_neighbour_is_searched_by_and_left_out(self, web: str, photo: bytes) -> None:
        first, *others = call(web, "/search?k=5", photo).json["neighbours"]
        again = call(web, f"/search?k=4&photo={first['id']}", method="POST").json["neighbours"]
        assert [each["id"] for each in again] == [each["id"] for each in others]

    def test_the_threshold_is_the_versions_unless_one_is_given(
        self, web: str, photo: bytes, client: NpairClient
    ) -> None:
        thresholds = client.thresholds()
        assert thresholds is not None
        default = call(web, "/search?threshold=", photo).json
        assert default["threshold"] == thresholds.far_1_percent
        strict = call(web, "/search?threshold=0.9999&k=2", photo).json
        assert [each["same_product"] for each in strict["neighbours"]] == [True, False]

    def test_a_search_asks_for_the_servers_configuration_once(
        self, web: str, photo: bytes, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A version's threshold never changes, so that only the first search asks for it."""
        call(web, "/search", photo)
        asked: list[dict[str, str]] = []
        ask = HttpTransport.parameters

        def parameters(transport: HttpTransport) -> dict[str, str]:
            asked.append(ask(transport))
            return asked[-1]

        monkeypatch.setattr(HttpTransport, "parameters", parameters)
        assert call(web, "/search", photo).json["threshold"]
        assert len(asked) == 1

    def test_a_catalogues_columns_come_back(
        self, server: str, client: NpairClient, photo: bytes, tmp_path: Path
    ) -> None:
        (tmp_path / "a.jpg").write_bytes(photo)
        (tmp_path / "b.jpg").write_bytes(GOLDEN[0].read_bytes())
        catalogue = table(tmp_path, "path,label,price\na.jpg,apple,1.20\nb.jpg,pear,2\n")
        build(catalogue, tmp_path / "gallery", client)
        with serving(tmp_path / "gallery", server) as url:
            first = call(url, "/search", photo).json["neighbours"][0]
            assert call(url, "/info").json["labels"] == 2
        assert (first["label"], first["columns"]) == ("apple", {"price": "1.20"})

    def test_photos_that_were_moved_without_the_gallery(
        self, server: str, client: NpairClient, tmp_path: Path
    ) -> None:
        photos = folders(tmp_path / "photos", classes=1, photos=1)
        build(photos, tmp_path / "gallery", client)
        photos.rename(tmp_path / "moved")
        with serving(tmp_path / "gallery", server) as url:
            path = call(url, "/search", GOLDEN[0].read_bytes()).json["neighbours"][0]["photo"]
            assert call(url, path).status == 404
        with serving(tmp_path / "gallery", server, photos=tmp_path / "moved") as url:
            assert call(url, path).status == 200

    def test_what_another_process_builds_is_found_at_once(
        self, server: str, client: NpairClient, tmp_path: Path
    ) -> None:
        photos, index = folders(tmp_path / "photos", classes=2, photos=2), tmp_path / "index"
        with serving(index, server) as url:
            missing = call(url, "/info")
            assert missing.status == 503
            assert missing.reason == "there is no gallery; npair index build makes one"
            build(photos, index, client)
            assert call(url, "/info").json["photos"] == 4
            shutil.copy(GOLDEN[0], photos / "class 0")
            build(photos, index, client)
            first = call(url, "/search", GOLDEN[0].read_bytes()).json["neighbours"][0]
            assert first["cosine"] == pytest.approx(1, abs=1e-3)

    def test_info(self, web: str, dataset: Path, client: NpairClient) -> None:
        thresholds = client.thresholds()
        assert call(web, "/info").json == {
            "model": "npair",
            "version": VERSION,
            "threshold": thresholds and thresholds.far_1_percent,
            "photos": len(list(dataset.rglob("*.jpg"))),
            "labels": 6,
        }


class TestPhotos:
    @pytest.fixture(scope="class")
    @staticmethod
    def turned(
        server: str, client: NpairClient, tmp_path_factory: pytest.TempPathFactory
    ) -> Iterator[tuple[str, str, Path]]:
        """A service whose gallery has a photo lying on its side, with EXIF data; and its id."""
        root = tmp_path_factory.mktemp("turned")
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = 6  # the top is on the right
        exif[ExifTags.Base.Artist] = "a name that is nobody's business"
        stripes = np.zeros((200, 200, 3), np.uint8)
        stripes[:100] = 255
        Image.fromarray(stripes).save(root / "a.jpg", exif=exif)
        build(root, root / "gallery", client)
        with serving(root / "gallery", server) as url:
            (first,) = call(url, "/search", (root / "a.jpg").read_bytes()).json["neighbours"]
            yield url, first["photo"], root / "a.jpg"

    def test_a_thumbnail_is_upright_and_has_no_metadata(
        self, turned: tuple[str, str, Path]
    ) -> None:
        url, path, _ = turned
        answer = call(url, path)
        assert answer.headers["content-type"] == "image/jpeg"
        assert b"nobody" not in answer.body
        with Image.open(io.BytesIO(answer.body)) as image:
            assert (image.size, dict(image.getexif())) == ((SIDE, SIDE), {})
            right, left = image.getpixel((SIDE - 9, 9)), image.getpixel((9, 9))
        assert min(right) - max(left) > 150  # type: ignore[arg-type]

    def test_a_thumbnail_is_asked_for_once(self, turned: tuple[str, str, Path]) -> None:
        url, path, _ = turned
        headers = call(url, path).headers
        assert "private" in headers["cache-control"]
        again = call(url, path, headers={"If-None-Match": headers["etag"]})
        assert (again.status, again.body) == (304, b"")

    def test_a_file_that_is_gone_or_spoilt(self, turned: tuple[str, str, Path]) -> None:
        url, path, file = turned
        content = file.read_bytes()
        file.write_bytes(TRUNCATED)
        spoilt = call(url, path)
        file.unlink()
        gone = call(url, path)
        file.write_bytes(content)
        assert (spoilt.status, gone.status, call(url, path).status) == (404, 404, 200)
        assert str(file.parent) not in spoilt.reason + gone.reason

    def test_a_photo_that_was_converted(
        self, server: str, client: NpairClient, tmp_path: Path
    ) -> None:
        with Image.open(GOLDEN[0]) as image:
            image.save(tmp_path / "a.avif")
        build(tmp_path, tmp_path / "gallery", client)
        with serving(tmp_path / "gallery", server) as url:
            (hit,) = call(url, "/search", GOLDEN[0].read_bytes()).json["neighbours"]
            assert call(url, hit["photo"]).status == 200

    @pytest.mark.parametrize(
        "identifier",
        [
            *("..%2f..%2f..%2fetc%2fpasswd", "../../etc/passwd", "%2fetc%2fpasswd", "0" * 64),
            *("0' OR '1'='1".replace(" ", "%20"), "%00", "%ff", "a" * 5000),
        ],
    )
    def test_nothing_but_a_row_is_shown(self, web: str, identifier: str) -> None:
        for path, method in (
            (f"/photos/{identifier}", "GET"),
            (f"/search?photo={identifier}", "POST"),
        ):
            answer = call(web, path, method=method)
            assert answer.status == 404
            assert b"root:" not in answer.body


class TestHealth:
    def test_searches_work(self, web: str) -> None:
        expected = {"status": "ok", "model": "npair", "version": VERSION}
        assert call(web, "/healthz").json == expected

    def test_no_server(self, gallery: Path, photo: bytes) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
        with serving(gallery, f"http://127.0.0.1:{port}") as url:
            for answer in (call(url, "/healthz"), call(url, "/search", photo)):
                assert answer.status == 503
                assert "refused" in answer.reason
                assert answer.headers["retry-after"] == "1"

    @pytest.mark.parametrize(
        ("version", "reason"),
        [
            ("1", r"version 1\b.*npair index build"),
            (VERSION, f"^the gallery is of another version {VERSION} than .* again"),
        ],
    )
    def test_a_gallery_of_another_version(
        self, server: str, gallery: Path, tmp_path: Path, version: str, reason: str
    ) -> None:
        """The table bears the metadata of a version that is not served."""
        made_by = {"model": "npair", "version": version, "manifest_sha256": "0" * 64}
        rows = Gallery(gallery).table.to_arrow().replace_schema_metadata(made_by)
        name = f"npair-{version}-000000000000"
        lancedb.connect(tmp_path).create_table(name, rows)
        (tmp_path / "current.json").write_text(json.dumps({"table": name, "photos": ""}))
        with serving(tmp_path, server) as url:
            answer = call(url, "/healthz")
        assert answer.status == 503
        assert re.search(reason, answer.reason)

    def test_a_damaged_gallery_is_not_described(self, server: str, tmp_path: Path) -> None:
        (tmp_path / "current.json").write_text("{")
        with serving(tmp_path, server) as url:
            answer = call(url, "/healthz")
        assert answer.status == 503
        assert str(tmp_path) not in answer.reason


class TestGuard:
    @pytest.mark.parametrize(
        "host", ["evil.example", "127.0.0.1.evil.example", "", "localhost@evil", "[::1", "a b"]
    )
    def test_another_host_is_refused(self, web: str, host: str) -> None:
        answer = call(web, "/info", headers={"Host": host})
        assert answer.status == 400

    @pytest.mark.parametrize("host", ["localhost", "LOCALHOST:80", "[::1]:8080", "127.0.0.1"])
    def test_names_of_loopback_are_taken(self, web: str, host: str) -> None:
        assert call(web, "/info", headers={"Host": host}).status == 200

    @pytest.mark.parametrize(
        "origin", ["https://evil.example", "null", "http://127.0.0.1:1", "http://[::1"]
    )
    def test_other_origins_may_not_post(self, web: str, origin: str, photo: bytes) -> None:
        assert call(web, "/search", photo, {"Origin": origin}).status == 403

    def test_the_page_itself_may_post(self, web: str, photo: bytes) -> None:
        assert call(web, "/search", photo, {"Origin": web}).status == 200

    def test_headers_of_every_answer(self, web: str) -> None:
        for path in ("/info", "/nothing", "/docs", "/photos/0", "/search?k=0"):
            headers = call(web, path).headers
            policy = headers["content-security-policy"]
            assert "default-src 'none'" in policy
            assert "frame-ancestors 'none'" in policy
            assert "script-src 'self';" in policy
            assert headers["x-content-type-options"] == "nosniff"
            assert headers["referrer-policy"] == "no-referrer"
            assert "server" not in headers
            assert "access-control-allow-origin" not in headers

    @pytest.mark.parametrize("path", ["/search", "/v1/embeddings", "/info", "/nothing"])
    def test_a_huge_body_is_refused_before_it_comes(self, web: str, path: str) -> None:
        host, port = web.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=10) as connection:
            connection.sendall(head(path, 99_999_999_999))
            assert connection.recv(100).startswith(b"HTTP/1.1 413 ")

    @pytest.mark.parametrize("headers", [{}, FORM])
    def test_chunks_without_a_length_are_counted(self, web: str, headers: dict[str, str]) -> None:
        sent = 0

        def chunks() -> Iterator[bytes]:
            nonlocal sent
            yield form(b"")[:-10]
            for _ in range(100):
                sent += 1
                yield bytes(1_000_000)

        assert call(web, "/search", chunks(), headers).status == 413
        assert sent < 100

    def test_a_body_that_never_ends_is_given_up(
        self, web: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(guard, "BODY_SECONDS", 0.3)
        host, port = web.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=10) as connection:
            connection.sendall(
                b"POST /search HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n"
            )
            assert connection.recv(100).startswith(b"HTTP/1.1 408 ")

    @pytest.mark.parametrize("answered", [b"", b"GET /info HTTP/1.1\r\nHost: localhost\r\n\r\n"])
    @pytest.mark.parametrize("sent", [b"", b"GET /info HTTP/1.1\r\nHost: "])
    def test_a_head_that_does_not_end_is_given_up(
        self, web: str, monkeypatch: pytest.MonkeyPatch, answered: bytes, sent: bytes
    ) -> None:
        """A connection that has been used is no better than a new one."""
        monkeypatch.setattr(configured_as, "HEAD_SECONDS", 0.3)
        host, port = web.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=20) as connection:
            connection.sendall(answered)
            if answered:
                assert connection.recv(100_000).startswith(b"HTTP/1.1 200 ")
            connection.sendall(sent)
            while connection.recv(100_000):
                pass

    def test_a_slow_answer_is_waited_for(
        self, web: str, photo: bytes, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(configured_as, "HEAD_SECONDS", 0.3)
        host, port = web.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=20) as connection:
            connection.sendall(head("/search", len(photo)) + photo[:100])
            time.sleep(1)
            connection.sendall(photo[100:])
            assert connection.recv(100).startswith(b"HTTP/1.1 200 ")

    def test_more_bodies_than_memory_is_for_are_refused(self, web: str, photo: bytes) -> None:
        host, port = web.removeprefix("http://").split(":")
        largest = LIMITS["/v1/embeddings"]
        waiting = [socket.create_connection((host, int(port))) for _ in range(BODIES // largest)]
        try:
            for connection in waiting:
                connection.sendall(head("/v1/embeddings", largest))
            eventually(lambda: call(web, "/search", photo).status == 503)
            assert call(web, "/search", iter([photo])).status == 503, "in chunks"
            assert call(web, "/search", method="POST").status == 400, "without a body"
        finally:
            for connection in waiting:
                connection.close()
        eventually(lambda: call(web, "/search", photo).status == 200)


class TestBadRequests:
    @pytest.mark.parametrize(
        ("query", "reason"),
        [
            *(("k=0", "k: .*1"), ("k=101", "k: .*100"), ("k=many", "k: ")),
            *(("threshold=nan", "finite"), ("threshold=2", "threshold: "), ("k=", "k: ")),
            *(("threshold=inf", "threshold: "), ("photo=0", "no such photo|not name|one photo")),
        ],
    )
    def test_query(self, web: str, photo: bytes, query: str, reason: str) -> None:
        answer = call(web, f"/search?{query}", photo)
        assert answer.status == 400
        assert re.search(reason, answer.reason)

    @pytest.mark.parametrize(
        ("body", "headers", "status", "reason"),
        [
            (b"", {}, 400, "send one photo"),
            (b"text", {}, 400, "not a JPEG"),
            (TRUNCATED, {}, 400, "truncated"),
            (bytes(MAX_PHOTO + 1), {}, 413, "20000000"),
            (form(b""), FORM, 400, "send one photo"),
            (form(TRUNCATED), FORM, 400, "truncated"),
            (form(TRUNCATED, "image"), FORM, 400, "send one photo"),
            (form(TRUNCATED)[:-30], FORM, 400, "send one photo"),
            (b"no form", FORM, 400, "form cannot be read"),
            (form(b"a").removesuffix(END) + form(b"b"), FORM, 400, "form cannot be read"),
            (form(b""), {"Content-Type": "multipart/form-data"}, 400, "form cannot be read"),
        ],
    )
    def test_body(
        self, web: str, body: bytes, headers: dict[str, str], status: int, reason: str
    ) -> None:
        answer = call(web, "/search", body, headers)
        assert answer.status == status, answer.body
        assert re.search(reason, answer.reason)

    def test_unknown_paths_have_the_same_form(self, web: str) -> None:
        assert call(web, "/nothing").json["error"]["type"] == "invalid_request_error"
        assert call(web, "/search").status == 405


class TestEmbeddings:
    """What OpenAI's clients do not send; tests/docs/test_web_docs.py has them themselves."""

    def test_vectors_are_those_of_the_client(self, web: str, client: NpairClient) -> None:
        photos = [path.read_bytes() for path in GOLDEN[:2]]
        expected, version = client.embed(photos)
        uris = [text(photos[0]), "data:image/jpeg;base64," + text(photos[1])]
        answer = embeddings(web, input=uris, dimensions=0, modality="image", user="u").json
        vectors = np.array([each["embedding"] for each in answer["data"]])
        assert ((vectors * expected).sum(1) >= 0.9999).all()
        assert answer["model"] == f"npair:{version}"
        assert answer["usage"] == {"prompt_tokens": 2, "total_tokens": 2}
        packed = embeddings(web, input=uris, encoding_format="base64", model=answer["model"]).json
        decoded = base64.b64decode(packed["data"][1]["embedding"])
        assert np.frombuffer(decoded, "<f4") @ expected[1] >= 0.9999

    def test_64_photos_and_lines_of_base64(self, web: str) -> None:
        lines = base64.encodebytes(GOLDEN[0].read_bytes()).decode()
        assert len(embeddings(web, input=[lines.replace("\n", " ")] * 64).json["data"]) == 64

    @pytest.mark.parametrize(
        ("fields", "status", "param", "reason"),
        [
            ({"input": "https://example.org/a.jpg"}, 400, "input", "fetches none"),
            ({"input": "a red shoe!"}, 400, "input", "not text"),
            ({"input": "data:text/plain,a"}, 400, "input", "not text"),
            ({"input": [[1, 2]]}, 400, "input", "check_embedding_ctx_length"),
            ({"input": [1, 2]}, 400, "input", "check_embedding_ctx_length"),
            ({"input": []}, 400, "input", "1 to 64"),
            ({"input": [""] * 65}, 400, "input", "1 to 64"),
            ({"input": {"image": "a"}}, 400, "input", "valid"),
            ({"input": ""}, 400, "input", r"input\[0\].*empty"),
            ({"input": text(TRUNCATED)}, 400, "input", r"input\[0\].*truncated"),
            ({"input": text(bytes(MAX_PHOTO + 1))}, 413, "input", "20000000"),
            ({"input": "", "modality": "text"}, 400, "modality", "image"),
            ({"input": "", "encoding_format": "int8"}, 400, "encoding_format", "float"),
            ({}, 400, "input", "required"),
            ({"input": text(TRUNCATED), "model": "clip"}, 404, "model", "served: npair, npair:"),
            ({"input": text(TRUNCATED), "model": "npair:1"}, 404, "model", "served: npair, npair:"),
            *(
                (
                    {"input": text(GOLDEN[0].read_bytes()), "model": f"npair:{version}"},
                    *(404, "model", "served: npair, npair:"),
                )
                for version in ("", "../1", f"0{VERSION}", "\u0661\u0667", "9" * 30)
            ),
        ],
    )
    def test_refusals(
        self, web: str, fields: dict[str, Any], status: int, param: str, reason: str
    ) -> None:
        answer = embeddings(web, **fields)
        assert answer.status == status, answer.body[:500]
        assert len(answer.body) < 500
        assert set(answer.json["error"]) == {"message", "type", "param", "code"}
        assert answer.json["error"]["param"] == param
        assert re.search(reason, answer.reason)

    def test_shorter_vectors_are_refused(self, web: str) -> None:
        photo = text(GOLDEN[0].read_bytes())
        assert embeddings(web, input=photo, dimensions=128).status == 200
        assert "128 dimensions" in embeddings(web, input=photo, dimensions=64).reason

    @pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\xff", b'{"model": "npair"', b"null"])
    def test_no_json(self, web: str, body: bytes) -> None:
        assert call(web, "/v1/embeddings", body).status == 400

    def test_models(self, web: str) -> None:
        names = ["npair", f"npair:{VERSION}"]
        assert [each["id"] for each in call(web, "/v1/models").json["data"]] == names
        assert call(web, f"/v1/models/{names[1]}").json["id"] == names[1]
        assert call(web, "/v1/models/clip").status == 404


class TestKey:
    @pytest.fixture(scope="class")
    @staticmethod
    def locked(server: str, gallery: Path) -> Iterator[str]:
        with serving(gallery, server, key=KEY) as url:
            yield url

    @pytest.mark.parametrize(
        ("path", "method"),
        [
            *(("/info", "GET"), ("/search", "POST"), ("/photos/0", "GET")),
            *(("/v1/models", "GET"), ("/v1/models/npair", "GET"), ("/v1/embeddings", "POST")),
        ],
    )
    def test_what_needs_the_key(self, locked: str, path: str, method: str) -> None:
        for given in ({}, {"Authorization": f"Bearer {KEY}k"}, {"Authorization": f"Basic {KEY}"}):
            answer = call(locked, path, headers=given, method=method)
            assert (answer.status, answer.headers["www-authenticate"]) == (401, "Bearer")
        assert (
            call(locked, path, headers={"Authorization": f"Bearer {KEY}"}, method=method).status
            != 401
        )

    @pytest.mark.parametrize("path", ["/healthz", "/docs", "/docs/start.js", "/openapi.json"])
    def test_what_does_not(self, locked: str, path: str) -> None:
        assert call(locked, path).status == 200

    def test_no_route_is_forgotten(self, locked: str) -> None:
        paths = call(locked, "/openapi.json").json["paths"]
        closed = {
            path for path, calls in paths.items() for each in calls.values() if each.get("security")
        }
        assert set(paths) - closed == {"/healthz"}


class TestDocs:
    def test_no_other_host_is_needed(self, web: str) -> None:
        page = call(web, "/docs").body.decode()
        links = re.findall(r'(?:src|href)="(.*?)"', page)
        assert len(links) == 3
        for link in links:
            assert link.startswith("docs/")
            assert call(web, f"/{link}").status == 200
        assert call(web, "/docs/package.json").status == 400

    def test_refusals_are_described(self, web: str) -> None:
        answers = call(web, "/openapi.json").json["paths"]["/search"]["post"]["responses"]
        assert set(answers) == {"200", "default"}


class TestCommand:
    @staticmethod
    def start(
        gallery: Path, server: str, *options: str, **environment: str
    ) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "npair", "web", "--index", str(gallery), "--url", server]
        return subprocess.Popen(
            [*command, "--port", "0", *options],
            env=os.environ | environment,
            stderr=subprocess.PIPE,
            text=True,
        )

    def test_sigterm_ends_it_when_its_answers_are_sent(
        self, server: str, gallery: Path, photo: bytes
    ) -> None:
        process = self.start(gallery, server)
        assert process.stderr is not None
        url = process.stderr.readline().split()[-1]
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=10) as connection:
            head = (
                f"POST /search HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(photo)}\r\n\r\n"
            )
            connection.sendall(head.encode() + photo[:100])
            eventually(lambda: call(url, "/info").status == 200)
            process.send_signal(signal.SIGTERM)
            eventually(lambda: _refused(host, int(port)))
            connection.sendall(photo[100:])
            assert connection.recv(100).startswith(b"HTTP/1.1 200 ")
        assert process.wait(timeout=20) == 0
        assert process.stderr.read() == ""

    def test_it_does_not_listen_beyond_loopback_without_a_key(
        self, server: str, gallery: Path
    ) -> None:
        process = self.start(gallery, server, "--host", "0.0.0.0")
        _, errors = process.communicate(timeout=60)
        assert (process.returncode, errors.count("\n")) == (1, 1)
        assert "set NPAIR_WEB_KEY" in errors

    def test_beyond_loopback_with_a_key_of_a_file(
        self, server: str, gallery: Path, tmp_path: Path
    ) -> None:
        (tmp_path / "key").write_text(f"{KEY}\n")
        options = ("--host", "0.0.0.0", "--allow-host", "Search.example")
        process = self.start(gallery, server, *options, NPAIR_WEB_KEY_FILE=str(tmp_path / "key"))
        try:
            assert process.stderr is not None
            url = process.stderr.readline().split()[-1].replace("0.0.0.0", "127.0.0.1")
            key = {"Authorization": f"Bearer {KEY}"}
            assert call(url, "/info", headers={"Host": "search.example"} | key).status == 200
            assert call(url, "/info", headers={"Host": "other.example"} | key).status == 400
            assert call(url, "/info").status == 401
        finally:
            process.terminate()
            assert process.wait(timeout=20) == 0


def _refused(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=1).close()
    except ConnectionError:
        return True
    return False
