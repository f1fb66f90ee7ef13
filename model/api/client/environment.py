"""Settings and secrets of the environment."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from .client import DEFAULT_URL


def default_url() -> str:
    """Read the URL of the server, or take that of a server on this machine."""
    return os.environ.get("NPAIR_URL") or DEFAULT_URL


def from_environment() -> dict[str, Any]:
    """Read NpairClient's ca, cert and api_key, as far as the environment has them.

    NPAIR_CERT may hold the key as well, in place of NPAIR_KEY. NPAIR_API_KEY is not an option,
    since other users of the machine can read command lines.
    Raises: ValueError.
    """
    certificate = os.environ.get("NPAIR_CERT")
    cert = (certificate, os.environ.get("NPAIR_KEY") or certificate) if certificate else None
    _, api_key = secret("NPAIR_API_KEY")
    given = {"ca": os.environ.get("NPAIR_CA"), "cert": cert, "api_key": api_key}
    return {name: value for name, value in given.items() if value}


def secret(name: str) -> tuple[str, str]:
    """Read a secret from the file that the variable NAME_FILE names, else from the variable NAME.

    Returns: the variable that was read, and the secret, "" if neither is set.
    Raises: ValueError if the file cannot be read.
    """
    variable = f"{name}_FILE"
    if not (path := os.environ.get(variable)):
        return name, os.environ.get(name, "")
    try:
        return variable, Path(path).read_text(encoding="utf-8", errors="replace").strip()
    except OSError as error:
        raise ValueError(f"{variable} cannot be read: {error}") from error
