"""wrk, a load generator: closed loops of connections that send photos and check every answer."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from machine import PEERS

CONNECTIONS = (1, 8, 32)


@dataclass
class Load:
    """One closed loop: photos per second, and latency in milliseconds."""

    connections: int
    rate: float
    p50: float
    p99: float


def write_bodies(
    photos: Sequence[bytes],
    folder: Path,
    body: Callable[[bytes], bytes],
    headers: Mapping[str, str],
) -> None:
    """Write a file for each photo's request, their paths into ``list``, and ``headers``."""
    folder.mkdir()
    for number, photo in enumerate(photos):
        (folder / str(number)).write_bytes(body(photo))
    (folder / "list").write_text("".join(f"{folder}/{number}\n" for number in range(len(photos))))
    (folder / "headers").write_text(
        "".join(f"{name}: {value}\n" for name, value in headers.items())
    )


def closed_loop(url: str, bodies: Path, connections: int, seconds: int, *, least: int) -> Load:
    """Send the bodies of write_bodies. An answer of fewer than ``least`` bytes counts as failed."""
    flags = ["-t1", f"-c{connections}", f"-d{seconds}s", "--timeout", "20s"]
    result = subprocess.run(
        ["wrk", *flags, "-s", PEERS / "load.lua", url],
        env={**os.environ, "BODIES": str(bodies), "LEAST_BYTES": str(least)},
        check=True,
        capture_output=True,
        text=True,
    )
    counted: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    assert not counted["failed"], (
        f"{url}: {counted['failed']:.0f} of {counted['requests']} requests failed"
    )
    rate = counted["requests"] / counted["seconds"]
    return Load(connections, rate, counted["p50"], counted["p99"])
