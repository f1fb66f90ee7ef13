"""The project's version and its changelog: where they stand, and how a release changes them."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCE = "src/npair/__init__.py"
CHANGELOG = "CHANGELOG.md"
CHART = "deploy/helm/npair/Chart.yaml"

_VERSION = re.compile(r"(0|[1-9]\d*)\.(0|[1-9]\d*)\.(0|[1-9]\d*)(?:rc([1-9]\d*))?")
_ASSIGNED = re.compile(r'^__version__ = "(.+)"$', re.MULTILINE)
# The chart's application is the image of the same version.
_CHARTED = re.compile(r'^appVersion: "?([^"\s]+)"?$', re.MULTILINE)
_HEADING = re.compile(r"^## (.+)\n", re.MULTILINE)


class RefusedError(Exception):
    """A release that must not go on. The message says why, and what to do."""


@dataclass(frozen=True, order=True)
class Version:
    """X.Y.Z, or X.Y.ZrcN before it."""

    major: int
    minor: int
    patch: int
    candidate: float = math.inf  # N; finals come after all candidates

    @property
    def final(self) -> bool:
        return self.candidate == math.inf

    def __str__(self) -> str:
        candidate = "" if self.final else f"rc{self.candidate}"
        return f"{self.major}.{self.minor}.{self.patch}{candidate}"


def parse(text: str) -> Version:
    """Read X.Y.Z or X.Y.ZrcN."""
    found = _VERSION.fullmatch(text)
    if found is None:
        raise RefusedError(f"{text!r} is no version: write X.Y.Z, or X.Y.ZrcN for a pre-release")
    return Version(*(int(part) for part in found.groups() if part is not None))


def of_tag(tag: str) -> Version:
    """Read the version that a git tag vX.Y.Z names."""
    if not tag.startswith("v"):
        raise RefusedError(f"{tag!r} is no tag of a release: these are vX.Y.Z or vX.Y.ZrcN")
    return parse(tag.removeprefix("v"))


def current(root: Path = ROOT) -> Version:
    """Read the version of a checkout."""
    return parse(_ASSIGNED.findall((root / SOURCE).read_text())[0])


def section(version: Version, root: Path = ROOT) -> tuple[str, str]:
    """Get what the changelog says of a version. Pre-releases have the section "Unreleased".

    Returns: the date, as YYYY-MM-DD, empty for pre-releases, and the text.
    """
    parts = _HEADING.split((root / CHANGELOG).read_text())
    wanted = rf"{re.escape(str(version))} - (\S+)" if version.final else "Unreleased()"
    for heading, text in zip(parts[1::2], parts[2::2], strict=True):
        if found := re.fullmatch(wanted, heading):
            if version.final:
                _check_day(found[1])
            if not text.strip():
                raise RefusedError(f"{CHANGELOG}: the section {heading!r} is empty")
            return found[1], text.strip() + "\n"
    heading = f"{version} - YYYY-MM-DD" if version.final else "Unreleased"
    raise RefusedError(f"{CHANGELOG} has no section '## {heading}': run scripts/release.py prepare")


def prepare(version: Version, root: Path = ROOT, today: date | None = None) -> list[str]:
    """Set the version everywhere, and date what is unreleased. Returns: the changed files."""
    if version <= current(root):
        raise RefusedError(f"{version} is not above the version of this checkout, {current(root)}")
    changed = [SOURCE]
    _replace(root / SOURCE, _ASSIGNED, f'__version__ = "{version}"')
    if (root / CHART).exists():
        _replace(root / CHART, _CHARTED, f'appVersion: "{version}"')
        changed.append(CHART)
    if version.final:
        heading = f"## Unreleased\n\n## {version} - {today or date.today()}"
        _replace(root / CHANGELOG, re.compile(r"^## Unreleased$", re.MULTILINE), heading)
        changed.append(CHANGELOG)
    section(version, root)  # which also refuses an empty one
    return changed


def chart_version(root: Path = ROOT) -> str | None:
    """Read the chart's appVersion, None without a chart."""
    path = root / CHART
    return _CHARTED.findall(path.read_text())[0] if path.exists() else None


def _replace(path: Path, pattern: re.Pattern[str], text: str) -> None:
    changed, count = pattern.subn(text, path.read_text())
    if count != 1:
        raise RefusedError(f"{path}: {count} lines match {pattern.pattern!r}, in place of one")
    path.write_text(changed)


def _check_day(day: str) -> None:
    try:
        date.fromisoformat(day)
    except ValueError:
        raise RefusedError(f"{CHANGELOG}: {day!r} is no date like 2026-01-31") from None
