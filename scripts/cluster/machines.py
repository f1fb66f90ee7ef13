"""Machines of a cluster: each a network, mounts and a Docker engine of its own, on one bridge."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from image.commands import run, wait_for
from image.engine import daemon

GATEWAY = "10.99.0.1"  # the clients' address, and that of what decides in the cluster
BRIDGE = "machines"

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
class Machine:
    """number: from 1 on. folder: where its state goes."""

    number: int
    folder: Path

    @property
    def name(self) -> str:
        return f"node-{self.number}"

    @property
    def address(self) -> str:
        return f"10.99.0.{10 + self.number}"

    @property
    def containers(self) -> str:
        """The first three numbers of its containers' addresses."""
        return f"10.98.{self.number}"


def bridge() -> None:
    """Make the network that the machines share; one of this process's own namespace."""
    shell(
        "ip link set lo up",
        f"ip link add {BRIDGE} type bridge",
        f"ip addr add {GATEWAY}/24 dev {BRIDGE}",
        f"ip link set {BRIDGE} up",
        f"ip route add default dev {BRIDGE}",
        "echo 1 > /proc/sys/net/ipv4/ip_forward",
    )


@contextlib.contextmanager
def running(machine: Machine) -> Iterator[tuple[list[str], str]]:
    """Run a machine. Yields: a command that runs another on it, and its engine's address."""
    machine.folder.mkdir()
    runc = machine.folder / "runc"
    runc.write_text(RUNC)
    runc.chmod(0o755)
    with (
        namespaces(machine) as within,
        daemon(
            machine.folder,
            f"--bip={machine.containers}.1/24",
            "--ip-masq=false",  # containers see each other's own addresses
            f"--add-runtime=lenient={runc}",
            "--default-runtime=lenient",
            within=within,
        ) as engine,
    ):
        yield within, engine


@contextlib.contextmanager
def namespaces(machine: Machine) -> Iterator[list[str]]:
    """Make a machine's network and mounts. Yields: a command that runs another in them."""
    command = ["unshare", "--net", "--mount", "sleep", "infinity"]
    with subprocess.Popen(command) as process:
        own, its = Path("/proc/self/ns/net"), Path(f"/proc/{process.pid}/ns/net")
        wait_for("a namespace", lambda: its.readlink() != own.readlink())
        within = ["nsenter", f"--target={process.pid}", "--net", "--mount"]
        shell(
            f"ip link add {machine.name} type veth peer name eth0 netns {process.pid}",
            f"ip link set {machine.name} master {BRIDGE} up",
            f"ip route add {machine.containers}.0/24 via {machine.address}",
        )
        shell(
            "mount -t tmpfs tmpfs /run",
            "mount -t tmpfs tmpfs /var/log",
            "ip link set lo up",
            f"ip addr add {machine.address}/24 dev eth0",
            "ip link set eth0 up",
            f"ip route add default via {GATEWAY}",
            "echo 1 > /proc/sys/net/ipv4/ip_forward",
            within=within,
        )
        try:
            yield within
        finally:
            process.kill()


def shell(*commands: str, within: Sequence[str] = ()) -> None:
    run(*within, "sh", "-ec", "\n".join(commands))
