"""Clients that run beside a test."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

C = TypeVar("C", bound="Clients")


class Clients:
    """Calls each function in a thread while the block runs.

    The functions must return soon after ``stopping`` is set, which the end of the block does.
    """

    def __init__(self, *work: Callable[[], object]) -> None:
        self.stopping = threading.Event()
        self.threads = [threading.Thread(target=each) for each in work]

    def __enter__(self: C) -> C:
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopping.set()
        for thread in self.threads:
            thread.join(60)
