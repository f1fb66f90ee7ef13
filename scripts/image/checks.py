"""What an image must do: pass its tests under Compose, drain, recover, and stay small."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from image.commands import RAW, ROOT, output, run, status, wait_for
from image.registry import OWNER, REPOSITORY

LIMITS = {"torch": (1300, 420), "no torch": (800, 260)}  # MB unpacked and pushed
MOST_SEARCH = 800  # MB unpacked
PORTS = {
    "HTTP_PORT": "18400",
    "GRPC_PORT": "18401",
    "METRICS_PORT": "18402",
    "SEARCH_PORT": "18403",
}


def check_size(kind: str, tag: str, digest: str) -> None:
    unpacked = (
        int(output("docker", "image", "inspect", "--format", "{{.Size}}", f"{REPOSITORY}:{tag}"))
        / 1e6
    )
    manifest = json.loads(
        output(
            "skopeo", "inspect", "--raw", "--tls-verify=false", f"docker://{REPOSITORY}@{digest}"
        )
    )
    pushed = sum(layer["size"] for layer in manifest["layers"]) / 1e6
    print(f"{kind}: {unpacked:.0f} MB unpacked, {pushed:.0f} MB pushed")
    most_unpacked, most_pushed = LIMITS[kind]
    assert unpacked <= most_unpacked, f"more than {most_unpacked} MB"
    assert pushed <= most_pushed, f"more than {most_pushed} MB"


def compose_test(tag: str) -> None:
    """Run the pipeline's tests by Compose 2, and by 1.29 if Debian has it."""
    for program in ("docker-compose", "/usr/bin/docker-compose"):
        print("Compose", output(program, "version", "--short").strip(), flush=True)
        try:
            compose(
                tag,
                "run",
                "--rm",
                "model_api",
                "pytest",
                "-q",
                "test_model_api.py",
                program=program,
            )
        finally:
            compose(tag, "down", program=program)


def compose(tag: str, *arguments: str, program: str = "docker-compose") -> None:
    command = [program, "--file", "docker-compose.prod.yml", *arguments]
    run(*command, stderr=subprocess.DEVNULL, env={"GHCR_USERNAME": OWNER, "TAG": tag, **PORTS})


def check_drain(image: str) -> None:
    """Check that SIGTERM ends the server with code 0 within 10 s and loses no accepted request.

    Requests are in flight and idle connections open when the signal comes.
    """
    name = "npair-drain"
    run("docker", "run", "--detach", "--name", name, "--read-only", "--tmpfs", "/tmp",
        "--cap-drop", "ALL", "--user", "1000", "--publish", "127.0.0.1:18410:8000", image,
        stdout=subprocess.DEVNULL)  # fmt: skip
    wait_for("the container", lambda: embed(18410) == 200)
    idle = []
    for _ in range(8):
        connection = http.client.HTTPConnection("127.0.0.1", 18410)
        connection.request("GET", "/v2/health/ready")
        connection.getresponse().read()
        idle.append(connection)  # kept open
    statuses: list[int] = []
    accepted = threading.Barrier(17)

    def send() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", 18410, timeout=30)
        connection.request("POST", "/v2/models/npair/infer", photo(), RAW)
        accepted.wait()
        statuses.append(connection.getresponse().status)

    threads = [threading.Thread(target=send) for _ in range(16)]
    for thread in threads:
        thread.start()
    accepted.wait()
    time.sleep(0.1)  # by now the requests have arrived
    began = time.monotonic()
    # The grace period of docker-compose.prod.yml.
    run("docker", "stop", "--time", "15", name, stdout=subprocess.DEVNULL)
    took = time.monotonic() - began
    for thread in threads:
        thread.join()
    code = output("docker", "inspect", "--format", "{{.State.ExitCode}}", name).strip()
    print(
        f"exit code {code} after {took:.1f} s; {statuses.count(200)} of {len(threads)} requests "
        "answered"
    )
    assert (code, statuses) == ("0", [200] * len(threads))
    assert took < 10, "longer than Docker waits by default"
    run("docker", "rm", name, stdout=subprocess.DEVNULL)


def check_recovery(tag: str) -> None:
    """Kill a Python stub, and check that all requests are answered again within 20 s."""
    port = int(PORTS["HTTP_PORT"])

    def works() -> bool:
        # While one instance is dead, the other still answers its share.
        return all(embed(port) == 200 for _ in range(20))

    compose(tag, "up", "--detach", "model_api")
    try:
        wait_for("the service", lambda: embed(port) == 200)
        container = output("docker", "ps", "--quiet", "--filter", "name=model_api").strip()
        stub = re.search(
            r"^ *(\d+) .*triton_python_backend_stub",
            output("docker", "top", container, "-eo", "pid,args"),
            re.MULTILINE,
        )
        assert stub, "no stub runs"
        began = time.monotonic()
        os.kill(int(stub[1]), signal.SIGKILL)
        wait_for("the end of the old server", lambda: embed(port) == 0)
        wait_for("the new server", works)
        took = time.monotonic() - began
        print(f"inference answered again {took:.1f} s after a stub was killed")
        assert took <= 20
    finally:
        compose(tag, "down")


def check_search(tag: str, scratch: Path, options: Sequence[str]) -> None:
    """Build the search's image; build a gallery with it, and search that with a key."""
    run("docker", "buildx", "build", "--quiet", "--file", "model/web/Dockerfile", *options,
        "--tag", "npair_search", "--load", ".", stdout=subprocess.DEVNULL)  # fmt: skip
    size = int(output("docker", "image", "inspect", "--format", "{{.Size}}", "npair_search")) / 1e6
    print(f"search: {size:.0f} MB unpacked")
    assert size <= MOST_SEARCH, f"more than {MOST_SEARCH} MB"
    photos, gallery, key = scratch / "photos", scratch / "gallery", "k" * 32
    photos.mkdir()
    (photos / "photo.jpg").write_bytes(photo())
    gallery.mkdir()
    gallery.chmod(0o777)  # the container's user is another one
    os.environ |= {"GALLERY": str(gallery), "PHOTOS": str(photos), "NPAIR_WEB_KEY": key}
    port, headers = int(PORTS["SEARCH_PORT"]), {"Authorization": f"Bearer {key}"}
    try:
        compose(tag, "up", "--detach", "model_api")
        wait_for("the service", lambda: embed(int(PORTS["HTTP_PORT"])) == 200)
        # Not at /gallery, where the profile's own mount is read-only.
        builds = ("npair", "index", "build", "/photos", "--index", "/new")
        mount = ("--volume", f"{gallery}:/new")
        compose(tag, "--profile", "search", "run", "--rm", "--no-deps", *mount, "search", *builds)
        compose(tag, "--profile", "search", "up", "--detach", "--no-build", "search")
        for path, body in (("/", None), ("/healthz", None), ("/search?k=1", photo())):
            method = "GET" if body is None else "POST"
            answered = partial(status, "127.0.0.1", port, method, path, body, headers=headers)
            wait_for(f"200 at {path}", lambda answered=answered: answered() == 200)  # type: ignore[misc]
        assert status("127.0.0.1", port, "POST", "/search", photo()) == 401, "a key is needed"
        container = output("docker", "ps", "--quiet", "--filter", "name=search").strip()
        health = ("docker", "inspect", "--format", "{{.State.Health.Status}}", container)
        wait_for("its health", lambda: output(*health).strip() == "healthy")
    finally:
        compose(tag, "--profile", "search", "down")


def embed(port: int) -> int:
    """Send a golden photo. Returns: the HTTP status, 0 if there is no answer."""
    return status("127.0.0.1", port, "POST", "/v2/models/npair/infer", photo())


def photo() -> bytes:
    return next((ROOT / "model_repository/npair").glob("*/golden/photo.jpg")).read_bytes()
