"""The table of results."""

from __future__ import annotations

import pytest
from support.traffic import HEAD

ROWS = pytest.StashKey[list[str]]()


@pytest.fixture(scope="session")
def rows(request: pytest.FixtureRequest) -> list[str]:
    """The rows of the table of results."""
    return request.config.stash.setdefault(ROWS, [*HEAD])


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    terminalreporter.section("calls during changes")
    for row in config.stash.get(ROWS, []):
        terminalreporter.write_line(row)
