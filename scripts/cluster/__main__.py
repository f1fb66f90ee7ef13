"""Run a command beside a cluster, inside namespaces that scripts/with_cluster.py makes.

Arguments: a folder for its state, one of binaries, the archive of an image, and the command. It
finds KUBECONFIG, PATH and the names of Services set.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

from cluster.binaries import PAUSE
from cluster.control_plane import control_plane
from cluster.names import names
from cluster.node import GATEWAY, Node, bridge, proxy, running
from image.commands import background, output, step, wait_for

NODES = 2


def main(scratch: Path, binaries: Path, images: Path, command: list[str]) -> int:
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, lambda *_: sys.exit("interrupted"))  # runs every finally block
    os.environ["PATH"] = f"{binaries}:{os.environ['PATH']}"
    bridge()
    with contextlib.ExitStack() as stack:
        step("start the control plane")
        api = stack.enter_context(control_plane(scratch, GATEWAY))
        kubeconfig = scratch / "kubeconfig"
        os.environ["KUBECONFIG"] = str(kubeconfig)
        stack.enter_context(names(scratch, GATEWAY, api))
        stack.enter_context(background(proxy(kubeconfig, "clients"), scratch / "kube-proxy.log"))
        step("start the nodes")
        for number in range(1, NODES + 1):
            node = Node(number, scratch / str(number))
            # A kubelet removes the groups of pods that it does not know.
            cgroup = f"{scratch.name}/{number}"
            stack.enter_context(running(node, kubeconfig, images, binaries / PAUSE, cgroup))
        ready = partial(output, "kubectl", "get", "nodes")
        wait_for("the nodes", lambda: ready().count(" Ready ") == NODES, 180)
        step("run")
        return subprocess.run(command, check=False).returncode


if __name__ == "__main__":
    folder, binaries, images, *command = sys.argv[1:]
    sys.exit(main(Path(folder), Path(binaries), Path(images), command))
