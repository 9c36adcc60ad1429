"""Sums over the pixels of each image that the gradients of squeeze-and-excitation and of the
BatchNorm before it need, from one pass.

With z a raw convolution output [N, C, H, W], ẑ = (z − mean) / √(var + eps),
b = weight · ẑ + bias and u the gradient for gate · activation(b):

    Σ u · activation(b),  Σ u · activation'(b),  Σ u · activation'(b) · ẑ,
    Σ activation'(b),     Σ activation'(b) · ẑ                                  [5, N, blocks, C]

The gradient for activation(b) is gate[n, c] · u + offset[n, c], and the offset comes from the
gate's gradient, the first of these sums. BatchNorm's two sums are linear in both, so the other four
give them without a second pass over z and u:

    Σ t     = Σ_n gate · Σ u · activation'(b)     + offset · Σ activation'(b)
    Σ t · ẑ = Σ_n gate · Σ u · activation'(b) · ẑ + offset · Σ activation'(b) · ẑ

Moves: z and u once, 16 bytes an access; B0's second block at batch 256, bfloat16:
308 MB, 103 µs at 3.0 TB/s. Tried: nothing yet, no GPU has run this.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .batch_norm_act_passes import Normalization
from .language import activate, kernel, slope
from .launch import device_of, launch, vector_width
from .mbconv_config import SumsConfig, sums_heuristic


@kernel
def _image_sums_kernel(
    sums_ptr,
    upstream_ptr,
    z_ptr,
    mean_ptr,
    var_ptr,
    weight_ptr,
    bias_ptr,
    eps,
    images,
    pixels,
    block_pixels,
    channel_vectors,
    VECTOR: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    channels = channel_vectors * VECTOR
    chunks = tl.cdiv(channels, CHANNELS)
    blocks = tl.cdiv(pixels, block_pixels)
    c = tl.program_id(0) % chunks * CHANNELS + tl.arange(0, CHANNELS)
    block = tl.program_id(0) // chunks % blocks
    image = tl.program_id(0) // chunks // blocks
    inside = c < channels
    mean = tl.load(mean_ptr + c, mask=inside, other=0.0).to(tl.float32)[None, :]
    var = tl.load(var_ptr + c, mask=inside, other=1.0).to(tl.float32)
    deviation = tl.rsqrt(var + eps)[None, :]
    first = image.to(tl.int64) * pixels * channels
    z_ptr += first
    upstream_ptr += first
    end = tl.minimum((block + 1) * block_pixels, pixels)
    value = tl.zeros([ROWS, CHANNELS], tl.float32)
    along = tl.zeros([ROWS, CHANNELS], tl.float32)
    along_z = tl.zeros([ROWS, CHANNELS], tl.float32)
    alone = tl.zeros([ROWS, CHANNELS], tl.float32)
    alone_z = tl.zeros([ROWS, CHANNELS], tl.float32)
    for start in range(block * block_pixels, end, ROWS):
        row = start + tl.arange(0, ROWS)
        mask = (row < end)[:, None] & inside[None, :]
        offsets = row[:, None] * channels + c[None, :]
        z = tl.load(z_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        normal = (z - mean) * deviation
        before = normal
        if weight_ptr is not None:
            before *= tl.load(weight_ptr + c, mask=inside, other=0.0).to(tl.float32)[None, :]
        if bias_ptr is not None:
            before += tl.load(bias_ptr + c, mask=inside, other=0.0).to(tl.float32)[None, :]
        after = activate(before, ACTIVATION)
        u = tl.load(upstream_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        s = tl.where(mask, slope(before, ACTIVATION), 0.0)
        value += u * after
        along += u * s
        along_z += u * s * normal
        alone += s
        alone_z += s * normal
    place = (image.to(tl.int64) * blocks + block) * channels + c
    sums_ptr += place
    step = images.to(tl.int64) * blocks * channels
    tl.store(sums_ptr, tl.sum(value, 0), mask=inside)
    tl.store(sums_ptr + step, tl.sum(along, 0), mask=inside)
    tl.store(sums_ptr + 2 * step, tl.sum(along_z, 0), mask=inside)
    tl.store(sums_ptr + 3 * step, tl.sum(alone, 0), mask=inside)
    tl.store(sums_ptr + 4 * step, tl.sum(alone_z, 0), mask=inside)


@kernel
def _gated_kernel(
    result_ptr,
    sums_ptr,
    gate_ptr,
    offset_ptr,
    offset_factor,
    images,
    blocks,
    channels,
    CHANNELS: tl.constexpr,
):
    chunks = tl.cdiv(channels, CHANNELS)
    c = tl.program_id(0) % chunks * CHANNELS + tl.arange(0, CHANNELS)
    image = (tl.program_id(0) // chunks).to(tl.int64)
    inside = c < channels
    step = images.to(tl.int64) * blocks * channels
    sums_ptr += image * blocks * channels + c
    along = tl.zeros([CHANNELS], tl.float32)
    along_z = tl.zeros([CHANNELS], tl.float32)
    alone = tl.zeros([CHANNELS], tl.float32)
    alone_z = tl.zeros([CHANNELS], tl.float32)
    for block in range(0, blocks):
        here_ptr = sums_ptr + block * channels
        along += tl.load(here_ptr + step, mask=inside, other=0.0)
        along_z += tl.load(here_ptr + 2 * step, mask=inside, other=0.0)
        if gate_ptr is not None:
            alone += tl.load(here_ptr + 3 * step, mask=inside, other=0.0)
            alone_z += tl.load(here_ptr + 4 * step, mask=inside, other=0.0)
    if gate_ptr is not None:
        gate = tl.load(gate_ptr + image * channels + c, mask=inside, other=0.0).to(tl.float32)
        offset = tl.load(offset_ptr + image * channels + c, mask=inside, other=0.0)
        offset = offset.to(tl.float32) * offset_factor
        along = gate * along + offset * alone
        along_z = gate * along_z + offset * alone_z
    result_ptr += image * 2 * channels + c
    tl.store(result_ptr, along, mask=inside)
    tl.store(result_ptr + channels, along_z, mask=inside)


def image_sums(
    z: Tensor, normalization: Normalization, activation: str, upstream: Tensor
) -> Tensor:
    """The sums of this file's header, in blocks of pixels: [5, N, blocks, C] float32.

    Args:
        z: [N, C, H, W] dense NHWC, a convolution's output.
        normalization: the BatchNorm that follows.
        upstream: like ``z``, the gradient for what comes after gate and activation.
    """
    images, channels, height, width = z.shape
    pixels = height * width
    vector = vector_width(z.dtype, channels)
    config: SumsConfig = sums_heuristic(images, pixels, channels, device_of(z))
    blocks = triton.cdiv(pixels, config.block_pixels)
    shape = (5, images, blocks, channels)
    sums = torch.empty(shape, dtype=torch.float32, device=z.device)
    launch(
        _image_sums_kernel,
        (images * blocks * triton.cdiv(channels, config.channels),),
        sums,
        upstream,
        z,
        normalization.mean,
        normalization.var,
        normalization.weight,
        normalization.bias,
        float(normalization.eps),
        images,
        pixels,
        config.block_pixels,
        channels // vector,
        num_warps=config.num_warps,
        VECTOR=vector,
        ACTIVATION=activation,
        ROWS=config.rows,
        CHANNELS=config.channels,
    )
    return sums


def gated(
    sums: Tensor, gate: Tensor | None, offset: Tensor | None, offset_factor: float = 1.0
) -> Tensor:
    """BatchNorm's sums of t and t · ẑ, image by image: [N, 2, C] float32.

    Args:
        sums: the five of :func:`image_sums`.
        gate: [N, C] dense, or None where nothing is gated.
        offset: [N, C] dense, given with ``gate``; times ``offset_factor``.
    """
    _, images, blocks, channels = sums.shape
    result = torch.empty((images, 2, channels), dtype=torch.float32, device=sums.device)
    launch(
        _gated_kernel,
        (images * triton.cdiv(channels, 128),),
        result,
        sums,
        gate,
        offset,
        float(offset_factor),
        images,
        blocks,
        channels,
        CHANNELS=128,
    )
    return result
