"""What the depthwise kernels share: rows of vectors that every thread owns, and their prologue.

A tensor of these kernels is one row of an image seen by one tile: [STRIPS, CHANNELS], where a
strip is a few neighbouring columns and every column is a tensor of its own, held in a tuple. A
thread so has the same few channels of all columns of its strip, and moving the window sideways
costs no instruction: it only takes another tensor.
"""

# mypy: ignore-errors
# (what is inside kernels is Triton's language, not Python's)

from __future__ import annotations

import triton
import triton.language as tl

from .language import forward_operand, gradient_operand


@triton.jit
def load_vector(vector_ptr, offsets, inside):
    """float32 values of a vector that may not be given."""
    if vector_ptr is None:
        return 0.0
    else:
        return tl.load(vector_ptr + offsets, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def load_row(lanes, x, width, channels, COLUMNS: tl.constexpr):
    """``COLUMNS`` neighbours from column ``x`` on, zero outside [0, width).

    ``x`` is far outside where the tile is; with width 0 nothing is read.
    """
    values = ()
    for column in tl.static_range(COLUMNS):
        inside = is_inside(x + column, width)
        values = values + (tl.load(lanes + column * channels, mask=inside, other=0.0),)
    return values


@triton.jit
def load_taps(taps_ptr, scale_ptr, c, inside, channels, COUNT: tl.constexpr, FLIPPED: tl.constexpr):
    """The window's taps, times ``scale``; ``FLIPPED``: the last one first."""
    scale = load_vector(scale_ptr, c, inside)
    taps = ()
    for index in tl.static_range(COUNT):
        tap = load_vector(taps_ptr + index * channels, c, inside)
        if scale_ptr is not None:
            tap *= scale
        taps = (tap,) + taps if FLIPPED else taps + (tap,)
    return taps


@triton.jit
def is_inside(x, width):
    """0 <= x < width, in one comparison."""
    return x.to(tl.uint32, bitcast=True) < width.to(tl.uint32)


@triton.jit
def operand_vectors(
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
):
    """What `operand` is given besides values: vectors over channels, two of them an image's own."""
    return (
        load_vector(scale_ptr, c, inside),
        load_vector(shift_ptr, c, inside),
        load_vector(gate_ptr, image_c, inside),
        load_vector(offset_ptr, image_c, inside),
        load_vector(factor_ptr, c, inside),
        load_vector(slope_ptr, c, inside),
        load_vector(constant_ptr, c, inside),
    )


@triton.jit
def operand(
    value,
    z,
    vectors,
    inside,
    OPERAND: tl.constexpr,
    AFFINE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    OFFSET: tl.constexpr,
    NORMALIZED: tl.constexpr,
):
    """`operands.Forward` or `operands.Gradient` of a loaded value; padding stays zero after it."""
    value = value.to(tl.float32)
    if OPERAND == "forward":
        value = forward_operand(
            value, vectors[0], vectors[1], vectors[2], AFFINE, ACTIVATION, GATED
        )
        value = tl.where(inside, value, 0.0)
    elif OPERAND == "gradient":
        value = gradient_operand(
            value,
            z.to(tl.float32),
            vectors[0],
            vectors[1],
            vectors[2],
            vectors[3],
            vectors[4],
            vectors[5],
            vectors[6],
            AFFINE,
            ACTIVATION,
            GATED,
            OFFSET,
            NORMALIZED,
        )
        value = tl.where(inside, value, 0.0)
    else:
        tl.static_assert(OPERAND == "plain")
    return value


@triton.jit
def operand_row(
    row,
    z_row,
    vectors,
    x,
    width,
    COLUMNS: tl.constexpr,
    OPERAND: tl.constexpr,
    AFFINE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    OFFSET: tl.constexpr,
    NORMALIZED: tl.constexpr,
):
    """`operand` of every column of a loaded row."""
    values = ()
    for column in tl.static_range(COLUMNS):
        values = values + (
            operand(
                row[column],
                z_row[column],
                vectors,
                is_inside(x + column, width),
                OPERAND,
                AFFINE,
                ACTIVATION,
                GATED,
                OFFSET,
                NORMALIZED,
            ),
        )
    return values
