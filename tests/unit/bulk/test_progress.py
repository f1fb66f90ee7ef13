"""Sum what actors have done, and describe it."""

from __future__ import annotations

import pytest

from npair.bulk.output import Progress
from npair.bulk.progress import Counter, Done, line


def test_seconds_count_from_the_first_actor_that_was_ready(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    counter = Counter()
    assert line(counter.done, Progress(100, 200), "photos") == (
        "100 of 200 photos, 0 photos/s, 0 refused"
    )
    for now, seconds in [(1000.0, 3.0), (1001.0, 6.0), (1005.0, 2.0)]:
        monkeypatch.setattr("npair.bulk.progress.time.monotonic", lambda now=now: now)
        counter.add(20, 1, 20, seconds)
    assert counter.done == Done(60, 3, 60, 10.0)
    assert line(counter.done, Progress(100, 200), "photos") == (
        "160 of 200 photos, 6 photos/s, 00:06 left, 3 refused"
    )
