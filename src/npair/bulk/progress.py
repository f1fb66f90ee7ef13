"""How far a job is, on one line: the share that is done, the rate, the time left."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import ray
from tqdm import tqdm

from npair.bulk.output import Progress
from npair.client_files import CLEAR

TERMINAL_SECONDS, LOG_SECONDS = 0.5, 60.0  # between two lines: of a terminal, of a log


class Done(NamedTuple):
    """What actors have embedded. size: in the source's unit."""

    photos: int = 0
    refused: int = 0
    size: int = 0


@ray.remote(num_cpus=0)
class Counter:
    """Sums what the actors have done."""

    def __init__(self) -> None:
        self.done = Done()

    def add(self, *done: int) -> None:
        """Add the fields of Done."""
        self.done = Done(*map(sum, zip(self.done, done, strict=True)))

    def read(self) -> Done:
        return self.done


def line(done: Done, progress: Progress, unit: str, seconds: float) -> str:
    """Describe how far a job is. progress: when it began."""
    size = progress.done + done.size
    rate = done.size / seconds
    left = tqdm.format_interval((progress.total - size) / rate) if rate else "?"
    share = (
        f"{size:,} of {progress.total:,} photos"
        if unit == "photos"
        else f"{size / progress.total:.1%}"
    )
    return f"{share}, {done.photos / seconds:,.0f} photos/s, {left} left, {done.refused:,} refused"


@contextlib.contextmanager
def shown_progress(counter: Any, progress: Progress, unit: str) -> Iterator[None]:
    """Show a line on stderr: in place on a terminal, else a line a minute."""
    terminal, ended, began = sys.stderr.isatty(), threading.Event(), time.monotonic()

    def show() -> None:
        while not ended.wait(TERMINAL_SECONDS if terminal else LOG_SECONDS):
            done = ray.get(counter.read.remote())
            text = line(done, progress, unit, time.monotonic() - began)
            print(CLEAR + text if terminal else text, end="" if terminal else "\n", file=sys.stderr)
            sys.stderr.flush()

    thread = threading.Thread(target=show, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        if terminal:
            print(end=CLEAR, file=sys.stderr, flush=True)
