"""A registry that answers to ghcr.io, what is pushed there, and its promotion."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
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
    with _running(scratch, "127.0.0.1", port):
        yield f"127.0.0.1:{port}"


@contextlib.contextmanager
def registry_at_ghcr(scratch: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run a registry with a password.

    This process and its children, among them the engine, reach it as ghcr.io.
    """
    hosts, passwords = scratch / "hosts", scratch / "htpasswd"
    hosts.write_text(Path("/etc/hosts").read_text() + f"\n{REGISTRY_ADDRESS} ghcr.io\n")
    run("mount", "--bind", hosts, "/etc/hosts")
    passwords.write_text(output("htpasswd", "-nbB", OWNER, PASSWORD))
    auth = {"htpasswd": {"realm": "npair", "path": str(passwords)}}
    with _running(scratch, REGISTRY_ADDRESS, 80, auth=auth) as process:
        yield process


@contextlib.contextmanager
def _running(
    scratch: Path, host: str, port: int, **settings: object
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a registry, and wait until it answers: with 401 if ``auth`` is among its settings."""
    config = {
        "version": 0.1,
        "log": {"level": "error", "accesslog": {"disabled": True}},
        "storage": {"filesystem": {"rootdirectory": str(scratch / "registry")}},
        "http": {"addr": f"{host}:{port}"},
        **settings,
    }
    (scratch / "registry.json").write_text(json.dumps(config))  # JSON is YAML
    command = ["docker-registry", "serve", scratch / "registry.json"]
    wanted = 401 if "auth" in settings else 200
    with background(command, scratch / "registry.log") as process:
        wait_for("the registry", lambda: status(host, port, "GET", "/v2/") == wanted)
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
    """Give cpu to a digest; make release-dry-run tries what main and tags check before that."""
    options = "--src-tls-verify=false --dest-tls-verify=false"  # the registry is on this machine
    run("scripts/promote.sh", REPOSITORY, digest, "cpu", env={"SKOPEO_OPTIONS": options})
