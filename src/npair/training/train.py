"""The training loop, and what it needs set up.

Everything random depends on the seed and the step alone, so a resumed run ends where the
uninterrupted one would have.
"""

from __future__ import annotations

import json
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from npair.data.checks import Findings
from npair.data.dataset import Dataset, HoldOut
from npair.data.pixels import decode_dataset, default_cache
from npair.data.sources import read_dataset
from npair.networks.efficientnet_lite import EfficientNetLite
from npair.networks.network import EmbeddingNetwork, build_network, embed, new_network
from npair.scoring.evaluate import embed_split, queries_and_gallery
from npair.training.augmentation import DECODE_SCALE
from npair.training.batches import Batches
from npair.training.checkpoint import CHECKPOINT, TrainingState
from npair.training.defaults import choose_defaults, default_epochs, summary
from npair.training.loss import CosineNPairLoss, NPairLoss, TupletLoss
from npair.training.processes import (
    any_process,
    gather,
    keep_freed_memory,
    process_group,
    rank,
    sum_gradients,
    world_size,
)
from npair.training.run import RunError, TrainConfig, git_commit, read_run
from npair.training.whitening import fit_embedding

Score = Callable[[nn.Module], dict[str, float]]
LossFunction = Callable[[Tensor, Tensor], Tensor]


def train(
    data: Path, run: Path, config: TrainConfig, *, resume: bool = False, cache: Path | None = None
) -> bool:
    """Train a network on the train split of ``data``, into the folder ``run``.

    Reports on stderr what the data's checks found and which defaults were chosen. Scores the val
    split, if there is one, ``config.evaluations`` times; the scores change nothing unless
    ``config.patience`` asks for early stopping. Under torchrun, processes share each batch.

    resume: continue from the run's checkpoint, with the run's own configuration.
    cache: folder for decoded photos, by default in the user's cache folder.
    Returns: whether training ended by itself; False after a signal, with a checkpoint.
    Raises: DataError for unusable data; RunError if the folder holds another run, or no checkpoint
    to resume, if an option does nothing, or if the loss is not finite; NetworkError if the network
    is not available.
    """
    started = _read_started(run) if resume else None
    if started:
        config = TrainConfig(**started["train"])
    elif (run / CHECKPOINT).exists():
        raise RunError(
            f"{run} already holds a run; add --resume to go on with it or name another folder"
        )
    cache = cache or default_cache()
    keep_freed_memory()
    with process_group() as device:
        dataset = read_dataset(data)
        config = choose_defaults(config, dataset.train)
        if not started:
            config.refuse_idle_options()
        decoded = replace(config.preprocessing(), size=round(DECODE_SCALE * config.crop_size))
        hold_out = HoldOut.of(config)
        dataset, pixels, findings = decode_dataset(dataset, decoded, cache, hold_out)
        epochs = config.epochs or default_epochs(config.network, len(dataset.train))
        config = replace(config, epochs=epochs)
        batches = Batches(config, dataset.train, pixels, device)
        if not started:
            batches.refuse_idle_mining()
            if config.patience and not dataset.val:
                raise RunError(f"--patience needs val photos, but {data} has none; leave it out")
        config = replace(config, classes_per_batch=batches.classes)
        torch.manual_seed(config.seed)
        if started:
            if started["data"]["fingerprint"] != dataset.fingerprint():
                raise RunError(f"the photos in {data} are not those that {run} was started on")
            network = build_network(started["network"])
        else:
            network = _start_run(run, config, dataset, findings)
        if isinstance(network.backbone, EfficientNetLite):
            network.backbone.freeze(config.frozen_stages)
        score = _score_on_val(dataset, config, cache) if config.evaluations else None
        say(*findings.lines(), *summary(config, dataset, network, batches))
        state = TrainingState.start(network, config, device)
        if started:
            state.restore(run / CHECKPOINT, device)
            _trim_log(run, state.step // batches.per_epoch)
        if not _loop(state, batches, config, run, score):
            return False
        if config.embedding_layer == "whitened" and rank() == 0:
            _whiten(state, dataset, config, run, cache)
        return True


def _loop(
    state: TrainingState, batches: Batches, config: TrainConfig, run: Path, score: Score | None
) -> bool:
    """Train from the state's step to the end; returns False if a signal came first."""
    loss_of = loss_function(config)
    steps = config.epochs * batches.per_epoch
    first = state.step // batches.per_epoch
    # A run that stopped early has ended, and is resumed for its report alone.
    epochs = range(first, first if _stops_early(state, config) else config.epochs)
    with interruption() as interrupted, _progress(state.step, steps) as progress:
        for epoch in epochs:
            began, came = time.monotonic(), False
            end = (epoch + 1) * batches.per_epoch
            while state.step < end and not came:
                loss, recall = _step(state, batches, config, loss_of, steps)
                state.measured.append((loss, recall))
                progress.update()
                progress.set_postfix(
                    epoch=epoch + 1, loss=f"{loss:.3f}", batch_recall=f"{recall:.2f}"
                )
                came = any_process(interrupted(), batches.device)

            if state.step == end:
                loss, recall = np.mean(state.measured, axis=0).tolist()
                state.measured.clear()
                row: dict[str, Any] = {"epoch": epoch + 1, "loss": loss, "batch_recall": recall}
                row["seconds"] = round(time.monotonic() - began, 1)
                if score and _evaluation_due(epoch, config) and rank() == 0:
                    row["val"] = score(state.ema.module)
                    if config.patience:
                        state.note_recall(epoch + 1, row["val"]["fine"])
                _report(row, run)
            state.save(run / CHECKPOINT)
            if came:
                say(f"interrupted at step {state.step} of {steps}; go on with --resume")
                return False
            if any_process(_stops_early(state, config), batches.device):
                say(f"stopped early: no better val recall in {config.patience} evaluations")
                break
    if state.best:
        best = state.best
        say(f"kept the network of epoch {best['epoch']}, val recall@1 {best['fine']:.3f}")
    return True


def _whiten(
    state: TrainingState, dataset: Dataset, config: TrainConfig, run: Path, cache: Path
) -> None:
    """Fit the embedding layer of the network that is kept. Resuming an ended run fits it again."""
    say("fitting the embedding layer to all train photos")
    dataset, pixels, _ = decode_dataset(dataset, config.preprocessing(), cache)
    if state.best:
        state.ema.load_state_dict(state.best["ema"])
    network = state.ema.module
    assert isinstance(network, EmbeddingNetwork)
    fit_embedding(network, pixels, dataset.train)
    if state.best:
        state.best["ema"] = state.ema.state_dict()
    state.save(run / CHECKPOINT)


def _step(
    state: TrainingState, batches: Batches, config: TrainConfig, loss_of: LossFunction, steps: int
) -> tuple[float, float]:
    """Take one of ``steps`` steps; returns its loss and the recall in its batch.

    Raises: RunError if the loss is not finite.
    """
    network = state.network
    torch.manual_seed((config.seed * 1_000_003 + state.step) * world_size() + rank())
    share = schedule(state.step / steps, config.warmup)
    state.set_learning_rate(config.learning_rate * share)
    own = batches.draw(state.step, network)[rank() :: world_size()]
    # In fp32: bf16's 8 bits would coarsen the products that the loss compares.
    embeddings = network.embedding(batches.features(network, own.ravel()))
    embeddings = gather(embeddings.view(*own.shape, -1))
    loss = loss_of(embeddings, gather(batches.coarse(own)))
    state.optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    sum_gradients(network)
    nn.utils.clip_grad_norm_(network.parameters(), config.gradient_norm)
    state.optimizer.step()
    state.ema.update_parameters(network)
    # A GPU computes while Python goes on, until a number is asked for: ask once.
    value, recall = torch.stack([loss.detach(), batch_recall(embeddings)]).tolist()
    if not math.isfinite(value):
        raise RunError(
            f"the loss is {value} at step {state.step}; start again with a lower --learning-rate"
        )
    state.step += 1
    return value, recall


def _stops_early(state: TrainingState, config: TrainConfig) -> bool:
    return bool(config.patience) and state.misses >= config.patience


def _trim_log(run: Path, epochs: int) -> None:
    """Keep a row for each of the epochs that the checkpoint has.

    A row is written before its checkpoint, so a kill or a full disk may leave one too many, or cut.
    """
    log = run / "log.jsonl"
    if rank() or not log.exists():
        return
    rows = {}
    for line in log.read_text().splitlines():
        with suppress(ValueError):
            row = json.loads(line)
            rows[row["epoch"]] = line
    unfinished = log.with_suffix(".unfinished")
    kept = (line for epoch, line in sorted(rows.items()) if epoch <= epochs)
    unfinished.write_text("".join(line + "\n" for line in kept))
    unfinished.replace(log)


def _read_started(run: Path) -> dict[str, Any]:
    """Read the configuration of a run to resume. Raises: RunError if it has no checkpoint."""
    started = read_run(run)
    if not (run / CHECKPOINT).is_file():
        raise RunError(f"{run} holds no checkpoint to resume; start it without --resume")
    return started


def _start_run(
    run: Path, config: TrainConfig, dataset: Dataset, findings: Findings
) -> EmbeddingNetwork:
    """Create the network and write the run's config.json."""
    network, description = new_network(config.network, config.width, config.views, config.weights)
    if rank() == 0:
        started = {
            "train": asdict(config),
            "network": description,
            "git_commit": git_commit(),
            "data": {
                "fingerprint": dataset.fingerprint(),
                "photos": len(dataset.train),
                "classes": len(np.unique(dataset.train.fine)),
                "made": dataset.made,
                "findings": findings.lines(),
            },
        }
        run.mkdir(parents=True, exist_ok=True)
        (run / "log.jsonl").unlink(missing_ok=True)  # of a run that ended before its checkpoint
        (run / "config.json").write_text(json.dumps(started, indent=2) + "\n")
    return network


def _score_on_val(dataset: Dataset, config: TrainConfig, cache: Path) -> Score | None:
    """Return a function from a network to its Recall@1 on val, or None if there is no val.

    If val shares no class with train, val photos are compared with each other.
    Raises: DataError if there is a single one.
    """
    if not dataset.val:
        return None
    queries_and_gallery(dataset, "val")  # to be refused now, not after hours
    dataset, pixels, _ = decode_dataset(dataset, config.preprocessing(), cache)

    def score(network: nn.Module) -> dict[str, float]:
        embedded = embed_split(
            "", dataset, "val", lambda photos: embed(network, pixels.array, pixels.of(photos))
        )
        return embedded.recall_at_1()

    return score


def loss_function(config: TrainConfig) -> LossFunction:
    """Return the configured loss of embeddings [N, columns, D] with coarse labels [N].

    Columns are anchor, positive and, for tuplets, negatives.
    """
    if config.loss == "npair":
        npair = NPairLoss(
            norm_penalty=config.norm_penalty, coarse_smoothing=config.coarse_smoothing
        )
        return lambda rows, coarse: npair(rows[:, 0], rows[:, 1], coarse)
    if config.loss == "cosine":
        cosine = CosineNPairLoss(temperature=config.temperature)
        return lambda rows, _: cosine(rows[:, 0], rows[:, 1])
    tuplet = TupletLoss(norm_penalty=config.norm_penalty)
    return lambda rows, _: tuplet(rows[:, 0], rows[:, 1], rows[:, 2:])


@torch.no_grad()
def batch_recall(embeddings: Tensor) -> Tensor:
    """Return the share of anchors that have the largest product with their own positive.

    embeddings: [N, columns, D], anchors and positives in the first two columns.
    Returns: fp32, a scalar on the embeddings' device.
    """
    nearest = (embeddings[:, 0] @ embeddings[:, 1].T).argmax(dim=1)
    return (nearest == torch.arange(len(nearest), device=nearest.device)).float().mean()


def schedule(done: float, warmup: float) -> float:
    """Return the learning rate as a share of its peak, given the share of steps done.

    Linear warm-up, then half a cosine to zero (Loshchilov & Hutter, ICLR 2017).
    """
    if done < warmup:
        return (done + 1e-3) / (warmup + 1e-3)
    return 0.5 * (1 + math.cos(math.pi * (done - warmup) / (1 - warmup)))


def _evaluation_due(epoch: int, config: TrainConfig) -> bool:
    """Return whether val is scored after this epoch, so that evaluations are evenly spread."""
    before, after = (n * config.evaluations // config.epochs for n in (epoch, epoch + 1))
    return after > before


def _report(row: dict[str, Any], run: Path) -> None:
    """Append an epoch's row to the log and print it."""
    if rank() == 0:
        with (run / "log.jsonl").open("a") as log:
            log.write(json.dumps(row) + "\n")
    line = "epoch {epoch:3}  loss {loss:.3f}  batch recall {batch_recall:.3f}"
    if "val" in row:
        line += "  val recall@1"
        line += "".join(f" {recall:.3f} {kind}" for kind, recall in row["val"].items())
    say(line.format(**row))


def _progress(step: int, steps: int) -> tqdm[Any]:
    hidden = rank() > 0 or None  # None: unless stderr is a terminal
    return tqdm(total=steps, initial=step, unit="step", dynamic_ncols=True, disable=hidden)


def say(*lines: str) -> None:
    """Print lines on stderr above the progress bar, from the first process alone."""
    if rank() == 0:
        for line in lines:
            tqdm.write(line, file=sys.stderr)


@contextmanager
def interruption() -> Iterator[Callable[[], bool]]:
    """Turn the first SIGINT or SIGTERM into a flag; a second one acts as it would outside.

    torchrun forwards Ctrl-C as SIGTERM. A signal that is ignored stays ignored, as SIGINT is in a
    script's background.
    Yields: a function that returns whether a signal came.
    """
    came = False

    def note(number: int, _frame: FrameType | None) -> None:
        nonlocal came
        came = True
        signal.signal(number, before[signal.Signals(number)])

    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    before = {number: handler for number, handler in handlers.items() if handler != signal.SIG_IGN}
    for number in before:
        signal.signal(number, note)
    try:
        yield lambda: came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
