"""Tell when everything accepted is answered, while Triton ends the stubs of several versions."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from supervisor import supervise
from supervisor.api import RequestError


@pytest.mark.parametrize(
    ("instances", "stubs", "drained"),
    [
        (2, [2, 2, 1], True),
        (2, [4, 3, 2, 1], True),  # a version that was being replaced
        (2, [4, 3, 2], False),  # both of the new one's may be working
        (1, [1, 0], True),
        (1, [1], False),
        (None, [0], False),  # no version is served
    ],
)
def test_everything_is_answered_once_no_version_has_all_its_stubs(
    instances: int | None, stubs: list[int], drained: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = iter(stubs)
    monkeypatch.setattr(supervise, "stub_count", lambda _: next(counts, stubs[-1]))
    unloading = False

    def served() -> int:
        if instances is None or unloading:
            raise RequestError("no version is served", 400)
        return instances

    def unload(*_: object) -> None:
        nonlocal unloading
        unloading = True

    entries = [{"name": "npair", "state": "UNLOADING"}]
    api: Any = SimpleNamespace(instances=served, unload=unload, entries=lambda _: entries)
    assert supervise.unload(api, 0, "secret", 0.5) is drained
    assert next(counts, None) is None


def test_a_server_that_answers_late_goes_on_unloading(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = iter([2, 2, 1])
    monkeypatch.setattr(supervise, "stub_count", lambda _: next(counts))

    def late(_: str) -> list[dict[str, str]]:
        raise RequestError("no answer within 5 s", late=True)

    api: Any = SimpleNamespace(instances=lambda: 2, unload=lambda *_: None, entries=late)
    assert supervise.unload(api, 0, "secret", 5)
