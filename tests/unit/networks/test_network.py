from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from support.architectures import ARCHITECTURES, check_rebuilt_and_exported, checkpoint
from support.models import ROOT

from npair.networks import NetworkError
from npair.networks.network import (
    EmbeddingLayer,
    build_network,
    embed,
    multiply_adds,
    new_network,
)
from npair.publishing.graphs import export


@pytest.mark.parametrize(
    ("width", "row"),
    [(32, "| 32 | 2.8 M | 265 M | 721 M |"), (48, "| 48 | 6.3 M | 592 M | 1614 M |")],
)
def test_compact_costs_what_docs_say(width: int, row: str) -> None:
    network, _ = new_network("compact", width)
    parameters, one = (
        sum(parameter.numel() for parameter in network.parameters()),
        multiply_adds(network, 160),
    )
    network.views = 2
    two = multiply_adds(network, 208)
    assert row == (
        f"| {width} | {parameters / 1e6:.1f} M | {one / 1e6:.0f} M | {two / 1e6:.0f} M |"
    )
    assert network.training, "counting does not change the mode"
    assert row in (ROOT / "docs/training.md").read_text()


def test_embed_normalises_and_does_not_depend_on_the_batch() -> None:
    network, _ = new_network("compact", 8)
    pixels = torch.randint(0, 256, (5, 64, 64, 3), dtype=torch.uint8).numpy()
    together, apart = embed(network, pixels, batch=5), embed(network, pixels, batch=2)
    torch.testing.assert_close(torch.from_numpy(together), torch.from_numpy(apart))
    torch.testing.assert_close(torch.from_numpy(together).norm(dim=1), torch.ones(5))
    torch.testing.assert_close(
        embed(network, pixels, torch.tensor([3, 1]).numpy()), together[[3, 1]]
    )
    assert network.training, "embedding leaves the network in the mode it was in"


def test_a_power_of_one_is_a_linear_layer() -> None:
    torch.manual_seed(0)
    layer, features = EmbeddingLayer(8), torch.randn(5, 8, requires_grad=True)
    linear = torch.nn.functional.linear(features, layer.weight, layer.bias)
    (expected,) = torch.autograd.grad(linear.square().sum(), features, retain_graph=True)
    (found,) = torch.autograd.grad(layer(features).square().sum(), features)
    torch.testing.assert_close(layer(features), linear, rtol=0, atol=0)
    torch.testing.assert_close(found, expected)


def test_a_power_of_a_half_is_a_square_root_that_keeps_the_sign() -> None:
    layer = EmbeddingLayer(3)
    layer.power.fill_(0.5)
    assert layer.normalised(torch.tensor([[4.0, 0.0, -9.0]])).tolist() == [[2.0, 0.0, -3.0]]


def test_weights_from_before_the_power_are_of_a_linear_layer() -> None:
    network = build_network({"name": "compact", "width": 8, "views": 1})
    older = {name: value for name, value in network.state_dict().items() if "power" not in name}
    network.embedding.power.fill_(0.5)
    network.load_state_dict(older)
    assert network.embedding.power == 1


def test_the_second_view_is_the_mirrored_central_part() -> None:
    network, description = new_network("compact", 8, views=2)
    network.eval()
    photos = torch.randint(0, 256, (3, 64, 64, 3), dtype=torch.uint8)
    two = network(photos)
    network.views = 1
    torch.testing.assert_close(two, (network(photos) + network(photos[:, 8:56, 8:56].flip(2))) / 2)
    assert build_network(description).views == 2


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_pretrained_networks_train_and_export(architecture: str, tmp_path: Path) -> None:
    """Load a local checkpoint offline, train every layer, and export an equivalent graph."""
    name = checkpoint(tmp_path / architecture, ARCHITECTURES[architecture])
    network, description = new_network(name, 32)
    published = transformers.AutoModel.from_pretrained(name).state_dict()
    for key, value in network.backbone.state_dict().items():
        torch.testing.assert_close(value, published[key.removeprefix("model.")])
    torch.testing.assert_close(network.mean.flatten(), 255 * torch.tensor([0.5, 0.4, 0.3]))

    photos = torch.randint(0, 256, (3, 96, 96, 3), dtype=torch.uint8)
    network(photos).square().sum().backward()
    unused = [name for name, parameter in network.named_parameters() if parameter.grad is None]
    assert not [name for name in unused if "pool" not in name and "mask" not in name], (
        "every layer learns"
    )

    check_rebuilt_and_exported(network, description, photos, tmp_path)


def test_graph_needs_no_transformers(tmp_path: Path) -> None:
    network, _ = new_network(checkpoint(tmp_path / "convnextv2", ARCHITECTURES["convnextv2"]), 32)
    export(network, 64, tmp_path / "network.pt2")
    code = (
        "import sys; sys.modules['transformers'] = None; import numpy as np;"
        "from pathlib import Path;"
        "from npair.serving.engine import load_graph;"
        f"path = Path({str(tmp_path / 'network.pt2')!r});"
        "engine = load_graph('torch', path, 'fp32', threads=1, cores=1);"
        "print(engine(np.zeros((4, 64, 64, 3), np.uint8), all_cores=False).shape)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    )
    assert "(4, 128)" in result.stdout


def test_refuses_what_is_no_vision_model(tmp_path: Path) -> None:
    text = transformers.BertConfig(
        vocab_size=10,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=8,
    )
    with pytest.raises(NetworkError, match="not a vision model"):
        new_network(checkpoint(tmp_path / "bert", text), 32)


def test_refuses_a_folder_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(NetworkError, match="transformers has no vision model"):
        new_network(str(tmp_path), 32)


def test_says_how_to_get_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(NetworkError, match=r"npair\[pretrained\]"):
        new_network("microsoft/resnet-18", 32)
