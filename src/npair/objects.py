"""Objects under a prefix of an object store: read whole, and put on a condition.

A put is atomic, and a read returns the last put. Of several puts on the same condition, one
succeeds: that is what takes the place of renaming and of locking files.
"""

from __future__ import annotations

import os
import socket
from datetime import datetime, timezone
from typing import Any


class StoreError(RuntimeError):
    """The object store cannot be used; the message says what to do."""


def this_process() -> str:
    """Name this process for a lock that others may find, with the time down to the microsecond."""
    since = datetime.now(timezone.utc).isoformat()
    return f"user {os.getuid()} on {socket.gethostname()}, process {os.getpid()}, since {since}"


class Objects:
    """The objects under a prefix. location: its URL. root: the same without the scheme."""

    error: type[RuntimeError] = StoreError

    def __init__(self, location: str, **options: object) -> None:
        """location: s3:// or gs://. options: fsspec's.

        Credentials, region and endpoint are those that the store's own tools take from the
        environment and from their files, such as AWS_ENDPOINT_URL.
        Raises: ImportError if support for the store is not installed.
        """
        import fsspec  # noqa: PLC0415  # an optional extra

        self.location = location.rstrip("/")
        self.store, self.root = fsspec.url_to_fs(self.location, use_listings_cache=False, **options)

    def read(self, path: str) -> bytes:
        """Read an object. Raises: FileNotFoundError."""
        content: bytes = self._ask("cat_file", f"{self.root}/{path}")
        return content

    def _create(self, path: str, content: bytes) -> bool:
        """Create an object. Returns: False if it exists; of several callers, one gets True.

        path: in the store, prefix included, unlike that of ``read``.
        """
        try:
            self._ask("pipe_file", path, content, mode="create")
        except OSError:  # FileExistsError only from AWS and Google
            if not self._ask("exists", path):
                raise
            return False
        return True

    def _ask(self, operation: str, *arguments: object, **options: object) -> Any:
        """Call the store.

        Raises: OSError for the store's refusals. Other errors, such as a lost connection or missing
        credentials, differ between stores; they become ``error``.
        """
        try:
            return getattr(self.store, operation)(*arguments, **options)
        except OSError:
            raise
        except Exception as error:
            raise self.error(f"{self.location} cannot be reached: {error}") from error
