"""Start NVIDIA Triton with npair's model repository, watch it, and stop it in order.

The one place that knows Triton's flags: the image, compose, make and the tests all start the server through it. It stays the parent
of the server, because the server's own word is not enough: after a Python stub died, its readiness URLs stay green and every
inference that it is given fails. So a golden photo of the version is embedded once a second, over the HTTP port that clients use.
Where that fails for 10 seconds, or a stub is dead, the server is ended and the exit code is 1, for whatever restarts containers to
act on.

SIGTERM and SIGINT unload the model, which answers what it has accepted, and then end the server; the exit code is 0 where it did.

Standard library only, and plain syntax, so that it can tell on a bare machine what is missing.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import errno
import http.client
import importlib.util
import json
import math
import os
import platform
import re
import secrets
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from array import array
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from queue import Empty, SimpleQueue
from types import FrameType
from typing import IO

if sys.platform != "win32":  # where check_platform has to tell
    import resource

MODEL = "npair"
IMAGE_SERVER = Path("/opt/tritonserver")
CONTROL_APIS = "model-repository,shared-memory,trace,logging"
CONTROL_HEADER = "npair-control-secret"
# Of one HTTP request, in bytes, where Triton has a limit (2.51 has none): three photos of the largest size, or 64 of 1 MiB.
MAX_REQUEST_BYTES = 64 << 20
# Of each of the server's threads, in bytes. Triton's HTTP library puts two arrays of the body's length on a thread's stack when the
# content type is application/x-www-form-urlencoded, as curl's is by default. A stack takes memory as it is used, and keeps it.
STACK_BYTES = 4 * MAX_REQUEST_BYTES
# At once, where the hard limit allows it. Beyond the usual soft limit of 1,024, connections go unanswered, the golden photo's too.
OPEN_FILES = 65_536
# glibc would by itself come to keep what the largest requests took, hundreds of MB. With these (mallopt(3)), pieces of 8 MiB or
# more go back to the system when they are freed, and of the rest each arena keeps no more than 16 MiB at its end.
ALLOCATOR = {"MALLOC_ARENA_MAX": "2", "MALLOC_MMAP_THRESHOLD_": str(8 << 20), "MALLOC_TRIM_THRESHOLD_": str(16 << 20)}
SHELL_SAFE = re.compile("[A-Za-z0-9/._+@%-]+")  # paths that need no quotes in a shell and no escape in PATH
SCRATCH_PARENTS = ("/tmp", "/var/tmp", "/dev/shm")
FALLBACK = "fallback.json"  # beside config.pbtxt: the configuration of the version that was served before

# What CUDA builds of the server call an error on every machine without a GPU.
NOISE = "CudaDriverHelper has not been initialized"

# Triton's log lines: a level, date and time, process, source and what is said, in quotes like JSON's.
LOG_LINE = re.compile(r"([IWEF])\d{4} [\d:.]+ \d+ ([^:\]]+):\d+\] (.*)")
LEVELS = {"I": "info", "W": "warning", "E": "error", "F": "error"}
ABOUT_REQUEST = re.compile(r"(photo refused|request failed): (\{.*\})")  # as a version's model.py says it

START_TIMEOUT = 120.0  # seconds until the server must be ready; it takes about 3
DOWNLOAD_TIMEOUT = 900.0  # the same where it downloads the model first, from an object store
WATCH_INTERVAL = 1.0  # seconds between two golden photos
PROBE_TIMEOUT = 5.0  # seconds for one golden photo
LOAD_TIMEOUT = 120.0  # seconds for loading another version than the pinned one
UNHEALTHY_AFTER = 10.0  # seconds of failing golden photos after which the server is ended
WORKING_FOR = 600.0  # the same where the stubs compute all the time: a request of 64 of the largest photos takes minutes
IDLE_AFTER = 0.5  # seconds in which stubs compute next to nothing, after which none of them has a request

# The wheel's Python backend was built for numpy 1, which Python 3.13 has no build of.
WHEEL_PYTHONS = ((3, 10), (3, 12))
WHEEL_GLIBC = (2, 35)


class ServeError(RuntimeError):
    """Why the server cannot be started or had to be ended, in one sentence."""


@dataclass(frozen=True)
class Triton:
    """A server found on this machine: its program, its backends, the environment that it needs, and a folder for links."""

    program: Path
    backends: Path
    environment: dict[str, str]
    scratch: Path


def main() -> int:
    """Returns: the exit code: 0 after an orderly stop, 1 otherwise, with the reason on stderr."""
    options = parse_arguments()
    try:
        check_platform()
        if options.check:
            return 0
        options.host = address_of(options.host)
        folder = None if "://" in options.model_repository else Path(options.model_repository, MODEL)
        prober = GoldenProber(folder, options.host, options.http_port)
        if options.health:
            prober.server = server_at(options.http_port)
            if dead_stubs(prober.server):
                raise ProbeError("a Python stub of the model died")
            prober.probe()
            return 0
        if folder and not (folder / "config.pbtxt").is_file():
            raise ServeError(f"no model repository at {options.model_repository}: it has no {MODEL}/config.pbtxt")
        check_ports(
            {"HTTP_PORT": options.http_port, "GRPC_PORT": options.grpc_port, "METRICS_PORT": options.metrics_port}, options.host
        )
        with scratch_folder() as scratch:
            return Supervisor(options, find_triton(Path(scratch)), prober).run()
    except BusyError:
        return 0  # to be restarted would help nobody
    except (ServeError, ProbeError) as error:
        say(str(error), "error")
        return 1


def parse_arguments() -> argparse.Namespace:
    """Options, each with an environment variable for its default."""
    env = os.environ
    parser = argparse.ArgumentParser(description="Serve npair's model repository with NVIDIA Triton.")
    mounted, checkout = Path("/models"), (Path(__file__).parent / "../../model_repository").resolve()
    repository = env.get("MODEL_REPOSITORY", mounted if (mounted / MODEL).is_dir() else checkout)
    parser.add_argument(
        "--model-repository", default=str(repository), help="MODEL_REPOSITORY, a folder, s3:// or gs:// (%(default)s)"
    )
    parser.add_argument(
        "--host", default=env.get("BIND_ADDRESS", "127.0.0.1"), help="BIND_ADDRESS, address or name to listen on (%(default)s)"
    )
    parser.add_argument("--http-port", type=int, default=env.get("HTTP_PORT", "8000"), help="HTTP_PORT (%(default)s)")
    parser.add_argument("--grpc-port", type=int, default=env.get("GRPC_PORT", "8001"), help="GRPC_PORT (%(default)s)")
    parser.add_argument("--metrics-port", type=int, default=env.get("METRICS_PORT", "8002"), help="METRICS_PORT (%(default)s)")
    parser.add_argument(
        "--grpc-cert", default=env.get("GRPC_TLS_CERT"), help="GRPC_TLS_CERT, a certificate (PEM): gRPC speaks TLS alone"
    )
    parser.add_argument("--grpc-key", default=env.get("GRPC_TLS_KEY"), help="GRPC_TLS_KEY, the certificate's private key (PEM)")
    parser.add_argument(
        "--grpc-client-ca",
        default=env.get("GRPC_TLS_CLIENT_CA"),
        help="GRPC_TLS_CLIENT_CA, certificates (PEM) of who signs clients': others are refused",
    )
    parser.add_argument(
        "--start-timeout",
        type=float,
        default=env.get("START_SECONDS") or None,
        help=f"START_SECONDS, until the server must be ready ({START_TIMEOUT:.0f}; from an object store {DOWNLOAD_TIMEOUT:.0f})",
    )
    parser.add_argument("--drain", type=int, default=env.get("DRAIN_SECONDS", "7"), help="DRAIN_SECONDS, to stop in (%(default)s)")
    parser.add_argument(
        "--verbose",
        action="store_true",
        default=env.get("VERBOSE") == "1",
        help="VERBOSE=1, show all that the server logs, not only warnings and errors",
    )
    parser.add_argument(
        "--log-format",
        choices=("text", "json"),
        default=env.get("LOG_FORMAT") or "text",
        help="LOG_FORMAT, of a line (%(default)s)",
    )
    parser.add_argument(
        "--trace-url", default=env.get("TRACE_URL"), help="TRACE_URL, an OpenTelemetry collector's, like http://host:4318/v1/traces"
    )
    parser.add_argument(
        "--trace-rate", type=int, default=env.get("TRACE_RATE") or "100", help="TRACE_RATE, one of so many is traced (%(default)s)"
    )
    parser.add_argument("--check", action="store_true", help="only tell whether the server can run on this platform")
    parser.add_argument("--health", action="store_true", help="only tell whether a running server embeds its golden photo right")
    options = parser.parse_args()
    if options.log_format not in ("text", "json"):
        parser.error(f"LOG_FORMAT must be text or json, got {options.log_format}")
    if options.trace_rate < 1:
        parser.error(f"TRACE_RATE must be at least 1, got {options.trace_rate}")
    if options.start_timeout is None:
        options.start_timeout = DOWNLOAD_TIMEOUT if "://" in options.model_repository else START_TIMEOUT
    if not options.start_timeout > 0:
        parser.error(f"START_SECONDS must be more than 0, got {options.start_timeout}")
    Log.as_json = options.log_format == "json"
    return options


def check_platform() -> None:
    """Raises: ServeError where neither the image's server nor the wheel's can run."""
    if (IMAGE_SERVER / "bin/tritonserver").is_file():
        return
    if sys.platform != "linux" or platform.machine() != "x86_64":
        raise ServeError(
            f"the server needs Linux on x86-64, and this is {platform.system()} on {platform.machine()}; run the image instead"
        )
    lowest, highest = WHEEL_PYTHONS
    if not lowest <= sys.version_info[:2] <= highest:
        raise ServeError(
            f"the server needs Python {lowest[0]}.{lowest[1]} to {highest[0]}.{highest[1]}, and this is "
            f"{platform.python_version()}; choose another, for example: make serve PYTHON=python3.11"
        )
    library, version = platform.libc_ver()
    if library != "glibc" or tuple(map(int, version.split(".")[:2])) < WHEEL_GLIBC:
        raise ServeError(
            f"the server needs glibc {WHEEL_GLIBC[0]}.{WHEEL_GLIBC[1]} or newer, and this is {library or 'another libc'} {version}"
        )


def address_of(host: str) -> str:
    """The IP address of a host name or address, the IPv4 one where a name has both: Triton's HTTP server takes no names.

    Raises: ServeError where there is none.
    """
    try:
        found = socket.getaddrinfo(host.strip("[]"), None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise ServeError(f"cannot listen on {host}: {error}; set BIND_ADDRESS to an address of this machine") from error
    return str(min(found, key=lambda entry: entry[0] == socket.AF_INET6)[4][0])


def in_url(host: str) -> str:
    """An IP address as URLs have it."""
    return f"[{host}]" if ":" in host else host


def check_ports(ports: dict[str, int], host: str) -> None:
    """Raises: ServeError for the first port that cannot be bound; Triton itself would fail late and with less of a reason."""
    with contextlib.ExitStack() as listeners:
        for name, port in ports.items():
            listener = listeners.enter_context(socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET))
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                listener.bind((host, port))
                listener.listen()  # else two of the three could share a port
            except (OSError, OverflowError) as error:
                elsewhere = getattr(error, "errno", None) == errno.EADDRNOTAVAIL or isinstance(error, socket.gaierror)
                remedy = "set BIND_ADDRESS to an address of this machine" if elsewhere else f"set {name} to a free port"
                raise ServeError(f"cannot listen on {in_url(host)}:{port}: {error}; {remedy}") from error


def scratch_folder() -> tempfile.TemporaryDirectory[str]:
    """A new folder for the backends, TMPDIR's first, whose path can stand in a shell command. Raises: ServeError without one."""
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
    """This path, or a link to it where a shell or an ASCII locale would not take the path as it is.

    Triton starts its stubs by a bash command line, without quotes, and Python in a stub encodes paths as ASCII.
    """
    path = str(Path.cwd() / path)  # not resolved: a link in it may be changed later
    if SHELL_SAFE.fullmatch(path):
        return path
    link.symlink_to(path)
    return str(link)


def find_triton(scratch: Path) -> Triton:
    """The image's own server, else the one inside the wheel nvidia-pytriton, with its backends put together in ``scratch``.

    Raises: ServeError where there is none.
    """
    environment = ALLOCATOR | os.environ
    environment.pop("NPAIR_CONTROL_SECRET", None)  # no stub needs it
    if (IMAGE_SERVER / "bin/tritonserver").is_file():
        return Triton(IMAGE_SERVER / "bin/tritonserver", IMAGE_SERVER / "backends", environment, scratch)
    package = importlib.util.find_spec("pytriton")
    if package is None or package.origin is None:
        raise ServeError("no Triton server found: use the image, or install the wheel nvidia-pytriton with: make serve")
    wheel = Path(package.origin).parent
    python = f"{sys.version_info[0]}.{sys.version_info[1]}"
    backend = scratch / "python"
    backend.mkdir()
    for file in (wheel / "tritonserver/backends/python").iterdir():
        (backend / file.name).symlink_to(file)
    stub = "triton_python_backend_stub"
    (backend / stub).symlink_to(wheel / "tritonserver/python_backend_stubs" / python / stub)
    # The stub takes its packages from the python3 that it finds on PATH, which must be the one that runs this file.
    programs = shell_safe(sys.prefix, scratch / "prefix") + "/bin"
    environment["PATH"] = f"{programs}:{environment.get('PATH', os.defpath)}"
    own = shell_safe(str(wheel.parent / "nvidia_pytriton.libs"), scratch / "libraries")
    libraries = [own, *(shell_safe(folder, scratch / "libpython") for folder in libpython_folder(python))]
    environment["LD_LIBRARY_PATH"] = ":".join([*libraries, *filter(None, [environment.get("LD_LIBRARY_PATH")])])
    return Triton(wheel / "tritonserver/bin/tritonserver", scratch, environment, scratch)


def libpython_folder(python: str) -> list[str]:
    """The folder of this Python's shared library, or none where the loader finds it by itself. Raises: ServeError without one."""
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
    """The secret for control APIs: NPAIR_CONTROL_SECRET, or the content of NPAIR_CONTROL_SECRET_FILE; empty where there is none.

    Raises: ServeError for a file that cannot be read, or a secret that does not pass as a header of both protocols.
    """
    file = os.environ.get("NPAIR_CONTROL_SECRET_FILE")
    try:
        secret = Path(file).read_text(encoding="utf-8").strip() if file else os.environ.get("NPAIR_CONTROL_SECRET", "")
    except (OSError, UnicodeDecodeError) as error:
        raise ServeError(f"NPAIR_CONTROL_SECRET_FILE cannot be read: {error}") from error
    if secret and not re.fullmatch("[!-~]([ -~]*[!-~])?", secret):
        name = "the secret in NPAIR_CONTROL_SECRET_FILE" if file else "NPAIR_CONTROL_SECRET"
        raise ServeError(f"{name} must be one line of printable ASCII, for example of: openssl rand -hex 32")
    return secret


def hide_secret(server: int) -> None:
    """Overwrites the secret in a server's command line, which every user of this machine can read. Triton has copied it.

    Raises: OSError where that is not permitted.
    """
    command_line = Path(f"/proc/{server}/cmdline").read_bytes()
    start = int(stat_of(server)[45])  # arg_start
    with Path(f"/proc/{server}/mem").open("r+b", buffering=0) as memory:
        for secret in re.finditer(rb"(?<=%s=)[^\0]+" % CONTROL_HEADER.encode(), command_line):
            memory.seek(start + secret.start())
            # Random, so that nobody could know it if a server should yet come to read it.
            memory.write(secrets.token_hex(len(secret[0])).encode()[: len(secret[0])])


def grpc_tls(options: argparse.Namespace) -> dict[str, object]:
    """Triton's flags for TLS; none where no certificate is given. Raises: ServeError for what is missing or cannot be read."""
    files = {
        "--grpc-server-cert": ("--grpc-cert (GRPC_TLS_CERT)", options.grpc_cert),
        "--grpc-server-key": ("--grpc-key (GRPC_TLS_KEY)", options.grpc_key),
        "--grpc-root-cert": ("--grpc-client-ca (GRPC_TLS_CLIENT_CA)", options.grpc_client_ca),
    }
    given = {flag: path for flag, (_, path) in files.items() if path}
    if not given:
        return {}
    for flag in ("--grpc-server-cert", "--grpc-server-key"):
        if flag not in given:
            raise ServeError(f"TLS for gRPC needs a certificate and its key: set {files[flag][0]}, too")
    for flag, path in given.items():
        try:
            content = Path(path).read_bytes()
        except OSError as error:
            raise ServeError(f"{files[flag][0]} cannot be read: {error}") from error
        if b"-----BEGIN " not in content:
            raise ServeError(f"{files[flag][0]}: {path} is not PEM; convert it with openssl")
    return given | {"--grpc-use-ssl-mutual" if options.grpc_client_ca else "--grpc-use-ssl": "true"}


def region_prefix(port: int) -> str:
    """How the names begin of what the server with this HTTP port shares with its stubs: no other server can have both this port and
    this network namespace."""
    return f"npair_{Path('/proc/self/ns/net').stat().st_ino}_{port}_"


def shared_regions(port: int) -> set[Path]:
    """What the server with this HTTP port shares with its stubs, or one that was killed has left."""
    return set(Path("/dev/shm").glob(f"{region_prefix(port)}*"))


def remove_remains(port: int) -> None:
    """Of a server that was killed: its stubs, which may wait for it for ever, and what it shared with them, which in a pod outlives
    the container."""
    if server_at(port):  # one that is starting, too
        return
    prefix = region_prefix(port)
    for process in processes():
        if any(argument.startswith(prefix) for argument in arguments_of(process)):
            with contextlib.suppress(OSError):
                os.kill(process, signal.SIGKILL)
    for region in shared_regions(port):
        with contextlib.suppress(OSError):
            region.unlink()


def as_triton_reads(repository: str, scratch: Path) -> str:
    """A folder by a path that its stubs can be given. Triton knows no AWS_ENDPOINT_URL: another S3 server than AWS's stands in the
    location itself."""
    if "://" not in repository:
        return shell_safe(repository, scratch / "models")
    endpoint = os.environ.get("AWS_ENDPOINT_URL")
    bucket = repository.removeprefix("s3://")
    return f"s3://{endpoint}/{bucket}" if endpoint and bucket != repository and "://" not in bucket else repository


def command(options: argparse.Namespace, triton: Triton, secret: str) -> list[str]:
    """Triton's command line. Flags that only some releases have are given where the server's help names them.

    secret: for control APIs. Triton takes it as a flag only, so users of this machine can read it until hide_secret.
    """
    described = subprocess.run(
        [triton.program, "--help"], env=triton.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    known = set(re.findall(r"^\s*(--[a-z0-9-]+)", described.stdout, re.MULTILINE))
    if "--model-repository" not in known:
        raise ServeError(f"{triton.program} does not run: {described.stdout.strip()[-500:]}")
    protection = {
        "--http-restricted-api": f"{CONTROL_APIS}:{CONTROL_HEADER}={secret}",
        "--grpc-restricted-protocol": f"{CONTROL_APIS}:{CONTROL_HEADER}={secret}",
        **grpc_tls(options),
    }
    if missing := sorted(protection.keys() - known):
        raise ServeError(f"{triton.program} does not know {', '.join(missing)}, and would serve without; take a newer release")
    # Triton's HTTP library reads "[::1]" as the address of all interfaces, without an error.
    http_host = f"ipv6:{options.host}" if ":" in options.host else options.host
    flags = {
        "--model-repository": as_triton_reads(options.model_repository, triton.scratch),
        "--backend-directory": triton.backends,
        "--backend-config": f"python,shm-region-prefix-name={region_prefix(options.http_port)}",
        # config.pbtxt is complete; to complete it, the server would import the model, and torch, once more.
        "--disable-auto-complete-config": None,
        # Versions are loaded when they are asked for, never because a file appeared.
        "--model-control-mode": "explicit",
        "--load-model": MODEL,
        # Where it is refused, another version may be served.
        "--exit-on-error": "false",
        # Otherwise one refused load makes the whole server "not ready", although the old version answers.
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
        **protection,
    }
    given = [flag if value is None else f"{flag}={value}" for flag, value in flags.items() if flag in known]
    if options.trace_url:
        tracing = ["mode=opentelemetry", "level=TIMESTAMPS", f"rate={options.trace_rate}", f"opentelemetry,url={options.trace_url}"]
        given += [f"--trace-config={setting}" for setting in [*tracing, f"opentelemetry,resource=service.name={MODEL}"]]
    return [str(triton.program), *given]


def on_stop(handler: Callable[[int, FrameType | None], object]) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, handler)


class Supervisor:
    """Runs one server: starts it, says when it is ready, watches it, and ends it in order."""

    def __init__(self, options: argparse.Namespace, triton: Triton, prober: GoldenProber) -> None:
        self.options = options
        self.prober = prober
        self.secret = given_secret() or secrets.token_urlsafe(32)
        self.began = time.monotonic()
        self.wake: SimpleQueue[None] = SimpleQueue()  # an event's lock could be held by what a signal interrupts
        self.stopping = self.ready = self.drained = False
        self.deadline = 0.0  # of the server's end, once it is to end in order
        self.failing_since: float | None = None  # golden photos
        self.changing_since: float | None = None  # a model that is unloaded or loaded
        self.away = ""  # what was said of a model that is not loaded
        remove_remains(options.http_port)
        on_stop(lambda *_: sys.exit(0))  # there is no server yet
        stack = stack_bytes()
        # A session of its own: Ctrl-C reaches this process alone, which forwards it once.
        self.process = subprocess.Popen(
            command(options, triton, self.secret),
            env=triton.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=lambda: prepare_child(stack),  # noqa: PLW1509 (no threads yet)
        )
        on_stop(self._stop)
        prober.server = self.process.pid
        self.hidden = False  # the secret, in the server's command line
        self.unshown: deque[str] = deque(maxlen=20)
        self.log = threading.Thread(target=self._log, args=(self.process.stdout,), daemon=True)

    def run(self) -> int:
        """Returns: the exit code. Raises: ServeError where the server ended by itself or had to be ended."""
        self.log.start()
        try:
            reason = self._watch()
        finally:
            self._end()
        if self.stopping:
            drained = self.drained or self.process.returncode == 0
            say("stopped" if drained else f"stopped with requests in flight (exit code {self.process.returncode})")
            return 0 if drained else 1
        show(*self.unshown)
        raise ServeError(reason)

    def _watch(self) -> str:
        """Blocks until the server should not go on; returns why."""
        dead = set[int]()
        while not self._stops_within(WATCH_INTERVAL if self.ready else 0.1):
            if self.process.poll() is not None:
                when = "" if self.ready else " before the model was ready"
                return f"the server ended by itself{when} (exit code {self.process.returncode})"
            dead, dead_before = dead_stubs(self.process.pid) if self.ready else set(), dead
            if dead & dead_before:  # others are a replaced version's, which the server is about to notice
                self._drain()  # the model's other instances answer what they have accepted
                return "a Python stub of the model died, and what it is given fails; the server was ended"
            try:
                version = self.prober.probe()
            except BusyError:
                self.failing_since = None
            except ProbeError as error:
                if problem := self._problem(error):
                    return problem
            else:
                self._well(version)
        return "stopped"

    def _well(self, version: str) -> None:
        self.failing_since = None
        if not self.ready:
            self.ready = True
            self._announce(version)
        if self.away:
            say(f"the model is loaded again, version {version}")
            self.away = ""

    def _problem(self, error: ProbeError) -> str:
        """Returns: why the server must be ended after a failed golden photo; empty to keep watching."""
        if not self.ready:
            # The server is alive as from when loading has ended: asked second, it could have come to be in between.
            live = self.prober.green("/v2/health/live")
            served = live and self.prober.green(f"/v2/models/{MODEL}/ready")
            if live and served is False and (problem := self._fall_back()):
                self._drain()
                return problem
            if not served:
                return self._start_problem()
        elif self._told_to_be_away():
            self.failing_since = None
            return ""
        self.failing_since = self.failing_since or time.monotonic()
        if time.monotonic() - self.failing_since < UNHEALTHY_AFTER:
            return ""
        self.process.kill()  # it answers nothing, so there is nothing to drain
        return f"the golden photo has failed for {UNHEALTHY_AFTER:.0f} s ({error}); the server was ended"

    def _start_problem(self) -> str:
        """Triton waits for ever if it loses a stub while that loads. Returns: why the server must be ended; empty until then."""
        seconds = self.options.start_timeout
        if time.monotonic() - self.began < seconds:
            return ""
        self.process.kill()
        return f"the model was not ready within START_SECONDS={seconds:g}, with the last log lines above; the server was ended"

    def _told_to_be_away(self) -> bool:
        """Whether the control API was told to unload or load the model, which is said once. A dead one stays "READY"."""
        entries: list[dict[str, str]] = []
        with contextlib.suppress(OSError, http.client.HTTPException, ProbeError, ValueError):
            entries = self.prober.entries(self.secret)
        states = {entry.get("state") for entry in entries}
        if self.stopping or not states or "READY" in states:
            return False
        if states != {"UNAVAILABLE"}:  # requests that take minutes may come before an unload, and a download after a load
            self.changing_since = self.changing_since or time.monotonic()
            return time.monotonic() < self.changing_since + max(WORKING_FOR, float(self.options.start_timeout))
        self.changing_since = None
        unloaded = any(entry.get("reason") == "unloaded" for entry in entries)
        what = "was unloaded through the control API" if unloaded else "could not be loaded, for the reasons above"
        if what != self.away:
            self.away = what
            say(f"WARNING: the model {what}; waiting for it to be loaded", "warning")
        return True

    def _stops_within(self, seconds: float) -> bool:
        with contextlib.suppress(Empty):
            self.wake.get(timeout=seconds)
        return self.stopping

    def _fall_back(self) -> str:
        """Has the version loaded that was served before the one that was just refused. Returns: why that fails, empty where not."""
        refused = "the version that config.pbtxt pins was refused, for the reasons above"
        if self.prober.model_folder is None:
            return f"{refused}; npair rollback --offline pins the one that was served before in {self.options.model_repository}"
        path = self.prober.model_folder / FALLBACK
        try:
            config = path.read_text(encoding="utf-8")
            version = json.loads(config)["version_policy"]["specific"]["versions"][-1]
            self.prober.load(config, self.secret)
        except FileNotFoundError:
            return f"{refused}, and no other was served before"
        except (OSError, http.client.HTTPException, ProbeError, ValueError, LookupError) as error:
            return f"{refused}, and so was the one that was served before, by {path}: {error}"
        served = f"version {version}, which was served before, is served instead, until another is promoted"
        say(f"WARNING: {refused}; {served}", "warning")
        return ""

    def _announce(self, version: str) -> None:
        options, host = self.options, in_url(self.options.host)
        say(
            f"ready after {time.monotonic() - self.began:.1f} s: model {MODEL} version {version} "
            f"at http://{host}:{options.http_port} and grpc{'s' if options.grpc_cert else ''}://{host}:{options.grpc_port}, "
            f"metrics at http://{host}:{options.metrics_port}/metrics"
        )

    def _stop(self, _number: int, _frame: object) -> None:
        """At once, whatever the watch is waiting for; a second signal does not wait for the drain."""
        if self.stopping:
            self.process.kill()
        else:
            self.stopping = True
            self.wake.put(None)
            self._drain()

    def _drain(self) -> None:
        """Unloads the model, then ends the server, which by itself would go on answering clients that keep their connections, and
        then cut them off."""
        self.deadline = time.monotonic() + self.options.drain + 5  # it takes a moment more than it was given
        if self.ready:
            with contextlib.suppress(OSError, http.client.HTTPException, ProbeError, ValueError):
                self.drained = self.prober.unload(self.secret, self.options.drain)
                if not self.drained:
                    self.process.kill()  # it has had its time
        self.process.terminate()

    def _end(self) -> None:
        try:
            # Triton waits for whoever holds a connection, though all is answered.
            self.process.wait(1 if self.drained else self.deadline - time.monotonic())
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)  # a stub that hangs does not notice that its server has gone
        remove_remains(self.options.http_port)
        self.log.join(timeout=2)

    def _log(self, stream: IO[bytes]) -> None:
        """Passes on warnings, errors and what is no log line, such as a stub's last words; everything with --verbose."""
        shown, level = self.options.verbose, "info"
        for line in stream:
            text = line.decode(errors="replace").rstrip()
            parts = LOG_LINE.fullmatch(text)
            if parts:
                self._hide_secret()
                level = LEVELS[parts[1]]
                shown = self.options.verbose or level != "info"
            shaped = Log.shaped(level, text, parts)
            if shown and text and NOISE not in text:
                show(shaped)
            elif text:
                self.unshown.append(shaped)

    def _hide_secret(self) -> None:
        """Once the server logs, it has parsed its command line."""
        if self.hidden:
            return
        self.hidden = True
        try:
            hide_secret(self.process.pid)
        except OSError as error:
            say(f"WARNING: users of this machine can read the secret for control APIs in the server's command line: {error}")


class ProbeError(RuntimeError):
    """The golden photo was not answered as it was published."""


class FullError(ProbeError):
    """The golden photo was refused, since the queue is full."""


class BusyError(RuntimeError):
    """The golden photo was refused or not answered in time, but others were answered, or the stubs compute: no dead model."""


class GoldenProber:
    """Embeds a version's first golden photo through the server's HTTP port and compares the answer with the published embedding.

    model_folder: None where the models are in an object store. server: the server's process, where it is known.
    """

    def __init__(self, model_folder: Path | None, host: str, port: int) -> None:
        self.model_folder = model_folder
        self.server: int | None = None
        self.golden: dict[str, tuple[bytes, bytes, float]] = {}  # of the version that was asked last
        self.working_since: float | None = None  # without an answer
        # A wildcard address cannot be called; loopback then reaches the same listener.
        self.host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
        self.port = port

    def probe(self) -> str:
        """Returns: the version that answered. Raises: BusyError, ProbeError."""
        try:
            answered, worked, began = self._answered(), self._worked(), time.monotonic()
            try:
                version = self._embed_golden()
            except (TimeoutError, FullError) as error:
                if isinstance(error, FullError):
                    time.sleep(WATCH_INTERVAL)  # it comes at once, and the model needs time to answer the next photo
                if self._answered() > answered:
                    self.working_since = None
                    raise BusyError from None
                now = time.monotonic()
                if self._worked() - worked > (now - began) / 10:  # which waiting does not take
                    self.working_since = self.working_since or began
                    if now - self.working_since < WORKING_FOR:
                        raise BusyError from None
                raise
            self.working_since = None
            return version
        except TimeoutError as error:
            raise ProbeError(f"no answer within {PROBE_TIMEOUT:.0f} s") from error
        except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError) as error:
            raise ProbeError(str(error) or type(error).__name__) from error

    def green(self, path: str) -> bool | None:
        """What the server says of itself: enough to tell that loading has ended, not that it answers.

        Returns: None where no answer came, as on a starved machine, which is no "no".
        """
        try:
            self._request("GET", path)
        except ProbeError:
            return False
        except (OSError, http.client.HTTPException):
            return None
        return True

    def load(self, config: str, secret: str) -> None:
        """Load the model with this configuration, in JSON, in place of config.pbtxt. Raises: ProbeError, OSError, HTTPException."""
        body = json.dumps({"parameters": {"config": config}}).encode()
        self._request("POST", f"/v2/repository/models/{MODEL}/load", body, {CONTROL_HEADER: secret}, LOAD_TIMEOUT)

    def entries(self, secret: str) -> list[dict[str, str]]:
        """What the server says of each version that it was to load: name, version, state, and a reason where that is UNAVAILABLE.

        Raises: ProbeError, OSError, HTTPException, ValueError.
        """
        index = json.loads(self._request("POST", "/v2/repository/index", b"{}", {CONTROL_HEADER: secret})[1])
        # Every folder beside the model's is listed, too, without a state; the model's own is not while its storage is away.
        return [entry for entry in index if entry["name"] == MODEL]

    def unload(self, secret: str, seconds: float) -> bool:
        """Unload the model: what comes from then on is refused. Returns: whether all that it had accepted was answered in time.

        A dead stub never unloads: beside one, no more is to come when the others no longer compute.

        Raises: ProbeError, OSError, HTTPException.
        """
        deadline = time.monotonic() + seconds
        self._request("POST", f"/v2/repository/models/{MODEL}/unload", b"{}", {CONTROL_HEADER: secret}, seconds)
        worked, looked = self._worked(), time.monotonic()
        while (now := time.monotonic()) < deadline:
            if now > looked + IDLE_AFTER:
                worked, before, looked = self._worked(), worked, now
                if dead_stubs(self.server) and worked - before < IDLE_AFTER / 10:
                    return False
            states = {entry.get("state") for entry in self.entries(secret)}
            if not states:
                raise ProbeError(f"the repository no longer lists {MODEL}")
            if states == {"UNAVAILABLE"}:
                return True
            time.sleep(0.05)
        return False

    def _embed_golden(self) -> str:
        version: str = max(json.loads(self._request("GET", f"/v2/models/{MODEL}")[1])["versions"], key=int)
        photo, stored, tolerance = self._golden(version)
        raw = {"Inference-Header-Content-Length": "0"}  # makes the body one raw photo instead of JSON
        headers, body = self._request("POST", f"/v2/models/{MODEL}/versions/{version}/infer", photo, raw)
        actual = array("f", body[int(headers["Inference-Header-Content-Length"]) :])
        # NumPy would cost this process more memory than all the rest: the first row follows a header whose length is given.
        start = 10 + int.from_bytes(stored[8:10], "little")
        expected = array("f", stored[start : start + 4 * len(actual)])
        if not math.dist(actual, expected) <= tolerance:
            raise ProbeError(f"version {version} no longer embeds its golden photo as it was published")
        return version

    def _golden(self, version: str) -> tuple[bytes, bytes, float]:
        """A version's golden photo, the file of its golden embeddings and their tolerance.

        Read each time, since another version may be published under the same number, but kept: storage that goes away is no reason
        to end a server that has all that it needs in memory.
        """
        try:
            folder = self._folder(version)
            golden = json.loads((folder / "manifest.json").read_bytes())["golden"]
            photo, stored = (folder / golden["photos"][0]).read_bytes(), (folder / golden["embeddings"]).read_bytes()
            self.golden = {version: (photo, stored, golden["tolerance"])}
        except OSError:
            if version not in self.golden:
                raise
        return self.golden[version]

    def _folder(self, version: str) -> Path:
        """A version's. A server on an object store works on copies of its own, which the command lines of its stubs name."""
        if self.model_folder:
            return self.model_folder / version
        for stub in children(self.server) if self.server else []:
            for argument in arguments_of(stub):
                if argument.endswith(f"/{version}/model.py"):
                    return Path(argument).parent
        raise ProbeError(f"no process serves version {version}")

    def _answered(self) -> int:
        """The number of requests that the server has embedded so far."""
        statistics = json.loads(self._request("GET", f"/v2/models/{MODEL}/stats")[1])["model_stats"]
        return sum(entry["inference_stats"]["success"]["count"] for entry in statistics)

    def _worked(self) -> float:
        """Seconds that the stubs' threads have computed so far; 0 where the server is not known."""
        with contextlib.suppress(OSError):
            return sum(cpu_seconds(stub) for stub in children(self.server)) if self.server else 0.0
        return 0.0

    def _request(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        headers: dict[str, str] | None = None,
        timeout: float | None = None,
    ) -> tuple[http.client.HTTPMessage, bytes]:
        connection = http.client.HTTPConnection(self.host, self.port, timeout=timeout or PROBE_TIMEOUT)
        try:
            connection.request(method, path, body, headers or {})
            response = connection.getresponse()
            answer = response.read()
        finally:
            connection.close()
        if response.status != http.client.OK:
            kind = FullError if response.status == http.client.SERVICE_UNAVAILABLE else ProbeError
            raise kind(f"{path} answered {response.status}: {answer[:200].decode(errors='replace')}")
        return response.headers, answer


def children(pid: int) -> list[int]:
    """Of all threads of a process. Raises: OSError where it has ended."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        try:
            found += map(int, (task / "children").read_text(encoding="ascii").split())
        except OSError:  # this thread has ended; the first is there for as long as the process is
            if task.name == str(pid):
                raise
    return found


def stat_of(pid: int) -> list[str]:
    """The fields of a process's stat file from the third on, its state (proc(5)). Raises: OSError where it has ended."""
    return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()


def cpu_seconds(pid: int) -> float:
    """That a process's threads have computed so far. Raises: OSError where it has ended."""
    return sum(map(int, stat_of(pid)[11:13])) / os.sysconf("SC_CLK_TCK")  # utime and stime


def arguments_of(pid: int) -> list[str]:
    """A process's command line, empty where it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace").split("\0")
    except OSError:
        return []


def processes() -> list[int]:
    """All that this user can see."""
    return [int(path.name) for path in Path("/proc").iterdir() if path.name.isdecimal()]


def server_at(port: int) -> int | None:
    """The server that listens on this HTTP port, where this user can see it.

    serve.py, or a server in another network namespace, may have the same flag for the port; the end of --backend-config is its own.
    """
    end = f"={region_prefix(port)}"
    return next((pid for pid in processes() if any(argument.endswith(end) for argument in arguments_of(pid))), None)


def dead_stubs(server: int | None) -> set[int]:
    """The children of the server that are dead, which it leaves as they are: golden photos alone would not tell, since the other
    instances answer most of them."""
    dead = set()
    with contextlib.suppress(OSError):
        for child in children(server) if server else []:
            if stat_of(child)[0] == "Z":
                dead.add(child)
    return dead


def stack_bytes() -> int:
    """The limit of the stack for the server: STACK_BYTES or more, else what the hard limit allows, with a warning.

    glibc gives each thread a stack of this size, but of 2 MiB where there is no limit, so "unlimited" is too small.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_STACK)
    unlimited = resource.RLIM_INFINITY
    if soft != unlimited and soft >= STACK_BYTES:
        return soft
    if hard == unlimited or hard >= STACK_BYTES:
        return STACK_BYTES
    say(
        f"WARNING: the stack's hard limit is {hard >> 20} MiB: form-encoded requests of more than about {hard >> 21} MiB, such as "
        f"curl sends by default, can end the server; allow {STACK_BYTES >> 20} MiB: ulimit -s {STACK_BYTES >> 10}, "
        f"docker run --ulimit stack={STACK_BYTES}, or LimitSTACK={STACK_BYTES >> 20}M",
        "warning",
    )
    return hard


def prepare_child(stack: int) -> None:
    """In the server, before it is executed: give it a stack of this many bytes and enough open files, and let it die with this
    process, however that ends, so that no orphan holds the ports (Linux, prctl(2))."""
    resource.setrlimit(resource.RLIMIT_STACK, (stack, resource.getrlimit(resource.RLIMIT_STACK)[1]))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, OPEN_FILES)), hard))
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


class Log:
    """How lines on stderr look: as text, or each as a JSON object. That escapes all but ASCII, so no line can look like another."""

    as_json = False

    @classmethod
    def shaped(cls, level: str, text: str, parts: re.Match[str] | None) -> str:
        """A line of the server's. parts: of LOG_LINE, or None for what is no log line, such as a stub's last words."""
        if not cls.as_json:
            return text
        source, message, facts = "triton", text, {}
        if parts:
            source, message = "npair" if parts[2] == "model.py" else "triton", parts[3]
            with contextlib.suppress(ValueError):
                message = str(json.loads(message))
            about = ABOUT_REQUEST.fullmatch(message) if source == "npair" else None
            if about:
                message, facts = about[1], json.loads(about[2])
        return cls.line(level, source, message, facts)

    @staticmethod
    def line(level: str, source: str, message: str, facts: dict[str, object]) -> str:
        now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
        return json.dumps({"time": now, "level": level, "source": source, "message": message, **facts})


def say(sentence: str, level: str = "info") -> None:
    show(Log.line(level, "npair", sentence, {}) if Log.as_json else f"npair: {sentence}")


def show(*lines: str) -> None:
    """On stderr, where that can be written: a full disk or a broken pipe behind it is no reason to end a server."""
    with contextlib.suppress(OSError):
        print(*lines, sep="\n", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
