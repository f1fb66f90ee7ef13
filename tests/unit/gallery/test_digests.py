"""Check by what a gallery tells files apart."""

from __future__ import annotations

import hashlib
from pathlib import Path

from npair.data.files import LIMITS
from npair.gallery.build import _digest


def test_a_large_file_is_hashed_as_a_whole(tmp_path: Path) -> None:
    """A TIFF or BMP of 64 megapixels is larger than what training reads of a photo."""
    path = tmp_path / "a.bmp"
    with path.open("wb") as file:
        file.truncate(LIMITS.max_bytes + 1)  # zeros, which need no disk
        before = _digest(path)
        file.seek(0, 2)
        file.write(b"end")
    assert _digest(path) == hashlib.sha256(path.read_bytes()).hexdigest() != before
