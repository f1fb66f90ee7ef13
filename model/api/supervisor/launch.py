"""How Triton is found and started: its flags, its environment, its limits, and the secret."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import os
import re
import secrets
import signal
import subprocess
import sys
import sysconfig
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from supervisor.api import CONTROL_HEADER, called
from supervisor.logs import log
from supervisor.options import MODEL
from supervisor.preflight import IMAGE_SERVER, ServeError, in_url, store_location
from supervisor.procfs import region_prefix, stat
from supervisor.tls import grpc_tls

if TYPE_CHECKING:
    from supervisor.options import Options

if sys.platform != "win32":  # on Windows, preflight must still run to reject the platform
    import resource

CONTROL_APIS = "model-repository,shared-memory,trace,logging"
# Limit of one HTTP request, for releases of Triton with such a limit (2.51 has none): three photos
# of the largest size, or 64 of 1 MiB.
MAX_REQUEST_BYTES = 64 << 20
# Stack of each thread of the server. If the content type is application/x-www-form-urlencoded,
# curl's default, Triton's HTTP library puts two arrays of the body's length on the stack.
STACK_BYTES = 4 * MAX_REQUEST_BYTES
# Beyond the usual soft limit of 1,024, connections go unanswered, the golden photo's included.
OPEN_FILES = 65_536
FEWEST_FILES = 1_024  # below which there is a warning
OWN_FILES = 64  # of a server without connections
# By default glibc retains the memory of the largest requests, hundreds of MB. With these
# (mallopt(3)), blocks of 8 MiB or more return to the system when they are freed, and each arena
# keeps at most 16 MiB at its end.
ALLOCATOR = {
    "MALLOC_ARENA_MAX": "2",
    "MALLOC_MMAP_THRESHOLD_": str(8 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(16 << 20),
}
# Percentiles of latency, over the last minute: each as quantile:error.
SUMMARIES = ("summary_latencies=true", "summary_quantiles=0.5:0.05,0.95:0.01,0.99:0.001")
METRICS_ADDRESS = "NPAIR_METRICS_ADDRESS"  # the variable in which the model reads it
SHELL_SAFE = re.compile("[A-Za-z0-9/._+@%-]+")  # needs no quotes in a shell, no escape in PATH
SCRATCH_PARENTS = ("/tmp", "/var/tmp", "/dev/shm")


@dataclass(frozen=True)
class Triton:
    """A server found on this machine. scratch: a folder for links."""

    program: Path
    backends: Path
    environment: dict[str, str]
    scratch: Path


def scratch_folder() -> tempfile.TemporaryDirectory[str]:
    """A new folder for links, in TMPDIR if possible, whose path is safe in a shell command.

    Raises: ServeError if none can be made.
    """
    for given in filter(None, [os.environ.get("TMPDIR"), *SCRATCH_PARENTS]):
        parent = str(Path.cwd() / given)
        if SHELL_SAFE.fullmatch(parent):
            with contextlib.suppress(OSError):
                return tempfile.TemporaryDirectory(prefix="npair-serve-", dir=parent)
    raise ServeError(
        f"no folder for temporary files: {', '.join(SCRATCH_PARENTS)} cannot be written; "
        "set TMPDIR to a folder that can, whose path has only ASCII letters, digits and /._-"
    )


def shell_safe(path: str, link: Path) -> str:
    """The path, or a link to it if a shell or an ASCII locale could not take the path.

    Triton starts stubs by a bash command line without quotes; Python in a stub encodes paths as
    ASCII.
    """
    path = str(Path.cwd() / path)  # not resolved: a link in it may be changed later
    if SHELL_SAFE.fullmatch(path):
        return path
    link.symlink_to(path)
    return str(link)


def find_triton(scratch: Path) -> Triton:
    """The image's server, else the one inside the wheel nvidia-pytriton.

    Raises: ServeError if there is neither.
    """
    environment = {**ALLOCATOR, **os.environ}
    environment.pop("NPAIR_CONTROL_SECRET", None)  # no stub needs it
    if (IMAGE_SERVER / "bin/tritonserver").is_file():
        program, backends = IMAGE_SERVER / "bin/tritonserver", IMAGE_SERVER / "backends"
        return Triton(program, backends, environment, scratch)
    package = importlib.util.find_spec("pytriton")
    if package is None or package.origin is None:
        raise ServeError(
            "no Triton server found: use the image, or install the wheel nvidia-pytriton with: "
            "make serve"
        )
    return triton_in(Path(package.origin).parent, environment, scratch)


def triton_in(wheel: Path, environment: dict[str, str], scratch: Path) -> Triton:
    """The server in the wheel, with its Python backend and its stub put together in scratch."""
    python = f"{sys.version_info[0]}.{sys.version_info[1]}"
    stub = "triton_python_backend_stub"
    backend = scratch / "python"
    backend.mkdir()
    for file in (wheel / "tritonserver/backends/python").iterdir():
        (backend / file.name).symlink_to(file)
    (backend / stub).symlink_to(wheel / "tritonserver/python_backend_stubs" / python / stub)
    # A stub takes its packages from the first python3 on PATH: it must be the one that runs this.
    programs = shell_safe(sys.prefix, scratch / "prefix") + "/bin"
    libraries = [
        shell_safe(str(wheel.parent / "nvidia_pytriton.libs"), scratch / "libraries"),
        *(shell_safe(folder, scratch / "libpython") for folder in libpython_folder(python)),
        *filter(None, [environment.get("LD_LIBRARY_PATH")]),
    ]
    environment = {
        **environment,
        "PATH": f"{programs}:{environment.get('PATH', os.defpath)}",
        "LD_LIBRARY_PATH": ":".join(libraries),
    }
    return Triton(wheel / "tritonserver/bin/tritonserver", scratch, environment, scratch)


def libpython_folder(python: str) -> list[str]:
    """The folder of this Python's shared library, none if the loader finds it by itself.

    Raises: ServeError if there is no such library.
    """
    name = f"libpython{python}.so.1.0"
    for folder in (sysconfig.get_config_var("LIBDIR"), Path(sys.base_prefix) / "lib"):
        if folder and (Path(folder) / name).is_file():
            return [str(folder)]
    try:
        ctypes.CDLL(name)
    except OSError:
        raise ServeError(
            f"{name} is missing: install it (Debian and Ubuntu: apt install libpython{python}), "
            "or choose a Python that was built with it"
        ) from None
    return []


def given_secret() -> str:
    """The secret for control APIs, empty if none is set.

    Read from the file NPAIR_CONTROL_SECRET_FILE, else from NPAIR_CONTROL_SECRET. Raises: ServeError
    if the file cannot be read or the secret cannot be a header of both protocols.
    """
    file = os.environ.get("NPAIR_CONTROL_SECRET_FILE")
    secret = os.environ.get("NPAIR_CONTROL_SECRET", "")
    if file:
        try:
            secret = Path(file).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ServeError(f"NPAIR_CONTROL_SECRET_FILE cannot be read: {error}") from error
    if secret and not re.fullmatch("[!-~]([ -~]*[!-~])?", secret):
        name = "the secret in NPAIR_CONTROL_SECRET_FILE" if file else "NPAIR_CONTROL_SECRET"
        raise ServeError(
            f"{name} must be one line of printable ASCII, for example of: openssl rand -hex 32"
        )
    return secret


def hide_secret(server: int) -> None:
    """Overwrite the secret in a server's command line, which every user of this machine can read.

    Triton has its own copy once it logs. Raises: OSError if that is not permitted.
    """
    command_line = Path(f"/proc/{server}/cmdline").read_bytes()
    start = int(stat(server)[45])  # arg_start
    with Path(f"/proc/{server}/mem").open("r+b", buffering=0) as memory:
        for secret in re.finditer(rb"(?<=%s=)[^\0]+" % CONTROL_HEADER.encode(), command_line):
            memory.seek(start + secret.start())
            # Random, so that it would open nothing even if a server came to read it.
            memory.write(secrets.token_hex(len(secret[0])).encode()[: len(secret[0])])


def repository_for(repository: str, scratch: Path) -> str:
    """The model repository as Triton takes it."""
    if "://" in repository:
        return store_location(repository)
    return shell_safe(repository, scratch / "models")


def command(options: Options, triton: Triton, secret: str) -> list[str]:
    """Triton's command line. A flag that this release does not know is left out.

    secret: for control APIs. Triton takes it only as a flag; see hide_secret. Raises: ServeError
    if Triton does not run or cannot protect what it serves.
    """
    described = subprocess.run(
        [triton.program, "--help"],
        env=triton.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    known = set(re.findall(r"^\s*(--[a-z0-9-]+)", described.stdout, re.MULTILINE))
    if "--model-repository" not in known:
        raise ServeError(f"{triton.program} does not run: {described.stdout.strip()[-500:]}")
    protection = {
        "--http-restricted-api": f"{CONTROL_APIS}:{CONTROL_HEADER}={secret}",
        "--grpc-restricted-protocol": f"{CONTROL_APIS}:{CONTROL_HEADER}={secret}",
        **grpc_tls(options),
    }
    missing = sorted(protection.keys() - known)
    if missing:
        raise ServeError(
            f"{triton.program} does not know {', '.join(missing)}, and would serve without; "
            "take a newer release"
        )
    flags = {**server_flags(options, triton), **protection}
    return [
        str(triton.program),
        *(f"{flag}={value}" for flag, value in flags.items() if flag in known),
        # Completing config.pbtxt, which is complete, would import the model and torch once more.
        *({"--disable-auto-complete-config"} & known),
        *(f"--metrics-config={s}" for s in SUMMARIES if "--metrics-config" in known),
        *(f"--trace-config={setting}" for setting in trace_settings(options)),
    ]


def server_flags(options: Options, triton: Triton) -> dict[str, object]:
    """Triton's flags that take a value, without those that protect it."""
    # Triton's HTTP library reads "[::1]" as the address of all interfaces, without an error.
    http_host = f"ipv6:{options.host}" if ":" in options.host else options.host
    prefix = region_prefix(options.http_port)
    return {
        "--model-repository": repository_for(options.model_repository, triton.scratch),
        "--backend-directory": triton.backends,
        "--backend-config": f"python,shm-region-prefix-name={prefix}",
        # Versions are loaded when they are asked for, never because a file appeared.
        "--model-control-mode": "explicit",
        "--load-model": MODEL,
        # If a version is refused, the one before it may be served.
        "--exit-on-error": "false",
        # Otherwise one refused load makes the server "not ready" although the old version answers.
        "--strict-readiness": "false",
        "--http-address": http_host,
        "--http-port": options.http_port,
        "--grpc-address": in_url(options.host),
        "--grpc-port": options.grpc_port,
        # Otherwise the largest gRPC requests so far stay in memory, each twice.
        "--grpc-infer-allocation-pool-size": 0,
        "--metrics-address": http_host,
        "--metrics-port": options.metrics_port,
        "--allow-gpu-metrics": "false",
        "--pinned-memory-pool-byte-size": 0,
        "--http-max-input-size": MAX_REQUEST_BYTES,
        "--exit-timeout-secs": options.drain,
    }


def trace_settings(options: Options) -> list[str]:
    """Triton's settings of OpenTelemetry traces, none without a collector."""
    if not options.trace_url:
        return []
    return [
        "mode=opentelemetry",
        "level=TIMESTAMPS",
        f"rate={options.trace_rate}",
        f"opentelemetry,url={options.trace_url}",
        f"opentelemetry,resource=service.name={MODEL}",
    ]


def stack_bytes() -> int:
    """The stack limit for the server: at least STACK_BYTES unless the hard limit is lower.

    glibc gives each thread a stack of this size, but only 2 MiB if it is unlimited.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_STACK)
    unlimited = resource.RLIM_INFINITY
    if soft != unlimited and soft >= STACK_BYTES:
        return soft
    if hard == unlimited or hard >= STACK_BYTES:
        return STACK_BYTES
    log.warning(
        f"the stack's hard limit is {hard >> 20} MiB: form-encoded requests of more than "
        f"about {hard >> 21} MiB, such as curl sends by default, can end the server; "
        f"allow {STACK_BYTES >> 20} MiB: ulimit -s {STACK_BYTES >> 10}, "
        f"docker run --ulimit stack={STACK_BYTES}, or LimitSTACK={STACK_BYTES >> 20}M"
    )
    return hard


def open_files() -> int:
    """The limit of open files for the server: OPEN_FILES unless the hard limit is lower."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < FEWEST_FILES:
        log.warning(
            f"the hard limit of open files is {hard}: the server may not start, and "
            f"connections beyond about {max(0, hard - OWN_FILES)} go unanswered; "
            f"allow {OPEN_FILES}: ulimit -n {OPEN_FILES}, "
            f"docker run --ulimit nofile={OPEN_FILES}, or LimitNOFILE={OPEN_FILES}"
        )
    return max(soft, min(hard, OPEN_FILES))


def start(options: Options, arguments: list[str], triton: Triton) -> subprocess.Popen[bytes]:
    """Start the server. Call this from the main thread before there are others: the server dies
    with the thread that starts it.
    """
    stack, files = stack_bytes(), open_files()

    def prepare() -> None:
        resource.setrlimit(
            resource.RLIMIT_STACK, (stack, resource.getrlimit(resource.RLIMIT_STACK)[1])
        )
        resource.setrlimit(
            resource.RLIMIT_NOFILE, (files, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
        )
        # prctl(PR_SET_PDEATHSIG): however this process ends, no orphan holds the ports.
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)

    metrics = f"{in_url(called(options.host))}:{options.metrics_port}"
    return subprocess.Popen(
        arguments,
        env={**triton.environment, METRICS_ADDRESS: metrics},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # Ctrl-C reaches only this process, which ends the server in order
        preexec_fn=prepare,  # noqa: PLW1509 (no threads yet)
    )
