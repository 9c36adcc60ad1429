"""Depthwise convolution by csrc/depthwise_conv/cuda.cu, which has the formulas."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..gpu import Convolved, float32_like, pack_taps
from ..layout import empty_nhwc, nhwc, output_size
from ..native import activation_codes
from ..operands import Forward, Gradient
from . import can_run, device_limits
from .depthwise_conv_config import (
    DepthwiseTile,
    choose,
    columns,
    is_tuned,
)

__all__ = ["can_run", "depthwise_conv", "depthwise_conv_backward"]

_PLAIN = Forward()
_MOST_MOMENTS, _MOMENTS_GROUP = 512, 64  # csrc/depthwise_conv/cuda_sums.h


def convolve(
    input: Tensor,
    taps: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    operand: Forward = _PLAIN,
    *,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    activation: str = "none",
    mean: bool = False,
    partial_means: bool = False,
    moments: bool = False,
) -> Convolved:
    """activation(scale · (taps ∗ operand(input)) + bias), each channel by itself.

    Args:
        input: [N, C, H, W].
        taps: [kh · kw, C], see :func:`pack_taps`.
        kernel: (kh, kw).
        padding: (left, right, top, bottom), zeros beside ``operand``'s result.
        operand: what the convolution sees of ``input``.
        mean: also the spatial mean of the output.
        partial_means: also the sums that it is made of, as they leave the kernel.
        moments: also the mean and variance of the output over N, H' and W'.
    """
    height, width = output_size(input.shape[2:], kernel, stride, padding, dilation)
    return stencil(
        nhwc(input),
        taps,
        kernel,
        stride,
        (padding[2], padding[0]),
        dilation,
        (height, width),
        operand,
        scale=scale,
        bias=bias,
        activation=activation,
        mean=mean,
        partial_means=partial_means,
        moments=moments,
    )


def stencil(
    input: Tensor,
    taps: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    corner: Sequence[int],
    dilation: Sequence[int],
    size: Sequence[int],
    operand: Forward | Gradient = _PLAIN,
    *,
    between: Sequence[int] = (1, 1),
    flipped: bool = False,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    activation: str = "none",
    mean: bool = False,
    partial_means: bool = False,
    moments: bool = False,
) -> Convolved:
    """:func:`convolve` for outputs of any ``size``, and what its gradient for the input needs.

    Args:
        corner: (top, left): the first output's window starts so far outside the input.
        between: the input is seen with ``between - 1`` zeros between its pixels.
        flipped: the taps are taken in reverse order.
    """
    batch, channels = input.shape[:2]
    height, width = size
    output = empty_nhwc(input, channels, height, width)
    tuned = is_tuned(kernel, stride, dilation, between)
    across = columns(kernel)
    tile = tile_of(input, height, width, kernel, stride)
    row_blocks = -(-height // tile.rows)
    column_blocks = -(-width // (tile.strips * across)) if tuned else 1
    blocks = row_blocks * column_blocks
    sums = averages = statistics = workspace = None
    if partial_means or (mean and blocks > 1):
        sums = float32_like(input, batch, blocks, channels)
    if mean:
        averages = float32_like(input, batch, channels)
    if moments:
        parts = blocks * (-(-batch // tile.images) if tuned else batch)
        merged = -(-parts // _MOMENTS_GROUP) if parts > _MOST_MOMENTS else 0
        workspace = float32_like(input, (parts + merged) * (1 + 2 * channels))
        statistics = float32_like(input, 2, channels)
    torch.ops.effkernels_cuda.depthwise_conv(
        output,
        sums,
        averages,
        statistics,
        workspace,
        input,
        taps,
        floats(scale),
        floats(bias),
        *operand_tensors(operand),
        [*kernel, *stride, *dilation, corner[1], corner[0]],
        [*between],
        flipped,
        *activation_codes([activation]),
        *operand_codes(operand),
        tile.numbers(),
    )
    return Convolved(
        output,
        averages,
        None if statistics is None else (statistics[0], statistics[1]),
        sums if partial_means else None,
    )


def tile_of(
    input: Tensor,
    height: int,
    width: int,
    kernel: Sequence[int],
    stride: Sequence[int],
    gradient: bool = False,
) -> DepthwiseTile:
    """The tile for outputs [N, C, height, width] of a convolution, or for groups of inputs."""
    return choose(
        max(1, input.shape[0]),
        max(1, input.shape[1]),
        height,
        width,
        kernel[0] if kernel[0] in (3, 5, 7) else 3,
        min(*stride, 2),
        input.element_size(),
        gradient,
        *device_limits(input),
    )


def operand_tensors(operand: Forward | Gradient) -> list[Tensor | None]:
    """z, then vectors as csrc/depthwise_conv/cuda.h `DepthwiseOperand` has them."""
    gradient = operand if isinstance(operand, Gradient) else Gradient()
    vectors = (
        operand.scale,
        operand.shift,
        operand.gate,
        gradient.offset,
        gradient.factor,
        gradient.slope,
        gradient.constant,
    )
    z = gradient.z
    return [None if z is None else nhwc(z), *(floats(vector) for vector in vectors)]


def operand_codes(operand: Forward | Gradient) -> list[int]:
    """The number of ``operand``'s kind and of its activation."""
    kind = 2 if isinstance(operand, Gradient) else 1
    plain = all(value is None or value == "none" for value in operand)
    return [0 if plain else kind, *activation_codes([operand.activation])]


def floats(vector: Tensor | None) -> Tensor | None:
    """``vector`` as dense float32."""
    return None if vector is None else vector.detach().float().contiguous()


def depthwise_conv(
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
    """The op ``depthwise_conv``."""
    convolved = convolve(
        input,
        pack_taps(weight),
        weight.shape[2:],
        stride,
        padding,
        dilation,
        scale=scale,
        bias=bias,
        activation=activation,
        mean=return_mean,
    )
    if convolved.mean is None:
        return convolved.output, input.new_empty(0)
    return convolved.output, convolved.mean.to(input.dtype)


def depthwise_conv_backward(
    arguments: list[Any],
    needed: list[bool],
    saved: tuple[Tensor, ...],
    gradients: tuple[Tensor | None, ...],
) -> tuple[Tensor | None, ...]:
    """Gradients of :func:`depthwise_conv` for input, weight, scale and bias."""
    from .depthwise_conv_gradient import both_gradients, input_gradient, weight_gradient

    input, weight, scale, bias, stride, padding, dilation, activation, _ = arguments
    upstream, mean_gradient = gradients
    results: list[Tensor | None] = [None] * len(arguments)
    if (upstream is None and mean_gradient is None) or not any(needed):
        return tuple(results)
    geometry = (weight.shape[2:], stride, padding, dilation)
    height, width = output_size(input.shape[2:], *geometry)
    if upstream is None:  # only the mean was used
        upstream = empty_nhwc(input, input.shape[1], height, width).zero_()
    input, taps = nhwc(input), pack_taps(weight)
    gradient = Gradient()
    if mean_gradient is not None:
        gradient = gradient._replace(offset=mean_gradient.float() / (height * width))
    if activation != "none":
        before = convolve(input, taps, *geometry, scale=scale, bias=bias)
        gradient = gradient._replace(z=before.output, activation=activation)
    if not any(needed[1:4]):
        results[0] = input_gradient(upstream, taps, *geometry, input.shape[2:], gradient, scale)
        return tuple(results)
    for_bias: Tensor | None
    if needed[0]:
        results[0], for_taps, for_bias = both_gradients(
            upstream, gradient, input, _PLAIN, taps, *geometry, scale
        )
    else:
        for_taps, for_bias = weight_gradient(
            upstream, gradient, input, _PLAIN, *geometry, bias=True
        )
    if needed[1]:
        for_weight = for_taps if scale is None else for_taps * scale
        results[1] = for_weight.t().reshape(weight.shape)
    if needed[2]:
        results[2] = (for_taps * taps).sum(0)
    if needed[3]:
        results[3] = for_bias
    return tuple(results)
