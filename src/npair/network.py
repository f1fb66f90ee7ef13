"""The compact residual network (He et al., CVPR 2016) that turns pixels into an embedding."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from npair.run import RunError

EMBEDDING_DIM = 128

# Mean and standard deviation of ImageNet's RGB values, the convention that pretrained networks share.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions; the shortcut averages before its 1x1 convolution where the block halves the resolution, so that no
    activation is skipped (ResNet-D: He et al., Bag of Tricks, CVPR 2019)."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1:
            self.shortcut = nn.Sequential(
                nn.AvgPool2d(stride, ceil_mode=True), nn.Conv2d(channels_in, channels, 1, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        residual = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(self.shortcut(x) + residual)


class EmbeddingNetwork(nn.Module):
    """Photos in, embeddings out, scaling and standardisation included.

    2.8 M parameters; 0.26 G multiply-adds for a photo of 160 x 160 pixels.
    """

    def __init__(self, width: int = 32, blocks_per_stage: int = 2) -> None:
        super().__init__()
        self.mean = nn.Buffer(255 * torch.tensor(MEAN).view(3, 1, 1), persistent=False)
        self.std = nn.Buffer(255 * torch.tensor(STD).view(3, 1, 1), persistent=False)
        stem = 3 * width // 4
        layers: list[nn.Module] = [
            nn.Conv2d(3, stem, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(stem),
            nn.ReLU(),
            nn.Conv2d(stem, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.MaxPool2d(3, stride=2, padding=1),
        ]
        channels = width
        for stage in range(4):
            for block in range(blocks_per_stage):
                halves = stage > 0 and block == 0
                layers.append(ResidualBlock(channels, width << stage, stride=2 if halves else 1))
                channels = width << stage
        self.body = nn.Sequential(*layers)
        self.embedding = nn.Linear(channels, EMBEDDING_DIM)

    def forward(self, photos: Tensor) -> Tensor:
        """photos: [N, H, W, 3] RGB, 0 to 255, uint8 or float. Returns: fp32 [N, 128], not normalised."""
        embeddings: Tensor = self.embedding(self.features(photos))
        return embeddings

    def features(self, photos: Tensor) -> Tensor:
        """What the last layer sees: [N, channels]."""
        x = (photos.permute(0, 3, 1, 2).float() - self.mean) / self.std
        maps: Tensor = self.body(x)
        return maps.mean(dim=(2, 3))


@torch.inference_mode()
def embed(network: nn.Module, pixels: npt.NDArray[np.uint8], batch: int = 64) -> npt.NDArray[np.float32]:
    """Unit-length embeddings of decoded photos in fp32; uint8 [n, size, size, 3] -> float32 [n, 128]."""
    training = network.training
    network.eval()
    device = next(network.parameters()).device
    chunks = [network(torch.from_numpy(pixels[i : i + batch]).to(device)) for i in range(0, len(pixels), batch)]
    network.train(training)
    return F.normalize(torch.cat(chunks)).cpu().numpy()


def load_network(run: Path) -> EmbeddingNetwork:
    """The averaged (EMA) network of a run's checkpoint, ready for inference. Raises: RunError where there is none."""
    try:
        state = torch.load(run / "checkpoint.pt", weights_only=True, map_location="cpu")["ema"]
    except FileNotFoundError:
        raise RunError(f"{run} holds no checkpoint; train it first") from None
    network = EmbeddingNetwork()
    network.load_state_dict({name.removeprefix("module."): value for name, value in state.items() if name != "n_averaged"})
    return network.eval()
