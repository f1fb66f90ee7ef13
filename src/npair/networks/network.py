"""Networks that turn pixels into an embedding: a compact residual one, EfficientNet-Lite, and any vision model of transformers."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from npair.networks import efficientnet_lite
from npair.networks.efficientnet_lite import EfficientNetLite, load_weights
from npair.training.run import RunError, read_run

EMBEDDING_DIM = 128

# Mean and standard deviation of ImageNet's RGB values, the convention that pretrained networks share.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)

# What a run's config.json keeps to build the network again: {"name": "compact", "views": v, "width": w}; an EfficientNet-Lite's
# name and views with the SHA-256 of the weights that it started from; or a pretrained model's name and views with its
# transformers configuration, mean and std.
Description = dict[str, Any]


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


class CompactResidual(nn.Module):
    """A residual network (He et al., CVPR 2016) of four stages of two blocks, of width, 2, 4 and 8 times as many channels.

    Of width 32, with the embedding: 2.8 M parameters; 0.26 G multiply-adds for a view of 160 x 160 pixels.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
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
            for block in range(2):
                halves = stage > 0 and block == 0
                layers.append(ResidualBlock(channels, width << stage, stride=2 if halves else 1))
                channels = width << stage
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """Standardised photos [N, 3, H, W] -> [N, 8 * width], averaged over the last map."""
        maps: Tensor = self.layers(x)
        return maps.mean(dim=(2, 3))


class Pretrained(nn.Module):
    """A transformers model without its head."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        # Vision transformers take only the photo size they were trained on, unless told to scale their position embeddings.
        names = inspect.signature(model.forward).parameters
        self.options = {"interpolate_pos_encoding": True} if "interpolate_pos_encoding" in names else {}

    def forward(self, x: Tensor) -> Tensor:
        """Standardised photos [N, 3, H, W] -> [N, channels]: what the model pools or, where it does not, its tokens' mean."""
        output = self.model(x, **self.options)
        pooled: Tensor | None = output.get("pooler_output")
        if pooled is None:
            last: Tensor = output.last_hidden_state
            pooled = last.mean(dim=1) if last.ndim == 3 else last.mean(dim=(2, 3))
        return pooled.flatten(1)


class EmbeddingNetwork(nn.Module):
    """Photos in, embeddings out, scaling and standardisation included."""

    def __init__(
        self, backbone: nn.Module, views: int = 1, *, mean: tuple[float, ...] = MEAN, std: tuple[float, ...] = STD
    ) -> None:
        """backbone: standardised photos [N, 3, H, W] -> features [N, channels]. mean, std: of RGB values from 0 to 1.

        views: 1, the photo; or 2, the photo and its central part, of 3/4 of its side and mirrored, whose embeddings are averaged.
        """
        super().__init__()
        self.views = views
        self.mean = nn.Buffer(255 * torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.std = nn.Buffer(255 * torch.tensor(std).view(3, 1, 1), persistent=False)
        self.backbone = backbone
        with torch.inference_mode():
            channels = backbone.eval()(torch.zeros(1, 3, 64, 64)).shape[1]
        self.embedding = nn.Linear(channels, EMBEDDING_DIM)
        self.train()

    def forward(self, photos: Tensor) -> Tensor:
        """photos: [N, H, W, 3] RGB, 0 to 255, uint8 or float. Returns: fp32 [N, 128], not normalised."""
        features = self.features(photos)
        if self.views == 2:
            margin = photos.shape[1] // 8
            features = (features + self.features(photos[:, margin:-margin, margin:-margin].flip(2))) / 2
        embeddings: Tensor = self.embedding(features)
        return embeddings

    def features(self, photos: Tensor) -> Tensor:
        """What the last layer sees of one view: [N, channels]."""
        features: Tensor = self.backbone((photos.permute(0, 3, 1, 2).float() - self.mean) / self.std)
        return features


def new_network(name: str, width: int, views: int = 1, weights: str = "") -> tuple[EmbeddingNetwork, Description]:
    """A network to train: ``compact``, of this width, from scratch, or a pretrained one with its weights.

    name: ``compact``; one of efficientnet_lite.VARIANTS; or what transformers calls a model: a name on the Hugging Face hub or a
    local folder.
    weights: a file for an EfficientNet-Lite to start from in place of its package's.
    Raises: RunError if weights cannot be loaded or do not fit, or transformers is not installed or knows no such vision model.
    """
    if weights and name not in efficientnet_lite.VARIANTS:
        raise RunError(f"--weights is for {', '.join(efficientnet_lite.VARIANTS)}; {name} has its own or none")
    if name == "compact":
        description: Description = {"name": name, "views": views, "width": width}
        return build_network(description), description
    if name in efficientnet_lite.VARIANTS:
        backbone = EfficientNetLite(name)
        description = {"name": name, "views": views, "weights": load_weights(backbone, name, Path(weights) if weights else None)}
        return _lite(backbone, views), description
    transformers = _transformers()
    try:
        config = transformers.AutoConfig.from_pretrained(name)
        model = transformers.AutoModel.from_pretrained(name, config=config, dtype=torch.float32, **_without_pooler(config))
        processor, _ = transformers.ImageProcessingMixin.get_image_processor_dict(name)
    except (OSError, ValueError) as error:
        raise RunError(f"transformers has no vision model {name}: {str(error).splitlines()[0]}") from error
    if getattr(model, "main_input_name", None) != "pixel_values":
        raise RunError(
            f"{name} is not a vision model: its input is {getattr(model, 'main_input_name', 'unknown')}, not pixel_values"
        )
    description = {
        "name": name,
        "views": views,
        "architecture": json.loads(config.to_json_string(use_diff=False)),
        "mean": processor.get("image_mean", MEAN),
        "std": processor.get("image_std", STD),
    }
    return EmbeddingNetwork(Pretrained(model), views, mean=description["mean"], std=description["std"]), description


def build_network(description: Description) -> EmbeddingNetwork:
    """The network of a description, its weights random. Raises: RunError where it needs transformers and that is not installed."""
    if description["name"] == "compact":
        return EmbeddingNetwork(CompactResidual(description["width"]), description["views"])
    if description["name"] in efficientnet_lite.VARIANTS:
        return _lite(EfficientNetLite(description["name"]), description["views"])
    transformers = _transformers()
    config = transformers.AutoConfig.for_model(**description["architecture"])
    model = transformers.AutoModel.from_config(config, **_without_pooler(config))
    return EmbeddingNetwork(Pretrained(model), description["views"], mean=description["mean"], std=description["std"])


def multiply_adds(network: EmbeddingNetwork, size: int) -> int:
    """Multiply-adds of one photo of size x size pixels."""
    training = network.training
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        network.eval()(torch.zeros(1, size, size, 3, dtype=torch.uint8, device=network.mean.device))
    network.train(training)
    return int(counter.get_total_flops()) // 2  # which counts a multiply-add as two


@torch.inference_mode()
def embed(
    network: nn.Module, pixels: npt.NDArray[np.uint8], rows: npt.NDArray[np.int64] | None = None, batch: int = 64
) -> npt.NDArray[np.float32]:
    """Unit-length embeddings of decoded photos in fp32; uint8 [m, size, size, 3] -> float32 [n, 128].

    rows: int64 [n], which of the photos to embed; all of them where it is not given.
    """
    training = network.training
    network.eval()
    device = next(network.parameters()).device
    rows = np.arange(len(pixels)) if rows is None else rows
    chunks = [network(torch.from_numpy(pixels[rows[i : i + batch]]).to(device)) for i in range(0, len(rows), batch)]
    network.train(training)
    return F.normalize(torch.cat(chunks)).cpu().numpy()


def load_network(run: Path) -> EmbeddingNetwork:
    """The averaged (EMA) network of a run's checkpoint, of its best evaluation where early stopping was asked for, for inference.

    Raises: RunError where there is none.
    """
    network = build_network(read_run(run)["network"])
    try:
        checkpoint = torch.load(run / "checkpoint.pt", weights_only=True, map_location="cpu")
    except FileNotFoundError:
        raise RunError(f"{run} holds no checkpoint; train it first") from None
    state = (checkpoint["best"] or checkpoint)["ema"]
    network.load_state_dict({name.removeprefix("module."): value for name, value in state.items() if name != "n_averaged"})
    return network.eval()


def _lite(backbone: EfficientNetLite, views: int) -> EmbeddingNetwork:
    return EmbeddingNetwork(backbone, views, mean=efficientnet_lite.MEAN, std=efficientnet_lite.STD)


def _transformers() -> Any:
    try:
        import transformers  # noqa: PLC0415  # an optional extra, and slow to import
    except ImportError as error:
        raise RunError("this network needs transformers; install npair with its extra: pip install 'npair[pretrained]'") from error
    return transformers


def _without_pooler(config: Any) -> dict[str, bool]:
    """ViT's pooler is a layer of its own for BERT's task, random in most checkpoints; the mean of the tokens serves better."""
    model = _transformers().MODEL_MAPPING[type(config)]
    return {"add_pooling_layer": False} if "add_pooling_layer" in inspect.signature(model.__init__).parameters else {}
