"""Fuzz the decoder with hostile photos, and a real server with hostile HTTP and gRPC requests.

    PYTHONPATH=src:model/api .venv/bin/python tests/fuzz/fuzz.py --runs 100000
    PYTHONPATH=src:model/api .venv/bin/python tests/fuzz/fuzz.py http --runs 100000 --seed 1

The target "metrics" is the metrics port, whose HTTP server uses the same library as the HTTP port.

Request n depends only on the seed and n. A failure reports the request's number, saves its bytes to
a file and prints the command that sends it again. Photos for the decoder come from libFuzzer, see
fuzz_decode.py. `make test` does not run this script.
"""

from __future__ import annotations

import argparse
import base64
import gzip
import http.client
import json
import random
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from PIL import Image
from supervisor import procfs
from tritonclient.grpc import service_pb2

from npair.client import NpairClient, NpairError
from npair.publishing.drawings import draw, encode
from npair.serving.manifest import Manifest

sys.path.append(str(Path(__file__).parents[1]))  # for support
from support import profiles
from support.jpegs import ARITHMETIC, lossless, many_scans, segment
from support.models import ROOT, SHIPPED
from support.photos import chunk
from support.servers import free_ports, lines_until_ready, start

BLOCK = 200  # requests between two checks of the server
AT_ONCE = 8
SECONDS = 10.0  # limit for the answer to any request
# Limits for the peak memory of all the server's processes together. The HTTP limit is higher
# because the stacks of its eight threads each keep twice the largest form.
MEGABYTES = 1000.0
MEGABYTES_HTTP = 3000.0

# Share of requests with a body of this many bytes.
LARGE = {5 << 20: 0.005, 64 << 20: 0.0005}

# Limits of Triton 2.51, see docs/hostile-input.md. Requests stay below them.
# Nested JSON arrays: millions crash Triton, and it keeps the stack memory that they used.
DEEPEST = 100_000
# Chunks of one body: the same happens, at 1 kB per chunk.
MOST_CHUNKS = 10_000
# Share of requests with a content coding, and the size in bytes of a decompressed one: Triton never
# frees the decompressed body of a request that it refuses.
CODED = 0.02
BOMB = 300_000

# The only type that Triton's HTTP library parses. It compares the first 33 characters.
FORM = "application/x-www-form-urlencoded"
CONTENT_TYPES = (
    *(
        FORM,
        FORM,
        FORM.upper(),
        f"{FORM}; charset=utf-8",
        f"{FORM}x",
        f" {FORM}",
        FORM[:-1],
        f"text/plain, {FORM}",
    ),
    *(
        "application/json",
        "application/octet-stream",
        "image/jpeg",
        "text/html",
        "text/plain; charset=x",
        "",
        ";",
        "x" * 9_999,
    ),
    *(
        "multipart",
        "multipart/form-data",
        "multipart/form-data; boundary=x",
        "multipart/x-mixed-replace",
        "\0",
        "ü",
    ),
)
ODD_FIELDS: tuple[Any, ...] = (
    *(
        {"Expect": "100-continue"},
        {"Expect": "x"},
        {"Range": "bytes=0-1,-9999999999999999999"},
        {"TE": "trailers"},
    ),
    *(
        {"Upgrade": "h2c", "HTTP2-Settings": "AAMAAABk"},
        {"Upgrade": "websocket", "Sec-WebSocket-Version": 13},
    ),
    *(
        {"X": "y" * 8_000},
        {"X": "y" * 1_000_000},
        {"x" * 9_999: "y"},
        {"X": "y\r\n\tz"},
        {"X": "y\r\nno colon"},
        {"Host": "*"},
    ),
    *(
        {"content-length": 10**9},
        {"content-length": 2**62},
        {"content-type": FORM},
        {"transfer-encoding": "chunked"},
    ),
)
INFER = "/v2/models/npair/infer"
CONTROL = (
    *(
        "/v2/repository/index",
        "/v2/repository/models/npair/load",
        "/v2/repository/models/npair/unload",
        "/v2/logging",
    ),
    *(
        "/v2/systemsharedmemory/status",
        "/v2/systemsharedmemory/region/x/register",
        "/v2/cudasharedmemory/status",
    ),
    *("/v2/trace/setting", "/v2/models/npair/trace/setting"),
)
OPEN = (
    "/v2",
    "/v2/health/live",
    "/v2/health/ready",
    "/v2/models/stats",
    "/v2/models/npair",
    "/v2/models/npair/config",
)
CONTROL_RPCS = (
    *(
        "RepositoryIndex",
        "RepositoryModelLoad",
        "RepositoryModelUnload",
        "TraceSetting",
        "LogSettings",
    ),
    *(
        "SystemSharedMemoryStatus",
        "SystemSharedMemoryRegister",
        "SystemSharedMemoryUnregister",
        "CudaSharedMemoryStatus",
    ),
)
OPEN_RPCS = (
    "ServerLive",
    "ServerReady",
    "ModelReady",
    "ServerMetadata",
    "ModelMetadata",
    "ModelStatistics",
    "ModelConfig",
)
TYPES = (
    "BYTES",
    "UINT8",
    "INT32",
    "INT64",
    "FP16",
    "FP32",
    "FP64",
    "BOOL",
    "BF16",
    "STRING",
    "bytes",
    "",
)
JUNK: tuple[Any, ...] = (
    *(
        None,
        True,
        0,
        1,
        -1,
        2,
        64,
        65,
        2**31 - 1,
        2**31,
        2**32,
        2**62,
        2**63 - 1,
        -(2**63),
        2**64,
        10**400,
        1.5,
        1e308,
        float("nan"),
    ),
    *(
        "",
        "x",
        "IMAGE",
        "EMBEDDING",
        "npair",
        "5",
        "\0",
        "\ud800",
        "ü" * 999,
        "x" * 70_000,
        "../../5",
        "%s%n",
        "1" * 400,
    ),
    *(
        (),
        {},
        ((),),
        ({},),
        (None,),
        (1, 1),
        (-1, -1),
        (2**62, 2**62),
        (1,) * 9_999,
        {"x": 1},
        {"name": "IMAGE"},
    ),
)


def seeds() -> dict[str, bytes]:
    """Return a small file of every accepted format and mode, by name."""
    rgb = draw(0, 0, 24)
    grey, exif = rgb.convert("L"), Image.Exif()
    exif[0x0112] = 6
    cut_out = rgb.copy()
    cut_out.putalpha(grey)
    frames = {"save_all": True, "append_images": [rgb.rotate(90), rgb]}
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    return {
        **{f"{mode}.jpg": encode(rgb.convert(mode), "JPEG") for mode in ("RGB", "L", "CMYK")},
        "progressive.jpg": encode(rgb, "JPEG", progressive=True),
        "turned.jpg": encode(rgb, "JPEG", exif=exif),
        **{
            f"{mode}.png": encode(rgb.convert(mode), "PNG")
            for mode in ("RGB", "L", "1", "P", "RGBA", "LA")
        },
        "I;16.png": encode(deep, "PNG"),
        "transparent.png": encode(rgb.quantize(8), "PNG", transparency=0),
        "turned.png": encode(rgb, "PNG", exif=exif),
        "animated.png": encode(rgb, "PNG", **frames),
        "lossy.webp": encode(rgb, "WEBP", exif=exif),
        "lossless.webp": encode(cut_out, "WEBP", lossless=True),
        "transparent.webp": encode(cut_out, "WEBP"),
        "animated.webp": encode(rgb, "WEBP", **frames),
        "Display P3.jpg": encode(rgb, "JPEG", icc_profile=profiles.DISPLAY_P3),
        "Adobe RGB.png": encode(rgb, "PNG", icc_profile=profiles.ADOBE_RGB),
        "ProPhoto.webp": encode(rgb, "WEBP", icc_profile=profiles.PROPHOTO),
        "grey profile.jpg": encode(grey, "JPEG", icc_profile=profiles.GREY),
        "inks.jpg": encode(rgb.convert("CMYK"), "JPEG", icc_profile=profiles.PRINTER),
        **{f"arithmetic-{number}.jpg": photo for number, photo in enumerate(ARITHMETIC)},
    }


class Hostile:
    """Makes one hostile request from the given random generator."""

    def __init__(self, dice: random.Random) -> None:
        self.dice = dice

    def often(self, share: float) -> bool:
        return self.dice.random() < share

    def junk(self) -> Any:
        junk = self.dice.choice(JUNK)
        return dict(junk) if isinstance(junk, dict) else junk  # the caller may change it

    def photo(self) -> bytes:
        photo = self.dice.choice(list(PHOTOS.values()))
        return self.spoiled(photo) if self.often(0.5) else photo

    def spoiled(self, content: bytes) -> bytes:
        """Truncate the content, insert bytes into it or overwrite some."""
        changed = bytearray(content)
        for _ in range(self.dice.randrange(1, 8)):
            where = self.dice.randrange(len(changed) + 1)
            kind = self.dice.randrange(4)
            if kind == 0 and self.often(0.2):
                del changed[where:]
            elif kind == 1:
                changed[where:where] = self.dice.randbytes(self.dice.choice((1, 4, 300)))
            elif where < len(changed):
                changed[where] = self.dice.choice((0, 255, 127, 128, self.dice.randrange(256)))
        return bytes(changed)

    def elements(self, photos: list[bytes]) -> bytes:
        """Pack photos as Triton packs strings, each prefixed with its length."""
        lengths = [len(photo) for photo in photos]
        if self.often(0.1):
            lengths[self.dice.randrange(len(lengths))] = self.dice.choice(
                (0, 1, 2**31, 2**32 - 1, self.dice.randrange(1 << 32))
            )
        return b"".join(
            struct.pack("<I", length) + photo for length, photo in zip(lengths, photos, strict=True)
        )

    def photos(self) -> list[bytes]:
        return [
            self.photo()
            for _ in range(self.dice.choice((1, 1, 1, 2, 3) if self.often(0.98) else (64, 65)))
        ]

    def changed(self, tree: Any) -> Any:
        """Remove or duplicate a node of a JSON tree, or replace it with junk."""
        if isinstance(tree, dict | list) and tree and self.often(0.8):
            key = self.dice.choice(list(tree) if isinstance(tree, dict) else range(len(tree)))
            kind = self.dice.randrange(8)
            if kind == 0:
                del tree[key]
            elif kind == 1 and isinstance(tree, list):
                tree.extend([tree[key]] * self.dice.choice((1, 3, 100)))
            elif kind == 1 and isinstance(tree, dict):
                tree[self.dice.choice(("shape", "data", "parameters", "id", "x"))] = self.junk()
            else:
                tree[key] = self.changed(tree[key])
            return tree
        return self.junk()

    def parameters(self) -> dict[str, Any]:
        region = {
            "shared_memory_region": "x",
            "shared_memory_byte_size": 2**40,
            "shared_memory_offset": -1,
        }
        sequence = {
            "sequence_id": self.junk(),
            "sequence_start": True,
            "priority": 2**64 - 1,
            "timeout": -1,
        }
        return self.dice.choice(
            [{}, {}, region, sequence, {"binary_data": True}, {"classification": 2**31}, {"x": "y"}]
        )

    def header(self, photos: list[bytes], size: int | None) -> Any:
        """Return the JSON of a V2 request, with the photos in it unless ``size`` is given.

        size: bytes of the binary photos that follow the JSON.
        """
        tensor: dict[str, Any] = {"name": "IMAGE", "shape": [len(photos), 1], "datatype": "BYTES"}
        if size is None:
            tensor["data"] = [photo.decode("latin-1") for photo in photos]
        tensor["parameters"] = self.parameters() | (
            {} if size is None else {"binary_data_size": size}
        )
        request: Any = {
            "id": "7",
            "inputs": [tensor],
            "outputs": [{"name": "EMBEDDING", "parameters": self.parameters()}],
        }
        if self.often(0.3):
            tensor["datatype"] = self.dice.choice(TYPES)
        if self.often(0.3):
            request["parameters"] = self.parameters()
        for _ in range(self.dice.choice((0, 1, 1, 2))):
            request = self.changed(request)
        return request

    def metrics(self) -> bytes:
        """Return the bytes of a request for the metrics port."""
        return self.http("/metrics" if self.often(0.5) else "")

    def http(self, path: str = "") -> bytes:
        """Return the bytes of an HTTP request."""
        photos, fields = self.photos(), dict[str, object]()
        binary = self.often(0.6)
        tail = self.elements(photos) if binary else b""
        text = json.dumps(self.header(photos, len(tail) if binary else None)).encode()
        if self.often(0.1):
            depth = self.dice.randrange(DEEPEST)
            text = self.dice.choice(
                (
                    b"[" * depth,
                    b'{"inputs":' * depth,
                    text.replace(b"[", b"[" * depth, 1),
                    b"[" * depth + b"]" * depth,
                )
            )
        if self.often(0.1):
            text = self.spoiled(text)
        if self.often(0.2):
            text, tail = b"", photos[0]
        body = text + tail
        large = self.dice.choices((0, *LARGE), (1 - sum(LARGE.values()), *LARGE.values()))[0]
        if large > len(body):
            body += (self.dice.choice((b"\0", b"=", b"%41", b"x")) * large)[: large - len(body)]
        if binary or self.often(0.1):
            fields["Inference-Header-Content-Length"] = (
                len(text) if self.often(0.9) else self.dice.choice((*JUNK[:19], len(body) + 1))
            )
        fields["Content-Type"] = self.dice.choice(CONTENT_TYPES)
        if not large and self.often(CODED):
            coding = self.dice.choice(("gzip", "deflate", "identity", "br", "gzip, gzip"))
            fields["Content-Encoding"] = coding
            if self.often(0.1):
                body = bytes(self.dice.choice((10, BOMB)))
            if self.often(0.8):
                body = zlib.compress(body) if coding == "deflate" else gzip.compress(body)
            if self.often(0.2):
                body = self.spoiled(body)
        if self.often(0.1):
            fields["Accept-Encoding"] = self.dice.choice(("gzip", "deflate", "br;q=1, *", ";;"))
        if self.often(0.1):
            step = -(-len(body) // self.dice.randrange(1, MOST_CHUNKS)) or 1
            parts = [body[i : i + step] for i in range(0, len(body), step)]
            body = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts)
            body += (
                self.dice.choice((b"", b"1;x=y\r\nx\r\n", b"7fffffffffffffff\r\n", b"-1\r\n"))
                if self.often(0.1)
                else b""
            )
            body += b"0\r\n" + (b"X: y\r\n" * 99 if self.often(0.1) else b"") + b"\r\n"
            fields["Transfer-Encoding"] = "chunked"
        else:
            lengths = (0, 1, len(body) // 2, len(body) + 9, 2**31, 2**63, 2**64, -1, "x")
            fields["Content-Length"] = self.dice.choice(lengths) if self.often(0.1) else len(body)
        if self.often(0.05):
            fields |= {
                f"X-{n}": "y" * self.dice.choice((1, 99))
                for n in range(self.dice.choice((1, 100, 1000)))
            }
        if self.often(0.05):
            fields |= self.dice.choice(ODD_FIELDS)
        methods = (
            "GET",
            "PUT",
            "DELETE",
            "HEAD",
            "OPTIONS",
            "CONNECT",
            "TRACE",
            "PATCH",
            "PRI",
            "X",
            "get",
            "",
        )
        method = self.dice.choice(methods) if self.often(0.1) else "POST"
        version = (
            self.dice.choice(("0.9", "1.", "1.999", "2.0", "x"))
            if self.often(0.02)
            else f"1.{self.dice.choice('111110')}"
        )
        head = f"{method} {path or self.path()} HTTP/{version}\r\nConnection: close\r\n"
        head += "".join(f"{name}: {value}\r\n" for name, value in fields.items()) + "\r\n"
        start = head.encode("utf-8", "replace")
        return self.spoiled(start) + body if self.often(0.05) else start + body

    def path(self) -> str:
        if self.often(0.7):
            return INFER
        path = self.dice.choice(
            (
                *CONTROL,
                *CONTROL,
                *OPEN,
                "/v2/models/npair/versions/5/infer",
                "/v2/models/npair/generate",
                "/metrics",
                "/",
            )
        )
        if self.often(0.5):
            return path
        parts = path.split("/")
        junk = (
            "",
            "..",
            "%2e%2e",
            "%00",
            "-1",
            "9" * 20,
            "x" * 9_999,
            "*",
            "[(a+)+]",
            "versions",
            "npair?" + "x=y&" * 1_900,
        )
        if self.often(0.1):
            return (
                self.dice.choice(
                    ("http://x:1", "http://[::1]", "x:1", "http://x:99999", "#", "?", "//", " ")
                )
                + path
            )
        parts[self.dice.randrange(len(parts))] = self.dice.choice(junk)
        return "/".join(parts)

    def grpc(self) -> bytes:
        """Return an RPC's name, a line break and the bytes of its message."""
        if self.often(0.15):
            name = self.dice.choice((*CONTROL_RPCS, *OPEN_RPCS))
            content = service_pb2.ModelReadyRequest(
                name="npair", version=self.dice.choice(("", "5", "-1"))
            ).SerializeToString()
            return name.encode() + b"\n" + (self.spoiled(content) if self.often(0.5) else content)
        photos, message = self.photos(), service_pb2.ModelInferRequest(model_name="npair", id="7")
        tensor = message.inputs.add(name="IMAGE", datatype="BYTES", shape=[len(photos), 1])
        content = self.elements(photos)
        if self.often(0.6):
            message.raw_input_contents.append(content)
        else:
            tensor.contents.bytes_contents.extend(photos)
        for _ in range(self.dice.choice((0, 1, 1, 2, 3))):
            self.change(message, tensor, content)
        sent: bytes = message.SerializeToString()
        if self.often(0.15):
            sent = self.spoiled(sent)
        if self.often(0.02):
            sent = self.dice.randbytes(self.dice.randrange(300))
        return (b"ModelStreamInfer\n" if self.often(0.2) else b"ModelInfer\n") + sent

    def change(self, message: Any, tensor: Any, content: bytes) -> None:
        number = self.dice.choice(
            [value for value in JUNK if type(value) is int and -(2**63) <= value < 2**63]
        )
        word = self.dice.choice(
            [value for value in JUNK if isinstance(value, str) and "\ud800" not in value]
        )
        values = tensor.contents
        match self.dice.randrange(12):
            case 0:
                tensor.shape[:] = self.dice.choice(
                    ([], [number], [1, number], [number, 1], [2**62, 2**62], [-1, -1], [1] * 9_999)
                )
            case 1:
                tensor.datatype = self.dice.choice((*TYPES, word))
            case 2:
                tensor.name = word
            case 3:
                message.model_name = word
            case 4:
                message.model_version = self.dice.choice(("5", "-1", str(number), word))
            case 5:
                message.raw_input_contents.append(
                    self.dice.choice((b"", content, content[:-1], bytes(1 << 20)))
                )
            case 6:
                values.int_contents.extend([number % 2**31] * self.dice.choice((1, 999)))
            case 7:
                values.fp32_contents.append(float("nan"))
                values.bool_contents.append(True)
                values.uint64_contents.append(2**64 - 1)
            case 8:
                message.outputs.add(name=self.dice.choice(("EMBEDDING", "EMBEDDING", word)))
            case 9:
                message.inputs.add().CopyFrom(tensor)
            case 10:
                holder = self.dice.choice((message, tensor, *message.outputs))
                key = self.dice.choice(
                    (
                        "sequence_id",
                        "priority",
                        "timeout",
                        "binary_data_size",
                        "classification",
                        "x",
                        "triton_x",
                    )
                )
                holder.parameters[key].int64_param = number
                holder.parameters["shared_memory_region"].string_param = word
            case 11:
                holder = self.dice.choice((message, tensor))
                holder.parameters[word].bool_param = True
                holder.parameters["shared_memory_byte_size"].int64_param = 2**40


PHOTOS = seeds()


class Server:
    """A real server, and the state that no request may change."""

    def __init__(
        self, process: subprocess.Popen[str], ports: dict[str, str], protocol: str
    ) -> None:
        self.process, self.ports = process, ports
        self.triton, *_ = procfs.children(process.pid)
        self.stubs = sorted(procfs.children(self.triton))
        golden = Manifest.read(SHIPPED).golden
        self.photos = [SHIPPED / photo for photo in golden.photos]
        (_, self.expected), self.tolerance = golden.read(SHIPPED), golden.tolerance
        self.limit = MEGABYTES if protocol == "grpc" else MEGABYTES_HTTP
        url = (
            f"grpc://127.0.0.1:{ports['GRPC_PORT']}"
            if protocol == "grpc"
            else f"http://127.0.0.1:{ports['HTTP_PORT']}"
        )
        self.client = NpairClient(url, retries=0, timeout=SECONDS)
        self.channel = grpc.insecure_channel(f"127.0.0.1:{ports['GRPC_PORT']}")
        self.megabytes = 0.0
        # Send the largest bodies one at a time, so that peak memory does not depend on chance.
        self.largest = threading.Lock()

    def close(self) -> None:
        self.client.close()
        self.channel.close()

    def check(self) -> None:
        """Check the server's processes, its embeddings of the golden photos and its peak memory.

        Raises: AssertionError if one of them is wrong; NpairError or OSError if it fails to answer.
        """
        assert self.process.poll() is None, "serve.py ended"
        assert procfs.children(self.process.pid) == [self.triton], "the server was replaced"
        assert sorted(procfs.children(self.triton)) == self.stubs, "Python stubs were replaced"
        distance = np.linalg.norm(
            self.client.embed(self.photos).vectors - self.expected, axis=1
        ).max()
        assert distance <= self.tolerance, f"golden photos are {distance} off"
        peaks = [
            Path(f"/proc/{pid}/status").read_text().split("VmHWM:")[1].split()[0]
            for pid in (self.triton, *self.stubs)
        ]
        self.megabytes = sum(map(float, peaks)) / 1000
        assert self.megabytes < self.limit, f"the server took {self.megabytes:.0f} MB"

    def metrics(self, content: bytes) -> str:
        return self.http(content, "METRICS_PORT")

    def http(self, content: bytes, port: str = "HTTP_PORT") -> str:
        """Send a request.

        Returns: the status or the name of the connection's error.
        Raises: AssertionError if there is no answer in time or a control API is open.
        """
        with (
            self.largest if len(content) >= max(LARGE) else nullcontext(),
            socket.create_connection(
                ("127.0.0.1", int(self.ports[port])), timeout=SECONDS
            ) as connection,
        ):
            try:
                connection.sendall(content)
                connection.settimeout(0.2)
                with suppress(TimeoutError):
                    connection.recv(1, socket.MSG_PEEK)
                connection.settimeout(SECONDS)
                with suppress(OSError):
                    connection.shutdown(
                        socket.SHUT_WR
                    )  # the server may be waiting for more of the body
                answer = http.client.HTTPResponse(connection)
                answer.begin()
                answer.read()
            except TimeoutError:
                raise AssertionError(f"no answer in {SECONDS:.0f} s") from None
            except (http.client.HTTPException, ConnectionError) as error:
                return type(error).__name__
        path = content.split(b" ", 2)[1].decode("latin-1") if content.count(b" ") > 1 else ""
        closed = (
            port == "HTTP_PORT" and path in CONTROL
        )  # the metrics port answers any path with metrics
        assert answer.status != http.client.OK or not closed, f"{path} is open"
        return str(answer.status)

    def grpc(self, content: bytes) -> str:
        """Call the RPC named in the first line with the message that follows it.

        Returns: the status code or the number of the stream's answers.
        Raises: AssertionError if there is no answer in time or a control API is open.
        """
        name, _, message = content.partition(b"\n")
        path = f"/inference.GRPCInferenceService/{name.decode()}"
        compression = grpc.Compression.Gzip if len(message) % 10 == 0 else None
        try:
            if name == b"ModelStreamInfer":
                calls = self.channel.stream_stream(path)(
                    iter([message] * 2), timeout=SECONDS, compression=compression
                )
                return f"stream of {len(list(calls))}"
            self.channel.unary_unary(path)(message, timeout=SECONDS, compression=compression)
        except grpc.RpcError as error:
            code = error.code()
            assert code is not grpc.StatusCode.DEADLINE_EXCEEDED, f"no answer in {SECONDS:.0f} s"
            return str(code.name)
        assert name.decode() not in CONTROL_RPCS, f"{name.decode()} is open"
        return "OK"


@contextmanager
def running(protocol: str) -> Iterator[Server]:
    ports = free_ports()
    process = start(**ports)
    try:
        lines_until_ready(process)
        assert process.stderr is not None
        # Drain stderr: a full pipe would block the server.
        threading.Thread(target=deque, args=(process.stderr, 10), daemon=True).start()
        with closing(Server(process, ports, protocol)) as server:
            server.check()
            yield server
    finally:
        process.terminate()
        process.wait(timeout=30)


def request(protocol: str, seed: int, number: int) -> bytes:
    content: bytes = getattr(Hostile(random.Random(f"{seed} {number}")), protocol)()
    return content


def problem(
    server: Server, protocol: str, contents: Iterable[bytes], outcomes: Counter[str]
) -> str:
    """Send requests concurrently, then check the server; return the problem found, or ""."""
    try:
        with ThreadPoolExecutor(AT_ONCE) as pool:
            outcomes.update(pool.map(getattr(server, protocol), contents))
        server.check()
    except (AssertionError, NpairError, OSError) as error:
        return str(error) or repr(error)
    return ""


def fuzz_server(protocol: str, seed: int, first: int, runs: int) -> int:
    """Send requests to a real server and narrow a failure down to one request.

    Returns: the exit code.
    """
    outcomes, began, wrong = Counter[str](), time.monotonic(), ""
    with running(protocol) as server:
        for start in range(first, first + runs, BLOCK):
            block = range(start, min(start + BLOCK, first + runs))
            wrong = problem(
                server, protocol, (request(protocol, seed, number) for number in block), outcomes
            )
            if wrong:
                break
            if (start - first) % (50 * BLOCK) == 0:
                say(
                    f"{protocol}: request {start:,}, {time.monotonic() - began:.0f} s, "
                    f"peak of {server.megabytes:.0f} MB"
                )
        say(
            f"{protocol}: {outcomes.total():,} requests, {time.monotonic() - began:.0f} s, "
            f"peak of {server.megabytes:.0f} MB"
        )
    say(
        f"{protocol}: "
        + ", ".join(f"{outcome} {count:,}" for outcome, count in outcomes.most_common())
    )
    if not wrong:
        return 0
    say(f"{protocol}: {wrong}")
    with ExitStack() as stack:
        # Send the block again, request by request, to find the one that fails.
        server = stack.enter_context(running(protocol))
        for number in block:
            if wrong := problem(server, protocol, [request(protocol, seed, number)], outcomes):
                file = Path(tempfile.gettempdir(), f"{protocol}-{seed}-{number}")
                file.write_bytes(request(protocol, seed, number))
                say(f"{protocol}: request {number}: {wrong}; its bytes are in {file}")
                block = range(number, number + 1)
                break
    say(
        f"again: python tests/fuzz/fuzz.py {protocol} --seed {seed} --first {block.start} "
        f"--runs {len(block)}"
    )
    return 1


def fuzz_decode(seed: int, runs: int) -> int:
    """Run libFuzzer on the decoder.

    It saves a failing photo in the working directory as crash-, timeout- or oom-HASH.

    Returns: libFuzzer's exit code.
    """
    jpeg, png = PHOTOS["progressive.jpg"], PHOTOS["RGB.png"]
    wide = segment(0xDA, bytes([255, *[1, 0] * 1_000, 0, 255, 1]))
    packed = chunk(b"zTXt", b"XML:com.adobe.xmp\0\0" + zlib.compress(bytes(65_535)))
    others = {
        "grey.lossless": lossless(1),
        "rgb.lossless": lossless(3),
        "scans": many_scans(3),
        "wide scans": jpeg[: jpeg.index(b"\xff\xda")] + wide * 3,
        "segments": jpeg[:2] + segment(0xE0, b"") * 500 + jpeg[2:],
        "texts": png[:33] + packed * 20 + png[33:],
    }
    texts = {
        f"{name}.txt": base64.b64encode(PHOTOS[name])
        for name in ("RGB.jpg", "RGB.png", "lossy.webp")
    }
    uri = b"data:image/jpeg;base64," + texts["RGB.jpg.txt"]
    texts["escapes"] = uri + b"%2B%" * 500
    with tempfile.TemporaryDirectory() as corpus:
        for name, photo in {**PHOTOS, **others, **texts, "uri": uri}.items():
            Path(corpus, name).write_bytes(photo)
        options = [
            f"-runs={runs}",
            f"-seed={seed}",
            f"-timeout={SECONDS:.0f}",
            f"-rss_limit_mb={MEGABYTES:.0f}",
            "-max_len=8192",
        ]
        return subprocess.run(
            [sys.executable, ROOT / "tests/fuzz/fuzz_decode.py", *options, corpus], check=False
        ).returncode


def say(sentence: str) -> None:
    print(sentence, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "target",
        nargs="?",
        choices=["decode", "http", "metrics", "grpc", "all"],
        default="all",
        help="(%(default)s)",
    )
    parser.add_argument("--runs", type=int, default=5_000, help="inputs per target (%(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="(%(default)s)")
    parser.add_argument(
        "--first", type=int, default=0, help="number of the first request (%(default)s)"
    )
    options = parser.parse_args()
    codes = [
        fuzz_decode(options.seed, options.runs)
        if target == "decode"
        else fuzz_server(target, options.seed, options.first, options.runs)
        for target in ("decode", "http", "metrics", "grpc")
        if options.target in (target, "all")
    ]
    return max(map(abs, codes))


if __name__ == "__main__":
    sys.exit(main())
