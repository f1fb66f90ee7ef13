"""Read the client's settings and secrets from the environment."""

from __future__ import annotations

from pathlib import Path

import pytest

from npair.client.environment import from_environment, secret

NAMES = ("NPAIR_CA", "NPAIR_CERT", "NPAIR_KEY", "NPAIR_API_KEY", "NPAIR_API_KEY_FILE")


@pytest.fixture(autouse=True)
def empty(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)


def test_nothing_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NPAIR_API_KEY", "")
    assert from_environment() == {}
    assert secret("NPAIR_API_KEY") == ("NPAIR_API_KEY", "")


def test_a_certificate_may_hold_its_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NPAIR_CERT", "both.pem")
    assert from_environment() == {"cert": ("both.pem", "both.pem")}
    monkeypatch.setenv("NPAIR_KEY", "key.pem")
    assert from_environment() == {"cert": ("both.pem", "key.pem")}


def test_a_file_comes_before_the_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NPAIR_API_KEY", "variable")
    assert from_environment() == {"api_key": "variable"}
    (tmp_path / "key").write_text("file\n")
    monkeypatch.setenv("NPAIR_API_KEY_FILE", str(tmp_path / "key"))
    assert from_environment() == {"api_key": "file"}
    assert secret("NPAIR_API_KEY") == ("NPAIR_API_KEY_FILE", "file")


def test_a_file_that_cannot_be_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NPAIR_API_KEY_FILE", str(tmp_path))
    with pytest.raises(ValueError, match=r"NPAIR_API_KEY_FILE cannot be read: .*Is a directory"):
        from_environment()
