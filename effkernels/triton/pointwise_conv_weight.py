"""The weight gradient of 1×1 convolutions, and any gradient written out.

    matrix gradient[k, c] = Σ_p G(upstream)[p, k] · F(input)[p, c]       bias gradient = Σ_p G[p, k]

over the rows (pixels) p, G an `operands.Gradient` and F an `operands.Forward`, both recomputed as
they are read.

Layout: NHWC, [rows, K] and [rows, C]; the result is [K, C] float32.
Moves: both tensors (and G's z) once from memory: neighbouring programs have the same rows and other
tiles of the matrix, so that the rest comes from the L2 cache. At batch 256 and 2 bytes B0's
expansion 192 → 1152 at 7 × 7 reads 34 MB (11 µs on an H100 at 3.0 TB/s; 5.5 GFLOP are 7 µs).
Idea: a tile of [K, C] is small and the sum is long, so the rows are split among programs, each
writes its sum, and `reduce.totals` adds them in order: the same bits every time.
The bias gradient is summed elementwise from the float32 values of G and reduced once at the end; a
product with a column of ones would round them first.

Seen in the compiler's output (no GPU has run this): wgmma on sm_90 for two-byte types with 64
outputs or more, 80 to 128 registers in eight warps. Lost: 64 rows a step through a prologue (255
registers and spills; of 32: 128), and wgmma for float32, whose operands it wants transposed (copies
of 4 bytes into shared memory): two warps make the compiler take mma.sync and copies of 16 bytes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..operands import Forward, Gradient
from . import reduce
from .language import dot, kernel, rounded, row_offsets
from .launch import device_of, is_wide, launch, product_precision, vector_width
from .pointwise_conv_config import (
    WeightConfig,
    WeightProblem,
    weight_candidates,
    weight_heuristic,
)
from .pointwise_conv_operand import (
    images_of_a_tile,
    load_operand,
    operand_of,
)
from .tune import choose


@kernel
def _weight_gradient_kernel(
    result_ptr,
    bias_ptr,
    upstream_ptr,
    z_ptr,
    scale_ptr,
    shift_ptr,
    gate_ptr,
    offset_ptr,
    factor_ptr,
    slope_ptr,
    constant_ptr,
    input_ptr,
    unused_ptr,
    in_scale_ptr,
    in_shift_ptr,
    in_gate_ptr,
    in_offset_ptr,
    in_factor_ptr,
    in_slope_ptr,
    in_constant_ptr,
    total_rows,
    images,
    pixels,
    channel_vectors,
    output_vectors,
    split_rows,
    VECTOR: tl.constexpr,
    OUTPUT_VECTOR: tl.constexpr,
    PROLOGUE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    IN_PROLOGUE: tl.constexpr,
    IN_ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    IMAGES: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    WIDE: tl.constexpr,
):
    channels = channel_vectors * VECTOR
    outputs = output_vectors * OUTPUT_VECTOR
    channel_tiles = tl.cdiv(channels, BLOCK_CHANNELS)
    tiles = tl.cdiv(outputs, BLOCK_OUTPUTS) * channel_tiles
    split = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    c = tile % channel_tiles * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    k = tile // channel_tiles * BLOCK_OUTPUTS + tl.arange(0, BLOCK_OUTPUTS)
    TYPE: tl.constexpr = input_ptr.dtype.element_ty
    if WIDE:
        split = split.to(tl.int64)
    first_row = split * split_rows
    last_row = tl.minimum(first_row + split_rows, total_rows)
    total = tl.zeros([BLOCK_OUTPUTS, BLOCK_CHANNELS], tl.float32)
    bias_total = tl.zeros([BLOCK_ROWS, BLOCK_OUTPUTS], tl.float32)
    for start in range(first_row, last_row, BLOCK_ROWS):
        rows = start + tl.arange(0, BLOCK_ROWS)
        inside_rows = rows < last_row
        image = rows // pixels
        first_image = start // pixels
        gradient = load_operand(
            upstream_ptr,
            z_ptr,
            scale_ptr,
            shift_ptr,
            gate_ptr,
            offset_ptr,
            factor_ptr,
            slope_ptr,
            constant_ptr,
            row_offsets(rows, outputs, WIDE),
            inside_rows,
            image,
            first_image,
            images,
            k,
            outputs,
            PROLOGUE,
            ACTIVATION,
            IMAGES,
        )
        if PROLOGUE != "plain":
            # The other side's rows are not zero out there, if something is added to it.
            gradient = tl.where(inside_rows[:, None], gradient, 0.0)
        if bias_ptr is not None:
            bias_total += gradient.to(tl.float32)
        value = load_operand(
            input_ptr,
            unused_ptr,
            in_scale_ptr,
            in_shift_ptr,
            in_gate_ptr,
            in_offset_ptr,
            in_factor_ptr,
            in_slope_ptr,
            in_constant_ptr,
            row_offsets(rows, channels, WIDE),
            inside_rows,
            image,
            first_image,
            images,
            c,
            channels,
            IN_PROLOGUE,
            IN_ACTIVATION,
            IMAGES,
        )
        total = dot(tl.trans(rounded(gradient, TYPE)), rounded(value, TYPE), total, PRECISION)
    inside = (k < outputs)[:, None] & (c < channels)[None, :]
    offsets = row_offsets(split * outputs + k, channels, WIDE)[:, None] + c[None, :]
    tl.store(result_ptr + offsets, total, mask=inside)
    if bias_ptr is not None:
        mask = (k < outputs) & (tile % channel_tiles == 0)
        tl.store(bias_ptr + split * outputs + k, tl.sum(bias_total, 0), mask=mask)


@kernel
def _materialize_kernel(
    output_ptr,
    input_ptr,
    z_ptr,
    scale_ptr,
    shift_ptr,
    gate_ptr,
    offset_ptr,
    factor_ptr,
    slope_ptr,
    constant_ptr,
    total_rows,
    images,
    pixels,
    channel_vectors,
    VECTOR: tl.constexpr,
    PROLOGUE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    WIDE: tl.constexpr,
):
    channels = channel_vectors * VECTOR
    channel_tiles = tl.cdiv(channels, BLOCK_CHANNELS)
    c = tl.program_id(0) % channel_tiles * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    tile = tl.program_id(0) // channel_tiles
    if WIDE:
        tile = tile.to(tl.int64)
    rows = tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    inside_rows = rows < total_rows
    row_offset = row_offsets(rows, channels, WIDE)
    value = load_operand(
        input_ptr,
        z_ptr,
        scale_ptr,
        shift_ptr,
        gate_ptr,
        offset_ptr,
        factor_ptr,
        slope_ptr,
        constant_ptr,
        row_offset,
        inside_rows,
        rows // pixels,
        tile * BLOCK_ROWS // pixels,
        images,
        c,
        channels,
        PROLOGUE,
        ACTIVATION,
        0,
    )
    inside = inside_rows[:, None] & (c < channels)[None, :]
    value = rounded(value, output_ptr.dtype.element_ty)
    tl.store(output_ptr + row_offset[:, None] + c[None, :], value, mask=inside)


def weight_gradient(
    upstream: Tensor | None,
    gradient: Gradient,
    input: Tensor,
    forward: Forward,
    bias: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Gᵀ · F over all pixels, [K, C] float32, and with ``bias`` also the column sums of G, [K].

    Args:
        upstream: [N, K, H, W] channels_last; None (zeros) if ``gradient.z`` is given.
        gradient: what is made of ``upstream``.
        input: [N, C, H, W] channels_last.
        forward: what is made of ``input``.
    """
    like = upstream if upstream is not None else gradient.z
    assert like is not None
    images, channels, height, width = input.shape
    outputs, pixels, rows = like.shape[1], height * width, images * height * width
    inner, outer = operand_of(input, forward), operand_of(upstream, gradient)
    device = device_of(input)
    problem = WeightProblem(
        rows, pixels, channels, outputs, input.element_size(), outer.key, inner.key, bias
    )

    def run(config: WeightConfig) -> tuple[Tensor, Tensor | None]:
        # A split is a whole number of steps; the last may be shorter, none is empty.
        steps = triton.cdiv(rows, config.block_rows)
        split_rows = max(1, triton.cdiv(steps, config.splits)) * config.block_rows
        splits = max(1, triton.cdiv(rows, split_rows))

        def empty(*size: int) -> Tensor:
            return torch.empty(size, dtype=torch.float32, device=input.device)

        partials = empty(splits, outputs, channels)
        bias_partials = empty(splits, outputs) if bias else None
        vector = vector_width(input.dtype, channels)
        output_vector = vector_width(input.dtype, outputs)
        tiles = triton.cdiv(outputs, config.block_outputs) * triton.cdiv(
            channels, config.block_channels
        )
        varies = inner.varies or outer.varies
        launch(
            _weight_gradient_kernel,
            (splits * tiles,),
            partials,
            bias_partials,
            *outer.pointers,
            *inner.pointers,
            rows,
            images,
            pixels,
            channels // vector,
            outputs // output_vector,
            split_rows,
            VECTOR=vector,
            OUTPUT_VECTOR=output_vector,
            PROLOGUE=outer.prologue,
            ACTIVATION=outer.activation,
            IN_PROLOGUE=inner.prologue,
            IN_ACTIVATION=inner.activation,
            PRECISION=product_precision(input.dtype),
            IMAGES=images_of_a_tile(config.block_rows, pixels, images) if varies else 1,
            BLOCK_OUTPUTS=config.block_outputs,
            BLOCK_CHANNELS=config.block_channels,
            BLOCK_ROWS=config.block_rows,
            WIDE=is_wide(input, like, partials),
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            max_registers=config.max_registers,
        )
        if splits == 1:
            return partials[0], None if bias_partials is None else bias_partials[0]
        result = reduce.totals(partials.view(1, splits, -1)).view(outputs, channels)
        if bias_partials is None:
            return result, None
        return result, reduce.totals(bias_partials.view(1, splits, -1)).view(outputs)

    return run(
        choose("pointwise_conv_weight", problem, device, weight_heuristic, weight_candidates, run)
    )


def materialize(upstream: Tensor | None, gradient: Gradient) -> Tensor:
    """``gradient`` of ``upstream`` [N, K, H, W] channels_last, written out in its dtype."""
    like = upstream if upstream is not None else gradient.z
    assert like is not None
    images, channels, height, width = like.shape
    operand = operand_of(upstream, gradient)
    output = torch.empty_like(like)
    vector = vector_width(like.dtype, channels)
    # 2048 or 1024 values in 128 threads: two accesses of 16 bytes a thread and tensor.
    block_channels = min(64, max(16, triton.next_power_of_2(channels)))
    block_rows = 256 * vector_width(like.dtype) // block_channels
    launch(
        _materialize_kernel,
        (triton.cdiv(images * height * width, block_rows) * triton.cdiv(channels, block_channels),),
        output,
        *operand.pointers,
        images * height * width,
        images,
        height * width,
        channels // vector,
        VECTOR=vector,
        PROLOGUE=operand.prologue,
        ACTIVATION=operand.activation,
        BLOCK_ROWS=block_rows,
        BLOCK_CHANNELS=block_channels,
        WIDE=is_wide(like),
    )
    return output
