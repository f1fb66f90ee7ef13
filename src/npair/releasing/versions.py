"""List the versions of a repository."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from npair.releasing import ReleaseError
from npair.releasing.config import pinned
from npair.releasing.control import Server, try_all
from npair.releasing.repository import Repository
from npair.releasing.verify import check_files, read_manifest


@dataclass(frozen=True)
class Version:
    """A row of ``npair versions``.

    status: serving, if a server reports it; ready; staged, if publishing has not completed; or
    broken. recall_at_1: on val, of fine labels. size: bytes. reason: why it is broken.
    """

    name: str
    status: str
    pinned: bool
    recall_at_1: float | None = None
    created: str | None = None
    git_commit: str | None = None
    size: int | None = None
    reason: str | None = None


def versions(
    repository: Repository,
    servers: Sequence[Server],
    say: Callable[[str], object] = lambda _: None,
) -> list[Version]:
    """List all versions, ascending, and what publishers left unfinished.

    Hashes are checked; golden sets are not, see ``verify``.

    say: is told which servers do not say what they serve. Raises: ConfigError.
    """
    serving: set[int] = set()
    silent = try_all(lambda server: serving.update(server.serving()), servers)
    for line in silent.values():
        say(line)
    pins = pinned(repository.read("config.pbtxt").decode())
    rows = []
    for number, complete in repository.versions().items():
        if not complete:
            rows.append(Version(str(number), "staged", number in pins))
            continue
        manifest = reason = None
        with repository.version(number) as folder:
            try:
                manifest = read_manifest(folder, number)
                check_files(folder, manifest)
            except ReleaseError as error:
                reason = str(error)
        status = "broken" if reason else "serving" if number in serving else "ready"
        size = repository.size(number)
        row = Version(str(number), status, number in pins, size=size, reason=reason)
        if manifest:
            row = replace(
                row,
                recall_at_1=manifest.recall_at_1().get("fine"),
                created=manifest.created,
                git_commit=manifest.git_commit,
            )
        rows.append(row)
    return rows + [Version(name, "staged", False) for name in repository.unfinished()]


def listing(versions: Sequence[Version]) -> str:
    """Align versions in columns for a terminal, followed by the reasons of broken ones."""
    head = ("version", "status", "recall@1", "published", "commit", "MB")
    rows = [
        (
            f"{version.name}{' *' if version.pinned else ''}",
            version.status,
            "" if version.recall_at_1 is None else f"{version.recall_at_1:.3f}",
            (version.created or "")[:16].replace("T", " "),
            (version.git_commit or "")[:9],
            "" if version.size is None else f"{version.size / 1e6:.1f}",
        )
        for version in versions
    ]
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in (head, *rows)]
    lines += [f"version {version.name}: {version.reason}" for version in versions if version.reason]
    return "\n".join([*lines, "* pinned by config.pbtxt"])
