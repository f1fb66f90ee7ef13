"""Searches of the gallery: what the service knows of npair.gallery stands here alone."""

from __future__ import annotations

import functools
import hashlib
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from pydantic import BaseModel, Field

from npair.client import PIXEL, NpairClient
from npair.gallery.gallery import Found, Gallery
from npair.serving.preprocess import Limits, Preprocessing, decode
from npair.serving.refusal import PhotoError
from npair.web.refusals import RefusedError

MAX_PHOTO = 20_000_000  # bytes: the model's own limit
MAX_K = 100
SIDE = 320  # pixels of a thumbnail, which shows the square that the network sees
THUMBNAIL = Preprocessing(size=SIDE, resample="BILINEAR", background=255)
LIMITS = Limits(max_bytes=MAX_PHOTO, max_pixels=64_000_000)


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
    columns: dict[str, Any] = Field(description="the catalogue's other columns")


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
    """A gallery's folder and a server. A call opens the gallery as it then is: another process may
    build it anew at any time, and vectors of two versions must not meet.

    Calls raise RefusedError, GalleryError and NpairErrors.
    """

    folder: Path
    client: NpairClient

    def info(self) -> Info:
        gallery = Gallery(self.folder)
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
        gallery = Gallery(self.folder)
        gallery.search(PIXEL, self.client, 1)
        return str(gallery.version)

    def by_photo(self, photo: bytes, k: int, threshold: float | None) -> Neighbours:
        gallery = Gallery(self.folder)
        return self._neighbours(gallery, gallery.search(photo, self.client, k), threshold)

    def by_id(self, identifier: str, k: int, threshold: float | None) -> Neighbours:
        """Search by a photo of the gallery, which is left out itself."""
        gallery = Gallery(self.folder)
        name = _name(gallery, identifier)
        quoted = name.replace("'", "''")
        (row,) = gallery.table.search().where(f"photo = '{quoted}'").limit(1).to_list()
        found = gallery.nearest(row["vector"], k + 1)
        others = [each for each in found if each.photo != name]
        return self._neighbours(gallery, others[:k], threshold)

    def thumbnail(self, identifier: str) -> Thumbnail:
        path = Path(_name(Gallery(self.folder), identifier))
        try:
            stat = path.stat()
            return _thumbnail(path, stat.st_mtime_ns, stat.st_size)
        except (OSError, PhotoError) as error:
            message = "the photo's file is gone, or no longer a photo"
            raise RefusedError(404, message, code="photo_gone") from error

    def _threshold(self, gallery: Gallery) -> float | None:
        thresholds = self.client.thresholds()
        known = thresholds is not None and thresholds.version == gallery.version
        return thresholds.far_1_percent if thresholds and known else None

    def _neighbours(
        self, gallery: Gallery, found: list[Found], threshold: float | None
    ) -> Neighbours:
        if threshold is None:
            threshold = self._threshold(gallery)
        neighbours = [
            Neighbour(
                id=(identifier := _id(each.photo)),
                label=each.label,
                cosine=each.cosine,
                same_product=None if threshold is None else each.cosine >= threshold,
                photo=f"/photos/{identifier}",
                columns={},
            )
            for each in found
        ]
        return Neighbours(
            model=gallery.model,
            version=gallery.version,
            threshold=threshold,
            neighbours=neighbours,
        )


def _id(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()[:16]


def _name(gallery: Gallery, identifier: str) -> str:
    names = gallery.table.search().select(["photo"]).to_arrow()["photo"].to_pylist()
    for name in names:
        if _id(name) == identifier:
            return str(name)
    raise RefusedError(404, "the gallery has no such photo", param="id", code="no_such_photo")


@functools.lru_cache(maxsize=512)  # 20 kB each
def _thumbnail(path: Path, *_: int) -> Thumbnail:
    """Encode a file's photo anew, without its metadata. _: what tells the file from a later one.

    Raises: OSError, PhotoError.
    """
    with path.open("rb") as file:
        photo = file.read(MAX_PHOTO + 1)
    jpeg = io.BytesIO()
    Image.fromarray(decode(photo, THUMBNAIL, LIMITS)).save(jpeg, "JPEG", quality=85)
    etag = hashlib.sha256(jpeg.getvalue()).hexdigest()[:32]
    return Thumbnail(jpeg.getvalue(), f'"{etag}"')
