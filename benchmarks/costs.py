"""The cost of npair's own server: by connections, cores, protocol and photos per request.

    PYTHONPATH=model/api .venv/bin/python benchmarks/costs.py --photos data/grocery

Measures photos that arrive at random times, and profiles where the time goes. `make bench` runs
this after npair's peers. Prints tables in Markdown, of medians. NVIDIA's perf_analyzer, an
independent check, is fetched the first time.
"""

from __future__ import annotations

import base64
import contextlib
import csv
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
import time
import zipfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
from machine import MODELS, ROOT, VERSION, command_line, descendants, photos_to_send, pyplot
from supervisor import procfs

from npair.cli.evaluate import embed_served
from npair.data.dataset import Dataset
from npair.data.pixels import decode_dataset, default_cache
from npair.data.sources import read_dataset
from npair.networks.network import build_network, multiply_adds
from npair.releasing.traffic import Measurement, closed, paced
from npair.releasing.tune import CONNECTIONS, LocalServer, markdown, serving
from npair.scoring.evaluate import embed_split
from npair.serving.embedder import UNLIMITED, Embedder
from npair.serving.engine import BATCH, cores, import_openvino
from npair.serving.manifest import Manifest
from npair.serving.preprocess import decode

PERF_ANALYZER = "tritonclient==2.50.0"  # the last wheel that has it
MANY = 32  # connections


def main() -> None:
    parser = command_line(__doc__, "a data set with val photos")
    parser.add_argument("--rounds", type=int, default=3, help="(%(default)s)")
    parser.add_argument("--seconds", type=int, default=4, help="of each load (%(default)s)")
    parser.add_argument("--pictures", type=Path, help="folder for a picture")
    arguments = parser.parse_args()
    report(read_dataset(arguments.photos), arguments.rounds, arguments.seconds, arguments.pictures)


def report(dataset: Dataset, rounds: int, seconds: int, pictures: Path | None) -> None:
    """Print the sections one by one, as they are measured."""
    photos = photos_to_send(dataset)
    for section in (
        partial(recall, dataset),
        partial(by_connections, photos, rounds, seconds, pictures),
        partial(at_half, photos, rounds, seconds),
        partial(by_cores, photos, rounds, seconds),
        partial(outside_check, photos, rounds, seconds),
        partial(profile, photos, seconds),
        partial(layers, photos),
        partial(bulk, dataset.train.paths, rounds),
    ):
        print(section(), end="\n\n", flush=True)


def recall(dataset: Dataset) -> str:
    """Recall@1 of val photos with the train photos as gallery: of the server and of fp32."""
    with serving(MODELS) as server:
        served = embed_served(dataset, "val", server.http)
    reference = Embedder(VERSION, cores=cores(), engine="torch")
    found, pixels, _ = decode_dataset(dataset, reference.preprocessing, default_cache())
    by_torch = embed_split(
        "torch", found, "val", lambda photos: reference.embed(pixels.array[pixels.of(photos)])
    )
    reference.close()
    rows = [
        [embedded.embedded_by, *(f"{recall:.4f}" for recall in embedded.recall_at_1().values())]
        for embedded in (served, by_torch)
    ]
    return markdown(["", "Recall@1 on val", "of coarse labels"], rows)


def by_connections(
    photos: Sequence[bytes], rounds: int, seconds: int, pictures: Path | None
) -> str:
    loads: dict[int, list[Measurement]] = {connections: [] for connections in CONNECTIONS}
    with warm(photos) as server:
        for connections in rounds * CONNECTIONS:
            loads[connections].append(closed(server.http, photos, connections, seconds))
    medians = {
        connections: [median(getattr(one, name) for one in of) for name in ("rate", "p50", "p99")]
        for connections, of in loads.items()
    }
    if pictures:
        draw(medians, pictures / "connections.svg")
    return markdown(
        ["connections", "photos/s", "p50 ms", "p99 ms"],
        [[c, f"{r:.0f}", f"{p50:.1f}", f"{p99:.1f}"] for c, (r, p50, p99) in medians.items()],
    )


def draw(medians: dict[int, list[float]], path: Path) -> None:
    figure, left = pyplot().subplots(figsize=(8, 4), layout="constrained")
    rates, p50, p99 = zip(*medians.values(), strict=True)
    left.plot(list(medians), rates, "o-", color="C0")
    left.set(xscale="log", xlabel="connections", ylim=(0, None))
    left.set_ylabel("photos/s", color="C0")
    left.set_xticks(list(medians), list(map(str, medians)))
    right = left.twinx()
    right.plot(list(medians), p50, "s--", color="C1", label="p50")
    right.plot(list(medians), p99, "^:", color="C1", label="p99")
    right.set(yscale="log")
    right.set_ylabel("latency, ms", color="C1")
    right.legend(loc="upper left")
    figure.savefig(path)


def at_half(photos: Sequence[bytes], rounds: int, seconds: int) -> str:
    """Latency if photos arrive at random times, at half the rate that the server can answer."""
    rows = []
    with warm(photos) as server:
        for _ in range(rounds):
            alone, most = (
                closed(server.http, photos, 1, seconds),
                closed(server.http, photos, MANY, seconds),
            )
            half = paced(server.http, photos, most.rate / 2, 2 * seconds)
            rows.append((most.rate, half.rate, alone.p50, half.p50, half.p99, half.p99 / alone.p50))
    most_rate, rate, alone_p50, p50, p99, ratio = map(median, zip(*rows, strict=True))
    return (
        f"{rate:.0f} photos/s at random times, half of the {most_rate:.0f} that {MANY} connections "
        f"get: p50 {p50:.1f} ms,\np99 {p99:.1f} ms, which is {ratio:.1f} times the p50 of a photo "
        f"alone, {alone_p50:.1f} ms."
    )


def by_cores(photos: Sequence[bytes], rounds: int, seconds: int) -> str:
    """Throughput of a server that is confined to the first cores; the load uses all cores."""
    all_cpus = sorted(os.sched_getaffinity(0))
    numbers = [number for number in (1, 2, 4, 8, 16, 32) if number <= len(all_cpus)]
    loads: dict[int, list[tuple[Measurement, Measurement]]] = {number: [] for number in numbers}
    for number in rounds * numbers:
        os.sched_setaffinity(0, all_cpus[:number])  # the server inherits it
        try:
            with warm(photos) as server:
                os.sched_setaffinity(0, all_cpus)
                loads[number].append(
                    (
                        closed(server.http, photos, 1, seconds),
                        closed(server.http, photos, MANY, seconds),
                    )
                )
        finally:
            os.sched_setaffinity(0, all_cpus)
    rows = [
        [
            number,
            f"{median(many.rate for _, many in of):.0f}",
            f"{median(one.p50 for one, _ in of):.1f}",
        ]
        for number, of in loads.items()
    ]
    return markdown(["CPUs", f"photos/s, {MANY} connections", "p50 ms alone"], rows)


def outside_check(photos: Sequence[bytes], rounds: int, seconds: int) -> str:
    """Throughput by perf_analyzer, over both protocols and several batch sizes.

    The more photos a request has, the fewer requests run at once.
    """
    kinds = [(protocol, batch) for batch in (1, 8, 32) for protocol in ("http", "grpc")]
    rates: dict[tuple[str, int], list[float]] = {kind: [] for kind in kinds}
    with tempfile.TemporaryDirectory() as name, warm(photos) as server:
        scratch = Path(name)
        program, environment = perf_analyzer(scratch)
        encoded = [
            base64.b64encode(len(photo).to_bytes(4, "little") + photo).decode() for photo in photos
        ]
        data = {"data": [{"IMAGE": {"content": {"b64": photo}, "shape": [1]}} for photo in encoded]}
        (scratch / "photos.json").write_text(json.dumps(data))
        for protocol, batch in rounds * kinds:
            url = (server.http if protocol == "http" else server.grpc).partition("//")[2]
            command = [
                program,
                "-m",
                "npair",
                "-i",
                protocol,
                "-u",
                url,
                "-b",
                str(batch),
                "-f",
                str(scratch / "out.csv"),
            ]
            command += [
                "--input-data",
                str(scratch / "photos.json"),
                "--concurrency-range",
                str(max(2, MANY // batch)),
            ]
            command += [
                "--measurement-interval",
                str(1000 * seconds),
                "--max-trials",
                "3",
                "--stability-percentage",
                "999",
            ]
            done = subprocess.run(
                command, env=environment, cwd=scratch, capture_output=True, text=True, check=False
            )
            if done.returncode:
                sys.exit(f"perf_analyzer failed: {done.stdout[-2000:]}{done.stderr[-2000:]}")
            with (scratch / "out.csv").open() as file:
                rates[protocol, batch].append(
                    float(next(csv.DictReader(file))["Inferences/Second"])
                )
    rows = []
    for batch in (1, 8, 32):
        http, grpc = (median(rates[protocol, batch]) for protocol in ("http", "grpc"))
        rows.append(
            [batch, max(2, MANY // batch), f"{http:.0f}", f"{grpc:.0f}", f"{grpc / http:.2f}"]
        )
    head = ["photos in a request", "requests at once", "HTTP, photos/s", "gRPC", "gRPC / HTTP"]
    return f"perf_analyzer:\n\n{markdown(head, rows)}"


def perf_analyzer(scratch: Path) -> tuple[str, dict[str, str]]:
    """perf_analyzer from its wheel, and the environment in which it finds its libraries.

    The libraries come with the wheel of the server.
    """
    fetch = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--no-cache-dir",
        "--platform",
        "manylinux1_x86_64",
    ]
    subprocess.run([*fetch, "--only-binary=:all:", "--dest", scratch, PERF_ANALYZER], check=True)
    with zipfile.ZipFile(next(scratch.glob("tritonclient-*.whl"))) as wheel:
        program = Path(
            wheel.extract(
                next(name for name in wheel.namelist() if name.endswith("bin/perf_analyzer")),
                scratch,
            )
        )
    program.chmod(0o755)
    libraries = Path(sysconfig.get_path("purelib")) / "nvidia_pytriton.libs"
    for name, pattern in (("libb64.so.0d", "libb64-*"), ("libcudart.so.12", "libcudart-*")):
        (scratch / name).symlink_to(next(libraries.glob(pattern)))
    return str(program), {**os.environ, "LD_LIBRARY_PATH": str(scratch)}


def profile(photos: Sequence[bytes], seconds: int) -> str:
    """CPU time per photo under load, by process; and of decoding and the network alone."""
    embedder = Embedder(VERSION, cores=1)
    alone: dict[str, list[float]] = {
        "alone: decoding": [],
        "alone: the network, four photos at a time": [],
    }
    for _ in range(5):
        began = time.process_time()
        pixels = np.stack([decode(photo, embedder.preprocessing, UNLIMITED) for photo in photos])
        decoded = time.process_time()
        embedder.embed(pixels)
        for of_kind, spent in zip(
            alone.values(), (decoded - began, time.process_time() - decoded), strict=True
        ):
            of_kind.append(spent / len(photos))
    embedder.close()
    rows = {name: min(times) for name, times in alone.items()}
    with warm(photos) as server:
        before = cpu_seconds(server.pid)
        began = time.monotonic()
        load = closed(server.http, photos, MANY, seconds)
        answered = load.rate * (time.monotonic() - began)
        after = cpu_seconds(server.pid)
    rows |= {f"served: {kind}": (after[kind] - before[kind]) / answered for kind in after}
    return markdown(
        ["", "CPU milliseconds a photo"],
        [[name, f"{1e3 * spent:.2f}"] for name, spent in rows.items()],
    )


def layers(photos: Sequence[bytes]) -> str:
    """The int8 network's time on one core by kind of layer, as OpenVINO counts it."""
    openvino = import_openvino()
    manifest = Manifest.read(VERSION)
    trained = manifest.training
    adds = multiply_adds(build_network(trained["network"]), trained["train"]["size"])
    model = openvino.Core().read_model(VERSION / manifest.engines["openvino-int8"].graph)
    model.reshape([BATCH, *list(model.input().partial_shape)[1:]])
    options = {
        "INFERENCE_NUM_THREADS": 1,
        "NUM_STREAMS": 1,
        "INFERENCE_PRECISION_HINT": "f32",
        "PERF_COUNT": True,
    }
    request = openvino.Core().compile_model(model, "CPU", options).create_infer_request()
    preprocessing = manifest.preprocessing
    pixels = np.stack([decode(photo, preprocessing, UNLIMITED) for photo in photos[:BATCH]])
    runs: dict[str, list[float]] = {}
    for _ in range(20):
        request.infer([pixels])
        spent: dict[str, float] = {}
        for layer in request.profiling_info:
            kind = f"{layer.node_type}, {layer.exec_type}"
            spent[kind] = spent.get(kind, 0.0) + layer.real_time.total_seconds() / BATCH
        for kind, of_kind in spent.items():
            runs.setdefault(kind, []).append(1e3 * of_kind)
    costs = sorted(((min(of_kind), kind) for kind, of_kind in runs.items()), reverse=True)
    total = sum(cost for cost, _ in costs)
    rows: list[list[object]] = [
        [kind, f"{cost:.2f}", f"{cost / total:.0%}"] for cost, kind in costs if cost > 0.01 * total
    ]
    rows.append(["all", f"{total:.2f}", f"{adds / total / 1e6:.0f} G multiply-adds a second"])
    return markdown(["kind of layer, kernel", "milliseconds a photo", "share"], rows)


def bulk(paths: Sequence[Path], rounds: int) -> str:
    """Photos per second of the client's command line from a folder into a file.

    Compared with the load alone.
    """
    photos = [path.read_bytes() for path in paths[:: max(1, len(paths) // 50)]]
    rates: dict[str, list[float]] = {"the load": [], "http": [], "grpc": []}
    with tempfile.TemporaryDirectory() as name, warm(photos) as server:
        folder = Path(name) / "photos"
        folder.mkdir()
        for number, path in enumerate(paths):
            (folder / f"{number}.jpg").symlink_to(path.resolve())
        for _ in range(rounds):
            rates["the load"].append(closed(server.http, photos, MANY, 6).rate)
            for scheme, url in (("http", server.http), ("grpc", server.grpc)):
                client, out = ROOT / "model/api/client.py", Path(name) / "vectors.npz"
                began = time.monotonic()
                subprocess.run(
                    [sys.executable, client, "embed", folder, "--out", out, "--url", url],
                    check=True,
                    capture_output=True,
                )
                rates[scheme].append(len(paths) / (time.monotonic() - began))
    load = median(rates.pop("the load"))
    rows = [
        [scheme, f"{median(of):.0f}", f"{median(of) / load:.2f}"] for scheme, of in rates.items()
    ]
    head = [
        f"client.py embed, {len(paths):,} photos, start and end included",
        "photos/s",
        f"of the load's at {MANY} connections",
    ]
    return markdown(head, rows)


@contextlib.contextmanager
def warm(photos: Sequence[bytes]) -> Iterator[LocalServer]:
    with serving(MODELS) as server:
        closed(server.http, photos, MANY, 2)
        yield server


def cpu_seconds(pid: int) -> dict[str, float]:
    """CPU seconds that a server has used so far, by kind of process."""
    kinds = {
        "python": "watch (serve.py)",
        "tritonserver": "Triton",
        "triton_python_b": "model instances",
    }
    used = dict.fromkeys(kinds.values(), 0.0)
    for process in [pid, *descendants(pid)]:
        name = Path(f"/proc/{process}/comm").read_text()
        kind = next((kind for start, kind in kinds.items() if name.startswith(start)), None)
        if kind:
            used[kind] += procfs.cpu_seconds(process)
    return used


if __name__ == "__main__":
    main()
