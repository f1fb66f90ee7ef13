"""Decide whether a server should go on, by its golden photo, its stubs and control requests."""

from __future__ import annotations

import json
import threading
import time
from typing import TYPE_CHECKING, NamedTuple

from supervisor.api import Api, RequestError
from supervisor.logs import log
from supervisor.options import MODEL
from supervisor.preflight import in_url
from supervisor.probe import WORKING_FOR, Outcome, Probe
from supervisor.procfs import dead_stubs

if TYPE_CHECKING:
    from supervisor.options import Options

FALLBACK = "fallback.json"  # beside config.pbtxt: the configuration that was served before
START_INTERVAL = 0.1  # seconds between golden photos until the server is ready
WATCH_INTERVAL = 1.0  # the same from then on
UNHEALTHY_AFTER = 10.0  # seconds of failing golden photos after which a server is ended


class Verdict(NamedTuple):
    """Why a server must be ended. drain: whether it can still answer accepted requests."""

    reason: str
    drain: bool


class Watch:
    """Watches one server from its start. began: of the start, in seconds of the monotonic clock.

    stopped: set by another thread, ends the watch. ready: whether the server has been ready.
    """

    def __init__(self, options: Options, api: Api, probe: Probe, secret: str, began: float) -> None:
        self.options, self.api, self.probe = options, api, probe
        self.secret = secret
        self.began = began
        self.stopped = threading.Event()
        self.ready = False
        self.failing_since: float | None = None  # golden photos
        self.changing_since: float | None = None  # a model that is being loaded or unloaded
        self.away = ""  # why the model is not loaded, as logged

    def run(self) -> Verdict | None:
        """Block until the server must be ended; None if the watch was stopped before."""
        dead: set[int] = set()
        while not self.stopped.wait(WATCH_INTERVAL if self.ready else START_INTERVAL):
            dead, dead_before = dead_stubs(self.probe.server) if self.ready else set(), dead
            # Triton is about to reap the stubs of a replaced version: those are dead only once.
            if dead & dead_before:
                reason = "a Python stub of the model died, and requests that it is given fail"
                return Verdict(f"{reason}; the server was ended", drain=True)
            result = self.probe.run()
            if self.stopped.is_set():
                break
            if result.outcome is Outcome.FAILED:
                verdict = self.judge(result.reason)
                if verdict:
                    return verdict
            else:  # loaded, even if it is busy
                self.failing_since = self.changing_since = None
                if result.outcome is Outcome.OK:
                    self._well(result.version)
        return None

    def judge(self, failure: str) -> Verdict | None:
        """Judge a failed golden photo: why the server must be ended, or None to keep watching."""
        if not self.ready:
            # Check liveness first: in the other order, a server that finishes loading between the
            # two calls would look as if it had refused the version. A server that loads does not
            # listen yet; one that found no repository does, and stays so.
            live = self.api.confirms("/v2/health/live")
            if live is False:
                return Verdict("the model repository was refused, for the reasons above", False)
            served = live and self.api.confirms(f"/v2/models/{MODEL}/ready")
            if live and served is False:
                problem = self._fall_back()
                if problem:
                    return Verdict(problem, drain=True)
            if not served:
                return self._overdue()
        elif self._is_away():
            self.failing_since = None
            return None
        now = time.monotonic()
        self.failing_since = self.failing_since or now
        if now - self.failing_since < UNHEALTHY_AFTER:
            return None
        reason = f"the golden photo has failed for {UNHEALTHY_AFTER:.0f} s ({failure})"
        return Verdict(f"{reason}; the server was ended", drain=False)

    def _well(self, version: str) -> None:
        if not self.ready:
            self.ready = True
            self._announce(version)
        if self.away:
            log.info(f"the model is loaded again, version {version}")
            self.away = ""

    def _announce(self, version: str) -> None:
        options, host = self.options, in_url(self.options.host)
        log.info(
            f"ready after {time.monotonic() - self.began:.1f} s: model {MODEL} version {version} "
            f"at http://{host}:{options.http_port} "
            f"and grpc{'s' if options.grpc_cert else ''}://{host}:{options.grpc_port}, "
            f"metrics at http://{host}:{options.metrics_port}/metrics"
        )

    def _overdue(self) -> Verdict | None:
        """Give up after start_seconds: Triton waits forever if it loses a stub that is loading."""
        seconds = self.options.start_seconds
        if time.monotonic() - self.began < seconds:
            return None
        reason = f"the model was not ready within START_SECONDS={seconds:g}"
        return Verdict(
            f"{reason}, with the last log lines above; the server was ended", drain=False
        )

    def _fall_back(self) -> str:
        """Load the version that was served before. Returns why that fails, or an empty string."""
        refused = "the version that config.pbtxt pins was refused, for the reasons above"
        folder = self.options.model_folder
        if folder is None:
            return (
                f"{refused}; npair rollback --offline pins the one that was served before "
                f"in {self.options.model_repository}"
            )
        path = folder / FALLBACK
        try:
            config = path.read_text(encoding="utf-8")
            version = json.loads(config)["version_policy"]["specific"]["versions"][-1]
            self.api.load(config, self.secret)
        except FileNotFoundError:
            return f"{refused}, and no other was served before"
        except (RequestError, OSError, ValueError, LookupError) as error:
            return f"{refused}, and so was the one that was served before, by {path}: {error}"
        log.warning(
            f"{refused}; version {version}, which was served before, is served instead, "
            "until another is promoted"
        )
        return ""

    def _is_away(self) -> bool:
        """Whether the control API was told to load or unload the model, which is logged once.

        A model that died stays READY.
        """
        try:
            entries = self.api.entries(self.secret)
        except RequestError:
            return False
        states = {entry.get("state") for entry in entries}
        if self.stopped.is_set() or not states or "READY" in states:
            return False
        if states != {"UNAVAILABLE"}:
            # Accepted requests precede an unload, and a download a load: both can take minutes.
            now = time.monotonic()
            self.changing_since = self.changing_since or now
            return now < self.changing_since + max(WORKING_FOR, self.options.start_seconds)
        self.changing_since = None
        unloaded = any(entry.get("reason") == "unloaded" for entry in entries)
        away = "could not be loaded, for the reasons above"
        if unloaded:
            away = "was unloaded through the control API"
        if away != self.away:
            self.away = away
            log.warning(f"the model {away}; waiting for it to be loaded")
        return True
