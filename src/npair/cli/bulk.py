"""npair bulk: embed a list of photos too long for one machine."""
# ruff: noqa: PLC0415  # commands import their libraries when they run

from __future__ import annotations

import argparse
import dataclasses
import json

from npair.cli.options import Commands, add_command, number, say


def add_commands(commands: Commands) -> None:
    bulk = add_command(
        commands,
        "bulk",
        _bulk,
        "embed a long list of photos by all cores of a machine or of a Ray cluster, without a"
        " server, into Parquet; run again to continue if interrupted",
        extra="bulk",
    )
    bulk.add_argument(
        "photos",
        metavar="LIST",
        help="Parquet file or folder of them, or table of LanceDB (.lance), with the columns path"
        " and optionally id, or id and bytes; folder of tar shards; folder of photos; each also on"
        " s3://",
    )
    bulk.add_argument(
        "--version", required=True, metavar="FOLDER", help="the published version's folder"
    )
    bulk.add_argument(
        "--out", required=True, metavar="FOLDER", help="folder for part-*.parquet, or s3://"
    )
    bulk.add_argument(
        "--precision",
        choices=("fp32", "fp16"),
        default="fp32",
        help="number format of the vectors (default: %(default)s)",
    )
    bulk.add_argument(
        "--rows",
        type=number(int, least=1),
        default=1000,
        metavar="N",
        help="photos in a piece, which becomes one file; a shard is always one piece"
        " (default: %(default)s)",
    )
    bulk.add_argument(
        "--address",
        metavar="RAY",
        help="address of a Ray cluster, or auto for the one of this machine or job (default: start"
        " one here)",
    )
    bulk.add_argument(
        "--actors",
        type=number(int, least=1),
        metavar="N",
        help="processes that embed, on one core each (default: the cores of this machine, or the"
        " CPUs of the cluster)",
    )
    bulk.add_argument("--json", action="store_true", help="print JSON")


def _bulk(arguments: argparse.Namespace) -> int:
    from npair.bulk.job import run

    about, done = run(
        arguments.photos,
        arguments.version,
        arguments.out,
        precision=arguments.precision,
        rows=arguments.rows,
        address=arguments.address,
        actors=arguments.actors,
        say=say,
    )
    now = {**done._asdict(), "photos_per_second": round(done.rate, 1)}
    if arguments.json:
        print(json.dumps({"out": arguments.out, **dataclasses.asdict(about), "now": now}))
    else:
        print(
            f"{about.rows:,} rows in {arguments.out}, embedded by version {about.version} of"
            f" {about.model}: {about.refused:,} of them have a reason in place of a vector"
        )
    return 0
