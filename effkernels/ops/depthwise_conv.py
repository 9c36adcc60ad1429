"""Depthwise convolution with a fused affine, activation and, if asked, the spatial mean.

output[n, c] = activation(scale[c] · (weight[c] ∗ input[n, c]) + bias[c])
mean[n, c]   = mean over (y, x) of output[n, c, y, x]
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import native
from ..dispatch import Implementation, define
from ..layout import empty_nhwc, output_size
from ._common import (
    Padding,
    check_activation,
    check_filled,
    check_geometry,
    check_like,
    check_shape,
    check_tensor,
    check_vector,
    convolution_gradients,
    reference_convolution,
)

OP = "depthwise_conv"


def depthwise_conv(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: Padding = "symmetric",
    dilation: int | tuple[int, int] = 1,
    activation: str = "none",
    return_mean: bool = False,
    *,
    scale: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Depthwise convolution, one k×k filter per channel.

    Args:
        input: [N, C, H, W]; kernels work in channels_last, another layout is converted once.
        weight: [C, 1, k, k], k odd, in ``input``'s dtype.
        bias: [C] or None, in ``input``'s dtype or float32.
        stride: step, one number or (vertical, horizontal).
        padding: ``"symmetric"``, ``"same"`` (TensorFlow's), an int, a (vertical, horizontal)
            pair or (left, right, top, bottom).
        dilation: distance between taps, one number or (vertical, horizontal).
        activation: one of ``none, relu, relu6, silu, hard_swish, sigmoid, hard_sigmoid``.
        return_mean: also return the spatial mean of the result, from the same pass.
        scale: [C] or None: multiplies the convolution before ``bias`` is added (a folded
            BatchNorm that leaves ``weight`` as it is).

    Returns:
        [N, C, H', W'] channels_last; with ``return_mean`` also [N, C].

    Raises:
        TypeError, ValueError: naming the argument, what came and what is accepted.
        BackendUnavailable: if a backend was asked for that cannot run this call.
    """
    check_tensor(OP, "input", input, 4)
    check_filled(OP, "input", input, first=1)
    check_tensor(OP, "weight", weight, 4)
    check_filled(OP, "weight", weight)
    if weight.shape[0] != input.shape[1]:
        raise ValueError(f"{OP}: weight has {weight.shape[0]} channels, input has {input.shape[1]}")
    check_shape(OP, "weight", weight, (weight.shape[0], 1, *weight.shape[2:]))
    check_like(OP, "weight", weight, input)
    check_vector(OP, "scale", scale, weight.shape[0], input)
    check_vector(OP, "bias", bias, weight.shape[0], input)
    check_activation(OP, activation)
    strides, sides, dilations = check_geometry(
        OP, input, weight.shape[2:], stride, padding, dilation
    )
    output, mean = _op(
        input, weight, scale, bias, strides, sides, dilations, activation, return_mean
    )
    return (output, mean) if return_mean else output


def _reference(
    input: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    activation: str,
    return_mean: bool,
) -> tuple[Tensor, Tensor]:
    output = reference_convolution(
        input, weight, scale, bias, stride, padding, dilation, input.shape[1], activation
    )
    return output, output.mean((2, 3)) if return_mean else output.new_empty(0)


def _fake(
    input: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    activation: str,
    return_mean: bool,
) -> tuple[Tensor, Tensor]:
    channels = input.shape[1]
    size = output_size(input.shape[2:], weight.shape[2:], stride, padding, dilation)
    mean = input.new_empty((input.shape[0], channels) if return_mean else 0)
    return empty_nhwc(input, channels, *size), mean


def _backward(
    arguments: list[Any],
    needed: list[bool],
    saved: tuple[Tensor, ...],
    gradients: tuple[Any, ...],
) -> Any:
    input, weight, scale, _, stride, padding, dilation, activation, _ = arguments
    gradient, mean_gradient = gradients
    if activation != "none" or scale is not None or mean_gradient is not None or gradient is None:
        return NotImplemented
    for_input, for_weight, for_bias = convolution_gradients(
        gradient,
        input,
        weight,
        stride,
        padding,
        dilation,
        input.shape[1],
        (needed[0], needed[1], needed[3]),
    )
    return for_input, for_weight, None, for_bias, None, None, None, None, None


_op = define(
    OP,
    "(Tensor input, Tensor weight, Tensor? scale, Tensor? bias, int[] stride, SymInt[] padding, "
    "int[] dilation, str activation, bool return_mean) -> (Tensor, Tensor)",
    reference=_reference,
    fake=_fake,
    native=Implementation(
        native.can_run,
        native.depthwise_conv,
        native.depthwise_conv_backward,
        native.differentiates_depthwise_conv,
    ),
    backward=_backward,
)
