"""What make and the scripts that fill .venv do on machines of other kinds."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import kubernetes_tools
import pytest
from support.models import ROOT


def program(path: Path, script: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


class TestFolderWithASpace:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        (tmp_path / "a folder").mkdir()
        return tmp_path / "a folder"

    def test_make_dist(self, folder: Path) -> None:
        shutil.copy(ROOT / "Makefile", folder)
        program(folder / "scripts/build-dist.sh", "exec twine")
        program(folder / ".venv/bin/twine", "echo found")
        command = ["make", "--silent", "--old-file=.venv/dev", "dist"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        assert (done.stdout, done.stderr) == ("found\n", "")

    def test_kubernetes_tools(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        program(folder / "python", f"echo $1 $2 > '{folder}/called'; exit 7")
        monkeypatch.setattr(sys, "executable", str(folder / "python"))
        with pytest.raises(subprocess.CalledProcessError):
            kubernetes_tools.main(folder / "tools")
        assert (folder / "called").read_text() == "-m pip\n"


@pytest.mark.parametrize("venv", [False, True])
def test_a_python_without_venv_is_not_enough(venv: bool, tmp_path: Path) -> None:
    """All other tools are there; Debian's package python3.11 has no ensurepip."""
    script = ROOT / "scripts/install-test-tools.sh"
    tools = next(line for line in script.read_text().splitlines() if line.startswith("tools=("))
    names = tools.removeprefix("tools=(").rstrip(")").split()
    for name in [*names, "chromium", "chromedriver", "install"]:
        program(tmp_path / name, "")
    program(tmp_path / "apt-get", f'echo "$@" >> {tmp_path}/called')
    program(tmp_path / "python3.11", f"[ \"$2\" != 'import ensurepip' ] || exit {int(not venv)}")
    subprocess.run(["/bin/bash", script], env=os.environ | {"PATH": str(tmp_path)}, check=True)
    called = tmp_path / "called"
    installs = "install -qy python3.11 python3.11-venv libpython3.11\n"
    assert (called.read_text() if called.exists() else "") == (
        "" if venv else f"update -q\n{installs}"
    )
