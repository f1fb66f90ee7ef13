"""The ``npair`` command: embed photos; train, score, publish and release embedding networks.

Each module adds a group of commands. A command imports its libraries when it runs, so that
``--help`` is quick and needs none of them. It names the extra of ``pip install`` that brings them.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import select
import signal
import sys
from collections.abc import Callable

import npair
from npair.cli import bulk, data, evaluate, index, publish, release, train, tune, web
from npair.client import NpairError
from npair.client import cli as client_commands
from npair.client.cli import EXIT_INTERRUPTED, EXIT_PIPE


def main() -> int:
    """Run the command that ``sys.argv`` names.

    Returns: 0; 1 after an error, with one line on stderr that names it; 130 after Ctrl-C, SIGTERM
    or SIGHUP; 141 if the reader of stdout or stderr has closed the pipe. Commands of the client
    have exit codes of their own. An interrupted promotion is undone. Interrupted training saves a
    checkpoint; after SIGHUP, its last one remains.
    """
    client_commands.print_any_name()
    try:
        try:
            return _run(parser().parse_args())
        finally:
            print(end="", flush=True)  # fails here, where it is caught, if the reader has left
    except OSError as error:
        return EXIT_PIPE if _readers_left() else _fail(error)


def parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    whole = argparse.ArgumentParser(
        prog="npair",
        description="Embed photos; train, score, publish and release N-pair embedding networks.",
    )
    whole.add_argument("--version", action="version", version=f"npair {npair.__version__}")
    whole.set_defaults(extra="")
    commands = whole.add_subparsers(required=True, metavar="COMMAND")
    client_commands.add_commands(commands)
    for group in (data, train, evaluate, publish, release, index, tune, web, bulk):
        group.add_commands(commands)
    return whole


def _run(arguments: argparse.Namespace) -> int:
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_DFL:  # nohup ignores SIGHUP
            signal.signal(number, signal.default_int_handler)
    command: Callable[[argparse.Namespace], int] = arguments.command
    try:
        return command(arguments)
    except ModuleNotFoundError as error:
        library = str(error.name).partition(".")[0]
        if not arguments.extra or importlib.util.find_spec(library):  # a fault of npair
            raise
        install = f"pip install 'npair[{arguments.extra}]'"
        print(f"{arguments.prog} needs {library}: {install}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # for main(), which tells whether a reader has left
        raise
    except NpairError as error:
        url = getattr(arguments, "url", None)
        return _fail(f"{url}: {error}" if url else error)
    except (ValueError, RuntimeError, OSError) as error:
        return _fail(error)
    except KeyboardInterrupt as interrupt:
        if str(interrupt):
            _fail(interrupt)
        return EXIT_INTERRUPTED


def _readers_left() -> bool:
    """Return whether the reader of stdout or stderr is gone.

    If so, what is left in Python's buffer goes nowhere, since it would fail again at exit.
    """
    pipes = select.poll()
    for descriptor in (1, 2):
        pipes.register(descriptor, 0)  # POLLERR is reported unasked
    left = [descriptor for descriptor, event in pipes.poll(0) if event & select.POLLERR]
    for descriptor in left:
        os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
    return bool(left)


def _fail(reason: object) -> int:
    print(f"npair: {reason}", file=sys.stderr)
    return 1
