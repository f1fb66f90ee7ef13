"""Triton's entry point: encoded photos of many requests in, their embeddings out."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from .embedder import Embedder, Vector
from .engine import cores
from .preprocess import Limits, PhotoError


class TritonPythonModel:
    """IMAGE (BYTES [b, 1], one encoded photo each) -> EMBEDDING (FP32 [b, D], unit length)."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load and verify this version; any exception makes Triton refuse it with the message."""
        config = json.loads(args["model_config"])
        instances = sum(group["count"] for group in config["instance_group"])
        self.limits = Limits(max_bytes=_number(config, "max_bytes"), max_pixels=_number(config, "max_pixels"))
        available = cores()
        os.environ["OMP_NUM_THREADS"] = str(available)  # before a library that reads it is imported
        folder = Path(args["model_repository"]) / args["model_version"]
        self.embedder = Embedder(folder, cores=available, instances=instances, engine=_parameter(config, "engine"))
        for name, reason in self.embedder.passed_over.items():
            pb_utils.Logger.log_warn(f"version {folder.name} is served by {self.embedder.engine}, not by {name}: {reason}")

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """One response per request, in order; a bad photo fails its own request alone."""
        batches = [pb_utils.get_input_tensor_by_name(request, "IMAGE").as_numpy().ravel() for request in requests]
        vectors = iter(self.embedder.embed_photos([photo for batch in batches for photo in batch], self.limits))
        return [_response(list(itertools.islice(vectors, len(batch)))) for batch in batches]

    def finalize(self) -> None:
        self.embedder.close()


def _response(vectors: Sequence[Vector | PhotoError]) -> Any:
    """The embeddings, or INVALID_ARG that names each bad photo as ``IMAGE[index]: reason``, joined by ``; ``."""
    reasons = [f"IMAGE[{index}]: {vector}" for index, vector in enumerate(vectors) if isinstance(vector, PhotoError)]
    if reasons:
        return pb_utils.InferenceResponse(error=pb_utils.TritonError("; ".join(reasons), pb_utils.TritonError.INVALID_ARG))
    return pb_utils.InferenceResponse([pb_utils.Tensor("EMBEDDING", np.stack(vectors))])  # type: ignore[arg-type]


def _parameter(config: dict[str, Any], key: str) -> str:
    """A parameter of config.pbtxt, empty where it has none."""
    text: str = config["parameters"].get(key, {}).get("string_value", "")
    return text


def _number(config: dict[str, Any], key: str) -> int:
    """Raises: ValueError where the parameter is missing or not a positive whole number."""
    text = _parameter(config, key)
    if not text.isdecimal() or not int(text):
        raise ValueError(f'config.pbtxt: parameter "{key}" must be a positive whole number, found "{text}"')
    return int(text)
