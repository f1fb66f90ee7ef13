"""Helpers for servers under serve.py, and the stand-in for Triton."""

from __future__ import annotations

import os
import subprocess
import sys
import urllib.request
from pathlib import Path

from supervisor.api import CONTROL_HEADER
from supervisor.procfs import children, cpu_seconds

from support.models import ROOT
from support.servers import start

SERVE = ROOT / "model/api/serve.py"


def ended(**environment: str) -> tuple[int, str]:
    """Start a server that is expected to end by itself; return its exit code and stderr."""
    process = start(**environment)
    _, output = process.communicate(timeout=120)
    return process.returncode, output


def stopped(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Stop a server; return its exit code and the rest of its stderr."""
    process.terminate()
    _, output = process.communicate(timeout=30)
    return process.returncode, output


def health(address: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run ``serve.py --health`` against the server with this HTTP port or URL."""
    port = address.rpartition(":")[2]
    command = [sys.executable, str(SERVE), "--health", f"--http-port={port}"]
    return subprocess.run(
        command, env=os.environ | environment, check=False, capture_output=True, text=True
    )


def child_of(process: subprocess.Popen[str]) -> int:
    return children(process.pid)[0]


def stubs_of(process: subprocess.Popen[str]) -> list[int]:
    return children(child_of(process))


def computed(process: subprocess.Popen[str]) -> float:
    """Return the CPU seconds that the stubs have used so far."""
    return sum(map(cpu_seconds, stubs_of(process)))


def control(url: str, action: str) -> int:
    """Load or unload the model with the secret "s"; return the HTTP status."""
    address = f"{url}/v2/repository/models/npair/{action}"
    request = urllib.request.Request(address, b"{}", {CONTROL_HEADER: "s"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return int(answer.status)


def standin(folder: Path, fault: str) -> dict[str, str]:
    """Install standin.py as Triton; return the environment in which serve.py finds it."""
    wheel = folder / "pytriton"
    (wheel / "tritonserver/backends/python").mkdir(parents=True)
    (wheel / "tritonserver/bin").mkdir()
    (wheel / "__init__.py").touch()
    program = wheel / "tritonserver/bin/tritonserver"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} {ROOT}/tests/support/standin.py "$@"\n')
    program.chmod(0o755)
    log = str(folder / "late")
    return {"PYTHONPATH": str(folder), "STANDIN_FAULT": fault, "STANDIN_LOG": log}
