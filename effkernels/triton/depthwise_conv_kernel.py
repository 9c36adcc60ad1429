"""The kernel of `depthwise_conv`, which says what it computes and why it is the way it is."""

# mypy: ignore-errors
# (what is inside kernels is Triton's language, not Python's)

from __future__ import annotations

import triton
import triton.language as tl

from .depthwise_conv_window import (
    is_inside,
    load_row,
    load_taps,
    load_vector,
    operand,
    operand_row,
    operand_vectors,
)
from .language import activate, kernel, rounded


@kernel
def convolve_kernel(
    output_ptr,
    means_ptr,
    counts_ptr,
    moments_ptr,
    input_ptr,
    z_ptr,
    taps_ptr,
    scale_ptr,
    bias_ptr,
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
    out_height,
    out_width,
    channel_vectors,
    top,
    left,
    stride_y,
    stride_x,
    dilation_y,
    dilation_x,
    between_y,
    between_x,
    rows,
    items,
    VECTOR: tl.constexpr,
    KERNEL_Y: tl.constexpr,
    KERNEL_X: tl.constexpr,
    STRIDE_Y: tl.constexpr,  # 0: not known, the general kernel
    STRIDE_X: tl.constexpr,
    FLIPPED: tl.constexpr,
    STREAMED: tl.constexpr,
    COLUMNS: tl.constexpr,
    STRIPS: tl.constexpr,
    CHANNELS: tl.constexpr,
    OPERAND: tl.constexpr,
    AFFINE: tl.constexpr,
    OPERAND_ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    OFFSET: tl.constexpr,
    NORMALIZED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    MEANS: tl.constexpr,  # "none", "tile" or "strip": whose sums are written
    MOMENTS: tl.constexpr,
):
    """`depthwise_conv`'s formula for ``items`` tiles of strips, ``rows`` outputs high each."""
    channels = channel_vectors * VECTOR
    channel_blocks = tl.cdiv(channels, CHANNELS)
    # Neighbours in the grid share pixels, then halos.
    program = tl.program_id(0) // channel_blocks
    first_c = tl.program_id(0) % channel_blocks * CHANNELS
    # Vectors over channels are spread over the tile as they are loaded: every thread reads its own.
    c = tl.zeros([STRIPS, 1], tl.int32) + (first_c + tl.arange(0, CHANNELS))[None, :]
    in_channels = c < channels

    taps = ()
    if STRIDE_Y > 0:
        taps = load_taps(
            taps_ptr, scale_ptr, c, in_channels, channels, KERNEL_Y * KERNEL_X, FLIPPED
        )

    bias = load_vector(bias_ptr, c, in_channels)
    zero = tl.zeros([STRIPS, CHANNELS], tl.float32)
    moments = (zero, zero, zero)
    row_blocks = tl.cdiv(out_height, rows)
    column_blocks = tl.cdiv(out_width, COLUMNS)
    tiles = tl.cdiv(batch * column_blocks, STRIPS)
    count = tl.minimum(items, tiles * row_blocks - program * items) if MOMENTS else 1
    for index in range(count):
        item = program * items + index
        first = item % row_blocks * rows  # row of the output
        last = tl.minimum(first + rows, out_height)
        tile = item // row_blocks
        lane = tile * STRIPS + tl.arange(0, STRIPS)
        image = lane // column_blocks
        out_x = lane % column_blocks * COLUMNS
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
        # Pointers to the first column of row 0 of each strip. Offsets of images and rows are
        # 64 bits wide, those inside a row are not.
        images = image.to(tl.int64)[:, None] * channels
        out_lanes = output_ptr + (images * (out_height * out_width) + c)
        out_lanes += (out_x * channels)[:, None]
        in_lanes = input_ptr + (images * (height * width) + c)
        z_lanes = in_lanes
        if z_ptr is not None:
            z_lanes = z_ptr + (images * (height * width) + c)
        x = out_x * stride_x - left
        if STRIDE_Y > 0:
            in_lanes += (x * channels)[:, None]
            z_lanes += (x * channels)[:, None]
        x = tl.where(in_tile, x[:, None], -(2**30))
        out_x = tl.where(in_tile, out_x[:, None], 2**30)
        state = (zero, moments[1], moments[2])
        # How many values each row of the strips adds, for MOMENTS.
        each = tl.minimum(tl.maximum(out_width - out_x, 0), COLUMNS).to(tl.float32)

        if STRIDE_Y == 0:
            for out_y in range(first, last):
                total = zero
                for i in range(KERNEL_Y):
                    y = out_y * stride_y + i * dilation_y - top
                    in_image = (y >= 0) & (y % between_y == 0)
                    y = y // between_y
                    in_image = in_image & (y < height)
                    row = (y * width).to(tl.int64) * channels
                    for j in range(KERNEL_X):
                        at = x + j * dilation_x
                        inside = in_image & (at >= 0) & (at % between_x == 0)
                        at = at // between_x
                        inside = inside & (at < width)
                        value = tl.load(in_lanes + row + at * channels, mask=inside, other=0.0)
                        z = value
                        if z_ptr is not None:
                            z = tl.load(z_lanes + row + at * channels, mask=inside, other=0.0)
                        value = operand(
                            value,
                            z,
                            vectors,
                            inside,
                            OPERAND,
                            AFFINE,
                            OPERAND_ACTIVATION,
                            GATED,
                            OFFSET,
                            NORMALIZED,
                        )
                        tap = i * KERNEL_X + j
                        if FLIPPED:
                            tap = KERNEL_Y * KERNEL_X - 1 - tap
                        weight = load_vector(taps_ptr + tap * channels, c, in_channels)
                        if scale_ptr is not None:
                            weight *= load_vector(scale_ptr, c, in_channels)
                        total += weight * value
                state = _emit(
                    (total,),
                    bias,
                    state,
                    moments[0] + each * (out_y - first),
                    each,
                    out_lanes,
                    out_y,
                    out_x,
                    out_width,
                    channels,
                    COLUMNS,
                    ACTIVATION,
                    MEANS,
                    MOMENTS,
                )
        elif STREAMED:
            INPUTS: tl.constexpr = (COLUMNS - 1) * STRIDE_X + KERNEL_X
            DEPTH: tl.constexpr = (KERNEL_Y + STRIDE_Y - 1) // STRIDE_Y
            # A step takes the next STRIDE_Y rows of the input and finishes an output row. Steps
            # whose rows are all padding are left out.
            y = first * STRIDE_Y - top
            skipped = tl.minimum(tl.maximum(-y, 0) // STRIDE_Y, last - first + DEPTH - 1)
            steps = tl.minimum(
                last - first + DEPTH - 1, tl.maximum(tl.cdiv(height - y, STRIDE_Y), skipped)
            )
            y += skipped * STRIDE_Y
            out_y = first + skipped - (DEPTH - 1)
            sums = ()
            for _ in tl.static_range(DEPTH * COLUMNS):
                sums = sums + (zero,)
            offset = (y * width).to(tl.int64) * channels
            readable = tl.where((y >= 0) & (y < height), width, 0)
            row = load_row(in_lanes + offset, x, readable, channels, INPUTS)
            z_row = row
            if z_ptr is not None:
                z_row = load_row(z_lanes + offset, x, readable, channels, INPUTS)
            for _ in range(skipped, steps):
                sums = _shift(sums, zero, COLUMNS, DEPTH)
                for phase in tl.static_range(STRIDE_Y):
                    # The next row is on its way while this one is worked on.
                    values = operand_row(
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
                    y += 1
                    offset = (y * width).to(tl.int64) * channels
                    readable = tl.where((y >= 0) & (y < height), width, 0)
                    row = load_row(in_lanes + offset, x, readable, channels, INPUTS)
                    z_row = row
                    if z_ptr is not None:
                        z_row = load_row(z_lanes + offset, x, readable, channels, INPUTS)
                    # From the oldest on: each sum takes the place that the one before it left.
                    added = ()
                    for d in tl.static_range(DEPTH - 1, -1, -1):
                        part = ()
                        for s in tl.static_range(COLUMNS):
                            total = sums[d * COLUMNS + s]
                            if STRIDE_Y * d + phase < KERNEL_Y:
                                for j in tl.static_range(KERNEL_X):
                                    tap = taps[(STRIDE_Y * d + phase) * KERNEL_X + j]
                                    total += tap * values[s * STRIDE_X + j]
                            part = part + (total,)
                        added = part + added
                    sums = added
                if out_y >= first:
                    state = _emit_oldest(
                        sums,
                        bias,
                        state,
                        moments[0] + each * (out_y - first),
                        each,
                        out_lanes,
                        out_y,
                        out_x,
                        out_width,
                        channels,
                        COLUMNS,
                        DEPTH,
                        ACTIVATION,
                        MEANS,
                        MOMENTS,
                    )
                out_y += 1
            for y in range(out_y, last):  # rows whose windows see nothing but padding from here on
                sums = _shift(sums, zero, COLUMNS, DEPTH)
                if y >= first:
                    state = _emit_oldest(
                        sums,
                        bias,
                        state,
                        moments[0] + each * (y - first),
                        each,
                        out_lanes,
                        y,
                        out_x,
                        out_width,
                        channels,
                        COLUMNS,
                        DEPTH,
                        ACTIVATION,
                        MEANS,
                        MOMENTS,
                    )
        else:
            INPUTS: tl.constexpr = (COLUMNS - 1) * STRIDE_X + KERNEL_X
            for out_y in range(first, last):
                loaded = ()
                z_loaded = ()
                for i in tl.static_range(KERNEL_Y):
                    y = out_y * STRIDE_Y + i - top
                    offset = (y * width).to(tl.int64) * channels
                    readable = tl.where((y >= 0) & (y < height), width, 0)
                    row = load_row(in_lanes + offset, x, readable, channels, INPUTS)
                    loaded = loaded + (row,)
                    if z_ptr is not None:
                        row = load_row(z_lanes + offset, x, readable, channels, INPUTS)
                    z_loaded = z_loaded + (row,)
                totals = ()
                for _ in tl.static_range(COLUMNS):
                    totals = totals + (zero,)
                for i in tl.static_range(KERNEL_Y):
                    y = out_y * STRIDE_Y + i - top
                    values = operand_row(
                        loaded[i],
                        z_loaded[i],
                        vectors,
                        x,
                        tl.where((y >= 0) & (y < height), width, 0),
                        INPUTS,
                        OPERAND,
                        AFFINE,
                        OPERAND_ACTIVATION,
                        GATED,
                        OFFSET,
                        NORMALIZED,
                    )
                    added = ()
                    for s in tl.static_range(COLUMNS):
                        total = totals[s]
                        for j in tl.static_range(KERNEL_X):
                            total += taps[i * KERNEL_X + j] * values[s * STRIDE_X + j]
                        added = added + (total,)
                    totals = added
                state = _emit(
                    totals,
                    bias,
                    state,
                    moments[0] + each * (out_y - first),
                    each,
                    out_lanes,
                    out_y,
                    out_x,
                    out_width,
                    channels,
                    COLUMNS,
                    ACTIVATION,
                    MEANS,
                    MOMENTS,
                )

        if MEANS == "tile":  # all strips are of one image
            tiles_per_image = tl.cdiv(column_blocks, STRIPS)
            at = (tile // tiles_per_image).to(tl.int64) * (tiles_per_image * row_blocks)
            at += tile % tiles_per_image * row_blocks + item % row_blocks
            out_c = first_c + tl.arange(0, CHANNELS)
            tl.store(means_ptr + at * channels + out_c, tl.sum(state[0], 0), mask=out_c < channels)
        elif MEANS == "strip":
            at = lane.to(tl.int64) * row_blocks + item % row_blocks
            tl.store(means_ptr + at[:, None] * channels + c, state[0], mask=in_tile)
        moments = (moments[0] + each * (last - first), state[1], state[2])

    if MOMENTS:
        counted, mean, squares = tl.reduce(moments, 0, _merge)
        total = counted * mean
        out_c = first_c + tl.arange(0, CHANNELS)
        at = program * 2 * channels + out_c
        tl.store(moments_ptr + at, total, mask=out_c < channels)
        tl.store(moments_ptr + at + channels, squares, mask=out_c < channels)
        if first_c == 0:
            tl.store(counts_ptr + program, tl.max(counted, 0))


@triton.jit
def _merge(count, mean, squares, other_count, other_mean, other_squares):
    """Count, mean and Σ (value − mean)² of two blocks together (Chan, Golub and LeVeque)."""
    total = count + other_count
    share = other_count / tl.maximum(total, 1.0)
    distance = other_mean - mean
    squares += other_squares + distance * distance * count * share
    return total, mean + distance * share, squares


@triton.jit
def _shift(sums, zero, COLUMNS: tl.constexpr, DEPTH: tl.constexpr):
    """The sums of every row become those of the row before; a new row starts."""
    shifted = ()
    for _ in tl.static_range(COLUMNS):
        shifted = shifted + (zero,)
    for index in tl.static_range((DEPTH - 1) * COLUMNS):
        shifted = shifted + (sums[index],)
    return shifted


@triton.jit
def _emit_oldest(
    sums,
    bias,
    state,
    count,
    each,
    out_lanes,
    out_y,
    out_x,
    out_width,
    channels,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    ACTIVATION: tl.constexpr,
    MEANS: tl.constexpr,
    MOMENTS: tl.constexpr,
):
    totals = ()
    for s in tl.static_range(COLUMNS):
        totals = totals + (sums[(DEPTH - 1) * COLUMNS + s],)
    return _emit(
        totals,
        bias,
        state,
        count,
        each,
        out_lanes,
        out_y,
        out_x,
        out_width,
        channels,
        COLUMNS,
        ACTIVATION,
        MEANS,
        MOMENTS,
    )


@triton.jit
def _emit(
    totals,
    bias,
    state,
    count,
    each,
    out_lanes,
    out_y,
    out_x,
    out_width,
    channels,
    COLUMNS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    MEANS: tl.constexpr,
    MOMENTS: tl.constexpr,
):
    """Store a row of the strips; ``state`` (sum, mean, Σ (value − mean)²) grows by it.

    The mean is one of ``count`` values so far, to which each strip adds ``each``.
    """
    summed = state[0]
    mean = state[1]
    squares = state[2]
    lanes = out_lanes + (out_y * out_width).to(tl.int64) * channels
    values = ()
    row_sum = tl.zeros_like(summed)
    for s in tl.static_range(COLUMNS):
        inside = is_inside(out_x + s, out_width)
        value = activate(totals[s] + bias, ACTIVATION)
        tl.store(lanes + s * channels, rounded(value, lanes.dtype.element_ty), mask=inside)
        if MEANS != "none" or MOMENTS:
            row_sum += tl.where(inside, value, 0.0)
        values = values + (value,)
    if MEANS != "none":
        summed += row_sum
    if MOMENTS:
        # Row by row, so that nothing is lost to cancellation.
        row_mean = row_sum / tl.maximum(each, 1.0)
        row_squares = tl.zeros_like(summed)
        for s in tl.static_range(COLUMNS):
            distance = tl.where(is_inside(out_x + s, out_width), values[s] - row_mean, 0.0)
            row_squares += distance * distance
        _, mean, squares = _merge(count, mean, squares, each, row_mean, row_squares)
    return (summed, mean, squares)
