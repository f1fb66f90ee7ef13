"""Watch stand-ins for the control API and the golden photo, by a clock of their own."""

from __future__ import annotations

from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import pytest
from supervisor import watch
from supervisor.probe import Outcome, Result

HOUR = 3600.0


def watched(
    monkeypatch: pytest.MonkeyPatch, probes: Iterable[tuple[float, str, Outcome]]
) -> watch.Verdict | None:
    """Watch a server that is ready. probes: seconds before each, the state and the outcome."""
    now, state, left = 0.0, "READY", iter(probes)

    def probe() -> Result:
        nonlocal now, state
        try:
            seconds, state, outcome = next(left)
        except StopIteration:
            seen.stopped.set()
            return Result(Outcome.BUSY)
        now += seconds
        return Result(outcome, reason="not ready")

    api: Any = SimpleNamespace(entries=lambda _: [{"state": state}])
    golden: Any = SimpleNamespace(run=probe, server=None)
    options: Any = SimpleNamespace(start_seconds=120.0)
    seen = watch.Watch(options, api, golden, "secret", 0.0)
    seen.ready = True
    monkeypatch.setattr(watch, "time", SimpleNamespace(monotonic=lambda: now))
    monkeypatch.setattr(watch, "WATCH_INTERVAL", 0)
    return seen.run()


@pytest.mark.parametrize("loaded", [Outcome.OK, Outcome.BUSY])
def test_a_change_is_not_counted_from_an_earlier_one(
    monkeypatch: pytest.MonkeyPatch, loaded: Outcome
) -> None:
    earlier = [(1.0, "LOADING", Outcome.FAILED), (1.0, "READY", loaded)]
    later = [(HOUR, "UNLOADING", Outcome.FAILED), *[(1.0, "UNLOADING", Outcome.FAILED)] * 60]
    assert watched(monkeypatch, [*earlier, *later]) is None


def test_a_change_that_does_not_end_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    verdict = watched(monkeypatch, [(1.0, "UNLOADING", Outcome.FAILED)] * 700)
    assert verdict is not None
    assert "has failed for 10 s" in verdict.reason
