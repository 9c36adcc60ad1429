"""Dense small-kernel convolution with a fused affine, residual and activation.

output[n, k] = activation(scale[k] · (weight[k] ∗ input[n]) + bias[k] + residual[n, k])
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

OP = "conv"


def conv(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: Padding = "symmetric",
    dilation: int | tuple[int, int] = 1,
    residual: Tensor | None = None,
    activation: str = "none",
    *,
    scale: Tensor | None = None,
) -> Tensor:
    """Dense convolution (groups = 1): the stem, FusedMBConv, ResNet.

    Args:
        input: [N, C, H, W]; kernels work in channels_last, another layout is converted once.
        weight: [K, C, k, k], k odd, in ``input``'s dtype.
        bias: [K] or None, in ``input``'s dtype or float32.
        stride: step, one number or (vertical, horizontal).
        padding: ``"symmetric"``, ``"same"`` (TensorFlow's), an int, a (vertical, horizontal)
            pair or (left, right, top, bottom).
        dilation: distance between taps, one number or (vertical, horizontal).
        residual: [N, K, H', W'] or None: added before the activation.
        activation: one of ``none, relu, relu6, silu, hard_swish, sigmoid, hard_sigmoid``.
        scale: [K] or None: multiplies the convolution before ``bias`` is added.

    Returns:
        [N, K, H', W'] channels_last.

    Raises:
        TypeError, ValueError: naming the argument, what came and what is accepted.
        BackendUnavailable: if a backend was asked for that cannot run this call.
    """
    return _op(
        *conv_arguments(input, weight, bias, stride, padding, dilation, residual, activation, scale)
    )


def conv_arguments(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int | tuple[int, int],
    padding: Padding,
    dilation: int | tuple[int, int],
    residual: Tensor | None,
    activation: str,
    scale: Tensor | None,
) -> tuple[Any, ...]:
    """The dispatcher op's arguments, checked as :func:`conv` says."""
    check_tensor(OP, "input", input, 4)
    check_filled(OP, "input", input, first=1)
    check_tensor(OP, "weight", weight, 4)
    check_filled(OP, "weight", weight)
    if weight.shape[1] != input.shape[1]:
        raise ValueError(f"{OP}: weight has {weight.shape[1]} channels, input has {input.shape[1]}")
    check_like(OP, "weight", weight, input)
    check_vector(OP, "scale", scale, weight.shape[0], input)
    check_vector(OP, "bias", bias, weight.shape[0], input)
    check_activation(OP, activation)
    kernel = weight.shape[2:]
    strides, sides, dilations = check_geometry(OP, input, kernel, stride, padding, dilation)
    if residual is not None:
        check_tensor(OP, "residual", residual, 4)
        size = output_size(input.shape[2:], kernel, strides, sides, dilations)
        check_shape(OP, "residual", residual, (input.shape[0], weight.shape[0], *size))
        check_like(OP, "residual", residual, input)
    return input, weight, scale, bias, strides, sides, dilations, residual, activation


def _reference(
    input: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    residual: Tensor | None,
    activation: str,
) -> Tensor:
    return reference_convolution(
        input, weight, scale, bias, stride, padding, dilation, 1, activation, residual
    )


def _fake(
    input: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    residual: Tensor | None,
    activation: str,
) -> Tensor:
    size = output_size(input.shape[2:], weight.shape[2:], stride, padding, dilation)
    return empty_nhwc(input, weight.shape[0], *size)


def _backward(
    arguments: list[Any],
    needed: list[bool],
    saved: tuple[Tensor, ...],
    gradients: tuple[Any, ...],
) -> Any:
    input, weight, scale, _, stride, padding, dilation, _, activation = arguments
    (gradient,) = gradients
    if activation != "none" or scale is not None or gradient is None:
        return NotImplemented
    for_input, for_weight, for_bias = convolution_gradients(
        gradient, input, weight, stride, padding, dilation, 1, (needed[0], needed[1], needed[3])
    )
    for_residual = gradient if needed[7] else None
    return for_input, for_weight, None, for_bias, None, None, None, for_residual, None


_op = define(
    OP,
    "(Tensor input, Tensor weight, Tensor? scale, Tensor? bias, int[] stride, SymInt[] padding, "
    "int[] dilation, Tensor? residual, str activation) -> Tensor",
    reference=_reference,
    fake=_fake,
    native=Implementation(native.can_run, native.conv),
    backward=_backward,
)
