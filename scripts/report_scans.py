#!/usr/bin/env python3
"""Keep one issue on GitHub about what the weekly scan finds, and close it once that is gone.

    scripts/report_scans.py FOLDER RESULT ARCHITECTURE...

FOLDER holds Trivy's reports, scan-ARCHITECTURE/scan.json. RESULT is that of the job that builds and
scans the image. Only success, and a clean report of each architecture, closes the issue.

Standard library only, with gh.
"""

from __future__ import annotations

import json
import os
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

from distribution.registry import CommandError, run

TITLE = "The image has vulnerabilities that a rebuild does not fix"
INTRODUCTION = """\
The weekly rebuild took the newest base images and packages, and Trivy still finds what is below.
`cpu` stays what it was. Raise the pin of each package, or the tag of the base image that brings it;
docs/ci-cd.md says where they stand. The next rebuild that finds nothing closes this issue.
"""
MOST_ROWS = 100  # GitHub takes 65,536 characters


def main(folder: Path, result: str, architectures: Sequence[str]) -> None:
    reports = {name: folder / f"scan-{name}/scan.json" for name in architectures}
    missing = [name for name, path in reports.items() if not path.exists()]
    rows: dict[tuple[str, ...], set[str]] = defaultdict(set)
    for name in reports.keys() - missing:
        for row in findings(reports[name]):
            rows[row].add(name)
    number = open_issue()
    if rows:
        words = ("edit", number) if number else ("create", "--title", TITLE)
        body = INTRODUCTION + table(rows) + "".join(f"\nNot scanned: {name}\n" for name in missing)
        print(run("gh", "issue", *words, "--body-file", "-", stdin=body + log()).strip())
    elif not missing and result == "success" and number:
        print(run("gh", "issue", "close", number, "--comment", f"A rebuild is clean.{log()}"))
    if missing:
        raise SystemExit(f"{', '.join(missing)} was not scanned: see the run's log")
    if not rows and result != "success":
        raise SystemExit(f"nothing was found, but the image's job ended with {result}: see its log")


def table(rows: dict[tuple[str, ...], set[str]]) -> str:
    """Get the rows with their architectures as a table: critical ones first, and the rest cut."""
    lines = [
        "| " + " | ".join((severity, *row, ", ".join(sorted(names)))) + " |"
        for (severity, *row), names in sorted(rows.items())
    ]
    head = "| severity | package | version | fixed in | what | in | architecture |"
    more = [f"\nand {len(lines) - MOST_ROWS} more"] if len(lines) > MOST_ROWS else []
    return "\n".join(["", head, "|" + " --- |" * 7, *lines[:MOST_ROWS], *more, ""])


def findings(path: Path) -> Iterator[tuple[str, ...]]:
    """Yield a row of the table, but for the architecture, for each vulnerability in a report."""
    for result in json.loads(path.read_text()).get("Results") or []:
        for found in result.get("Vulnerabilities") or []:
            yield (
                found["Severity"].lower(),
                found["PkgName"],
                found["InstalledVersion"],
                found.get("FixedVersion", ""),
                f"[{found['VulnerabilityID']}]({found.get('PrimaryURL', '')})",
                found.get("PkgPath") or result["Target"],
            )


def open_issue() -> str:
    """Get the number of the open issue, empty if there is none."""
    query = ("--state", "open", "--limit", "100", "--search", f'in:title "{TITLE}"')
    listed = json.loads(run("gh", "issue", "list", *query, "--json", "number,title"))
    return next((str(issue["number"]) for issue in listed if issue["title"] == TITLE), "")


def log() -> str:
    """Get a line that links to the run, empty outside GitHub."""
    names = ("SERVER_URL", "REPOSITORY", "RUN_ID")
    server, repository, number = (os.environ.get(f"GITHUB_{name}", "") for name in names)
    return f"\n[Log]({server}/{repository}/actions/runs/{number})\n" if number else ""


if __name__ == "__main__":
    if len(sys.argv) < 4:
        sys.exit((__doc__ or "").strip())
    try:
        main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
    except CommandError as error:
        sys.exit(str(error))
