"""Debian's packages: installed here, or downloaded from another release."""

from __future__ import annotations

import subprocess
from pathlib import Path

from image.commands import run

SOURCES = """\
Types: {kind}
URIs: http://deb.debian.org/debian
Suites: {suite}
Components: main
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg
"""


def install(*packages: str) -> None:
    """Install the packages that are missing."""
    missing = [package for package in packages if not installed(package)]
    if missing:
        run("apt-get", "update", "-qq")
        run("apt-get", "install", "-qqy", "--no-install-recommends", *missing)


def installed(package: str) -> bool:
    return (
        "install ok installed"
        in subprocess.run(
            ["dpkg-query", "--show", "--showformat", "${Status}", package],
            capture_output=True,
            text=True,
            check=False,
        ).stdout
    )


def apt_get(folder: Path, suite: str, kind: str = "deb") -> list[str]:
    """Return an apt-get command that knows one release, and keeps its lists in a folder.

    kind: deb, or deb-src for sources.
    """
    for name in ("lists/partial", "cache/archives/partial"):
        (folder / name).mkdir(parents=True)
    sources = folder / "debian.sources"
    sources.write_text(SOURCES.format(kind=kind, suite=suite))
    options = {
        "Dir::Etc::SourceList": sources,
        "Dir::Etc::SourceParts": "/dev/null",
        "Dir::State::Lists": folder / "lists",
        "Dir::Cache": folder / "cache",
        "APT::Sandbox::User": "root",
    }
    command = ["apt-get", "-qq", *(f"-o={name}={value}" for name, value in options.items())]
    run(*command, "update")
    return command
