"""A node of the cluster, with network, mounts and Docker engine of its own."""

from __future__ import annotations

import contextlib
import json
import stat
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cluster.image import load
from image.commands import background, run, wait_for
from image.engine import daemon

GATEWAY = "10.99.0.1"  # this machine, where the control plane and the clients are
BRIDGE = "nodes"

# Root without CAP_SYS_RESOURCE, as in some sandboxes, can lower no process's OOM score.
RUNC = """\
#!/bin/bash
previous=
for word; do
  case $previous in
    --bundle|-b)
      config=$word/config.json
      jq '.process.oomScoreAdj |= ([., 0] | max)' "$config" > "$config.new"
      mv "$config.new" "$config"
  esac
  previous=$word
done
exec runc "$@"
"""


@dataclass(frozen=True)
class Node:
    """A number from 1 on, and a folder for its state."""

    number: int
    folder: Path

    @property
    def name(self) -> str:
        return f"node-{self.number}"

    @property
    def address(self) -> str:
        return f"10.99.0.{10 + self.number}"

    @property
    def pods(self) -> str:
        """The first three numbers of the addresses of its pods."""
        return f"10.98.{self.number}"


def bridge() -> None:
    """Make the network that the nodes share; one of this process's own namespace."""
    run(
        "sh",
        "-ec",
        f"""
        ip link set lo up
        ip link add {BRIDGE} type bridge
        ip addr add {GATEWAY}/24 dev {BRIDGE}
        ip link set {BRIDGE} up
        ip route add default dev {BRIDGE}
        echo 1 > /proc/sys/net/ipv4/ip_forward
    """,
    )


@contextlib.contextmanager
def namespaces(node: Node) -> Iterator[list[str]]:
    """Make a node's network and mounts. Yields: a command that runs another in them."""
    command = ["unshare", "--net", "--mount", "sleep", "infinity"]
    with subprocess.Popen(command) as process:
        own, its = Path("/proc/self/ns/net"), Path(f"/proc/{process.pid}/ns/net")
        wait_for("a namespace", lambda: its.readlink() != own.readlink())
        within = ["nsenter", f"--target={process.pid}", "--net", "--mount"]
        run(
            "sh",
            "-ec",
            f"""
            ip link add {node.name} type veth peer name eth0 netns {process.pid}
            ip link set {node.name} master {BRIDGE} up
            ip route add {node.pods}.0/24 via {node.address}
        """,
        )
        run(
            *within,
            "sh",
            "-ec",
            f"""
            mount -t tmpfs tmpfs /run
            mount -t tmpfs tmpfs /var/log
            ip link set lo up
            ip addr add {node.address}/24 dev eth0
            ip link set eth0 up
            ip route add default via {GATEWAY}
            echo 1 > /proc/sys/net/ipv4/ip_forward
        """,
        )
        yield within
        process.kill()


@contextlib.contextmanager
def running(node: Node, kubeconfig: Path, images: Path, pause: Path, cgroup: str) -> Iterator[None]:
    """Run a node with the images of an archive. cgroup: its parent for the pods."""
    folder = node.folder
    folder.mkdir()
    runc = folder / "runc"
    runc.write_text(RUNC)
    runc.chmod(runc.stat().st_mode | stat.S_IXUSR)
    for controller in Path("/sys/fs/cgroup").iterdir():
        with contextlib.suppress(OSError):
            (controller / cgroup).mkdir(parents=True, exist_ok=True)
    options = [
        f"--bip={node.pods}.1/24",
        "--ip-masq=false",  # pods see each other's own addresses
        f"--add-runtime=patient={runc}",
        "--default-runtime=patient",
    ]
    with contextlib.ExitStack() as stack:
        within = stack.enter_context(namespaces(node))
        docker = stack.enter_context(daemon(folder, *options, within=within))
        load(images, pause, docker)
        for command in (kubelet(node, kubeconfig, docker, cgroup), proxy(kubeconfig, node.name)):
            stack.enter_context(background([*within, *command], folder / f"{command[0]}.log"))
        yield


def kubelet(node: Node, kubeconfig: Path, docker: str, cgroup: str) -> list[str]:
    folder = node.folder
    settings = {
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "authentication": {"anonymous": {"enabled": True}, "webhook": {"enabled": False}},
        "authorization": {"mode": "AlwaysAllow"},
        "cgroupDriver": "cgroupfs",
        "cgroupRoot": cgroup,
        "clusterDNS": [GATEWAY],
        "clusterDomain": "cluster.local",
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
        f"--docker-endpoint={docker}",
        f"--container-runtime-endpoint=unix://{folder}/dockershim.sock",
        f"--experimental-dockershim-root-directory={folder}/dockershim",
        "--network-plugin=",
        "--pod-infra-container-image=pause",
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
        "--conntrack-max-per-core=0",
        "--conntrack-tcp-timeout-established=0",
        "--conntrack-tcp-timeout-close-wait=0",
        "--oom-score-adj=0",
    ]
