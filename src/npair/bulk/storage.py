"""Files on this machine or in an object store, through pyarrow's file systems."""

from __future__ import annotations

import contextlib
import functools
import os
import uuid
from collections.abc import Iterator

import pyarrow as pa
from pyarrow import fs

from npair.bulk import BulkError
from npair.data.files import shown

ACCESS = (
    "; an object store is found by AWS_ENDPOINT_URL and AWS_DEFAULT_REGION, and opened by"
    " AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or the machine's role"
)


def locate(location: str) -> tuple[fs.FileSystem, str]:
    """Return the file system of a location, and the path in it.

    location: a path, or such as s3://bucket/key. Raises: BulkError for another scheme.
    """
    with reachable(location):
        return resolve(location)


def resolve(location: str) -> tuple[fs.FileSystem, str]:
    """Like ``locate``, but raises ArrowInvalid if the location can never be used, and OSError."""
    scheme, remote, path = location.partition("://")
    if not remote:
        return fs.LocalFileSystem(), os.path.abspath(location)  # noqa: PTH100 - keeps links
    # The key is no part of a URI: it may hold any character.
    return _store(f"{scheme}://{path.partition('/')[0]}"), path.rstrip("/")


@functools.cache
def _store(uri: str) -> fs.FileSystem:
    return fs.FileSystem.from_uri(uri)[0]


def absolute(location: str) -> str:
    """Return a location that means the same in every working directory."""
    return location.rstrip("/") if "://" in location else locate(location)[1]


def files_in(system: fs.FileSystem, path: str) -> list[fs.FileInfo]:
    """List the files of a folder and of the folders in it, sorted; a file itself.

    Returns: an empty list if there is nothing. Raises: OSError; BulkError for a name not in UTF-8.
    """
    info = system.get_file_info(path)
    if info.is_file:
        return [info]
    return [each for each in entries(system, path, recursive=True) if each.is_file]


def entries(system: fs.FileSystem, path: str, *, recursive: bool = False) -> list[fs.FileInfo]:
    """List what is in a folder, sorted; nothing if it is missing.

    Raises: OSError; BulkError for a name not in UTF-8.
    """
    selector = fs.FileSelector(path, recursive=recursive, allow_not_found=True)
    found = system.get_file_info(selector)
    try:
        return sorted(found, key=lambda each: str(each.path))
    except UnicodeDecodeError as error:
        name = shown(os.fsdecode(error.object))
        raise BulkError(f"the name {name} is not UTF-8; rename the file") from error


def write_whole(system: fs.FileSystem, path: str, content: pa.Buffer, scratch: str) -> None:
    """Write a file in one step: whoever looks finds all of it, or what was there before.

    scratch: a folder in the same file system. Raises: OSError.
    """
    # An object store shows what is written once it is closed; a disk does at once.
    local = isinstance(system, fs.LocalFileSystem)
    written = f"{scratch}/{uuid.uuid4().hex}" if local else path
    with system.open_output_stream(written) as file:
        file.write(content)
    if local:
        system.move(written, path)


@contextlib.contextmanager
def reachable(location: str) -> Iterator[None]:
    """Map the errors of file systems to BulkError, with the location."""
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        remedy = ACCESS if "://" in location else ""
        raise BulkError(f"{location} cannot be used: {error}{remedy}") from error
