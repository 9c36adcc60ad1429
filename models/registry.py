"""Networks by name."""

from __future__ import annotations

import difflib
import fnmatch
from typing import Any

from torch import nn

from .efficientnet import VARIANTS, EfficientNet, EfficientNetFeatures


def list_models(filter: str = "*") -> list[str]:
    """Names that :func:`create_model` accepts, those that match ``filter`` (``*``, ``?``)."""
    return [name for name in VARIANTS if fnmatch.fnmatchcase(name, filter)]


def create_model(name: str, *, features_only: bool = False, **options: Any) -> nn.Module:
    """The network called ``name``, randomly initialised.

    Args:
        name: one of :func:`list_models`.
        features_only: a network that returns feature maps of strides 2 to 32 instead of logits
            (:class:`EfficientNetFeatures`); ``num_classes`` and ``drop_rate`` then mean nothing.
        options: of :class:`EfficientNet`: ``num_classes``, ``in_channels``, ``drop_rate``,
            ``drop_path_rate``, ``padding``, ``bn_eps``, ``bn_momentum``.

    Raises:
        ValueError: for an unknown name (with the nearest ones) or a bad option.
    """
    variant = VARIANTS.get(name) if isinstance(name, str) else None
    if variant is None:
        nearest = difflib.get_close_matches(str(name), VARIANTS, n=3, cutoff=0.5)
        hint = f"nearest are {', '.join(nearest)}" if nearest else f"accepted: {list_models()}"
        raise ValueError(f"create_model: no model is called {name!r}; {hint}")
    if features_only:
        for head_only in ("num_classes", "drop_rate"):
            options.pop(head_only, None)
        return EfficientNetFeatures(variant, **options)
    return EfficientNet(variant, **options)
