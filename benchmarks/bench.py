"""npair beside its peers, and beside what this machine can do without a server.

    make bench ARGS='--photos data/grocery'

Each peer is installed into an environment of its own and serves the shipped network in two ways: eager, in fp32, as its
documentation shows; and with npair's own engine and decoder inside. Two more show what image embeddings cost elsewhere: ResNet-50,
and CLIP ViT-B/32, both with random weights, which take the same time as trained ones. A short search tunes the workers, threads and
batches of each. Then all run in turn, several rounds, under the same load from wrk: closed loops of 1, 8 and 32 connections. Every
answer's status and size is checked in the load, and every photo's embedding before it. Prints tables in Markdown; --json keeps all
that was measured.

--also adds another version of npair to the same rounds. One that was retired comes out of the history:

    git worktree add ../older COMMIT
    make bench ARGS='--photos data/grocery --short --seconds 3 --also ../older/model_repository/npair/10'

Needs: Linux, the .venv of `make install`, wrk (Debian: apt install wrk) and, the first time, a package index.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import http.client
import io
import itertools
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import costs
import numpy as np
import numpy.typing as npt
import serve
from PIL import Image

from npair.data.dataset import read_dataset
from npair.releasing.config import with_release
from npair.releasing.verify import published_code
from npair.serving.engine import cores

ROOT = Path(__file__).resolve().parents[1]
PEERS = Path(__file__).parent / "peers"
BOUNDARY = "npair-benchmark"
CONNECTIONS = (1, 8, 32)
SIZES = ((348, 348), (1024, 1024), (4000, 3000))
MODES = {"eager": "eager", "npair": "npair inside"}  # of the shipped network
OTHERS = {"ResNet-50": "LitServe", "CLIP ViT-B/32": "infinity"}  # networks in wide use, and the peer that serves each
LEAST_COSINE = {"eager": 0.8, "npair": 0.8}  # with int8, which is above 0.9 of fp32
LEAST_COSINE |= dict.fromkeys(OTHERS, 0.9999)  # random weights embed all photos alike: different ones reach 0.9996
Vectors = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Setting:
    """How a peer spreads over the cores. concurrency: calls at once in one worker, of which each has ``threads``."""

    workers: int
    threads: int
    concurrency: int = 1
    batch: int = 1


@dataclass(frozen=True)
class Peer:
    """A server to start.

    command: made of its environment's Python, a port, a scratch folder and a setting. body: of a request for one photo. answer: the
    embedding in a reply's headers and body. environment: its name in requirements.txt; npair's own where there is none.
    """

    name: str
    path: str
    command: Callable[[Path, int, Path, Setting], Sequence[str | Path]]
    body: Callable[[bytes], bytes]
    headers: dict[str, str]
    answer: Callable[[http.client.HTTPMessage, bytes], Vectors]
    settings: tuple[Setting, ...] = ()
    environment: str = ""


@dataclass
class Load:
    """One closed loop: photos a second, and milliseconds of latency."""

    connections: int
    rate: float
    p50: float
    p99: float


@dataclass
class Contestant:
    peer: Peer
    mode: str  # of MODES or OTHERS
    setting: Setting
    version: Path = costs.VERSION  # npair's
    rate: float = 0.0  # the most photos a second of all settings, in a short run of each
    lone: float = np.inf  # the least p50 at one connection of all settings, since the one for many connections may not be it
    loads: list[Load] = field(default_factory=list)
    megabytes: list[float] = field(default_factory=list)
    first_answer: list[float] = field(default_factory=list)

    @property
    def name(self) -> str:
        if self.peer.name == "npair":
            return "npair" if self.version == costs.VERSION else f"npair, version {self.version.name}"
        return f"{self.peer.name}, {MODES.get(self.mode, self.mode)}"

    def rates(self, connections: int) -> list[float]:
        return [load.rate for load in self.loads if load.connections == connections]

    def median(self, measure: str, connections: int) -> float:
        return float(np.median([getattr(load, measure) for load in self.loads if load.connections == connections]))


def spreads(*batches: int) -> tuple[Setting, ...]:
    """Every way of giving all cores to workers, threads or concurrent calls, with each batch size."""
    all_cores = cores()
    ways = {Setting(all_cores, 1), Setting(1, all_cores), Setting(1, 1, all_cores)}
    return tuple(Setting(w.workers, w.threads, w.concurrency, batch) for w in sorted(ways, key=str) for batch in batches or (1,))


def form(name: str) -> Callable[[bytes], bytes]:
    head = (
        f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"; filename="photo.jpg"\r\nContent-Type: image/jpeg\r\n\r\n'
    )
    return lambda photo: head.encode() + photo + f"\r\n--{BOUNDARY}--\r\n".encode()


def v2(photo: bytes) -> bytes:
    data = [base64.b64encode(photo).decode()]
    return json.dumps({"inputs": [{"name": "IMAGE", "shape": [1, 1], "datatype": "BYTES", "data": data}]}).encode()


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
    flags = {"model-id": clip_folder(python.parents[2]), "served-model-name": "clip", "port": port, "batch-size": setting.batch}
    flags |= {"device": "cpu", "log-level": "warning"}
    # Compiled, the network answers no sooner, and its first photo waits for a compiler.
    switches = ["--no-compile", "--no-bettertransformer", "--no-vector-disk-cache", "--no-model-warmup"]
    return [*environment, python.parent / "infinity_emb", "v2", *(f"--{flag}={value}" for flag, value in flags.items()), *switches]


def plain_backend(_: Path, port: int, scratch: Path, setting: Setting) -> Sequence[str | Path]:
    folder = scratch / "models/npair/1"
    folder.mkdir(parents=True)
    path = f"import sys\n\nsys.path += {[str(PEERS), str(ROOT / 'src')]}\n"  # the stub knows no PYTHONPATH
    (folder / "model.py").write_text(path + (PEERS / "python_backend.py").read_text())
    (folder.parent / "config.pbtxt").write_text(
        'name: "npair" backend: "python" max_batch_size: 64 dynamic_batching { }'
        'input [ { name: "IMAGE" data_type: TYPE_STRING dims: [ 1 ] } ]'
        'output [ { name: "EMBEDDING" data_type: TYPE_FP32 dims: [ 128 ] } ]'
        f"instance_group [ {{ count: {setting.workers} kind: KIND_CPU }} ]"
    )
    triton = serve.find_triton(scratch)
    flags = {"model-repository": scratch / "models", "backend-directory": triton.backends, "http-port": port}
    flags |= {"allow-grpc": "false", "allow-metrics": "false", "pinned-memory-pool-byte-size": 0}
    environment = [f"{name}={triton.environment[name]}" for name in ("PATH", "LD_LIBRARY_PATH")]
    return ["env", *environment, triton.program, *(f"--{flag}={value}" for flag, value in flags.items())]


def mlserver_folder(python: Path, port: int, scratch: Path, setting: Setting) -> Sequence[str | Path]:
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


MULTIPART = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}
RAW = {"Inference-Header-Content-Length": "0", "Content-Type": "application/octet-stream"}
TRITON = {"path": "/v2/models/npair/infer", "body": lambda photo: photo, "headers": RAW, "answer": from_triton}
ALL = (
    Peer("npair", command=lambda python, _port, _scratch, _: [python, ROOT / "model/api/serve.py"], **TRITON),  # type: ignore[arg-type]
    Peer(
        "FastAPI",
        "/embed",
        lambda python, port, _, s: [
            *(python, "-m", "uvicorn", "fastapi_app:app", "--port", str(port), "--workers", str(s.workers)),
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
        lambda python, port, _scratch, _: [python.parent / "bentoml", "serve", "bentoml_app:Embedding", "--port", str(port)],
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
        tuple(Setting(1, threads, 1, batch) for threads, batch in ((cores(), 8), (cores(), 32), (1, 8))),
        "infinity",
    ),
    Peer("Python backend", command=plain_backend, settings=tuple(s for s in spreads() if s.concurrency == 1), **TRITON),  # type: ignore[arg-type]
)
SAME = [peer.name for peer in ALL[1:] if peer.name != "infinity"]  # infinity loads only what transformers knows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--photos", type=Path, default=Path("data/grocery"), help="a data set; its val photos are sent (%(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=3, help="(%(default)s)")
    parser.add_argument("--seconds", type=int, default=6, help="of each closed loop (%(default)s)")
    parser.add_argument("--environments", type=Path, default=ROOT / ".venv/peers", help="folder for the peers' (%(default)s)")
    parser.add_argument("--peers", nargs="*", choices=SAME, default=SAME, help="that serve the shipped network (all)")
    parser.add_argument("--others", nargs="*", choices=OTHERS, default=list(OTHERS), help="networks in wide use (all)")
    parser.add_argument("--also", type=Path, help="folder of another npair version")
    parser.add_argument(
        "--short",
        action="store_true",
        help="for the ratios alone: of the peers as documented, rounds of the quickest; none with npair inside, no load of 8 "
        "connections, no larger photos, no costs",
    )
    parser.add_argument("--json", type=Path, help="file for all measurements")
    parser.add_argument("--pictures", type=Path, help="folder for pictures")
    arguments = parser.parse_args()
    if not shutil.which("wrk"):
        sys.exit("wrk is missing; on Debian: apt install wrk")
    dataset = read_dataset(arguments.photos)
    if dataset.val is None:
        sys.exit(f"{arguments.photos} has no val photos")
    photos = [path.read_bytes() for path in dataset.val.paths[:: max(1, len(dataset.val) // 50)]]

    bench = Bench(photos, arguments)
    contestants = [Contestant(ALL[0], "npair", Setting(2, 1))]
    if arguments.also:
        contestants.append(Contestant(ALL[0], "npair", Setting(2, 1), arguments.also.resolve()))
    by_name = {peer.name: peer for peer in ALL}
    tuned = [
        bench.tuned(by_name[name], mode)
        for name, mode in itertools.product(arguments.peers, ["eager"] if arguments.short else MODES)
    ]
    contestants += sorted(tuned, key=lambda c: c.rate)[-1:] if arguments.short else tuned
    contestants += [bench.tuned(by_name[OTHERS[network]], network) for network in arguments.others]
    limits: list[float] = []
    for number in range(arguments.rounds):
        limits.append(bench.limit())
        for contestant in contestants[number % len(contestants) :] + contestants[: number % len(contestants)]:
            bench.measure(contestant, connections=(1, CONNECTIONS[-1]) if arguments.short else CONNECTIONS)
            say(f"round {number + 1}: {contestant.name} {contestant.rates(CONNECTIONS[-1])[-1]:.0f}/s")
    print(report(contestants, limits))
    if arguments.pictures:
        draw(contestants, limits, arguments.pictures / "throughput.svg")
    if not arguments.short:
        larger_photos(contestants, photos, arguments)
        costs.report(dataset, arguments.rounds, arguments.seconds, arguments.pictures)
    if arguments.json:
        rows = [{"name": c.name, **{key: value for key, value in asdict(c).items() if key in KEPT}} for c in contestants]
        arguments.json.write_text(json.dumps({"limit": limits, "contestants": rows}, indent=1) + "\n")


def larger_photos(contestants: list[Contestant], photos: list[bytes], arguments: argparse.Namespace) -> None:
    """Prints photos a second of npair and of the best peer as documented, with photos of several sizes."""
    eager = [contestant for contestant in contestants if contestant.mode == "eager"]
    best = max(eager, key=lambda contestant: contestant.median("rate", CONNECTIONS[-1]), default=contestants[0])
    print(f"| photo | npair, photos/s | {best.name} | ratio |\n| --- | --- | --- | --- |")
    for width, height in SIZES:
        larger = [resized(photo, width, height) for photo in photos[::5]]
        sized = Bench(larger, arguments)
        pair = [Contestant(contestant.peer, contestant.mode, contestant.setting) for contestant in (contestants[0], best)]
        for contestant in arguments.rounds * pair:
            sized.measure(contestant, connections=CONNECTIONS[-1:])
        mine, other = (contestant.median("rate", CONNECTIONS[-1]) for contestant in pair)
        print(f"| {width} x {height} | {mine:.0f} | {other:.0f} | {mine / other:.1f} |", flush=True)
    print()


KEPT = ("mode", "setting", "loads", "megabytes", "first_answer")


class Bench:
    """Starts servers, loads them and checks what they answer."""

    def __init__(self, photos: list[bytes], arguments: argparse.Namespace) -> None:
        self.photos, self.arguments = photos, arguments
        self.embeddings: dict[tuple[str, Path], Vectors] = {}

    def expected(self, contestant: Contestant) -> Vectors:
        """float32 [number of photos, D]: as its network embeds the photos with no server."""
        key = contestant.mode if contestant.mode in OTHERS else "", contestant.version
        if key not in self.embeddings:
            with tempfile.TemporaryDirectory() as name:
                self.embeddings[key] = self.alone(contestant, Path(name))
        return self.embeddings[key]

    def alone(self, contestant: Contestant, scratch: Path) -> Vectors:
        vectors: Vectors
        if contestant.mode in OTHERS:
            self.write_bodies(scratch / "bodies", lambda photo: photo, {})
            environment = self.environment(contestant) | {"THREADS": str(cores())}
            command = [self.python(contestant.peer), PEERS / "network.py", scratch / "bodies/list", scratch / "vectors.npy"]
            subprocess.run(command, env=environment, check=True)
            vectors = np.load(scratch / "vectors.npy")
        else:
            with published_code(contestant.version) as code:  # an older version's is not today's
                embedder = code.Embedder(contestant.version, cores=cores())
                vectors = np.stack(embedder.embed_photos(self.photos, code.UNLIMITED))
                embedder.close()
        return vectors

    def python(self, peer: Peer) -> Path:
        return python_of(peer.environment, self.arguments.environments) if peer.environment else Path(sys.executable)

    def environment(self, contestant: Contestant) -> dict[str, str]:
        """Variables of a peer's process, for peers/network.py and the peer's app."""
        python, setting = self.python(contestant.peer), contestant.setting
        settings = {"MODE": contestant.mode, "VERSION": contestant.version, "OMP_NUM_THREADS": setting.threads}
        settings |= {"CLIP_FOLDER": clip_folder(self.arguments.environments)}
        settings |= {name.upper(): value for name, value in asdict(setting).items()}
        settings |= {"PYTHONPATH": f"{PEERS}:{ROOT / 'src'}", "PATH": f"{python.parent}:{os.environ['PATH']}"}
        return {**os.environ, **{name: str(value) for name, value in settings.items()}}

    def tuned(self, peer: Peer, mode: str) -> Contestant:
        """With the setting that answers most photos a second at the largest number of connections, in a short run of each."""
        trials = [Contestant(peer, mode, setting) for setting in peer.settings]
        for trial in trials:
            self.measure(trial, connections=(1, CONNECTIONS[-1]), seconds=3)
            say(f"{trial.name}: {trial.setting} {trial.loads[1].rate:.0f}/s, p50 alone {trial.loads[0].p50:.1f} ms")
        best = max(trials, key=lambda trial: trial.loads[1].rate)
        lone = min(trial.loads[0].p50 for trial in trials)
        return Contestant(peer, mode, best.setting, rate=best.loads[1].rate, lone=lone)

    def measure(self, contestant: Contestant, *, connections: Sequence[int] = CONNECTIONS, seconds: int = 0) -> None:
        """Start it, check an answer for each photo, and add the loads, the memory after them and the time to the first answer."""
        peer, expected = contestant.peer, self.expected(contestant)
        with tempfile.TemporaryDirectory() as name, self.running(contestant, Path(name)) as (process, port):
            began = time.monotonic()
            contestant.first_answer.append(self.first_answer(peer, port, process, began))
            for photo, vector in zip(self.photos, expected, strict=True):
                status, answer = self.ask(peer, port, photo)
                assert status == http.client.OK, f"{contestant.name} answered {status}"
                assert answer.reshape(-1) @ vector > LEAST_COSINE[contestant.mode], f"{contestant.name} gives another embedding"
            bodies = Path(name) / "bodies"
            self.write_bodies(bodies, peer.body, peer.headers)
            least = 4 * expected.shape[1]  # bytes of an answer
            self.wrk(peer, port, bodies, 8, 2, least=least)  # warm-up
            for number in connections:
                contestant.loads.append(self.wrk(peer, port, bodies, number, seconds or self.arguments.seconds, least=least))
            contestant.megabytes.append(proportional_memory(process.pid))

    @contextlib.contextmanager
    def running(self, contestant: Contestant, scratch: Path) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
        peer, setting, port = contestant.peer, contestant.setting, free_port()
        python = self.python(peer)
        self.grpc_port = free_port()
        ports = {"HTTP_PORT": port, "GRPC_PORT": self.grpc_port, "METRICS_PORT": free_port()}
        environment = self.environment(contestant) | {name: str(value) for name, value in ports.items()}
        if peer.name == "npair":
            environment["MODEL_REPOSITORY"] = str(repository_of(contestant.version, scratch))
        command = peer.command(python, port, scratch, setting)
        with (scratch / "log").open("wb") as log:
            process = subprocess.Popen(
                command, env=environment, cwd=scratch, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        try:
            yield process, port
        except BaseException:
            print((scratch / "log").read_text(errors="replace")[-3000:], file=sys.stderr)
            raise
        finally:
            for number in (15, 9):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, number)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(10)

    def first_answer(self, peer: Peer, port: int, process: subprocess.Popen[bytes], began: float) -> float:
        """Seconds until the first photo is answered."""
        while time.monotonic() - began < 120:
            assert process.poll() is None, f"{peer.name} ended by itself"
            with contextlib.suppress(OSError, http.client.HTTPException):
                if self.ask(peer, port, self.photos[0])[0] == http.client.OK:
                    return time.monotonic() - began
            time.sleep(0.02)
        raise AssertionError(f"{peer.name} does not answer")

    def ask(self, peer: Peer, port: int, photo: bytes) -> tuple[int, Vectors]:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        try:
            connection.request("POST", peer.path, peer.body(photo), peer.headers)
            response = connection.getresponse()
            body = response.read()
            return response.status, peer.answer(response.headers, body) if response.status == http.client.OK else np.empty(
                0, np.float32
            )
        finally:
            connection.close()

    def write_bodies(self, folder: Path, body: Callable[[bytes], bytes], headers: dict[str, str]) -> None:
        folder.mkdir()
        for number, photo in enumerate(self.photos):
            (folder / str(number)).write_bytes(body(photo))
        (folder / "list").write_text("".join(f"{folder}/{number}\n" for number in range(len(self.photos))))
        (folder / "headers").write_text("".join(f"{name}: {value}\n" for name, value in headers.items()))

    def wrk(self, peer: Peer, port: int, bodies: Path, connections: int, seconds: int, *, least: int) -> Load:
        command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "--timeout", "20s", "-s", str(PEERS / "load.lua")]
        environment = {**os.environ, "BODIES": str(bodies), "LEAST_BYTES": str(least)}
        result = subprocess.run(
            [*command, f"http://127.0.0.1:{port}{peer.path}"], env=environment, check=True, capture_output=True, text=True
        )
        counted: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
        assert not counted["failed"], f"{peer.name}: {counted['failed']:.0f} of {counted['requests']} requests failed"
        return Load(connections, counted["requests"] / counted["seconds"], counted["p50"], counted["p99"])

    def limit(self) -> float:
        """Photos a second, decoded and embedded on all cores with no server: the better of one process and of one for each core."""
        with tempfile.TemporaryDirectory() as name:
            self.write_bodies(Path(name) / "bodies", lambda photo: photo, {})
            rates = []
            for processes, threads in {(1, cores()), (cores(), 1)}:
                command = [sys.executable, "-c", LIMIT, name, str(costs.VERSION), str(threads), str(self.arguments.seconds)]
                running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(processes)]
                rates.append(sum(float(process.communicate()[0]) for process in running))
        return max(rates)


LIMIT = """
import sys, time
from pathlib import Path
from npair.serving.embedder import UNLIMITED, Embedder
folder, version, threads, seconds = sys.argv[1:]
photos = [path.read_bytes() for path in sorted(Path(folder, "bodies").glob("[0-9]*"))]
embedder = Embedder(Path(version), cores=int(threads))
embedder.embed_photos(photos, UNLIMITED)
time.sleep(1)  # until the others have started, too
began, done = time.monotonic(), 0
while time.monotonic() - began < int(seconds):
    embedder.embed_photos(photos, UNLIMITED)
    done += len(photos)
print(done / (time.monotonic() - began))
"""


def report(contestants: list[Contestant], limits: list[float]) -> str:
    npair = contestants[0]
    most = CONNECTIONS[-1]
    lines = [
        f"On {cores()} cores; medians of {len(limits)} rounds, and from the least to the most.",
        "",
        f"| server | workers, threads, calls, batch | photos/s at {most} | npair's ratio | p50 ms at 1 | at 8 | at {most} "
        f"| p99 ms at {most} | MB | first answer s |",
        "|" + " --- |" * 10,
    ]
    for c in sorted(contestants, key=lambda c: -c.median("rate", most)):
        ratios = [mine / other for mine, other in zip(npair.rates(most), c.rates(most), strict=True)]
        s = c.setting
        setting = "" if c.peer is npair.peer else f"{s.workers}, {s.threads}, {s.concurrency}, {s.batch}"
        spread = "" if c is npair else f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        latencies = " | ".join(f"{c.median('p50', number):.1f}" if c.rates(number) else "" for number in CONNECTIONS)
        lines.append(
            f"| {c.name} | {setting} | {c.median('rate', most):.0f} | {spread} | {latencies} | {c.median('p99', most):.0f}"
            f" | {statistics.median(c.megabytes):.0f} | {statistics.median(c.first_answer):.1f} |"
        )
    shares = [mine / limit for mine, limit in zip(npair.rates(most), limits, strict=True)]
    lines += ["", f"Without a server: {statistics.median(limits):.0f} photos/s; npair reaches {statistics.median(shares):.2f}"]
    lines[-1] += f" ({min(shares):.2f} to {max(shares):.2f}) of it."
    for mode, words in (("eager", "as documented"), ("npair", "with npair's engine and decoder inside")):
        of_mode = [c for c in contestants if c.mode == mode and c.peer is not npair.peer]
        if of_mode:
            best = max(of_mode, key=lambda c: c.median("rate", most))
            lone = min(of_mode, key=lambda c: c.lone)
            ratio, alone = npair.median("rate", most) / best.median("rate", most), npair.median("p50", 1)
            lines.append(
                f"Best peer {words}: {best.peer.name}, of which npair has {ratio:.2f} times the photos/s, and"
                f" {alone / best.median('p50', 1):.2f} of the p50 at one connection; {alone / lone.lone:.2f} of the least with any"
                f" setting, {lone.lone:.1f} ms of {lone.peer.name}."
            )
    for c in contestants[1:]:
        if c.peer is npair.peer or c.mode in OTHERS:
            ratio, alone = npair.median("rate", most) / c.median("rate", most), npair.median("p50", 1) / c.median("p50", 1)
            lines.append(f"{c.name}: npair has {ratio:.2f} times the photos/s, and {alone:.2f} of the p50 at one connection.")
    return "\n".join(lines)


def draw(contestants: list[Contestant], limits: list[float], path: Path) -> None:
    """Bars of photos a second, from the least to the most of the rounds."""
    pyplot = costs.pyplot()
    most = CONNECTIONS[-1]
    ordered = sorted(contestants, key=lambda c: c.median("rate", most))
    figure, axes = pyplot.subplots(figsize=(8, 0.4 * len(ordered) + 1), layout="constrained")
    colours = ["C0" if c.peer.name == "npair" else "C1" if c.mode == "npair" else "0.6" for c in ordered]
    middle = [c.median("rate", most) for c in ordered]
    around = [
        [m - min(c.rates(most)) for m, c in zip(middle, ordered, strict=True)],
        [max(c.rates(most)) - m for m, c in zip(middle, ordered, strict=True)],
    ]
    axes.barh([c.name for c in ordered], middle, xerr=around, color=colours, ecolor="0.3", capsize=3)
    axes.axvline(statistics.median(limits), color="C3", linestyle=":", label="without a server")
    axes.set_xlabel(f"photos a second at {most} connections")
    axes.legend(loc="lower right")
    figure.savefig(path)
    pyplot.close(figure)


def python_of(name: str, parent: Path) -> Path:
    """Of an environment in requirements.txt, which is made the first time; what the network needs comes from npair's own."""
    folder = parent / name
    python = folder / "bin/python"
    if not (folder / "complete").exists():
        say(f"installing {name}")
        lines = dict(line.split(": ") for line in (PEERS / "requirements.txt").read_text().splitlines() if ": " in line)
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *lines[name].split()], check=True)
        own, site = (
            subprocess.run(
                [p, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], check=True, capture_output=True, text=True
            )
            for p in (sys.executable, python)
        )
        (Path(site.stdout.strip()) / "npair.pth").write_text(own.stdout)
        (folder / "complete").touch()
    return python


def repository_of(version: Path, scratch: Path) -> Path:
    """A model repository of this npair version alone, which may be of another checkout."""
    folder = scratch / "models/npair"
    folder.mkdir(parents=True)
    (folder / version.name).symlink_to(version)
    config = (costs.MODELS / "npair/config.pbtxt").read_text()
    (folder / "config.pbtxt").write_text(with_release(config, [int(version.name)], {}))
    return folder.parent


def clip_folder(environments: Path) -> Path:
    """Where peers/network.py keeps the weights of CLIP, 600 MB, which it makes the first time."""
    return environments / "clip-vit-b-32"


def resized(photo: bytes, width: int, height: int) -> bytes:
    file = io.BytesIO()
    Image.open(io.BytesIO(photo)).convert("RGB").resize((width, height), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
    return file.getvalue()


def proportional_memory(pid: int) -> float:
    """MB of a process and all below it, what they share divided among those who share it."""
    total = 0
    for process in [pid, *costs.descendants(pid)]:
        with contextlib.suppress(OSError):
            text = Path(f"/proc/{process}/smaps_rollup").read_text()
            total += next(int(line.split()[1]) for line in text.splitlines() if line.startswith("Pss:"))
    return total / 1024


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def say(sentence: str) -> None:
    print(sentence, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
