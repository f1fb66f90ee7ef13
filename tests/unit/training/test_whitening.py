"""Fit embedding layers in closed form, and look at what becomes of the features."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch

from npair.data.dataset import Photos
from npair.data.pixels import Pixels
from npair.networks.network import EmbeddingNetwork, build_network
from npair.training.whitening import SHRINKAGE, fit_embedding, whitening

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]


def features(classes: int, each: int, noise: list[float]) -> tuple[Floats, Integers]:
    """Draw classes apart in all directions, and photos apart by more in some than in others."""
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(classes), each)
    centres = 3 + rng.normal(size=(classes, len(noise)))
    return centres[labels] + rng.normal(size=(len(labels), len(noise))) * noise, labels


def fitted(drawn: Floats, labels: Integers, kinds: Integers | None = None) -> tuple[Floats, Floats]:
    """Fit a layer; without the classes' kinds, each is its own."""
    sums = np.stack([drawn[labels == label].sum(axis=0) for label in np.unique(labels)])
    kinds = np.arange(len(sums)) if kinds is None else kinds
    return whitening(np.bincount(labels), sums, drawn.T @ drawn, kinds)


def recall(vectors: Floats, labels: Integers) -> float:
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    cosines = unit @ unit.T
    np.fill_diagonal(cosines, -2)
    return float(np.mean(labels[cosines.argmax(axis=1)] == labels))


def test_photos_of_a_class_differ_equally_in_all_directions() -> None:
    drawn, labels = features(30, 40, [0.1, 0.5, 1, 2, 4])
    weight, bias = fitted(drawn, labels)
    within = drawn - np.stack([drawn[labels == label].mean(axis=0) for label in labels])
    covariance = within.T @ within / len(within)
    shrunk = covariance + SHRINKAGE * np.trace(covariance) / 5 * np.eye(5)
    np.testing.assert_allclose(weight @ shrunk @ weight.T, np.eye(5), atol=1e-9)
    outputs = drawn @ weight.T + bias
    np.testing.assert_allclose(outputs.mean(axis=0), 0, atol=1e-9)
    total = outputs.T @ outputs
    np.testing.assert_allclose(total, np.diag(np.diag(total)), atol=1e-6)
    assert (np.diff(np.diag(total)) < 0).all()


def test_directions_in_which_photos_of_a_class_differ_count_less() -> None:
    drawn, labels = features(30, 10, [0.1] * 40 + [20])
    weight, bias = fitted(drawn, labels)
    assert recall(drawn @ weight.T + bias, labels) > recall(drawn, labels) + 0.1


def test_classes_of_one_kind_stay_closer_to_each_other() -> None:
    rng, kinds, classes = np.random.default_rng(0), np.arange(30) // 3, np.arange(30)
    centres = rng.normal(size=(10, 40))[kinds] * ([1.0] * 20 + [0.0] * 20)
    centres += rng.normal(size=(30, 40)) * ([0.0] * 20 + [1.0] * 20)
    labels = np.repeat(classes, 10)
    drawn = centres[labels] + 0.1 * rng.normal(size=(300, 40))
    siblings = (kinds[:, None] == kinds) & (classes[:, None] != classes)

    def cosine_of_siblings(weight: Floats, bias: Floats) -> float:
        outputs = centres @ weight.T + bias
        outputs /= np.linalg.norm(outputs, axis=1, keepdims=True)
        return float((outputs @ outputs.T)[siblings].mean())

    alone = cosine_of_siblings(*fitted(drawn, labels))
    assert cosine_of_siblings(*fitted(drawn, labels, kinds)) > alone + 0.1
    assert recall(drawn @ fitted(drawn, labels, kinds)[0].T, labels) == 1


def test_classes_of_equal_photos_are_kept_apart() -> None:
    drawn, labels = features(5, 3, [0.0] * 4)
    weight, bias = fitted(drawn, labels)
    assert recall(drawn @ weight.T + bias, labels) == 1


@pytest.fixture
def network() -> EmbeddingNetwork:
    torch.manual_seed(0)
    return build_network({"name": "compact", "width": 8, "views": 2}).eval()


def test_a_layer_is_fitted_to_its_inputs_whatever_it_was(
    network: EmbeddingNetwork, monkeypatch: pytest.MonkeyPatch
) -> None:
    array = np.random.default_rng(0).integers(0, 256, (12, 32, 32, 3), np.uint8)
    paths = tuple(Path(str(row)) for row in range(12))
    pixels = Pixels(array, {path: row for row, path in enumerate(paths)})
    classes, names = np.arange(10) // 2, tuple("abcde")
    train = Photos(paths[2:], classes, classes // 3, names, names[:2])
    fit_embedding(network, pixels, train)
    assert network.embedding.power == 0.5
    with torch.inference_mode():
        first = network(torch.from_numpy(array[2:]))
    assert first.mean(dim=0).abs().max() < 1e-4
    torch.nn.init.normal_(network.embedding.weight)
    monkeypatch.setattr("npair.training.whitening.CHUNK", 3)
    fit_embedding(network, pixels, train)
    with torch.inference_mode():
        again = network(torch.from_numpy(array[2:]))
    # Components are the same but for their signs.
    torch.testing.assert_close(again @ again.T, first @ first.T, rtol=1e-3, atol=1e-3)
