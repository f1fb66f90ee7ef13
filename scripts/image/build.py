"""Build the image, on a stand-in for NVIDIA's unless TRITON_IMAGE and BASE_IMAGE name real ones."""

from __future__ import annotations

import contextlib
import http.server
import importlib.util
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from image.commands import ROOT, output, run

WHEEL_RELEASE = "24.10"  # of NVIDIA's images, with the wheel's server, 2.51


def build(tag: str, *options: str, context: Path = ROOT / "model/api", fails: bool = False) -> str:
    """Build one tag from the Dockerfile in ``context``, with the models baked in.

    fails: whether the build must fail. Returns: its output.
    """
    command = [
        "docker",
        "buildx",
        "build",
        "--progress",
        "plain",
        "--build-context",
        "model_repository=model_repository",
    ]
    command += ["--file", str(context / "Dockerfile.cpu"), "--tag", tag, *options, str(context)]
    environment = os.environ | {
        "SOURCE_DATE_EPOCH": output("git", "log", "-1", "--pretty=%ct").strip()
    }
    result = subprocess.run(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if (result.returncode != 0) != fails:
        print(result.stdout[-5000:])
        raise SystemExit(f"the build of {tag} {'did not fail' if fails else 'failed'}")
    return result.stdout


def debian(root: Path, architecture: str = "amd64") -> None:
    """Install Debian into a folder; another machine's needs an emulator, see arm64.py."""
    options = (f"--arch={architecture}", "--variant=minbase")
    run("debootstrap", *options, "bookworm", root, stdout=subprocess.DEVNULL)


def stand_in(scratch: Path) -> tuple[str, str]:
    """Build an image with the layout of NVIDIA's, and its base, Debian, also of the final image.

    Returns: their names.
    """
    root = scratch / "debian"
    debian(root)
    return stand_in_of(scratch, root, package_folder("pytriton"), "amd64")


def stand_in_of(scratch: Path, root: Path, wheel: Path, architecture: str) -> tuple[str, str]:
    """Do as ``stand_in`` with a Debian in ``root`` and the package pytriton in ``wheel``."""
    triton, base = "npair-standin/tritonserver", "npair-standin/debian"
    run(
        "sh",
        "-c",
        f"tar -C {root} --exclude=./var/cache/apt --exclude=./var/lib/apt/lists/* -c . "
        f"| docker import --platform linux/{architecture} --message debian - {base}",
    )
    context = scratch / "stand-in"
    server = context / "opt/tritonserver"
    shutil.copytree(wheel / "tritonserver/bin", server / "bin")
    shutil.copytree(wheel / "tritonserver/caches", server / "caches")
    shutil.copytree(
        wheel / "tritonserver/backends",
        server / "backends",
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    shutil.copy(
        wheel / "tritonserver/python_backend_stubs/3.11/triton_python_backend_stub",
        server / "backends/python",
    )
    # In the folder itself, or in one that newer builds of wheels have.
    shutil.copy(next(wheel.parent.glob("nvidia_pytriton-*.dist-info/**/LICENSE")), server)
    shutil.copytree(
        wheel.parent / "nvidia_pytriton.libs",
        server / "lib",
        ignore=shutil.ignore_patterns("libpython3*"),
    )
    (context / "Dockerfile").write_text(
        f"FROM {base}\n"
        "RUN apt-get update && apt-get install -y --no-install-recommends libpython3.11 libgomp1\n"
        f"ENV NVIDIA_TRITON_SERVER_VERSION={WHEEL_RELEASE}\n"
        "COPY opt /opt\n"
        "RUN echo /opt/tritonserver/lib > /etc/ld.so.conf.d/tritonserver.conf && ldconfig\n"
    )
    run(
        "docker",
        "buildx",
        "build",
        "--quiet",
        "--platform",
        f"linux/{architecture}",
        "--network",
        "host",
        "--tag",
        triton,
        context,
        stdout=subprocess.DEVNULL,
    )
    return triton, base


@contextlib.contextmanager
def wheelhouse(scratch: Path, *pinned: str) -> Iterator[list[str]]:
    """Serve pip's packages from this process, since a build may have no network.

    pinned: the requirements of the build, as paths below model/.
    Yields: the build options that make pip use them.
    """
    wheels = scratch / "wheels"
    for pins in pinned:
        run(
            sys.executable,
            "-m",
            "pip",
            "--quiet",
            "download",
            "--dest",
            wheels,
            "--requirement",
            ROOT / "model" / pins,
        )
    with served(wheels, scratch) as options:
        yield options


@contextlib.contextmanager
def served(wheels: Path, scratch: Path) -> Iterator[list[str]]:
    """Serve a folder of wheels. Yields: the build options that make pip use them."""
    handler = partial(QuietHandler, directory=str(wheels))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        pip_conf = scratch / "pip.conf"
        pip_conf.write_text(
            f"[global]\nno-index = true\nfind-links = http://127.0.0.1:{server.server_port}/\n"
        )
        yield ["--secret", f"id=pip_conf,src={pip_conf}"]
        server.shutdown()


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


def package_folder(name: str) -> Path:
    found = importlib.util.find_spec(name)
    if found is None or found.origin is None:
        raise SystemExit(
            f"{name} is not installed; run this with the Python of .venv, as make test-image does"
        )
    return Path(found.origin).parent
