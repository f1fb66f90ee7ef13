"""Run every sh and python block of README.md and docs/client.md against `make serve`."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.models import ROOT
from support.servers import free_ports, lines_until_ready

README = (ROOT / "README.md").read_text()
PAGES = README + (ROOT / "docs/client.md").read_text()
BLOCKS = re.findall(r"^```(sh|python)\n(.*?)^```$", PAGES, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def ports() -> Iterator[dict[str, str]]:
    ports = free_ports()
    make = subprocess.Popen(
        ["make", "serve"],
        cwd=ROOT,
        env=os.environ | ports,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    lines_until_ready(make)
    rest: list[str] = []
    reader = threading.Thread(target=lambda: rest.extend(make.stderr or []), daemon=True)
    reader.start()
    yield ports
    os.killpg(make.pid, signal.SIGINT)  # like Ctrl-C: signal make and its children
    make.wait(timeout=30)
    reader.join(timeout=10)
    assert "npair: stopped\n" in rest, rest


@pytest.mark.parametrize(
    ("language", "code"), BLOCKS, ids=[code.strip().splitlines()[0][:50] for _, code in BLOCKS]
)
def test_block(language: str, code: str, ports: dict[str, str], tmp_path: Path) -> None:
    for name, port in (("HTTP_PORT", "8000"), ("GRPC_PORT", "8001")):
        code = code.replace(f"127.0.0.1:{port}", f"127.0.0.1:{ports[name]}")
    environment = os.environ | {
        "NPAIR_URL": f"http://127.0.0.1:{ports['HTTP_PORT']}",
        "TMPDIR": str(tmp_path),
    }
    command = (
        ["bash", "-euo", "pipefail", "-c", code]
        if language == "sh"
        else [sys.executable, "-c", code]
    )
    result = subprocess.run(
        command, cwd=ROOT, env=environment, check=False, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    if "od -An" in code:
        numbers = [float(number) for number in result.stdout.split()]
        assert len(numbers) == 128
        assert sum(number * number for number in numbers) == pytest.approx(1, abs=1e-4)
    elif expected := re.findall(r"# prints (.*)$", code, re.MULTILINE):
        assert result.stdout.strip().splitlines() == expected


def test_blocks_cover_both_languages() -> None:
    assert {language for language, _ in BLOCKS} == {"sh", "python"}
    assert "```sh\nmake serve" not in README, "make serve does not return: it is run by the fixture"


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 120


pages = pytest.mark.parametrize(
    "page",
    [path.relative_to(ROOT) for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]],
    ids=str,
)


@pages
def test_no_paragraph_is_a_placeholder_or_comes_twice(page: Path) -> None:
    prose = re.sub(r"^```.*?^```$", "", (ROOT / page).read_text(), flags=re.MULTILINE | re.DOTALL)
    paragraphs = [text for text in re.split(r"\n\s*\n", prose) if text and text[0] != "#"]
    assert [
        text for text in paragraphs if re.fullmatch("[A-Z]+", text) or paragraphs.count(text) > 1
    ] == []


@pages
def test_make_targets_that_pages_name_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z0-9-]+):.*##", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"`make ([a-z0-9-]+)", (ROOT / page).read_text())) <= targets
    assert len(targets) <= 21
