"""Run a command beside a cluster of two machines, and leave nothing of it behind.

    .venv/bin/python scripts/with_cluster.py kubernetes bash
    .venv/bin/python scripts/with_cluster.py swarm bash

The cluster is real: Docker Swarm, or Kubernetes with etcd, API server, scheduler, controllers,
kubelets and kube-proxies, built from Debian's source and cached. Each machine has a Docker engine
with the image npair_model_api. All runs in namespaces of processes, mounts and networks, which end
with the command; that finds docker, kubectl and helm on PATH and set up.

Needs: root on Debian 12 on x86-64, and the .venv of `make install`.
NPAIR_CLUSTER_CACHE: folder of what takes long to build (~/.cache/npair/kubernetes).
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from cluster.binaries import binaries
from cluster.image import archive
from image.commands import CACHE, ROOT, end_in_order, step
from image.engine import ENGINE, TOOLS, unpack, use
from image.packages import install

NEEDED = (*TOOLS, "conntrack", "dnsmasq-base", "etcd-server", "iptables", "jq", "openssl", "socat")


def main(kind: str, command: list[str]) -> int:
    end_in_order()
    cache = Path(os.environ.get("NPAIR_CLUSTER_CACHE") or CACHE / "kubernetes")
    cache.mkdir(parents=True, exist_ok=True)
    install(*NEEDED)
    archive(cache)
    if kind == "kubernetes":
        binaries(cache)
    with tempfile.TemporaryDirectory(prefix="npair-cluster-") as folder:
        scratch = Path(folder)
        use(engine(cache), scratch / "docker")
        try:
            return apart([sys.executable, "-m", "cluster", kind, scratch, cache, *command])
        finally:
            remove_cgroups(scratch.name)


def engine(cache: Path) -> Path:
    """Return a folder for ``use``; fill it unless the cache has it."""
    found = cache / "engine"
    if not found.exists():
        step("download an engine")
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            unpack(Path(folder) / "engine", *ENGINE)
            (Path(folder) / "engine").rename(found)
    return found


def apart(command: list[object]) -> int:
    """Run a command in namespaces of its own; whatever it started ends with it."""
    names = ["--fork", "--pid", "--mount-proc", "--kill-child", "--mount", "--net"]
    words = ["unshare", *names, *map(str, command)]
    path = filter(None, (str(ROOT / "scripts"), os.environ.get("PYTHONPATH")))
    with subprocess.Popen(words, env=os.environ | {"PYTHONPATH": ":".join(path)}) as process:
        try:
            return process.wait()
        except BaseException:
            # The first process of the namespace, with which all others end before unshare does.
            first = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
            for child in map(int, first.split()):
                os.kill(child, signal.SIGKILL)
            raise


def remove_cgroups(name: str) -> None:
    for parent in Path("/sys/fs/cgroup").glob(f"*/{name}"):
        for folder in sorted(parent.rglob("*/"), reverse=True):
            with contextlib.suppress(OSError):
                folder.rmdir()
        parent.rmdir()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
