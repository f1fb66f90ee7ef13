"""npair publish and verify: write a version of the model, and check versions."""
# ruff: noqa: PLC0415  # commands import their libraries when they run

from __future__ import annotations

import argparse
import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from npair.cli.options import Commands, add_command, add_data, add_repository, command_line, say

if TYPE_CHECKING:
    from npair.releasing.repository import Repository


def add_commands(commands: Commands) -> None:
    publish = add_command(
        commands,
        "publish",
        _publish,
        "write a run's network as the model's next version",
        extra="train",
    )
    publish.add_argument(
        "--run",
        type=Path,
        required=True,
        metavar="DIR",
        help="a run's folder, or a version's to publish its network again with this code",
    )
    add_data(publish)
    add_repository(publish)
    publish.add_argument(
        "--accept-recall-drop",
        default="",
        metavar="REASON",
        help="publish even if it finds less than the pinned version, beyond chance",
    )
    publish.add_argument(
        "--accept-cost",
        default="",
        metavar="REASON",
        help="publish even if it is slower or larger than the pinned version",
    )

    verify = add_command(
        commands,
        "verify",
        _verify,
        "check the hashes and golden sets of versions and, with --url, of what servers answer",
        extra="release",
    )
    verify.add_argument(
        "versions",
        nargs="*",
        metavar="N",
        help="number or folder of a version (default: all versions, and config.pbtxt)",
    )
    verify.add_argument(
        "--engine", default="", metavar="NAME", help="engine to check (default: all that run here)"
    )
    verify.add_argument("--json", action="store_true", help="print JSON")
    add_repository(verify)
    verify.add_argument(
        "--url",
        dest="urls",
        action="append",
        default=[],
        metavar="URL",
        help="a running server, http(s)://; repeat it for others",
    )


def _publish(arguments: argparse.Namespace) -> int:
    from npair.cli.next_version import is_new, publish_next
    from npair.data.pixels import default_cache
    from npair.releasing.repository import open_repository
    from npair.scoring.evaluate import Evaluation

    repository = open_repository(arguments.repository, start=True)
    if new := is_new(repository):
        say(f"{repository.location} holds no model yet: starting one, without comparison")
    manifest = publish_next(
        repository,
        arguments.run,
        arguments.data,
        cache=arguments.cache or default_cache(),
        accept_recall_drop=arguments.accept_recall_drop,
        accept_cost=arguments.accept_cost,
        say=say,
    )
    if manifest.metrics:
        print("val", *Evaluation.from_dict(manifest.metrics["val"]).lines(), sep="\n")
    promote = command_line("promote", manifest.version, repository=arguments.repository)
    to_serve = _start(repository) if new else promote
    print(f"published version {manifest.version} in {repository.location}; to serve it: {to_serve}")
    return 0


def _start(repository: Repository) -> str:
    """Return the command that starts a server of this repository."""
    models, _, _ = repository.location.rpartition("/")
    models = models if "://" in models else str(Path(repository.location).absolute().parent)
    return shlex.join(["make", "serve", f"MODEL_REPOSITORY={models}"])


def _verify(arguments: argparse.Namespace) -> int:
    from npair.releasing.control import Server
    from npair.releasing.release import check_pins, check_server
    from npair.releasing.repository import open_repository
    from npair.releasing.verify import verify

    numbers = [int(version) for version in arguments.versions if version.isdecimal()]
    folders = [version for version in arguments.versions if not version.isdecimal()]
    checked = {folder: verify(Path(folder), arguments.engine) for folder in folders}
    served: dict[str, dict[int, float]] = {}
    if numbers or arguments.urls or not folders:
        repository = open_repository(arguments.repository)
        if not arguments.versions:
            check_pins(repository)
            numbers = [number for number, complete in repository.versions().items() if complete]
        for number in numbers:
            with repository.version(number) as folder:
                checked[str(number)] = verify(folder, arguments.engine, number=number)
        servers = [
            server for url in arguments.urls for server in Server.all_of(url, repository.name)
        ]
        served = {server.url: check_server(repository, server) for server in servers}
    if arguments.json:
        print(json.dumps({"versions": checked, "servers": served}))
        return 0
    for version, engines in checked.items():
        print(f"version {version}: files as published")
        for name, engine in engines.items():
            if "tolerance" in engine:
                text = "golden set off by {golden_distance:.2g} (tolerance {tolerance:.2g})"
            else:
                text = "{cannot_run}"
            print(f"  {name}: {text.format(**engine)}")
    for url, distances in served.items():
        golden = [f"version {n}: golden set off by {d:.2g}" for n, d in distances.items()]
        print(f"{url}: serves what is pinned", *golden, sep=", ")
    return 0
