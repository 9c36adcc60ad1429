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
from .scaling import LEAST_RESOLUTION, CompoundScaling, scale_resolution

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
Variant = efficientnet.Variant | resnet.Variant
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
    variant = _variant("create_model", name)
    if features_only:
        options = {key: value for key, value in options.items() if key not in _HEAD_OPTIONS}
    if not isinstance(weights, Enum):
        model = _build(variant, features_only, options)
        if weights is not None:
            load_checkpoint(model, weights)
        return model
    from . import torchvision_weights  # here, because it takes a second

    torchvision_weights.check(name, weights, options.get("num_classes"))
    options = torchvision_weights.norm_options(name) | options
    model = _build(variant, features_only, options)
    load_checkpoint(model, torchvision_weights.state_dict(weights))
    model.data_config = torchvision_weights.data_config(weights)
    return model


def create_scaled(
    base: str,
    phi: float,
    scaling: CompoundScaling | None = None,
    *,
    features_only: bool = False,
    **options: Any,
) -> nn.Module:
    """The network called ``base``, scaled to φ; its ``data_config`` has the images' new size.

    Args:
        base: one of :func:`list_models`.
        phi: 0 for ``base`` itself; the paper counts upwards in steps of 1.
        scaling: the coefficients; None for the paper's.
        features_only, options: as for :func:`create_model`; there are no weights for such networks.

    Raises:
        ValueError: for an unknown base, a bad option, a ``phi`` beyond ±20 or one that makes the
            images smaller than 32 pixels.
        TypeError: for an option that the network does not have.
    """
    if features_only:
        options = {key: value for key, value in options.items() if key not in _HEAD_OPTIONS}
    return _build(scaled_variant(base, phi, scaling, **options), features_only, options)


def scaled_variant(
    base: str, phi: float, scaling: CompoundScaling | None = None, **options: Any
) -> Variant:
    """The stage table of :func:`create_scaled`'s network; with its errors."""
    variant = _variant("create_scaled", base)
    if isinstance(variant, resnet.Variant):
        stem = options.get("stem", resnet.IMAGENET_STEM)
        resolution = variant.resolution or resnet.data_of(stem).resolution
    else:
        resolution = variant.data_config.resolution
    depth, width, factor = (scaling or CompoundScaling()).at(phi)
    scaled = scale_resolution(resolution, factor)
    if scaled < LEAST_RESOLUTION:
        raise ValueError(
            f"create_scaled: phi is {phi!r}, which makes {base}'s images {scaled} pixels wide; "
            f"{LEAST_RESOLUTION} or more are accepted"
        )
    return variant.scaled(depth, width, scaled)


def _variant(function: str, name: str) -> Variant:
    if name in resnet.VARIANTS:
        return resnet.VARIANTS[name]
    if name in _EFFICIENTNETS:
        return _EFFICIENTNETS[name]
    nearest = difflib.get_close_matches(str(name), _NAMES, n=3, cutoff=0.5)
    hint = f"nearest are {', '.join(nearest)}" if nearest else f"accepted: {list_models()}"
    raise ValueError(f"{function}: no model is called {name!r}; {hint}")


def _build(variant: Variant, features_only: bool, options: dict[str, Any]) -> Network:
    if isinstance(variant, resnet.Variant):
        network = resnet.ResNetFeatures if features_only else resnet.ResNet
        return network(variant, **options)
    family = efficientnet.EfficientNetFeatures if features_only else efficientnet.EfficientNet
    return family(variant, **options)
