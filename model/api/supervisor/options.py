"""The options of serve.py, each with the environment variable that gives its default."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

MODEL = "npair"
MOUNTED = Path("/models")
CHECKOUT = (Path(__file__).parent / "../../../model_repository").resolve()
START_TIMEOUT = 120.0  # seconds; a start takes about 3
DOWNLOAD_TIMEOUT = 900.0  # seconds, if the model comes from an object store
PORTS = (1, 65_535)
DAY = 86_400  # seconds
ON, OFF = ("1", "true", "yes", "on"), ("0", "false", "no", "off", "")


def option(variable: str, default: object, text: str, **settings: object) -> Any:
    """A field of ``Options``.

    settings: of argparse, and ``within``, the least and the greatest value of a number.
    """
    return field(default=default, metadata={"variable": variable, "help": text, **settings})


@dataclass(frozen=True)
class Options:
    """The settings of a server. An empty string stands for an option that is not given."""

    model_repository: str = option(
        "MODEL_REPOSITORY",
        str(MOUNTED if (MOUNTED / MODEL).is_dir() else CHECKOUT),
        "a folder, s3:// or gs://",
    )
    host: str = option("BIND_ADDRESS", "127.0.0.1", "address or name to listen on")
    http_port: int = option("HTTP_PORT", 8000, "port for HTTP", within=PORTS)
    grpc_port: int = option("GRPC_PORT", 8001, "port for gRPC", within=PORTS)
    metrics_port: int = option("METRICS_PORT", 8002, "port for metrics", within=PORTS)
    grpc_cert: str = option("GRPC_TLS_CERT", "", "certificate (PEM); gRPC then accepts only TLS")
    grpc_key: str = option("GRPC_TLS_KEY", "", "private key of the certificate (PEM)")
    grpc_client_ca: str = option(
        "GRPC_TLS_CLIENT_CA", "", "certificates (PEM) that must have signed those of clients"
    )
    start_timeout: float | None = option(
        "START_SECONDS",
        None,
        f"seconds until the server must be ready; default {START_TIMEOUT:.0f}, "
        f"from an object store {DOWNLOAD_TIMEOUT:.0f}",
        type=float,
        within=(0.1, DAY),
    )
    drain: int = option(
        "DRAIN_SECONDS", 7, "seconds to answer accepted requests before stopping", within=(0, DAY)
    )
    verbose: bool = option("VERBOSE", False, "log everything, not only warnings and errors")
    log_format: str = option("LOG_FORMAT", "text", "format of a log line", choices=("text", "json"))
    trace_url: str = option(
        "TRACE_URL", "", "an OpenTelemetry collector, for example http://host:4318/v1/traces"
    )
    trace_rate: int = option("TRACE_RATE", 100, "trace one in N requests", within=(1, 1_000_000))
    check: bool = option("", False, "only tell whether the server can run on this platform")
    health: bool = option("", False, "only tell whether a running server embeds its golden photo")

    @property
    def start_seconds(self) -> float:
        """Seconds until the server must be ready."""
        if self.start_timeout is not None:
            return self.start_timeout
        return DOWNLOAD_TIMEOUT if self.model_folder is None else START_TIMEOUT

    @property
    def model_folder(self) -> Path | None:
        """The model's folder in the repository; None in an object store."""
        return None if "://" in self.model_repository else Path(self.model_repository, MODEL)


def parse(arguments: Sequence[str] | None = None) -> Options:
    """Read the command line (sys.argv), then the environment, then the defaults.

    An empty variable counts as unset. Ends the process with exit code 2 if a value is invalid.
    """
    parser = argparse.ArgumentParser(
        description="Serve npair's model repository with NVIDIA Triton."
    )
    for each in fields(Options):
        settings: dict[str, Any] = dict(each.metadata)
        variable = settings.pop("variable")
        limits = settings.pop("within", None)
        given = os.environ.get(variable, "")
        if each.default is False:
            if given.lower() not in (*ON, *OFF):
                parser.error(f"{variable} must be 1 or 0, got {given}")
            settings.update(action="store_true", default=given.lower() in ON)
            settings["help"] += f" ({variable}=1)" if variable else ""
        else:
            kind = settings.setdefault("type", type(each.default))
            if limits:
                settings["type"] = partial(number, variable, kind, *limits)
            settings["default"] = given or each.default
            shown = "; default: %(default)s" if each.default else ""
            settings["help"] = f"{settings['help']} ({variable}{shown})"
        parser.add_argument(f"--{each.name.replace('_', '-')}", **settings)
    options = Options(**vars(parser.parse_args(arguments)))
    if options.log_format not in ("text", "json"):  # argparse takes any default
        parser.error(f"LOG_FORMAT must be text or json, got {options.log_format}")
    if options.trace_url and not re.match("https?://[^/]", options.trace_url):
        parser.error(
            "TRACE_URL must be a collector's address, such as http://host:4318/v1/traces, "
            f"got {options.trace_url}"
        )
    return options


def number(variable: str, kind: type, low: float, high: float, text: str) -> float:
    """Read a number. Raises: argparse.ArgumentTypeError, which names the variable."""
    with contextlib.suppress(ValueError):
        value: float = kind(text)
        if low <= value <= high:
            return value
    noun = "a whole number" if kind is int else "a number"
    raise argparse.ArgumentTypeError(f"{variable} must be {noun} from {low} to {high}, got {text}")
