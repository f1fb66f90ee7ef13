"""A published version as it travels to the actors: the bytes of its files."""

from __future__ import annotations

import contextlib
import hashlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from npair.bulk import BulkError
from npair.bulk.source import below
from npair.bulk.storage import absolute, files_in, locate, reachable
from npair.releasing import ReleaseError
from npair.releasing.config import new_config, parameters
from npair.releasing.verify import check_files, published_code
from npair.serving.manifest import NAME, Manifest, VersionError
from npair.serving.preprocess import Limits


@dataclass(frozen=True)
class Version:
    """A version's files by their paths, and the limits with which its repository serves it."""

    files: dict[str, bytes]
    limits: Limits

    @classmethod
    def read(cls, location: str) -> Version:
        """Read a version's folder, and compare its files with their hashes.

        Raises: BulkError if there is none, or it is not as published.
        """
        location = absolute(location)
        system, path = locate(location)
        with reachable(location):
            paths = [file.path for file in files_in(system, path)]
            files = {
                below(each, path): _content(system, each)
                for each in paths
                if "/__pycache__/" not in each
            }
            beside = f"{path.rpartition('/')[0]}/config.pbtxt"
            served = system.get_file_info(beside).is_file
            config = _content(system, beside).decode() if served else new_config()
        if NAME not in files:
            raise BulkError(f"{location} is no version's folder: it has no {NAME}")
        found = parameters(config)
        version = cls(files, Limits(int(found["max_bytes"]), int(found["max_pixels"])))
        try:
            with version.unpacked() as folder:
                check_files(folder, Manifest.read(folder))
        except (ReleaseError, VersionError) as error:
            raise BulkError(f"{location}: {error}") from error
        return version

    @property
    def manifest(self) -> Manifest:
        return Manifest.parse(self.files[NAME])

    @property
    def manifest_sha256(self) -> str:
        return hashlib.sha256(self.files[NAME]).hexdigest()

    @contextlib.contextmanager
    def unpacked(self) -> Iterator[Path]:
        """Provide the files in a folder."""
        with tempfile.TemporaryDirectory(prefix="npair-bulk-") as scratch:
            folder = Path(scratch) / str(self.manifest.version)
            for name, content in self.files.items():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_bytes(content)
            yield folder

    @contextlib.contextmanager
    def embedder(self) -> Iterator[Any]:
        """Provide the version's own Embedder on one core, which verifies the files and the golden
        set first. Raises: whatever its code raises.
        """
        with self.unpacked() as folder, published_code(folder) as code:
            yield code.Embedder(folder, cores=1)


def _content(system: Any, path: str) -> bytes:
    with system.open_input_stream(path) as stream:
        content: bytes = stream.read()
        return content
