"""npair index: build and search a gallery of photos."""
# ruff: noqa: PLC0415  # commands import their libraries when they run

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

from npair.cli.options import Commands, add_command, add_group, say
from npair.client import DEFAULT_URL, NpairClient
from npair.client_cli import PATIENT_RETRIES, from_environment

NAMED = 5  # missing photos


def add_commands(commands: Commands) -> None:
    steps = add_group(commands, "index", "build or search a gallery")
    build = add_command(
        steps,
        "build",
        _build,
        "embed photos into a gallery or bring it up to date; run again to continue if interrupted;"
        " exit code 1 if photos were left out or are missing",
    )
    build.add_argument(
        "photos",
        type=Path,
        metavar="PHOTOS",
        help="folder of photos, each labelled by its own folder; table (.csv, .tsv) with the"
        " columns path, label and any others; or folder with lists as for train --data",
    )
    build.add_argument(
        "--prune",
        action="store_true",
        help="remove photos of the gallery that PHOTOS does not have; they stay otherwise",
    )
    search = add_command(steps, "search", _search, "print the photos most similar to a photo")
    search.add_argument("photo", type=Path, metavar="PHOTO")
    search.add_argument(
        "--photos",
        type=Path,
        metavar="DIR",
        help="where the photos are, if they were moved without the gallery",
    )
    search.add_argument("-k", type=int, default=5, help="number of photos (%(default)s)")
    for command in (build, search):
        command.add_argument(
            "--index",
            type=Path,
            default=Path("gallery"),
            metavar="DIR",
            help="the gallery's folder (%(default)s)",
        )
        command.add_argument(
            "--url",
            default=os.environ.get("NPAIR_URL", DEFAULT_URL),
            help="the server: http(s):// or grpc(s):// (NPAIR_URL; %(default)s)",
        )
        command.add_argument("--json", action="store_true", help="print JSON")


def _build(arguments: argparse.Namespace) -> int:
    from npair.gallery.build import build

    with NpairClient(arguments.url, retries=PATIENT_RETRIES, **from_environment()) as client:
        built = build(arguments.photos, arguments.index, client, prune=arguments.prune)
    for photo, reason in built.left_out.items():
        say(f"left out: {photo}: {reason}")
    for copies in built.contradicting:
        say(f"the same photo has different labels: {' = '.join(copies)}")
    if built.ignored:
        say(f"ignored, since they are no photos: {built.ignored}")
    if built.missing:
        named = ", ".join(built.missing[:NAMED]) + " ..." * (len(built.missing) > NAMED)
        say(
            f"{len(built.missing)} photos of the gallery are not in {arguments.photos}: {named}\n"
            "They stay in the gallery. Bring them back, or remove them: --prune"
        )
    if arguments.json:
        print(json.dumps(built._asdict()))
    else:
        print(
            f"{built.photos} photos in {arguments.index}, embedded by version {built.version}:"
            f" {built.embedded} of them now, {len(built.left_out)} left out,"
            f" {len(built.missing)} missing, {built.removed} removed"
        )
    return 1 if built.left_out or built.missing else 0


def _search(arguments: argparse.Namespace) -> int:
    from npair.data.files import shown
    from npair.gallery.build import encoded_photo
    from npair.gallery.gallery import Gallery

    gallery = Gallery(arguments.index, arguments.photos)
    with NpairClient(arguments.url, **from_environment()) as client:
        found = gallery.search(encoded_photo(arguments.photo), client, arguments.k)
    if arguments.json:
        hits = [hit._asdict() for hit in found]
        print(json.dumps({"version": gallery.version, "found": hits}))
    else:
        for hit in found:
            columns = (f"{name}={value}" for name, value in hit.columns.items() if value)
            cells = (f"{hit.cosine:.4f}", hit.label, shown(hit.photo), *map(shown, columns))
            print(*cells, sep="  ")
    return 0
