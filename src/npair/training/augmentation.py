"""Random changes of training photos."""

from __future__ import annotations

from collections.abc import Callable

import kornia.augmentation as K
import torch
from torch import Tensor

# Training decodes photos at this multiple of the crop's size, so that crops have real detail: the
# smallest, 0.35 of the area, are scaled up by 1.2, all others less or down.
DECODE_SCALE = 1.44


def augmentation(kind: str, size: int) -> Callable[[Tensor], Tensor]:
    """Return a function from uint8 [N, H, W, 3] to float [N, size, size, 3], 0 to 255.

    kind: "photo" crops, rotates, flips, relights and erases at random, and blurs some photos or
    turns them grey; it never changes the hue, which tells a red apple from a green one; "drawing"
    only crops, rotates and shears, since a mirrored character is a different one; "none" scales to
    size.
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
            K.RandomGrayscale(p=0.1),
            K.RandomGaussianBlur((11, 11), (0.2, 2.5), p=0.15),  # in pixels of the crop
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
