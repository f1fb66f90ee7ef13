"""Black-box tests of a running server, over HTTP and gRPC.

They test the server at NPAIR_URL (http://) and NPAIR_GRPC_URL (grpc://), or start one through
serve.py if these are not set. All photos are drawn here, so the file needs only client.py, serve.py
and supervisor/ beside it.
"""

from __future__ import annotations

import contextlib
import http.client
import io
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.http
from client import InvalidPhotoError, InvalidRequestError, NpairClient, VersionGoneError
from PIL import Image, ImageDraw, ImageFilter
from tritonclient.utils import InferenceServerException

SERVE = Path(__file__).with_name("serve.py")
# For one request. An emulated server takes minutes for a batch.
TIMEOUT = float(os.environ.get("NPAIR_TIMEOUT", "30"))


def connected(url: str) -> NpairClient:
    return NpairClient(url, timeout=TIMEOUT)


@pytest.fixture(scope="session")
def urls() -> Iterator[dict[str, str]]:
    """The server under test, by protocol."""
    if "NPAIR_URL" in os.environ:
        yield {"http": os.environ["NPAIR_URL"], "grpc": os.environ["NPAIR_GRPC_URL"]}
        return
    ports = free_ports(3)
    names = ("HTTP_PORT", "GRPC_PORT", "METRICS_PORT")
    environment = os.environ | {name: str(port) for name, port in zip(names, ports, strict=True)}
    server = subprocess.Popen(
        [sys.executable, SERVE], env=environment, stderr=subprocess.PIPE, text=True
    )
    assert server.stderr is not None
    lines = []
    for line in server.stderr:
        lines.append(line)
        if "ready after" in line:
            break
    else:
        pytest.fail("the server did not start:\n" + "".join(lines))
    threading.Thread(target=sys.stderr.writelines, args=(server.stderr,), daemon=True).start()
    yield {"http": f"http://127.0.0.1:{ports[0]}", "grpc": f"grpc://127.0.0.1:{ports[1]}"}
    server.send_signal(signal.SIGTERM)
    assert server.wait(timeout=30) == 0


@pytest.fixture(params=["http", "grpc"])
def client(request: pytest.FixtureRequest, urls: dict[str, str]) -> Iterator[NpairClient]:
    with connected(urls[request.param]) as client:
        yield client


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [listener.getsockname()[1] for listener in sockets]
    for listener in sockets:
        listener.close()
    return ports


def draw(seed: int, size: tuple[int, int] = (348, 348)) -> Image.Image:
    """Draw large coloured shapes, different for each seed."""
    random = np.random.default_rng(seed)
    image = Image.new("RGB", size, tuple(random.integers(0, 256, 3).tolist()))
    pen = ImageDraw.Draw(image)
    for _ in range(6):
        left, top = random.uniform(0, 0.7, 2) * size
        width, height = random.uniform(0.1, 0.5, 2) * size
        shape = pen.ellipse if random.random() < 0.5 else pen.rectangle
        shape(
            [left, top, left + width, top + height], fill=tuple(random.integers(0, 256, 3).tolist())
        )
    return image.filter(ImageFilter.GaussianBlur(1.5))


def encode(image: Image.Image, image_format: str = "JPEG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(
        buffer, image_format, **({"quality": 92} if image_format == "JPEG" else {}) | options
    )
    return buffer.getvalue()


def png(width: int, height: int, bit_depth: int, colour_type: int, rows: Iterator[bytes]) -> bytes:
    """A PNG file from its unfiltered rows (RFC 2083), in formats that Pillow does not write."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content))
            + kind
            + content
            + struct.pack(">I", zlib.crc32(kind + content))
        )

    deflate = zlib.compressobj(1)
    data = b"".join([*(deflate.compress(b"\0" + row) for row in rows), deflate.flush()])
    header = struct.pack(">IIBBBBB", width, height, bit_depth, colour_type, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    )


def png_16_bit(image: Image.Image) -> bytes:
    """8-bit RGB or grey pixels as 16-bit ones of the same brightness (v * 257)."""
    pixels = np.asarray(image).astype(">u2") * 257
    return png(
        *image.size,
        16,
        2 if image.mode == "RGB" else 0,
        (row.astype(">u2").tobytes() for row in pixels),
    )


def raw_request(
    url: str, path: str, body: bytes | None = None
) -> tuple[int, http.client.HTTPMessage, bytes]:
    """GET, or POST a body as one raw photo, with the default content type of curl --data-binary.

    Returns: status, headers and body.
    """
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=TIMEOUT)
    headers = {
        "Inference-Header-Content-Length": "0",
        "Content-Type": "application/x-www-form-urlencoded",
    }
    connection.request(
        "GET" if body is None else "POST", path, body, {} if body is None else headers
    )
    response = connection.getresponse()
    content = response.read()
    connection.close()
    return response.status, response.headers, content


class TestContract:
    def test_metadata(self, urls: dict[str, str]) -> None:
        status, _, body = raw_request(urls["http"], "/v2/models/npair")
        metadata = json.loads(body)
        assert status == 200
        assert metadata["inputs"] == [{"name": "IMAGE", "datatype": "BYTES", "shape": [-1, 1]}]
        assert metadata["outputs"] == [
            {"name": "EMBEDDING", "datatype": "FP32", "shape": [-1, 128]}
        ]

    def test_configuration_is_readable(self, urls: dict[str, str]) -> None:
        status, _, body = raw_request(urls["http"], "/v2/models/npair/config")
        configuration = json.loads(body)
        assert status == 200
        assert configuration["max_batch_size"] == 64
        assert len(configuration["parameters"]["manifest_sha256"]["string_value"]) == 64

    def test_embeddings_have_unit_length_and_a_version(self, client: NpairClient) -> None:
        vectors, version = client.embed([encode(draw(seed)) for seed in range(3)])
        assert vectors.shape == (3, 128)
        assert vectors.dtype == np.float32
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
        assert version.isdecimal()
        assert abs(vectors[0] @ vectors[1]) < 0.999, "different photos have different embeddings"

    def test_raw_photo(self, urls: dict[str, str], client: NpairClient) -> None:
        photo = encode(draw(0))
        status, headers, body = raw_request(urls["http"], "/v2/models/npair/infer", photo)
        split = int(headers["Inference-Header-Content-Length"])
        assert status == 200
        assert len(body) - split == 512
        vector = np.frombuffer(body[split:], np.float32)
        vectors, version = client.embed(photo)
        assert json.loads(body[:split])["model_version"] == version
        np.testing.assert_allclose(vector, vectors[0], atol=1e-5)

    def test_raw_photo_of_a_phones_size(self, urls: dict[str, str]) -> None:
        """Triton's HTTP library copies it to a stack, because of a form's content type."""
        noise = np.random.default_rng(0).integers(0, 256, (2500, 2500, 3), np.uint8)
        photo = encode(Image.fromarray(noise))
        assert len(photo) > 5_000_000
        assert raw_request(urls["http"], "/v2/models/npair/infer", photo)[0] == 200

    def test_pinned_version(self, client: NpairClient) -> None:
        photo = encode(draw(0))
        version = client.embed(photo).version
        client.version = version
        assert client.embed(photo).version == version
        client.version = "999999"
        with pytest.raises(
            VersionGoneError, match=f"version 999999 of model npair is not served, but {version} is"
        ):
            client.embed(photo)

    def test_order_over_many_batches(self, client: NpairClient) -> None:
        photos = [encode(draw(seed, (64, 64))) for seed in range(70)]
        client.batch_size = 64
        together = client.embed(photos).vectors
        client.batch_size = 1
        alone = np.concatenate([client.embed(photo).vectors for photo in photos[:70:23]])
        assert np.einsum("nd,nd->n", together[::23], alone).min() >= 0.9999

    def test_largest_batch(self, client: NpairClient) -> None:
        photo = encode(draw(0, (32, 32)))
        client.batch_size = 65
        assert client.embed([photo] * 64).vectors.shape == (64, 128)
        with pytest.raises(InvalidRequestError, match="64"):
            client.embed([photo] * 65)

    def test_ready(self, client: NpairClient) -> None:
        assert client.ready()

    @pytest.mark.parametrize(
        "path",
        [
            "/v2/repository/index",
            "/v2/repository/models/npair/unload",
            "/v2/systemsharedmemory/unregister",
            "/v2/logging",
        ],
    )
    def test_control_apis_need_a_secret(self, urls: dict[str, str], path: str) -> None:
        status, _, body = raw_request(urls["http"], path, b"{}")
        assert status != 200
        assert b"restricted" in body


RGB = draw(11)
GREY = RGB.convert("L")
OTHER_GREY = draw(1).convert("L")
# High quality, and JPEG's full colour resolution: compression changes the edges of drawings, and
# this tests decoding.
FINE: dict[str, Any] = {"quality": 95, "subsampling": 0}
HALF = Image.linear_gradient("L").resize(RGB.size)  # transparent above, opaque below


def cut_out() -> Image.Image:
    image = RGB.copy()
    image.putalpha(HALF)
    return image


def turned(orientation: int, transpose: Image.Transpose) -> bytes:
    """A JPEG with turned pixels, and the EXIF orientation that turns them back."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encode(RGB.transpose(transpose), exif=exif, **FINE)


TWINS = {
    "jpeg": (encode(RGB, **FINE), RGB),
    "progressive jpeg": (encode(RGB, progressive=True, **FINE), RGB),
    "webp": (encode(RGB, "WEBP", quality=100), RGB),
    "grey jpeg": (encode(OTHER_GREY, quality=95), OTHER_GREY.convert("RGB")),
    "grey png": (encode(GREY, "PNG"), GREY.convert("RGB")),
    "black and white png": (encode(GREY.convert("1"), "PNG"), GREY.convert("1").convert("RGB")),
    "palette png": (encode(RGB.quantize(256), "PNG"), RGB),
    "palette png with transparency": (
        encode(RGB.quantize(256), "PNG", transparency=0),
        Image.alpha_composite(
            Image.new("RGBA", RGB.size, "white"),
            Image.open(io.BytesIO(encode(RGB.quantize(256), "PNG", transparency=0))).convert(
                "RGBA"
            ),
        ).convert("RGB"),
    ),
    "cmyk jpeg": (encode(RGB.convert("CMYK")), RGB),
    "16-bit png": (png_16_bit(RGB), RGB),
    "16-bit grey png": (png_16_bit(GREY), GREY.convert("RGB")),
    "opaque alpha png": (encode(RGB.convert("RGBA"), "PNG"), RGB),
    "grey alpha png": (encode(GREY.convert("LA"), "PNG"), GREY.convert("RGB")),
    "transparent png": (
        encode(cut_out(), "PNG"),
        Image.composite(RGB, Image.new("RGB", RGB.size, "white"), HALF),
    ),
    "transparent webp": (
        encode(cut_out(), "WEBP", lossless=True),
        Image.composite(RGB, Image.new("RGB", RGB.size, "white"), HALF),
    ),
    "orientation 3": (turned(3, Image.Transpose.ROTATE_180), RGB),
    "orientation 6": (turned(6, Image.Transpose.ROTATE_90), RGB),
    "orientation 8": (turned(8, Image.Transpose.ROTATE_270), RGB),
    "orientation 2": (turned(2, Image.Transpose.FLIP_LEFT_RIGHT), RGB),
    "12 megapixels": (encode(RGB.resize((3464, 3464), Image.Resampling.BICUBIC)), RGB),
}


@pytest.mark.parametrize("kind", TWINS)
def test_same_embedding_as_its_plain_twin(client: NpairClient, kind: str) -> None:
    photo, twin = TWINS[kind]
    vectors = client.embed([photo, encode(twin, "PNG")]).vectors
    assert vectors[0] @ vectors[1] >= 0.99


JPEG = encode(RGB)
PNG = encode(RGB, "PNG")
HOSTILE = {
    "empty": (b"", "empty"),
    "text": (b"not a photo at all", "not a JPEG, PNG or WebP"),
    "truncated jpeg": (JPEG[: len(JPEG) // 2], "truncated"),
    "jpeg without its last bytes": (JPEG[:-200], "truncated"),
    "jpeg header alone": (JPEG[:300], "truncated"),
    "truncated png": (PNG[: len(PNG) // 2], "truncated"),
    "png with a damaged byte": (PNG[:4000] + bytes([PNG[4000] ^ 16]) + PNG[4001:], "damaged"),
    "truncated webp": (encode(RGB, "WEBP")[:500], "truncated"),
    "bomb": (
        png(20_000, 20_000, 8, 2, (bytes(60_000) for _ in range(20_000))),
        "20000x20000 pixels.*limit",
    ),
    "gif": (encode(RGB.quantize(64), "GIF"), "not a JPEG, PNG or WebP"),
    "tiff": (encode(RGB, "TIFF"), "not a JPEG, PNG or WebP"),
    "bmp": (encode(RGB, "BMP"), "not a JPEG, PNG or WebP"),
    "svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not a JPEG, PNG or WebP"),
    "too many bytes": (JPEG + bytes(20_000_001), "bytes.*limit"),
    "zeros": (bytes(256), "not a JPEG, PNG or WebP"),
}


def framed(body: bytes, **fields: object) -> bytes:
    """The rest of a request after the request line and the host."""
    lines = {"Content-Length": len(body)} | {
        name.replace("_", "-"): value for name, value in fields.items()
    }
    return (
        "".join(f"{name}: {value}\r\n" for name, value in lines.items()).encode() + b"\r\n" + body
    )


FRAMES = {
    "deep json": framed(b"[" * 10_000),
    "deep data": framed(
        b'{"inputs":[{"name":"IMAGE","shape":[1,1],"datatype":"BYTES","data":'
        + b"[" * 500
        + b"]" * 500
        + b"}]}"
    ),
    "not json": framed(b"\xff\xfe{"),
    "many chunks": b"Transfer-Encoding: chunked\r\n\r\n" + b"1\r\n[\r\n" * 1000 + b"0\r\n\r\n",
    "negative header length": framed(JPEG, Inference_Header_Content_Length=-1),
    "header longer than the body": framed(JPEG, Inference_Header_Content_Length=10**20),
    "less than was announced": framed(JPEG, Content_Length=10**6),
    "far more announced": framed(JPEG, Content_Length=10**15),
    "not as it is said to be coded": framed(
        JPEG, Content_Encoding="gzip", Inference_Header_Content_Length=0
    ),
    "an unknown coding": framed(JPEG, Content_Encoding="br"),
    "many headers": framed(b"{}", **{f"X-{number}": "x" for number in range(1000)}),
}


class TestHostile:
    @pytest.mark.parametrize("kind", HOSTILE)
    def test_refused_with_index_and_reason(self, client: NpairClient, kind: str) -> None:
        photo, reason = HOSTILE[kind]
        with pytest.raises(InvalidPhotoError, match=reason) as caught:
            client.embed(photo)
        assert list(caught.value.reasons) == [0]
        assert client.ready()

    @pytest.mark.parametrize("kind", HOSTILE)
    def test_refused_as_a_raw_photo(self, urls: dict[str, str], kind: str) -> None:
        photo, reason = HOSTILE[kind]
        status, _, body = raw_request(urls["http"], "/v2/models/npair/infer", photo)
        assert status == 400
        assert re.search(rf"IMAGE\[0\]: .*({reason})", body.decode())

    def test_one_bad_photo_among_64(self, client: NpairClient) -> None:
        photos = [encode(draw(seed, (64, 64))) for seed in range(64)]
        good = client.embed(photos).vectors
        photos[41] = HOSTILE["truncated jpeg"][0]
        client.batch_size = 64
        with pytest.raises(InvalidPhotoError) as caught:
            client.embed(photos)
        assert list(caught.value.reasons) == [41]
        results = list(client.stream(photos))
        assert [result.index for result in results if result.vector is None] == [41]
        rest = np.stack([result.vector for result in results if result.vector is not None])
        assert np.einsum("nd,nd->n", rest, np.delete(good, 41, axis=0)).min() >= 0.9999

    def test_bad_photos_do_not_touch_requests_beside_them(self, urls: dict[str, str]) -> None:
        photo = encode(draw(5))
        bad = [content for kind, (content, _) in HOSTILE.items() if len(content) < 100_000]
        with connected(urls["http"]) as client:
            expected = client.embed(photo).vectors[0]

        def send(number: int) -> float | None:
            with connected(urls["grpc" if number % 3 else "http"]) as client:
                try:
                    return float(
                        client.embed(photo if number % 2 else bad[number // 2 % len(bad)]).vectors[
                            0
                        ]
                        @ expected
                    )
                except InvalidPhotoError:
                    return None

        with ThreadPoolExecutor(16) as pool:
            cosines = list(pool.map(send, range(200)))
        assert all(
            (cosine is not None) == (number % 2 == 1) for number, cosine in enumerate(cosines)
        )
        assert min(cosine for cosine in cosines if cosine is not None) >= 0.9999

    @pytest.mark.parametrize(
        ("shape", "content"),
        [
            ([1, 1], struct.pack("<I", 100) + b"short"),
            ([1, 1], struct.pack("<I", 0xFFFFFFFF) + b"short"),
            ([1, 1], struct.pack("<I1s", 1, b"a") * 2),
            ([2, 1], struct.pack("<I1s", 1, b"a")),
            ([1, 1], b"ab"),
            ([1], struct.pack("<I1s", 1, b"a")),
            ([0, 1], b""),
            ([1, 2], struct.pack("<I1s", 1, b"a") * 2),
        ],
    )
    def test_malformed_tensors(
        self, urls: dict[str, str], shape: list[int], content: bytes
    ) -> None:
        tensor = {
            "name": "IMAGE",
            "shape": shape,
            "datatype": "BYTES",
            "parameters": {"binary_data_size": len(content)},
        }
        header = json.dumps({"inputs": [tensor]}).encode()
        connection = http.client.HTTPConnection(urlsplit(urls["http"]).netloc, timeout=TIMEOUT)
        connection.request(
            "POST",
            "/v2/models/npair/infer",
            header + content,
            {"Inference-Header-Content-Length": str(len(header))},
        )
        assert 400 <= connection.getresponse().status < 500
        connection.close()
        with connected(urls["http"]) as client:
            assert client.ready()

    @pytest.mark.parametrize("kind", FRAMES)
    def test_malformed_requests_are_refused(self, urls: dict[str, str], kind: str) -> None:
        """The server answers an error or closes the connection, and then serves as before."""
        parts = urlsplit(urls["http"])
        with socket.create_connection((parts.hostname, parts.port), timeout=TIMEOUT) as connection:
            connection.sendall(
                b"POST /v2/models/npair/infer HTTP/1.1\r\nHost: npair\r\n" + FRAMES[kind]
            )
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_WR)  # signals the end of the request
            with contextlib.suppress(ConnectionError):
                answer = connection.recv(100)
                assert not answer or re.match(rb"HTTP/1.1 [45]", answer)
        with connected(urls["http"]) as client:
            assert client.embed(JPEG).vectors.shape == (1, 128)

    @pytest.mark.parametrize("protocol", ["http", "grpc"])
    def test_compressed_photos_that_are_refused(self, urls: dict[str, str], protocol: str) -> None:
        triton: Any = {"http": tritonclient.http, "grpc": tritonclient.grpc}[protocol]
        image = triton.InferInput("IMAGE", [1, 1], "BYTES")
        image.set_data_from_numpy(np.array([[bytes(1_000_000)]], dtype=np.object_))
        with triton.InferenceServerClient(urlsplit(urls[protocol]).netloc) as client:
            keyword = (
                "request_compression_algorithm" if protocol == "http" else "compression_algorithm"
            )
            with pytest.raises(InferenceServerException, match="not a JPEG, PNG or WebP"):
                client.infer("npair", [image], **{keyword: "gzip"})
            assert client.is_model_ready("npair")

    def test_right_content_counts_not_the_name(self, client: NpairClient, tmp_path: Path) -> None:
        disguised = tmp_path / "photo.png"
        disguised.write_bytes(JPEG)
        assert client.embed(disguised).vectors @ client.embed(JPEG).vectors.T >= 0.9999


def test_1000_concurrent_requests_get_the_vectors_of_single_ones(urls: dict[str, str]) -> None:
    photos = [encode(draw(seed, (160 + 16 * (seed % 7), 200))) for seed in range(40)]
    with connected(urls["http"]) as client:
        alone = np.concatenate([client.embed(photo).vectors for photo in photos])
    clients = threading.local()

    def send(number: int) -> float:
        protocol = "http" if number % 2 else "grpc"
        if not hasattr(clients, protocol):
            setattr(clients, protocol, connected(urls[protocol]))
        vectors = getattr(clients, protocol).embed(photos[number % 40]).vectors
        return float(vectors[0] @ alone[number % 40])

    with ThreadPoolExecutor(64) as pool:
        cosines = list(pool.map(send, range(1000)))
    assert len(cosines) == 1000
    assert min(cosines) >= 0.9999
