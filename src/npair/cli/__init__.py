"""The ``npair`` command: train, score, publish and release embedding networks.

Each module adds a group of commands. A command imports its libraries when it runs, so that
``--help`` is quick and scoring a server needs no torch.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable

from npair.cli import data, evaluate, index, publish, release, train, tune, web
from npair.client import NpairError


def main() -> int:
    """Run the command that ``sys.argv`` names.

    Returns: 0; 1 after an error, with one line on stderr that names it; 130 after Ctrl-C, SIGTERM
    or SIGHUP. An interrupted promotion is undone. Interrupted training saves a checkpoint; after
    SIGHUP, its last one remains.
    """
    arguments = _parser().parse_args()
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_DFL:  # nohup ignores SIGHUP
            signal.signal(number, signal.default_int_handler)
    command: Callable[[argparse.Namespace], int] = arguments.command
    try:
        return command(arguments)
    except (ValueError, RuntimeError, OSError, NpairError) as error:
        print(f"npair: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as interrupt:
        if str(interrupt):
            print(f"npair: {interrupt}", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="npair", description="Train, score, publish and release N-pair embedding networks."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for group in (data, train, evaluate, publish, release, index, tune, web):
        group.add_commands(commands)
    return parser
