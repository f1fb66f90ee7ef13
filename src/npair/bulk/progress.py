"""How far a job is, on one line: the share that is done, the rate, the time left."""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Iterator
from typing import NamedTuple, TextIO

from tqdm import tqdm

from npair.bulk.output import Progress
from npair.client.rows import CLEAR

TERMINAL_SECONDS, LOG_SECONDS = 0.5, 60.0  # between two lines: of a terminal, of a log


class Done(NamedTuple):
    """What actors have embedded. size: in the source's unit. seconds: since one was ready."""

    photos: int = 0
    refused: int = 0
    size: int = 0
    seconds: float = 0.0

    @property
    def rate(self) -> float:
        """Photos per second, 0 as long as it is not known."""
        return self.photos / self.seconds if self.seconds else 0.0


class Counter:
    """Sums what the actors have done."""

    def __init__(self) -> None:
        self.done, self.began = Done(), math.inf

    def add(self, photos: int, refused: int, size: int, seconds: float) -> None:
        """Add a piece. seconds: for which its actor has been ready."""
        before, now = self.done, time.monotonic()
        self.began = min(self.began, now - seconds)  # clocks of two machines do not compare
        self.done = Done(
            before.photos + photos,
            before.refused + refused,
            before.size + size,
            now - self.began,
        )


def line(done: Done, progress: Progress, unit: str) -> str:
    """Describe how far a job is. progress: when it began."""
    size, total = progress.done + done.size, progress.total
    share = f"{size:,} of {total:,} photos" if unit == "photos" else f"{size / total:.1%}"
    left = (total - size) * done.seconds / done.size if done.seconds else 0
    time_left = f", {tqdm.format_interval(left)} left" * bool(left)
    return f"{share}, {done.rate:,.0f} photos/s{time_left}, {done.refused:,} refused"


@contextlib.contextmanager
def shown_progress(
    counter: Counter, progress: Progress, unit: str, stream: TextIO
) -> Iterator[None]:
    """Show a line in place on a terminal, or a line a minute in a log."""
    terminal, ended = stream.isatty(), threading.Event()

    def show() -> None:
        while not ended.wait(TERMINAL_SECONDS if terminal else LOG_SECONDS):
            text = line(counter.done, progress, unit)
            print(
                f"{CLEAR}{text}" if terminal else text,
                end="" if terminal else "\n",
                file=stream,
                flush=True,
            )

    thread = threading.Thread(target=show, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        print(end=CLEAR if terminal else "", file=stream, flush=True)
