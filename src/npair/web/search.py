"""Searches of the gallery: what the service knows of npair.gallery stands here alone."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import hashlib
import io
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from PIL import Image
from pydantic import BaseModel, Field
from starlette.concurrency import run_in_threadpool

from npair.client import PIXEL, NpairClient
from npair.client.formats import encoded_photo
from npair.gallery.gallery import Gallery, Hit, PhotoGoneError
from npair.gallery.location import GalleryError, Where
from npair.serving.preprocess import Limits, Preprocessing, decode

MAX_PHOTO = 20_000_000  # bytes: the model's own limit
MAX_K = 100
SIDE = 320  # pixels of a thumbnail, which shows the square that the network sees
THUMBNAIL = Preprocessing(size=SIDE, resample="BILINEAR", background=255)
LIMITS = Limits(max_bytes=MAX_PHOTO, max_pixels=64_000_000)
KEPT = 512  # thumbnails of 20 kB


class Info(BaseModel):
    """The gallery and the version of the model that made its vectors."""

    model: str
    version: str
    threshold: float | None = Field(description="cosine from which photos show the same product")
    photos: int
    labels: int = Field(description="how many different labels the photos have")


class Neighbour(BaseModel):
    """A photo of the gallery."""

    id: str
    label: str
    cosine: float
    same_product: bool | None = Field(description="null without a threshold")
    photo: str = Field(description="path of the thumbnail")
    columns: dict[str, str] = Field(description="the catalogue's other columns")


class Neighbours(BaseModel):
    """The photos of the gallery that are most similar to a photo, nearest first."""

    model: str
    version: str
    threshold: float | None
    neighbours: list[Neighbour]


class Thumbnail(NamedTuple):
    jpeg: bytes
    etag: str


@dataclass(frozen=True)
class Search:
    """A gallery's folder and a server. A call has the gallery to itself: another process may build
    it again at any time, and vectors of two versions must not meet.

    photos: where the photos are, if they were moved without the gallery. refresh: see Gallery.
    Calls raise GalleryError and NpairErrors.
    """

    folder: Where
    client: NpairClient
    photos: Path | None = None
    refresh: float | None = None
    _thresholds: dict[str, float | None] = field(default_factory=dict)  # by hash of the manifest
    _kept: list[Gallery] = field(default_factory=list)
    _opening: threading.Lock = field(default_factory=threading.Lock)
    # One thread, to bound memory: a photo takes up to 21 bytes a pixel, and malloc keeps the memory
    # that each thread has freed.
    _decoder: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1))
    _thumbnails: dict[tuple[Path, int, int], Future[Thumbnail]] = field(default_factory=dict)

    def close(self) -> None:
        """Close the client, and give up thumbnails that nobody waits for any more."""
        self.client.close()
        self._decoder.shutdown(wait=False, cancel_futures=True)

    def info(self) -> Info:
        with self._gallery() as gallery:
            labels = gallery.table.search().select(["label"]).to_arrow()["label"]
            threshold = self._threshold(gallery)
        return Info(
            model=gallery.model,
            version=gallery.version,
            threshold=threshold,
            photos=len(labels),
            labels=len(labels.unique()),
        )

    def check(self) -> str:
        """Search as users do, and return the version."""
        with self._gallery() as gallery:
            gallery.search(PIXEL, self.client, 1)
            return str(gallery.version)

    def by_photo(self, photo: bytes, k: int, threshold: float | None) -> Neighbours:
        with self._gallery() as gallery:
            found = gallery.search(photo, self.client, k)
            return self._neighbours(gallery, found, threshold)

    def by_id(self, photo_id: str, k: int, threshold: float | None) -> Neighbours:
        """Search by a photo of the gallery, which is left out itself, as are copies of it."""
        with self._gallery() as gallery:
            found = gallery.nearest(gallery.vector(photo_id), k, without=photo_id)
            return self._neighbours(gallery, found, threshold)

    async def thumbnail(self, photo_id: str) -> Thumbnail:
        """Return a photo's thumbnail, one that was made for another caller if possible.

        A caller that waits holds no thread that searches need.
        """
        file = await run_in_threadpool(self._file, photo_id)
        if file not in self._thumbnails:
            if len(self._thumbnails) == KEPT:
                del self._thumbnails[next(iter(self._thumbnails))]  # the oldest
            self._thumbnails[file] = self._decoder.submit(_thumbnail, file[0])
        made = self._thumbnails[file]
        try:
            return await asyncio.shield(asyncio.wrap_future(made))  # others may wait for it
        except Exception as error:
            self._thumbnails.pop(file, None)
            if isinstance(error, OSError | ValueError):
                raise PhotoGoneError(f"{file[0]}: {error}") from error
            raise

    def _file(self, photo_id: str) -> tuple[Path, int, int]:
        """Return a photo's path, and what tells the file from a later one."""
        with self._gallery() as gallery:
            path = gallery.photo(photo_id)
        try:
            stat = path.stat()
        except OSError as error:
            raise PhotoGoneError(f"{path}: {error}") from error
        return path, stat.st_mtime_ns, stat.st_size

    @contextlib.contextmanager
    def _gallery(self) -> Iterator[Gallery]:
        """Provide the gallery as it is, or as it was within ``refresh``; then it stays open, with
        what LanceDB has read of its index.
        """
        try:
            with self._opening:
                if self._kept:
                    self._kept[0].follow()
                gallery = copy.copy(self._kept[0]) if self._kept else None
            if gallery is None:
                gallery = Gallery(self.folder, self.photos, self.refresh)
                if gallery.refresh:
                    self._kept[:] = [copy.copy(gallery)]
            yield gallery
        except PhotoGoneError:
            raise
        except GalleryError:
            with self._opening:
                self._kept.clear()
            raise

    def _threshold(self, gallery: Gallery) -> float | None:
        """Get the threshold of the gallery's version: ask once, since a version never changes."""
        made_by = gallery.manifest_sha256
        if made_by not in self._thresholds:
            configuration = self.client.configuration()
            thresholds = configuration.thresholds()
            served = configuration.manifest_sha256(gallery.version) or ""
            if not thresholds or (thresholds.version, served) != (gallery.version, made_by):
                return None  # other vectors are served, at present
            self._thresholds[made_by] = thresholds.far_1_percent
        return self._thresholds[made_by]

    def _neighbours(
        self, gallery: Gallery, found: list[Hit], threshold: float | None
    ) -> Neighbours:
        if threshold is None:
            threshold = self._threshold(gallery)
        neighbours = [
            Neighbour(
                id=hit.id,
                label=hit.label,
                cosine=hit.cosine,
                same_product=None if threshold is None else hit.cosine >= threshold,
                photo=f"/photos/{hit.id}",
                columns=hit.columns,
            )
            for hit in found
        ]
        return Neighbours(
            model=gallery.model,
            version=gallery.version,
            threshold=threshold,
            neighbours=neighbours,
        )


def _thumbnail(path: Path) -> Thumbnail:
    """Encode a file's photo again, without its metadata.

    Raises: OSError, ValueError.
    """
    jpeg = io.BytesIO()
    pixels = decode(encoded_photo(path), THUMBNAIL, LIMITS)
    Image.fromarray(pixels).save(jpeg, "JPEG", quality=85)
    etag = hashlib.sha256(jpeg.getvalue()).hexdigest()[:32]
    return Thumbnail(jpeg.getvalue(), f'"{etag}"')
