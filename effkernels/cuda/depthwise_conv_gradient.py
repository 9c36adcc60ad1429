"""Gradients of the depthwise convolution by csrc/depthwise_conv/cuda.cu, which has the formulas."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..gpu import float32_like
from ..layout import empty_nhwc, nhwc
from ..operands import Forward, Gradient
from . import device_limits
from .depthwise_conv import (
    floats,
    operand_codes,
    operand_tensors,
    stencil,
    tile_of,
)
from .depthwise_conv_config import gradient_columns, gradient_is_tuned, groups

_PLAIN = Gradient()
_PROGRAMS = 8  # a processor's, that share the sums for the taps


def input_gradient(
    upstream: Tensor,
    taps: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    size: Sequence[int],
    gradient: Gradient = _PLAIN,
    scale: Tensor | None = None,
) -> Tensor:
    """The gradient of :func:`~effkernels.cuda.depthwise_conv.convolve` for its (operand's) input.

    Args:
        upstream: [N, C, H', W'], as ``gradient`` takes it.
        taps: [kh · kw, C], as in the forward pass; also the arguments after it.
        size: (H, W) of the input.
        gradient: what the convolution sees of ``upstream``.
        scale: [C], of the forward pass.

    Returns:
        [N, C, H, W] channels_last.
    """
    upstream = nhwc(upstream)
    up_size = upstream.shape[2:]
    if max(stride) > 1 and gradient_is_tuned(kernel, stride, padding, dilation, size, up_size):
        output = empty_nhwc(upstream, upstream.shape[1], size[0], size[1])
        # (No input is read where no sums are asked for: its place is taken by the output.)
        _run(
            output,
            False,
            upstream,
            gradient,
            output,
            Forward(),
            taps,
            geometry=(kernel, stride, padding, dilation),
            scale=scale,
        )
        return output
    left, _, top, _ = padding
    return stencil(
        upstream,
        taps,
        kernel,
        (1, 1),
        (dilation[0] * (kernel[0] - 1) - top, dilation[1] * (kernel[1] - 1) - left),
        dilation,
        size,
        gradient,
        between=stride,
        flipped=True,
        scale=scale,
    ).output


def weight_gradient(
    upstream: Tensor,
    gradient: Gradient,
    input: Tensor,
    forward: Forward,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    bias: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The gradient for the taps, and for a bias.

    Args:
        upstream: [N, C, H', W'], which the convolution's gradient sees through ``gradient``.
        input: [N, C, H, W], which the convolution saw through ``forward``.
        kernel: (kh, kw); ``stride``, ``padding`` and ``dilation`` as in the forward pass.
        bias: the sum of what ``gradient`` makes of ``upstream`` is wanted, too.

    Returns:
        [kh · kw, C] and [C] (or None), float32.
    """
    taps = upstream.new_empty(kernel[0] * kernel[1], upstream.shape[1])  # not read
    totals = _run(
        None,
        True,
        nhwc(upstream),
        gradient,
        nhwc(input),
        forward,
        taps,
        geometry=(kernel, stride, padding, dilation),
    )
    assert totals is not None
    return totals[:-1], totals[-1] if bias else None


def both_gradients(
    upstream: Tensor,
    gradient: Gradient,
    input: Tensor,
    forward: Forward,
    taps: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`input_gradient`, then :func:`weight_gradient`'s two: where it can, from one pass."""
    upstream, input = nhwc(upstream), nhwc(input)
    size = input.shape[2:]
    geometry = (kernel, stride, padding, dilation)
    if gradient_is_tuned(*geometry, size, upstream.shape[2:]):
        output = empty_nhwc(upstream, upstream.shape[1], size[0], size[1])
        totals = _run(
            output, True, upstream, gradient, input, forward, taps, geometry=geometry, scale=scale
        )
        assert totals is not None
        return output, totals[:-1], totals[-1]
    for_input = input_gradient(upstream, taps, *geometry, size, gradient, scale)
    for_taps, for_bias = weight_gradient(upstream, gradient, input, forward, *geometry, bias=True)
    assert for_bias is not None
    return for_input, for_taps, for_bias


def _run(
    output: Tensor | None,
    sums: bool,
    upstream: Tensor,
    gradient: Gradient,
    input: Tensor,
    forward: Forward,
    taps: Tensor,
    *,
    geometry: tuple[Sequence[int], Sequence[int], Sequence[int], Sequence[int]],
    scale: Tensor | None = None,
) -> Tensor | None:
    """Fills ``output``, and gives [taps + 1, C] ``sums``, of which the last is for the bias."""
    kernel, stride, padding, dilation = geometry
    batch, channels = input.shape[:2]
    left, _, top, _ = padding
    across = gradient_columns(stride)
    height = groups(top, input.shape[2], stride[0])
    width = groups(left, input.shape[3], stride[1])
    tile = tile_of(input, height, width, kernel, stride, gradient=True)
    totals = partials = None
    programs = 1
    if sums:
        enough = _PROGRAMS * device_limits(input)[0]
        if gradient_is_tuned(*geometry, input.shape[2:], upstream.shape[2:]):
            items = (
                -(-batch // tile.images)
                * -(-height // tile.rows)
                * -(-width // (tile.strips * across))
            )
            chunks = -(-channels // (2 * tile.pairs))
            programs = -(-items // max(1, items * chunks // enough))
        else:
            pixels = upstream[:, :1].numel()
            programs = min(-(-pixels // 64), 256)
        rows = kernel[0] * kernel[1] + 1
        if batch == 0:
            return input.new_zeros((rows, channels), dtype=torch.float32)
        totals = float32_like(input, rows, channels)
        partials = float32_like(input, programs, rows, channels)
    gradient_kind, gradient_activation = operand_codes(gradient)
    forward_kind, forward_activation = operand_codes(forward)
    torch.ops.effkernels_cuda.depthwise_gradient(
        output,
        totals,
        partials,
        upstream,
        input,
        taps,
        floats(scale),
        *operand_tensors(gradient),
        floats(forward.scale),
        floats(forward.shift),
        floats(forward.gate),
        [*kernel, *stride, *dilation, left, top],
        [gradient_kind, gradient_activation, forward_kind, forward_activation],
        tile.numbers(),
        programs,
    )
    return totals
