"""Small local checkpoints of vision models from transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers

from npair.networks.network import Description, EmbeddingNetwork, build_network, embed
from npair.publishing.graphs import export

VISION: Any = {
    "image_size": 64,
    "patch_size": 8,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
# Give ResNet at least 16 channels: the backward pass of a narrower 1x1 convolution makes oneDNN's
# cache crash when Python exits.
ARCHITECTURES = {
    "resnet": transformers.ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic"
    ),
    "convnextv2": transformers.ConvNextV2Config(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2),
    "mobilenet_v2": transformers.MobileNetV2Config(depth_multiplier=0.35),
    "dinov2": transformers.Dinov2Config(**VISION),
    "vit": transformers.ViTConfig(**VISION, intermediate_size=32),
    "swin": transformers.SwinConfig(
        image_size=64, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=4
    ),
}


def checkpoint(folder: Path, config: transformers.PretrainedConfig) -> str:
    """Write random weights in the Hugging Face hub's layout; return the folder."""
    torch.manual_seed(0)
    model: Any = transformers.AutoModel.from_config(config)  # type: ignore[no-untyped-call]
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]})
    )
    return str(folder)


def check_rebuilt_and_exported(
    network: EmbeddingNetwork, description: Description, photos: torch.Tensor, folder: Path
) -> None:
    """Check that a network rebuilt from its description and an exported graph embed alike.

    photos: uint8 [N, H, H, 3].
    """
    again = build_network(json.loads(json.dumps(description)))
    again.load_state_dict(network.state_dict())
    expected = embed(network, photos.numpy())
    torch.testing.assert_close(embed(again, photos.numpy()), expected)
    export(network, photos.shape[1], folder / "network.pt2")
    graph = torch.export.load(folder / "network.pt2").module()
    torch.testing.assert_close(
        torch.nn.functional.normalize(graph(photos)).detach(),
        torch.from_numpy(expected),
        rtol=1e-4,
        atol=1e-5,
    )
