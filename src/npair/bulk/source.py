"""A list of photos, cut into pieces that actors read by themselves."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any, NamedTuple, Protocol

from npair.data.files import OTHER_SUFFIXES, SUFFIXES

PHOTOS = {*SUFFIXES, *OTHER_SUFFIXES}  # the version says which of them it refuses


class Piece(NamedTuple):
    """A part of a list, of which all rows are written in one step.

    size: in the source's unit. content: what ``Source.photos`` takes; JSON.
    """

    size: int
    content: Any


class Photo(NamedTuple):
    """A photo of a list: its bytes, cut off behind the limit, or why they cannot be read."""

    id: str
    read: bytes | str


class Source(Protocol):
    """A list of photos. It travels to other machines, so it holds no open file."""

    @property
    def kind(self) -> str:
        """What the list is made of: "photos", "shards" or "tables"."""

    @property
    def unit(self) -> str:
        """What the sizes of pieces count: "photos" or "bytes"."""

    @property
    def stamp(self) -> str:
        """Changes if the list changes; empty if the pieces hold the list."""

    def pieces(self, rows: int) -> Iterator[Piece]:
        """Cut the list, into pieces of so many rows if it has no parts of its own.

        Raises: BulkError, also if two rows have the same id.
        """

    def photos(self, content: Any, most: int) -> Iterator[Photo]:
        """Read a piece's photos, and at least ``most`` + 1 bytes of one that has more than that.

        Raises: BulkError if the piece cannot be read.
        """


def is_photo(path: str) -> bool:
    """Tell by its name whether a file is a photo; hidden ones are none."""
    name = PurePosixPath(path)
    return name.suffix.lower() in PHOTOS and not name.name.startswith(".")


def below(path: str, root: str) -> str:
    """Return a path relative to a root that it is in; empty for the root itself."""
    return path[len(root) :].lstrip("/")
