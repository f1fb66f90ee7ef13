"""The Grocery Store Dataset (Klasson et al., WACV 2019; MIT licence)."""

from __future__ import annotations

import http.client
import shlex
import shutil
import sys
import tarfile
import tempfile
import urllib.request
import zlib
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from tqdm import tqdm

from npair.data.dataset import DataError
from npair.data.sources import read_dataset

REPOSITORY = "https://github.com/marcusklasson/GroceryStoreDataset"
COMMIT = "b545e4c5db0a77d9274bc7753eb409f83772a3a5"
TIMEOUT = 30.0  # seconds without a byte
FETCH_ERRORS = (
    *(OSError, EOFError, http.client.HTTPException),
    *(tarfile.TarError, zlib.error, DataError),
)


@dataclass(frozen=True)
class Release:
    """A download, and how to check that it is complete.

    url: a gzipped tar archive with a single folder at its top.
    photos: the number of photos in each split.
    fingerprint: ``Dataset.fingerprint()`` of train and val.
    """

    url: str
    photos: dict[str, int]
    fingerprint: str


GROCERY = Release(
    url=f"https://codeload.github.com/marcusklasson/GroceryStoreDataset/tar.gz/{COMMIT}",
    photos={"train": 2640, "val": 296, "test": 2485},
    fingerprint="475e3785f3957fb0a6e5164e79cded0e1a2512135b6e366be77cfd485f7b0654",
)


def fetch_grocery(folder: Path, release: Release = GROCERY) -> Path:
    """Fetch the data set into ``folder``, or check the one that is there. Say on stderr which.

    Returns: ``folder``. Raises: DataError if the data set cannot be fetched or what is there is
    something else; the folder is then unchanged.
    """
    if folder.is_dir() and any(folder.iterdir()):
        _check(folder, release)
        print(
            f"{folder} already holds the Grocery Store Dataset, complete and unchanged",
            file=sys.stderr,
        )
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as staging:
            staged = Path(staging) / folder.name
            _download(release.url, staged)
            _check(staged, release)
            staged.replace(folder)
    except FETCH_ERRORS as error:
        quoted = shlex.quote(str(folder))
        raise DataError(
            f"the Grocery Store Dataset could not be fetched from {release.url} ({error}); try"
            f" again, or fetch it by hand: git clone {REPOSITORY} {quoted} && git -C {quoted}"
            f" checkout {COMMIT}"
        ) from error
    print(f"{folder} holds the Grocery Store Dataset", file=sys.stderr)
    return folder


def _download(url: str, folder: Path) -> None:
    """Unpack an archive while it arrives, with ``folder`` in place of its top folder."""
    with urllib.request.urlopen(url, timeout=TIMEOUT) as response:
        size = response.headers.get("Content-Length")
        total = int(size) if size else None
        progress: Any = tqdm.wrapattr(
            response, "read", total=total, desc="fetch", leave=False, disable=None
        )
        with progress as stream, tarfile.open(fileobj=stream, mode="r|gz") as archive:
            for member in archive:
                parts = PurePosixPath(member.name).parts[1:]
                content = archive.extractfile(member) if member.isfile() else None
                if content is None or not parts:
                    continue  # folders are made as needed; links could lead out of the folder
                if ".." in parts:
                    raise tarfile.ExtractError(f"{member.name} would lie outside of the folder")
                target = folder.joinpath(*parts)
                target.parent.mkdir(parents=True, exist_ok=True)
                with target.open("wb") as file:
                    shutil.copyfileobj(content, file)


def _check(folder: Path, release: Release) -> None:
    """Raise DataError if ``folder`` does not hold the release."""
    dataset = read_dataset(folder)
    photos = {split: len(photos) for split, photos in dataset.splits.items()}
    if photos != release.photos:
        raise DataError(
            f"{folder} lists {photos} photos instead of {release.photos}; move it away and fetch"
            " the data set again"
        )
    known = replace(dataset, splits={split: dataset.splits[split] for split in ("train", "val")})
    if known.fingerprint() != release.fingerprint:
        raise DataError(
            f"{folder} holds photos or labels that are not the data set's; move it away and fetch"
            " the data set again"
        )
