"""Commands of containers' engines, and the death of a container."""

from __future__ import annotations

import os
import signal
import subprocess
from contextlib import suppress
from pathlib import Path


def call(*command: str, stdin: str | None = None) -> str:
    """Run a command. Returns: what it prints to stdout. Fails the test if it fails."""
    result = subprocess.run(
        command, input=stdin, capture_output=True, text=True, check=False, timeout=600
    )
    assert result.returncode == 0, f"{' '.join(command)}: {result.stdout}{result.stderr}"
    return result.stdout


def kill(container: str) -> None:
    """Kill all processes of a container at once, as the kernel does if memory runs out."""
    assert len(container) == 64, f"not the id of a container: {container!r}"
    for path in Path("/proc").glob("[0-9]*/cgroup"):
        with suppress(OSError):
            if container in path.read_text():
                os.kill(int(path.parent.name), signal.SIGKILL)
