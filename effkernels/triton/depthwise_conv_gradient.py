"""Gradients of the depthwise convolution; t is what `operands.Gradient` makes of the upstream one.

    input gradient[n, c, v, u] = scale[c] · Σ_ij taps[i, j, c] · t[n, c, (v + top - i) / s, ...]
    tap gradient[i, j, c]      = Σ_nyx t[n, c, y, x] · operand(input)[n, c, y·s + i - top, ...]

(over those i and j where the division leaves no rest), layout as in `depthwise_conv`.

Input gradient. Stride 1 is the convolution itself with flipped taps. Stride 2: output pixels of
one parity see every second tap only. A thread makes 2 rows of 8 columns at a time from the last
(k + 1) / 2 rows of t, which it keeps; every element of the upstream gradient passes the prologue
(4 + (k - 1) / 2) / 4 times.

Weight gradient. The convolution's loop with the roles exchanged: the sums of all taps stay in
registers (50 for 5x5 and 2 channels), the last k rows of t beside them, and each row of the input
passes its prologue once. A program takes a part of the image and writes one partial result a tap;
`reduce.totals` adds those up. Two stages, no atomics: the same bits every time.

Moves: input gradient: upstream, z (the prologue's) and the result; weight gradient: upstream, z and
the input. B0's 5x5 with 672 channels, 14x14, batch 256, bfloat16: 202 MB each, 67 µs on an H100
(3.0 TB/s), beside 29 µs of multiply-adds each. One kernel for both would read upstream and z once
(269 instead of 404 MB), but needs both sets of taps and sums in registers: 100 of 5x5 besides two
windows. Left for when a GPU can tell.

Counted (sm_90, bfloat16, SiLU's gradient in the prologue), instructions for a value of the result:
strided input gradient 5x5: 20 (38 while each output row loaded and transformed its window anew),
3x3: 14; weight gradient 5x5: 66 for each upstream value, 26 of them multiply-adds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import triton
from torch import Tensor

from ..gpu import float32_like
from ..layout import empty_nhwc, nhwc
from ..operands import Forward, Gradient
from . import reduce
from .depthwise_conv import stencil
from .depthwise_conv_config import DepthwiseConfig, DepthwiseProblem, candidates, heuristic
from .depthwise_conv_gradient_kernels import (
    general_weight_gradient_kernel,
    strided_input_gradient_kernel,
    weight_gradient_kernel,
)
from .launch import device_of, launch, vector_width
from .tune import choose

_PLAIN = Gradient()


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
    """The gradient of :func:`~effkernels.triton.depthwise_conv.convolve` for its (operand's) input.

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
    scale = None if scale is None else scale.contiguous()
    if gradient.z is not None:
        gradient = gradient._replace(z=nhwc(gradient.z))
    left, _, top, _ = padding
    strided = max(stride) > 1
    groups = (triton.cdiv(size[0], stride[0]), triton.cdiv(size[1], stride[1]))
    problem = _problem("input_gradient", upstream, groups, kernel, stride, dilation, gradient)
    if not strided or not problem.is_tuned:
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
    batch, channels, up_height, up_width = upstream.shape
    height, width = size
    output = empty_nhwc(upstream, channels, height, width)
    vector = vector_width(upstream.dtype, channels)
    device = device_of(upstream)

    def run(config: DepthwiseConfig) -> None:
        row_groups = triton.cdiv(top + height, stride[0]) - top // stride[0]
        row_blocks = triton.cdiv(row_groups, config.rows)
        column_blocks = triton.cdiv(left % stride[1] + width, stride[1] * config.columns)
        tiles = triton.cdiv(batch * column_blocks, config.strips)
        launch(
            strided_input_gradient_kernel,
            (tiles * row_blocks * triton.cdiv(channels, config.channels),),
            output,
            upstream,
            gradient.z,
            taps,
            scale,
            gradient.scale,
            gradient.shift,
            gradient.gate,
            gradient.offset,
            gradient.factor,
            gradient.slope,
            gradient.constant,
            batch,
            height,
            width,
            up_height,
            up_width,
            channels // vector,
            top,
            left,
            config.rows,
            num_warps=config.num_warps,
            max_registers=config.registers,
            VECTOR=vector,
            KERNEL_Y=kernel[0],
            KERNEL_X=kernel[1],
            STRIDE_Y=stride[0],
            STRIDE_X=stride[1],
            COLUMNS=config.columns,
            STRIPS=config.strips,
            CHANNELS=config.channels,
            OPERAND="plain" if gradient == _PLAIN else "gradient",
            AFFINE=gradient.scale is not None,
            OPERAND_ACTIVATION=gradient.activation,
            GATED=gradient.gate is not None,
            OFFSET=gradient.offset is not None,
            NORMALIZED=gradient.factor is not None,
        )

    run(choose("depthwise_conv", problem, device, heuristic, candidates, run))
    return output


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
    upstream, input = nhwc(upstream), nhwc(input)
    if gradient.z is not None:
        gradient = gradient._replace(z=nhwc(gradient.z))
    batch, channels, up_height, up_width = upstream.shape
    height, width = input.shape[2:]
    left, _, top, _ = padding
    vector = vector_width(upstream.dtype, channels)
    seen = gradient if gradient != _PLAIN else forward
    problem = _problem(
        "weight_gradient", upstream, (up_height, up_width), kernel, stride, dilation, seen
    )
    size = kernel[0] * kernel[1]

    def run(config: DepthwiseConfig) -> tuple[Tensor, Tensor | None]:
        column_blocks = triton.cdiv(up_width, config.columns)
        row_blocks = triton.cdiv(up_height, config.rows)
        channel_blocks = triton.cdiv(channels, config.channels)
        if problem.is_tuned:
            tiles = triton.cdiv(batch * column_blocks, config.strips)
            programs = triton.cdiv(tiles * row_blocks, config.items)
        else:
            pixels = batch * up_height * up_width
            tiles_each = triton.cdiv(triton.cdiv(pixels, config.strips), 64)
            programs = triton.cdiv(triton.cdiv(pixels, config.strips), max(tiles_each, 1))
        partials = float32_like(upstream, programs, size * channels)
        sums = float32_like(upstream, programs, channels) if bias else None
        tensors = (
            partials,
            sums,
            upstream,
            gradient.z,
            input,
            gradient.scale,
            gradient.shift,
            gradient.gate,
            gradient.offset,
            gradient.factor,
            gradient.slope,
            gradient.constant,
            forward.scale,
            forward.shift,
            forward.gate,
        )
        operands: dict[str, Any] = {
            "OPERAND": "plain" if gradient == _PLAIN else "gradient",
            "AFFINE": gradient.scale is not None,
            "ACTIVATION": gradient.activation,
            "GATED": gradient.gate is not None,
            "OFFSET": gradient.offset is not None,
            "NORMALIZED": gradient.factor is not None,
            "INPUT_OPERAND": "plain" if forward.is_plain() else "forward",
            "INPUT_AFFINE": forward.scale is not None,
            "INPUT_ACTIVATION": forward.activation,
            "INPUT_GATED": forward.gate is not None,
        }
        sizes = (height, width, up_height, up_width, channels // vector, top, left)
        if problem.is_tuned:
            launch(
                weight_gradient_kernel,
                (programs * channel_blocks,),
                *tensors,
                batch,
                *sizes,
                config.rows,
                config.items,
                num_warps=config.num_warps,
                max_registers=config.registers,
                VECTOR=vector,
                KERNEL_Y=kernel[0],
                KERNEL_X=kernel[1],
                STRIDE_Y=stride[0],
                STRIDE_X=stride[1],
                COLUMNS=config.columns,
                STRIPS=config.strips,
                CHANNELS=config.channels,
                **operands,
            )
        else:
            launch(
                general_weight_gradient_kernel,
                (programs * channel_blocks * size,),
                *tensors,
                pixels,
                *sizes,
                *kernel,
                *stride,
                *dilation,
                tiles_each,
                num_warps=config.num_warps,
                VECTOR=vector,
                STRIPS=config.strips,
                CHANNELS=config.channels,
                **operands,
            )
        return partials, sums

    device = device_of(upstream)
    partials, sums = run(choose("depthwise_conv", problem, device, heuristic, candidates, run))
    for_taps = reduce.totals(partials[None]).view(size, channels)
    return for_taps, None if sums is None else reduce.totals(sums[None])[0]


def _problem(
    name: str,
    upstream: Tensor,
    size: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    seen: Forward | Gradient,
) -> DepthwiseProblem:
    kind = "gradient" if isinstance(seen, Gradient) else "forward"
    return DepthwiseProblem(
        name,
        upstream.shape[0],
        upstream.shape[1],
        size[0],
        size[1],
        (kernel[0], kernel[1]),
        (stride[0], stride[1]),
        (dilation[0], dilation[1]),
        upstream.element_size(),
        "plain" if seen == type(seen)() else kind,
        False,
    )
