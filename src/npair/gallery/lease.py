"""The right to build a gallery in an object store, where a dead process leaves its lock behind.

The holder renews an object, and anyone else watches whether it changes. No clocks are compared.
"""

from __future__ import annotations

import contextlib
import threading
import time
from typing import Protocol

from npair.objects import this_process

BEAT = 5.0  # seconds between renewals
EXPIRY = 30.0  # without a renewal, the holder counts as dead


class Tagged(Protocol):
    """What a lease needs of a store; see location.Bucket."""

    def read(self, path: str) -> bytes: ...
    def tag_of(self, name: str) -> str | None: ...
    def put(self, name: str, content: bytes, tag: str | None) -> str | None: ...


class Lease:
    """A lease, held inside ``with`` if it is true; otherwise ``holder`` names who has it.

    An object that is empty is free.
    """

    def __init__(self, store: Tagged, name: str) -> None:
        self.store, self.name, self.holder = store, name, ""
        self._process = this_process()
        self._tag: str | None = None
        self._renewed = 0.0
        self._ended = threading.Event()
        self._renewing = threading.Thread(target=self._renew, daemon=True)

    def __bool__(self) -> bool:
        """Tell whether no other process can have the lease: it was renewed not long ago."""
        return self._tag is not None and time.monotonic() - self._renewed < EXPIRY - 2 * BEAT

    def __enter__(self) -> Lease:
        """Take the lease if it is free, or if nobody renews it for EXPIRY seconds."""
        tag, watched = self.store.tag_of(self.name), time.monotonic()
        while tag and (content := self.store.read(self.name)):
            self.holder = content.decode().partition(";")[0]
            if time.monotonic() - watched > EXPIRY:
                break
            time.sleep(BEAT / 5)
            if (now := self.store.tag_of(self.name)) != tag:
                tag = now
                if now and self.store.read(self.name):  # renewed, not freed
                    return self
        asked = time.monotonic()
        self._tag, self._renewed = self.store.put(self.name, self._content(), tag), asked
        if self._tag:
            self._renewing.start()
        else:
            self.holder = "another process"
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._renewing.is_alive():
            self._renewing.join()
        if self._tag:
            with contextlib.suppress(OSError, RuntimeError):  # else it expires
                self.store.put(self.name, b"", self._tag)

    def _renew(self) -> None:
        while self._tag and not self._ended.wait(BEAT):
            asked = time.monotonic()
            with contextlib.suppress(OSError, RuntimeError):  # the store may be back soon
                self._tag = self.store.put(self.name, self._content(), self._tag)
                self._renewed = asked

    def _content(self) -> bytes:
        return f"{self._process}; renewed {time.time_ns()}".encode()
