"""Training: one loop from photos to a checkpoint.

Everything random is a function of the seed and the step, so an interrupted run that is resumed goes the way that
it would have gone without the interruption.
"""

from __future__ import annotations

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
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from npair.data import NPairSampler, load_pixels, read_split
from npair.evaluate import accuracy
from npair.loss import NPairLoss
from npair.network import EmbeddingNetwork, embed
from npair.run import RunError, TrainConfig, git_commit, read_run


def train(data: Path, run: Path, config: TrainConfig, *, resume: bool = False) -> bool:
    """Train on ``data``'s train split into the folder ``run``; returns False where Ctrl-C ended it early, with a checkpoint.

    The val split, where there is one, is scored for the log alone: nothing is chosen by it.
    Raises: DataError for unusable data; RunError for a run folder that holds another run or no checkpoint to resume, or for a loss
    that is not finite.
    """
    checkpoint_path = run / "checkpoint.pt"
    photos = read_split(data, "train")
    validation = read_split(data, "val") if (data / "val.txt").exists() else None
    described = {"fingerprint": photos.fingerprint(), "photos": len(photos), "classes": len(np.unique(photos.fine))}
    if resume:
        started = read_run(run)
        config = TrainConfig(**started["train"])
        if not checkpoint_path.is_file():
            raise RunError(f"{run} holds no checkpoint to resume; start it without --resume")
        if started["data"] != described:
            raise RunError(f"the photos in {data} are not those that {run} was started on")
    else:
        if checkpoint_path.exists():
            raise RunError(f"{run} already holds a run; add --resume to go on with it or name another folder")
        run.mkdir(parents=True, exist_ok=True)
        started = {"train": asdict(config), "git_commit": git_commit(), "data": described}
        (run / "config.json").write_text(json.dumps(started, indent=2) + "\n")
    sampler = NPairSampler(photos.fine, config.classes_per_batch, config.seed)

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    capabilities = torch.cpu.get_capabilities()
    bf16 = device.type == "cuda" or capabilities.get("avx512_bf16", False) or capabilities.get("amx_bf16", False)
    preprocessing = config.preprocessing()
    # Crops are cut from photos somewhat larger than the network's input, so that a crop has real detail.
    pixels = torch.from_numpy(load_pixels(photos.paths, replace(preprocessing, size=config.size * 6 // 5)))
    augment = augmentation(config.crop_size)

    torch.manual_seed(config.seed)
    network = EmbeddingNetwork().to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    ema = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(config.ema_decay), use_buffers=True)  # type: ignore[no-untyped-call]
    loss_of = NPairLoss(norm_penalty=config.norm_penalty)
    decayed = [p for p in network.parameters() if p.ndim > 1]
    undecayed = [p for p in network.parameters() if p.ndim <= 1]  # biases and the gains of batch normalisation
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": config.weight_decay}, {"params": undecayed, "weight_decay": 0.0}], fused=True
    )
    steps = config.epochs * sampler.batches_per_epoch
    step = 0
    if resume:
        checkpoint = torch.load(checkpoint_path, weights_only=True, map_location=device)
        network.load_state_dict(checkpoint["network"])
        ema.load_state_dict(checkpoint["ema"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        step = checkpoint["step"]

    def save_checkpoint() -> None:
        state = {"step": step, "network": network.state_dict(), "ema": ema.state_dict(), "optimizer": optimizer.state_dict()}
        unfinished = checkpoint_path.with_suffix(".unfinished")
        torch.save(state, unfinished)
        unfinished.replace(checkpoint_path)

    with interruption() as interrupted, tqdm(total=steps, initial=step, unit="step", dynamic_ncols=True) as progress:
        for epoch in range(step // sampler.batches_per_epoch, config.epochs):
            began, losses, hits = time.monotonic(), [], []
            for batch, (anchors, positives) in enumerate(sampler.epoch(epoch)):
                if epoch * sampler.batches_per_epoch + batch < step:
                    continue  # done before the interruption
                torch.manual_seed(config.seed * 1_000_003 + step)
                for group in optimizer.param_groups:
                    group["lr"] = config.learning_rate * schedule(step / steps, config.warmup)
                x = augment(pixels[np.concatenate([anchors, positives])].to(device))
                with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                    features = network.features(x)
                # In fp32: bf16's 8 bits would coarsen the products that the loss compares.
                anchor_embeddings, positive_embeddings = network.embedding(features.float()).chunk(2)
                loss = loss_of(anchor_embeddings, positive_embeddings)
                if not loss.isfinite():
                    raise RunError(f"the loss is {loss.item()} at step {step}; start anew with a lower --learning-rate")
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(network.parameters(), config.gradient_norm)
                optimizer.step()
                ema.update_parameters(network)
                step += 1
                losses.append(loss.item())
                products = anchor_embeddings.detach() @ positive_embeddings.detach().T
                hits.append((products.argmax(dim=1) == torch.arange(len(products), device=device)).float().mean().item())
                progress.update()
                progress.set_postfix(epoch=epoch + 1, loss=f"{losses[-1]:.3f}", batch_recall=f"{hits[-1]:.2f}")
                if interrupted():
                    save_checkpoint()
                    progress.write(f"interrupted at step {step} of {steps}; go on with --resume", file=sys.stderr)
                    return False
            row: dict[str, Any] = {"epoch": epoch + 1, "loss": float(np.mean(losses)), "batch_recall": float(np.mean(hits))}
            row["seconds"] = round(time.monotonic() - began, 1)
            if validation is not None and ((epoch + 1) % config.evaluate_every == 0 or epoch + 1 == config.epochs):
                gallery = embed(ema.module, load_pixels(photos.paths, preprocessing))
                queries = embed(ema.module, load_pixels(validation.paths, preprocessing))
                row["val"] = accuracy(queries, validation, gallery, photos).as_dict()
            with (run / "log.jsonl").open("a") as log:
                log.write(json.dumps(row) + "\n")
            recall = f"  val recall@1 {row['val']['fine']:.3f} fine {row['val']['coarse']:.3f} coarse" if "val" in row else ""
            progress.write(
                f"epoch {epoch + 1:3}  loss {row['loss']:.3f}  batch recall {row['batch_recall']:.3f}{recall}", file=sys.stderr
            )
            save_checkpoint()
    return True


def augmentation(size: int) -> Callable[[Tensor], Tensor]:
    """Random crop, flip, small affine, light and colour changes; uint8 [N, H, W, 3] -> float [N, size, size, 3], 0 to 255.

    Hue stays: the colour is what tells a red apple from a green one.
    """
    transforms = K.AugmentationSequential(
        K.RandomAffine(20.0, shear=10.0, p=0.5),
        K.RandomResizedCrop((size, size), scale=(0.35, 1.0)),
        K.RandomHorizontalFlip(),
        K.RandomBrightness((0.6, 1.4), p=0.8),
        K.RandomContrast((0.6, 1.4), p=0.8),
        K.RandomGamma((0.7, 1.4), p=0.3),
        K.RandomPlanckianJitter(p=0.3),
        K.RandomErasing(scale=(0.02, 0.2), p=0.3),
    )

    @torch.no_grad()
    def augment(photos: Tensor) -> Tensor:
        augmented: Tensor = transforms(photos.permute(0, 3, 1, 2).float() / 255)
        return 255 * augmented.permute(0, 2, 3, 1)

    return augment


def schedule(done: float, warmup: float) -> float:
    """Learning rate as a share of its peak: linear warm-up, then half a cosine to zero (Loshchilov & Hutter, ICLR 2017)."""
    if done < warmup:
        return (done + 1e-3) / (warmup + 1e-3)
    return 0.5 * (1 + math.cos(math.pi * (done - warmup) / (1 - warmup)))


@contextmanager
def interruption() -> Iterator[Callable[[], bool]]:
    """Yields a function that tells whether Ctrl-C was pressed; a second Ctrl-C ends the program at once."""
    pressed = False

    def note(_signal: int, _frame: FrameType | None) -> None:
        nonlocal pressed
        pressed = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, before)
