"""The second stage of every reduction: partial results of many programs, added in a fixed order.

Two stages and no atomics make a result the same bits every time.

    totals[b, c] = factor · Σ_r partials[b, r, c]
    mean, var    = of all values, from each block's count, sum and Σ (value − block's mean)²
                   (Chan, Golub and LeVeque, 1979), which loses nothing to cancellation

Moves: the partials, once. A program takes 32 channels of one b, so that their rows are read by 128
threads at once; with 2¹² rows of 1280 channels, the largest here, that is 21 MB: 7 µs on an H100.
Tried: nothing yet, no GPU has run this.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .language import kernel
from .launch import launch

_CHANNELS, _ROWS = 32, 32
# Moments have few programs, one for 32 channels: what is longer than this is merged by 64 rows
# first, by as many programs as there are groups.
_MOST_MOMENTS, _GROUP = 512, 64


@kernel
def _totals_kernel(
    totals_ptr,
    partials_ptr,
    rows,
    channels,
    factor,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    blocks = tl.cdiv(channels, CHANNELS)
    batch = tl.program_id(0) // blocks
    c = tl.program_id(0) % blocks * CHANNELS + tl.arange(0, CHANNELS)
    r = tl.arange(0, ROWS)
    base = batch.to(tl.int64) * rows * channels
    total = tl.zeros([ROWS, CHANNELS], tl.float32)
    for first in range(0, rows, ROWS):
        inside = (first + r < rows)[:, None] & (c < channels)[None, :]
        offsets = base + (first + r)[:, None] * channels + c[None, :]
        total += tl.load(partials_ptr + offsets, mask=inside, other=0.0)
    result = tl.sum(total, 0) * factor
    tl.store(totals_ptr + batch * channels + c, result, mask=c < channels)


@kernel
def _moments_kernel(
    mean_ptr,
    var_ptr,
    counts_ptr,
    partials_ptr,
    rows,
    channels,
    total_count,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    r = tl.arange(0, ROWS)
    total = tl.zeros([ROWS, CHANNELS], tl.float32)
    for first in range(0, rows, ROWS):
        inside = (first + r < rows)[:, None] & (c < channels)[None, :]
        offsets = (first + r)[:, None] * 2 * channels + c[None, :]
        total += tl.load(partials_ptr + offsets, mask=inside, other=0.0)
    mean = tl.sum(total, 0) / total_count
    squares = tl.zeros([ROWS, CHANNELS], tl.float32)
    for first in range(0, rows, ROWS):
        inside = (first + r < rows)[:, None] & (c < channels)[None, :]
        offsets = (first + r)[:, None] * 2 * channels + c[None, :]
        count = tl.load(counts_ptr + first + r, mask=first + r < rows, other=0.0)[:, None]
        sums = tl.load(partials_ptr + offsets, mask=inside, other=0.0)
        centred = tl.load(partials_ptr + offsets + channels, mask=inside, other=0.0)
        distance = tl.where(count > 0, sums / tl.maximum(count, 1.0) - mean[None, :], 0.0)
        squares += centred + count * distance * distance
    tl.store(mean_ptr + c, mean, mask=c < channels)
    tl.store(var_ptr + c, tl.sum(squares, 0) / total_count, mask=c < channels)


@kernel
def _merge_moments_kernel(
    merged_counts_ptr,
    merged_ptr,
    counts_ptr,
    partials_ptr,
    rows,
    channels,
    GROUP: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    blocks = tl.cdiv(channels, CHANNELS)
    group = tl.program_id(0) // blocks
    c = tl.program_id(0) % blocks * CHANNELS + tl.arange(0, CHANNELS)
    r = group * GROUP + tl.arange(0, GROUP)
    inside = (r < rows)[:, None] & (c < channels)[None, :]
    offsets = r[:, None].to(tl.int64) * 2 * channels + c[None, :]
    count = tl.load(counts_ptr + r, mask=r < rows, other=0.0)
    sums = tl.load(partials_ptr + offsets, mask=inside, other=0.0)
    squares = tl.load(partials_ptr + offsets + channels, mask=inside, other=0.0)
    total_count, total = tl.sum(count, 0), tl.sum(sums, 0)
    means = sums / tl.maximum(count, 1.0)[:, None]
    distance = means - (total / tl.maximum(total_count, 1.0))[None, :]
    squares += count[:, None] * distance * distance
    place = merged_ptr + group.to(tl.int64) * 2 * channels + c
    tl.store(place, total, mask=c < channels)
    tl.store(place + channels, tl.sum(squares, 0), mask=c < channels)
    tl.store(merged_counts_ptr + group, total_count)


def totals(partials: Tensor, factor: float = 1.0) -> Tensor:
    """[B, R, C] float32 -> [B, C] float32: sums over R, times ``factor``."""
    batch, rows, channels = partials.shape
    result = torch.empty((batch, channels), dtype=torch.float32, device=partials.device)
    launch(
        _totals_kernel,
        (batch * triton.cdiv(channels, _CHANNELS),),
        result,
        partials,
        rows,
        channels,
        float(factor),
        ROWS=_ROWS,
        CHANNELS=_CHANNELS,
    )
    return result


def moments(counts: Tensor, partials: Tensor, total_count: int) -> tuple[Tensor, Tensor]:
    """Mean and biased variance, [C] float32 each, of values that were summed in blocks.

    Args:
        counts: [R] float32, how many values each block has (of each channel).
        partials: [R, 2, C] float32: the block's sum, and its Σ (value − block's mean)².
        total_count: the sum of ``counts``.
    """
    rows, _, channels = partials.shape
    while rows > _MOST_MOMENTS:
        groups = triton.cdiv(rows, _GROUP)
        merged_counts, merged = counts.new_empty(groups), partials.new_empty(groups, 2, channels)
        launch(
            _merge_moments_kernel,
            (groups * triton.cdiv(channels, _CHANNELS),),
            merged_counts,
            merged,
            counts,
            partials,
            rows,
            channels,
            GROUP=_GROUP,
            CHANNELS=_CHANNELS,
        )
        counts, partials, rows = merged_counts, merged, groups
    mean = torch.empty(channels, dtype=torch.float32, device=partials.device)
    var = torch.empty_like(mean)
    launch(
        _moments_kernel,
        (triton.cdiv(channels, _CHANNELS),),
        mean,
        var,
        counts,
        partials,
        rows,
        channels,
        float(total_count),
        ROWS=_ROWS,
        CHANNELS=_CHANNELS,
    )
    return mean, var
