"""The state of training: what a checkpoint holds."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from npair.networks.network import EmbeddingNetwork, build_network
from npair.training.processes import rank, world_size
from npair.training.run import RunError, TrainConfig, read_run

CHECKPOINT = "checkpoint.pt"
Tensors = tuple[Tensor, ...] | list[Tensor]


@dataclass
class TrainingState:
    """Everything that changes from step to step.

    ema: the moving average of the network, which is evaluated and kept.
    step: the number of steps done.
    best: with early stopping, ``epoch``, ``fine`` (recall) and ``ema`` of the best evaluation.
    misses: evaluations since the best one.
    measured: loss and batch recall of each step of the epoch that has begun.
    """

    network: EmbeddingNetwork
    ema: AveragedModel
    optimizer: torch.optim.Optimizer
    step: int = 0
    best: dict[str, Any] | None = None
    misses: int = 0
    measured: list[tuple[float, float]] = field(default_factory=list)

    @classmethod
    def start(
        cls, network: EmbeddingNetwork, config: TrainConfig, device: torch.device
    ) -> TrainingState:
        """Move a network to the device and prepare it for its first step."""
        network = network.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if world_size() > 1 and device.type == "cuda":
            network = nn.SyncBatchNorm.convert_sync_batchnorm(network)  # type: ignore[no-untyped-call]
        average = moving_average(config.ema_decay)
        weights = [p for p in network.parameters() if p.ndim > 1]
        # Biases, and the gains of normalisations.
        others = [p for p in network.parameters() if p.ndim <= 1]
        optimizer = torch.optim.AdamW(
            [
                {"params": weights, "weight_decay": config.weight_decay},
                {"params": others, "weight_decay": 0.0},
            ],
            fused=True,
        )
        return cls(
            network, AveragedModel(network, multi_avg_fn=average, use_buffers=True), optimizer
        )

    def save(self, path: Path) -> None:
        """Write the checkpoint, whole or not at all; the first process alone writes.

        Raises: RunError if it cannot be written.
        """
        if rank() == 0:
            unfinished = path.with_suffix(".unfinished")
            checkpoint = {
                "step": self.step,
                "network": self.network.state_dict(),
                "ema": self.ema.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "best": self.best,
                "misses": self.misses,
                "measured": self.measured,
            }
            try:
                torch.save(checkpoint, unfinished)
                unfinished.replace(path)
            except (OSError, RuntimeError) as error:  # torch's own writer raises the latter
                unfinished.unlink(missing_ok=True)
                go_on = "go on with --resume" if path.exists() else "start again"
                raise RunError(
                    f"{path} cannot be written ({error}); make room, and {go_on}"
                ) from error

    def restore(self, path: Path, device: torch.device) -> None:
        """Continue from a checkpoint."""
        checkpoint = torch.load(path, weights_only=True, map_location=device)
        for name in ("network", "ema", "optimizer"):
            getattr(self, name).load_state_dict(checkpoint[name])
        self.step, self.best = checkpoint["step"], checkpoint["best"]
        self.misses = checkpoint["misses"]
        self.measured = checkpoint.get("measured", [])  # npair 0.2.0 kept none

    def set_learning_rate(self, rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def note_recall(self, epoch: int, fine: float) -> None:
        """Keep the averaged network if its recall on val is the best so far."""
        if self.best is None or fine > self.best["fine"]:
            ema = copy.deepcopy(self.ema.state_dict())
            self.best, self.misses = {"epoch": epoch, "fine": fine, "ema": ema}, 0
        else:
            self.misses += 1


def load_network(run: Path) -> EmbeddingNetwork:
    """Load the averaged network of a run's checkpoint, in evaluation mode.

    With early stopping, it is that of the best evaluation.
    Raises: RunError if the run or its checkpoint is missing; NetworkError.
    """
    network = build_network(read_run(run)["network"])
    try:
        checkpoint = torch.load(run / CHECKPOINT, weights_only=True, map_location="cpu")
    except FileNotFoundError:
        raise RunError(f"{run} holds no checkpoint; train it first") from None
    averaged = (checkpoint["best"] or checkpoint)["ema"]
    network.load_state_dict(
        {
            name.removeprefix("module."): value
            for name, value in averaged.items()
            if name != "n_averaged"
        }
    )
    return network.eval()


def moving_average(decay: float) -> Callable[[Tensors, Tensors, Tensor | int], None]:
    """Return an exponential moving average that remembers longer as training goes on.

    A short run thus forgets its first weights as well. Counts, which are integers, are copied.
    """

    def average(averaged: Tensors, current: Tensors, count: Tensor | int) -> None:
        present = min(decay, (1 + int(count)) / (10 + int(count)))
        if averaged[0].is_floating_point():
            torch._foreach_lerp_(averaged, current, 1 - present)
        else:
            torch._foreach_copy_(averaged, current)

    return average
