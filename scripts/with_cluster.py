"""Run a command beside a Kubernetes cluster of two nodes, and leave nothing of it behind.

    .venv/bin/python scripts/with_cluster.py bash

The cluster is real: etcd, API server, scheduler, controllers, kubelets and kube-proxies, built from
Debian's source and cached, with a Docker engine for each node. All of it runs in namespaces of
processes, mounts and networks, which end with the command. The command finds kubectl and helm on
PATH and the image npair_model_api on every node.

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
from image.commands import ROOT, step
from image.engine import TOOLS, unpack
from image.packages import install

NEEDED = (*TOOLS, "conntrack", "dnsmasq-base", "etcd-server", "iptables", "jq", "openssl", "socat")


def main(command: list[str]) -> int:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: sys.exit("interrupted"))  # runs every finally block
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    cache = Path(os.environ.get("NPAIR_CLUSTER_CACHE") or Path(home) / "npair/kubernetes")
    cache.mkdir(parents=True, exist_ok=True)
    install(*NEEDED)
    found = binaries(cache), archive(cache)
    with tempfile.TemporaryDirectory(prefix="npair-cluster-") as folder:
        scratch = Path(folder)
        step("unpack an engine")
        unpack(scratch)
        try:
            return apart([sys.executable, "-m", "cluster", scratch, *found, *command])
        finally:
            remove_cgroups(scratch.name)


def apart(command: list[object]) -> int:
    """Run a command in namespaces of its own; whatever it started ends with it."""
    names = ["--fork", "--pid", "--mount-proc", "--kill-child", "--mount", "--net"]
    words = ["unshare", *names, *map(str, command)]
    path = filter(None, (str(ROOT / "scripts"), os.environ.get("PYTHONPATH")))
    with subprocess.Popen(words, env=os.environ | {"PYTHONPATH": ":".join(path)}) as process:
        try:
            return process.wait()
        finally:
            process.kill()


def remove_cgroups(name: str) -> None:
    for parent in Path("/sys/fs/cgroup").glob(f"*/{name}"):
        for folder in sorted(parent.rglob("*/"), reverse=True):
            with contextlib.suppress(OSError):
                folder.rmdir()
        parent.rmdir()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
