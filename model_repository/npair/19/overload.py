"""Refuse what waits beyond a limit.

Triton can do this by itself, but with a limit of its own it hands an instance the next batch only
after the last one is answered.
"""

from __future__ import annotations

import contextlib
import http.client
import math
import os
import re
import threading
from collections.abc import Callable

WAITING = "nv_inference_pending_request_count"
ADDRESS = "NPAIR_METRICS_ADDRESS"  # the variable in which serve.py names the server's metrics port
# Seconds between looks at the queue: INTERVAL while more than half of the limit wait, otherwise
# CALM_INTERVAL, since a look takes half a millisecond of CPU.
INTERVAL, CALM_INTERVAL = 0.05, 0.25
TIMEOUT = 1.0  # seconds


class Overload:
    """Decides which batches of a model's version to refuse.

    A thread reads how many requests wait, as long as there are any. If more than ``limit`` do, the
    instances refuse the oldest, each its share, so that half of the limit is left.
    """

    def __init__(
        self, model: str, version: str, *, limit: int, instances: int, warn: Callable[[str], None]
    ) -> None:
        self.limit, self.instances, self.warn = limit, instances, warn
        self.labels = {f'model="{model}"', f'version="{version}"'}
        self.address = os.environ.get(ADDRESS, "")
        self.warned = False
        self.excess = 0  # requests that this instance is to refuse
        self.looking, self.closing = threading.Event(), threading.Event()
        self.thread = threading.Thread(target=self._look, daemon=True)
        self.thread.start()

    def refuses(self, requests: int) -> bool:
        """Whether to refuse a batch of this many requests."""
        refused = self.excess > 0
        if refused:
            self.excess -= requests
        self.looking.set()
        return refused

    def close(self) -> None:
        """End the thread."""
        self.closing.set()
        self.looking.set()
        self.thread.join()

    def _look(self) -> None:
        half, interval = self.limit // 2, CALM_INTERVAL
        while self.looking.wait() and not self.closing.wait(interval):
            self.looking.clear()
            waiting = self._waiting()
            too_many = waiting - half if waiting > self.limit else 0
            self.excess = math.ceil(too_many / self.instances)
            interval = INTERVAL if waiting > half else CALM_INTERVAL
            if waiting:  # whether or not another batch comes
                self.looking.set()

    def _waiting(self) -> int:
        """Return how many requests wait, 0 if that is unknown."""
        try:
            if not self.address:
                raise LookupError(f"{ADDRESS} is not set")
            connection = http.client.HTTPConnection(self.address, timeout=TIMEOUT)
            with contextlib.closing(connection):
                connection.request("GET", "/metrics")
                metrics = connection.getresponse().read().decode()
            for labels, value in re.findall(rf"^{WAITING}{{(.*)}} (\S+)$", metrics, re.MULTILINE):
                if self.labels <= set(labels.split(",")):
                    return int(float(value))
            raise LookupError(f"the server's metrics lack {WAITING}")
        except (OSError, http.client.HTTPException, ValueError, LookupError) as error:
            if not self.warned:
                self.warned = True
                self.warn(f"no request is refused, however many wait: {error}")
            return 0
