"""Triton's entry point: encoded photos of many requests in, their embeddings out."""

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
from .preprocess import Limits
from .refusal import REASONS, PhotoError

REPORT_INTERVAL = 1.0  # seconds between two updates of the server's metrics
STALLED_FOR = 10  # seconds in which a batch makes no progress, after which its process ends itself
LOGGED = 5  # lines of a kind about requests in that time, the rest being only counted: no client can flood the log
LOGGED_LENGTH = 100  # characters of a request's id, which its sender may make as long as a photo, and of an error
BATCHES = [1, 2, 4, 8, 16, 32, 64]  # the histogram's bounds, in photos

# What counts of Embedder.work, in its fields' order.
WORK = {
    "npair_photos_total": "Photos embedded",
    "npair_decode_seconds_total": "Seconds that threads spent decoding photos",
    "npair_network_seconds_total": "Seconds that threads spent in the network",
    "npair_norm_total": "Sum of the embeddings' lengths before they were scaled to 1",
}


class TritonPythonModel:
    """IMAGE (BYTES [b, 1], one encoded photo each, or its base64) -> EMBEDDING (FP32 [b, D], unit length)."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load and verify this version; any exception makes Triton refuse it with the message."""
        config = json.loads(args["model_config"])
        instances = sum(group["count"] for group in config["instance_group"])
        self.limits = Limits(
            max_bytes=_number(config, "max_bytes"), max_pixels=_number(config, "max_pixels")
        )
        available = cores()
        os.environ["OMP_NUM_THREADS"] = str(available)  # before a library that reads it is imported
        folder = Path(args["model_repository"]) / args["model_version"]
        self.embedder = Embedder(
            folder, cores=available, instances=instances, engine=_parameter(config, "engine")
        )
        for name, reason in self.embedder.passed_over.items():
            pb_utils.Logger.log_warn(
                f"version {folder.name} is served by {self.embedder.engine}, not by {name}: {reason}"
            )
        self.report = Report(self.embedder, folder.name)
        self.watchdog = Watchdog()

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """One response per request, in order; a bad photo fails its own request alone."""
        with self.watchdog:
            return self._execute(requests)

    def finalize(self) -> None:
        self.watchdog.close()
        self.report.close()
        self.embedder.close()

    def _execute(self, requests: Sequence[Any]) -> list[Any]:
        batches = [
            pb_utils.get_input_tensor_by_name(request, "IMAGE").as_numpy().ravel()
            for request in requests
        ]
        try:
            answers = self.embedder.embed_photos(
                [photo for batch in batches for photo in batch], self.limits
            )
        except Exception as error:
            for request in requests:
                self.report.log(
                    pb_utils.Logger.log_error,
                    "request failed",
                    request,
                    error=str(error)[:LOGGED_LENGTH],
                )
            raise
        vectors = iter(answers)
        parts = [list(itertools.islice(vectors, len(batch))) for batch in batches]
        self.report.batch(requests, parts)
        return [_response(part) for part in parts]


class Watchdog:
    """Ends this process where a batch hangs, so that its clients get an error instead of silence, and serve.py sees a dead process
    instead of one that others answer for; and where the server was killed.

    Seconds count only while this thread runs: whoever freezes a container has done nothing wrong.
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
        self.closing.set()
        self.thread.join()

    def _watch(self) -> None:
        stalled, batches, computed = 0, 0, 0.0
        while not self.closing.wait(1.0):
            if os.getppid() != self.server:
                os._exit(1)  # Triton's own way out waits for ever where a metric was to be updated
            moved = (
                self.batches != batches or time.process_time() - computed > 0.01
            )  # threads that wait take far less
            stalled = stalled + 1 if self.working and not moved else 0
            batches, computed = self.batches, time.process_time()
            if stalled == STALLED_FOR:
                print(
                    f"npair: a batch has made no progress for {STALLED_FOR} s; its process ends",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(1)


class Report:
    """What this process does, in the server's metrics and its log.

    To update a metric is to send the server a message and wait for its answer, so a thread does that once a second. Each process
    has series of its own: one that two shared would be gone for both when the first of them ends.
    """

    def __init__(self, embedder: Embedder, version: str) -> None:
        self.embedder, self.version = embedder, version
        self.batches: deque[int] = deque()  # photos in each since the last update
        self.refused = Counter(dict.fromkeys(REASONS, 0))
        self.lines: Counter[str] = Counter()  # by kind, since the last update
        self.families: list[Any] = []  # whose metrics the server forgets when they are deleted
        labels = {"version": version, "engine": embedder.engine, "process": str(os.getpid())}

        def family(kind: str, name: str, description: str) -> Any:
            kind = getattr(pb_utils.MetricFamily, kind)
            self.families.append(
                pb_utils.MetricFamily(name=name, description=description, kind=kind)
            )
            return self.families[-1]

        rejected = family("COUNTER", "npair_photos_rejected_total", "Photos refused")
        self.counters = [
            family("COUNTER", name, description).Metric(labels=labels)
            for name, description in WORK.items()
        ]
        self.counters += [
            rejected.Metric(labels={**labels, "reason": reason}) for reason in REASONS
        ]
        self.sizes = family("HISTOGRAM", "npair_batch_photos", "Photos in a batch").Metric(
            labels=labels, buckets=BATCHES
        )
        norm = family(
            "GAUGE",
            "npair_golden_norm",
            "Mean length of the golden photos' embeddings before they were scaled to 1",
        )
        norm.Metric(labels=labels).set(embedder.golden_norm)
        distance = family(
            "GAUGE",
            "npair_golden_distance",
            "Largest distance of a golden photo's embedding from the published one",
        )
        distance.Metric(labels=labels).set(embedder.golden_distance)
        self.closing = threading.Event()
        self.thread = threading.Thread(target=self._update, daemon=True)
        self.thread.start()

    def batch(
        self, requests: Sequence[Any], answers: Sequence[Sequence[Vector | PhotoError]]
    ) -> None:
        """Count a batch that was answered, and log what was refused: not its message, which may quote the photo."""
        self.batches.append(sum(map(len, answers)))
        for request, answer in zip(requests, answers, strict=True):
            for index, vector in enumerate(answer):
                if isinstance(vector, PhotoError):
                    self.refused[vector.reason] += 1
                    self.log(
                        pb_utils.Logger.log_info,
                        "photo refused",
                        request,
                        index=index,
                        reason=vector.reason,
                    )

    def log(self, write: Callable[[str], None], event: str, request: Any, **facts: object) -> None:
        """A line about a request, as JSON after the event's name: whatever its sender made its id, it cannot look like another."""
        self.lines[event] += 1
        if self.lines[event] > LOGGED:
            return
        try:
            request_id = request.request_id()[:LOGGED_LENGTH]
        except UnicodeDecodeError:
            request_id = "(not UTF-8)"
        write(
            f"{event}: {json.dumps({'request_id': request_id, 'version': self.version, **facts})}"
        )

    def close(self) -> None:
        """Update the metrics a last time, and have the server forget them."""
        self.closing.set()
        self.thread.join()
        self.families.clear()

    def _update(self) -> None:
        sent = [0.0] * len(self.counters)
        closing = False
        while not closing:
            closing = self.closing.wait(REPORT_INTERVAL)
            totals = [*astuple(self.embedder.work), *self.refused.values()]
            for counter, total, before in zip(self.counters, totals, sent, strict=True):
                if total > before:
                    counter.increment(total - before)
            sent = totals
            while self.batches:
                self.sizes.observe(self.batches.popleft())
            lines, self.lines = self.lines, Counter()
            for event, number in list(lines.items()):
                if number > LOGGED:
                    pb_utils.Logger.log_info(
                        f"{event}: {json.dumps({'version': self.version, 'more': number - LOGGED})}"
                    )


def _response(vectors: Sequence[Vector | PhotoError]) -> Any:
    """The embeddings, or INVALID_ARG that names each bad photo as ``IMAGE[index]: reason``, joined by ``; ``."""
    reasons = [
        f"IMAGE[{index}]: {vector}"
        for index, vector in enumerate(vectors)
        if isinstance(vector, PhotoError)
    ]
    if reasons:
        return pb_utils.InferenceResponse(
            error=pb_utils.TritonError("; ".join(reasons), pb_utils.TritonError.INVALID_ARG)
        )
    return pb_utils.InferenceResponse([pb_utils.Tensor("EMBEDDING", np.stack(vectors))])  # type: ignore[arg-type]


def _parameter(config: dict[str, Any], key: str) -> str:
    """A parameter of config.pbtxt, empty where it has none."""
    text: str = config["parameters"].get(key, {}).get("string_value", "")
    return text


def _number(config: dict[str, Any], key: str) -> int:
    """Raises: ValueError where the parameter is missing or not a positive whole number."""
    text = _parameter(config, key)
    if not text.isdecimal() or not int(text):
        raise ValueError(
            f'config.pbtxt: parameter "{key}" must be a positive whole number, found "{text}"'
        )
    return int(text)
