"""Gradients of the kernels between the spatial mean and the gate.

    expanded = gate_gradient · gate_activation'(expand_weight · activation(hidden) + expand_bias)
    h        = (expand_weightᵀ · expanded) · activation'(hidden)

    mean_gradient          = reduce_weightᵀ · h
    reduce_weight_gradient = Σ_n h ⊗ mean
    expand_weight_gradient = Σ_n expanded ⊗ activation(hidden)

Layout: [N, C] and [N, R]; matrices [R, C] and [C, R], row by row.

Two launches. In the first a program takes 16 images from their means to h; it reads the first
matrix once and the second twice (332 KB at B0's last blocks: 3.6 µs at 55 bytes a clock out of the
L2). In the second some programs
own 16 x 16 elements of both matrices' gradients, and the biases', and go through all images in
order; the others make the means' gradient, 16 images x 16 channels each. No atomics, no partial
sums. Its operands stay float32, on tensor cores in three TF32 products: with as few images as
there are, rounding them would show, and the products are small.

Tried, looking at registers only, for no GPU has run this: the whole hidden vector of 16 images in
the first kernel's registers, which saves the second reading, but float32 at R = 160 spills 168
bytes at best; the whole of it in the second's tiles: 2.8 KB; tiles of 32 x 32 there: 8 to 40.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .language import activate, dot, kernel, rounded, slope
from .launch import device_of, launch, vector_width
from .squeeze_excite_config import (
    GateBackwardConfig,
    GateProblem,
    gate_backward_candidates,
    gate_backward_heuristic,
    padded,
)
from .squeeze_excite_gate import PRECISION, tile_hidden
from .tune import choose


@kernel
def _hidden_gradient_kernel(
    gate_ptr,
    hidden_ptr,
    hidden_gradient_ptr,
    expanded_gradient_ptr,
    mean_ptr,
    upstream_ptr,
    reduce_weight_ptr,
    reduce_bias_ptr,
    expand_weight_ptr,
    expand_bias_ptr,
    images,
    channel_vectors,
    reduced_vectors,
    factor,
    VECTOR: tl.constexpr,
    REDUCED_VECTOR: tl.constexpr,
    IMAGES: tl.constexpr,
    REDUCED: tl.constexpr,
    CHUNK: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATE_ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """activation(hidden) and h [N, R], expanded [N, C], all float32; the gate, if it is wanted.

    REDUCED values of the hidden vector at a time: what one step of the program leaves for the next
    goes through memory, behind a barrier.
    """
    channels = channel_vectors * VECTOR
    reduced = reduced_vectors * REDUCED_VECTOR
    image = tl.program_id(0) * IMAGES + tl.arange(0, IMAGES)
    k = tl.arange(0, REDUCED)
    present = (image < images)[:, None]
    for first in range(0, reduced, REDUCED):
        r = first + k
        hidden = tile_hidden(
            mean_ptr,
            reduce_weight_ptr,
            reduce_bias_ptr,
            image,
            images,
            r,
            reduced,
            channels,
            1,
            factor,
            1,
            CHUNK,
            PRECISION,
        )
        mask = present & (r < reduced)[None, :]
        offsets = image[:, None] * reduced + r[None, :]
        tl.store(hidden_ptr + offsets, activate(hidden, ACTIVATION), mask=mask)
        tl.store(hidden_gradient_ptr + offsets, slope(hidden, ACTIVATION), mask=mask)
    tl.debug_barrier()
    for start in range(0, channels, CHUNK):
        c = start + tl.arange(0, CHUNK)
        before = tl.zeros([IMAGES, CHUNK], tl.float32)
        for first in range(0, reduced, REDUCED):
            r = first + k
            mask = present & (r < reduced)[None, :]
            offsets = image[:, None] * reduced + r[None, :]
            hidden = tl.load(hidden_ptr + offsets, mask=mask, other=0.0)
            weight = tl.load(  # [REDUCED, CHUNK]
                expand_weight_ptr + c[None, :] * reduced + r[:, None],
                mask=(c < channels)[None, :] & (r < reduced)[:, None],
                other=0.0,
            )
            before = dot(rounded(hidden, weight.dtype), weight, before, PRECISION)
        if expand_bias_ptr is not None:
            bias = tl.load(expand_bias_ptr + c, mask=c < channels, other=0.0)
            before += bias.to(tl.float32)[None, :]
        mask = present & (c < channels)[None, :]
        offsets = image.to(tl.int64)[:, None] * channels + c[None, :]
        gradient = tl.load(upstream_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        gradient *= slope(before, GATE_ACTIVATION)
        if gate_ptr is not None:
            gate = rounded(activate(before, GATE_ACTIVATION), gate_ptr.dtype.element_ty)
            tl.store(gate_ptr + offsets, gate, mask=mask)
        tl.store(expanded_gradient_ptr + offsets, gradient, mask=mask)
    tl.debug_barrier()
    for first in range(0, reduced, REDUCED):
        r = first + k
        total = tl.zeros([IMAGES, REDUCED], tl.float32)
        for start in range(0, channels, CHUNK):
            c = start + tl.arange(0, CHUNK)
            mask = present & (c < channels)[None, :]
            offsets = image.to(tl.int64)[:, None] * channels + c[None, :]
            gradient = tl.load(expanded_gradient_ptr + offsets, mask=mask, other=0.0)
            weight = tl.load(  # [CHUNK, REDUCED]
                expand_weight_ptr + c[:, None] * reduced + r[None, :],
                mask=(c < channels)[:, None] & (r < reduced)[None, :],
                other=0.0,
            )
            high = rounded(gradient, weight.dtype)
            total = dot(high, weight, total, PRECISION)
            if weight.dtype != tl.float32:  # what rounding took away
                low = rounded(gradient - high.to(tl.float32), weight.dtype)
                total = dot(low, weight, total, PRECISION)
        mask = present & (r < reduced)[None, :]
        offsets = image[:, None] * reduced + r[None, :]
        slopes = tl.load(hidden_gradient_ptr + offsets, mask=mask, other=0.0)
        tl.store(hidden_gradient_ptr + offsets, total * slopes, mask=mask)


@kernel
def _parameters_kernel(
    mean_gradient_ptr,
    reduce_weight_gradient_ptr,
    reduce_bias_gradient_ptr,
    expand_weight_gradient_ptr,
    expand_bias_gradient_ptr,
    hidden_ptr,
    hidden_gradient_ptr,
    expanded_gradient_ptr,
    mean_ptr,
    reduce_weight_ptr,
    images,
    channel_vectors,
    reduced_vectors,
    parts,
    factor,
    VECTOR: tl.constexpr,
    REDUCED_VECTOR: tl.constexpr,
    TILE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``parts`` programs for each TILE of channels: one for each TILE of the hidden vector (0, if
    no parameter needs a gradient), the rest for tiles of images."""
    channels = channel_vectors * VECTOR
    reduced = reduced_vectors * REDUCED_VECTOR
    chunks = tl.cdiv(channels, TILE)
    k = tl.arange(0, TILE)
    c = tl.program_id(0) % chunks * TILE + k
    part = tl.program_id(0) // chunks
    if part < parts:
        r = part * TILE + k
        reduce_weight = tl.zeros([TILE, TILE], tl.float32)  # [R, C]
        expand_weight = tl.zeros([TILE, TILE], tl.float32)  # [C, R]
        reduce_bias = tl.zeros([TILE], tl.float32)
        expand_bias = tl.zeros([TILE], tl.float32)
        for first in range(0, images, TILE):
            image = first + k
            mask = (image < images)[:, None] & (c < channels)[None, :]
            offsets = image.to(tl.int64)[:, None] * channels + c[None, :]
            vectors = image[None, :] * reduced + r[:, None]  # [R, images]
            within = (image < images)[None, :] & (r < reduced)[:, None]
            if reduce_weight_gradient_ptr is not None or reduce_bias_gradient_ptr is not None:
                gradient = tl.load(hidden_gradient_ptr + vectors, mask=within, other=0.0)
                if reduce_weight_gradient_ptr is not None:
                    mean = tl.load(mean_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
                    reduce_weight = dot(gradient, mean * factor, reduce_weight, PRECISION)
                if reduce_bias_gradient_ptr is not None:
                    reduce_bias += tl.sum(gradient, 1)
            if expand_weight_gradient_ptr is not None or expand_bias_gradient_ptr is not None:
                expanded = tl.load(expanded_gradient_ptr + offsets, mask=mask, other=0.0)
                if expand_weight_gradient_ptr is not None:
                    vectors = image[:, None] * reduced + r[None, :]
                    within = (image < images)[:, None] & (r < reduced)[None, :]
                    hidden = tl.load(hidden_ptr + vectors, mask=within, other=0.0)
                    expand_weight = dot(tl.trans(expanded), hidden, expand_weight, PRECISION)
                if expand_bias_gradient_ptr is not None:
                    expand_bias += tl.sum(expanded, 0)
        if reduce_weight_gradient_ptr is not None:
            tl.store(
                reduce_weight_gradient_ptr + r[:, None] * channels + c[None, :],
                reduce_weight,
                mask=(r < reduced)[:, None] & (c < channels)[None, :],
            )
        if expand_weight_gradient_ptr is not None:
            tl.store(
                expand_weight_gradient_ptr + c[:, None] * reduced + r[None, :],
                expand_weight,
                mask=(c < channels)[:, None] & (r < reduced)[None, :],
            )
        if reduce_bias_gradient_ptr is not None:
            mine = (r < reduced) & (tl.program_id(0) % chunks == 0)
            tl.store(reduce_bias_gradient_ptr + r, reduce_bias, mask=mine)
        if expand_bias_gradient_ptr is not None:
            mine = (c < channels) & (part == 0)
            tl.store(expand_bias_gradient_ptr + c, expand_bias, mask=mine)
    else:
        if mean_gradient_ptr is not None:
            image = (part - parts) * TILE + k
            total = tl.zeros([TILE, TILE], tl.float32)
            for first in range(0, reduced, TILE):
                r = first + k
                gradient = tl.load(
                    hidden_gradient_ptr + image[:, None] * reduced + r[None, :],
                    mask=(image < images)[:, None] & (r < reduced)[None, :],
                    other=0.0,
                )
                weight = tl.load(
                    reduce_weight_ptr + r[:, None] * channels + c[None, :],
                    mask=(r < reduced)[:, None] & (c < channels)[None, :],
                    other=0.0,
                )
                total = dot(gradient, weight.to(tl.float32), total, PRECISION)
            offsets = image.to(tl.int64)[:, None] * channels + c[None, :]
            mask = (image < images)[:, None] & (c < channels)[None, :]
            tl.store(mean_gradient_ptr + offsets, total, mask=mask)


class GateGradients(NamedTuple):
    """What :func:`gate_backward` gives; None what was not asked for."""

    gate: Tensor | None  # [N, C], once more
    mean: Tensor | None  # [N, C]
    reduce_weight: Tensor | None
    reduce_bias: Tensor | None
    expand_weight: Tensor | None
    expand_bias: Tensor | None


def gate_backward(
    upstream: Tensor,
    mean: Tensor,
    factor: float,
    arguments: Sequence[Any],
    needed: tuple[bool, bool, bool, bool, bool, bool],
    mean_dtype: torch.dtype = torch.float32,
) -> GateGradients:
    """Gradients of `squeeze_excite_gate.gate`.

    Args:
        upstream: [N, C] for the gate.
        mean: [N, C]; times ``factor`` it is the mean.
        arguments: of the op `squeeze_excite_gate` after its mean.
        needed: which fields of the result are wanted.
        mean_dtype: of the gradient of the mean (not of ``mean``: ``factor`` is left out).
    """
    reduce_weight, reduce_bias, expand_weight, expand_bias, activation, gate_activation = arguments
    images, channels = mean.shape
    reduced = reduce_weight.shape[0]
    dtype, device = expand_weight.dtype, mean.device
    upstream, mean, reduce_weight, expand_weight = (
        tensor.contiguous() for tensor in (upstream, mean, reduce_weight, expand_weight)
    )

    def room(want: bool, like: Tensor | None, dtype: torch.dtype | None = None) -> Tensor | None:
        if not want or like is None:
            return None
        return torch.empty(like.shape, dtype=dtype or like.dtype, device=device)

    results = GateGradients(
        room(needed[0], mean, dtype),
        room(needed[1], mean, mean_dtype),
        room(needed[2], reduce_weight),
        room(needed[3], reduce_bias),
        room(needed[4], expand_weight),
        room(needed[5], expand_bias),
    )
    float32: dict[str, Any] = {"dtype": torch.float32, "device": device}
    hidden = torch.empty((images, reduced), **float32)
    hidden_gradient = torch.empty((images, reduced), **float32)
    expanded = torch.empty((images, channels), **float32)
    vectors = {
        "VECTOR": vector_width(dtype, channels),
        "REDUCED_VECTOR": vector_width(dtype, reduced),
    }
    channel_vectors = channels // vectors["VECTOR"]
    reduced_vectors = reduced // vectors["REDUCED_VECTOR"]

    def run(config: GateBackwardConfig) -> None:
        launch(
            _hidden_gradient_kernel,
            (triton.cdiv(images, 16),),
            results.gate,
            hidden,
            hidden_gradient,
            expanded,
            mean,
            upstream,
            reduce_weight,
            reduce_bias,
            expand_weight,
            expand_bias,
            images,
            channel_vectors,
            reduced_vectors,
            float(factor),
            max_registers=255,  # left alone the assembler spills two to fit another block
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            IMAGES=16,
            REDUCED=max(32, min(padded(reduced), config.step)),
            CHUNK=config.chunk,
            ACTIVATION=activation,
            GATE_ACTIVATION=gate_activation,
            PRECISION=PRECISION,
            **vectors,
        )
        if not any(needed[1:]):
            return
        tile = config.tile
        parts = triton.cdiv(reduced, tile) if any(needed[2:]) else 0
        tiles = triton.cdiv(images, tile) if needed[1] else 0
        launch(
            _parameters_kernel,
            (triton.cdiv(channels, tile) * (parts + tiles),),
            *results[1:],
            hidden,
            hidden_gradient,
            expanded,
            mean,
            reduce_weight,
            images,
            channel_vectors,
            reduced_vectors,
            parts,
            float(factor),
            num_warps=4,
            num_stages=2,
            TILE=tile,
            PRECISION=PRECISION,
            **vectors,
        )

    problem = GateProblem(images, 1, channels, reduced, dtype.itemsize)
    run(
        choose(
            "squeeze_excite_gate_backward",
            problem,
            device_of(mean),
            gate_backward_heuristic,
            gate_backward_candidates,
            run,
        )
    )
    return results
