"""The life of one server: started, watched, and ended in order."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import threading
import time
from functools import partial
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING

from supervisor.api import Api, RequestError
from supervisor.launch import command, given_secret, hide_secret, start
from supervisor.logs import Relay, log
from supervisor.preflight import ServeError
from supervisor.probe import Probe
from supervisor.procfs import dead_stubs, remove_remains, stub_count, stub_seconds
from supervisor.watch import Verdict, Watch

if TYPE_CHECKING:
    from collections.abc import Callable
    from subprocess import Popen
    from typing import TypeVar

    from supervisor.launch import Triton
    from supervisor.options import Options

    T = TypeVar("T")

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
EXIT_GRACE = 5.0  # seconds beyond the drain
EXIT_AFTER_DRAIN = 1.0  # seconds; Triton waits for idle connections although all is answered
IDLE_AFTER = 2.0  # seconds of hardly any computing after which no stub has a request


class Supervisor:
    """Runs one server.

    Signal handlers and threads only queue what happened, as a function to call; ``run`` calls
    these one after another, and nothing else changes the state. SIGTERM and SIGINT unload the
    model, so that the server answers what it accepted, and then end it; a second signal kills it.
    """

    def __init__(self, options: Options, triton: Triton) -> None:
        """Raises: ServeError if the secret for control APIs cannot be used."""
        self.options, self.triton = options, triton
        self.secret = given_secret() or secrets.token_urlsafe(32)
        self.events: SimpleQueue[Callable[[], None]] = SimpleQueue()  # its put is reentrant
        self.api = Api(options.host, options.http_port)
        self.probe = Probe(self.api, options.model_folder)
        self.watch = Watch(options, self.api, self.probe, self.secret, time.monotonic())
        self.relay = Relay(options.verbose)
        self.process: Popen[bytes]
        self.deadline: float | None = None  # when the server is killed
        self.ended = False
        self.stopping = False  # by a signal
        self.drained = False
        self.reason = ""  # why the server ended or had to be ended

    def run(self) -> int:
        """Returns: the exit code: 0 if a signal came and everything accepted was answered.

        Raises: ServeError if the server cannot start, ended by itself or had to be ended.
        """
        for number in STOP_SIGNALS:
            signal.signal(number, lambda *_: self.events.put(self._on_signal))
        remove_remains(self.options.http_port)
        arguments = command(self.options, self.triton, self.secret)
        if not self.events.empty():
            return 0
        self.process = start(self.options, arguments, self.triton)
        self.probe.server = self.process.pid
        log_reader = threading.Thread(target=self._read_log, daemon=True)
        log_reader.start()
        try:
            self._in_background(self.process.wait, self._on_exit)
            self._in_background(self.watch.run, self._on_verdict)
            while not self.ended:
                self._act()
        finally:
            self._clean_up()
            log_reader.join(timeout=2)
        if self.stopping:
            return self._stopped()
        for record in self.relay.held:
            log.handle(record)
        raise ServeError(self.reason)

    def _act(self) -> None:
        """Wait for the next event, but not beyond the deadline, and act on it."""
        seconds = None
        if self.deadline is not None:
            seconds = max(0.0, self.deadline - time.monotonic())
        try:
            event = self.events.get(timeout=seconds)
        except Empty:
            self.deadline = None
            self.process.kill()
        else:
            event()

    def _in_background(self, work: Callable[[], T], then: Callable[[T], None]) -> None:
        """Call ``work`` in a thread, and queue ``then`` with its result; an exception ends run."""

        def call() -> None:
            try:
                result = work()
            except Exception as error:
                self.events.put(partial(_raise, error))
            else:
                self.events.put(partial(then, result))

        threading.Thread(target=call, daemon=True).start()

    def _on_signal(self) -> None:
        if self.stopping:
            self.process.kill()
        else:
            self.stopping = True
            self._drain()

    def _on_verdict(self, verdict: Verdict | None) -> None:
        if verdict is None or self.stopping:
            return
        self.reason = verdict.reason
        if verdict.drain:
            self._drain()
        else:
            self.process.kill()

    def _on_exit(self, code: int) -> None:
        self.ended = True
        when = "" if self.watch.ready else " before the model was ready"
        self.reason = self.reason or f"the server ended by itself{when} (exit code {code})"

    def _drain(self) -> None:
        """Unload the model before the server ends: by itself, Triton would go on answering clients
        that keep their connections, and then cut them off.
        """
        if self.deadline is not None:
            return
        self.deadline = time.monotonic() + self.options.drain + EXIT_GRACE
        self.watch.stopped.set()
        if self.watch.ready:
            self._in_background(self._unload, self._on_unloaded)
        else:
            self.process.terminate()

    def _unload(self) -> bool | None:
        """Returns: whether everything accepted was answered in time, None if that is unknown."""
        with contextlib.suppress(RequestError):
            return unload(self.api, self.process.pid, self.secret, self.options.drain)
        return None

    def _on_unloaded(self, drained: bool | None) -> None:
        if drained is False:
            self.process.kill()
            return
        self.process.terminate()
        if drained:
            self.drained = True
            self.deadline = time.monotonic() + EXIT_AFTER_DRAIN

    def _stopped(self) -> int:
        code = self.process.returncode
        if self.drained or code == 0:
            log.info("stopped")
            return 0
        log.info(f"stopped with requests in flight (exit code {code})")
        return 1

    def _clean_up(self) -> None:
        self.watch.stopped.set()
        self.process.kill()
        self.process.wait()
        with contextlib.suppress(ProcessLookupError):  # a stub that hangs does not end by itself
            os.killpg(self.process.pid, signal.SIGKILL)
        remove_remains(self.options.http_port)

    def _read_log(self) -> None:
        assert self.process.stdout is not None
        self.relay.run(self.process.stdout, self._hide_secret)

    def _hide_secret(self) -> None:
        """Called once the server logs: by then it has parsed its command line."""
        try:
            hide_secret(self.process.pid)
        except OSError as error:
            log.warning(
                "users of this machine can read the secret for control APIs "
                f"in the server's command line: {error}"
            )


def unload(api: Api, server: int, secret: str, seconds: float) -> bool:
    """Unload the model. Returns: whether everything accepted was answered in time.

    Once a version has answered everything, Triton ends its stubs one after another, which takes a
    second each: if fewer are left than a version has, all versions have answered. A stub that died
    before never unloads: the others have then answered everything once none computes. A stub that
    ends is dead for a moment as well, until Triton reaps it.

    Raises: RequestError.
    """
    deadline = time.monotonic() + seconds
    instances = 0
    with contextlib.suppress(RequestError):  # no version is served
        instances = api.instances()
    api.unload(secret, seconds)
    computed, dead, looked = stub_seconds(server), dead_stubs(server), time.monotonic()
    while (now := time.monotonic()) < deadline:
        if stub_count(server) < instances:
            return True
        if now > looked + IDLE_AFTER:
            computed, before, looked = stub_seconds(server), computed, now
            dead, dead_before = dead_stubs(server), dead
            if dead & dead_before and abs(computed - before) < IDLE_AFTER / 10:
                return False
        time.sleep(0.05)
        try:
            states = {entry.get("state") for entry in api.entries(secret)}
        except RequestError:  # a starved server answers late, and goes on unloading
            continue
        if not states:
            raise RequestError("the repository no longer lists the model")
        if states == {"UNAVAILABLE"}:
            return True
    return False


def _raise(error: Exception) -> None:
    raise error
