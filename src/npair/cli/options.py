"""Options that several commands share, and what commands make of them."""
# ruff: noqa: PLC0415  # commands import their libraries when they run

from __future__ import annotations

import argparse
import dataclasses
import math
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from npair.client import DEFAULT_URL
from npair.client.environment import default_url
from npair.training.run import TrainConfig, flag

if TYPE_CHECKING:
    from npair.data.checks import Findings
    from npair.data.dataset import Dataset
    from npair.data.pixels import Pixels
    from npair.serving.manifest import Preprocessing

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
MODEL_FOLDER = "model_repository/npair"
SPLIT_OPTIONS = ("seed", "split_by", "val_share")


def add_command(
    commands: Commands,
    name: str,
    run: Callable[[argparse.Namespace], int],
    summary: str,
    extra: str = "",
) -> argparse.ArgumentParser:
    """Add a command.

    summary: what it does, imperative, without a full stop.
    extra: the one of pyproject.toml that installs what it imports; by default, npair needs none.
    """
    command = add_parser(commands, name, summary)
    command.set_defaults(command=run, extra=extra, prog=command.prog)
    return command


def add_group(commands: Commands, name: str, summary: str) -> Commands:
    """Add a command that has commands of its own."""
    return add_parser(commands, name, summary).add_subparsers(required=True, metavar="STEP")


def add_parser(commands: Commands, name: str, summary: str) -> argparse.ArgumentParser:
    description = f"{summary[0].upper()}{summary[1:]}."
    return commands.add_parser(name, help=summary, description=description)


def number(
    kind: type,
    *,
    least: float = -math.inf,
    above: float = -math.inf,
    below: float = math.inf,
    most: float = math.inf,
) -> Callable[[str], Any]:
    """Return a type for an option: it parses an int or a float, and refuses one out of bounds."""
    bounds = {"of at least": least, "above": above, "below": below, "of at most": most}
    described = " and ".join(
        f"{word} {bound:.10g}" for word, bound in bounds.items() if abs(bound) < math.inf
    )
    what = "a whole number" if kind is int else "a number"

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (least <= value <= most and above < value < below):
            raise argparse.ArgumentTypeError(f"expected {what} {described}, got {text!r}")
        return value

    return parse


def add_source(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data",
        type=Path,
        required=True,
        metavar="SOURCE",
        help="folder with a folder per class; table (.csv, .tsv) with the columns path and label,"
        " optionally coarse and split; or folder with train.txt",
    )


def add_data(parser: argparse.ArgumentParser) -> None:
    add_source(parser)
    parser.add_argument(
        "--cache",
        type=Path,
        metavar="DIR",
        help="folder for decoded photos (default: the user's cache)",
    )


def add_splits(parser: argparse.ArgumentParser) -> None:
    for field in dataclasses.fields(TrainConfig):
        if field.name in SPLIT_OPTIONS:
            add_config_option(parser, field)


def add_config_option(parser: argparse.ArgumentParser, field: dataclasses.Field[Any]) -> None:
    shown = "chosen from the data" if field.metadata["from_data"] else f"default: {field.default}"
    default = "" if field.default == "" else f" ({shown})"
    only = "".join(
        f"with {flag(other)} {' or '.join(values)}: "
        for other, values in field.metadata["only"].items()
    )
    kind, choices = type(field.default), field.metadata["choices"]
    bounded = kind in (int, float) and not choices
    parser.add_argument(
        flag(field.name),
        type=number(kind, **field.metadata["bounds"]) if bounded else kind,
        default=field.default,
        choices=choices,
        metavar=None if choices else {int: "N", float: "X", str: "NAME"}[kind],
        help=only + field.metadata["help"] + default,
    )


def add_repository(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--repository",
        default=MODEL_FOLDER,
        metavar="WHERE",
        help="the model's folder, or its s3:// or gs:// address (default: %(default)s)",
    )


def add_gallery(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--index",
        type=place,
        default=Path("gallery"),
        metavar="WHERE",
        help="the gallery's folder, or s3://BUCKET/PREFIX (default: %(default)s)",
    )


def place(text: str) -> Path | str:
    """Return a folder's path, or the URL that it is."""
    return text if "://" in text else Path(text)


def add_moved_photos(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--photos",
        type=Path,
        metavar="DIR",
        help="where the photos are, if they were moved without the gallery",
    )


def add_server(parser: argparse.ArgumentParser | argparse._MutuallyExclusiveGroup) -> None:
    parser.add_argument(
        "--url",
        default=default_url(),
        help="the server: http(s):// or grpc(s):// (NPAIR_URL; default: %(default)s)",
    )


def add_servers(parser: argparse.ArgumentParser) -> None:
    servers = parser.add_mutually_exclusive_group()
    servers.add_argument(
        "--url",
        dest="urls",
        action="append",
        metavar="URL",
        help="a running server, http(s)://; repeat it to name all. A host name stands for all its"
        " addresses. Set NPAIR_CONTROL_SECRET or NPAIR_CONTROL_SECRET_FILE as on the servers"
        f" (NPAIR_URL; default: {DEFAULT_URL})",
    )
    servers.add_argument(
        "--offline",
        dest="urls",
        action="store_const",
        const=[],
        help="change files only; no server is running",
    )
    parser.add_argument(
        "--timeout",
        type=number(float, above=0, most=1e6),
        default=120.0,
        metavar="SECONDS",
        help="how long to wait for each call to a server (default: %(default)g)",
    )


def load_dataset(
    arguments: argparse.Namespace,
    preprocessing: Preprocessing,
    splits: argparse.Namespace | TrainConfig | None = None,
) -> tuple[Dataset, Pixels, Findings]:
    """Read, check and decode the data set that ``add_data``'s options name.

    splits: what holds SPLIT_OPTIONS, by default the arguments.
    """
    from npair.data.dataset import HoldOut
    from npair.data.pixels import decode_dataset, default_cache
    from npair.data.sources import read_dataset

    hold_out = HoldOut.of(splits or arguments)
    cache = arguments.cache or default_cache()
    return decode_dataset(read_dataset(arguments.data), preprocessing, cache, hold_out)


def command_line(*words: object, repository: str = MODEL_FOLDER) -> str:
    """Return an npair command to paste into a shell. It names no repository that is the default."""
    where = () if repository == MODEL_FOLDER else ("--repository", repository)
    return shlex.join(map(str, ("npair", *words, *where)))


def say(line: str) -> None:
    """Print a line of progress on stderr."""
    print(line, file=sys.stderr, flush=True)
