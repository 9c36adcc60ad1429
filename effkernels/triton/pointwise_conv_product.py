"""The product of 1×1 convolutions: rows (pixels) × channels, with prologue and epilogue.

    output[p, k] = activation(scale[k] · Σ_c F(input)[p, c] · matrix[k, c] + bias[k]
                              + residual[p, k])

and from the same pass the spatial mean of the output, its batch statistics, or its sum against
another tensor. F is an `operands.Forward` (the forward pass) or `operands.Gradient` (the input
gradient, with the matrix [c, k]).

Layout: NHWC, [rows, C] and [rows, K] with rows = N·H·W; 16-byte accesses where C and K allow.
Moves: input, residual and output once, the matrix from the L2 cache once a tile of rows. At batch
256 and 2 bytes, B0's expansion 16 → 96 at 112 × 112 moves 719 MB: 240 µs on an H100 (3.0 TB/s), its
10 GFLOP 12 µs; its projection 1152 → 192 at 7 × 7 moves 34 MB: 11 µs, its 5.5 GFLOP 7 µs.

Three ways to go over it:
- Tiles: a program has one tile of the output and loops over the channels, loads running ahead of
  the tensor cores. Programs of the same rows and different outputs are neighbours, so that the
  input comes from memory once; the matrix is at most 5 MB and stays in the L2 cache.
- Streams, where all channels are one step (C ≤ 64, the layers with the most pixels): a program
  keeps its columns of the matrix and goes over tiles of rows. There is no loop over channels to run
  ahead in, so it runs ahead over tiles: the next one's input arrives during this one's epilogue.
  Batch statistics are merged on the way, one partial result a program instead of one a tile.
- Splits, where there are too few tiles to fill the device (batch 1): several programs share the
  channels of a tile and leave float32 sums, which a second kernel adds in order, with the epilogue.

Rows of several images share a tile: with tiles that end where 7 × 7 images do, a quarter of every
tile would be empty. The mean is summed for each image that a tile touches, into as many places as
tiles can touch an image, and added up by `reduce.totals`.

Seen in the compiler's output, by which the sizes were chosen (no GPU has run this): on sm_90 all
tiles of 64 and 128 rows run on wgmma, a prologue's operand from registers; the plain 128 × 128 × 64
tile needs 99 registers and 96 KB, two blocks of eight warps to a processor.
- Lost: 128 × 64 tiles in four warps (130 to 180 registers, eight or twelve warps to a processor;
  in eight warps 64 to 90). Streams 128 wide (133 to 182 registers). Steps of 64 channels through a
  prologue (185, of 32: 128). The gate as a tile of its own (twice the reads from the L2 cache).
  tf32 with the matrix as [c, k]: copies of 4 bytes each into shared memory, so it is transposed
  first. No limit of registers: spills of 8 to 24 bytes in a dozen of the kernels for sm_100.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..operands import Forward, Gradient
from . import reduce
from .language import activate, dot, forward_operand, kernel, rounded, row_offsets
from .launch import device_of, is_wide, launch, product_precision, vector_width
from .pointwise_conv_config import (
    FINISH_OUTPUTS,
    FINISH_ROWS,
    ProductConfig,
    ProductProblem,
    product_candidates,
    product_heuristic,
)
from .pointwise_conv_operand import (
    NO_OPERAND,
    images_of_a_tile,
    load_operand,
    operand_of,
    per_image,
)
from .tune import choose


@triton.jit
def _epilogue(
    accumulator,
    tile,
    rows,
    inside_rows,
    image,
    first_image,
    images,
    pixels,
    total_rows,
    k,
    outputs,
    slots,
    mean_factor,
    output_ptr,
    sums_ptr,
    scale,
    bias,
    residual_ptr,
    gate_ptr,
    other_ptr,
    other_scale_ptr,
    other_shift_ptr,
    ACTIVATION: tl.constexpr,
    OTHER_ACTIVATION: tl.constexpr,
    IMAGES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Everything after the product; gives the output's values, float32, before ``gate``."""
    inside_k = k < outputs
    inside = inside_rows[:, None] & inside_k[None, :]
    offsets = row_offsets(rows, outputs, WIDE)[:, None] + k[None, :]
    value = accumulator
    if scale is not None:
        value *= scale[None, :]
    if bias is not None:
        value += bias[None, :]
    if residual_ptr is not None:
        value += tl.load(residual_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    value = activate(value, ACTIVATION)

    if sums_ptr is not None:
        summand = value
        if other_ptr is not None:
            other = tl.load(other_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
            other_scale, other_shift = 1.0, 0.0
            if other_scale_ptr is not None:
                other_scale = tl.load(other_scale_ptr + k, mask=inside_k, other=0.0)[None, :]
                other_shift = tl.load(other_shift_ptr + k, mask=inside_k, other=0.0)[None, :]
            summand *= forward_operand(
                other,
                other_scale,
                other_shift,
                1.0,
                AFFINE=other_scale_ptr is not None,
                ACTIVATION=OTHER_ACTIVATION,
                GATED=False,
            )
        last_image = tl.minimum((tile + 1) * BLOCK_ROWS, total_rows) - 1
        last_image = last_image // pixels
        for n in range(first_image, last_image + 1):
            of_image = (image == n) & inside_rows
            total = tl.sum(tl.where(of_image[:, None], summand, 0.0), 0) * mean_factor
            slot = tile - n * pixels // BLOCK_ROWS
            place = sums_ptr + (n * slots + slot) * outputs + k
            tl.store(place, total, mask=inside_k)
            # An image touches `slots` tiles or one less: then its last tile fills the last place.
            is_last = tile == ((n + 1) * pixels - 1) // BLOCK_ROWS
            unused = is_last & (slot + 1 < slots)
            tl.store(place + outputs, tl.zeros_like(total), mask=inside_k & unused)

    stored = value
    if gate_ptr is not None:
        stored *= per_image(gate_ptr, image, first_image, images, k, inside_k, outputs, IMAGES)
    if output_ptr is not None:
        stored = rounded(stored, output_ptr.dtype.element_ty)
        tl.store(output_ptr + offsets, stored, mask=inside)
    return value


@triton.jit
def _load_vector(vector_ptr, k, outputs):
    """[k] float32, or None if there is none."""
    if vector_ptr is None:
        vector = None
    else:
        vector = tl.load(vector_ptr + k, mask=k < outputs, other=0.0).to(tl.float32)
    return vector


@triton.jit
def _moments_of_tile(value, inside_rows):
    """Count, sums and sums of squared distances from the tile's mean, by column."""
    count = tl.sum(inside_rows.to(tl.float32), 0)
    sums = tl.sum(tl.where(inside_rows[:, None], value, 0.0), 0)
    distance = tl.where(inside_rows[:, None], value - (sums / count)[None, :], 0.0)
    return count, sums, tl.sum(distance * distance, 0)


@triton.jit
def _store_moments(counts_ptr, moments_ptr, part, count, sums, squares, k, outputs):
    place = moments_ptr + part * 2 * outputs + k
    tl.store(place, sums, mask=k < outputs)
    tl.store(place + outputs, squares, mask=k < outputs)
    tl.store(counts_ptr + part, count)  # the same from every program of these rows


@triton.jit
def _load_matrix(matrix_ptr, c, k, channels, outputs, TRANSPOSED: tl.constexpr):
    """[c, k] of the matrix [outputs, channels], or [channels, outputs] where it is transposed."""
    inside = (c < channels)[:, None] & (k < outputs)[None, :]
    if TRANSPOSED:
        offsets = c[:, None] * outputs + k[None, :]
    else:
        offsets = c[:, None] + k[None, :] * channels
    return tl.load(matrix_ptr + offsets, mask=inside, other=0.0)


@kernel
def _product_kernel(
    output_ptr,
    sums_ptr,
    counts_ptr,
    moments_ptr,
    partials_ptr,
    input_ptr,
    z_ptr,
    in_scale_ptr,
    in_shift_ptr,
    in_gate_ptr,
    in_offset_ptr,
    in_factor_ptr,
    in_slope_ptr,
    in_constant_ptr,
    matrix_ptr,
    scale_ptr,
    bias_ptr,
    residual_ptr,
    gate_ptr,
    other_ptr,
    other_scale_ptr,
    other_shift_ptr,
    total_rows,
    images,
    pixels,
    channel_vectors,
    output_vectors,
    slots,
    mean_factor,
    splits,
    VECTOR: tl.constexpr,
    OUTPUT_VECTOR: tl.constexpr,
    PROLOGUE: tl.constexpr,
    IN_ACTIVATION: tl.constexpr,
    ACTIVATION: tl.constexpr,
    OTHER_ACTIVATION: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    PRECISION: tl.constexpr,
    STREAM: tl.constexpr,
    IMAGES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    WIDE: tl.constexpr,
):
    channels = channel_vectors * VECTOR
    outputs = output_vectors * OUTPUT_VECTOR
    TYPE: tl.constexpr = matrix_ptr.dtype.element_ty
    output_tiles = tl.cdiv(outputs, BLOCK_OUTPUTS)
    k = tl.program_id(0) % output_tiles * BLOCK_OUTPUTS + tl.arange(0, BLOCK_OUTPUTS)
    c = tl.arange(0, BLOCK_CHANNELS)
    if STREAM:
        scale = _load_vector(scale_ptr, k, outputs)
        bias = _load_vector(bias_ptr, k, outputs)
        part = tl.program_id(0) // output_tiles
        parts = tl.num_programs(0) // output_tiles
        if WIDE:
            part = part.to(tl.int64)
        matrix = _load_matrix(matrix_ptr, c, k, channels, outputs, TRANSPOSED)
        count = 0.0
        sums = tl.zeros([BLOCK_OUTPUTS], tl.float32)
        squares = tl.zeros([BLOCK_OUTPUTS], tl.float32)
        for tile in tl.range(part, tl.cdiv(total_rows, BLOCK_ROWS), parts):
            rows = tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
            inside_rows = rows < total_rows
            image = rows // pixels
            first_image = tile * BLOCK_ROWS // pixels
            value = load_operand(
                input_ptr,
                z_ptr,
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
                PROLOGUE,
                IN_ACTIVATION,
                IMAGES,
            )
            operand = rounded(value, TYPE)
            accumulator = tl.zeros([BLOCK_ROWS, BLOCK_OUTPUTS], tl.float32)
            accumulator = dot(operand, matrix, accumulator, PRECISION)
            value = _epilogue(
                accumulator,
                tile,
                rows,
                inside_rows,
                image,
                first_image,
                images,
                pixels,
                total_rows,
                k,
                outputs,
                slots,
                mean_factor,
                output_ptr,
                sums_ptr,
                scale,
                bias,
                residual_ptr,
                gate_ptr,
                other_ptr,
                other_scale_ptr,
                other_shift_ptr,
                ACTIVATION,
                OTHER_ACTIVATION,
                IMAGES,
                BLOCK_ROWS,
                WIDE,
            )
            if moments_ptr is not None:
                tile_count, tile_sums, tile_squares = _moments_of_tile(value, inside_rows)
                both = count + tile_count
                distance = tile_sums / tile_count - sums / tl.maximum(count, 1.0)
                squares += tile_squares + distance * distance * (count * tile_count / both)
                sums += tile_sums
                count = both
        if moments_ptr is not None:
            _store_moments(counts_ptr, moments_ptr, part, count, sums, squares, k, outputs)
    else:
        tile = tl.program_id(0) // output_tiles
        split = tile % splits
        tile = tile // splits
        if WIDE:
            tile, split = tile.to(tl.int64), split.to(tl.int64)
        rows = tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        inside_rows = rows < total_rows
        image = rows // pixels
        first_image = tile * BLOCK_ROWS // pixels
        steps = tl.cdiv(tl.cdiv(channels, BLOCK_CHANNELS), splits)
        first_step = (split * steps).to(tl.int32)
        last_step = tl.minimum(first_step + steps, tl.cdiv(channels, BLOCK_CHANNELS))
        accumulator = tl.zeros([BLOCK_ROWS, BLOCK_OUTPUTS], tl.float32)
        row_offset = row_offsets(rows, channels, WIDE)
        for step in range(first_step, last_step):
            value = load_operand(
                input_ptr,
                z_ptr,
                in_scale_ptr,
                in_shift_ptr,
                in_gate_ptr,
                in_offset_ptr,
                in_factor_ptr,
                in_slope_ptr,
                in_constant_ptr,
                row_offset,
                inside_rows,
                image,
                first_image,
                images,
                step * BLOCK_CHANNELS + c,
                channels,
                PROLOGUE,
                IN_ACTIVATION,
                IMAGES,
            )
            operand = rounded(value, TYPE)
            matrix = _load_matrix(
                matrix_ptr, step * BLOCK_CHANNELS + c, k, channels, outputs, TRANSPOSED
            )
            accumulator = dot(operand, matrix, accumulator, PRECISION)
        if partials_ptr is not None:
            offsets = row_offsets(split * total_rows + rows, outputs, WIDE)[:, None] + k[None, :]
            inside = inside_rows[:, None] & (k < outputs)[None, :]
            tl.store(partials_ptr + offsets, accumulator, mask=inside)
        else:
            scale = _load_vector(scale_ptr, k, outputs)
            bias = _load_vector(bias_ptr, k, outputs)
            value = _epilogue(
                accumulator,
                tile,
                rows,
                inside_rows,
                image,
                first_image,
                images,
                pixels,
                total_rows,
                k,
                outputs,
                slots,
                mean_factor,
                output_ptr,
                sums_ptr,
                scale,
                bias,
                residual_ptr,
                gate_ptr,
                other_ptr,
                other_scale_ptr,
                other_shift_ptr,
                ACTIVATION,
                OTHER_ACTIVATION,
                IMAGES,
                BLOCK_ROWS,
                WIDE,
            )
            if moments_ptr is not None:
                count, sums, squares = _moments_of_tile(value, inside_rows)
                _store_moments(counts_ptr, moments_ptr, tile, count, sums, squares, k, outputs)


@kernel
def _finish_kernel(
    output_ptr,
    sums_ptr,
    counts_ptr,
    moments_ptr,
    partials_ptr,
    scale_ptr,
    bias_ptr,
    residual_ptr,
    gate_ptr,
    other_ptr,
    other_scale_ptr,
    other_shift_ptr,
    total_rows,
    images,
    pixels,
    output_vectors,
    slots,
    mean_factor,
    splits,
    OUTPUT_VECTOR: tl.constexpr,
    ACTIVATION: tl.constexpr,
    OTHER_ACTIVATION: tl.constexpr,
    IMAGES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """The sums of `_product_kernel`'s splits, and its epilogue."""
    outputs = output_vectors * OUTPUT_VECTOR
    output_tiles = tl.cdiv(outputs, BLOCK_OUTPUTS)
    k = tl.program_id(0) % output_tiles * BLOCK_OUTPUTS + tl.arange(0, BLOCK_OUTPUTS)
    tile = tl.program_id(0) // output_tiles
    if WIDE:
        tile = tile.to(tl.int64)
    rows = tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    inside_rows = rows < total_rows
    inside = inside_rows[:, None] & (k < outputs)[None, :]
    total = tl.zeros([BLOCK_ROWS, BLOCK_OUTPUTS], tl.float32)
    for split in range(splits):
        offsets = row_offsets(split * total_rows + rows, outputs, WIDE)[:, None] + k[None, :]
        total += tl.load(partials_ptr + offsets, mask=inside, other=0.0)
    scale = _load_vector(scale_ptr, k, outputs)
    bias = _load_vector(bias_ptr, k, outputs)
    value = _epilogue(
        total,
        tile,
        rows,
        inside_rows,
        rows // pixels,
        tile * BLOCK_ROWS // pixels,
        images,
        pixels,
        total_rows,
        k,
        outputs,
        slots,
        mean_factor,
        output_ptr,
        sums_ptr,
        scale,
        bias,
        residual_ptr,
        gate_ptr,
        other_ptr,
        other_scale_ptr,
        other_shift_ptr,
        ACTIVATION,
        OTHER_ACTIVATION,
        IMAGES,
        BLOCK_ROWS,
        WIDE,
    )
    if moments_ptr is not None:
        count, sums, squares = _moments_of_tile(value, inside_rows)
        _store_moments(counts_ptr, moments_ptr, tile, count, sums, squares, k, outputs)


class Product(NamedTuple):
    """What `product` was asked for; None where it was not."""

    output: Tensor | None  # [N, K, H, W] channels_last, in the matrix's dtype
    mean: Tensor | None  # [N, K] float32, over the pixels
    moments: tuple[Tensor, Tensor] | None  # mean and biased variance over N, H, W: [K] float32
    correlation: Tensor | None  # [N, K] float32


def product(
    input: Tensor | None,
    matrix: Tensor,
    operand: Forward | Gradient = Forward(),  # noqa: B008 (a tuple of None)
    *,
    transposed: bool = False,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
    mean: bool = False,
    moments: bool = False,
    store: bool = True,
    correlate: Tensor | None = None,
    correlate_operand: Forward = Forward(),  # noqa: B008
    gate: Tensor | None = None,
) -> Product:
    """activation(scale · operand(input) · matrixᵀ + bias + residual), and what goes with it.

    Args:
        input: [N, C, H, W] channels_last: an `operands.Forward`'s z, an `operands.Gradient`'s
            upstream. The latter may be None (zero) if its z is given.
        matrix: [K, C] contiguous, or [C, K] if ``transposed``, in ``input``'s dtype.
        operand: what is made of the input on the way. ``Gradient.factor`` may come without
            ``slope`` and ``constant``.
        scale, bias: [K], any of the three dtypes.
        residual: [N, K, H, W] channels_last.
        mean: whether the output's spatial mean is wanted, not together with ``correlate``.
        moments: whether its batch statistics are.
        store: whether the output itself is.
        correlate: [N, K, H, W] channels_last: also sum output · F(correlate) over the pixels, F
            being ``correlate_operand`` (without a gate).
        gate: [N, K]: multiplies what is stored, after mean, moments and correlation were taken.
    """
    assert not (mean and correlate is not None)
    like = input if input is not None else operand.z  # type: ignore[union-attr]
    assert like is not None
    images, channels, height, width = like.shape
    outputs = matrix.shape[1 if transposed else 0]
    pixels, rows = height * width, images * height * width
    matrix = matrix.contiguous()
    if transposed and matrix.dtype == torch.float32:
        # sm_90's tensor cores want tf32 with the channels side by side: otherwise every program
        # would copy its part of the matrix 4 bytes at a time.
        matrix, transposed = matrix.t().contiguous(), False
    inner = operand_of(input, operand)
    other = NO_OPERAND if correlate is None else operand_of(correlate, correlate_operand)
    device = device_of(like)
    problem = ProductProblem(
        rows,
        pixels,
        channels,
        outputs,
        like.element_size(),
        inner.key,
        activation,
        residual is not None,
        mean,
        correlate is not None,
        moments,
        store,
    )

    def run(config: ProductConfig) -> Product:
        split = config.splits > 1
        row_tiles = triton.cdiv(rows, config.block_rows)
        output_tiles = triton.cdiv(outputs, config.block_outputs)
        parts = row_tiles  # programs of the same outputs
        if config.stream:
            parts = min(row_tiles, max(1, device.processors * config.resident // output_tiles))
        # What runs the epilogue: tiles of so many rows, and how many leave moments.
        last_rows = FINISH_ROWS if split else config.block_rows
        last_parts = triton.cdiv(rows, last_rows) if split else parts
        slots = max(1, min((pixels - 2) // last_rows + 2, triton.cdiv(rows, last_rows)))

        def empty(*size: int) -> Tensor:
            return torch.empty(size, dtype=torch.float32, device=like.device)

        output = sums = counts = partial_moments = partials = None
        if store:
            output = torch.empty(
                (images, outputs, height, width),
                dtype=matrix.dtype,
                device=like.device,
                memory_format=torch.channels_last,
            )
        if mean or correlate is not None:
            sums = empty(images, slots, outputs)
        if moments:
            counts, partial_moments = empty(last_parts), empty(last_parts, 2, outputs)
        if split:
            partials = empty(config.splits, rows, outputs)
        factor = 1.0 / pixels if mean else 1.0
        results = (output, sums, counts, partial_moments)
        vectors = (scale, bias, residual, gate, other.pointers[0], *other.pointers[2:4])
        sizes = (slots, factor if slots == 1 else 1.0)
        constants: dict[str, Any] = {
            "OUTPUT_VECTOR": vector_width(matrix.dtype, outputs),
            "WIDE": is_wide(like, output, residual, correlate, partials),
        }
        epilogue: dict[str, Any] = {
            "ACTIVATION": activation,
            "OTHER_ACTIVATION": other.activation,
        }
        vector = vector_width(matrix.dtype, channels)
        varies = inner.varies or (gate is not None and not split)
        launch(
            _product_kernel,
            (parts * output_tiles * config.splits,),
            *((None,) * len(results) if split else results),
            partials,
            *inner.pointers,
            matrix,
            *((None,) * len(vectors) if split else vectors),
            rows,
            images,
            pixels,
            channels // vector,
            outputs // constants["OUTPUT_VECTOR"],
            *sizes,
            config.splits,
            VECTOR=vector,
            PROLOGUE=inner.prologue,
            IN_ACTIVATION=inner.activation,
            TRANSPOSED=transposed,
            PRECISION=product_precision(matrix.dtype),
            STREAM=config.stream,
            IMAGES=images_of_a_tile(config.block_rows, pixels, images) if varies else 1,
            BLOCK_ROWS=config.block_rows,
            BLOCK_OUTPUTS=config.block_outputs,
            BLOCK_CHANNELS=config.block_channels,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            max_registers=config.max_registers,
            **constants,
            **(dict.fromkeys(epilogue, "none") if split else epilogue),
        )
        if split:
            launch(
                _finish_kernel,
                (last_parts * triton.cdiv(outputs, FINISH_OUTPUTS),),
                *results,
                partials,
                *vectors,
                rows,
                images,
                pixels,
                outputs // constants["OUTPUT_VECTOR"],
                *sizes,
                config.splits,
                IMAGES=images_of_a_tile(last_rows, pixels, images) if gate is not None else 1,
                BLOCK_ROWS=last_rows,
                BLOCK_OUTPUTS=FINISH_OUTPUTS,
                num_warps=4,
                **constants,
                **epilogue,
            )
        if sums is not None:
            sums = sums[:, 0] if slots == 1 else reduce.totals(sums, factor)
        statistics = None
        if counts is not None and partial_moments is not None:
            statistics = reduce.moments(counts, partial_moments, rows)
        return Product(output, sums if mean else None, statistics, None if mean else sums)

    return run(
        choose("pointwise_conv", problem, device, product_heuristic, product_candidates, run)
    )
