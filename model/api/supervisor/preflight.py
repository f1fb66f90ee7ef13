"""Checks before a server starts.

Needs only the standard library, since make runs it on a bare machine with any Python 3.
"""

from __future__ import annotations

import contextlib
import errno
import os
import platform
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from supervisor.options import Options

IMAGE_SERVER = Path("/opt/tritonserver")
# By machine: the oldest and newest Python for the wheel and requirements.txt. The wheel's Python
# backend is built for numpy 1, which Python 3.13 has no build of; gevent has none for 3.10 on Arm.
WHEEL_PYTHONS = {"x86_64": ((3, 10), (3, 12)), "aarch64": ((3, 11), (3, 12))}
WHEEL_GLIBC = (2, 35)
STORES = ("s3://", "gs://")
STORE_TIMEOUT = 10.0  # seconds


class ServeError(RuntimeError):
    """The server cannot start or had to be ended; the message is one sentence with the reason."""


def check_platform() -> None:
    """Raises: ServeError if neither the image's server nor the wheel's can run here."""
    if (IMAGE_SERVER / "bin/tritonserver").is_file():
        return
    if sys.platform != "linux" or platform.machine() not in WHEEL_PYTHONS:
        raise ServeError(
            f"the server needs Linux on x86-64 or Arm, and this is {platform.system()} on "
            f"{platform.machine()}; run the image instead"
        )
    lowest, highest = WHEEL_PYTHONS[platform.machine()]
    if not lowest <= sys.version_info[:2] <= highest:
        raise ServeError(
            f"the server needs Python {lowest[0]}.{lowest[1]} to {highest[0]}.{highest[1]}, "
            f"and this is {platform.python_version()}; "
            "choose another, for example: make serve PYTHON=python3.11"
        )
    library, version = platform.libc_ver()
    if library != "glibc" or tuple(map(int, version.split(".")[:2])) < WHEEL_GLIBC:
        raise ServeError(
            f"the server needs glibc {WHEEL_GLIBC[0]}.{WHEEL_GLIBC[1]} or newer, and this is "
            f"{library or 'another libc'} {version}"
        )


def check_repository(options: Options) -> None:
    """Raises: ServeError if a folder holds no model, or an object store cannot be reached."""
    given, folder = options.model_repository, options.model_folder
    if folder is None:
        if not given.startswith(STORES):
            raise ServeError(
                f"MODEL_REPOSITORY must be a folder, or in a bucket at {' or '.join(STORES)}, "
                f"got {given}"
            )
        check_store(given)
        return
    config = folder / "config.pbtxt"
    try:
        config.open("rb").close()
    except (FileNotFoundError, NotADirectoryError):
        raise ServeError(
            f"no model repository at {given}: it has no {folder.name}/{config.name}; "
            f"set MODEL_REPOSITORY to the folder that holds {folder.name}/"
        ) from None
    except OSError as error:
        raise ServeError(
            f"{config} cannot be read: {error.strerror}; let user {os.getuid()} read "
            "MODEL_REPOSITORY and all that is in it"
        ) from error


def store_location(repository: str) -> str:
    """A bucket's location as Triton takes it: with the S3 server, unless that is AWS's own.

    Triton ignores AWS_ENDPOINT_URL.
    """
    endpoint, bucket = os.environ.get("AWS_ENDPOINT_URL"), repository[len("s3://") :]
    if endpoint and repository.startswith("s3://") and "://" not in bucket:
        return f"s3://{endpoint}/{bucket}"
    return repository


def check_store(repository: str) -> None:
    """Connect to the S3 server that a location names, once.

    Triton itself would try until START_SECONDS have passed, and give no reason. Raises: ServeError.
    """
    endpoint = store_location(repository)[len("s3://") :]
    if "://" not in endpoint:
        return
    try:
        server = urlsplit(endpoint)
        port = server.port or {"http": 80, "https": 443}[server.scheme]
        socket.create_connection((server.hostname or "", port), STORE_TIMEOUT).close()
    except (OSError, ValueError, LookupError) as error:
        raise ServeError(
            f"the object store of {repository} cannot be reached at {endpoint}: {error}; "
            "check MODEL_REPOSITORY, AWS_ENDPOINT_URL and the network"
        ) from error


def address_of(host: str) -> str:
    """The IP address of a host name or address, IPv4 if it has both kinds.

    Triton's HTTP server takes no names. Raises: ServeError if there is no address.
    """
    try:
        found = socket.getaddrinfo(host.strip("[]"), None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise ServeError(
            f"cannot listen on {host}: {error}; set BIND_ADDRESS to an address of this machine"
        ) from error
    return str(min(found, key=lambda entry: entry[0] == socket.AF_INET6)[4][0])


def in_url(host: str) -> str:
    """An IP address as it is written in URLs."""
    return f"[{host}]" if ":" in host else host


def check_ports(options: Options) -> None:
    """Raises: ServeError for the first port that cannot be bound.

    Triton itself would fail later and give less of a reason.
    """
    host = options.host
    ports = {
        "HTTP_PORT": options.http_port,
        "GRPC_PORT": options.grpc_port,
        "METRICS_PORT": options.metrics_port,
    }
    with contextlib.ExitStack() as listeners:
        for name, port in ports.items():
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            listener = listeners.enter_context(socket.socket(family))
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                listener.bind((host, port))
                listener.listen()  # otherwise two of the three could share a port
            except OSError as error:
                remedy = {
                    errno.EADDRNOTAVAIL: "set BIND_ADDRESS to an address of this machine",
                    errno.EACCES: f"set {name} to a port above 1023",
                }.get(error.errno or 0, f"set {name} to a free port")
                raise ServeError(
                    f"cannot listen on {in_url(host)}:{port}: {error.strerror or error}; {remedy}"
                ) from error
