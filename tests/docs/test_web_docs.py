"""Run every block of docs/web.md against the real service, with the clients that it names."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from support.models import ROOT, SHIPPED
from support.servers import running
from support.web import serving

from npair.client import Embeddings, NpairClient
from npair.gallery.build import build

CLIENTS = ROOT / ".venv/clients"
PAGE = (ROOT / "docs/web.md").read_text()
BLOCKS = re.findall(r"^### (.*?)\n.*?^```(sh|python)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
PHOTOS = {"photo.jpg": "photo.jpg", "other.jpg": "turned.jpg"}  # the page's names for golden photos
KEY = "k" * 32


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with running() as (_, urls):
        yield urls["http"]


@pytest.fixture(scope="module")
def expected(server: str) -> Embeddings:
    with NpairClient(server) as client:
        return client.embed([SHIPPED / "golden" / name for name in PHOTOS.values()])


@pytest.fixture(scope="module")
def addresses(server: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """A service without a key and one with it, on a gallery of the two photos."""
    root = tmp_path_factory.mktemp("photos")
    for name, golden in PHOTOS.items():
        shutil.copy(SHIPPED / "golden" / golden, root / name)
    with NpairClient(server) as client:
        build(root, root / "gallery", client)
    with (
        serving(root / "gallery", server) as opened,
        serving(root / "gallery", server, key=KEY) as locked,
    ):
        yield opened, locked


@pytest.mark.parametrize("block", BLOCKS, ids=[title for title, _, _ in BLOCKS])
def test_block(
    block: tuple[str, str, str],
    addresses: tuple[str, str],
    expected: Embeddings,
    tmp_path: Path,
) -> None:
    title, language, code = block
    for name, golden in PHOTOS.items():
        shutil.copy(SHIPPED / "golden" / golden, tmp_path / name)
    needs_key = "NPAIR_WEB_KEY" in code
    code = code.replace("http://127.0.0.1:8080", addresses[needs_key])
    if language == "sh":
        code = re.sub(r"^NPAIR_WEB_KEY=.*?#", f"NPAIR_WEB_KEY={KEY} #", code)
        command = ["bash", "-euo", "pipefail", "-c", code]
    else:
        if not (CLIENTS / "installed").exists():
            pytest.fail("this test needs other clients: make .venv/clients/installed")
        code = code.replace('"NPAIR_WEB_KEY"', f'"{KEY}"')
        code += "\nimport json\nprint(json.dumps(vectors))\nprint(globals().get('model', ''))"
        command = [str(CLIENTS / "bin/python"), "-c", code]
    result = subprocess.run(
        command,
        cwd=tmp_path,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    if language == "python":
        vectors, model = result.stdout.splitlines()[-2:]
        assert (np.array(json.loads(vectors)) * expected.vectors).sum(1).min() >= 0.9999
        assert model in ("", f"npair:{expected.version}")
        return
    answer = json.loads(result.stdout)
    if title == "curl":
        assert np.array(answer["data"][0]["embedding"]) @ expected.vectors[0] >= 0.9999
    elif "neighbours" in answer:
        assert 1 <= len(answer["neighbours"]) <= 2
        assert answer["version"] == expected.version
        assert (tmp_path / "thumbnail.jpg").exists() == ("thumbnail" in code)
    else:
        assert answer["photos"] == 2


def test_clients_are_there() -> None:
    assert {"curl", "OpenAI", "LangChain", "LlamaIndex", "infinity"} <= {
        title for title, _, _ in BLOCKS
    }


def test_versions_of_clients_are_the_installed_ones() -> None:
    pins = (ROOT / "tests/clients/requirements.txt").read_text()
    named = PAGE[PAGE.index("Tried with ") : PAGE.index("`InfinityVisionAPI`")]
    for name, version in re.findall(r"([a-z-]+)\s(\d[\d.]*\d)", named):
        assert f"{name}=={version}\n" in pins
