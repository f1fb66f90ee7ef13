"""A training run's folder: what was asked for, on which data and with which code.

``config.json`` says it, ``log.jsonl`` has a line per epoch, ``checkpoint.pt`` holds the state of the last step.
"""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from npair.serving.preprocess import Preprocessing


class RunError(RuntimeError):
    """A run folder that cannot be used as asked; the message says what to do."""


@dataclass(frozen=True)
class TrainConfig:
    """The knobs of a run; sizes in pixels."""

    seed: int = 0
    epochs: int = 200
    classes_per_batch: int = 60  # N; two photos of each
    size: int = 160  # of the photo when evaluated and served
    crop_size: int = 128  # of the random crop in training: smaller, since crops show objects larger than whole photos do
    learning_rate: float = 1e-3
    warmup: float = 0.05  # share of all steps
    weight_decay: float = 0.05
    gradient_norm: float = 1.0
    norm_penalty: float = 2e-3
    ema_decay: float = 0.998
    evaluate_every: int = 25  # epochs

    def preprocessing(self) -> Preprocessing:
        return Preprocessing(size=self.size, resample="BILINEAR", background=255)


def read_run(run: Path) -> dict[str, Any]:
    """A run's config.json: ``train`` (arguments of TrainConfig), ``git_commit``, ``data``. Raises: RunError where there is none."""
    try:
        started: dict[str, Any] = json.loads((run / "config.json").read_text())
        TrainConfig(**started["train"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{run} is not a run of this npair: {error}") from error
    return started


def git_commit() -> str | None:
    """The commit of the code in use, with ``-dirty`` where files differ from it; None outside a git checkout."""
    try:
        command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
