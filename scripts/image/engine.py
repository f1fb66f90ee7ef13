"""A Docker engine of its own, unpacked from Debian's packages."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

from image.commands import background, output, run, step, wait_for
from image.packages import apt_get, install

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
    install(*tools)


def unpack(folder: Path, *wanted: str) -> None:
    """Download packages of Debian trixie, and unpack them below a folder."""
    packages = folder / "packages"
    packages.mkdir(parents=True)
    run(*apt_get(folder / "apt", "trixie"), "download", *wanted, cwd=packages)
    for package in packages.iterdir():
        run("dpkg-deb", "--extract", package, folder / "engine")


def use(folder: Path, configuration: Path) -> None:
    """Set PATH and DOCKER_CONFIG to use what was unpacked into a folder."""
    programs, plugins = folder / "engine/usr", configuration / "cli-plugins"
    plugins.mkdir(parents=True)
    (plugins / "docker-buildx").symlink_to(programs / "libexec/docker/cli-plugins/docker-buildx")
    os.environ["PATH"] = f"{programs}/bin:{programs}/sbin:{os.environ['PATH']}"
    os.environ["DOCKER_CONFIG"] = str(configuration)


@contextlib.contextmanager
def daemon(folder: Path, *options: str, within: Sequence[str] = ()) -> Iterator[str]:
    """Run the engine with its data in a folder. within: a command that runs another.

    Yields: its address, for DOCKER_HOST.
    """
    address = f"unix://{folder}/docker.sock"
    command = [
        *within,
        "dockerd",
        *(f"--{name}={folder / name}" for name in ("data-root", "exec-root", "pidfile")),
        f"--host={address}",
        "--iptables=false",  # no rules to leave behind; builds use the host's network
        "--ip6tables=false",
        *options,
    ]
    with background(command, folder / "dockerd.log"):
        info = ["docker", "--host", address, "info"]
        wait_for(
            "the engine",
            lambda: subprocess.run(info, capture_output=True, check=False).returncode == 0,
        )
        yield address


@contextlib.contextmanager
def engine(scratch: Path, *, containerd: bool = False) -> Iterator[None]:
    """Run a separate Docker engine; set PATH, DOCKER_HOST and DOCKER_CONFIG to use it.

    containerd: keep images in containerd's store, without which builds have no attestations and
    cannot set the times of files.
    """
    step("start an engine")
    unpack(scratch, *ENGINE)
    use(scratch, scratch / "docker")
    options = ["--insecure-registry=ghcr.io"]
    if containerd:
        (scratch / "engine.json").write_text('{"features": {"containerd-snapshotter": true}}')
        options.append(f"--config-file={scratch}/engine.json")
    bridge = Path("/sys/class/net/docker0")
    had_bridge = bridge.exists()
    with daemon(scratch, *options) as os.environ["DOCKER_HOST"]:
        try:
            yield
        finally:
            containers = output("docker", "ps", "--all", "--quiet").split()
            if containers:
                run("docker", "rm", "--force", "--volumes", *containers, stdout=subprocess.DEVNULL)
            run("docker", "network", "prune", "--force", stdout=subprocess.DEVNULL)
    if bridge.exists() and not had_bridge:
        run("ip", "link", "delete", "docker0")
