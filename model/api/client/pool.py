"""The connections of a client."""

from __future__ import annotations

import contextlib
import math
import os
import random
import threading
from collections.abc import Callable, Iterator

from .transports import Transport

BACKOFF_SECONDS = 0.2  # before the first retry, twice as much before each next
PATIENT_RETRIES = 8  # half a minute or more, in which a full or restarted server recovers


class Pool:
    """The transports of a client, each lent to one call at a time and kept for later ones.

    Without a lock, which a fork could leave locked: list and set operations are atomic.
    """

    def __init__(self, connect: Callable[[], Transport]) -> None:
        self._connect = connect
        self._idle: list[Transport] = []
        self._begin()

    def _begin(self) -> None:
        """Drop what a forked process inherits: its requests would be taken for its parent's."""
        self._close_idle()
        self._process, self._lent = os.getpid(), set[Transport]()
        self._closed = threading.Event()

    @contextlib.contextmanager
    def lend(self) -> Iterator[Transport]:
        """Raises: RuntimeError if the client is closed."""
        if self._process != os.getpid() and not self._closed.is_set():
            self._begin()
        self.check_open()
        try:
            transport = self._idle.pop()
        except IndexError:
            transport = self._connect()
        self._lent.add(transport)
        try:
            yield transport
        finally:
            self._lent.discard(transport)
            self._idle.append(transport)
            if self._closed.is_set():
                self._close_idle()

    def back_off(self, attempt: int, most: float = math.inf) -> None:
        """Back off exponentially, with jitter. Raises: RuntimeError if the client is closed."""
        self._closed.wait(min(BACKOFF_SECONDS * 2**attempt * random.uniform(0.5, 1), most))
        self.check_open()

    def check_open(self) -> None:
        if self._closed.is_set():
            raise RuntimeError("the client is closed")

    def close(self) -> None:
        if self._process == os.getpid():
            self._closed.set()
            for transport in list(self._lent):
                transport.abort()
            self._close_idle()

    def _close_idle(self) -> None:
        with contextlib.suppress(IndexError):
            while True:
                self._idle.pop().close()
