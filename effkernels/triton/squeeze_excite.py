"""Squeeze-and-excitation: spatial mean, gate, product; forward and backward.

    mean[n, c]   = Σ over pixels of input[n, c] / (H · W)
    gate         = gate_activation(expand · activation(reduce · mean + reduce_bias) + expand_bias)
    output[n, c] = gate[n, c] · input[n, c]

Layout: NHWC. Three launches: partial sums of the mean (:func:`pool`), the gate
(``squeeze_excite_gate.py``), the product (`batch_norm_act_passes.apply`). Backward five at most:
Σ input and Σ output_gradient · input in one reading; the gate's two or three; and
input_gradient = output_gradient · gate + mean_gradient / (H · W) in one pass.

Moves: forward 3, backward 5 tensors' bytes. B0's largest at batch 256 (96 channels, 56 x 56,
bfloat16, 154 MB): 0.15 ms and 0.26 ms at 3.0 TB/s. MBConv does without most of that: its
depthwise convolution gives the partial sums and its projection multiplies with the gate.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..layout import nhwc
from ..operands import Forward, Gradient
from . import reduce
from .batch_norm_act_config import SumConfig, SumProblem
from .batch_norm_act_passes import apply, differentiate, vector_of
from .language import forward_operand, kernel
from .launch import device_of, launch, vector_width
from .squeeze_excite_config import pool_candidates, pool_heuristic
from .squeeze_excite_gate import gate
from .squeeze_excite_gate_backward import GateGradients, gate_backward
from .tune import choose

__all__ = [
    "GateGradients",
    "gate",
    "gate_backward",
    "pool",
    "squeeze_excite",
    "squeeze_excite_backward",
    "squeeze_excite_gate",
    "squeeze_excite_gate_backward",
]


@kernel
def _pool_kernel(
    sums_ptr,
    products_ptr,
    input_ptr,
    upstream_ptr,
    scale_ptr,
    shift_ptr,
    rows,
    block_rows,
    blocks,
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
    program = tl.program_id(0) // chunks  # image · blocks + block
    image = program // blocks
    first = program % blocks * block_rows
    left = tl.minimum(rows - first, block_rows)
    start = (image.to(tl.int64) * rows + first) * channels
    lane = (tl.arange(0, UNROLL) * ROWS)[:, None, None] + tl.arange(0, ROWS)[None, :, None]
    offsets = lane * channels + c[None, None, :]
    inside = c < channels
    scale, shift = 1.0, 0.0
    if scale_ptr is not None:
        scale = vector_of(scale_ptr, c, inside, 0.0)[None, :, :]
        shift = vector_of(shift_ptr, c, inside, 0.0)[None, :, :]
    total = tl.zeros([ROWS, CHANNELS], tl.float32)
    product = tl.zeros([ROWS, CHANNELS], tl.float32)
    for done in range(0, left, UNROLL * ROWS):
        mask = (lane < left - done) & inside[None, None, :]
        x = tl.load(input_ptr + start + offsets, mask=mask, other=0.0).to(tl.float32)
        if upstream_ptr is not None:
            upstream = tl.load(upstream_ptr + start + offsets, mask=mask, other=0.0)
        x = forward_operand(x, scale, shift, 1.0, scale_ptr is not None, ACTIVATION, False)
        if upstream_ptr is not None:  # 0 outside
            product += tl.sum(upstream.to(tl.float32) * x, 0)
        if sums_ptr is not None:
            if scale_ptr is not None or ACTIVATION != "none":
                x = tl.where(mask, x, 0.0)
            total += tl.sum(x, 0)
        start += channels.to(tl.int64) * (UNROLL * ROWS)
    partial = program.to(tl.int64) * channels + c
    if sums_ptr is not None:
        tl.store(sums_ptr + partial, tl.sum(total, 0), mask=inside)
    if products_ptr is not None:
        tl.store(products_ptr + partial, tl.sum(product, 0), mask=inside)


def pool(
    input: Tensor,
    operand: Forward | None = None,
    upstream: Tensor | None = None,
    sums: bool = True,
) -> tuple[Tensor | None, Tensor | None]:
    """Partial sums over pixels of x = operand(input) and of upstream · x.

    Args:
        input: [N, C, H, W] dense NHWC.
        operand: without a gate.
        upstream: like ``input``; None: its sums are not wanted.
        sums: whether those of x are.

    Returns:
        [N, blocks, C] float32 each, or None.
    """
    operand = operand or Forward()
    images, channels, height, width = input.shape
    rows = height * width
    vector = vector_width(input.dtype, channels)
    problem = SumProblem(images, rows, channels, vector, 1 + (upstream is not None))

    def run(config: SumConfig) -> tuple[Tensor | None, Tensor | None]:
        block_rows = max(triton.cdiv(rows, config.blocks), 1)
        blocks = triton.cdiv(rows, block_rows)
        results = [
            torch.empty((images, blocks, channels), dtype=torch.float32, device=input.device)
            if want
            else None
            for want in (sums, upstream is not None)
        ]
        launch(
            _pool_kernel,
            (images * blocks * triton.cdiv(channels, config.channels),),
            *results,
            input,
            upstream,
            operand.scale,
            operand.shift,
            rows,
            block_rows,
            blocks,
            channels // vector,
            num_warps=config.num_warps,
            VECTOR=vector,
            UNROLL=config.unroll,
            ROWS=config.rows,
            CHANNELS=config.channels,
            ACTIVATION=operand.activation,
        )
        return results[0], results[1]

    device = device_of(input)
    return run(choose("squeeze_excite_pool", problem, device, pool_heuristic, pool_candidates, run))


def squeeze_excite_gate(
    mean: Tensor,
    reduce_weight: Tensor,
    reduce_bias: Tensor | None,
    expand_weight: Tensor,
    expand_bias: Tensor | None,
    activation: str,
    gate_activation: str,
) -> Tensor:
    """The op ``squeeze_excite_gate``: [N, C] -> [N, C]."""
    return gate(
        mean,
        1.0,
        reduce_weight,
        reduce_bias,
        expand_weight,
        expand_bias,
        activation,
        gate_activation,
    )


def squeeze_excite_gate_backward(
    arguments: list[Any],
    needed: list[bool],
    saved: tuple[Tensor, ...],
    gradients: tuple[Tensor | None, ...],
) -> tuple[Tensor | None, ...]:
    """The gradients of :func:`squeeze_excite_gate` for its arguments."""
    (upstream,) = gradients
    if upstream is None:
        return (None,) * len(arguments)
    mean = arguments[0]
    wanted = (False, needed[0], needed[1], needed[2], needed[3], needed[4])
    results = gate_backward(upstream, mean, 1.0, arguments[1:], wanted, mean.dtype)
    return (*results[1:], None, None)


def squeeze_excite(
    input: Tensor,
    reduce_weight: Tensor,
    reduce_bias: Tensor | None,
    expand_weight: Tensor,
    expand_bias: Tensor | None,
    activation: str,
    gate_activation: str,
) -> Tensor:
    """The op ``squeeze_excite``."""
    input = nhwc(input)
    sums, _ = pool(input)
    assert sums is not None
    factor = 1 / (input.shape[2] * input.shape[3])
    weights = (reduce_weight, reduce_bias, expand_weight, expand_bias)
    return apply(input, Forward(gate=gate(sums, factor, *weights, activation, gate_activation)))


def squeeze_excite_backward(
    arguments: list[Any],
    needed: list[bool],
    saved: tuple[Tensor, ...],
    gradients: tuple[Tensor | None, ...],
) -> tuple[Tensor | None, ...]:
    """The gradients of :func:`squeeze_excite` for its arguments."""
    (upstream,) = gradients
    if upstream is None:
        return (None,) * len(arguments)
    input, upstream = nhwc(arguments[0]), nhwc(upstream)
    factor = 1 / (input.shape[2] * input.shape[3])
    sums, products = (_whole(partials) for partials in pool(input, upstream=upstream))
    wanted = (needed[0], needed[0], needed[1], needed[2], needed[3], needed[4])
    results = gate_backward(products, sums, factor, arguments[1:], wanted)
    input_gradient = None
    if needed[0]:
        operand = Gradient(gate=results.gate, offset=results.mean)
        input_gradient, _ = differentiate(upstream, operand, offset_factor=factor)
    return (input_gradient, *results[2:], None, None)


def _whole(partials: Tensor | None) -> Tensor:
    """[N, blocks, C] -> [N, C]."""
    assert partials is not None
    return partials[:, 0] if partials.shape[1] == 1 else reduce.totals(partials)
