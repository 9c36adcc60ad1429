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
    has_global_hooks,
    is_untouched,
)

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
        fused = fused_squeeze_excite(self, autocast_dtype(input))
        if fused is None or has_global_hooks():
            mean = input.mean((2, 3), keepdim=True)
            return input * self.gate(self.conv_expand(self.act1(self.conv_reduce(mean))))
        dtype = autocast_dtype(input)
        return ops.squeeze_excite(input if dtype is None else input.to(dtype), *fused)


class FusedSqueezeExcite(NamedTuple):
    """Arguments of ``ops.squeeze_excite`` after the input."""

    reduce_weight: Tensor
    reduce_bias: Tensor | None
    expand_weight: Tensor
    expand_bias: Tensor | None
    activation: str
    gate_activation: str


def fused_squeeze_excite(
    module: SqueezeExcite, dtype: torch.dtype | None
) -> FusedSqueezeExcite | None:
    """What the ops need of ``module``, weights in ``dtype``; None: its children must be called."""
    reduce, expand = module.conv_reduce, module.conv_expand
    activation, gate = activation_name(module.act1), activation_name(module.gate)
    if activation is None or gate is None:
        return None
    if convolution_kind(reduce) != "pointwise" or convolution_kind(expand) != "pointwise":
        return None
    return FusedSqueezeExcite(
        cast_weight(reduce.weight, dtype),
        reduce.bias,
        cast_weight(expand.weight, dtype),
        expand.bias,
        activation,
        gate,
    )


def squeeze_excite_is_untouched(module: nn.Module) -> bool:
    """``module`` is this library's own and nothing was attached to it."""
    return type(module) is SqueezeExcite and is_untouched(module)
