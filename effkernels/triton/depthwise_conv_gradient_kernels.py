"""The kernels of `depthwise_conv_gradient`, which says what they compute and why they are so."""

# mypy: ignore-errors
# (what is inside kernels is Triton's language, not Python's)

from __future__ import annotations

import triton.language as tl

from .depthwise_conv_window import (
    is_inside,
    load_row,
    load_taps,
    operand,
    operand_row,
    operand_vectors,
)
from .language import kernel, rounded


@kernel
def strided_input_gradient_kernel(
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
    """The gradient for the input of a strided convolution, ``rows`` groups of rows a program."""
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
                        rounded(total, row_lanes.dtype.element_ty),
                        mask=is_inside(out_x + column, writable),
                    )


@kernel
def weight_gradient_kernel(
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
    """Sums over ``items`` tiles for every tap, and for the bias."""
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
def general_weight_gradient_kernel(
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
