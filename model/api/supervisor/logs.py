"""The log on stderr: npair's own records and Triton's lines, as text or as JSON objects."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import select
import sys
from collections import deque
from datetime import datetime, timezone
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

log = logging.getLogger("npair")

PART = 4096  # bytes, Linux's PIPE_BUF
STALLED_AFTER = 5  # seconds in which the reader of stderr takes nothing

# Triton: a level, date and time, process, source and a message, quoted as in JSON.
TRITON_LINE = re.compile(r"([IWEF])\d{4} [\d:.]+ \d+ ([^:\]]+):\d+\] (.*)")
LEVELS = {"I": logging.INFO, "W": logging.WARNING, "E": logging.ERROR, "F": logging.ERROR}
# A version's model.py adds facts about a request as a JSON object.
ABOUT_REQUEST = re.compile(r"(photo refused|request failed): (\{.*\})")
# CUDA builds of Triton log this as an error on every machine without a GPU.
NOISE = "CudaDriverHelper has not been initialized"


class TextFormatter(logging.Formatter):
    """``npair: message`` or ``npair: WARNING: message``, but Triton's lines unchanged."""

    def format(self, record: logging.LogRecord) -> str:
        level = "WARNING: " if record.levelno == logging.WARNING else ""
        return str(getattr(record, "line", f"npair: {level}{record.getMessage()}"))


class JsonFormatter(logging.Formatter):
    """One object per line, in ASCII, so that no message can forge another line."""

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created, timezone.utc)
        return json.dumps(
            {
                "time": time.isoformat(timespec="milliseconds"),
                "level": record.levelname.lower(),
                "source": record.name,
                "message": record.getMessage(),
                **getattr(record, "facts", {}),
            }
        )


class StderrHandler(logging.StreamHandler):  # type: ignore[type-arg]  # generic only in stubs
    """Nothing behind stderr may end the server or hold it up: with a full disk, a broken pipe or a
    reader that has stalled, such as a terminal after Ctrl-S, lines are lost.
    """

    stalled = False

    def emit(self, record: logging.LogRecord) -> None:
        """Write a line in parts that a pipe which is ready takes at once."""
        try:
            line = f"{self.format(record)}\n".encode(self.stream.encoding, "backslashreplace")
            while line and self._ready():
                line = line[os.write(self.stream.fileno(), line[:PART]) :]
        except Exception:
            self.handleError(record)

    def _ready(self) -> bool:
        """Whether the reader takes more. A reader that has stalled is waited for only once."""
        if sys.platform == "win32":  # it has no poll, and serves nothing
            return True
        stderr = select.poll()
        stderr.register(self.stream.fileno(), select.POLLOUT)
        self.stalled = not stderr.poll(0 if self.stalled else 1000 * STALLED_AFTER)
        return not self.stalled

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)


def configure(log_format: str) -> None:
    """Write records to stderr from now on. log_format: text or json."""
    handler = StderrHandler()
    handler.setFormatter(JsonFormatter() if log_format == "json" else TextFormatter())
    log.addHandler(handler)
    log.setLevel(logging.INFO)


class Relay:
    """Passes on warnings and errors of the server, each with the lines that follow it and are not
    Triton's, such as a traceback; all lines if verbose. held: the last 20 records not passed on.
    """

    def __init__(self, verbose: bool) -> None:
        self.verbose = verbose
        self.held: deque[logging.LogRecord] = deque(maxlen=20)

    def run(self, stream: Iterable[bytes], on_first_line: Callable[[], None]) -> None:
        """Read until the stream ends. on_first_line: called once, when Triton begins to log."""
        level, begun = logging.INFO, False
        for line in stream:
            text = line.decode(errors="replace").rstrip()
            parts = TRITON_LINE.fullmatch(text)
            if parts:
                level = LEVELS[parts[1]]
                if not begun:
                    begun = True
                    on_first_line()
            if not text:
                continue
            record = server_record(level, text, parts)
            if (self.verbose or level > logging.INFO) and NOISE not in text:
                log.handle(record)
            else:
                self.held.append(record)


def server_record(level: int, text: str, parts: re.Match[str] | None) -> logging.LogRecord:
    """The record of a server's line. parts: of TRITON_LINE, None if it is not Triton's."""
    source, message, facts = "triton", text, {}
    if parts:
        source, message = "npair" if parts[2] == "model.py" else "triton", parts[3]
        with contextlib.suppress(ValueError):
            message = str(json.loads(message))
        about = ABOUT_REQUEST.fullmatch(message) if source == "npair" else None
        if about:
            message, facts = about[1], json.loads(about[2])
    name = logging.getLevelName(level)
    fields = {"name": source, "levelno": level, "levelname": name, "msg": message}
    return logging.makeLogRecord({**fields, "line": text, "facts": facts})
