"""Check what bounds the memory of thumbnails."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from support.photos import photo

from npair.serving.preprocess import decode
from npair.web import search


def test_one_thread_decodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, threads = photo(tmp_path / "a.png"), set()

    def spied(*arguments: Any) -> Any:
        threads.add(threading.get_ident())
        time.sleep(0.1)
        return decode(*arguments)

    monkeypatch.setattr(search, "decode", spied)
    with ThreadPoolExecutor(4) as pool:
        assert len(set(pool.map(search._thumbnail, [path] * 4, range(4)))) == 1
    assert len(threads) == 1
