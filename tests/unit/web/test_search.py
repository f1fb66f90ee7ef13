"""Search and show a gallery of imported vectors, without a server of models."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.concurrency import run_in_threadpool
from support.photos import photo
from support.vectors import bulk_file, units

from npair.client import NpairClient
from npair.gallery.gallery import Gallery
from npair.gallery.transfer import import_vectors
from npair.serving.preprocess import decode
from npair.web import search as searching
from npair.web.search import Search

PHOTOS = 60  # more than the framework has threads


@pytest.fixture
def search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Search]:
    """A search of PHOTOS photos, which lie at their ids below the working folder."""
    monkeypatch.chdir(tmp_path)
    bulk_file(tmp_path / "bulk/part-0.parquet", units(PHOTOS))
    import_vectors(tmp_path / "bulk", tmp_path / "gallery")
    search = Search(tmp_path / "gallery", NpairClient())
    yield search
    search.close()


def ids(search: Search) -> list[str]:
    """Write the gallery's photos; return their ids."""
    hits = Gallery(search.folder).nearest(units(1)[0], PHOTOS)
    for number, hit in enumerate(hits):
        photo(Path(hit.photo), number)
    return [hit.id for hit in hits]


class Decoder:
    """Decodes once it may, and remembers in which threads."""

    def __init__(self) -> None:
        self.threads: list[int] = []
        self.begun, self.allowed = threading.Event(), threading.Event()

    def __call__(self, *arguments: Any) -> Any:
        self.threads.append(threading.get_ident())
        self.begun.set()
        assert self.allowed.wait(60)
        return decode(*arguments)


def test_a_photo_with_many_copies_has_neighbours(search: Search) -> None:
    """Copies share their id, and are more than the neighbours that are asked for."""
    first, second = ids(search)[:2]
    table = Gallery(search.folder).table
    row = table.search().where(f"sha256 = '{first}'").to_list()[0]
    table.add([row | {"photo": str(number)} for number in range(20)])
    found = search.by_id(first, 12, threshold=0.5).neighbours
    assert len(found) == 12
    assert (found[0].id, first in {each.id for each in found}) == (second, False)


def test_thumbnails_are_made_once_by_one_thread_and_hold_no_other(
    search: Search, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = Decoder()
    monkeypatch.setattr(searching, "decode", decoder)
    photos = ids(search)

    async def ask() -> list[bytes]:
        waiting = [asyncio.create_task(search.thumbnail(one)) for one in 2 * photos]
        try:
            await asyncio.to_thread(decoder.begun.wait, 60)
            for _ in range(PHOTOS):  # searches
                await asyncio.wait_for(run_in_threadpool(int), 60)
        finally:
            decoder.allowed.set()
        return [thumbnail.jpeg for thumbnail in await asyncio.gather(*waiting)]

    made = asyncio.run(ask())
    assert made[:PHOTOS] == made[PHOTOS:]
    assert len(decoder.threads) == PHOTOS
    assert len(set(decoder.threads)) == 1


def test_a_thumbnail_that_failed_is_made_again(
    search: Search, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = ids(search)[0]

    def failing(*_: Any) -> Any:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(searching, "decode", failing)
        with pytest.raises(MemoryError):
            asyncio.run(search.thumbnail(one))
    assert asyncio.run(search.thumbnail(one)).jpeg.startswith(b"\xff\xd8")


def test_few_thumbnails_are_kept(search: Search, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(searching, "KEPT", 3)
    for one in ids(search)[:5]:
        asyncio.run(search.thumbnail(one))
    assert len(search._thumbnails) == 3
