"""The servers that bench.py compares: their commands, requests and settings."""

from __future__ import annotations

import base64
import http.client
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
from machine import PEERS, ROOT, VERSION, free_port
from supervisor.launch import find_triton
from wrk import Load

from npair.releasing.config import with_release
from npair.serving.engine import cores

BOUNDARY = "npair-benchmark"
MODES = {"eager": "eager", "npair": "npair inside"}  # of the shipped network
OTHERS = {
    "ResNet-50": "LitServe",
    "CLIP ViT-B/32": "infinity",
}  # networks in wide use, and the peer that serves each
LEAST_COSINE = {"eager": 0.8, "npair": 0.8}  # with int8, which is above 0.9 of fp32
LEAST_COSINE |= dict.fromkeys(
    OTHERS, 0.9999
)  # random weights embed all photos alike: different ones reach 0.9996
Vectors = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Setting:
    """How a peer uses the cores.

    concurrency: simultaneous calls in one worker, each with its own ``threads``.
    """

    workers: int
    threads: int
    concurrency: int = 1
    batch: int = 1


# Arguments: a peer's Python, a port, a scratch folder and a setting.
Command = Callable[[Path, int, Path, Setting], Sequence[str | Path]]


@dataclass(frozen=True)
class Peer:
    """A server to start.

    command: the command line, from its environment's Python, a port, a scratch folder and a
    setting. body: the request's body for one photo. answer: the embedding in a reply's headers and
    body. environment: its name in requirements.txt; if empty, npair's own.
    """

    name: str
    path: str
    command: Command
    body: Callable[[bytes], bytes]
    headers: dict[str, str]
    answer: Callable[[http.client.HTTPMessage, bytes], Vectors]
    settings: tuple[Setting, ...] = ()
    environment: str = ""


@dataclass
class Contestant:
    peer: Peer
    mode: str  # of MODES or OTHERS
    setting: Setting
    version: Path = VERSION  # npair's
    rate: float = 0.0  # the most photos a second of all settings, in a short run of each
    # The least p50 at one connection over all settings: the setting that is best for many
    # connections need not have it.
    lone: float = np.inf
    loads: list[Load] = field(default_factory=list)
    megabytes: list[float] = field(default_factory=list)
    first_answer: list[float] = field(default_factory=list)

    @property
    def name(self) -> str:
        if self.peer.name == "npair":
            return "npair" if self.version == VERSION else f"npair, version {self.version.name}"
        return f"{self.peer.name}, {MODES.get(self.mode, self.mode)}"

    def rates(self, connections: int) -> list[float]:
        return [load.rate for load in self.loads if load.connections == connections]

    def median(self, measure: str, connections: int) -> float:
        return float(
            np.median(
                [getattr(load, measure) for load in self.loads if load.connections == connections]
            )
        )


def spreads(*batches: int) -> tuple[Setting, ...]:
    """All cores given to workers, to threads or to concurrent calls, with each batch size."""
    all_cores = cores()
    ways = {Setting(all_cores, 1), Setting(1, all_cores), Setting(1, 1, all_cores)}
    return tuple(
        Setting(w.workers, w.threads, w.concurrency, batch)
        for w in sorted(ways, key=str)
        for batch in batches or (1,)
    )


def form(name: str) -> Callable[[bytes], bytes]:
    disposition = f'form-data; name="{name}"; filename="photo.jpg"'
    head = f"--{BOUNDARY}\r\nContent-Disposition: {disposition}\r\nContent-Type: image/jpeg\r\n\r\n"
    return lambda photo: head.encode() + photo + f"\r\n--{BOUNDARY}--\r\n".encode()


def v2(photo: bytes) -> bytes:
    data = [base64.b64encode(photo).decode()]
    return json.dumps(
        {"inputs": [{"name": "IMAGE", "shape": [1, 1], "datatype": "BYTES", "data": data}]}
    ).encode()


def from_json(*keys: str | int) -> Callable[[http.client.HTTPMessage, bytes], Vectors]:
    def answer(_: http.client.HTTPMessage, body: bytes) -> Vectors:
        value = json.loads(body)
        for key in keys:
            value = value[key]
        return np.array(value, np.float32)

    return answer


def from_triton(headers: http.client.HTTPMessage, body: bytes) -> Vectors:
    return np.frombuffer(body, np.float32, offset=int(headers["Inference-Header-Content-Length"]))


def openai(photo: bytes) -> bytes:
    uri = f"data:image/jpeg;base64,{base64.b64encode(photo).decode()}"
    return json.dumps({"model": "clip", "modality": "image", "input": uri}).encode()


def infinity(python: Path, port: int, _scratch: Path, setting: Setting) -> Sequence[str | Path]:
    environment = ["env", "HF_HUB_OFFLINE=1", "DO_NOT_TRACK=1"]
    flags = {
        "model-id": clip_folder(python.parents[2]),
        "served-model-name": "clip",
        "port": port,
        "batch-size": setting.batch,
    }
    flags |= {"device": "cpu", "log-level": "warning"}
    # Compiling delays the first photo and makes no answer faster.
    switches = [
        "--no-compile",
        "--no-bettertransformer",
        "--no-vector-disk-cache",
        "--no-model-warmup",
    ]
    return [
        *environment,
        python.parent / "infinity_emb",
        "v2",
        *(f"--{flag}={value}" for flag, value in flags.items()),
        *switches,
    ]


def plain_backend(_: Path, port: int, scratch: Path, setting: Setting) -> Sequence[str | Path]:
    folder = scratch / "models/npair/1"
    folder.mkdir(parents=True)
    # Triton's stub ignores PYTHONPATH.
    path = f"import sys\n\nsys.path += {[str(PEERS), str(ROOT / 'src')]}\n"
    (folder / "model.py").write_text(path + (PEERS / "python_backend.py").read_text())
    (folder.parent / "config.pbtxt").write_text(
        'name: "npair" backend: "python" max_batch_size: 64 dynamic_batching { }'
        'input [ { name: "IMAGE" data_type: TYPE_STRING dims: [ 1 ] } ]'
        'output [ { name: "EMBEDDING" data_type: TYPE_FP32 dims: [ 128 ] } ]'
        f"instance_group [ {{ count: {setting.workers} kind: KIND_CPU }} ]"
    )
    triton = find_triton(scratch)
    flags = {
        "model-repository": scratch / "models",
        "backend-directory": triton.backends,
        "http-port": port,
    }
    flags |= {"allow-grpc": "false", "allow-metrics": "false", "pinned-memory-pool-byte-size": 0}
    environment = [f"{name}={triton.environment[name]}" for name in ("PATH", "LD_LIBRARY_PATH")]
    return [
        "env",
        *environment,
        triton.program,
        *(f"--{flag}={value}" for flag, value in flags.items()),
    ]


def mlserver_folder(
    python: Path, port: int, scratch: Path, setting: Setting
) -> Sequence[str | Path]:
    model = {"name": "npair", "implementation": "mlserver_app.Embedding"}
    (scratch / "model-settings.json").write_text(json.dumps(model))
    workers = setting.workers if setting.workers > 1 else 0  # 0: in the server's own process
    settings = {
        "http_port": port,
        "grpc_port": free_port(),
        "metrics_port": free_port(),
        "parallel_workers": workers,
        "metrics_dir": str(scratch),
        "environments_dir": str(scratch),
    }
    (scratch / "settings.json").write_text(json.dumps({**settings, "debug": False}))
    return [python.parent / "mlserver", "start", scratch]


def clip_folder(environments: Path) -> Path:
    """The folder in which peers/network.py keeps CLIP's weights: 600 MB, made on the first use."""
    return environments / "clip-vit-b-32"


def repository_of(version: Path, scratch: Path) -> Path:
    """Create a model repository of one npair version, with the config.pbtxt that lies beside it.

    It may lie in another checkout.
    """
    folder = scratch / "models/npair"
    folder.mkdir(parents=True)
    (folder / version.name).symlink_to(version)
    config = (version.parent / "config.pbtxt").read_text()
    (folder / "config.pbtxt").write_text(with_release(config, [int(version.name)], {}))
    return folder.parent


MULTIPART = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}
RAW = {"Inference-Header-Content-Length": "0", "Content-Type": "application/octet-stream"}


def triton(name: str, command: Command, *settings: Setting) -> Peer:
    """A server that takes a photo as the raw binary body of Triton's HTTP protocol."""
    return Peer(
        name, "/v2/models/npair/infer", command, lambda photo: photo, RAW, from_triton, settings
    )


ALL = (
    triton("npair", lambda python, _port, _scratch, _: [python, ROOT / "model/api/serve.py"]),
    Peer(
        "FastAPI",
        "/embed",
        lambda python, port, _, s: [
            *(
                python,
                "-m",
                "uvicorn",
                "fastapi_app:app",
                "--port",
                str(port),
                "--workers",
                str(s.workers),
            ),
            *("--log-level", "warning"),
        ],
        lambda photo: photo,
        {"Content-Type": "image/jpeg"},
        from_json(),
        spreads(),
        "fastapi",
    ),
    Peer(
        "LitServe",
        "/predict",
        lambda python, port, _scratch, _: [python, PEERS / "litserve_app.py", str(port)],
        form("request"),
        MULTIPART,
        from_json("embedding"),
        tuple(s for s in spreads(1, 8) if s.concurrency == 1),
        "litserve",
    ),
    Peer(
        "BentoML",
        "/embed",
        lambda python, port, _scratch, _: [
            python.parent / "bentoml",
            "serve",
            "bentoml_app:Embedding",
            "--port",
            str(port),
        ],
        form("photo"),
        MULTIPART,
        from_json(),
        spreads(),
        "bentoml",
    ),
    Peer(
        "MLServer",
        "/v2/models/npair/infer",
        mlserver_folder,
        v2,
        {"Content-Type": "application/json"},
        from_json("outputs", 0, "data"),
        tuple(s for s in spreads() if s.concurrency == 1),
        "mlserver",
    ),
    Peer(
        "infinity",
        "/embeddings",
        infinity,
        openai,
        {"Content-Type": "application/json"},
        from_json("data", 0, "embedding"),
        tuple(
            Setting(1, threads, 1, batch)
            for threads, batch in ((cores(), 8), (cores(), 32), (1, 8))
        ),
        "infinity",
    ),
    triton("Python backend", plain_backend, *(s for s in spreads() if s.concurrency == 1)),
)
# infinity loads only what transformers knows.
SAME = [peer.name for peer in ALL[1:] if peer.name != "infinity"]
