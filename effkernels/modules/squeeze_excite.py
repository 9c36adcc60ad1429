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
        fused = None if has_global_hooks() else fused_children(self, dtype)
        if fused is None:
            mean = input.mean((2, 3), keepdim=True)
            return input * self.gate(self.conv_expand(self.act1(self.conv_reduce(mean))))
        return squeeze_excite(input if dtype is None else input.to(dtype), fused)


class FusedSqueezeExcite(NamedTuple):
    """What the ops need of a module."""

    reduce_weight: Tensor | None
    reduce_bias: Tensor | None
    expand_weight: Tensor | None
    expand_bias: Tensor | None
    activation: str
    gate_activation: str


class SqueezeExciteParts(NamedTuple):
    """Its modules one by one, of a block that has it without a module for the whole."""

    reduce: nn.Module | None
    activation: nn.Module | None
    expand: nn.Module | None
    gate: nn.Module | None


NO_SQUEEZE_EXCITE = FusedSqueezeExcite(None, None, None, None, "none", "sigmoid")


# The children of a class that are the convolution that reduces, the activation, the convolution
# that expands and the gate's activation; and the one that takes the mean, if any does.
_CHILDREN: dict[type[nn.Module], tuple[str, str, str, str, str | None]] = {}


def register_squeeze_excite(
    module_class: type[nn.Module],
    reduce: str,
    activation: str,
    expand: str,
    gate: str,
    mean: str | None = None,
) -> None:
    """Let modules of exactly this class, with children of these names, run as the op."""
    _CHILDREN[module_class] = (reduce, activation, expand, gate, mean)


register_squeeze_excite(SqueezeExcite, "conv_reduce", "act1", "conv_expand", "gate")


def squeeze_excite(input: Tensor, fused: FusedSqueezeExcite) -> Tensor:
    """A module with squeeze-and-excitation on [N, C, H, W], in its weights' dtype."""
    assert fused.reduce_weight is not None and fused.expand_weight is not None
    return ops.squeeze_excite(
        input,
        fused.reduce_weight,
        fused.reduce_bias,
        fused.expand_weight,
        fused.expand_bias,
        fused.activation,
        fused.gate_activation,
    )


def fused_squeeze_excite(
    module: nn.Module | SqueezeExciteParts, dtype: torch.dtype | None
) -> FusedSqueezeExcite | None:
    """``module`` for the ops, weights in ``dtype``; None: it or its children must be called."""
    if isinstance(module, SqueezeExciteParts):
        return _fused(module, dtype)
    return fused_children(module, dtype) if is_untouched(module) else None


def fused_children(module: nn.Module, dtype: torch.dtype | None) -> FusedSqueezeExcite | None:
    """The same where ``module`` itself is being called."""
    names = _CHILDREN.get(type(module))
    if names is None or not _takes_the_mean(module, names[4]):
        return None
    return _fused(SqueezeExciteParts(*map(module._modules.get, names[:4])), dtype)


def _fused(parts: SqueezeExciteParts, dtype: torch.dtype | None) -> FusedSqueezeExcite | None:
    reduce, act, expand, last = parts
    if not isinstance(reduce, nn.Conv2d) or not isinstance(expand, nn.Conv2d):
        return None
    if convolution_kind(reduce) != "pointwise" or convolution_kind(expand) != "pointwise":
        return None
    activation = None if act is None else activation_name(act)
    gate = None if last is None else activation_name(last)
    if activation is None or gate is None:
        return None
    return FusedSqueezeExcite(
        cast_weight(reduce.weight, dtype),
        reduce.bias,
        cast_weight(expand.weight, dtype),
        expand.bias,
        activation,
        gate,
    )


def _takes_the_mean(module: nn.Module, name: str | None) -> bool:
    """The child ``name`` of ``module`` gives the spatial mean; the forward pass, without one."""
    if name is None:
        return True
    pool = module._modules.get(name)
    return (
        type(pool) is nn.AdaptiveAvgPool2d
        and pool.output_size in (1, (1, 1))
        and is_untouched(pool)
    )
