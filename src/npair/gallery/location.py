"""Where a gallery lies: a folder, or a prefix of an S3 bucket.

Both hold the same: current.json, which names the table to search, and LanceDB's tables. They differ
in how the pointer is replaced in one step, and in how builders keep out of each other's way.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import lancedb
from filelock import FileLock, Timeout

from npair.gallery.lease import Lease
from npair.objects import Objects

POINTER = "current.json"
LOCK = "build.lock"
Where: TypeAlias = Path | str  # a folder, or s3://bucket/prefix

# A store that does not answer is given up within seconds, and not within s3fs's minutes.
ONCE_MORE = {"connect_timeout": 3, "read_timeout": 20, "retries": {"total_max_attempts": 2}}


class GalleryError(RuntimeError):
    """The gallery cannot be built or searched; the message says what to do."""


class GalleryStoreError(GalleryError):
    """The object store that holds the gallery does not answer, or refuses."""


class Location(Protocol):
    """A gallery's place. ``str`` gives what users call it.

    base: the folder that photos' names are relative to. refresh: how old, in seconds, what a search
    sees may be if the searcher does not say.
    """

    base: Path
    refresh: float

    def database(self, refresh: float = 0) -> lancedb.DBConnection:
        """Open the database. Its tables look for other processes' writes after ``refresh``
        seconds.
        """

    def prepare(self) -> None:
        """Make the place if need be. Raises: OSError, GalleryError."""

    def pointer(self) -> dict[str, str]:
        """Read the pointer; empty if there is no gallery. Raises: ValueError if it is damaged."""

    def tag(self) -> str | None:
        """Return what ``switch`` compares. Ask for it before the pointer is read."""

    def switch(self, pointer: dict[str, str], tag: str | None) -> None:
        """Replace the pointer in one step, after the data that it names is safe.

        Raises: GalleryError if another process has replaced it since the tag was returned.
        """

    def exclusive(self) -> AbstractContextManager[None]:
        """Hold the right to build. Raises: GalleryError if another process has it."""

    def check(self) -> None:
        """Raise GalleryError if ``exclusive`` has been lost since."""

    def broken(self, error: Exception) -> GalleryError:
        """Return what to say of an error that LanceDB raises when it reads."""


class Folder:
    """A gallery on a local disk. The kernel releases the lock if the process dies."""

    refresh = 0.0  # to look costs less than a millisecond

    def __init__(self, folder: Path) -> None:
        self.folder, self.base = folder, folder.resolve()

    def __str__(self) -> str:
        return str(self.folder)

    def database(self, refresh: float = 0) -> lancedb.DBConnection:
        return lancedb.connect(self.folder, read_consistency_interval=timedelta(seconds=refresh))

    def prepare(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)

    def pointer(self) -> dict[str, str]:
        try:
            return dict(json.loads((self.folder / POINTER).read_bytes()))
        except FileNotFoundError:
            return {}

    def tag(self) -> str | None:
        return None  # one process at a time builds

    def switch(self, pointer: dict[str, str], _: str | None) -> None:
        unfinished = self.folder / f"{POINTER}.unfinished"
        unfinished.write_text(json.dumps(pointer), encoding="utf-8")
        os.sync()  # with the table's data, before anything names it
        unfinished.replace(self.folder / POINTER)

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[None]:
        try:
            lock = FileLock(self.folder / LOCK, fallback_to_soft=False).acquire(blocking=False)
        except Timeout as error:
            raise GalleryError(
                f"another process builds the gallery in {self}; wait for it, then try again"
            ) from error
        with lock:
            yield

    def check(self) -> None:
        pass

    def broken(self, error: Exception) -> GalleryError:
        return GalleryError(
            f"the gallery in {self} is damaged; delete it, and build it again: npair index build"
            f" ({error})"
        )


class Bucket(Objects):
    """A gallery in an object store that speaks S3, where nothing is renamed and no kernel releases
    locks: puts on a condition replace the pointer, and a lease is the lock.

    LanceDB commits by such puts as well. Endpoint and region are found in one way for both.
    """

    error = GalleryStoreError
    base = Path("/")  # photos do not move together with a bucket
    refresh = 5.0  # to look costs a search about one more round trip

    def __init__(self, location: str) -> None:
        super().__init__(location, config_kwargs=ONCE_MORE)
        self.store.retries = 1  # beside botocore's own
        self.bucket, _, self.prefix = self.root.partition("/")
        self._lease: Lease | None = None

    def __str__(self) -> str:
        return self.location

    def database(self, refresh: float = 0) -> lancedb.DBConnection:
        self._ask("connect")
        options = {"client_max_retries": "2", "client_retry_timeout": "20"}  # seconds
        found = self.store.s3.meta
        if not found.endpoint_url.endswith(".amazonaws.com"):
            plain = str(found.endpoint_url.startswith("http://")).lower()
            options |= {"endpoint": found.endpoint_url, "allow_http": plain}
            options |= {"region": found.region_name or "us-east-1"}
        return lancedb.connect(
            self.location,
            read_consistency_interval=timedelta(seconds=refresh),
            storage_options=options,
        )

    def prepare(self) -> None:
        """Raise GalleryStoreError if there is no such bucket: a typing error makes none."""
        try:
            self._ask("call_s3", "head_bucket", Bucket=self.bucket)
        except FileNotFoundError as error:
            raise GalleryStoreError(
                f"there is no bucket {self.bucket} at {self.store.s3.meta.endpoint_url}; make it,"
                " or name another: --index"
            ) from error

    def pointer(self) -> dict[str, str]:
        try:
            return dict(json.loads(self.read(POINTER)))
        except FileNotFoundError:
            self.prepare()
            return {}

    def tag(self) -> str | None:
        return self.tag_of(POINTER)

    def switch(self, pointer: dict[str, str], tag: str | None) -> None:
        if self.put(POINTER, json.dumps(pointer).encode(), tag) is None:
            raise GalleryError(
                f"another process has built the gallery in {self} meanwhile, and its build is what"
                " is searched; run the same command again, which embeds nothing twice"
            )

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[None]:
        with Lease(self, LOCK) as self._lease:
            if not self._lease:
                raise GalleryError(
                    f"{self._lease.holder} builds the gallery in {self}; wait for it, then try"
                    " again"
                )
            yield

    def check(self) -> None:
        if self._lease is not None and not self._lease:
            raise GalleryError(
                f"this process did not renew {self}/{LOCK} in time, so that another may build the"
                " gallery; run the same command again, which continues"
            )

    def broken(self, error: Exception) -> GalleryError:
        try:
            self.prepare()
        except GalleryStoreError as reason:
            return reason
        return GalleryStoreError(
            f"the gallery in {self} cannot be read; try again, and if that does not help, build it"
            f" again: npair index build ({_plain(error)})"
        )

    def tag_of(self, name: str) -> str | None:
        """Return an object's tag, which changes with its content; None if there is no object."""
        with contextlib.suppress(FileNotFoundError):
            found = self._ask("call_s3", "head_object", Bucket=self.bucket, Key=self._key(name))
            return str(found["ETag"])
        return None

    def put(self, name: str, content: bytes, tag: str | None) -> str | None:
        """Put an object in place of the one with this tag; None: if there is none.

        Returns: its own tag; None if another process was quicker.
        """
        condition = {"IfMatch": tag} if tag else {"IfNoneMatch": "*"}
        target = {"Bucket": self.bucket, "Key": self._key(name), "Body": content}
        try:
            return str(self._ask("call_s3", "put_object", **target, **condition)["ETag"])
        except OSError:
            if (there := self.tag_of(name)) in (tag, None):
                raise
            # If the answer was lost and the library asked again, the object is this process's.
            return there if self.read(name) == content else None

    def _key(self, name: str) -> str:
        return f"{self.prefix}/{name}".lstrip("/")

    def _ask(self, operation: str, *arguments: object, **options: object) -> Any:
        try:
            return super()._ask(operation, *arguments, **options)
        except PermissionError as error:
            raise GalleryStoreError(
                f"{self} refuses: {error}; see AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, and"
                " what that key may do"
            ) from error


def locate(where: Where) -> Location:
    """Return a gallery's place. Raises: GalleryError if it cannot be one."""
    scheme, remote, rest = str(where).partition("://")
    if not remote:
        return Folder(Path(where))
    if scheme != "s3" or not rest.strip("/"):
        raise GalleryError(f"{where} is neither a folder nor s3://BUCKET/PREFIX")
    try:
        return Bucket(str(where))
    except ImportError as error:
        raise GalleryError(
            "support for s3:// is not installed; run: pip install 'npair[s3]'"
        ) from error


@contextlib.contextmanager
def readable(location: Location) -> Iterator[None]:
    """Map the errors that LanceDB raises for what it cannot read to GalleryError."""
    try:
        yield
    except (PermissionError, GalleryError):
        raise
    except (LookupError, OSError, RuntimeError, TypeError, ValueError) as error:
        raise location.broken(error) from error


@contextlib.contextmanager
def writable(location: Location) -> Iterator[None]:
    """Map the errors that LanceDB raises when it writes to GalleryError."""
    location.check()
    try:
        yield
    except GalleryError:
        raise
    except (OSError, RuntimeError) as error:
        raise GalleryError(
            f"the gallery in {location} cannot be written: {_plain(error)}; fix that, then run the"
            " same command again, which continues"
        ) from error
    location.check()


def _plain(error: Exception) -> str:
    """Return an error's text without the places in LanceDB's source."""
    return re.sub(r"lance error: |, /\S+\.rs:\d+:\d+", "", str(error))
