"""Triton's entry point: encoded photos of many requests in, one forward pass, embeddings out."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import triton_python_backend_utils as pb_utils

from .embedder import Embedder
from .preprocess import Limits, PhotoError, decode

Decoded = npt.NDArray[np.uint8] | PhotoError


class TritonPythonModel:
    """IMAGE (BYTES [b, 1], one encoded photo each) -> EMBEDDING (FP32 [b, D], unit length)."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load and verify this version; any exception makes Triton refuse it with the message."""
        config = json.loads(args["model_config"])
        instances = sum(group["count"] for group in config["instance_group"])
        threads = max(1, len(os.sched_getaffinity(0)) // instances)
        self.limits = Limits(max_bytes=_parameter(config, "max_bytes"), max_pixels=_parameter(config, "max_pixels"))
        self.embedder = Embedder(Path(args["model_repository"]) / args["model_version"], threads=threads)
        self.decoders = ThreadPoolExecutor(threads)  # Pillow decodes and scales outside the GIL

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """One response per request, in order; a bad photo fails its own request alone."""
        photos = [pb_utils.get_input_tensor_by_name(request, "IMAGE").as_numpy().ravel() for request in requests]
        decoded = self.decoders.map(self._decode, [photo for batch in photos for photo in batch])
        batches = [list(itertools.islice(decoded, len(batch))) for batch in photos]
        errors = [_invalid(batch) for batch in batches]
        valid = [batch for batch, error in zip(batches, errors, strict=True) if error is None]
        embeddings = iter(self._embed(valid))
        return [
            pb_utils.InferenceResponse(error=error)
            if error is not None
            else pb_utils.InferenceResponse([pb_utils.Tensor("EMBEDDING", next(embeddings))])
            for error in errors
        ]

    def finalize(self) -> None:
        self.decoders.shutdown()

    def _decode(self, photo: bytes) -> Decoded:
        try:
            return decode(photo, self.embedder.preprocessing, self.limits)
        except PhotoError as error:
            return error

    def _embed(self, batches: Sequence[Sequence[Decoded]]) -> list[npt.NDArray[np.float32]]:
        """One forward pass for all batches, split into theirs again."""
        if not batches:
            return []
        embeddings = self.embedder.embed(np.stack(list(itertools.chain.from_iterable(batches))))  # type: ignore[arg-type]
        return np.split(embeddings, np.cumsum([len(batch) for batch in batches[:-1]]))


def _parameter(config: dict[str, Any], key: str) -> int:
    """A parameter of config.pbtxt. Raises: ValueError where it is missing or not a positive whole number."""
    text = config["parameters"].get(key, {}).get("string_value", "")
    if not text.isdecimal() or not int(text):
        raise ValueError(f'config.pbtxt: parameter "{key}" must be a positive whole number, found "{text}"')
    return int(text)


def _invalid(batch: Sequence[Decoded]) -> Any:
    """INVALID_ARG that names each bad photo of a request as ``IMAGE[index]: reason``, joined by ``; ``; None where all are good."""
    reasons = [f"IMAGE[{index}]: {photo}" for index, photo in enumerate(batch) if isinstance(photo, PhotoError)]
    return pb_utils.TritonError("; ".join(reasons), pb_utils.TritonError.INVALID_ARG) if reasons else None
