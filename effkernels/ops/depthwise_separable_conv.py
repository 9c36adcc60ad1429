"""Depthwise then pointwise convolution as one op; the tensor between them is never returned.

hidden[n]    = depthwise_activation(depthwise_scale · (depthwise_weight ∗ input[n])
                                    + depthwise_bias)
output[n, k] = activation(pointwise_scale[k] · Σ_c pointwise_weight[k, c] · hidden[n, c]
                          + pointwise_bias[k] + residual[n, k])
"""

from __future__ import annotations

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
    reference_convolution,
)

OP = "depthwise_separable_conv"


def depthwise_separable_conv(
    input: Tensor,
    depthwise_weight: Tensor,
    depthwise_bias: Tensor | None,
    pointwise_weight: Tensor,
    pointwise_bias: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: Padding = "symmetric",
    dilation: int | tuple[int, int] = 1,
    residual: Tensor | None = None,
    depthwise_activation: str = "none",
    activation: str = "none",
    *,
    depthwise_scale: Tensor | None = None,
    pointwise_scale: Tensor | None = None,
) -> Tensor:
    """Depthwise separable convolution (Howard et al., 2017).

    Args:
        input: [N, C, H, W]; kernels work in channels_last, another layout is converted once.
        depthwise_weight: [C, 1, k, k], k odd, in ``input``'s dtype.
        depthwise_bias, depthwise_scale: [C] or None, in ``input``'s dtype or float32.
        pointwise_weight: [K, C, 1, 1] or [K, C], in ``input``'s dtype.
        pointwise_bias, pointwise_scale: [K] or None, in ``input``'s dtype or float32.
        stride, padding, dilation: of the depthwise convolution, as in ``depthwise_conv``.
        residual: [N, K, H', W'] or None: added before the last activation.
        depthwise_activation: between the two convolutions.
        activation: after the pointwise convolution.

    Returns:
        [N, K, H', W'] channels_last.

    Raises:
        TypeError, ValueError: naming the argument, what came and what is accepted.
        BackendUnavailable: if a backend was asked for that cannot run this call.
    """
    check_tensor(OP, "input", input, 4)
    check_filled(OP, "input", input, first=1)
    channels = input.shape[1]
    check_tensor(OP, "depthwise_weight", depthwise_weight, 4)
    check_filled(OP, "depthwise_weight", depthwise_weight)
    if depthwise_weight.shape[0] != channels:
        raise ValueError(
            f"{OP}: depthwise_weight has {depthwise_weight.shape[0]} channels, input has {channels}"
        )
    kernel = depthwise_weight.shape[2:]
    check_shape(OP, "depthwise_weight", depthwise_weight, (channels, 1, *kernel))
    check_like(OP, "depthwise_weight", depthwise_weight, input)
    check_tensor(OP, "pointwise_weight", pointwise_weight, (2, 4))
    check_filled(OP, "pointwise_weight", pointwise_weight)
    if pointwise_weight.dim() == 2:
        pointwise_weight = pointwise_weight[:, :, None, None]
    outputs = pointwise_weight.shape[0]
    check_shape(OP, "pointwise_weight", pointwise_weight, (outputs, channels, 1, 1))
    check_like(OP, "pointwise_weight", pointwise_weight, input)
    check_vector(OP, "depthwise_scale", depthwise_scale, channels, input)
    check_vector(OP, "depthwise_bias", depthwise_bias, channels, input)
    check_vector(OP, "pointwise_scale", pointwise_scale, outputs, input)
    check_vector(OP, "pointwise_bias", pointwise_bias, outputs, input)
    check_activation(OP, depthwise_activation, "depthwise_activation")
    check_activation(OP, activation)
    strides, sides, dilations = check_geometry(OP, input, kernel, stride, padding, dilation)
    if residual is not None:
        check_tensor(OP, "residual", residual, 4)
        size = output_size(input.shape[2:], kernel, strides, sides, dilations)
        check_shape(OP, "residual", residual, (input.shape[0], outputs, *size))
        check_like(OP, "residual", residual, input)
    return _op(
        input,
        depthwise_weight,
        depthwise_scale,
        depthwise_bias,
        pointwise_weight,
        pointwise_scale,
        pointwise_bias,
        strides,
        sides,
        dilations,
        residual,
        depthwise_activation,
        activation,
    )


def _reference(
    input: Tensor,
    depthwise_weight: Tensor,
    depthwise_scale: Tensor | None,
    depthwise_bias: Tensor | None,
    pointwise_weight: Tensor,
    pointwise_scale: Tensor | None,
    pointwise_bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    residual: Tensor | None,
    depthwise_activation: str,
    activation: str,
) -> Tensor:
    hidden = reference_convolution(
        input,
        depthwise_weight,
        depthwise_scale,
        depthwise_bias,
        stride,
        padding,
        dilation,
        input.shape[1],
        depthwise_activation,
    )
    one, none = (1, 1), (0, 0, 0, 0)
    return reference_convolution(
        hidden,
        pointwise_weight,
        pointwise_scale,
        pointwise_bias,
        one,
        none,
        one,
        1,
        activation,
        residual,
    )


def _fake(
    input: Tensor,
    depthwise_weight: Tensor,
    depthwise_scale: Tensor | None,
    depthwise_bias: Tensor | None,
    pointwise_weight: Tensor,
    pointwise_scale: Tensor | None,
    pointwise_bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    residual: Tensor | None,
    depthwise_activation: str,
    activation: str,
) -> Tensor:
    size = output_size(input.shape[2:], depthwise_weight.shape[2:], stride, padding, dilation)
    return empty_nhwc(input, pointwise_weight.shape[0], *size)


_op = define(
    OP,
    "(Tensor input, Tensor depthwise_weight, Tensor? depthwise_scale, Tensor? depthwise_bias, "
    "Tensor pointwise_weight, Tensor? pointwise_scale, Tensor? pointwise_bias, int[] stride, "
    "SymInt[] padding, int[] dilation, Tensor? residual, str depthwise_activation, "
    "str activation) -> Tensor",
    reference=_reference,
    fake=_fake,
    native=Implementation(native.can_run, native.depthwise_separable_conv),
)
