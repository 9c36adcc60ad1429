"""1×1 convolution with a gate on its input and everything that follows it in its epilogue.

output[n, k] = activation(scale[k] · Σ_c weight[k, c] · gate[n, c] · input[n, c] + bias[k]
                          + residual[n, k])
mean[n, k]   = mean over (y, x) of output[n, k, y, x]
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import native
from ..dispatch import Implementation, define
from ..layout import empty_nhwc
from ._common import (
    check_activation,
    check_filled,
    check_like,
    check_shape,
    check_tensor,
    check_vector,
    convolution_gradients,
    reference_convolution,
)

OP = "pointwise_conv"


def pointwise_conv(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
    return_mean: bool = False,
    *,
    scale: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """1×1 convolution: a matrix product over the channels of every pixel.

    Args:
        input: [N, C, H, W]; kernels work in channels_last, another layout is converted once.
        weight: [K, C, 1, 1] or [K, C], in ``input``'s dtype.
        bias: [K] or None, in ``input``'s dtype or float32.
        gate: [N, C] or [N, C, 1, 1] or None: multiplies the input (squeeze-and-excitation).
        residual: [N, K, H, W] or None: added before the activation.
        activation: one of ``none, relu, relu6, silu, hard_swish, sigmoid, hard_sigmoid``.
        return_mean: also return the spatial mean of the result, from the same pass.
        scale: [K] or None: multiplies the convolution before ``bias`` is added.

    Returns:
        [N, K, H, W] channels_last; with ``return_mean`` also [N, K].

    Raises:
        TypeError, ValueError: naming the argument, what came and what is accepted.
        BackendUnavailable: if a backend was asked for that cannot run this call.
    """
    output, mean = _op(
        *pointwise_conv_arguments(
            input, weight, bias, gate, residual, activation, return_mean, scale
        )
    )
    return (output, mean) if return_mean else output


def pointwise_conv_arguments(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gate: Tensor | None,
    residual: Tensor | None,
    activation: str,
    return_mean: bool,
    scale: Tensor | None,
) -> tuple[Any, ...]:
    """The dispatcher op's arguments, checked as :func:`pointwise_conv` says."""
    check_tensor(OP, "input", input, 4)
    check_filled(OP, "input", input, first=1)
    check_tensor(OP, "weight", weight, (2, 4))
    check_filled(OP, "weight", weight)
    if weight.shape[1] != input.shape[1]:
        raise ValueError(f"{OP}: weight has {weight.shape[1]} channels, input has {input.shape[1]}")
    channels = weight.shape[0]
    if weight.dim() == 2:
        weight = weight[:, :, None, None]
    check_shape(OP, "weight", weight, (channels, input.shape[1], 1, 1))
    check_like(OP, "weight", weight, input)
    check_vector(OP, "scale", scale, channels, input)
    check_vector(OP, "bias", bias, channels, input)
    if gate is not None:
        check_tensor(OP, "gate", gate, (2, 4))
        if gate.dim() == 4:
            check_shape(OP, "gate", gate, (*input.shape[:2], 1, 1))
            gate = gate.flatten(1)
        check_shape(OP, "gate", gate, tuple(input.shape[:2]))
        check_like(OP, "gate", gate, input)
    if residual is not None:
        check_tensor(OP, "residual", residual, 4)
        check_shape(OP, "residual", residual, (input.shape[0], channels, *input.shape[2:]))
        check_like(OP, "residual", residual, input)
    check_activation(OP, activation)
    return input, weight, scale, bias, gate, residual, activation, return_mean


def _reference(
    input: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    gate: Tensor | None,
    residual: Tensor | None,
    activation: str,
    return_mean: bool,
) -> tuple[Tensor, Tensor]:
    if gate is not None:
        input = input * gate[:, :, None, None]
    one, none = (1, 1), (0, 0, 0, 0)
    output = reference_convolution(
        input, weight, scale, bias, one, none, one, 1, activation, residual
    )
    return output, output.mean((2, 3)) if return_mean else output.new_empty(0)


def _fake(
    input: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    gate: Tensor | None,
    residual: Tensor | None,
    activation: str,
    return_mean: bool,
) -> tuple[Tensor, Tensor]:
    channels = weight.shape[0]
    mean = input.new_empty((input.shape[0], channels) if return_mean else 0)
    return empty_nhwc(input, channels, *input.shape[2:]), mean


def _backward(
    arguments: list[Any],
    needed: list[bool],
    saved: tuple[Tensor, ...],
    gradients: tuple[Any, ...],
) -> Any:
    input, weight, scale, _, gate, _, activation, _ = arguments
    gradient, mean_gradient = gradients
    if (
        activation != "none"
        or scale is not None
        or gate is not None
        or mean_gradient is not None
        or gradient is None
    ):
        return NotImplemented
    # On a CPU nothing tried is faster than PyTorch's. EfficientNet-B0's layers at batch 16, one
    # core of a Xeon: input gradients 36 ms (the native kernel on the transposed weight 41, torch.mm
    # 34), weight gradients 41 (torch.mm 38); whole backward passes 89 ms, 94 by torch.mm and, for
    # the same bits with any number of threads, torch.bmm over blocks of pixels.
    for_input, for_weight, for_bias = convolution_gradients(
        gradient,
        input,
        weight,
        (1, 1),
        (0, 0, 0, 0),
        (1, 1),
        1,
        (needed[0], needed[1], needed[3]),
    )
    for_residual = gradient if needed[5] else None
    return for_input, for_weight, None, for_bias, None, for_residual, None, None


_op = define(
    OP,
    "(Tensor input, Tensor weight, Tensor? scale, Tensor? bias, Tensor? gate, Tensor? residual, "
    "str activation, bool return_mean) -> (Tensor, Tensor)",
    reference=_reference,
    fake=_fake,
    native=Implementation(native.can_run, native.pointwise_conv),
    backward=_backward,
)
