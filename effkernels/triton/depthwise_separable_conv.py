"""A depthwise and a pointwise convolution: an inverted residual without an expansion and a gate.

    output = activation(pointwise(depthwise_activation(depthwise(input))) + residual)

Two launches; what lies between them is written once and read once. See `mbconv` and the two ops'
own files for what they move. No GPU has run this.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..layout import nhwc
from .mbconv import block, block_gradients


def _block_arguments(arguments: list[Any]) -> list[Any]:
    """The op's arguments as `mbconv.block` takes them."""
    input, *weights = arguments[:7]
    stride, padding, dilation, residual, depthwise_activation, activation = arguments[7:]
    return [
        input,
        *(None, None, None),
        *weights[:3],
        *(None, None, None, None),
        *weights[3:],
        stride,
        padding,
        dilation,
        None if residual is None else nhwc(residual),
        depthwise_activation,
        *("none", "none"),
        activation,
    ]


def depthwise_separable_conv(*arguments: Any) -> Tensor:
    """The op ``depthwise_separable_conv``."""
    return block(*_block_arguments(list(arguments)))


def depthwise_separable_conv_backward(
    arguments: list[Any],
    needed: list[bool],
    saved: tuple[Tensor, ...],
    gradients: tuple[Tensor | None, ...],
) -> tuple[Tensor | None, ...]:
    """The gradients of :func:`depthwise_separable_conv` for its arguments."""
    (upstream,) = gradients
    if upstream is None:
        return (None,) * len(arguments)
    nothing = (False, False, False)
    results = block_gradients(
        _block_arguments(arguments),
        [needed[0], *nothing, *needed[1:4], *nothing, False, *needed[4:7], needed[10]],
        upstream,
    )
    return (
        results[0],
        *results[4:7],
        *results[11:14],
        *(None, None, None),
        results[14],
        *(None, None),
    )
