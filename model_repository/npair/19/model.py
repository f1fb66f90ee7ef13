"""Triton's entry point: the photos of many requests in, their embeddings out."""

from __future__ import annotations

import itertools
import json
import os
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from .embedder import Embedder, Vector
from .engine import cores
from .overload import Overload
from .preprocess import Limits
from .refusal import REASONS, PhotoError

REPORT_INTERVAL = 1.0  # seconds between updates of the server's metrics
QUEUE_LIMIT = 128  # waiting requests, unless config.pbtxt says otherwise
STALLED_FOR = 10  # seconds without progress in a batch after which its process exits
# Lines logged of each kind per interval; the rest is counted, so that no client floods the log.
LOGGED = 5
LOGGED_LENGTH = 100  # characters of an error, or of a request's id, which may be very long
BATCHES = [1, 2, 4, 8, 16, 32, 64]  # the bounds of the histogram, in photos

# The counters of Embedder.work, in the order of its fields.
WORK = {
    "npair_photos_total": "Photos embedded",
    "npair_decode_seconds_total": "Seconds that threads spent decoding photos",
    "npair_network_seconds_total": "Seconds that threads spent in the network",
    "npair_norm_total": "Sum of the embeddings' lengths before they were scaled to 1",
}


class TritonPythonModel:
    """IMAGE (BYTES [b, 1]: encoded photos, or base64) -> EMBEDDING (FP32 [b, D], unit length)."""

    def initialize(self, args: dict[str, str]) -> None:
        """Verify and load this version. If this raises, Triton refuses the version."""
        config = json.loads(args["model_config"])
        instances = sum(group["count"] for group in config["instance_group"])
        max_bytes, max_pixels = _number(config, "max_bytes"), _number(config, "max_pixels")
        self.limits = Limits(max_bytes, max_pixels)
        available = cores()
        os.environ["OMP_NUM_THREADS"] = str(available)  # before a library reads it
        folder = Path(args["model_repository"]) / args["model_version"]
        engine = _parameter(config, "engine")
        self.embedder = Embedder(folder, cores=available, instances=instances, engine=engine)
        served = f"version {folder.name} is served by {self.embedder.engine}"
        for name, reason in self.embedder.passed_over.items():
            pb_utils.Logger.log_warn(f"{served}, not by {name}: {reason}")
        self.report = Report(self.embedder, folder.name)
        limit = _number(config, "queue_limit", QUEUE_LIMIT)
        self.overload = Overload(
            args["model_name"],
            folder.name,
            limit=limit,
            instances=instances,
            warn=pb_utils.Logger.log_warn,
        )
        self.busy = f"more than {limit} requests wait; try again later"
        self.watchdog = Watchdog()

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Return one response per request, in order. A bad photo fails only its own request."""
        with self.watchdog:
            if self.overload.refuses(len(requests)):
                self.report.turned_away += len(requests)
                unavailable = pb_utils.TritonError.UNAVAILABLE
                return [_error(self.busy, unavailable) for _ in requests]
            return self._execute(requests)

    def finalize(self) -> None:
        """End the threads, and remove this process's metrics."""
        self.watchdog.close()
        self.overload.close()
        self.report.close()
        self.embedder.close()

    def _execute(self, requests: Sequence[Any]) -> list[Any]:
        tensors = [pb_utils.get_input_tensor_by_name(request, "IMAGE") for request in requests]
        batches = [tensor.as_numpy().ravel() for tensor in tensors]
        photos = [photo for batch in batches for photo in batch]
        try:
            answers = self.embedder.embed_photos(photos, self.limits)
        except Exception as error:
            reason = str(error)[:LOGGED_LENGTH]
            for request in requests:
                self.report.log(pb_utils.Logger.log_error, "request failed", request, error=reason)
            raise
        vectors = iter(answers)
        parts = [list(itertools.islice(vectors, len(batch))) for batch in batches]
        self.report.batch(requests, parts)
        return [_response(part) for part in parts]


class Watchdog:
    """Exit the process if a batch hangs or the server was killed.

    Clients of a hung batch then get an error, and serve.py sees a dead process instead of a live
    one whose requests other processes answer.

    Only seconds in which this thread runs count, so freezing the container is harmless.
    """

    def __init__(self) -> None:
        self.batches, self.working = 0, False
        self.server = os.getppid()
        self.closing = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()

    def __enter__(self) -> None:
        self.batches, self.working = self.batches + 1, True

    def __exit__(self, *_: object) -> None:
        self.working = False

    def close(self) -> None:
        """End the thread."""
        self.closing.set()
        self.thread.join()

    def _watch(self) -> None:
        stalled, batches, computed = 0, 0, 0.0
        while not self.closing.wait(1.0):
            if os.getppid() != self.server:
                os._exit(1)  # a normal exit can wait for ever to update a metric
            # Waiting threads take far less CPU time than this.
            moved = self.batches != batches or time.process_time() - computed > 0.01
            stalled = stalled + 1 if self.working and not moved else 0
            batches, computed = self.batches, time.process_time()
            if stalled == STALLED_FOR:
                why = f"npair: a batch has made no progress for {STALLED_FOR} s; its process ends"
                print(why, file=sys.stderr, flush=True)
                os._exit(1)


class Report:
    """Report this process's work in the server's metrics and log.

    Updating a metric waits for the server, so a thread does it once a second. Each process has its
    own series: a shared one would disappear when the first of its processes ends.
    """

    def __init__(self, embedder: Embedder, version: str) -> None:
        self.embedder, self.version = embedder, version
        self.batches: deque[int] = deque()  # photos in each batch since the last update
        self.refused = Counter(dict.fromkeys(REASONS, 0))
        self.turned_away = 0  # requests
        self.lines: Counter[str] = Counter()  # by kind, since the last update
        self.families: list[Any] = []  # deleting them removes their metrics
        labels = {"version": version, "engine": embedder.engine, "process": str(os.getpid())}

        def family(kind: str, name: str, description: str) -> Any:
            kind = getattr(pb_utils.MetricFamily, kind)
            self.families.append(
                pb_utils.MetricFamily(name=name, description=description, kind=kind)
            )
            return self.families[-1]

        counters = [family("COUNTER", name, description) for name, description in WORK.items()]
        self.counters = [counter.Metric(labels=labels) for counter in counters]
        rejected = family("COUNTER", "npair_photos_rejected_total", "Photos refused")
        self.counters += [rejected.Metric(labels={**labels, "reason": why}) for why in REASONS]
        turned_away = family(
            "COUNTER", "npair_requests_turned_away_total", "Requests refused unread"
        )
        self.counters.append(turned_away.Metric(labels=labels))
        sizes = family("HISTOGRAM", "npair_batch_photos", "Photos in a batch")
        self.sizes = sizes.Metric(labels=labels, buckets=BATCHES)
        description = "Mean length of the golden photos' embeddings before they were scaled to 1"
        norm = family("GAUGE", "npair_golden_norm", description)
        norm.Metric(labels=labels).set(embedder.golden_norm)
        description = "Largest distance of a golden photo's embedding from the published one"
        distance = family("GAUGE", "npair_golden_distance", description)
        distance.Metric(labels=labels).set(embedder.golden_distance)
        self.closing = threading.Event()
        self.thread = threading.Thread(target=self._update, daemon=True)
        self.thread.start()

    def batch(
        self, requests: Sequence[Any], answers: Sequence[Sequence[Vector | PhotoError]]
    ) -> None:
        """Count an answered batch and log refused photos, without messages that may quote them."""
        self.batches.append(sum(map(len, answers)))
        for request, answer in zip(requests, answers, strict=True):
            for index, vector in enumerate(answer):
                if isinstance(vector, PhotoError):
                    self.refused[vector.reason] += 1
                    facts = {"index": index, "reason": vector.reason}
                    self.log(pb_utils.Logger.log_info, "photo refused", request, **facts)

    def log(self, write: Callable[[str], None], event: str, request: Any, **facts: object) -> None:
        """Log an event and a JSON object, escaped so that a client's id cannot forge a log line."""
        self.lines[event] += 1
        if self.lines[event] > LOGGED:
            return
        try:
            request_id = request.request_id()[:LOGGED_LENGTH]
        except UnicodeDecodeError:
            request_id = "(not UTF-8)"
        facts = {"request_id": request_id, "version": self.version, **facts}
        write(f"{event}: {json.dumps(facts)}")

    def close(self) -> None:
        """Update the metrics one last time, then remove them from the server."""
        self.closing.set()
        self.thread.join()
        self.families.clear()

    def _update(self) -> None:
        sent = [0.0] * len(self.counters)
        closing = False
        while not closing:
            closing = self.closing.wait(REPORT_INTERVAL)
            totals = [*astuple(self.embedder.work), *self.refused.values(), self.turned_away]
            for counter, total, before in zip(self.counters, totals, sent, strict=True):
                if total > before:
                    counter.increment(total - before)
            sent = totals
            while self.batches:
                self.sizes.observe(self.batches.popleft())
            lines, self.lines = self.lines, Counter()
            for event, number in list(lines.items()):
                if number > LOGGED:
                    rest = {"version": self.version, "more": number - LOGGED}
                    pb_utils.Logger.log_info(f"{event}: {json.dumps(rest)}")


def _response(answers: Sequence[Vector | PhotoError]) -> Any:
    """Return the embeddings, or INVALID_ARG with ``IMAGE[index]: reason`` for each bad photo."""
    reasons = [
        f"IMAGE[{index}]: {answer}"
        for index, answer in enumerate(answers)
        if isinstance(answer, PhotoError)
    ]
    if reasons:
        return _error("; ".join(reasons), pb_utils.TritonError.INVALID_ARG)
    vectors = np.stack(answers)  # type: ignore[arg-type]
    return pb_utils.InferenceResponse([pb_utils.Tensor("EMBEDDING", vectors)])


def _error(message: str, code: Any) -> Any:
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(message, code))


def _parameter(config: dict[str, Any], key: str, default: object = "") -> str:
    """Return a parameter of config.pbtxt."""
    text: str = config["parameters"].get(key, {}).get("string_value", str(default))
    return text


def _number(config: dict[str, Any], key: str, default: object = "") -> int:
    """Read a parameter. Raises: ValueError if it is missing or not a positive whole number."""
    text = _parameter(config, key, default)
    if not text.isdecimal() or not int(text):
        raise ValueError(
            f'config.pbtxt: parameter "{key}" must be a positive whole number, found "{text}"'
        )
    return int(text)
