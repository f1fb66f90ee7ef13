"""Follow docs/tutorial.md from drawn photos to a second version, by its commands.

Only training is cut short: ten epochs tell drawn products apart.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from support.models import ROOT
from support.servers import free_ports, lines_until_ready
from support.web import call

from npair.publishing.drawings import draw

TUTORIAL = (ROOT / "docs/tutorial.md").read_text()
BLOCKS = {
    int(number): re.findall(r"^```sh\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    for number, text in re.findall(
        r"^## (\d)\. (.*?)(?=^## |\Z)", TUTORIAL, re.MULTILINE | re.DOTALL
    )
}
PRODUCTS = ["blue mug", "red mug", "teapot", "bowl", "plate", "jug"]


def test_a_person_gets_from_photos_to_a_page_and_a_second_version(tmp_path: Path) -> None:
    draw_photos(tmp_path / "photos", 8)
    ports = free_ports()
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "NPAIR_URL": f"http://127.0.0.1:{ports['HTTP_PORT']}",
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
    }

    def follow(step: int) -> list[str]:
        short = [block.replace("npair train", "npair train --epochs 10") for block in BLOCKS[step]]
        return [run(block, tmp_path, environment) for block in short]

    assert "42 photos of 6 classes" in follow(2)[0]
    follow(3)
    assert "<svg" in (tmp_path / "runs/first/report.html").read_text()
    assert "published version 1 in models/npair" in follow(4)[0]
    assert "MODEL_REPOSITORY=$PWD/models" in TUTORIAL
    with serving(tmp_path, ports):
        (compared,) = follow(5)
        cosine = re.search(r"cosine (\d\.\d+)", compared)
        assert cosine, compared
        assert float(cosine[1]) > 0.8
        built, *found = follow(6)[0].splitlines()
        assert built.startswith("48 photos in gallery, embedded by version 1"), built
        assert [line.split("  ")[1] for line in found] == ["teapot"] * 3
        with page(tmp_path, environment) as url:
            photo = (tmp_path / "photos/teapot/1.jpg").read_bytes()
            answer = call(url, "/search?k=3", photo, method="POST").json
            assert {hit["label"] for hit in answer["neighbours"]} == {"teapot"}

        draw_photos(tmp_path / "photos", 10)
        assert "60 photos in gallery, embedded by version 2: 60 of them now" in follow(7)[0]
        versions = run("npair versions --json --repository models/npair", tmp_path, environment)
        assert json.loads(versions)


def draw_photos(root: Path, count: int) -> None:
    for product, name in enumerate(PRODUCTS):
        (root / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            draw(product, number, 96).save(root / name / f"{number + 1}.jpg", quality=90)


def run(block: str, folder: Path, environment: dict[str, str]) -> str:
    result = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block],
        cwd=folder,
        env=environment,
        check=False,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@contextmanager
def serving(folder: Path, ports: dict[str, str]) -> Iterator[None]:
    """Run step 5's console block, whose make serve does not end."""
    secret = folder / "secret"
    secret.write_text(secrets.token_hex(32))
    make = subprocess.Popen(
        ["make", "--directory", ROOT, "serve", f"MODEL_REPOSITORY={folder / 'models'}"],
        env=os.environ | ports | {"NPAIR_CONTROL_SECRET_FILE": str(secret)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        lines_until_ready(make)
        yield
    finally:
        os.killpg(make.pid, signal.SIGINT)
        make.communicate(timeout=60)


@contextmanager
def page(folder: Path, environment: dict[str, str]) -> Iterator[str]:
    command = ["npair", "web", "--port", "0"]
    with subprocess.Popen(
        command, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True
    ) as web:
        assert web.stderr is not None
        line = web.stderr.readline()
        try:
            assert "http://" in line, line
            yield "http://" + line.split("http://")[1].strip()
        finally:
            web.terminate()
