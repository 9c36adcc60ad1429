"""Depthwise convolution: a k×k window over each channel by itself.

    output[n, c, y, x] = activation(bias[c] + scale[c] · Σ_ij taps[i, j, c] ·
                                    operand(input)[n, c, y·s + i·d - top, x·s + j·d - left])

Layout: input and output NHWC, taps [kh · kw, C]. ``operand`` is what `operands.Forward` makes of
the input while it is loaded, zero outside the image; here the gradient for the input of an
unstrided convolution is the same kernel with flipped taps and an `operands.Gradient`. Besides the
output come, if asked, the sums that its spatial mean and its batch statistics are made of.

Moves: input and output, once. B0's 5x5 with 672 channels and 14x14 pixels, batch 256, bfloat16:
135 MB, 45 µs on an H100 (3.0 TB/s). It also takes 0.84e9 multiply-adds, 29 µs at 128 a clock and
processor (1.7 GHz), so a 5x5 has no instructions to waste; a 3x3 (144 channels, 56x56: 462 MB,
154 µs, of which 36 µs are arithmetic) has.

Idea: the window lives in registers, and the program text is the stencil. A thread has 2 or 4
channels of a strip of 4 or 7 neighbouring columns; each column is a tensor of its own, so that the
window moves sideways by naming another one. A program walks down the rows: every row of the input
is loaded, converted and passed through the prologue once, (columns + k - 1) / columns times an
element, and added to the k output rows (k / 2 where the stride is 2) that it belongs to; one of
them is then done. An activation costs two trips to the special function unit, which makes 16 a
clock; k² of them an element, as in a kernel that loads its window for every output, would take
three times (3x3) to eight times (5x5) as long as the memory. Here it is 1.5 and 2 an element. The
next row is under way while one is worked on. All strips of a program are on the same rows, so
that rows of padding are skipped by one comparison and addresses of rows are scalars.

Counted in the compiler's output (sm_90, bfloat16), instructions of the loop for an output: 5x5, 4
columns, SiLU and mean: 56 (25 of them multiply-adds, 11 the SiLU); 5x5 and 7 columns: 50; 3x3:
33. Moving
the sums down a row costs nothing: each row's first multiply-add reads the register of the row
before and writes its own.

A grid that cannot fill the device (batch 1) takes a row at a time and loads its whole window at
once; latency counts there. Kernels larger than 7, strides above 2 and dilations take a general
loop in the same kernel, with nothing kept.

Tried and lost, by the compiler's output (no GPU has run this):

- 16-byte loads of 2-byte types (8 channels a thread): the taps of a 3x3 alone are 72 registers,
  those of a 5x5 do not fit, and reading them again for each row costs what the width saves. With 4
  or 8 bytes a thread a warp still reads 128 or 256 neighbouring bytes.
- 4 channels with a prologue or statistics (3x3): 244 registers, 8 warps. 2 channels: 12 warps.
- Sums that start at the bias: a bias far from zero costs them their last digits.
- Leaving out rows of padding by a branch around the multiply-adds: a move for each sum.
- Offsets of 64 bits a column and masks of three comparisons: 216 registers instead of 168, twice
  the time to compile.
- The count of values, for the statistics, as a loop's own variable: nothing ties it to a layout,
  and it went through shared memory every row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import triton
from torch import Tensor

from ..gpu import Convolved, float32_like, pack_taps
from ..layout import empty_nhwc, nhwc, output_size
from ..operands import Forward, Gradient
from . import reduce
from .depthwise_conv_config import DepthwiseConfig, DepthwiseProblem, candidates, heuristic
from .depthwise_conv_kernel import convolve_kernel
from .launch import device_of, launch, vector_width
from .tune import choose

_PLAIN = Forward()


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
    scale, bias = _dense(scale), _dense(bias)
    output = empty_nhwc(input, channels, height, width)
    vector = vector_width(input.dtype, channels)
    kind = "gradient" if isinstance(operand, Gradient) else "forward"
    if operand == type(operand)():
        kind = "plain"
    gradient = operand if isinstance(operand, Gradient) else Gradient()
    problem = DepthwiseProblem(
        "forward",
        batch,
        channels,
        height,
        width,
        (kernel[0], kernel[1]),
        (stride[0], stride[1]),
        (dilation[0], dilation[1]) if tuple(between) == (1, 1) else (0, 0),
        input.element_size(),
        kind,
        moments,
    )

    def run(config: DepthwiseConfig) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        column_blocks = triton.cdiv(width, config.columns)
        row_blocks = triton.cdiv(height, config.rows)
        items = triton.cdiv(batch * column_blocks, config.strips) * row_blocks
        programs = triton.cdiv(items, config.items)
        sums = counts = partials = None
        by_tile = batch == 1 or column_blocks % config.strips == 0
        if mean or partial_means:
            blocks = triton.cdiv(column_blocks, config.strips) if by_tile else column_blocks
            sums = float32_like(input, batch, blocks * row_blocks, channels)
        if moments:
            counts = float32_like(input, programs)
            partials = float32_like(input, programs, 2, channels)
        launch(
            convolve_kernel,
            (programs * triton.cdiv(channels, config.channels),),
            output,
            sums,
            counts,
            partials,
            input,
            gradient.z if kind == "gradient" else None,
            taps,
            scale,
            bias,
            operand.scale,
            operand.shift,
            operand.gate,
            gradient.offset,
            gradient.factor,
            gradient.slope,
            gradient.constant,
            batch,
            *input.shape[2:],
            height,
            width,
            channels // vector,
            *corner,
            *stride,
            *dilation,
            *between,
            config.rows,
            config.items,
            num_warps=config.num_warps,
            max_registers=config.registers,
            VECTOR=vector,
            KERNEL_Y=kernel[0],
            KERNEL_X=kernel[1],
            STRIDE_Y=stride[0] if problem.is_tuned else 0,
            STRIDE_X=stride[1] if problem.is_tuned else 0,
            FLIPPED=flipped,
            STREAMED=config.streamed,
            COLUMNS=config.columns,
            STRIPS=config.strips,
            CHANNELS=config.channels,
            OPERAND=kind,
            AFFINE=operand.scale is not None,
            OPERAND_ACTIVATION=operand.activation,
            GATED=operand.gate is not None,
            OFFSET=gradient.offset is not None,
            NORMALIZED=gradient.factor is not None,
            ACTIVATION=activation,
            MEANS="none" if sums is None else "tile" if by_tile else "strip",
            MOMENTS=moments,
        )
        return sums, counts, partials

    config = choose("depthwise_conv", problem, device_of(input), heuristic, candidates, run)
    sums, counts, partials = run(config)
    pixels = height * width
    averages = statistics = None
    if mean:
        assert sums is not None
        averages = reduce.totals(sums, 1 / pixels)
    if moments:
        assert counts is not None and partials is not None
        statistics = reduce.moments(counts, partials, batch * pixels)
    return Convolved(output, averages, statistics, sums if partial_means else None)


def _dense(vector: Tensor | None) -> Tensor | None:
    return None if vector is None else vector.contiguous()


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
    from .depthwise_conv_gradient import input_gradient, weight_gradient

    input, weight, scale, bias, stride, padding, dilation, activation, _ = arguments
    upstream, mean_gradient = gradients
    results: list[Tensor | None] = [None] * len(arguments)
    if (upstream is None and mean_gradient is None) or not any(needed):
        return tuple(results)
    kernel = weight.shape[2:]
    height, width = output_size(input.shape[2:], kernel, stride, padding, dilation)
    if upstream is None:  # only the mean was used
        upstream = empty_nhwc(input, input.shape[1], height, width).zero_()
    input, taps = nhwc(input), pack_taps(weight)
    gradient = Gradient()
    if mean_gradient is not None:
        offset = (mean_gradient.float() / (height * width)).contiguous()
        gradient = gradient._replace(offset=offset)
    if activation != "none":
        before = convolve(input, taps, kernel, stride, padding, dilation, scale=scale, bias=bias)
        gradient = gradient._replace(z=before.output, activation=activation)
    if needed[0]:
        results[0] = input_gradient(
            upstream, taps, kernel, stride, padding, dilation, input.shape[2:], gradient, scale
        )
    if needed[1] or needed[2]:
        for_taps, results[3] = weight_gradient(
            upstream,
            gradient,
            input,
            Forward(),
            kernel,
            stride,
            padding,
            dilation,
            bias=needed[3],
        )
        if needed[1]:
            for_weight = for_taps if scale is None else for_taps * scale
            results[1] = for_weight.t().reshape(weight.shape)
        if needed[2]:
            results[2] = (for_taps * taps).sum(0)
    elif needed[3]:  # a sum over pixels: the bias of a 1x1 convolution
        one, none = (1, 1), (0, 0, 0, 0)
        _, results[3] = weight_gradient(
            upstream, gradient, upstream, Forward(), one, one, none, one, bias=True
        )
    return tuple(results)
