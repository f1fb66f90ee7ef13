"""Kubernetes on two nodes, and a kube-proxy and the names of Services for the clients."""

from __future__ import annotations

import contextlib
import json
import os
from functools import partial
from pathlib import Path

from cluster.binaries import PAUSE
from cluster.control_plane import control_plane
from cluster.image import load, load_program
from cluster.machines import GATEWAY, Machine, running
from cluster.names import DOMAIN, names
from image.commands import background, output, step, wait_for

NODES = 2


def start(stack: contextlib.ExitStack, scratch: Path, binaries: Path, images: Path) -> None:
    """Start it; set KUBECONFIG, and PATH to find kubectl and helm."""
    os.environ["PATH"] = f"{binaries}:{os.environ['PATH']}"
    step("start the control plane")
    api = stack.enter_context(control_plane(scratch, GATEWAY))
    kubeconfig = scratch / "kubeconfig"
    os.environ["KUBECONFIG"] = str(kubeconfig)
    stack.enter_context(names(scratch, GATEWAY, api))
    stack.enter_context(background(proxy(kubeconfig, "clients"), scratch / "kube-proxy.log"))
    step("start the nodes")
    for number in range(1, NODES + 1):
        node = Machine(number, scratch / str(number))
        within, engine = stack.enter_context(running(node))
        load(images, engine)
        load_program(binaries / PAUSE, engine)
        # A kubelet removes the groups of pods that it does not know.
        cgroup = f"{scratch.name}/{number}"
        for command in (kubelet(node, kubeconfig, engine, cgroup), proxy(kubeconfig, node.name)):
            log = node.folder / f"{command[0]}.log"
            stack.enter_context(background([*within, *command], log))
    nodes = partial(output, "kubectl", "get", "nodes")
    wait_for("the nodes", lambda: nodes().count(" Ready ") == NODES, 180)


def kubelet(node: Machine, kubeconfig: Path, engine: str, cgroup: str) -> list[str]:
    """Return the command of a node's kubelet. cgroup: the parent of its pods' groups."""
    folder, groups = node.folder, Path("/sys/fs/cgroup")
    for controller in groups.iterdir():
        with contextlib.suppress(OSError):
            (controller / cgroup).mkdir(parents=True, exist_ok=True)
    # The weight that the pods of all nodes would have beside the machine's other processes if their
    # groups were not below one.
    weight = NODES * 1024 * len(os.sched_getaffinity(0))
    (groups / "cpu" / cgroup).parent.joinpath("cpu.shares").write_text(str(weight))
    settings = {
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "authentication": {"anonymous": {"enabled": True}, "webhook": {"enabled": False}},
        "authorization": {"mode": "AlwaysAllow"},
        "cgroupDriver": "cgroupfs",
        "cgroupRoot": cgroup,
        "clusterDNS": [GATEWAY],
        "clusterDomain": DOMAIN,
        "enforceNodeAllocatable": [],
        # What the machine lacks because of others is no reason to evict.
        "evictionHard": {"memory.available": "50Mi", "nodefs.available": "1%"},
        "failSwapOn": False,
        "imageGCHighThresholdPercent": 100,
        "oomScoreAdj": 0,
    }
    (folder / "kubelet.json").write_text(json.dumps(settings))
    return [
        "kubelet",
        f"--config={folder}/kubelet.json",
        f"--kubeconfig={kubeconfig}",
        f"--root-dir={folder}/kubelet",
        f"--cert-dir={folder}",
        "--container-runtime=docker",
        f"--docker-endpoint={engine}",
        f"--container-runtime-endpoint=unix://{folder}/dockershim.sock",
        f"--experimental-dockershim-root-directory={folder}/dockershim",
        f"--pod-infra-container-image={PAUSE}",
        f"--hostname-override={node.name}",
        f"--node-ip={node.address}",
    ]


def proxy(kubeconfig: Path, name: str) -> list[str]:
    """Return the command that makes Services' addresses work in a network namespace."""
    return [
        "kube-proxy",
        f"--kubeconfig={kubeconfig}",
        f"--hostname-override={name}",
        "--proxy-mode=iptables",
        # These limits are the machine's, not a namespace's.
        "--conntrack-max-per-core=0",
        "--conntrack-tcp-timeout-established=0",
        "--conntrack-tcp-timeout-close-wait=0",
        "--oom-score-adj=0",
    ]
