"""Random changes of training photos."""

from __future__ import annotations

import pytest
import torch

from npair.training.augmentation import augmentation

RED = torch.tensor([200, 40, 40], dtype=torch.uint8).expand(400, 24, 24, 3)


@pytest.mark.parametrize(("kind", "least", "most"), [("photo", 0.04, 0.18), ("drawing", 0, 0)])
def test_a_tenth_of_photos_is_grey(kind: str, least: float, most: float) -> None:
    torch.manual_seed(0)
    changed = augmentation(kind, 16)(RED)
    assert changed.shape == (400, 16, 16, 3)
    assert -0.01 < changed.min() <= changed.max() < 255.01
    colour = (changed.amax(3) - changed.amin(3)).amax((1, 2))
    assert least <= (colour < 1).float().mean() <= most


@pytest.mark.parametrize(("kind", "least", "most"), [("photo", 0.05, 0.3), ("drawing", 0, 0.02)])
def test_some_photos_are_blurred(kind: str, least: float, most: float) -> None:
    torch.manual_seed(0)
    noise = torch.randint(0, 256, (400, 32, 32, 3), dtype=torch.uint8)
    detail = augmentation(kind, 32)(noise).diff(dim=2).abs().mean((1, 2, 3))
    assert least <= (detail < detail.median() / 3).float().mean() <= most


def test_none_only_scales() -> None:
    assert torch.equal(augmentation("none", 24)(RED[:2]).round(), RED[:2].float())
