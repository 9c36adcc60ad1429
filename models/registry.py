"""Networks by name."""

from __future__ import annotations

import difflib
import fnmatch
import os
from collections.abc import Mapping
from enum import Enum
from typing import TYPE_CHECKING, Any

from torch import nn

from . import efficientnet, efficientnet_v2, resnet
from .checkpoints import load_checkpoint

if TYPE_CHECKING:
    from torchvision.models import WeightsEnum

_EFFICIENTNETS = efficientnet.VARIANTS | efficientnet_v2.VARIANTS
_NAMES = (*_EFFICIENTNETS, *resnet.VARIANTS)
Network = (
    efficientnet.EfficientNet
    | efficientnet.EfficientNetFeatures
    | resnet.ResNet
    | resnet.ResNetFeatures
)
_HEAD_OPTIONS = ("num_classes", "drop_rate")  # mean nothing to a feature extractor


def list_models(filter: str = "*") -> list[str]:
    """Names that :func:`create_model` accepts, those that match ``filter`` (``*``, ``?``)."""
    return [name for name in _NAMES if fnmatch.fnmatchcase(name, filter)]


def create_model(
    name: str,
    *,
    weights: str | os.PathLike[str] | Mapping[str, Any] | WeightsEnum | None = None,
    features_only: bool = False,
    **options: Any,
) -> nn.Module:
    """The network called ``name``.

    Args:
        name: one of :func:`list_models`.
        weights: None for random ones; a file or a state dict, as :func:`load_checkpoint` takes
            it; or a member of torchvision's weights for this network, downloaded and kept where
            torchvision does. The latter also sets BatchNorm's eps and momentum (where ``options``
            do not) and ``data_config``, so that results are torchvision's.
        features_only: a network that returns feature maps instead of logits
            (:class:`EfficientNetFeatures`, :class:`ResNetFeatures`); ``num_classes`` and
            ``drop_rate`` then mean nothing.
        options: of :class:`EfficientNet` or :class:`ResNet`: ``num_classes``, ``in_channels``,
            ``drop_rate``, ``bn_eps``, ``bn_momentum``; ``drop_path_rate`` and ``padding``;
            ``stem``, ``se_ratio``, ``act_layer`` and ``zero_init_residual``.

    Raises:
        ValueError: for an unknown name (with the nearest ones), a bad option, or weights of
            another network.
        TypeError: for an option that the network does not have, or ``weights`` of another type.
        FileNotFoundError, RuntimeError: from :func:`load_checkpoint`.
    """
    if name not in _NAMES:
        nearest = difflib.get_close_matches(str(name), _NAMES, n=3, cutoff=0.5)
        hint = f"nearest are {', '.join(nearest)}" if nearest else f"accepted: {list_models()}"
        raise ValueError(f"create_model: no model is called {name!r}; {hint}")
    if features_only:
        options = {key: value for key, value in options.items() if key not in _HEAD_OPTIONS}
    if not isinstance(weights, Enum):
        model = _build(name, features_only, options)
        if weights is not None:
            load_checkpoint(model, weights)
        return model
    from . import torchvision_weights  # here, because it takes a second

    torchvision_weights.check(name, weights, options.get("num_classes"))
    model = _build(name, features_only, torchvision_weights.norm_options(name) | options)
    load_checkpoint(model, torchvision_weights.state_dict(weights))
    model.data_config = torchvision_weights.data_config(weights)
    return model


def _build(name: str, features_only: bool, options: dict[str, Any]) -> Network:
    if name in resnet.VARIANTS:
        network = resnet.ResNetFeatures if features_only else resnet.ResNet
        return network(resnet.VARIANTS[name], **options)
    family = efficientnet.EfficientNetFeatures if features_only else efficientnet.EfficientNet
    return family(_EFFICIENTNETS[name], **options)
