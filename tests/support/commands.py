"""The commands that npair has."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from npair import cli


def commands(
    parser: argparse.ArgumentParser | None = None, words: str = "npair"
) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Yield each command and group of commands, in words, with its parser."""
    parser = parser or cli.parser()
    yield words, parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, command in action.choices.items():
                yield from commands(command, f"{words} {name}")
