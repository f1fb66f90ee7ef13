"""Run commands and wait for their effects."""

from __future__ import annotations

import contextlib
import http.client
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BEGAN = time.monotonic()
# Of what takes long to build or to download, outside the work tree.
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "npair"
RAW = {"Inference-Header-Content-Length": "0"}  # Triton's: the body is the input


def end_in_order() -> None:
    """Let SIGINT and SIGTERM end this process by way of every finally block."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: sys.exit("interrupted"))


@contextlib.contextmanager
def scratch_folder(prefix: str) -> Iterator[tuple[Path, contextlib.ExitStack]]:
    """Provide a folder, and a stack whose contexts end before the folder is removed."""
    end_in_order()
    with (
        tempfile.TemporaryDirectory(prefix=prefix, ignore_cleanup_errors=True) as folder,
        contextlib.ExitStack() as stack,
    ):
        yield Path(folder), stack


def step(title: str) -> None:
    print(f"== {time.monotonic() - BEGAN:5.0f} s  {title}", flush=True)


def run(
    *command: object,
    cwd: Path = ROOT,
    stdin: str | None = None,
    stdout: int | None = None,
    stderr: int | None = None,
    env: Mapping[str, str] | None = None,
) -> None:
    """Run a command and raise if it fails. env: added to this process's environment."""
    words = [str(word) for word in command]
    subprocess.run(
        words,
        cwd=cwd,
        env={**os.environ, **(env or {})},
        input=stdin,
        text=True,
        stdout=stdout,
        stderr=stderr,
        check=True,
    )


def output(*command: object) -> str:
    return subprocess.run(
        [str(part) for part in command], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True
    ).stdout


@contextlib.contextmanager
def background(command: Sequence[object], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run a process during the block; print the end of its log if the block fails."""
    with (
        log.open("wb") as file,
        subprocess.Popen([str(part) for part in command], stdout=file, stderr=file) as process,
    ):
        try:
            yield process
        except BaseException:
            print(log.read_text(errors="replace")[-2000:], file=sys.stderr)
            raise
        finally:
            process.terminate()


def wait_for(what: str, condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise SystemExit(f"{what} did not come within {seconds:.0f} s")
        time.sleep(0.2)


def status(
    host: str,
    port: int,
    method: str,
    path: str,
    body: bytes | None = None,
    *,
    headers: Mapping[str, str] = RAW,
) -> int:
    """Send a request; a body is one raw photo. Returns: the HTTP status, 0 without an answer."""
    connection = http.client.HTTPConnection(host, port, timeout=30)
    try:
        connection.request(method, path, body, {} if body is None else dict(headers))
        return connection.getresponse().status
    except (OSError, http.client.HTTPException):
        return 0
    finally:
        connection.close()
