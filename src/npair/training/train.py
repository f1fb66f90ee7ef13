"""Training: one loop from photos to a checkpoint.

Everything random is a function of the seed and the step, so an interrupted run that is resumed goes the way that
it would have gone without the interruption.
"""

from __future__ import annotations

import copy
import json
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from types import FrameType
from typing import Any

import kornia.augmentation as K
import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

from npair.data.dataset import Dataset, Photos
from npair.data.pixels import decode_dataset, default_cache
from npair.data.sources import read_dataset
from npair.networks.efficientnet_lite import VARIANTS
from npair.networks.network import EmbeddingNetwork, build_network, embed, multiply_adds, new_network
from npair.scoring.evaluate import compare
from npair.scoring.retrieval import Vectors
from npair.serving.preprocess import Preprocessing
from npair.training.loss import CosineNPairLoss, NPairLoss, TupletLoss
from npair.training.processes import (
    any_process,
    from_first,
    gather,
    keep_freed_memory,
    process_group,
    rank,
    sum_gradients,
    world_size,
)
from npair.training.run import RunError, TrainConfig, git_commit, read_run
from npair.training.sampler import Indices, NPairSampler

# How many photos a run looks at, counting repeats, and the most epochs; config.epochs overrides both.
BUDGET, MOST_EPOCHS = 792_000, 400
BUDGET_PRETRAINED, MOST_EPOCHS_PRETRAINED = 240_000, 150


def train(data: Path, run: Path, config: TrainConfig, *, resume: bool = False, cache: Path | None = None) -> bool:
    """Train on the train split of ``data`` into the folder ``run``; returns False where a signal ended it early, with a checkpoint.

    What was found in the data and what was chosen is said on stderr before the first step. The val split, where there is one, is
    scored ``config.evaluations`` times; nothing is chosen by it unless ``config.patience`` asks for early stopping.
    cache: the folder for decoded photos, by default in the user's cache folder. Under torchrun, each process trains on its share
    of every batch.
    Raises: DataError for unusable data; RunError for a run folder that holds another run or no checkpoint to resume, for a network
    that cannot be had, or for a loss that is not finite.
    """
    checkpoint_path = run / "checkpoint.pt"
    if resume:
        started = read_run(run)
        config = TrainConfig(**started["train"])
        if not checkpoint_path.is_file():
            raise RunError(f"{run} holds no checkpoint to resume; start it without --resume")
    elif checkpoint_path.exists():
        raise RunError(f"{run} already holds a run; add --resume to go on with it or name another folder")
    cache = cache or default_cache()

    keep_freed_memory()
    with process_group() as device:
        dataset = read_dataset(data, split_by=config.split_by, val_share=config.val_share, seed=config.seed)
        config = settle(config, dataset.train)
        # Crops are cut from photos larger than they are, so that they have real detail: the smallest, 0.35 of the area, are scaled
        # up by 1.2, all others less or down.
        larger = replace(config.preprocessing(), size=round(1.44 * config.crop_size))
        dataset, pixels, findings = decode_dataset(dataset, larger, cache)
        photos, rows = dataset.train, pixels.of(dataset.train)
        sampler = NPairSampler(photos.fine, config.classes_per_batch, config.seed, multiple_of=world_size())
        config = replace(config, classes_per_batch=sampler.classes_per_batch)
        torch.manual_seed(config.seed)
        described = {"fingerprint": dataset.fingerprint(), "photos": len(photos), "classes": len(np.unique(photos.fine))}
        if resume:
            if started["data"]["fingerprint"] != described["fingerprint"]:
                raise RunError(f"the photos in {data} are not those that {run} was started on")
            network = build_network(started["network"])
        else:
            network, description = new_network(config.network, config.width, config.views, config.weights)
            if rank() == 0:
                run.mkdir(parents=True, exist_ok=True)
                described |= {"made": dataset.made, "findings": findings.lines()}
                started = {"train": asdict(config), "network": description, "git_commit": git_commit(), "data": described}
                (run / "config.json").write_text(json.dumps(started, indent=2) + "\n")
        score = recall_on_val(dataset, config.preprocessing(), cache) if config.evaluations and dataset.val else None
        photos_per_step = config.classes_per_batch * (2 if config.loss != "tuplet" else 1 + config.classes_per_batch)
        steps_per_epoch = max(1, len(photos) // photos_per_step)
        steps = config.epochs * steps_per_epoch
        say(*findings.lines(), *chosen(config, dataset, steps_per_epoch, network, device))

        network = network.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if world_size() > 1 and device.type == "cuda":
            network = nn.SyncBatchNorm.convert_sync_batchnorm(network)  # type: ignore[no-untyped-call]
        ema = AveragedModel(network, avg_fn=moving_average(config.ema_decay), use_buffers=True)
        losses_by_name: dict[str, nn.Module] = {
            "npair": NPairLoss(norm_penalty=config.norm_penalty, coarse_smoothing=config.coarse_smoothing),
            "cosine": CosineNPairLoss(temperature=config.temperature),
            "tuplet": TupletLoss(norm_penalty=config.norm_penalty),
        }
        loss_of = losses_by_name[config.loss]
        decayed = [p for p in network.parameters() if p.ndim > 1]
        undecayed = [p for p in network.parameters() if p.ndim <= 1]  # biases and the gains of normalisations
        optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": config.weight_decay}, {"params": undecayed, "weight_decay": 0.0}], fused=True
        )
        augment = augmentation(config.augmentation, config.crop_size)
        bf16 = supports_bf16(device)
        step, best, misses = 0, None, 0
        if resume:
            checkpoint = torch.load(checkpoint_path, weights_only=True, map_location=device)
            network.load_state_dict(checkpoint["network"])
            ema.load_state_dict(checkpoint["ema"])
            optimizer.load_state_dict(checkpoint["optimizer"])
            step, best, misses = checkpoint["step"], checkpoint["best"], checkpoint["misses"]

        def save_checkpoint() -> None:
            if rank() == 0:
                state = {
                    "step": step,
                    "network": network.state_dict(),
                    "ema": ema.state_dict(),
                    "optimizer": optimizer.state_dict(),
                }
                unfinished = checkpoint_path.with_suffix(".unfinished")
                torch.save({**state, "best": best, "misses": misses}, unfinished)
                unfinished.replace(checkpoint_path)

        as_they_are = augmentation("none", config.crop_size)

        def features_of(indices: Indices, change: Callable[[Tensor], Tensor]) -> Tensor:
            x = change(torch.from_numpy(pixels.array[rows[indices]]).to(device))
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                features: Tensor = network.features(x)
            return features.float()

        @torch.no_grad()
        def embed_for_mining(indices: Indices) -> Vectors:
            network.eval()
            embeddings = network.embedding(torch.cat([features_of(part, as_they_are) for part in np.array_split(indices, 4)]))
            network.train()
            vectors: Vectors = embeddings.cpu().numpy()
            return vectors

        def draw(step: int) -> Indices:
            """The batch: anchor, positive and, of tuplets, negatives in each row."""
            if config.loss == "tuplet":
                batch = sampler.tuplets(step)
            elif config.mine_from:
                mined = torch.from_numpy(sampler.mined_pairs(step, config.mine_from, embed_for_mining)).to(device)
                batch = from_first(mined).cpu().numpy()  # rounding could make the processes mine different classes
            else:
                batch = sampler.pairs(step)
            return batch

        with (
            interruption() as interrupted,
            tqdm(total=steps, initial=step, unit="step", dynamic_ncols=True, disable=rank() > 0 or None) as progress,
        ):
            for epoch in range(step // steps_per_epoch, config.epochs):
                began, losses, hits = time.monotonic(), [], []
                while step < (epoch + 1) * steps_per_epoch:
                    torch.manual_seed((config.seed * 1_000_003 + step) * world_size() + rank())
                    for group in optimizer.param_groups:
                        group["lr"] = config.learning_rate * schedule(step / steps, config.warmup)
                    drawn = draw(step)
                    shares = [drawn[first :: world_size()] for first in range(world_size())]  # as gather puts them together
                    batch = shares[rank()]
                    # In fp32: bf16's 8 bits would coarsen the products that the loss compares.
                    embeddings = network.embedding(features_of(batch.ravel(), augment))
                    anchors, positives, *negatives = _columns(gather(embeddings.view(*batch.shape, -1)))
                    coarse = torch.from_numpy(photos.coarse[np.concatenate(shares)[:, 0]]).to(device)
                    loss = (
                        loss_of(anchors, positives, coarse) if config.loss == "npair" else loss_of(anchors, positives, *negatives)
                    )
                    if not loss.isfinite():
                        raise RunError(f"the loss is {loss.item()} at step {step}; start anew with a lower --learning-rate")
                    optimizer.zero_grad()
                    loss.backward()
                    sum_gradients(network)
                    nn.utils.clip_grad_norm_(network.parameters(), config.gradient_norm)
                    optimizer.step()
                    ema.update_parameters(network)
                    step += 1
                    losses.append(loss.item())
                    nearest_positives = (anchors.detach() @ positives.detach().T).argmax(dim=1)
                    hits.append((nearest_positives == torch.arange(len(anchors), device=device)).float().mean().item())
                    progress.update()
                    progress.set_postfix(epoch=epoch + 1, loss=f"{losses[-1]:.3f}", batch_recall=f"{hits[-1]:.2f}")
                    if any_process(interrupted(), device):
                        save_checkpoint()
                        say(f"interrupted at step {step} of {steps}; go on with --resume")
                        return False
                row: dict[str, Any] = {"epoch": epoch + 1, "loss": float(np.mean(losses)), "batch_recall": float(np.mean(hits))}
                row["seconds"] = round(time.monotonic() - began, 1)
                due = (epoch + 1) * config.evaluations // config.epochs > epoch * config.evaluations // config.epochs
                stop = False
                if score is not None and due and rank() == 0:
                    row["val"] = score(ema.module)
                    if config.patience:
                        better = best is None or row["val"]["fine"] > best["fine"]
                        misses = 0 if better else misses + 1
                        if better:
                            best = {"epoch": epoch + 1, "fine": row["val"]["fine"], "ema": copy.deepcopy(ema.state_dict())}
                        stop = misses >= config.patience
                if rank() == 0:
                    with (run / "log.jsonl").open("a") as log:
                        log.write(json.dumps(row) + "\n")
                recall = f"  val recall@1 {row['val']['fine']:.3f} fine {row['val']['coarse']:.3f} coarse" if "val" in row else ""
                say(f"epoch {epoch + 1:3}  loss {row['loss']:.3f}  batch recall {row['batch_recall']:.3f}{recall}")
                save_checkpoint()
                if any_process(stop, device):
                    say(f"stopped early: no better val recall in {config.patience} evaluations")
                    break
    if best:
        say(f"kept the network of epoch {best['epoch']}, val recall@1 {best['fine']:.3f}")
    return True


def settle(config: TrainConfig, photos: Photos) -> TrainConfig:
    """Choose what is 0 or "auto" from a look at no more than 200 of the photos and from their number."""
    sample = [photos.paths[i] for i in np.unique(np.linspace(0, len(photos) - 1, 200).astype(int))]
    looks = [look for look in map(glance, sample) if look is not None]
    short_side = float(np.median([side for side, _ in looks])) if looks else 160.0
    colourful = sum(colour for _, colour in looks) > len(looks) / 20
    augmentation = config.augmentation if config.augmentation != "auto" else "photo" if colourful else "drawing"
    network = config.network
    if network == "auto":
        network = "efficientnet-lite0" if augmentation == "photo" else "compact"
    if network == "compact":
        # Photo crops show things larger than drawing crops do, by the square root of their areas.
        largest, enlarged = (208, 1.6) if augmentation == "photo" else (160, 1.25)
        views, learning_rate = 2 if augmentation == "photo" else 1, 5e-4
        budget, most_epochs = BUDGET, MOST_EPOCHS
    else:
        largest, enlarged, views, learning_rate = (192, 1.2, 1, 4e-4) if network in VARIANTS else (224, 1.0, 1, 1e-4)
        budget, most_epochs = BUDGET_PRETRAINED, MOST_EPOCHS_PRETRAINED
    own = network == "compact" or network in VARIANTS  # of transformers' models, many take one size alone
    size = config.size or (int(min(largest, max(32, 16 * (short_side // 16)))) if own else largest)
    return replace(
        config,
        network=network,
        size=size,
        crop_size=config.crop_size or (16 * round(size / enlarged / 16) if own else size),
        views=config.views or views,
        classes_per_batch=config.classes_per_batch or (8 if config.loss == "tuplet" else 60),
        epochs=config.epochs or min(most_epochs, max(10, round(budget / len(photos)))),
        augmentation=augmentation,
        learning_rate=config.learning_rate or learning_rate,
    )


def glance(path: Path) -> tuple[int, bool] | None:
    """The shorter side in pixels and whether there is any colour; None where the file cannot be read."""
    try:
        with Image.open(path) as image:
            side = min(image.size)
            image.draft("RGB", (64, 64))
            pixels = np.asarray(image.convert("RGB").resize((32, 32))).astype(int)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    return side, bool((pixels.max(axis=2) - pixels.min(axis=2)).mean() > 4)


def chosen(
    config: TrainConfig, dataset: Dataset, steps_per_epoch: int, network: EmbeddingNetwork, device: torch.device
) -> list[str]:
    """What a run is about to do, in sentences."""
    splits = ", ".join(f"{len(photos):,} {name}" for name, photos in dataset.splits.items())
    parameters, size = sum(parameter.numel() for parameter in network.parameters()) / 1e6, config.size
    cost = multiply_adds(network, size) / 1e6
    where = device.type if device.type != "cpu" else f"{torch.get_num_threads()} CPU threads"
    if world_size() > 1:
        where = f"{world_size()} processes, each on {where}"
    start = "which starts from nothing" if config.network == "compact" else "which starts from pretrained weights"
    return [
        f"photos: {splits}, {len(dataset.train.fine_names)} classes; {dataset.made}",
        f"network {config.network}, {start}: {parameters:.1f} M parameters, {cost:.0f} M multiply-adds for {config.views}"
        f" view{'s' if config.views > 1 else ''} of {size} x {size} pixels",
        f"{config.epochs} epochs of {steps_per_epoch} batches of {config.classes_per_batch} classes, on {where}"
        f"{' in bf16' if supports_bf16(device) else ''}",
        f"loss {config.loss}, augmentation {config.augmentation} with crops of {config.crop_size} pixels, learning rate"
        f" {config.learning_rate:g}",
    ]


def supports_bf16(device: torch.device) -> bool:
    """Whether autocast to bf16 is faster: on GPUs, and on CPUs that have instructions for it."""
    capabilities = torch.cpu.get_capabilities()
    return device.type == "cuda" or bool(capabilities.get("avx512_bf16", False) or capabilities.get("amx_bf16", False))


def augmentation(kind: str, size: int) -> Callable[[Tensor], Tensor]:
    """uint8 [N, H, W, 3] -> float [N, size, size, 3], 0 to 255.

    "photo": random crop, rotation, flip, light and erasing. Colours stay, because they tell a red apple from a green one.
    "drawing": random crop and affine alone, because a mirrored character is another one. "none": scaled to size.
    """
    crop = K.RandomResizedCrop((size, size), scale=(0.35 if kind == "photo" else 0.7, 1.0))
    transforms = {
        "photo": (
            crop,
            K.RandomAffine(15.0, p=0.5, padding_mode="border"),
            K.RandomHorizontalFlip(),
            K.RandomBrightness((0.8, 1.2), p=0.8),
            K.RandomContrast((0.8, 1.2), p=0.8),
            K.RandomErasing(scale=(0.02, 0.2), p=0.25),
        ),
        "drawing": (crop, K.RandomAffine(20.0, shear=10.0, p=0.5, padding_mode="border")),
        "none": (K.Resize((size, size)),),
    }[kind]
    sequence = K.AugmentationSequential(*transforms)

    @torch.no_grad()
    def augment(photos: Tensor) -> Tensor:
        augmented: Tensor = sequence(photos.permute(0, 3, 1, 2).float() / 255)
        return 255 * augmented.permute(0, 2, 3, 1)

    return augment


def moving_average(decay: float) -> Callable[[Tensor, Tensor, Tensor | int], Tensor]:
    """An exponential moving average whose memory grows with the number of steps, so that a short run forgets where it began."""

    def average(averaged: Tensor, current: Tensor, count: Tensor | int) -> Tensor:
        return averaged + (current - averaged) * (1 - min(decay, (1 + int(count)) / (10 + int(count))))

    return average


def schedule(done: float, warmup: float) -> float:
    """Learning rate as a share of its peak: linear warm-up, then half a cosine to zero (Loshchilov & Hutter, ICLR 2017)."""
    if done < warmup:
        return (done + 1e-3) / (warmup + 1e-3)
    return 0.5 * (1 + math.cos(math.pi * (done - warmup) / (1 - warmup)))


def say(*lines: str) -> None:
    """Lines on stderr beside the progress bar, from the first process alone."""
    if rank() == 0:
        for line in lines:
            tqdm.write(line, file=sys.stderr)


Score = Callable[[nn.Module], dict[str, float]]


def recall_on_val(dataset: Dataset, preprocessing: Preprocessing, cache: Path) -> Score:
    """A function of a network: its Recall@1 on val, against train or, where val's classes are others, among val itself."""
    dataset, pixels, _ = decode_dataset(dataset, preprocessing, cache)

    def score(network: nn.Module) -> dict[str, float]:
        return compare("this step", dataset, "val", lambda photos: embed(network, pixels.array, pixels.of(photos))).recall_at_1()

    return score


@contextmanager
def interruption() -> Iterator[Callable[[], bool]]:
    """Yields a function that tells whether Ctrl-C or SIGTERM (which torchrun makes of it) came; a second one ends the program."""
    noticed = False

    def note(number: int, _frame: FrameType | None) -> None:
        nonlocal noticed
        noticed = True
        signal.signal(number, before[signal.Signals(number)])

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    before = {number: handler for number, handler in before.items() if handler != signal.SIG_IGN}  # as in a script's background
    for number in before:
        signal.signal(number, note)
    try:
        yield lambda: noticed
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _columns(embeddings: Tensor) -> list[Tensor]:
    """[N, columns, D] -> anchors [N, D], positives [N, D] and, where there are more columns, negatives [N, K, D]."""
    anchors, positives, negatives = embeddings[:, 0], embeddings[:, 1], embeddings[:, 2:]
    return [anchors, positives, negatives] if negatives.shape[1] else [anchors, positives]
