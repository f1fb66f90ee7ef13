"""npair index: build and search a gallery of photos."""
# ruff: noqa: PLC0415  # commands import their libraries when they run

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from npair.cli.options import Commands, add_command, add_group, add_server, number
from npair.client import NpairClient
from npair.client_cli import PATIENT_RETRIES, from_environment


def add_commands(commands: Commands) -> None:
    steps = add_group(commands, "index", "build or search a gallery")
    build = add_command(
        steps,
        "build",
        _build,
        "embed photos into a gallery or bring it up to date; run again to continue if interrupted",
        extra="index",
    )
    build.add_argument(
        "photos",
        type=Path,
        metavar="PHOTOS",
        help="folder of photos, each labelled by its own folder; or a source as for train --data",
    )
    search = add_command(
        steps, "search", _search, "print the photos most similar to a photo", extra="index"
    )
    search.add_argument("photo", type=Path, metavar="PHOTO")
    search.add_argument(
        "-k", type=number(int, least=1), default=5, help="number of photos (%(default)s)"
    )
    for command in (build, search):
        command.add_argument(
            "--index",
            type=Path,
            default=Path("gallery"),
            metavar="DIR",
            help="the gallery's folder (%(default)s)",
        )
        add_server(command)
        command.add_argument("--json", action="store_true", help="print JSON")


def _build(arguments: argparse.Namespace) -> int:
    from npair.gallery.gallery import build

    with NpairClient(arguments.url, retries=PATIENT_RETRIES, **from_environment()) as client:
        built = build(arguments.photos, arguments.index, client)
    for photo, reason in built.left_out.items():
        print(f"{photo}: {reason}", file=sys.stderr)
    if built.ignored:
        print(f"ignored, since they are no photos: {built.ignored}", file=sys.stderr)
    if arguments.json:
        print(json.dumps(built._asdict()))
    else:
        print(
            f"{built.photos} photos in {arguments.index}, embedded by version {built.version}:"
            f" {built.embedded} of them now, {len(built.left_out)} left out"
        )
    return 0


def _search(arguments: argparse.Namespace) -> int:
    from npair.gallery.gallery import Gallery

    gallery = Gallery(arguments.index)
    with NpairClient(arguments.url, **from_environment()) as client:
        found = gallery.search(arguments.photo, client, arguments.k)
    if arguments.json:
        hits = [hit._asdict() for hit in found]
        print(json.dumps({"version": gallery.version, "found": hits}))
    else:
        print(*(f"{hit.cosine:.4f}  {hit.label}  {hit.photo}" for hit in found), sep="\n")
    return 0
