"""The kernels between the spatial mean and the gate.

    hidden[n] = reduce_weight · mean[n] + reduce_bias                                     [R]
    gate[n]   = gate_activation(expand_weight · activation(hidden[n]) + expand_bias)      [C]

Layout: mean [N, C], or partial sums [N, blocks, C] that are added here, in order, and multiplied
with a factor; matrices [R, C] and [C, R], row by row.

Moves: the weights, 221 KB at B0's last blocks (1152 channels, 48 of them reduced, bfloat16), from
the L2: the work is latency. No program can wait for another, so each computes the whole hidden
vector of its images, which costs it the first matrix (110 KB, about 55 bytes a clock: 1.2 µs), and
64 channels of the gate. A small batch takes one image a program and multiplies on CUDA cores,
whose loads need no way through shared memory; of a batch of more than 8, 16 images at a time go
to tensor cores together and read the weights once. At 256 images 16 · 18 programs read 36 MB out
of the L2, where a program for each image and slice would read 590 MB. A first matrix of more than
256 KB (B4's and B7's last blocks) gets a kernel of its own in front, 16 hidden values a program.

As compiled for sm_90 (no GPU has run it), R = 48, bfloat16: 125 registers in 16 warps for an image,
79 in 4 warps for 16. Tried: the mean as a [1, channels] tile, which made Triton send the matrix
through shared memory to a layout of scalar rows: 1848 instructions where there are now 528.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .language import activate, dot, kernel, rounded
from .launch import device_of, launch, vector_width
from .squeeze_excite_config import (
    GateConfig,
    GateProblem,
    gate_candidates,
    gate_heuristic,
    padded,
)
from .tune import choose

PRECISION = "tf32x3"  # float32 products are as exact as those of PyTorch's linear layers


@triton.jit
def _image_hidden(
    mean_ptr,
    weight_ptr,
    bias_ptr,
    image,
    r,
    reduced,
    channels,
    blocks,
    factor,
    PARTIALS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """[reduced] float32 of one image: the vector before its activation, zero past the end."""
    k = tl.arange(0, CHUNK)
    rows = weight_ptr + r[:, None] * channels + k[None, :]
    inside = (r < reduced)[:, None]
    products = tl.zeros([r.shape[0], CHUNK], tl.float32)
    weight = tl.load(rows, mask=inside & (k < channels)[None, :], other=0.0)
    if PARTIALS > 1:
        b = tl.arange(0, PARTIALS)
        start = mean_ptr + image.to(tl.int64) * blocks * channels
    else:
        start = mean_ptr + image.to(tl.int64) * channels
    for first in range(0, channels, CHUNK):
        c = first + k
        following = tl.load(  # while this step's mean is on its way
            rows + first + CHUNK, mask=inside & (c + CHUNK < channels)[None, :], other=0.0
        )
        if PARTIALS > 1:
            total = tl.zeros([PARTIALS, CHUNK], tl.float32)
            for done in range(0, blocks, PARTIALS):
                partial = tl.load(
                    start + (done + b)[:, None] * channels + c[None, :],
                    mask=(done + b < blocks)[:, None] & (c < channels)[None, :],
                    other=0.0,
                )
                total += partial.to(tl.float32)
            mean = tl.sum(total, 0)
        else:
            mean = tl.load(start + c, mask=c < channels, other=0.0).to(tl.float32)
        products += weight.to(tl.float32) * mean[None, :]
        weight = following
    hidden = tl.sum(products, 1) * factor
    if bias_ptr is not None:
        hidden += tl.load(bias_ptr + r, mask=r < reduced, other=0.0).to(tl.float32)
    return hidden


@kernel
def _image_kernel(
    gate_ptr,
    hidden_ptr,
    mean_ptr,
    reduce_weight_ptr,
    reduce_bias_ptr,
    expand_weight_ptr,
    expand_bias_ptr,
    blocks,
    channel_vectors,
    reduced_vectors,
    factor,
    VECTOR: tl.constexpr,
    REDUCED_VECTOR: tl.constexpr,
    PARTIALS: tl.constexpr,
    REDUCED: tl.constexpr,
    SLICE: tl.constexpr,
    CHUNK: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATE_ACTIVATION: tl.constexpr,
):
    """A slice of one image's gate; of its hidden vector, if only that is to be written
    (``gate_ptr`` is None); from there, if it is given (``reduce_weight_ptr`` is None)."""
    channels = channel_vectors * VECTOR
    reduced = reduced_vectors * REDUCED_VECTOR
    r = tl.arange(0, REDUCED)
    if gate_ptr is None:
        parts = tl.cdiv(reduced, REDUCED)
        image = tl.program_id(0) // parts
        r += tl.program_id(0) % parts * REDUCED
    else:
        slices = tl.cdiv(channels, SLICE)
        image = tl.program_id(0) // slices
        c = tl.program_id(0) % slices * SLICE + tl.arange(0, SLICE)
        rows = expand_weight_ptr + c[:, None] * reduced + r[None, :]
        inside = (c < channels)[:, None]
        # First, because it waits for nothing.
        weight = tl.load(rows, mask=inside & (r < reduced)[None, :], other=0.0)
    if reduce_weight_ptr is not None:
        hidden = _image_hidden(
            mean_ptr,
            reduce_weight_ptr,
            reduce_bias_ptr,
            image,
            r,
            reduced,
            channels,
            blocks,
            factor,
            PARTIALS,
            CHUNK,
        )
    if gate_ptr is None:
        tl.store(hidden_ptr + image * reduced + r, hidden, mask=r < reduced)
    else:
        if reduce_weight_ptr is not None:
            gate = tl.sum(weight.to(tl.float32) * activate(hidden, ACTIVATION)[None, :], 1)
        else:
            products = tl.zeros([SLICE, REDUCED], tl.float32)
            for first in range(0, reduced, REDUCED):
                left = reduced - first
                following = tl.load(
                    rows + first + REDUCED, mask=inside & (r + REDUCED < left)[None, :], other=0.0
                )
                hidden = tl.load(hidden_ptr + image * reduced + first + r, mask=r < left, other=0.0)
                products += weight.to(tl.float32) * activate(hidden, ACTIVATION)[None, :]
                weight = following
            gate = tl.sum(products, 1)
        if expand_bias_ptr is not None:
            gate += tl.load(expand_bias_ptr + c, mask=c < channels, other=0.0).to(tl.float32)
        gate = rounded(activate(gate, GATE_ACTIVATION), gate_ptr.dtype.element_ty)
        tl.store(gate_ptr + image.to(tl.int64) * channels + c, gate, mask=c < channels)


@triton.jit
def tile_hidden(
    mean_ptr,
    weight_ptr,
    bias_ptr,
    image,
    images,
    r,
    reduced,
    channels,
    blocks,
    factor,
    PARTIALS: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """[images, reduced] float32: the vectors before their activation."""
    k = tl.arange(0, CHUNK)
    hidden = tl.zeros([image.shape[0], r.shape[0]], tl.float32)
    start = image.to(tl.int64) * blocks * channels
    for first in range(0, channels, CHUNK):
        c = first + k
        weight = tl.load(
            weight_ptr + r[None, :] * channels + c[:, None],
            mask=(r < reduced)[None, :] & (c < channels)[:, None],
            other=0.0,
        )
        mask = (image < images)[:, None] & (c < channels)[None, :]
        if PARTIALS > 1:
            b = tl.arange(0, PARTIALS)
            mean = tl.zeros([image.shape[0], CHUNK], tl.float32)
            for done in range(0, blocks, PARTIALS):
                partial = tl.load(
                    mean_ptr
                    + start[None, :, None]
                    + ((done + b) * channels)[:, None, None]
                    + c[None, None, :],
                    mask=mask[None, :, :] & (done + b < blocks)[:, None, None],
                    other=0.0,
                )
                mean += tl.sum(partial.to(tl.float32), 0)
        else:
            mean = tl.load(mean_ptr + start[:, None] + c[None, :], mask=mask, other=0.0)
        mean = rounded(mean.to(tl.float32) * factor, weight.dtype)
        hidden = dot(mean, weight, hidden, PRECISION)
    if bias_ptr is not None:
        hidden += tl.load(bias_ptr + r, mask=r < reduced, other=0.0).to(tl.float32)[None, :]
    return hidden


@kernel
def _tile_kernel(
    gate_ptr,
    hidden_ptr,
    mean_ptr,
    reduce_weight_ptr,
    reduce_bias_ptr,
    expand_weight_ptr,
    expand_bias_ptr,
    images,
    blocks,
    channel_vectors,
    reduced_vectors,
    factor,
    VECTOR: tl.constexpr,
    REDUCED_VECTOR: tl.constexpr,
    PARTIALS: tl.constexpr,
    IMAGES: tl.constexpr,
    REDUCED: tl.constexpr,
    SLICE: tl.constexpr,
    CHUNK: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATE_ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`_image_kernel` for IMAGES images at once."""
    channels = channel_vectors * VECTOR
    reduced = reduced_vectors * REDUCED_VECTOR
    r = tl.arange(0, REDUCED)
    if gate_ptr is None:
        parts = tl.cdiv(reduced, REDUCED)
        image = tl.program_id(0) // parts * IMAGES + tl.arange(0, IMAGES)
        r += tl.program_id(0) % parts * REDUCED
    else:
        slices = tl.cdiv(channels, SLICE)
        image = tl.program_id(0) // slices * IMAGES + tl.arange(0, IMAGES)
        c = tl.program_id(0) % slices * SLICE + tl.arange(0, SLICE)
        columns = expand_weight_ptr + c[None, :] * reduced + r[:, None]
        inside = (c < channels)[None, :]
    if reduce_weight_ptr is not None:
        hidden = tile_hidden(
            mean_ptr,
            reduce_weight_ptr,
            reduce_bias_ptr,
            image,
            images,
            r,
            reduced,
            channels,
            blocks,
            factor,
            PARTIALS,
            CHUNK,
            PRECISION,
        )
    vectors = image[:, None] * reduced + r[None, :]
    if gate_ptr is None:
        mask = (image < images)[:, None] & (r < reduced)[None, :]
        tl.store(hidden_ptr + vectors, hidden, mask=mask)
    else:
        gate = tl.zeros([IMAGES, SLICE], tl.float32)
        if reduce_weight_ptr is not None:
            weight = tl.load(columns, mask=inside & (r < reduced)[:, None], other=0.0)
            hidden = rounded(activate(hidden, ACTIVATION), weight.dtype)
            gate = dot(hidden, weight, gate, PRECISION)
        else:
            for first in range(0, reduced, REDUCED):
                left = reduced - first
                weight = tl.load(columns + first, mask=inside & (r < left)[:, None], other=0.0)
                mask = (image < images)[:, None] & (r < left)[None, :]
                hidden = tl.load(hidden_ptr + vectors + first, mask=mask, other=0.0)
                hidden = activate(hidden, ACTIVATION)
                gate = dot(rounded(hidden, weight.dtype), weight, gate, PRECISION)
        if expand_bias_ptr is not None:
            bias = tl.load(expand_bias_ptr + c, mask=c < channels, other=0.0)
            gate += bias.to(tl.float32)[None, :]
        gate = rounded(activate(gate, GATE_ACTIVATION), gate_ptr.dtype.element_ty)
        offsets = image.to(tl.int64)[:, None] * channels + c[None, :]
        tl.store(gate_ptr + offsets, gate, mask=(image < images)[:, None] & inside)


def gate(
    mean: Tensor,
    factor: float,
    reduce_weight: Tensor,
    reduce_bias: Tensor | None,
    expand_weight: Tensor,
    expand_bias: Tensor | None,
    activation: str,
    gate_activation: str,
) -> Tensor:
    """The gate [N, C] of images, in the weights' dtype.

    Args:
        mean: [N, C], or [N, blocks, C] partial sums; times ``factor`` they are the means.
        reduce_weight, expand_weight: [R, C] and [C, R].
    """
    images, channels = mean.shape[0], mean.shape[-1]
    blocks = mean.shape[1] if mean.dim() == 3 else 1
    reduced = reduce_weight.shape[0]
    mean, reduce_weight, expand_weight = (
        tensor.contiguous() for tensor in (mean, reduce_weight, expand_weight)
    )
    dtype, device = expand_weight.dtype, mean.device
    result = torch.empty((images, channels), dtype=dtype, device=device)
    vectors = (vector_width(dtype, channels), vector_width(dtype, reduced))
    problem = GateProblem(images, blocks, channels, reduced, dtype.itemsize)

    def run(config: GateConfig) -> None:
        tiles = triton.cdiv(images, config.images)
        slices = triton.cdiv(channels, config.slice_channels)
        constants: dict[str, Any] = {
            "VECTOR": vectors[0],
            "REDUCED_VECTOR": vectors[1],
            "SLICE": config.slice_channels,
            "CHUNK": config.chunk,
            "ACTIVATION": activation,
            "GATE_ACTIVATION": gate_activation,
            "num_warps": config.num_warps,
            "num_stages": config.num_stages,
        }
        sizes: tuple[Any, ...] = (
            blocks,
            channels // vectors[0],
            reduced // vectors[1],
            float(factor),
        )
        if config.images > 1:
            run_kernel = _tile_kernel
            sizes = (images, *sizes)
            constants |= {"IMAGES": config.images, "PRECISION": PRECISION}
        else:
            run_kernel = _image_kernel
        partials = 4 if blocks > 1 else 1
        first = (mean, reduce_weight, reduce_bias)
        second = (expand_weight, expand_bias)
        if not config.split:
            launch(
                run_kernel,
                (tiles * slices,),
                *(result, None, *first, *second, *sizes),
                PARTIALS=partials,
                REDUCED=padded(reduced),
                **constants,
            )
            return
        hidden = torch.empty((images, reduced), dtype=torch.float32, device=device)
        launch(
            run_kernel,
            (tiles * triton.cdiv(reduced, 16),),
            *(None, hidden, *first, None, None, *sizes),
            PARTIALS=partials,
            REDUCED=16,
            **constants,
        )
        launch(
            run_kernel,
            (tiles * slices,),
            *(result, hidden, None, None, None, *second, *sizes),
            PARTIALS=1,
            REDUCED=64,
            **constants,
        )

    target = device_of(mean)
    run(choose("squeeze_excite_gate", problem, target, gate_heuristic, gate_candidates, run))
    return result
