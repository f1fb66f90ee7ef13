"""npair promote, rollback, versions and retire: choose which versions are served."""
# ruff: noqa: PLC0415  # commands import their libraries when they run

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING

from npair.cli.options import (
    Commands,
    add_command,
    add_repository,
    add_servers,
    number,
    say,
)
from npair.client.environment import default_url

if TYPE_CHECKING:
    from npair.releasing.control import Server
    from npair.releasing.repository import Repository

VERSION = number(int, least=1)


def add_commands(commands: Commands) -> None:
    promote = add_command(
        commands,
        "promote",
        _promote,
        "verify version N and switch to it; on any failure the previous version keeps serving",
        extra="release",
    )
    promote.add_argument("version", type=VERSION, metavar="N", help="number of the version")
    promote.add_argument(
        "--keep",
        type=VERSION,
        metavar="M",
        help="keep serving this lower version to requests that name it",
    )
    rollback = add_command(
        commands,
        "rollback",
        _rollback,
        "switch back to the version that was served before",
        extra="release",
    )
    for command in (promote, rollback):
        command.add_argument(
            "--settle",
            type=number(float, least=0, most=1e9),
            default=15.0,
            metavar="SECONDS",
            help="how long to keep looking for servers that join, if a URL's host has several"
            " addresses; they are switched too (default: %(default)g)",
        )
    versions = add_command(commands, "versions", _versions, "list versions and their state")
    versions.add_argument("--json", action="store_true", help="print JSON")
    retire = add_command(commands, "retire", _retire, "remove a version that is not served")
    retire.add_argument("version", type=VERSION, metavar="N", help="number of the version")
    for command in (promote, rollback, versions, retire):
        add_repository(command)
        add_servers(command)


def _promote(arguments: argparse.Namespace) -> int:
    from npair.releasing.release import promote

    repository, servers = _connect(arguments)
    promote(repository, arguments.version, servers, keep=arguments.keep, say=say)
    print(f"version {arguments.version} is {_served_by(servers)}", flush=True)
    _settle(arguments, repository, servers)
    return 0


def _rollback(arguments: argparse.Namespace) -> int:
    from npair.releasing.release import rollback

    repository, servers = _connect(arguments)
    version = rollback(repository, servers, say=say)
    print(f"version {version} is {_served_by(servers)} again", flush=True)
    _settle(arguments, repository, servers)
    return 0


def _versions(arguments: argparse.Namespace) -> int:
    from npair.releasing.versions import listing, versions

    lines = versions(*_connect(arguments), say)
    print(json.dumps([asdict(line) for line in lines]) if arguments.json else listing(lines))
    return 0


def _retire(arguments: argparse.Namespace) -> int:
    from npair.releasing.release import retire

    repository, servers = _connect(arguments)
    retire(repository, arguments.version, servers, say=say)
    print(f"version {arguments.version} is removed")
    return 0


def _settle(
    arguments: argparse.Namespace, repository: Repository, servers: Sequence[Server]
) -> None:
    """Change servers that join under a name which stands for several, such as pods."""
    from npair.releasing.release import bring_along

    if len(servers) > len(_urls(arguments)):
        find = partial(_servers, arguments, repository)
        if joined := bring_along(repository, servers, find, arguments.settle):
            print(f"and {_served_by(joined)}")


def _connect(arguments: argparse.Namespace) -> tuple[Repository, list[Server]]:
    """Open the repository and find all servers at the addresses given."""
    from npair.releasing.repository import open_repository

    repository = open_repository(arguments.repository)
    return repository, _servers(arguments, repository)


def _servers(arguments: argparse.Namespace, repository: Repository) -> list[Server]:
    from npair.releasing.control import Server, control_secret

    secret = control_secret()
    found = [
        Server.all_of(url, repository.name, secret=secret, timeout=arguments.timeout)
        for url in _urls(arguments)
    ]
    return [server for servers in found for server in servers]


def _urls(arguments: argparse.Namespace) -> list[str]:
    return [default_url()] if arguments.urls is None else arguments.urls


def _served_by(servers: Sequence[Server]) -> str:
    if not servers:
        return "what servers that start from now on serve"
    return f"served by {', '.join(server.url for server in servers)}"
