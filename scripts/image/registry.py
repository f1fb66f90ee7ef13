"""A registry that answers to ghcr.io, what is pushed there, and its promotion."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from image.commands import background, output, run, status, wait_for

OWNER, PASSWORD = "tester", "not-a-secret"
REPOSITORY = f"ghcr.io/{OWNER}/npair_model_api"
REGISTRY_ADDRESS = "127.0.0.88"  # a loopback address that nothing else uses


@contextlib.contextmanager
def open_registry(scratch: Path) -> Iterator[str]:
    """Run a registry on loopback that asks for no password. Yields: its address."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    config = {
        "version": 0.1,
        "log": {"level": "error", "accesslog": {"disabled": True}},
        "storage": {"filesystem": {"rootdirectory": str(scratch / "registry")}},
        "http": {"addr": f"127.0.0.1:{port}"},
    }
    (scratch / "registry.json").write_text(json.dumps(config))  # JSON is YAML
    command = ["docker-registry", "serve", scratch / "registry.json"]
    with background(command, scratch / "registry.log"):
        wait_for("the registry", lambda: status("127.0.0.1", port, "GET", "/v2/") == 200)
        yield f"127.0.0.1:{port}"


@contextlib.contextmanager
def registry_at_ghcr(scratch: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run a registry with a password.

    This process and its children, among them the engine, reach it as ghcr.io.
    """
    hosts = scratch / "hosts"
    hosts.write_text(Path("/etc/hosts").read_text() + f"\n{REGISTRY_ADDRESS} ghcr.io\n")
    run("mount", "--bind", hosts, "/etc/hosts")
    (scratch / "htpasswd").write_text(output("htpasswd", "-nbB", OWNER, PASSWORD))
    config = {
        "version": 0.1,
        "log": {"level": "error", "accesslog": {"disabled": True}},
        "storage": {"filesystem": {"rootdirectory": str(scratch / "registry")}},
        "http": {"addr": f"{REGISTRY_ADDRESS}:80"},
        "auth": {"htpasswd": {"realm": "npair", "path": str(scratch / "htpasswd")}},
    }
    (scratch / "registry.json").write_text(json.dumps(config))  # JSON is YAML
    with background(
        ["docker-registry", "serve", scratch / "registry.json"], scratch / "registry.log"
    ) as process:
        wait_for("the registry", lambda: status(REGISTRY_ADDRESS, 80, "GET", "/v2/") == 401)
        yield process


def login() -> None:
    """Log in to the registry, as the pipeline does."""
    command = ("docker", "login", "--username", OWNER, "--password-stdin", "ghcr.io")
    run(*command, stdin=PASSWORD, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def push(tag: str) -> str:
    """Push a tag. Returns: its digest."""
    run("docker", "push", "--quiet", f"{REPOSITORY}:{tag}", stdout=subprocess.DEVNULL)
    return digest_of(tag)


def digest_of(tag: str) -> str:
    return output(
        "skopeo",
        "inspect",
        "--tls-verify=false",
        "--format",
        "{{.Digest}}",
        f"docker://{REPOSITORY}:{tag}",
    ).strip()


def promote(digest: str) -> None:
    options = "--src-tls-verify=false --dest-tls-verify=false"  # the registry is on this machine
    ref = ("--ref", "refs/heads/main")
    command = (sys.executable, "scripts/release.py", "promote", REPOSITORY, digest, *ref)
    run(*command, env={"SKOPEO_OPTIONS": options})
