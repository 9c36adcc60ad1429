"""Squeeze-and-excitation as a module."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .. import ops
from . import arguments
from .fused import (
    activation_name,
    autocast_dtype,
    cast_weight,
    convolution_kind,
)
from .hooks import has_global_hooks, is_untouched

__all__ = ["SqueezeExcite"]


class SqueezeExcite(nn.Module):
    """A gate per image and channel from the spatial mean (Hu et al., 2018).

    input · gate(conv_expand(activation(conv_reduce(mean(input))))), with timm's child names.

    Args:
        channels: C.
        reduced_channels: channels between the two 1×1 convolutions.
        act_layer: builds the activation between them.
        gate_layer: builds the gate's activation.

    Raises:
        ValueError: naming the argument, what came and what is accepted.
    """

    def __init__(
        self,
        channels: int,
        reduced_channels: int,
        act_layer: Callable[[], nn.Module] = nn.SiLU,
        gate_layer: Callable[[], nn.Module] = nn.Sigmoid,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        arguments.positive(name, "channels", channels)
        arguments.positive(name, "reduced_channels", reduced_channels)
        self.conv_reduce = nn.Conv2d(channels, reduced_channels, 1)
        self.act1 = act_layer()
        self.conv_expand = nn.Conv2d(reduced_channels, channels, 1)
        self.gate = gate_layer()

    def forward(self, input: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C, H, W]."""
        dtype = autocast_dtype(input)
        fused = None if has_global_hooks() else fuse_squeeze_excite(_parts(self), dtype)
        if fused is None:
            mean = input.mean((2, 3), keepdim=True)
            return input * self.gate(self.conv_expand(self.act1(self.conv_reduce(mean))))
        assert fused.reduce_weight is not None and fused.expand_weight is not None
        return ops.squeeze_excite(
            input if dtype is None else input.to(dtype),
            fused.reduce_weight,
            fused.reduce_bias,
            fused.expand_weight,
            fused.expand_bias,
            fused.activation,
            fused.gate_activation,
        )


class SqueezeExciteParts(NamedTuple):
    """Squeeze-and-excitation as modules, whatever they are called."""

    reduce: nn.Conv2d
    activation: nn.Module
    expand: nn.Conv2d
    gate: nn.Module


class FusedSqueezeExcite(NamedTuple):
    """What the ops need of a module."""

    reduce_weight: Tensor | None
    reduce_bias: Tensor | None
    expand_weight: Tensor | None
    expand_bias: Tensor | None
    activation: str
    gate_activation: str


NO_SQUEEZE_EXCITE = FusedSqueezeExcite(None, None, None, None, "none", "sigmoid")


def squeeze_excite_parts(module: nn.Module) -> SqueezeExciteParts | None:
    """``module``'s children; None: it must be called."""
    if type(module) is not SqueezeExcite or not is_untouched(module):
        return None
    return _parts(module)


def _parts(module: SqueezeExcite) -> SqueezeExciteParts:
    return SqueezeExciteParts(module.conv_reduce, module.act1, module.conv_expand, module.gate)


def fuse_squeeze_excite(
    parts: SqueezeExciteParts, dtype: torch.dtype | None
) -> FusedSqueezeExcite | None:
    """``parts`` for the ops, weights in ``dtype``; None: they must be called."""
    activation, gate = activation_name(parts.activation), activation_name(parts.gate)
    if activation is None or gate is None:
        return None
    if any(convolution_kind(conv) != "pointwise" for conv in (parts.reduce, parts.expand)):
        return None
    return FusedSqueezeExcite(
        cast_weight(parts.reduce.weight, dtype),
        parts.reduce.bias,
        cast_weight(parts.expand.weight, dtype),
        parts.expand.bias,
        activation,
        gate,
    )
