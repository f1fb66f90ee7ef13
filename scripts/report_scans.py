#!/usr/bin/env python3
"""Keep one issue on GitHub about what the weekly scan finds, and close it once that is gone.

    scripts/report_scans.py FOLDER   # of Trivy's reports: scan-ARCHITECTURE/scan.json

Standard library only, with gh.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from distribution.registry import CommandError, run

TITLE = "The image has vulnerabilities that a rebuild does not fix"
INTRODUCTION = """\
The weekly rebuild took the newest base images and packages, and Trivy still finds what is below.
`cpu` stays what it was. Raise the pin of each package, or the tag of the base image that brings it;
docs/ci-cd.md says where they stand. The next rebuild that finds nothing closes this issue.
"""


def main(folder: Path) -> None:
    reports = {path.parent.name.removeprefix("scan-"): path for path in folder.glob("*/scan.json")}
    if not reports:
        raise SystemExit(f"{folder} has no report: the image was not scanned, see the run's log")
    rows = sorted({row for name, path in reports.items() for row in findings(name, path)})
    number = open_issue()
    if rows:
        table = "\n".join("| " + " | ".join(row) + " |" for row in rows)
        head = "| package | version | fixed in | what | severity | in | architecture |"
        body = f"{INTRODUCTION}\n{head}\n|{' --- |' * 7}\n{table}\n{log()}"
        words = ("edit", number) if number else ("create", "--title", TITLE)
        print(run("gh", "issue", *words, "--body", body).strip())
    elif number:
        print(run("gh", "issue", "close", number, "--comment", f"A rebuild is clean.{log()}"))


def findings(architecture: str, path: Path) -> Iterator[tuple[str, ...]]:
    """Yield a row of the table for each vulnerability in a report of Trivy's."""
    for result in json.loads(path.read_text()).get("Results") or []:
        for found in result.get("Vulnerabilities") or []:
            yield (
                found["PkgName"],
                found["InstalledVersion"],
                found.get("FixedVersion", ""),
                f"[{found['VulnerabilityID']}]({found.get('PrimaryURL', '')})",
                found["Severity"].lower(),
                found.get("PkgPath") or result["Target"],
                architecture,
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
    if len(sys.argv) != 2:
        sys.exit((__doc__ or "").strip())
    try:
        main(Path(sys.argv[1]))
    except CommandError as error:
        sys.exit(str(error))
