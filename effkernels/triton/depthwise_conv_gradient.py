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

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..layout import empty_nhwc, nhwc
from . import reduce
from .depthwise_conv import stencil
from .depthwise_conv_config import DepthwiseConfig, DepthwiseProblem, candidates, heuristic
from .depthwise_conv_window import (
    is_inside,
    load_row,
    load_taps,
    operand,
    operand_row,
    operand_vectors,
)
from .language import kernel
from .launch import device_of, launch, vector_width
from .operands import Forward, Gradient
from .tune import choose


@kernel
def _strided_input_gradient_kernel(
    output_ptr,
    upstream_ptr,
    z_ptr,
    taps_ptr,
    scale_ptr,
    operand_scale_ptr,
    operand_shift_ptr,
    gate_ptr,
    offset_ptr,
    factor_ptr,
    slope_ptr,
    constant_ptr,
    batch,
    height,
    width,
    up_height,
    up_width,
    channel_vectors,
    top,
    left,
    rows,
    VECTOR: tl.constexpr,
    KERNEL_Y: tl.constexpr,
    KERNEL_X: tl.constexpr,
    STRIDE_Y: tl.constexpr,
    STRIDE_X: tl.constexpr,
    COLUMNS: tl.constexpr,
    STRIPS: tl.constexpr,
    CHANNELS: tl.constexpr,
    OPERAND: tl.constexpr,
    AFFINE: tl.constexpr,
    OPERAND_ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    OFFSET: tl.constexpr,
    NORMALIZED: tl.constexpr,
):
    # In coordinates that count the padding, too, row STRIDE · a + phase of the result is made of
    # the rows a - e of the upstream gradient by the taps phase + STRIDE · e. A step makes the
    # STRIDE rows of one a; a strip has COLUMNS such groups of STRIDE columns.
    REACH_Y: tl.constexpr = (KERNEL_Y + STRIDE_Y - 1) // STRIDE_Y
    REACH_X: tl.constexpr = (KERNEL_X + STRIDE_X - 1) // STRIDE_X
    INPUTS: tl.constexpr = COLUMNS + REACH_X - 1
    OUTPUTS: tl.constexpr = COLUMNS * STRIDE_X
    channels = channel_vectors * VECTOR
    channel_blocks = tl.cdiv(channels, CHANNELS)
    item = tl.program_id(0) // channel_blocks
    first_c = tl.program_id(0) % channel_blocks * CHANNELS
    c = tl.zeros([STRIPS, 1], tl.int32) + (first_c + tl.arange(0, CHANNELS))[None, :]
    in_channels = c < channels
    taps = load_taps(taps_ptr, scale_ptr, c, in_channels, channels, KERNEL_Y * KERNEL_X, False)

    a_first = top // STRIDE_Y
    a_count = tl.cdiv(top + height, STRIDE_Y) - a_first
    row_blocks = tl.cdiv(a_count, rows)
    column_blocks = tl.cdiv(left % STRIDE_X + width, OUTPUTS)
    a_begin = a_first + item % row_blocks * rows
    a_end = tl.minimum(a_begin + rows, a_first + a_count)
    lane = item // row_blocks * STRIPS + tl.arange(0, STRIPS)
    image = lane // column_blocks
    b = left // STRIDE_X + lane % column_blocks * COLUMNS
    in_tile = (image < batch)[:, None] & in_channels
    vectors = operand_vectors(
        operand_scale_ptr,
        operand_shift_ptr,
        gate_ptr,
        offset_ptr,
        factor_ptr,
        slope_ptr,
        constant_ptr,
        c,
        image[:, None] * channels + c,
        in_tile,
    )
    images = image.to(tl.int64)[:, None] * channels
    out_x = b * STRIDE_X - left
    out_lanes = output_ptr + (images * (height * width) + c) + (out_x * channels)[:, None]
    x = b - (REACH_X - 1)
    up_lanes = upstream_ptr + (images * (up_height * up_width) + c) + (x * channels)[:, None]
    z_lanes = up_lanes
    if z_ptr is not None:
        z_lanes = z_ptr + (images * (up_height * up_width) + c) + (x * channels)[:, None]
    out_x = tl.where(in_tile, out_x[:, None], -(2**30))
    x = tl.where(in_tile, x[:, None], -(2**30))
    zero = tl.zeros([STRIPS, CHANNELS], tl.float32)

    window = ()  # the last REACH_Y rows of the upstream gradient, the newest first
    for _ in tl.static_range(REACH_Y * INPUTS):
        window = window + (zero,)
    for a in range(a_begin - (REACH_Y - 1), a_end):
        offset = (a * up_width).to(tl.int64) * channels
        readable = tl.where((a >= 0) & (a < up_height), up_width, 0)
        row = load_row(up_lanes + offset, x, readable, channels, INPUTS)
        z_row = row
        if z_ptr is not None:
            z_row = load_row(z_lanes + offset, x, readable, channels, INPUTS)
        shifted = operand_row(
            row,
            z_row,
            vectors,
            x,
            readable,
            INPUTS,
            OPERAND,
            AFFINE,
            OPERAND_ACTIVATION,
            GATED,
            OFFSET,
            NORMALIZED,
        )
        for index in tl.static_range((REACH_Y - 1) * INPUTS):
            shifted = shifted + (window[index],)
        window = shifted
        if a >= a_begin:
            for phase in tl.static_range(STRIDE_Y):
                out_y = a * STRIDE_Y + phase - top
                row_lanes = out_lanes + (out_y * width).to(tl.int64) * channels
                writable = tl.where((out_y >= 0) & (out_y < height), width, 0)
                for column in tl.static_range(OUTPUTS):
                    total = zero
                    for i in tl.static_range(phase, KERNEL_Y, STRIDE_Y):
                        for j in tl.static_range(column % STRIDE_X, KERNEL_X, STRIDE_X):
                            value = window[
                                i // STRIDE_Y * INPUTS
                                + column // STRIDE_X
                                + REACH_X
                                - 1
                                - j // STRIDE_X
                            ]
                            total += taps[i * KERNEL_X + j] * value
                    tl.store(
                        row_lanes + column * channels,
                        total,
                        mask=is_inside(out_x + column, writable),
                    )


@kernel
def _weight_gradient_kernel(
    partials_ptr,
    bias_ptr,
    upstream_ptr,
    z_ptr,
    input_ptr,
    scale_ptr,
    shift_ptr,
    gate_ptr,
    offset_ptr,
    factor_ptr,
    slope_ptr,
    constant_ptr,
    input_scale_ptr,
    input_shift_ptr,
    input_gate_ptr,
    batch,
    height,
    width,
    up_height,
    up_width,
    channel_vectors,
    top,
    left,
    rows,
    items,
    VECTOR: tl.constexpr,
    KERNEL_Y: tl.constexpr,
    KERNEL_X: tl.constexpr,
    STRIDE_Y: tl.constexpr,
    STRIDE_X: tl.constexpr,
    COLUMNS: tl.constexpr,
    STRIPS: tl.constexpr,
    CHANNELS: tl.constexpr,
    OPERAND: tl.constexpr,
    AFFINE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    OFFSET: tl.constexpr,
    NORMALIZED: tl.constexpr,
    INPUT_OPERAND: tl.constexpr,
    INPUT_AFFINE: tl.constexpr,
    INPUT_ACTIVATION: tl.constexpr,
    INPUT_GATED: tl.constexpr,
):
    DEPTH: tl.constexpr = (KERNEL_Y + STRIDE_Y - 1) // STRIDE_Y
    INPUTS: tl.constexpr = (COLUMNS - 1) * STRIDE_X + KERNEL_X
    channels = channel_vectors * VECTOR
    channel_blocks = tl.cdiv(channels, CHANNELS)
    program = tl.program_id(0) // channel_blocks
    first_c = tl.program_id(0) % channel_blocks * CHANNELS
    c = tl.zeros([STRIPS, 1], tl.int32) + (first_c + tl.arange(0, CHANNELS))[None, :]
    in_channels = c < channels
    zero = tl.zeros([STRIPS, CHANNELS], tl.float32)
    sums = ()  # one for each tap
    for _ in tl.static_range(KERNEL_Y * KERNEL_X):
        sums = sums + (zero,)
    bias = zero

    row_blocks = tl.cdiv(up_height, rows)
    column_blocks = tl.cdiv(up_width, COLUMNS)
    tiles = tl.cdiv(batch * column_blocks, STRIPS)
    for item in range(program * items, tl.minimum((program + 1) * items, tiles * row_blocks)):
        first = item % row_blocks * rows  # row of the upstream gradient
        last = tl.minimum(first + rows, up_height)
        lane = item // row_blocks * STRIPS + tl.arange(0, STRIPS)
        image = lane // column_blocks
        up_x = lane % column_blocks * COLUMNS
        in_tile = (image < batch)[:, None] & in_channels
        image_c = image[:, None] * channels + c
        vectors = operand_vectors(
            scale_ptr,
            shift_ptr,
            gate_ptr,
            offset_ptr,
            factor_ptr,
            slope_ptr,
            constant_ptr,
            c,
            image_c,
            in_tile,
        )
        input_vectors = operand_vectors(
            input_scale_ptr,
            input_shift_ptr,
            input_gate_ptr,
            None,
            None,
            None,
            None,
            c,
            image_c,
            in_tile,
        )
        images = image.to(tl.int64)[:, None] * channels
        up_offsets = images * (up_height * up_width) + c + (up_x * channels)[:, None]
        up_lanes = upstream_ptr + up_offsets
        z_lanes = up_lanes
        if z_ptr is not None:
            z_lanes = z_ptr + up_offsets
        x = up_x * STRIDE_X - left
        in_lanes = input_ptr + (images * (height * width) + c) + (x * channels)[:, None]
        up_x = tl.where(in_tile, up_x[:, None], -(2**30))
        x = tl.where(in_tile, x[:, None], -(2**30))

        # As in the convolution a step takes the next STRIDE_Y rows of the input; the rows of the
        # upstream gradient that they meet are kept, the newest first.
        y = first * STRIDE_Y - top
        window = ()
        for _ in tl.static_range(DEPTH * COLUMNS):
            window = window + (zero,)
        # Steps at the end whose rows are all padding are left out: they would add zeros. (At the
        # beginning the upstream rows must be taken in.)
        steps = tl.minimum(last - first + DEPTH - 1, tl.maximum(tl.cdiv(height - y, STRIDE_Y), 0))
        steps = tl.maximum(steps, last - first)  # the bias sees every row
        for step in range(steps):
            up_y = first + step
            offset = (up_y * up_width).to(tl.int64) * channels
            readable = tl.where(up_y < last, up_width, 0)
            up_row = load_row(up_lanes + offset, up_x, readable, channels, COLUMNS)
            z_row = up_row
            if z_ptr is not None:
                z_row = load_row(z_lanes + offset, up_x, readable, channels, COLUMNS)
            in_rows = ()
            for phase in tl.static_range(STRIDE_Y):
                offset = ((y + phase) * width).to(tl.int64) * channels
                in_width = tl.where((y + phase >= 0) & (y + phase < height), width, 0)
                in_rows = in_rows + (load_row(in_lanes + offset, x, in_width, channels, INPUTS),)
            newest = operand_row(
                up_row,
                z_row,
                vectors,
                up_x,
                readable,
                COLUMNS,
                OPERAND,
                AFFINE,
                ACTIVATION,
                GATED,
                OFFSET,
                NORMALIZED,
            )
            if bias_ptr is not None:
                for s in tl.static_range(COLUMNS):
                    bias += newest[s]
            shifted = newest
            for index in tl.static_range((DEPTH - 1) * COLUMNS):
                shifted = shifted + (window[index],)
            window = shifted
            for phase in tl.static_range(STRIDE_Y):
                values = operand_row(
                    in_rows[phase],
                    in_rows[phase],
                    input_vectors,
                    x,
                    tl.where((y + phase >= 0) & (y + phase < height), width, 0),
                    INPUTS,
                    INPUT_OPERAND,
                    INPUT_AFFINE,
                    INPUT_ACTIVATION,
                    INPUT_GATED,
                    False,
                    False,
                )
                added = ()
                for i in tl.static_range(KERNEL_Y):
                    for j in tl.static_range(KERNEL_X):
                        total = sums[i * KERNEL_X + j]
                        if i % STRIDE_Y == phase:
                            for s in tl.static_range(COLUMNS):
                                total += (
                                    window[i // STRIDE_Y * COLUMNS + s] * values[s * STRIDE_X + j]
                                )
                        added = added + (total,)
                sums = added
            y += STRIDE_Y

    out_c = first_c + tl.arange(0, CHANNELS)
    TAPS: tl.constexpr = KERNEL_Y * KERNEL_X
    for index in tl.static_range(TAPS):
        at = (program * TAPS + index).to(tl.int64) * channels + out_c
        tl.store(partials_ptr + at, tl.sum(sums[index], 0), mask=out_c < channels)
    if bias_ptr is not None:
        tl.store(bias_ptr + program * channels + out_c, tl.sum(bias, 0), mask=out_c < channels)


@kernel
def _general_weight_gradient_kernel(
    partials_ptr,
    bias_ptr,
    upstream_ptr,
    z_ptr,
    input_ptr,
    scale_ptr,
    shift_ptr,
    gate_ptr,
    offset_ptr,
    factor_ptr,
    slope_ptr,
    constant_ptr,
    input_scale_ptr,
    input_shift_ptr,
    input_gate_ptr,
    pixels,
    height,
    width,
    up_height,
    up_width,
    channel_vectors,
    top,
    left,
    kernel_y,
    kernel_x,
    stride_y,
    stride_x,
    dilation_y,
    dilation_x,
    tiles,
    VECTOR: tl.constexpr,
    STRIPS: tl.constexpr,
    CHANNELS: tl.constexpr,
    OPERAND: tl.constexpr,
    AFFINE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    OFFSET: tl.constexpr,
    NORMALIZED: tl.constexpr,
    INPUT_OPERAND: tl.constexpr,
    INPUT_AFFINE: tl.constexpr,
    INPUT_ACTIVATION: tl.constexpr,
    INPUT_GATED: tl.constexpr,
):
    """One tap at a time, pixel by pixel: any kernel, stride and dilation."""
    channels = channel_vectors * VECTOR
    channel_blocks = tl.cdiv(channels, CHANNELS)
    kernel_size = kernel_y * kernel_x
    first_c = tl.program_id(0) % channel_blocks * CHANNELS
    tap = tl.program_id(0) // channel_blocks % kernel_size
    program = tl.program_id(0) // channel_blocks // kernel_size
    c = tl.zeros([STRIPS, 1], tl.int32) + (first_c + tl.arange(0, CHANNELS))[None, :]
    in_channels = c < channels
    total = tl.zeros([STRIPS, CHANNELS], tl.float32)
    bias = tl.zeros([STRIPS, CHANNELS], tl.float32)
    pixel = program.to(tl.int64) * tiles * STRIPS + tl.arange(0, STRIPS)
    for _ in range(tiles):
        image = pixel // (up_height * up_width)
        up_y = pixel // up_width % up_height
        up_x = pixel % up_width
        inside = (pixel < pixels)[:, None] & in_channels
        image_c = image[:, None] * channels + c
        vectors = operand_vectors(
            scale_ptr,
            shift_ptr,
            gate_ptr,
            offset_ptr,
            factor_ptr,
            slope_ptr,
            constant_ptr,
            c,
            image_c,
            inside,
        )
        input_vectors = operand_vectors(
            input_scale_ptr,
            input_shift_ptr,
            input_gate_ptr,
            None,
            None,
            None,
            None,
            c,
            image_c,
            inside,
        )
        at = pixel[:, None] * channels + c
        value = tl.load(upstream_ptr + at, mask=inside, other=0.0)
        z = value
        if z_ptr is not None:
            z = tl.load(z_ptr + at, mask=inside, other=0.0)
        value = operand(
            value, z, vectors, inside, OPERAND, AFFINE, ACTIVATION, GATED, OFFSET, NORMALIZED
        )
        bias += value
        y = up_y * stride_y + tap // kernel_x * dilation_y - top
        x = up_x * stride_x + tap % kernel_x * dilation_x - left
        seen = inside & ((y >= 0) & (y < height) & (x >= 0) & (x < width))[:, None]
        at = ((image * height + y) * width + x)[:, None] * channels + c
        seen_value = tl.load(input_ptr + at, mask=seen, other=0.0)
        seen_value = operand(
            seen_value,
            seen_value,
            input_vectors,
            seen,
            INPUT_OPERAND,
            INPUT_AFFINE,
            INPUT_ACTIVATION,
            INPUT_GATED,
            False,
            False,
        )
        total += value * seen_value
        pixel += STRIPS
    out_c = first_c + tl.arange(0, CHANNELS)
    at = (program * kernel_size + tap).to(tl.int64) * channels + out_c
    tl.store(partials_ptr + at, tl.sum(total, 0), mask=out_c < channels)
    if bias_ptr is not None and tap == 0:
        tl.store(bias_ptr + program * channels + out_c, tl.sum(bias, 0), mask=out_c < channels)


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
            _strided_input_gradient_kernel,
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
        partials = _float32(upstream, programs, size * channels)
        sums = _float32(upstream, programs, channels) if bias else None
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
        operands = {
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
                _weight_gradient_kernel,
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
                _general_weight_gradient_kernel,
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
        *upstream.shape[:2],
        size[0],
        size[1],
        (kernel[0], kernel[1]),
        (stride[0], stride[1]),
        (dilation[0], dilation[1]),
        upstream.element_size(),
        "plain" if seen == type(seen)() else kind,
        False,
    )


def _float32(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=like.device)
