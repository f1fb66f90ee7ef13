"""npair tune: find this machine's best serving settings."""
# ruff: noqa: PLC0415  # commands import their libraries when they run

from __future__ import annotations

import argparse
from pathlib import Path

from npair.cli.options import MODEL_FOLDER, Commands, add_command, add_source, number, say

PHOTOS = 200  # at most, sent in turn


def add_commands(commands: Commands) -> None:
    tune = add_command(
        commands,
        "tune",
        _tune,
        "find the serving settings that are best on this machine and write them to config.pbtxt",
        extra="tune",
    )
    add_source(tune)
    tune.add_argument(
        "--repository",
        type=Path,
        default=Path(MODEL_FOLDER),
        metavar="DIR",
        help="the model's folder (default: %(default)s)",
    )
    tune.add_argument(
        "--p99-ms",
        type=number(float, above=0, most=1e9),
        default=100.0,
        metavar="MS",
        help="limit of the 99th percentile of latency (default: %(default)g)",
    )
    tune.add_argument(
        "--seconds",
        type=number(float, above=0, most=1e9),
        default=2.0,
        metavar="SECONDS",
        help="duration of each load (default: %(default)g)",
    )
    tune.add_argument(
        "--instances",
        type=number(int, least=1),
        nargs="+",
        metavar="N",
        help="numbers of instances to try (default: the divisors of the number of cores, and one"
        " more than it)",
    )
    tune.add_argument(
        "--batch",
        type=number(int, least=0),
        nargs="+",
        default=[0, 4, 8, 16, 32],
        metavar="N",
        help="preferred batch sizes to try; 0: none (default: 0 4 8 16 32)",
    )
    tune.add_argument(
        "--delay",
        type=number(int, least=0),
        nargs="+",
        default=[0],
        metavar="US",
        help="queue delays to try, in microseconds; if config.pbtxt has"
        " default_timeout_microseconds, some releases of Triton then slow down over time"
        " (default: 0)",
    )
    tune.add_argument(
        "--picture", type=Path, metavar="FILE", help="draw throughput and latency (.svg, .png)"
    )


def _tune(arguments: argparse.Namespace) -> int:
    if arguments.picture:
        import matplotlib  # noqa: F401  # if it is missing, say so before the measurements

    from npair.data.sources import read_dataset
    from npair.releasing.repository import open_repository
    from npair.releasing.tune import (
        best_point,
        draw,
        frontier,
        read_setting,
        table,
        tune,
        with_setting,
    )
    from npair.serving.engine import cores

    divisors = [n for n in range(1, cores() + 1) if cores() % n == 0]
    instances = arguments.instances or [*divisors, cores() + 1]
    photos = [
        path for split in read_dataset(arguments.data).splits.values() for path in split.paths
    ]
    sent = [path.read_bytes() for path in photos[:: -(-len(photos) // PHOTOS)]]
    points, chosen = tune(
        arguments.repository,
        sent,
        p99=arguments.p99_ms,
        seconds=arguments.seconds,
        axes={"instances": instances, "batch": arguments.batch, "delay": arguments.delay},
        say=say,
    )
    print(table(frontier(points)))
    if arguments.picture:
        draw(points, chosen, arguments.p99_ms, arguments.picture)
    config = arguments.repository / "config.pbtxt"
    present = read_setting(config.read_text(encoding="utf-8"))
    best = best_point([point for point in points if point.setting == chosen], arguments.p99_ms)
    assert best
    load = f"{best.rate:.0f} photos/s with a p99 of {best.p99:.0f} ms"
    print(f"\nbest: {chosen}: {load}")
    if chosen == present:
        print(f"{config} has this setting already")
    else:
        repository = open_repository(arguments.repository)
        with repository.exclusive():
            text = with_setting(config.read_text(encoding="utf-8"), chosen)
            repository.write(config.name, text.encode())
        print(f"written to {config}, in place of {present}; servers that start from now on use it")
    return 0
