"""Compare npair with its peers, and with the machine's limit without a server.

    make bench ARGS='--photos data/grocery'

Each peer is installed into its own environment and serves the shipped network in two ways: eager,
in fp32, as its documentation shows; and with npair's own engine and decoder. Two more show the cost
of image embeddings elsewhere: ResNet-50 and CLIP ViT-B/32, both with random weights, which take the
same time as trained ones. A short search tunes the workers, threads and batches of each. Then all
run in turn, for several rounds, under the same load from wrk: closed loops of 1, 8 and 32
connections. The load checks the status and size of every answer; before it, every photo's embedding
is checked. Prints tables in Markdown; --json keeps all measurements.

--also adds other versions of npair to the same rounds. Check out a retired one from the history:

    git worktree add ../older COMMIT
    make bench ARGS='--short --seconds 3 --also ../older/model_repository/npair/10'

Needs: Linux, the .venv of `make install`, wrk (Debian: apt install wrk) and, the first time, a
package index.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import costs
import numpy as np
from bench_report import draw, report
from contestants import (
    ALL,
    LEAST_COSINE,
    MODES,
    OTHERS,
    SAME,
    Contestant,
    Peer,
    Setting,
    Vectors,
    clip_folder,
    repository_of,
)
from machine import (
    PEERS,
    ROOT,
    VERSION,
    command_line,
    free_port,
    photos_to_send,
    proportional_memory,
    python_of,
    resized,
    say,
)
from wrk import CONNECTIONS, closed_loop, write_bodies

from npair.data.sources import read_dataset
from npair.releasing.verify import published_code
from npair.serving.engine import cores

SIZES = ((348, 348), (1024, 1024), (4000, 3000))


def main() -> None:
    arguments = options()
    if not shutil.which("wrk"):
        sys.exit("wrk is missing; on Debian: apt install wrk")
    dataset = read_dataset(arguments.photos)
    photos = photos_to_send(dataset)

    bench = Bench(photos, arguments)
    contestants = [Contestant(ALL[0], "npair", Setting(2, 1))]
    contestants += [
        Contestant(ALL[0], "npair", Setting(2, 1), version.resolve()) for version in arguments.also
    ]
    by_name = {peer.name: peer for peer in ALL}
    tuned = [
        bench.tuned(by_name[name], mode)
        for name, mode in itertools.product(
            arguments.peers, ["eager"] if arguments.short else MODES
        )
    ]
    contestants += sorted(tuned, key=lambda c: c.rate)[-1:] if arguments.short else tuned
    contestants += [bench.tuned(by_name[OTHERS[network]], network) for network in arguments.others]
    limits: list[float] = []
    for number in range(arguments.rounds):
        limits.append(bench.limit())
        for contestant in (
            contestants[number % len(contestants) :] + contestants[: number % len(contestants)]
        ):
            bench.measure(
                contestant, connections=(1, CONNECTIONS[-1]) if arguments.short else CONNECTIONS
            )
            say(
                f"round {number + 1}: {contestant.name} "
                f"{contestant.rates(CONNECTIONS[-1])[-1]:.0f}/s"
            )
    print(report(contestants, limits))
    if arguments.pictures:
        draw(contestants, limits, arguments.pictures / "throughput.svg")
    if not arguments.short:
        larger_photos(contestants, photos, arguments)
        costs.report(dataset, arguments.rounds, arguments.seconds, arguments.pictures)
    if arguments.json:
        rows = [
            {"name": c.name, **{key: value for key, value in asdict(c).items() if key in KEPT}}
            for c in contestants
        ]
        arguments.json.write_text(
            json.dumps({"limit": limits, "contestants": rows}, indent=1) + "\n"
        )


def options() -> argparse.Namespace:
    parser = command_line(__doc__, "a data set; its val photos are sent")
    parser.add_argument("--rounds", type=int, default=3, help="(%(default)s)")
    parser.add_argument("--seconds", type=int, default=6, help="of each closed loop (%(default)s)")
    parser.add_argument(
        "--environments",
        type=Path,
        default=ROOT / ".venv/peers",
        help="folder for the peers' environments (%(default)s)",
    )
    parser.add_argument(
        "--peers",
        nargs="*",
        choices=SAME,
        default=SAME,
        help="peers that serve the shipped network (all)",
    )
    parser.add_argument(
        "--others",
        nargs="*",
        choices=OTHERS,
        default=list(OTHERS),
        help="networks in wide use (all)",
    )
    parser.add_argument(
        "--also", type=Path, nargs="+", default=[], help="folders of other npair versions"
    )
    parser.add_argument(
        "--short",
        action="store_true",
        help="measure the ratios only: rounds of the fastest of the peers as documented; none with "
        "npair inside, no load of 8 connections, no larger photos, no costs",
    )
    parser.add_argument("--json", type=Path, help="file for all measurements")
    parser.add_argument("--pictures", type=Path, help="folder for pictures")
    return parser.parse_args()


def larger_photos(
    contestants: list[Contestant], photos: list[bytes], arguments: argparse.Namespace
) -> None:
    """Print the photos per second of npair and of the best peer as documented, by photo size."""
    eager = [contestant for contestant in contestants if contestant.mode == "eager"]
    best = max(
        eager,
        key=lambda contestant: contestant.median("rate", CONNECTIONS[-1]),
        default=contestants[0],
    )
    print(f"| photo | npair, photos/s | {best.name} | ratio |\n| --- | --- | --- | --- |")
    for width, height in SIZES:
        larger = [resized(photo, width, height) for photo in photos[::5]]
        sized = Bench(larger, arguments)
        pair = [
            Contestant(contestant.peer, contestant.mode, contestant.setting)
            for contestant in (contestants[0], best)
        ]
        for contestant in arguments.rounds * pair:
            sized.measure(contestant, connections=CONNECTIONS[-1:])
        mine, other = (contestant.median("rate", CONNECTIONS[-1]) for contestant in pair)
        print(f"| {width} x {height} | {mine:.0f} | {other:.0f} | {mine / other:.1f} |", flush=True)
    print()


KEPT = ("mode", "setting", "loads", "megabytes", "first_answer")


class Bench:
    """Starts servers, puts load on them and checks their answers."""

    def __init__(self, photos: list[bytes], arguments: argparse.Namespace) -> None:
        self.photos, self.arguments = photos, arguments
        self.embeddings: dict[tuple[str, Path], Vectors] = {}

    def expected(self, contestant: Contestant) -> Vectors:
        """The embeddings that its network computes without a server: float32 [photos, D]."""
        key = contestant.mode if contestant.mode in OTHERS else "", contestant.version
        if key not in self.embeddings:
            with tempfile.TemporaryDirectory() as name:
                self.embeddings[key] = self.alone(contestant, Path(name))
        return self.embeddings[key]

    def alone(self, contestant: Contestant, scratch: Path) -> Vectors:
        vectors: Vectors
        if contestant.mode in OTHERS:
            write_bodies(self.photos, scratch / "bodies", lambda photo: photo, {})
            environment = self.environment(contestant) | {"THREADS": str(cores())}
            command = [
                self.python(contestant.peer),
                PEERS / "network.py",
                scratch / "bodies/list",
                scratch / "vectors.npy",
            ]
            subprocess.run(command, env=environment, check=True)
            vectors = np.load(scratch / "vectors.npy")
        else:
            with published_code(contestant.version) as code:  # an older version's is not today's
                embedder = code.Embedder(contestant.version, cores=cores())
                vectors = np.stack(embedder.embed_photos(self.photos, code.UNLIMITED))
                embedder.close()
        return vectors

    def python(self, peer: Peer) -> Path:
        return (
            python_of(peer.environment, self.arguments.environments)
            if peer.environment
            else Path(sys.executable)
        )

    def environment(self, contestant: Contestant) -> dict[str, str]:
        """The variables of a peer's process, for peers/network.py and the peer's app."""
        python, setting = self.python(contestant.peer), contestant.setting
        settings = {
            "MODE": contestant.mode,
            "VERSION": contestant.version,
            "OMP_NUM_THREADS": setting.threads,
        }
        settings |= {"CLIP_FOLDER": clip_folder(self.arguments.environments)}
        settings |= {name.upper(): value for name, value in asdict(setting).items()}
        settings |= {
            "PYTHONPATH": f"{PEERS}:{ROOT / 'src'}",
            "PATH": f"{python.parent}:{os.environ['PATH']}",
        }
        return {**os.environ, **{name: str(value) for name, value in settings.items()}}

    def tuned(self, peer: Peer, mode: str) -> Contestant:
        """The peer with the setting that answers most photos per second in a short run.

        The runs use the largest number of connections.
        """
        trials = [Contestant(peer, mode, setting) for setting in peer.settings]
        for trial in trials:
            self.measure(trial, connections=(1, CONNECTIONS[-1]), seconds=3)
            say(
                f"{trial.name}: {trial.setting} {trial.loads[1].rate:.0f}/s, "
                f"p50 alone {trial.loads[0].p50:.1f} ms"
            )
        best = max(trials, key=lambda trial: trial.loads[1].rate)
        lone = min(trial.loads[0].p50 for trial in trials)
        return Contestant(peer, mode, best.setting, rate=best.loads[1].rate, lone=lone)

    def measure(
        self, contestant: Contestant, *, connections: Sequence[int] = CONNECTIONS, seconds: int = 0
    ) -> None:
        """Start a contestant, check its answer to each photo, and put each load on it.

        Adds to it: the loads, the memory after them and the time to the first answer.
        """
        peer, expected = contestant.peer, self.expected(contestant)
        with (
            tempfile.TemporaryDirectory() as name,
            self.running(contestant, Path(name)) as (process, port),
        ):
            began = time.monotonic()
            contestant.first_answer.append(self.first_answer(peer, port, process, began))
            for photo, vector in zip(self.photos, expected, strict=True):
                status, answer = self.ask(peer, port, photo)
                assert status == http.client.OK, f"{contestant.name} answered {status}"
                assert answer.reshape(-1) @ vector > LEAST_COSINE[contestant.mode], (
                    f"{contestant.name} gives another embedding"
                )
            bodies = Path(name) / "bodies"
            write_bodies(self.photos, bodies, peer.body, peer.headers)
            least = 4 * expected.shape[1]  # bytes of an answer
            send = partial(closed_loop, f"http://127.0.0.1:{port}{peer.path}", bodies, least=least)
            send(8, 2)  # warm-up
            seconds = seconds or self.arguments.seconds
            contestant.loads += [send(number, seconds) for number in connections]
            contestant.megabytes.append(proportional_memory(process.pid))

    @contextlib.contextmanager
    def running(
        self, contestant: Contestant, scratch: Path
    ) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
        peer, setting, port = contestant.peer, contestant.setting, free_port()
        python = self.python(peer)
        self.grpc_port = free_port()
        ports = {"HTTP_PORT": port, "GRPC_PORT": self.grpc_port, "METRICS_PORT": free_port()}
        environment = self.environment(contestant) | {
            name: str(value) for name, value in ports.items()
        }
        if peer.name == "npair":
            environment["MODEL_REPOSITORY"] = str(repository_of(contestant.version, scratch))
        command = peer.command(python, port, scratch, setting)
        with (scratch / "log").open("wb") as log:
            process = subprocess.Popen(
                command,
                env=environment,
                cwd=scratch,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
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

    def first_answer(
        self, peer: Peer, port: int, process: subprocess.Popen[bytes], began: float
    ) -> float:
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
            return response.status, peer.answer(
                response.headers, body
            ) if response.status == http.client.OK else np.empty(0, np.float32)
        finally:
            connection.close()

    def limit(self) -> float:
        """Photos per second, decoded and embedded on all cores without a server.

        The better of two ways: one process, or one for each core.
        """
        with tempfile.TemporaryDirectory() as name:
            write_bodies(self.photos, Path(name) / "bodies", lambda photo: photo, {})
            rates = []
            for processes, threads in {(1, cores()), (cores(), 1)}:
                command = [
                    sys.executable,
                    "-c",
                    LIMIT,
                    name,
                    str(VERSION),
                    str(threads),
                    str(self.arguments.seconds),
                ]
                running = [
                    subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
                    for _ in range(processes)
                ]
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
time.sleep(1)  # until the others have started
began, done = time.monotonic(), 0
while time.monotonic() - began < int(seconds):
    embedder.embed_photos(photos, UNLIMITED)
    done += len(photos)
print(done / (time.monotonic() - began))
"""


if __name__ == "__main__":
    main()
