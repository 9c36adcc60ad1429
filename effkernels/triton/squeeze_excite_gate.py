"""The kernels between the spatial mean and the gate, and their gradients.

    hidden[n] = reduce_weight · mean[n] + reduce_bias                                     [R]
    gate[n]   = gate_activation(expand_weight · activation(hidden[n]) + expand_bias)      [C]

Layout: mean [N, C], or partial sums [N, blocks, C] that are added here, in order, and multiplied
with a factor; matrices [R, C] and [C, R], row by row.

Moves: the weights, 221 KB at B0's last blocks (1152 channels, 48 of them reduced, bfloat16), from
the L2: the work is latency. No program can wait for another, so each computes the whole hidden
vector of its images, which costs it the first matrix (110 KB, about 55 bytes a clock: 1.2 µs), and
64 channels of the gate. A small batch takes one image a program and multiplies on CUDA cores,
whose loads need no way through shared memory; 16 images and more go to tensor cores together and
read the weights once. At 256 images 16 · 18 programs read 36 MB out of the L2: 7 µs where a
program for each image and slice would read 590 MB. A first matrix of more than 256 KB (B4's and
B7's last blocks) gets a kernel of its own in front, 16 hidden values a program.

Gradient: the first kernel recomputes hidden and gate and takes the gradient back to hidden, in
slices of channels whose partial sums `reduce.totals` adds; in the second a program owns 16 or 32
channels of both weights' gradients and goes through all images in order. No atomics.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import reduce
from .language import activate, dot, kernel, slope
from .launch import device_of, launch
from .squeeze_excite_config import (
    GateBackwardConfig,
    GateConfig,
    GateProblem,
    gate_backward_candidates,
    gate_backward_heuristic,
    gate_candidates,
    gate_heuristic,
    padded,
)
from .tune import choose

_PRECISION = "tf32x3"  # float32 products are as exact as PyTorch's linear layers
_BLOCKS = 8  # partial sums added at a time


@triton.jit
def _means(
    mean_ptr,
    image,
    images,
    c,
    channels,
    blocks,
    factor,
    PARTIALS: tl.constexpr,
):
    """[images, channels] float32 of the means."""
    mask = (image < images)[:, None] & (c < channels)[None, :]
    if PARTIALS > 1:
        b = tl.arange(0, PARTIALS)
        start = image.to(tl.int64) * blocks * channels
        total = tl.zeros([image.shape[0], c.shape[0]], tl.float32)
        for first in range(0, blocks, PARTIALS):
            offsets = start[None, :, None] + ((first + b) * channels)[:, None, None]
            partial = tl.load(
                mean_ptr + offsets + c[None, None, :],
                mask=mask[None, :, :] & (first + b < blocks)[:, None, None],
                other=0.0,
            )
            total += tl.sum(partial.to(tl.float32), 0)
    else:
        offsets = image.to(tl.int64)[:, None] * channels + c[None, :]
        total = tl.load(mean_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    return total * factor


@triton.jit
def _hidden(
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
    """[images, reduced] float32: the reduced vector before its activation, zero past the end."""
    IMAGES: tl.constexpr = image.shape[0]
    REDUCED: tl.constexpr = r.shape[0]
    k = tl.arange(0, CHUNK)
    if IMAGES == 1:
        products = tl.zeros([REDUCED, CHUNK], tl.float32)
        for first in range(0, channels, CHUNK):
            c = first + k
            mask = (r < reduced)[:, None] & (c < channels)[None, :]
            weight = tl.load(
                weight_ptr + r[:, None] * channels + c[None, :], mask=mask, other=0.0
            )
            mean = _means(mean_ptr, image, images, c, channels, blocks, factor, PARTIALS)
            products += weight.to(tl.float32) * mean
        total = tl.sum(products, 1)[None, :]
    else:
        total = tl.zeros([IMAGES, REDUCED], tl.float32)
        for first in range(0, channels, CHUNK):
            c = first + k
            mask = (r < reduced)[None, :] & (c < channels)[:, None]
            weight = tl.load(
                weight_ptr + r[None, :] * channels + c[:, None], mask=mask, other=0.0
            )
            mean = _means(mean_ptr, image, images, c, channels, blocks, factor, PARTIALS)
            total = dot(mean.to(weight.dtype), weight, total, PRECISION)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + r, mask=r < reduced, other=0.0).to(tl.float32)[None, :]
    return total


@kernel
def _hidden_kernel(
    hidden_ptr,
    mean_ptr,
    weight_ptr,
    bias_ptr,
    images,
    blocks,
    channel_vectors,
    reduced,
    factor,
    VECTOR: tl.constexpr,
    PARTIALS: tl.constexpr,
    IMAGES: tl.constexpr,
    REDUCED: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    channels = channel_vectors * VECTOR
    slices = tl.cdiv(reduced, REDUCED)
    image = tl.program_id(0) // slices * IMAGES + tl.arange(0, IMAGES)
    r = tl.program_id(0) % slices * REDUCED + tl.arange(0, REDUCED)
    hidden = _hidden(
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
        PARTIALS,
        CHUNK,
        PRECISION,
    )
    mask = (image < images)[:, None] & (r < reduced)[None, :]
    tl.store(hidden_ptr + image[:, None] * reduced + r[None, :], hidden, mask=mask)


@kernel
def _gate_kernel(
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
    channels = channel_vectors * VECTOR
    reduced = reduced_vectors * REDUCED_VECTOR
    slices = tl.cdiv(channels, SLICE)
    image = tl.program_id(0) // slices * IMAGES + tl.arange(0, IMAGES)
    c = tl.program_id(0) % slices * SLICE + tl.arange(0, SLICE)
    r = tl.arange(0, REDUCED)
    # First, because it waits for nothing.
    if IMAGES == 1:
        weight = tl.load(
            expand_weight_ptr + c[:, None] * reduced + r[None, :],
            mask=(c < channels)[:, None] & (r < reduced)[None, :],
            other=0.0,
        )
    else:
        weight = tl.load(
            expand_weight_ptr + c[None, :] * reduced + r[:, None],
            mask=(c < channels)[None, :] & (r < reduced)[:, None],
            other=0.0,
        )
    if hidden_ptr is not None:
        hidden = tl.load(
            hidden_ptr + image[:, None] * reduced + r[None, :],
            mask=(image < images)[:, None] & (r < reduced)[None, :],
            other=0.0,
        )
    else:
        hidden = _hidden(
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
    hidden = activate(hidden, ACTIVATION)
    if IMAGES == 1:
        gate = tl.sum(weight.to(tl.float32) * hidden, 1)[None, :]
    else:
        gate = dot(
            hidden.to(weight.dtype), weight, tl.zeros([IMAGES, SLICE], tl.float32), PRECISION
        )
    if expand_bias_ptr is not None:
        gate += tl.load(expand_bias_ptr + c, mask=c < channels, other=0.0).to(tl.float32)[None, :]
    gate = activate(gate, GATE_ACTIVATION)
    mask = (image < images)[:, None] & (c < channels)[None, :]
    offsets = image.to(tl.int64)[:, None] * channels + c[None, :]
    tl.store(gate_ptr + offsets, gate, mask=mask)


@kernel
def _gate_backward_kernel(
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
    slices,
    slice_chunks,
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
    """hidden and its gradient's partial sums [N, slices, R], the gradient before the gate's
    activation [N, C], all float32, and the gate again if it is wanted."""
    channels = channel_vectors * VECTOR
    reduced = reduced_vectors * REDUCED_VECTOR
    part = tl.program_id(0) % slices
    image = tl.program_id(0) // slices * IMAGES + tl.arange(0, IMAGES)
    r = tl.arange(0, REDUCED)
    hidden = _hidden(
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
    mask = (image < images)[:, None] & (r < reduced)[None, :]
    tl.store(hidden_ptr + image[:, None] * reduced + r[None, :], hidden, mask=mask)
    hidden = activate(hidden, ACTIVATION).to(expand_weight_ptr.dtype.element_ty)
    total = tl.zeros([IMAGES, REDUCED], tl.float32)
    for step in range(slice_chunks):
        c = (part * slice_chunks + step) * CHUNK + tl.arange(0, CHUNK)
        weight = tl.load(  # [CHUNK, REDUCED]
            expand_weight_ptr + c[:, None] * reduced + r[None, :],
            mask=(c < channels)[:, None] & (r < reduced)[None, :],
            other=0.0,
        )
        inside = (image < images)[:, None] & (c < channels)[None, :]
        offsets = image.to(tl.int64)[:, None] * channels + c[None, :]
        gradient = tl.load(upstream_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        before = dot(
            hidden, tl.trans(weight), tl.zeros([IMAGES, CHUNK], tl.float32), PRECISION
        )
        if expand_bias_ptr is not None:
            bias = tl.load(expand_bias_ptr + c, mask=c < channels, other=0.0)
            before += bias.to(tl.float32)[None, :]
        gradient *= slope(before, GATE_ACTIVATION)
        if gate_ptr is not None:
            tl.store(gate_ptr + offsets, activate(before, GATE_ACTIVATION), mask=inside)
        tl.store(expanded_gradient_ptr + offsets, gradient, mask=inside)
        total = dot(gradient.to(weight.dtype), weight, total, PRECISION)
    offsets = (image[:, None] * slices + part) * reduced + r[None, :]
    tl.store(hidden_gradient_ptr + offsets, total, mask=mask)


@kernel
def _weights_backward_kernel(
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
    factor,
    VECTOR: tl.constexpr,
    REDUCED_VECTOR: tl.constexpr,
    IMAGES: tl.constexpr,
    REDUCED: tl.constexpr,
    CHANNELS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients of mean, weights and biases. Operands stay float32: with as few images as
    there are, rounding them would show, and the products are small."""
    channels = channel_vectors * VECTOR
    reduced = reduced_vectors * REDUCED_VECTOR
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    r = tl.arange(0, REDUCED)
    matrix = r[:, None] * channels + c[None, :]
    inside = (r < reduced)[:, None] & (c < channels)[None, :]
    if mean_gradient_ptr is not None:
        weight = tl.load(reduce_weight_ptr + matrix, mask=inside, other=0.0).to(tl.float32)
    reduce_weight = tl.zeros([REDUCED, CHANNELS], tl.float32)
    expand_weight = tl.zeros([REDUCED, CHANNELS], tl.float32)  # transposed
    reduce_bias = tl.zeros([REDUCED], tl.float32)
    expand_bias = tl.zeros([CHANNELS], tl.float32)
    for first in range(0, images, IMAGES):
        image = first + tl.arange(0, IMAGES)
        mask = (image < images)[:, None] & (r < reduced)[None, :]
        offsets = image[:, None] * reduced + r[None, :]
        hidden = tl.load(hidden_ptr + offsets, mask=mask, other=0.0)
        gradient = tl.load(hidden_gradient_ptr + offsets, mask=mask, other=0.0)
        gradient *= slope(hidden, ACTIVATION)
        mask = (image < images)[:, None] & (c < channels)[None, :]
        offsets = image.to(tl.int64)[:, None] * channels + c[None, :]
        if mean_gradient_ptr is not None:
            mean_gradient = dot(
                gradient, weight, tl.zeros([IMAGES, CHANNELS], tl.float32), PRECISION
            )
            tl.store(mean_gradient_ptr + offsets, mean_gradient, mask=mask)
        if reduce_weight_gradient_ptr is not None:
            mean = tl.load(mean_ptr + offsets, mask=mask, other=0.0).to(tl.float32) * factor
            reduce_weight = dot(tl.trans(gradient), mean, reduce_weight, PRECISION)
        if reduce_bias_gradient_ptr is not None:
            reduce_bias += tl.sum(gradient, 0)
        if expand_weight_gradient_ptr is not None or expand_bias_gradient_ptr is not None:
            expanded = tl.load(expanded_gradient_ptr + offsets, mask=mask, other=0.0)
            if expand_weight_gradient_ptr is not None:
                # Images past the end: their expanded is 0, whatever their activation.
                hidden = activate(hidden, ACTIVATION)
                expand_weight = dot(tl.trans(hidden), expanded, expand_weight, PRECISION)
            if expand_bias_gradient_ptr is not None:
                expand_bias += tl.sum(expanded, 0)
    if reduce_weight_gradient_ptr is not None:
        tl.store(reduce_weight_gradient_ptr + matrix, reduce_weight, mask=inside)
    if expand_weight_gradient_ptr is not None:
        transposed = c[None, :] * reduced + r[:, None]
        tl.store(expand_weight_gradient_ptr + transposed, expand_weight, mask=inside)
    if reduce_bias_gradient_ptr is not None:
        mine = (r < reduced) & (tl.program_id(0) == 0)
        tl.store(reduce_bias_gradient_ptr + r, reduce_bias, mask=mine)
    if expand_bias_gradient_ptr is not None:
        tl.store(expand_bias_gradient_ptr + c, expand_bias, mask=c < channels)


class GateGradients(NamedTuple):
    """What :func:`gate_backward` gives; None what was not asked for."""

    gate: Tensor | None  # [N, C], once more
    mean: Tensor | None  # [N, C]
    reduce_weight: Tensor | None
    reduce_bias: Tensor | None
    expand_weight: Tensor | None
    expand_bias: Tensor | None


def _vector(size: int, itemsize: int) -> int:
    """Values an access of rows of ``size``, 16 bytes' worth at most."""
    width = 16 // itemsize
    while size % width:
        width //= 2
    return width


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
    itemsize = reduce_weight.element_size()
    mean, reduce_weight, expand_weight = (
        tensor.contiguous() for tensor in (mean, reduce_weight, expand_weight)
    )
    result = torch.empty((images, channels), dtype=expand_weight.dtype, device=mean.device)
    problem = GateProblem(images, blocks, channels, reduced, itemsize)
    vector = min(_vector(channels, itemsize), _vector(channels, mean.element_size()))
    partials = _BLOCKS if blocks > 1 else 1

    def run(config: GateConfig) -> None:
        tiles = triton.cdiv(images, config.images)
        hidden = None
        if config.split:
            hidden = torch.empty((images, reduced), dtype=torch.float32, device=mean.device)
            launch(
                _hidden_kernel,
                (tiles * triton.cdiv(reduced, 16),),
                hidden,
                mean,
                reduce_weight,
                reduce_bias,
                images,
                blocks,
                channels // vector,
                reduced,
                float(factor),
                num_warps=config.num_warps,
                num_stages=config.num_stages,
                VECTOR=vector,
                PARTIALS=partials,
                IMAGES=config.images,
                REDUCED=16,
                CHUNK=config.chunk,
                PRECISION=_PRECISION,
            )
        launch(
            _gate_kernel,
            (tiles * triton.cdiv(channels, config.slice_channels),),
            result,
            hidden,
            mean,
            reduce_weight,
            reduce_bias,
            expand_weight,
            expand_bias,
            images,
            blocks,
            channels // vector,
            reduced // _vector(reduced, itemsize),
            float(factor),
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            VECTOR=vector,
            REDUCED_VECTOR=_vector(reduced, itemsize),
            PARTIALS=partials,
            IMAGES=config.images,
            REDUCED=padded(reduced),
            SLICE=config.slice_channels,
            CHUNK=config.chunk,
            ACTIVATION=activation,
            GATE_ACTIVATION=gate_activation,
            PRECISION=_PRECISION,
        )

    run(
        choose(
            "squeeze_excite_gate", problem, device_of(mean), gate_heuristic, gate_candidates, run
        )
    )
    return result


def gate_backward(
    upstream: Tensor,
    mean: Tensor,
    factor: float,
    reduce_weight: Tensor,
    reduce_bias: Tensor | None,
    expand_weight: Tensor,
    expand_bias: Tensor | None,
    activation: str,
    gate_activation: str,
    needed: tuple[bool, bool, bool, bool, bool, bool],
    mean_dtype: torch.dtype = torch.float32,
) -> GateGradients:
    """Gradients of :func:`gate`.

    Args:
        upstream: [N, C] for the gate.
        mean: [N, C]; times ``factor`` it is the mean.
        needed: which fields of the result are wanted.
        mean_dtype: of the gradient of the mean (not of ``mean``: ``factor`` is left out).
    """
    images, channels = mean.shape
    reduced = reduce_weight.shape[0]
    itemsize = reduce_weight.element_size()
    device = mean.device
    upstream, mean, reduce_weight, expand_weight = (
        tensor.contiguous() for tensor in (upstream, mean, reduce_weight, expand_weight)
    )
    problem = GateProblem(images, 1, channels, reduced, itemsize)

    def room(want: bool, like: Tensor | None, dtype: torch.dtype | None = None) -> Tensor | None:
        if not want or like is None:
            return None
        return torch.empty(like.shape, dtype=dtype or like.dtype, device=device)

    results = GateGradients(
        room(needed[0], mean, expand_weight.dtype),
        room(needed[1], mean, mean_dtype),
        room(needed[2], reduce_weight),
        room(needed[3], reduce_bias),
        room(needed[4], expand_weight),
        room(needed[5], expand_bias),
    )
    hidden = torch.empty((images, reduced), dtype=torch.float32, device=device)
    expanded = torch.empty((images, channels), dtype=torch.float32, device=device)
    sizes = {
        "VECTOR": min(_vector(channels, itemsize), _vector(channels, mean.element_size())),
        "REDUCED_VECTOR": _vector(reduced, itemsize),
        "REDUCED": padded(reduced),
        "ACTIVATION": activation,
        "PRECISION": _PRECISION,
    }
    channel_vectors = channels // sizes["VECTOR"]
    reduced_vectors = reduced // sizes["REDUCED_VECTOR"]

    def run(config: GateBackwardConfig) -> None:
        slice_chunks = triton.cdiv(triton.cdiv(channels, config.slices), config.chunk)
        slices = triton.cdiv(channels, slice_chunks * config.chunk)
        hidden_gradient = torch.empty((images, slices, reduced), dtype=torch.float32, device=device)
        launch(
            _gate_backward_kernel,
            (triton.cdiv(images, 16) * slices,),
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
            slices,
            slice_chunks,
            channel_vectors,
            reduced_vectors,
            float(factor),
            num_warps=config.num_warps,
            num_stages=3,
            IMAGES=16,
            CHUNK=config.chunk,
            GATE_ACTIVATION=gate_activation,
            **sizes,
        )
        if not any(needed[1:]):
            return
        if slices > 1:
            hidden_gradient = reduce.totals(hidden_gradient)
        launch(
            _weights_backward_kernel,
            (triton.cdiv(channels, config.channels),),
            *results[1:],
            hidden,
            hidden_gradient,
            expanded,
            mean,
            reduce_weight,
            images,
            channel_vectors,
            reduced_vectors,
            float(factor),
            num_warps=config.num_warps,
            num_stages=2,
            IMAGES=32,
            CHANNELS=config.channels,
            **sizes,
        )

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
