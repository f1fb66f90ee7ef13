"""Run every block of docs/clients.md against a real server and compare with NpairClient."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from observing import prepared
from support.models import ROOT, SHIPPED
from support.servers import running

from npair.client import Embeddings, NpairClient

CLIENTS = ROOT / ".venv/clients"
PAGE = (ROOT / "docs/clients.md").read_text()
BLOCKS = re.findall(r"^### (.*?)\n.*?^```(sh|python)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
PHOTOS = {"photo.jpg": "photo.jpg", "other.jpg": "turned.jpg"}  # the page's names for golden photos


@pytest.fixture(scope="module")
def urls(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    models = prepared(tmp_path_factory.mktemp("clients") / "models", "")
    with running(MODEL_REPOSITORY=str(models)) as (_, urls):
        yield urls


@pytest.fixture(scope="module")
def expected(urls: dict[str, str]) -> Embeddings:
    with NpairClient(urls["grpc"]) as client:
        return client.embed([SHIPPED / "golden" / name for name in PHOTOS.values()])


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Put the clients first on PATH and take perf_analyzer's libraries from the server's wheel."""
    if not (CLIENTS / "installed").exists():
        pytest.fail("these tests need other clients: make .venv/clients/installed")
    libraries = tmp_path_factory.mktemp("libraries")
    wheel = next(Path(sys.prefix).glob("lib/python3*/site-packages/nvidia_pytriton.libs"))
    for name in ("libb64", "libcudart"):
        library = next(wheel.glob(f"{name}-*"))
        (libraries / re.sub(r"^(\w+)-\w+(\.so\.\w+).*", r"\1\2", library.name)).symlink_to(library)
    path = f"{CLIENTS}/bin:{os.environ['PATH']}"
    return os.environ | {"PATH": path, "LD_LIBRARY_PATH": str(libraries)}


@pytest.mark.parametrize("block", BLOCKS, ids=[title for title, _, _ in BLOCKS])
def test_block(
    block: tuple[str, str, str],
    urls: dict[str, str],
    expected: Embeddings,
    environment: dict[str, str],
    tmp_path: Path,
) -> None:
    title, language, code = block
    for name, golden in PHOTOS.items():
        shutil.copy(SHIPPED / "golden" / golden, tmp_path / name)
    for protocol, port in (("http", 8000), ("grpc", 8001)):
        code = code.replace(f"127.0.0.1:{port}", urls[protocol].split("//")[1])
    if language == "sh":
        command = ["bash", "-euo", "pipefail", "-c", code]
    else:
        code += "\nimport json\nprint(json.dumps(vectors.tolist()))\nprint(json.dumps(version))"
        command = [str(CLIENTS / "bin/python") if "KServe" in title else sys.executable, "-c", code]
    there: dict[str, Any] = {"cwd": tmp_path, "env": environment, "timeout": 120}
    result = subprocess.run(command, check=False, capture_output=True, text=True, **there)
    assert result.returncode == 0, result.stdout + result.stderr
    if language == "python":
        vectors, version = map(json.loads, result.stdout.splitlines()[-2:])
    elif "od -An" in code:
        vectors, version = [[float(number) for number in result.stdout.split()]], None
    else:
        assert re.search(r"throughput: [1-9]", result.stdout), result.stdout
        return
    np.testing.assert_allclose(vectors, expected.vectors[: len(vectors)], atol=1e-5)
    assert version in (expected.version, None)


def test_clients_are_there() -> None:
    titles = " ".join(title for title, _, _ in BLOCKS)
    for client in (
        *("curl", "JSON", "aio over HTTP", "aio over gRPC"),
        *("KServe over REST", "KServe over gRPC", "perf_analyzer"),
    ):
        assert client in titles
