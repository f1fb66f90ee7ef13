"""The processes and shared memory of the server and its Python stubs, from /proc and /dev/shm."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path


def children(pid: int) -> list[int]:
    """Process ids of all children, whichever thread started them. Raises: OSError if it ended."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        try:
            found += map(int, (task / "children").read_text(encoding="ascii").split())
        except OSError:  # a thread that ended; the main thread lasts as long as the process
            if task.name == str(pid):
                raise
    return found


def stat(pid: int) -> list[str]:
    """The fields of /proc/pid/stat from the third, the state (proc(5)).

    Raises: OSError if the process has ended.
    """
    text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    return text.rpartition(")")[2].split()


def cpu_seconds(pid: int) -> float:
    """CPU time of all threads so far. Raises: OSError if the process has ended."""
    return sum(map(int, stat(pid)[11:13])) / os.sysconf("SC_CLK_TCK")  # utime and stime


def arguments(pid: int) -> list[str]:
    """The command line of a process, empty if it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace").split("\0")
    except OSError:
        return []


def processes() -> list[int]:
    """All process ids that this user can see."""
    return [int(path.name) for path in Path("/proc").iterdir() if path.name.isdecimal()]


def dead_stubs(server: int | None) -> set[int]:
    """Stubs that are dead, which Triton neither reaps nor replaces; empty if there is no server.

    Golden photos do not reveal them: the other instances answer most of those.
    """
    dead = set()
    with contextlib.suppress(OSError):
        for child in children(server) if server else []:
            if stat(child)[0] == "Z":
                dead.add(child)
    return dead


def stub_count(server: int) -> int:
    """The number of stubs, dead ones included; 0 if the server has ended."""
    with contextlib.suppress(OSError):
        return len(children(server))
    return 0


def stub_seconds(server: int | None) -> float:
    """CPU time of all stubs so far, in seconds; 0 if there is no server."""
    with contextlib.suppress(OSError):
        return sum(map(cpu_seconds, children(server))) if server else 0.0
    return 0.0


def region_prefix(port: int) -> str:
    """Prefix of this server's shared-memory regions.

    It is unique: two servers cannot have the same HTTP port in the same network namespace.
    """
    return f"npair_{Path('/proc/self/ns/net').stat().st_ino}_{port}_"


def shared_regions(port: int) -> set[Path]:
    """The shared-memory regions of the server with this HTTP port, running or killed."""
    return set(Path("/dev/shm").glob(f"{region_prefix(port)}*"))


def server_at(port: int) -> int | None:
    """Process id of the server with this HTTP port, None if this user can see none.

    Its --backend-config tells: serve.py, and servers in other network namespaces, can have the
    same --http-port.
    """
    end = f"={region_prefix(port)}"
    found = (pid for pid in processes() if any(text.endswith(end) for text in arguments(pid)))
    return next(found, None)


def remove_remains(port: int) -> None:
    """Kill the stubs of a killed server, which may wait for it forever, and remove its shared
    memory, which outlives the container in a pod. A server that runs or starts is left alone.
    """
    if server_at(port):
        return
    prefix = region_prefix(port)
    for process in processes():
        if any(text.startswith(prefix) for text in arguments(process)):
            with contextlib.suppress(OSError):
                os.kill(process, signal.SIGKILL)
    for region in shared_regions(port):
        with contextlib.suppress(OSError):
            region.unlink()
