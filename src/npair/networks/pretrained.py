"""Vision models of Hugging Face transformers, without their heads. transformers is optional."""

from __future__ import annotations

import inspect
import json
from typing import Any

import torch
from torch import Tensor, nn

from npair.networks import NetworkError

# Mean and standard deviation of ImageNet's RGB values, the convention of pretrained networks.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


class Pretrained(nn.Module):
    """A transformers model as a backbone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        # Unless told to interpolate, vision transformers accept only the size they were trained on.
        names = inspect.signature(model.forward).parameters
        interpolates = "interpolate_pos_encoding" in names
        self.options = {"interpolate_pos_encoding": True} if interpolates else {}

    def forward(self, x: Tensor) -> Tensor:
        """Standardised photos [N, 3, H, W] -> the pooled output, or the tokens' mean [N, C]."""
        output = self.model(x, **self.options)
        pooled: Tensor | None = output.get("pooler_output")
        if pooled is None:
            last: Tensor = output.last_hidden_state
            pooled = last.mean(dim=1) if last.ndim == 3 else last.mean(dim=(2, 3))
        return pooled.flatten(1)


def download(name: str) -> tuple[Pretrained, dict[str, Any]]:
    """Load a model with its weights, from the Hugging Face hub or a local folder.

    Returns: the backbone, and the part of a network's description that ``rebuild`` and
    standardisation need: ``architecture`` (its transformers configuration), ``mean`` and ``std``.
    Raises: NetworkError if transformers is not installed or has no such vision model.
    """
    transformers = _transformers()
    try:
        config = transformers.AutoConfig.from_pretrained(name)
        model = transformers.AutoModel.from_pretrained(
            name, config=config, dtype=torch.float32, **_without_pooler(config)
        )
        processor, _ = transformers.ImageProcessingMixin.get_image_processor_dict(name)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise NetworkError(f"transformers has no vision model {name}: {reason}") from error
    main_input = getattr(model, "main_input_name", "unknown")
    if main_input != "pixel_values":
        raise NetworkError(
            f"{name} is not a vision model: its input is {main_input}, not pixel_values"
        )
    return Pretrained(model), {
        "architecture": json.loads(config.to_json_string(use_diff=False)),
        "mean": processor.get("image_mean", MEAN),
        "std": processor.get("image_std", STD),
    }


def rebuild(architecture: dict[str, Any]) -> Pretrained:
    """Build a model from its transformers configuration, with random weights.

    Raises: NetworkError if transformers is not installed.
    """
    transformers = _transformers()
    config = transformers.AutoConfig.for_model(**architecture)
    return Pretrained(transformers.AutoModel.from_config(config, **_without_pooler(config)))


def _transformers() -> Any:
    try:
        import transformers  # noqa: PLC0415  # an optional extra, and slow to import
    except ImportError as error:
        raise NetworkError(
            "this network needs transformers; install it: pip install 'npair[pretrained]'"
        ) from error
    return transformers


def _without_pooler(config: Any) -> dict[str, bool]:
    """Options that omit ViT's pooler, a layer made for BERT's task and random in most checkpoints.

    The mean of the tokens serves better.
    """
    parameters = inspect.signature(_transformers().MODEL_MAPPING[type(config)].__init__).parameters
    return {"add_pooling_layer": False} if "add_pooling_layer" in parameters else {}
