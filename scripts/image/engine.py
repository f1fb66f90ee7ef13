"""A Docker engine of its own, unpacked from Debian's packages."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

from image.commands import background, output, run, step, wait_for

# Packages of Debian trixie. They are unpacked, since installing would start the servers. They also
# run on bookworm, whose own engine does not support named build contexts.
ENGINE = (
    "docker.io",
    "docker-cli",
    "docker-buildx",
    "docker-compose",
    "containerd",
    "docker-registry",
    "tini",
)
TOOLS = ("runc", "skopeo", "debootstrap", "docker-compose", "iproute2", "apache2-utils")


def install_tools(*tools: str) -> None:
    """Install what the engine and the pipeline call, unless it is installed."""
    step("install the tools")
    missing = [tool for tool in tools if not installed(tool)]
    if missing:
        run("apt-get", "update", "-qq")
        run("apt-get", "install", "-qqy", "--no-install-recommends", *missing)


def installed(package: str) -> bool:
    return (
        "install ok installed"
        in subprocess.run(
            ["dpkg-query", "--show", "--showformat", "${Status}", package],
            capture_output=True,
            text=True,
            check=False,
        ).stdout
    )


def unpack(scratch: Path, *wanted: str) -> None:
    """Unpack packages of Debian trixie; set PATH and DOCKER_CONFIG to use them."""
    packages, lists = scratch / "packages", scratch / "apt"
    for folder in (packages, lists / "lists/partial", lists / "cache/archives/partial"):
        folder.mkdir(parents=True)
    sources = lists / "trixie.sources"
    sources.write_text(
        "Types: deb\nURIs: http://deb.debian.org/debian\nSuites: trixie\nComponents: main\n"
        "Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg\n"
    )
    apt = {"Dir::Etc::SourceList": sources, "Dir::Etc::SourceParts": "/dev/null"}
    apt |= {
        "Dir::State::Lists": lists / "lists",
        "Dir::Cache": lists / "cache",
        "APT::Sandbox::User": "root",
    }
    flags = [f"-o={name}={value}" for name, value in apt.items()]
    run("apt-get", *flags, "update", "-qq")
    run("apt-get", *flags, "-qq", "download", *wanted, cwd=packages)
    for package in packages.iterdir():
        run("dpkg-deb", "--extract", package, scratch / "engine")
    programs = scratch / "engine/usr"
    plugins = scratch / "docker/cli-plugins"
    plugins.mkdir(parents=True)
    (plugins / "docker-buildx").symlink_to(programs / "libexec/docker/cli-plugins/docker-buildx")
    os.environ["PATH"] = f"{programs}/bin:{programs}/sbin:{os.environ['PATH']}"
    os.environ["DOCKER_CONFIG"] = str(scratch / "docker")


@contextlib.contextmanager
def engine(scratch: Path, *, containerd: bool = False) -> Iterator[None]:
    """Run a separate Docker engine; set PATH, DOCKER_HOST and DOCKER_CONFIG to use it.

    containerd: keep images in containerd's store, without which builds have no attestations and
    cannot set the times of files.
    """
    step("start an engine")
    unpack(scratch, *ENGINE)
    os.environ["DOCKER_HOST"] = f"unix://{scratch}/docker.sock"
    folders = [f"--{name}={scratch / name}" for name in ("data-root", "exec-root")]
    command = [
        "dockerd",
        *folders,
        f"--pidfile={scratch}/pid",
        f"--host=unix://{scratch}/docker.sock",
        "--insecure-registry=ghcr.io",
        "--iptables=false",  # no rules to leave behind; builds use the host's network
        "--ip6tables=false",
    ]
    if containerd:
        (scratch / "engine.json").write_text('{"features": {"containerd-snapshotter": true}}')
        command.append(f"--config-file={scratch}/engine.json")
    bridge = Path("/sys/class/net/docker0")
    had_bridge = bridge.exists()
    with background(command, scratch / "dockerd.log"):
        wait_for(
            "the engine",
            lambda: (
                subprocess.run(["docker", "info"], capture_output=True, check=False).returncode == 0
            ),
        )
        try:
            yield
        finally:
            containers = output("docker", "ps", "--all", "--quiet").split()
            if containers:
                run("docker", "rm", "--force", "--volumes", *containers, stdout=subprocess.DEVNULL)
            run("docker", "network", "prune", "--force", stdout=subprocess.DEVNULL)
    if bridge.exists() and not had_bridge:
        run("ip", "link", "delete", "docker0")
