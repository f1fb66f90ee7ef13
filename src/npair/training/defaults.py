"""Defaults that depend on the data, and the report of what was chosen."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from npair.data.dataset import DataError, Dataset, Photos, spread
from npair.data.pixels import PREVIEW, decode_photo
from npair.networks.efficientnet_lite import VARIANTS
from npair.networks.network import EmbeddingNetwork, multiply_adds
from npair.training.batches import Batches
from npair.training.processes import world_size
from npair.training.run import TrainConfig

INSPECTED_PHOTOS = 200
# Photos that a run sees, counting repeats, and its most epochs.
SEEN_FROM_SCRATCH, EPOCHS_FROM_SCRATCH = 792_000, 400
SEEN_PRETRAINED, EPOCHS_PRETRAINED = 180_000, 150


def choose_defaults(config: TrainConfig, photos: Photos) -> TrainConfig:
    """Replace each 0 or "auto", but that of the epochs, by a choice that fits the photos.

    Looks at INSPECTED_PHOTOS of them at most. The augmentation decides nothing else, so that runs
    which differ in it can be compared.
    """
    indices = spread(len(photos), INSPECTED_PHOTOS)
    inspected = [inspect_photo(photos.paths[index]) for index in indices]
    readable = [found for found in inspected if found is not None]
    sides = [side for side, _ in readable if side is not None]
    short_side = float(np.median(sides)) if sides else 160.0
    colourful = sum(colour for _, colour in readable) > len(readable) / 20
    augmentation = config.augmentation
    if augmentation == "auto":
        augmentation = "photo" if colourful else "drawing"
    network = config.network
    if network == "auto":
        network = "efficientnet-lite0" if colourful else "compact"

    compact, lite = network == "compact", network in VARIANTS
    views = 1
    if compact and colourful:
        # Crops show objects larger than whole photos do, by the square root of their areas' ratio.
        largest, enlargement, views, learning_rate = 208, 1.6, 2, 5e-4
    elif compact:
        largest, enlargement, learning_rate = 160, 1.25, 5e-4
    elif lite:
        largest, enlargement, learning_rate = 192, 1.2, 4e-4
    else:  # many models of transformers accept only one size
        largest, enlargement, learning_rate = 224, 1.0, 1e-4
    any_size = compact or lite
    fitting = int(min(largest, max(32, 16 * (short_side // 16))))
    size = config.size or (fitting if any_size else largest)
    crop_size = 16 * round(size / enlargement / 16) if any_size else size
    return replace(
        config,
        network=network,
        size=size,
        crop_size=config.crop_size or crop_size,
        views=config.views or views,
        classes_per_batch=config.classes_per_batch or (8 if config.loss == "tuplet" else 60),
        augmentation=augmentation,
        learning_rate=config.learning_rate or learning_rate,
    )


def default_epochs(network: str, photos: int) -> int:
    """Return the number of epochs for as many train photos."""
    seen, most = SEEN_PRETRAINED, EPOCHS_PRETRAINED
    if network == "compact":
        seen, most = SEEN_FROM_SCRATCH, EPOCHS_FROM_SCRATCH
    return min(most, max(10, round(seen / photos)))


def inspect_photo(path: Path) -> tuple[int | None, bool] | None:
    """Return the shorter side in pixels and whether there is colour, None if it is unreadable.

    The side alone is None for the few photos that training reads and Pillow refuses to open.
    """
    try:
        pixels = decode_photo(path, PREVIEW).astype(int)
    except (DataError, OSError):
        return None
    side = None
    # Pillow's own limits, on pixels and on text, raise many kinds of errors.
    with contextlib.suppress(Exception), Image.open(path) as image:
        side = min(image.size)
    return side, bool((pixels.max(axis=2) - pixels.min(axis=2)).mean() > 4)


def summary(
    config: TrainConfig, dataset: Dataset, network: EmbeddingNetwork, batches: Batches
) -> list[str]:
    """Describe the run that is about to start, a sentence a line."""
    splits = ", ".join(f"{len(photos):,} {name}" for name, photos in dataset.splits.items())
    classes = len(np.unique(dataset.train.fine))
    parameters = sum(parameter.numel() for parameter in network.parameters()) / 1e6
    cost = multiply_adds(network, config.size) / 1e6
    views = f"{config.views} view{'s' if config.views > 1 else ''}"
    device = batches.device.type
    where = f"{torch.get_num_threads()} CPU threads" if device == "cpu" else device
    if world_size() > 1:
        where = f"{world_size()} processes, each on {where}"
    weights = "random weights" if config.network == "compact" else "pretrained weights"
    if config.network in VARIANTS and config.frozen_stages:
        weights += f" and keeps those of the first {config.frozen_stages} of 7 stages"
    return [
        f"photos: {splits}, {classes} classes; {dataset.made}",
        f"network {config.network}, which starts from {weights}: {parameters:.1f} M"
        f" parameters, {cost:.0f} M multiply-adds for {views} of {config.size} x {config.size}"
        " pixels",
        f"{config.epochs} epochs of {batches.per_epoch} batches of {config.classes_per_batch}"
        f" classes, on {where}{' in bf16' if batches.bf16 else ''}",
        f"loss {config.loss}, augmentation {config.augmentation} with crops of"
        f" {config.crop_size} pixels, learning rate {config.learning_rate:g}",
    ]
