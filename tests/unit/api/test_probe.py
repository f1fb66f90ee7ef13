"""Distinguish busy servers from dead ones by golden photos."""

from __future__ import annotations

import http.server
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from supervisor.api import Api
from supervisor.probe import Outcome, Probe


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("supervisor.api.REQUEST_TIMEOUT", 1)
    monkeypatch.setattr("supervisor.probe.RETRY_AFTER", 0.1)


@contextmanager
def embeds_nothing(answered: Iterable[int], status: int | None = None) -> Iterator[Api]:
    """Serve statistics with these inference counts in turn; fail all other requests.

    They get the status, or no answer in time if it is None.
    """
    counts = iter(answered)

    class Statistics(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path.endswith("/stats"):
                success = {"success": {"count": next(counts)}}
                body = json.dumps({"model_stats": [{"inference_stats": success}]}).encode()
                self.send_response(200)
                self.end_headers()
                self.wfile.write(body)
            elif status:
                self.send_error(status)
            else:
                time.sleep(2)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Statistics) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield Api("127.0.0.1", server.server_port)
        server.shutdown()


@pytest.mark.parametrize(("status", "reason"), [(None, "no answer"), (503, "answered 503")])
def test_busy_is_told_from_dead_whichever_request_waits(
    tmp_path: Path, status: int | None, reason: str
) -> None:
    """Busy while the count of inferences grows, dead when it stands still."""
    with embeds_nothing([7, 9, 9, 9], status) as api:
        probe = Probe(api, tmp_path)
        assert probe.run().outcome is Outcome.BUSY
        failed = probe.run()
        assert failed.outcome is Outcome.FAILED
        assert reason in failed.reason


def test_working_is_told_from_hanging(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Tolerate stubs that compute without answering, but not forever.

    A request of many large photos has this effect.
    """
    compute = "import os\n[os.fork() for _ in range(2)]\nwhile True: pass"

    with (
        embeds_nothing(itertools.repeat(0)) as api,
        subprocess.Popen([sys.executable, "-c", compute], start_new_session=True) as process,
    ):
        probe = Probe(api, tmp_path)

        def hangs() -> bool:
            result = probe.run()
            return result.outcome is Outcome.FAILED and "no answer" in result.reason

        try:
            assert hangs(), "the server's process is not known"
            probe.server = process.pid
            assert probe.run().outcome is Outcome.BUSY
            with monkeypatch.context() as patch:
                patch.setattr("supervisor.probe.WORKING_FOR", 1)
                assert hangs()
            os.killpg(process.pid, signal.SIGSTOP)
            assert hangs()
        finally:
            os.killpg(process.pid, signal.SIGKILL)
