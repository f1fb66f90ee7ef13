"""Test releases under load: promotions, rollbacks, and kill -9 of each step at random moments.

    PYTHONPATH=model/api .venv/bin/python benchmarks/promotions.py

Trains and publishes two small versions and serves them. Four clients send requests without pauses
or retries, over both protocols, single photos and batches. Prints a table in Markdown. Exits with
code 1 if a request failed, an answer was wrong, memory grew, or a kill left a repository that fails
to verify or to serve.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from statistics import median

import numpy as np
from machine import proportional_memory

from npair.client import NpairClient
from npair.publishing.drawings import write_dataset
from npair.releasing.config import with_release
from npair.releasing.control import Server
from npair.releasing.release import check_pins, check_server, promote, rollback
from npair.releasing.repository import Repository, open_repository
from npair.releasing.tune import serving
from npair.releasing.verify import verify
from npair.serving.manifest import Manifest

ROOT = Path(__file__).resolve().parents[1]
SECRET = "benchmark"
STEPS = ("promote", "publish")
REFERENCE = 10  # the reload with whose memory that of the last is compared


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--switches", type=int, default=100, help="promotions and rollbacks, in turns (%(default)s)"
    )
    parser.add_argument("--kills", type=int, default=50, help="of each step (%(default)s)")
    arguments = parser.parse_args()
    os.environ["NPAIR_CONTROL_SECRET"] = SECRET
    with tempfile.TemporaryDirectory(prefix="npair-promotions-") as name:
        scratch = Path(name)
        repository = two_versions(scratch)
        with serving(scratch / "models") as running:
            server = Server(running.http, repository.name, secret=SECRET)
            rows, good = under_load(
                repository, server, [running.http, running.grpc], running.pid, arguments.switches
            )
            for step in STEPS:
                seconds, done, sound = killed(step, repository, server, scratch, arguments.kills)
                rows.append(
                    (
                        f"kill -9 of npair {step}, which takes {seconds:.0f} s",
                        f"{arguments.kills}, of which {done} had ended",
                    )
                )
                good &= sound
        rows.append(("everything verifies and serves after each", "yes" if good else "NO"))
    print("| | |", "| --- | --- |", *(f"| {what} | {value} |" for what, value in rows), sep="\n")
    return 0 if good else 1


def two_versions(scratch: Path) -> Repository:
    """Publish versions 1 and 2, trained from different weights, and promote 1."""
    folder = scratch / "models/npair"
    folder.mkdir(parents=True)
    config = (ROOT / "model_repository/npair/config.pbtxt").read_text()
    (folder / "config.pbtxt").write_text(config)
    write_dataset(scratch / "data", products=6, train=4, val=2)
    knobs = (
        "--network",
        "compact",
        "--epochs",
        2,
        "--classes-per-batch",
        4,
        "--size",
        64,
        "--crop-size",
        48,
        "--evaluations",
        0,
    )
    for seed in (1, 2):
        run = scratch / f"run-{seed}"
        npair("train", "--data", scratch / "data", "--run", run, *knobs, "--seed", seed)
        npair("publish", "--run", run, "--data", scratch / "data", "--repository", folder)
    (folder / "config.pbtxt").write_text(with_release(config, [1], {}))
    repository = open_repository(folder)
    promote(repository, 1, [])
    return repository


def npair(*arguments: object) -> None:
    subprocess.run(
        [sys.executable, "-m", "npair", *map(str, arguments)], check=True, stdout=subprocess.DEVNULL
    )


def under_load(
    repository: Repository, server: Server, urls: list[str], pid: int, switches: int
) -> tuple[list[tuple[str, str]], bool]:
    """Promote version 2 and roll back to 1, in turns.

    Returns: rows of the table, and whether everything was right.
    """
    golden = {}
    for number in (1, 2):
        with repository.version(number) as folder:
            manifest = Manifest.read(folder)
            photos, vectors = manifest.golden.read(folder)
            golden[str(number)] = vectors, manifest.golden.tolerance
    stop, count, problems = threading.Event(), Counter[str](), list[str]()

    def work(url: str, batch: list[bytes]) -> None:
        with NpairClient(url, retries=0) as client:
            while not stop.is_set():
                try:
                    vectors, version = client.embed(batch)
                    expected, tolerance = golden[version]
                    if (
                        not np.linalg.norm(
                            vectors - np.resize(expected, vectors.shape), axis=1
                        ).max()
                        <= tolerance
                    ):
                        problems.append(f"a wrong answer of version {version}")
                    count[version] += 1
                except Exception as error:
                    problems.append(repr(error))

    batches = [photos[:1], 8 * photos]
    threads = [
        threading.Thread(target=work, args=(url, batch)) for url in urls for batch in batches
    ]
    for thread in threads:
        thread.start()
    seconds, megabytes = [], []
    try:
        for turn in range(switches):
            began = time.monotonic()
            if turn % 2:
                rollback(repository, [server])
            else:
                promote(repository, 2, [server])
            seconds.append(time.monotonic() - began)
            megabytes.append(proportional_memory(pid))
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    for problem, times in Counter(problems).items():
        print(f"{times} x {problem}", file=sys.stderr)
    grown = megabytes[-1] / megabytes[min(REFERENCE, switches) - 1]
    rows = [
        (
            "promotions and rollbacks",
            f"{switches}, median {median(seconds):.1f} s, longest {max(seconds):.1f} s",
        ),
        ("requests answered by version 1, by version 2", f"{count['1']:,}, {count['2']:,}"),
        ("requests that failed or were answered wrong", str(len(problems))),
        (
            f"memory after the last reload, after number {REFERENCE}",
            f"{megabytes[-1]:.0f} MB, {grown:.2f} of that",
        ),
    ]
    return rows, not problems and min(count.values(), default=0) > 0 and grown < 1.1


def killed(
    step: str, repository: Repository, server: Server, scratch: Path, kills: int
) -> tuple[float, int, bool]:
    """Kill a step at random moments within its usual duration.

    Returns: that duration in seconds; how often the step ended before the kill; and whether each
    kill left a repository that verifies and serves.
    """
    dice, done, seconds = random.Random(0), 0, 0.0
    for turn in range(-1, kills):  # the first is not killed: it gives the duration
        target = 1 + turn % 2
        words: dict[str, list[object]] = {
            "promote": ["promote", target, "--url", server.url],
            "publish": [
                *("publish", "--run", scratch / f"run-{target}", "--data", scratch / "data"),
                *("--accept-recall-drop", "a benchmark", "--accept-cost", "a benchmark"),
            ],
        }
        command = [
            sys.executable,
            "-m",
            "npair",
            *map(str, words[step]),
            "--repository",
            repository.location,
        ]
        began = time.monotonic()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            process.wait(dice.uniform(0, seconds) if turn >= 0 else None)
            done += turn >= 0
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        seconds = seconds or time.monotonic() - began
        try:
            pins = check_pins(repository)
            for number, complete in repository.versions().items():
                assert complete, f"version {number} is half there"
                with repository.version(number) as folder:
                    verify(folder)
                if number > 2:
                    repository.remove(number)
            promote(repository, pins[-1], [server])
            check_server(repository, server)
        except Exception as error:
            print(f"after kill {turn + 1} of {step}: {error!r}", file=sys.stderr)
            return seconds, done, False
    return seconds, done, True


if __name__ == "__main__":
    sys.exit(main())
