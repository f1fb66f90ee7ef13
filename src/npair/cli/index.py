"""npair index: build and search a gallery of photos."""
# ruff: noqa: PLC0415  # commands import their libraries when they run

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

from npair.cli.options import (
    Commands,
    add_command,
    add_gallery,
    add_group,
    add_moved_photos,
    add_server,
    number,
    place,
    say,
)
from npair.client import PIXEL, InvalidPhotoError, NpairClient, NpairError
from npair.client.cli import connected, reason_of

NAMED = 5  # missing photos


def add_commands(commands: Commands) -> None:
    steps = add_group(commands, "index", "build or search a gallery")
    build = add_command(
        steps,
        "build",
        _build,
        "embed photos into a gallery or bring it up to date; run again to continue if interrupted;"
        " exit code 1 if photos were left out or are missing",
        extra="index",
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
    search = add_command(
        steps, "search", _search, "print the photos most similar to a photo", extra="index"
    )
    search.add_argument("photo", metavar="PHOTO", help="file; - for standard input")
    add_moved_photos(search)
    search.add_argument(
        "-k",
        type=number(int, least=1, most=100_000),
        default=5,
        help="number of photos (default: %(default)s)",
    )
    take = add_command(
        steps,
        "import",
        _import,
        "add the vectors that npair bulk wrote to a gallery, without embedding again; exit code 1"
        " if rows were left out",
        extra="index",
    )
    take.add_argument(
        "vectors", type=place, metavar="FOLDER", help="folder of Parquet files, or its s3:// URL"
    )
    take.add_argument(
        "--switch",
        action="store_true",
        help="if the gallery is of another version, let these vectors take its place",
    )
    give = add_command(
        steps, "export", _export, "write a gallery's vectors as Parquet", extra="index"
    )
    give.add_argument("target", type=place, metavar="FOLDER", help="new folder, or its s3:// URL")
    for command in (build, search, take, give):
        add_gallery(command)
    for command in (build, search):
        add_server(command)
        command.add_argument(
            "--wait",
            type=number(float, least=0),
            default=5.0,
            metavar="SECONDS",
            help="give up if the server has not answered for this long (default: %(default)g)",
        )
    for command in (build, search, take):
        command.add_argument("--json", action="store_true", help="print JSON")


@contextlib.contextmanager
def _connected(arguments: argparse.Namespace) -> Iterator[NpairClient]:
    """Provide a client that says at once if the server does not answer.

    Raises: RuntimeError that names the server, and the next step.
    """
    try:
        with connected(arguments.url, arguments.wait) as client:
            yield client
    except InvalidPhotoError:
        raise
    except NpairError as error:
        raise RuntimeError(f"{arguments.url}: {reason_of(error)}") from error


def _build(arguments: argparse.Namespace) -> int:
    from npair.data.files import shown
    from npair.gallery.build import build

    with _connected(arguments) as client:
        client.embed(PIXEL)
        client.be_patient()
        built = build(arguments.photos, arguments.index, client, prune=arguments.prune)
    for photo, reason in built.left_out.items():
        say(f"left out: {shown(photo)}: {reason}")
    for copies in built.contradicting:
        say(f"the same photo has different labels: {' = '.join(map(shown, copies))}")
    if built.ignored:
        say(f"ignored, since they are no photos: {built.ignored}")
    if built.missing:
        named = ", ".join(map(shown, built.missing[:NAMED])) + " ..." * (len(built.missing) > NAMED)
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
    from npair.client.photos import Unread
    from npair.data.files import shown
    from npair.gallery.gallery import Gallery

    gallery = Gallery(arguments.index, arguments.photos)
    try:
        photo = Unread(arguments.photo).read()
        with _connected(arguments) as client:
            found = gallery.search(photo, client, arguments.k)
    except InvalidPhotoError as error:
        raise ValueError(f"{arguments.photo}: {error.reasons[0]}") from error
    if arguments.json:
        hits = [hit._asdict() for hit in found]
        print(json.dumps({"version": gallery.version, "found": hits}))
    else:
        for hit in found:
            columns = (f"{name}={value}" for name, value in hit.columns.items() if value)
            texts = map(shown, (hit.label, hit.photo, *columns))
            print(f"{hit.cosine:.4f}", *texts, sep="  ")
    return 0


def _import(arguments: argparse.Namespace) -> int:
    from npair.gallery.transfer import import_vectors

    done = import_vectors(arguments.vectors, arguments.index, switch=arguments.switch)
    if arguments.json:
        print(json.dumps(done._asdict()))
    else:
        print(
            f"{done.photos} photos in {arguments.index}, embedded by version {done.version}:"
            f" {done.imported} of them imported now, {done.left_out} left out"
        )
    return 1 if done.left_out else 0


def _export(arguments: argparse.Namespace) -> int:
    from npair.gallery.transfer import export_vectors

    count = export_vectors(arguments.index, arguments.target)
    print(f"{count} photos of {arguments.index} in {arguments.target}")
    return 0
