"""torchvision's trained weights, downloaded by torchvision and loaded into this library's networks.

A module of its own, because importing torchvision's models takes a second.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import WeightsEnum, get_model, get_model_weights, list_models

from .common import DataConfig


def check(name: str, weights: Any, num_classes: int | None) -> None:
    """Whether ``weights`` are of the network ``name``, with as many classes; nothing is downloaded.

    Raises:
        ValueError: if they are not.
    """
    theirs = get_model_weights(name) if name in list_models() else None
    if theirs is None or not isinstance(weights, theirs):
        accepted = "a file or a state dict" if theirs is None else f"a member of {theirs.__name__}"
        raise ValueError(f"create_model: weights is {weights}, {accepted} is accepted for {name}")
    classes = len(weights.meta["categories"])
    if num_classes not in (None, 0, classes):
        raise ValueError(
            f"create_model: num_classes is {num_classes!r}, {weights} has {classes} classes; "
            f"{classes} and 0 are accepted"
        )


def norm_options(name: str) -> dict[str, float | None]:
    """BatchNorm's eps and momentum in torchvision's network, which a checkpoint does not say."""
    with torch.device("meta"):
        theirs = get_model(name)
    norm = next(module for module in theirs.modules() if isinstance(module, nn.BatchNorm2d))
    return {"bn_eps": norm.eps, "bn_momentum": norm.momentum}


def state_dict(weights: WeightsEnum) -> dict[str, Tensor]:
    """The weights, from torch.hub's folder or the net."""
    loaded: dict[str, Tensor] = weights.get_state_dict(progress=True, check_hash=True)
    return loaded


def data_config(weights: WeightsEnum) -> DataConfig:
    """How torchvision prepares photographs for ``weights``."""
    preset = weights.transforms()
    return DataConfig(
        resolution=preset.crop_size[0],
        resize=preset.resize_size[0],
        mean=tuple(preset.mean),
        std=tuple(preset.std),
        interpolation=preset.interpolation.value,
    )
