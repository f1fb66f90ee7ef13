"""Check where the service listens, and what it demands there."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from npair.client import NpairClient
from npair.web.search import Search
from npair.web.server import given_key, serve

KEY = "k" * 32


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NPAIR_WEB_KEY", "NPAIR_WEB_KEY_FILE"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "search.example"])
def test_no_key_beyond_loopback(host: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="set NPAIR_WEB_KEY"):
        serve(Search(tmp_path, NpairClient()), host=host, port=0, allowed=[])


@pytest.mark.parametrize("key", ["short", KEY[1:], f"{KEY} {KEY}", f"{KEY}ü", f"{KEY}\n"])
def test_a_weak_key(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NPAIR_WEB_KEY", key)
    with pytest.raises(ValueError, match="NPAIR_WEB_KEY must hold at least 32 printable"):
        given_key()


def test_the_keys_file_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NPAIR_WEB_KEY", "short")
    monkeypatch.setenv("NPAIR_WEB_KEY_FILE", str(tmp_path / "key"))
    with pytest.raises(ValueError, match="NPAIR_WEB_KEY_FILE cannot be read"):
        given_key()
    (tmp_path / "key").write_text("")
    with pytest.raises(ValueError, match="NPAIR_WEB_KEY_FILE must hold"):
        given_key()
    (tmp_path / "key").write_text(f"{KEY}\n")
    assert given_key() == KEY


def test_no_key() -> None:
    assert given_key() == ""


def test_where_it_cannot_listen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NPAIR_WEB_KEY", KEY)
    search = Search(tmp_path, NpairClient())
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for host in ("127.0.0.1", "192.0.2.1"):
            with pytest.raises(OSError, match=f"port {port} of {host}: "):
                serve(search, host=host, port=port, allowed=[])
