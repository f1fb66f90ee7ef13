"""Clients that run beside a test."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

C = TypeVar("C", bound="Clients")


class Clients:
    """Calls each function in a thread, with an event that is set when the block ends.

    The functions must return soon after.
    """

    def __init__(self, *work: Callable[[threading.Event], object]) -> None:
        self.stopping = threading.Event()
        self.threads = [threading.Thread(target=each, args=(self.stopping,)) for each in work]

    def __enter__(self: C) -> C:
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopping.set()
        for thread in self.threads:
            thread.join(60)
