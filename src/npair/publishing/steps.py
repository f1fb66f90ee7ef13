"""The steps of a publication, whose results are kept if it is refused or interrupted."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from npair.publishing import PublishError

RESULTS = "results.json"
KEEPING = (PublishError, OSError, KeyboardInterrupt)


class Steps:
    """Runs each step once, even if the publication takes several tries.

    The staged folder and the results go into the folder ``kept``, and the next publication with the
    same key begins with them, if the version is refused, a disk or Ctrl-C ends the block, or it
    ends well: what follows it may fail, so call ``forget`` once the version is in the repository.
    After any other error they are deleted, since they may be what was wrong. Only the newest try is
    kept.
    """

    def __init__(self, folder: Path, kept: Path, key: str, say: Callable[[str], None]) -> None:
        """folder: the staged version. key: differs if anything differs that a step depends on."""
        self.folder, self.kept, self.say = folder, kept / key, say
        self.results: dict[str, Any] = {}

    def __enter__(self) -> Steps:
        with contextlib.suppress(OSError, ValueError):  # none, or one that is being removed
            results = json.loads((self.kept / RESULTS).read_text())
            shutil.copytree(self.kept / "version", self.folder, dirs_exist_ok=True)
            self.results = results
            self.say(f"taking what an earlier try computed from {self.kept}: {', '.join(results)}")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None
    ) -> None:
        if self.results and (kind is None or issubclass(kind, KEEPING)):
            self._keep()
        else:
            shutil.rmtree(self.kept, ignore_errors=True)

    def once(self, name: str, sentence: str, compute: Callable[[], Any]) -> Any:
        """Return the result of a step as JSON gives it back; compute it if it is not there.

        sentence: says what is about to be done.
        """
        if name not in self.results:
            self.say(sentence)
            self.results[name] = json.loads(json.dumps(compute()))
        return self.results[name]

    def _keep(self) -> None:
        forget(self.kept.parent)
        unfinished = self.kept.with_suffix(".unfinished")
        try:
            shutil.copytree(self.folder, unfinished / "version")
            (unfinished / RESULTS).write_text(json.dumps(self.results))
            unfinished.rename(self.kept)
        except OSError:  # a full disk must not hide why the version was refused
            shutil.rmtree(unfinished, ignore_errors=True)


def forget(kept: Path) -> None:
    """Delete what tries have left."""
    shutil.rmtree(kept, ignore_errors=True)
