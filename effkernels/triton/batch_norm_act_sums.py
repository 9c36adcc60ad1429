"""BatchNorm's reductions over rows, and the vectors made of them.

    statistics:      mean[c], var[c] of z                                       (biased)
    gradient_sums:   Σ t and Σ t · (z − mean) / √(var + eps), t = operands.Gradient's
    affine:          scale = weight / √(var + eps), shift = bias − mean · scale
    gradient_affine: input_gradient = factor · t + slope · z + constant, made of these sums

Layout: NHWC, rows are pixels. A program goes through a range of rows of 16, 32 or 64 channels. In
every step a thread loads 16 bytes of the same channels of several rows, adds these up in
registers and merges the result with what it has; threads are merged once, at the end. Statistics
merge means and squared distances from them (Chan, Golub and LeVeque, 1979), per thread as well as
between threads and programs, so nothing is lost where the mean is far larger than the deviation;
that takes eight instructions an element, and reading at 3.0 TB/s leaves time for eighteen
(bfloat16, 132 processors of four times 32 lanes at 1.7 GHz).

Moves: every tensor once. B0's largest layer at batch 256 (96 channels, 112 x 112, bfloat16), 617
MB: 0.21 ms for the statistics, 0.41 ms for the gradient's sums, at 3.0 TB/s.

As compiled for sm_90 (no GPU has run it), bfloat16: statistics 75 registers, 24 warps, four loads a
step; sums with SiLU 95, 20 warps, with a gate and an offset 136, 12 warps.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..operands import Gradient
from . import reduce
from .batch_norm_act_config import SumConfig, SumProblem, sum_candidates, sum_heuristic
from .batch_norm_act_passes import Normalization, normalization_scale, vector_of
from .language import kernel, slope
from .launch import device_of, launch, vector_width
from .tune import choose


@triton.jit
def moments_of_rows(
    pointer,
    rows,
    channels,
    c,
    UNROLL: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """The mean and Σ (x − mean)², [channels] each, of ``rows`` rows from ``pointer`` on."""
    r = tl.arange(0, ROWS)
    lane = (tl.arange(0, UNROLL) * ROWS)[:, None, None] + r[None, :, None]
    offsets = lane * channels + c[None, None, :]
    inside = (c < channels)[None, None, :]
    count = tl.zeros([ROWS, 1], tl.float32)  # of rows that a lane has seen
    mean = tl.zeros([ROWS, CHANNELS], tl.float32)
    squares = tl.zeros([ROWS, CHANNELS], tl.float32)
    for start in range(0, rows, UNROLL * ROWS):
        left = rows - start
        mask = (lane < left) & inside
        x = tl.load(pointer + offsets, mask=mask, other=0.0).to(tl.float32)
        pointer += channels.to(tl.int64) * (UNROLL * ROWS)
        added = tl.minimum(tl.maximum((left - r + (ROWS - 1)) // ROWS, 0), UNROLL)
        added = added.to(tl.float32)[:, None]
        fresh = tl.sum(x, 0) * (1 / tl.maximum(added, 1.0))  # one division for all channels
        away = tl.where(mask, x - fresh[None, :, :], 0.0)
        share = added / tl.maximum(count + added, 1.0)
        distance = fresh - mean
        squares += tl.sum(away * away, 0) + distance * distance * (count * share)
        mean += distance * share
        count += added
    # Twice, so that the sum's rounding is not the mean's: the second sum is of small numbers.
    whole = tl.sum(mean * count, 0) / rows
    whole += tl.sum((mean - whole[None, :]) * count, 0) / rows
    distance = mean - whole[None, :]
    return whole, tl.sum(squares + count * distance * distance, 0)


@kernel
def _statistics_kernel(
    counts_ptr,
    partials_ptr,
    input_ptr,
    rows,
    block_rows,
    channel_vectors,
    VECTOR: tl.constexpr,
    UNROLL: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    channels = channel_vectors * VECTOR
    chunks = tl.cdiv(channels, CHANNELS)
    c = tl.program_id(0) % chunks * CHANNELS + tl.arange(0, CHANNELS)
    block = tl.program_id(0) // chunks
    first = block.to(tl.int64) * block_rows
    left = tl.minimum(rows - first, block_rows).to(tl.int32)
    mean, squares = moments_of_rows(
        input_ptr + first * channels, left, channels, c, UNROLL, ROWS, CHANNELS
    )
    tl.store(counts_ptr + block, left.to(tl.float32))  # by every chunk, the same
    partial = partials_ptr + block * 2 * channels + c
    tl.store(partial, mean * left, mask=c < channels)
    tl.store(partial + channels, squares, mask=c < channels)


@triton.jit
def gradient_sums_of_rows(
    start,
    rows,
    image_rows,
    channels,
    c,
    upstream_ptr,
    input_ptr,
    residual_ptr,
    mean_ptr,
    var_ptr,
    weight_ptr,
    bias_ptr,
    gate_ptr,
    offset_ptr,
    first,
    eps,
    UNROLL: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """Σ t and Σ t · (x − mean), [channels] each, of ``rows`` rows from element ``start`` on."""
    lane = (tl.arange(0, UNROLL) * ROWS)[:, None, None] + tl.arange(0, ROWS)[None, :, None]
    offsets = lane * channels + c[None, None, :]
    inside = c < channels
    mean = vector_of(mean_ptr, c, inside, 0.0)[None, :, :]
    if ACTIVATION != "none":
        scale = normalization_scale(weight_ptr, var_ptr, eps, c, inside)[None, :, :]
        if bias_ptr is not None:
            bias = vector_of(bias_ptr, c, inside, 0.0)[None, :, :]
    total = tl.zeros([ROWS, CHANNELS], tl.float32)
    product = tl.zeros([ROWS, CHANNELS], tl.float32)
    start = tl.cast(start, tl.int64)
    for done in range(0, rows, UNROLL * ROWS):
        mask = (lane < rows - done) & inside[None, None, :]
        t = tl.load(upstream_ptr + start + offsets, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(input_ptr + start + offsets, mask=mask, other=0.0).to(tl.float32)
        if residual_ptr is not None:
            residual = tl.load(residual_ptr + start + offsets, mask=mask, other=0.0)
        if gate_ptr is not None or offset_ptr is not None:
            image = ((first + done + lane) // image_rows) * channels + c[None, None, :]
            if gate_ptr is not None:
                t *= tl.load(gate_ptr + image, mask=mask, other=0.0).to(tl.float32)
            if offset_ptr is not None:
                t += tl.load(offset_ptr + image, mask=mask, other=0.0).to(tl.float32)
        x -= mean
        if ACTIVATION != "none":
            before = x * scale
            if bias_ptr is not None:
                before += bias
            if residual_ptr is not None:
                before += residual.to(tl.float32)
            t *= slope(before, ACTIVATION)
        # A row outside has t = 0 already.
        total += tl.sum(t, 0)
        product += tl.sum(t * x, 0)
        start += channels.to(tl.int64) * (UNROLL * ROWS)
    return tl.sum(total, 0), tl.sum(product, 0)


@kernel
def _sums_kernel(
    partials_ptr,
    upstream_ptr,
    input_ptr,
    residual_ptr,
    mean_ptr,
    var_ptr,
    weight_ptr,
    bias_ptr,
    gate_ptr,
    offset_ptr,
    eps,
    image_rows,
    rows,
    block_rows,
    channel_vectors,
    VECTOR: tl.constexpr,
    UNROLL: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    channels = channel_vectors * VECTOR
    chunks = tl.cdiv(channels, CHANNELS)
    c = tl.program_id(0) % chunks * CHANNELS + tl.arange(0, CHANNELS)
    block = tl.program_id(0) // chunks
    first = block.to(tl.int64) * block_rows
    left = tl.minimum(rows - first, block_rows).to(tl.int32)
    total, product = gradient_sums_of_rows(
        first * channels,
        left,
        image_rows,
        channels,
        c,
        upstream_ptr,
        input_ptr,
        residual_ptr,
        mean_ptr,
        var_ptr,
        weight_ptr,
        bias_ptr,
        gate_ptr,
        offset_ptr,
        first,
        eps,
        UNROLL,
        ROWS,
        CHANNELS,
        ACTIVATION,
    )
    inside = c < channels
    deviation = tl.rsqrt(tl.load(var_ptr + c, mask=inside, other=1.0).to(tl.float32) + eps)
    partial = partials_ptr + block * 2 * channels + c
    tl.store(partial, total, mask=inside)
    tl.store(partial + channels, product * deviation, mask=inside)


@kernel
def _affine_kernel(
    scale_ptr,
    shift_ptr,
    weight_ptr,
    bias_ptr,
    mean_ptr,
    var_ptr,
    eps,
    channels,
    BLOCK: tl.constexpr,
):
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = c < channels
    scale = tl.rsqrt(tl.load(var_ptr + c, mask=inside, other=1.0).to(tl.float32) + eps)
    if weight_ptr is not None:
        scale *= tl.load(weight_ptr + c, mask=inside, other=0.0).to(tl.float32)
    shift = -tl.load(mean_ptr + c, mask=inside, other=0.0).to(tl.float32) * scale
    if bias_ptr is not None:
        shift += tl.load(bias_ptr + c, mask=inside, other=0.0).to(tl.float32)
    tl.store(scale_ptr + c, scale, mask=inside)
    tl.store(shift_ptr + c, shift, mask=inside)


@triton.jit
def store_gradient_vectors(
    total,
    product,
    factor_ptr,
    slope_ptr,
    constant_ptr,
    weight_gradient_ptr,
    bias_gradient_ptr,
    mean_gradient_ptr,
    var_gradient_ptr,
    weight_ptr,
    mean_ptr,
    var_ptr,
    eps,
    count,
    c,
    inside,
    TRAINING: tl.constexpr,
):
    """What follows from Σ t and Σ t · (z − mean) / √(var + eps), [channels] each.

    Gives (factor, slope, constant). In training mean and var came of z, and their gradients, if
    there are any, are part of z's. In inference they are tensors of their own, whose gradients
    are written.
    """
    deviation = tl.rsqrt(tl.load(var_ptr + c, mask=inside, other=1.0).to(tl.float32) + eps)
    mean = tl.load(mean_ptr + c, mask=inside, other=0.0).to(tl.float32)
    factor = deviation
    if weight_ptr is not None:
        factor *= tl.load(weight_ptr + c, mask=inside, other=0.0).to(tl.float32)
    if weight_gradient_ptr is not None:
        tl.store(weight_gradient_ptr + c, product, mask=inside)
    if bias_gradient_ptr is not None:
        tl.store(bias_gradient_ptr + c, total, mask=inside)
    if TRAINING:
        slope = -factor * deviation * product / count
        constant = -factor * total / count
        if var_gradient_ptr is not None:
            slope += 2 * tl.load(var_gradient_ptr + c, mask=inside, other=0.0) / count
        if mean_gradient_ptr is not None:
            constant += tl.load(mean_gradient_ptr + c, mask=inside, other=0.0) / count
        constant -= slope * mean
    else:
        slope = tl.zeros_like(factor)
        constant = slope
        if mean_gradient_ptr is not None:
            tl.store(mean_gradient_ptr + c, -factor * total, mask=inside)
        if var_gradient_ptr is not None:
            tl.store(var_gradient_ptr + c, -0.5 * factor * deviation * product, mask=inside)
    if factor_ptr is not None:
        tl.store(factor_ptr + c, factor, mask=inside)
    if slope_ptr is not None:
        tl.store(slope_ptr + c, slope, mask=inside)
        tl.store(constant_ptr + c, constant, mask=inside)
    return factor, slope, constant


@kernel
def _gradient_affine_kernel(
    factor_ptr,
    slope_ptr,
    constant_ptr,
    weight_gradient_ptr,
    bias_gradient_ptr,
    mean_gradient_ptr,
    var_gradient_ptr,
    partials_ptr,
    weight_ptr,
    mean_ptr,
    var_ptr,
    eps,
    count,
    rows,
    channels,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    TRAINING: tl.constexpr,
):
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    r = tl.arange(0, ROWS)
    inside = c < channels
    total = tl.zeros([ROWS, CHANNELS], tl.float32)
    product = tl.zeros([ROWS, CHANNELS], tl.float32)
    for first in range(0, rows, ROWS):
        mask = (first + r < rows)[:, None] & inside[None, :]
        offsets = (first + r)[:, None] * 2 * channels + c[None, :]
        total += tl.load(partials_ptr + offsets, mask=mask, other=0.0)
        product += tl.load(partials_ptr + offsets + channels, mask=mask, other=0.0)
    store_gradient_vectors(
        tl.sum(total, 0),
        tl.sum(product, 0),
        factor_ptr,
        slope_ptr,
        constant_ptr,
        weight_gradient_ptr,
        bias_gradient_ptr,
        mean_gradient_ptr,
        var_gradient_ptr,
        weight_ptr,
        mean_ptr,
        var_ptr,
        eps,
        count,
        c,
        inside,
        TRAINING,
    )


class GradientVectors(NamedTuple):
    """What `gradient_affine` makes of the sums; [C] each, None where it was not asked for."""

    factor: Tensor | None  # float32
    slope: Tensor | None  # float32
    constant: Tensor | None  # float32
    weight: Tensor | None  # the gradients, in their tensors' dtypes
    bias: Tensor | None
    mean: Tensor | None  # inference only
    var: Tensor | None


def statistics(input: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance per channel of [N, C, H, W] dense NHWC: [C] float32 each."""
    problem = sum_problem(input, 1)
    rows, channels = problem.rows, problem.channels
    device = device_of(input)
    float32: dict[str, Any] = {"dtype": torch.float32, "device": input.device}

    def run(config: SumConfig) -> tuple[Tensor, Tensor]:
        block_rows = max(triton.cdiv(rows, config.blocks), 1)
        blocks = triton.cdiv(rows, block_rows)
        counts = torch.empty(blocks, **float32)
        partials = torch.empty((blocks, 2, channels), **float32)
        launch(
            _statistics_kernel,
            (blocks * triton.cdiv(channels, config.channels),),
            counts,
            partials,
            input,
            rows,
            block_rows,
            channels // problem.vector,
            num_warps=config.num_warps,
            VECTOR=problem.vector,
            UNROLL=config.unroll,
            ROWS=config.rows,
            CHANNELS=config.channels,
        )
        return counts, partials

    config = choose(
        "batch_norm_act_statistics", problem, device, sum_heuristic, sum_candidates, run
    )
    return reduce.moments(*run(config), rows)


def gradient_sums(
    upstream: Tensor,
    operand: Gradient,
    normalization: Normalization,
    residual: Tensor | None = None,
) -> Tensor:
    """Partial sums [blocks, 2, C] float32 of t and of t · (z − mean) / √(var + eps).

    Args:
        upstream: [N, C, H, W] dense NHWC.
        operand: t, as `operands.Gradient` has it but for ``scale`` and ``shift``, which
            ``normalization`` gives; ``z`` is needed.
        residual: like ``upstream``: added before the activation.
    """
    assert operand.z is not None
    reads_residual = residual is not None and operand.activation != "none"
    problem = sum_problem(upstream, 2 + reads_residual)
    rows, channels = problem.rows, problem.channels
    image_rows = upstream.shape[2] * upstream.shape[3]

    def run(config: SumConfig) -> Tensor:
        block_rows = max(triton.cdiv(rows, config.blocks), 1)
        blocks = triton.cdiv(rows, block_rows)
        partials = torch.empty((blocks, 2, channels), dtype=torch.float32, device=upstream.device)
        launch(
            _sums_kernel,
            (blocks * triton.cdiv(channels, config.channels),),
            partials,
            upstream,
            operand.z,
            residual if reads_residual else None,
            normalization.mean,
            normalization.var,
            normalization.weight,
            normalization.bias,
            operand.gate,
            operand.offset,
            float(normalization.eps),
            image_rows,
            rows,
            block_rows,
            channels // problem.vector,
            num_warps=config.num_warps,
            VECTOR=problem.vector,
            UNROLL=config.unroll,
            ROWS=config.rows,
            CHANNELS=config.channels,
            ACTIVATION=operand.activation,
        )
        return partials

    return run(
        choose(
            "batch_norm_act_sums",
            problem,
            device_of(upstream),
            sum_heuristic,
            sum_candidates,
            run,
        )
    )


def affine(
    weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """(scale, shift) of `operands.Forward`, [C] float32 each."""
    scale = torch.empty(mean.shape, dtype=torch.float32, device=mean.device)
    shift = torch.empty_like(scale)
    launch(
        _affine_kernel,
        (triton.cdiv(mean.numel(), 128),),
        scale,
        shift,
        weight,
        bias,
        mean,
        var,
        float(eps),
        mean.numel(),
        BLOCK=128,
    )
    return scale, shift


def gradient_affine(
    partials: Tensor,
    count: int,
    normalization: Normalization,
    *,
    training: bool = True,
    needed: tuple[bool, bool, bool] = (True, True, True),
    output_gradients: tuple[Tensor | None, Tensor | None] = (None, None),
    statistics_needed: tuple[bool, bool] = (False, False),
) -> GradientVectors:
    """The vectors of BatchNorm's backward pass, in one small kernel.

    Args:
        partials: [blocks, 2, C] float32, as :func:`gradient_sums` gives them; blocks may be 1.
        count: values per channel, N · H · W.
        training: the mean and the variance are z's own.
        needed: whether factor, slope and constant are wanted; weight's gradient; bias's gradient.
        output_gradients: in training, [C] float32 gradients for the mean and the variance.
        statistics_needed: in inference, whether their gradients are wanted.
    """
    mean, var, weight, bias, eps = normalization
    blocks, _, channels = partials.shape
    vectors = gradient_vectors(normalization, training, needed, statistics_needed)
    statistics_ptrs = output_gradients if training else (vectors.mean, vectors.var)
    launch(
        _gradient_affine_kernel,
        (triton.cdiv(channels, 32),),
        *vectors[:5],
        *statistics_ptrs,
        partials,
        weight,
        mean,
        var,
        float(eps),
        float(count),
        blocks,
        channels,
        ROWS=32,
        CHANNELS=32,
        TRAINING=training,
    )
    return vectors


def gradient_vectors(
    normalization: Normalization,
    training: bool,
    needed: tuple[bool, bool, bool],
    statistics_needed: tuple[bool, bool] = (False, False),
) -> GradientVectors:
    """Room for those vectors that are wanted."""
    mean, var, weight, bias, _ = normalization

    def room(want: bool, like: Tensor | None = None) -> Tensor | None:
        dtype = torch.float32 if like is None else like.dtype
        return torch.empty(mean.shape, dtype=dtype, device=mean.device) if want else None

    return GradientVectors(
        room(needed[0]),
        room(needed[0] and training),
        room(needed[0] and training),
        room(needed[1], weight),
        room(needed[2], bias),
        room(statistics_needed[0] and not training, mean),
        room(statistics_needed[1] and not training, var),
    )


def sum_problem(input: Tensor, inputs: int) -> SumProblem:
    """What a reduction over the rows of ``inputs`` tensors like ``input`` has to do."""
    images, channels, height, width = input.shape
    rows = images * height * width
    return SumProblem(1, rows, channels, vector_width(input.dtype, channels), inputs)
