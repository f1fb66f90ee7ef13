"""A golden photo, embedded by the server and compared with what was published.

A server's own word is not enough: after a stub died, its readiness URLs stay green.
"""

from __future__ import annotations

import json
import math
import time
from array import array
from enum import Enum, auto
from pathlib import Path
from typing import NamedTuple

from supervisor.api import Api, RequestError
from supervisor.procfs import arguments, children, stub_seconds

RETRY_AFTER = 1.0  # seconds in which fewer requests should wait
# Seconds that stubs may compute without an answer: 64 of the largest photos take minutes.
WORKING_FOR = 600.0


class Outcome(Enum):
    """BUSY: not answered, but other requests are, or the stubs compute: the model is not dead."""

    OK = auto()
    BUSY = auto()
    FAILED = auto()


class Result(NamedTuple):
    """version: the one that answered, if OK. reason: why there was no answer, otherwise."""

    outcome: Outcome
    version: str = ""
    reason: str = ""


class Golden(NamedTuple):
    """A version's first golden photo, its published embeddings (.npy) and their tolerance."""

    photo: bytes
    embeddings: bytes
    tolerance: float


class Progress(NamedTuple):
    """answered: requests. computed: CPU seconds of the stubs. time: of the monotonic clock."""

    answered: int
    computed: float
    time: float


class Probe:
    """Embeds golden photos.

    model_folder: None if the models are in an object store. server: process id, None if unknown.
    """

    def __init__(self, api: Api, model_folder: Path | None, server: int | None = None) -> None:
        self.api = api
        self.model_folder = model_folder
        self.server = server
        self.known: dict[str, Golden] = {}  # of the version asked last
        self.working_since: float | None = None  # without an answer

    def run(self) -> Result:
        """Embed the golden photo of the newest version once."""
        try:
            before = self._progress()
            result = self._ask()
            if result.outcome is Outcome.BUSY and not self._is_busy(before):
                return result._replace(outcome=Outcome.FAILED)
        except (RequestError, OSError, ValueError, KeyError, TypeError) as error:
            return Result(Outcome.FAILED, reason=str(error) or type(error).__name__)
        if result.outcome is Outcome.OK:
            self.working_since = None
        return result

    def _ask(self) -> Result:
        """BUSY if no answer came in time or too many requests waited."""
        try:
            version = self.api.newest_version()
            golden = self._golden(version)
            actual = self.api.embed(golden.photo, version)
        except RequestError as error:
            if error.late:
                return Result(Outcome.BUSY, reason=str(error))
            if error.status == 503:  # at once, and the next answer takes the model a moment
                time.sleep(RETRY_AFTER)
                return Result(Outcome.BUSY, reason=str(error))
            raise
        # A .npy file has the length of its header at 8. NumPy would cost this process more memory
        # than everything else.
        start = 10 + int.from_bytes(golden.embeddings[8:10], "little")
        expected = array("f", golden.embeddings[start : start + 4 * len(actual)])
        if not math.dist(actual, expected) <= golden.tolerance:
            reason = f"version {version} no longer embeds its golden photo as it was published"
            return Result(Outcome.FAILED, reason=reason)
        return Result(Outcome.OK, version=version)

    def _is_busy(self, before: Progress) -> bool:
        """Whether the server answered others since, or its stubs compute, though not forever."""
        now = self._progress()
        if now.answered > before.answered:
            self.working_since = None
            return True
        # Waiting takes less than a tenth of a core.
        if now.computed - before.computed <= (now.time - before.time) / 10:
            return False
        self.working_since = self.working_since or before.time
        return now.time - self.working_since < WORKING_FOR

    def _progress(self) -> Progress:
        answered = self.api.requests_answered()
        return Progress(answered, stub_seconds(self.server), time.monotonic())

    def _golden(self, version: str) -> Golden:
        """Read each time, since a version may be published again under its number.

        If that fails, the last one read serves: a server needs its storage only to load.
        """
        try:
            folder = self._folder(version)
            golden = json.loads((folder / "manifest.json").read_bytes())["golden"]
            photo, embeddings = (
                (folder / name).read_bytes() for name in (golden["photos"][0], golden["embeddings"])
            )
            self.known = {version: Golden(photo, embeddings, golden["tolerance"])}
        except OSError:
            if version not in self.known:
                raise
        return self.known[version]

    def _folder(self, version: str) -> Path:
        """A version's folder. From an object store, Triton makes copies of its own, which the
        command lines of its stubs name.
        """
        if self.model_folder:
            return self.model_folder / version
        for stub in children(self.server) if self.server else []:
            for argument in arguments(stub):
                if argument.endswith(f"/{version}/model.py"):
                    return Path(argument).parent
        raise RequestError(f"no process serves version {version}")
