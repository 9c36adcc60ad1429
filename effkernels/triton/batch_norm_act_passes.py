"""Elementwise passes over [rows, channels]: BatchNorm's application, and its gradient.

    apply:          output = activation(operand(input) + residual)              (operands.Forward)
    differentiate:  input_gradient = operand(upstream), and t of it for the residual
                                                                               (operands.Gradient)

Layout: NHWC, rows are pixels. A program takes a tile of rows x 16, 32 or 64 channels of one image;
a thread holds 16 bytes of neighbouring channels of several rows, so that the vectors of these
channels are loaded once for all of them. Neighbouring programs take neighbouring channels.
Offsets inside a tile have 32 bits, the tile's own 64, computed once by a program: tensors of any
size, one compiled kernel.

Moves: every tensor once. B0's largest layer at batch 256 (96 channels, 112 x 112, bfloat16):
617 MB read and written: 0.41 ms at 3.0 TB/s forward, 0.62 ms for the gradient's pass.

As compiled for sm_90 (no GPU has run it), bfloat16 with SiLU: `apply` 60 registers, 32 warps, four
loads and four stores of 16 bytes, 20 instructions an element, 2 of them MUFU, where the copy rate
leaves time for 38; no barrier, no shared memory. `differentiate` 64 registers, 32 warps.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..layout import empty_nhwc
from ..operands import Forward, Gradient
from .batch_norm_act_config import PassConfig, PassProblem, pass_candidates, pass_heuristic
from .language import activate, forward_operand, kernel, rounded, slope
from .launch import device_of, launch, vector_width
from .tune import choose


class Normalization(NamedTuple):
    """A BatchNorm that is not folded into a scale and a shift: (z − mean) / √(var + eps) · weight
    + bias, which stays exact where the mean is far larger than the deviation."""

    mean: Tensor  # [C]
    var: Tensor  # [C]
    weight: Tensor | None
    bias: Tensor | None
    eps: float


@triton.jit
def vector_of(pointer, c, inside, OTHERWISE: tl.constexpr):
    """[1, channels] float32 of a vector [C]."""
    return tl.load(pointer + c, mask=inside, other=OTHERWISE).to(tl.float32)[None, :]


@triton.jit
def normalization_scale(weight_ptr, var_ptr, eps, c, inside):
    """weight / √(var + eps), [1, channels]."""
    scale = tl.rsqrt(vector_of(var_ptr, c, inside, 1.0) + eps)
    if weight_ptr is not None:
        scale *= vector_of(weight_ptr, c, inside, 0.0)
    return scale


@triton.jit
def normalized(x, mean, scale, bias_ptr, c, inside):
    """(x − mean) · scale + bias."""
    x = (x - mean) * scale
    if bias_ptr is not None:
        x += vector_of(bias_ptr, c, inside, 0.0)
    return x


@kernel
def _apply_kernel(
    output_ptr,
    input_ptr,
    residual_ptr,
    mean_ptr,
    var_ptr,
    weight_ptr,
    bias_ptr,
    gate_ptr,
    eps,
    rows,
    channel_vectors,
    VECTOR: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    OPERAND_ACTIVATION: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    channels = channel_vectors * VECTOR
    chunks = tl.cdiv(channels, CHANNELS)
    c = tl.program_id(0) % chunks * CHANNELS + tl.arange(0, CHANNELS)
    block = tl.program_id(0) // chunks
    image = 0
    if gate_ptr is not None:
        blocks = tl.cdiv(rows, ROWS)
        image = block // blocks
        block = block % blocks
    first = block.to(tl.int64) * ROWS
    start = first * channels
    if gate_ptr is not None:
        start += image.to(tl.int64) * rows * channels
    left = tl.minimum(rows - first, ROWS).to(tl.int32)
    r = tl.arange(0, ROWS)
    inside = c < channels
    mask = (r < left)[:, None] & inside[None, :]
    offsets = r[:, None] * channels + c[None, :]

    x = tl.load(input_ptr + start + offsets, mask=mask).to(tl.float32)
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + start + offsets, mask=mask).to(tl.float32)
    if mean_ptr is not None:
        mean = vector_of(mean_ptr, c, inside, 0.0)
        scale = normalization_scale(weight_ptr, var_ptr, eps, c, inside)
        x = normalized(x, mean, scale, bias_ptr, c, inside)
    else:
        scale, shift, gate = 1.0, 0.0, 1.0
        if weight_ptr is not None:
            scale = vector_of(weight_ptr, c, inside, 0.0)
            shift = vector_of(bias_ptr, c, inside, 0.0)
        if gate_ptr is not None:
            gate = vector_of(gate_ptr + image.to(tl.int64) * channels, c, inside, 0.0)
        x = forward_operand(
            x,
            scale,
            shift,
            gate,
            weight_ptr is not None,
            OPERAND_ACTIVATION,
            gate_ptr is not None,
        )
    if residual_ptr is not None:
        x += residual
    x = rounded(activate(x, ACTIVATION), output_ptr.dtype.element_ty)
    tl.store(output_ptr + start + offsets, x, mask=mask)


@kernel
def _differentiate_kernel(
    output_ptr,
    residual_output_ptr,
    upstream_ptr,
    input_ptr,
    residual_ptr,
    mean_ptr,
    var_ptr,
    weight_ptr,
    bias_ptr,
    gate_ptr,
    offset_ptr,
    factor_ptr,
    slope_ptr,
    constant_ptr,
    eps,
    gate_factor,
    rows,
    channel_vectors,
    VECTOR: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    channels = channel_vectors * VECTOR
    chunks = tl.cdiv(channels, CHANNELS)
    c = tl.program_id(0) % chunks * CHANNELS + tl.arange(0, CHANNELS)
    block = tl.program_id(0) // chunks
    PER_IMAGE: tl.constexpr = gate_ptr is not None or offset_ptr is not None
    image = block.to(tl.int64)
    if PER_IMAGE:
        blocks = tl.cdiv(rows, ROWS)
        image = (block // blocks).to(tl.int64)
        block = block % blocks
    first = block.to(tl.int64) * ROWS
    start = first * channels
    if PER_IMAGE:
        start += image * rows * channels
    left = tl.minimum(rows - first, ROWS).to(tl.int32)
    r = tl.arange(0, ROWS)
    inside = c < channels
    mask = (r < left)[:, None] & inside[None, :]
    offsets = r[:, None] * channels + c[None, :]

    t = tl.load(upstream_ptr + start + offsets, mask=mask).to(tl.float32)
    if input_ptr is not None:
        x = tl.load(input_ptr + start + offsets, mask=mask).to(tl.float32)
    if gate_ptr is not None:
        t *= vector_of(gate_ptr + image * channels, c, inside, 0.0)
    if offset_ptr is not None:
        t += vector_of(offset_ptr + image * channels, c, inside, 0.0) * gate_factor
    if mean_ptr is not None:
        factor = normalization_scale(weight_ptr, var_ptr, eps, c, inside)
    if ACTIVATION != "none":
        before = x
        if mean_ptr is not None:
            mean = vector_of(mean_ptr, c, inside, 0.0)
            before = normalized(x, mean, factor, bias_ptr, c, inside)
        elif weight_ptr is not None:
            scale = vector_of(weight_ptr, c, inside, 0.0)
            before = x * scale + vector_of(bias_ptr, c, inside, 0.0)
        if residual_ptr is not None:
            before += tl.load(residual_ptr + start + offsets, mask=mask).to(tl.float32)
        t *= slope(before, ACTIVATION)
    if residual_output_ptr is not None:
        kept = rounded(t, residual_output_ptr.dtype.element_ty)
        tl.store(residual_output_ptr + start + offsets, kept, mask=mask)
    if output_ptr is not None:
        if mean_ptr is not None:
            t *= factor
        elif factor_ptr is not None:
            t *= vector_of(factor_ptr, c, inside, 0.0)
        if slope_ptr is not None:
            t += x * vector_of(slope_ptr, c, inside, 0.0)
            t += vector_of(constant_ptr, c, inside, 0.0)
        t = rounded(t, output_ptr.dtype.element_ty)
        tl.store(output_ptr + start + offsets, t, mask=mask)


def apply(
    input: Tensor,
    operand: Forward | Normalization,
    residual: Tensor | None = None,
    activation: str = "none",
) -> Tensor:
    """activation(operand(input) + residual) in one pass.

    Args:
        input: [N, C, H, W] dense NHWC.
        operand: what becomes of it first; a :class:`Normalization` has not been folded.
        residual: like ``input``.
        activation: after the residual; ``operand`` may have one of its own.
    """
    output = empty_nhwc(input, *input.shape[1:])
    gate = None
    vectors: tuple[Tensor | None, ...]
    if isinstance(operand, Normalization):
        vectors = (operand.mean, operand.var, operand.weight, operand.bias)
        inner, eps = "none", operand.eps
    else:
        vectors = (None, None, operand.scale, operand.shift)
        inner, eps, gate = operand.activation, 0.0, operand.gate
    problem = _problem(input, gate is not None, 1 + (residual is not None))
    device = device_of(input)

    def run(config: PassConfig) -> None:
        launch(
            _apply_kernel,
            _grid(problem, config),
            output,
            input,
            residual,
            *vectors,
            gate,
            float(eps),
            problem.rows,
            problem.channels // problem.vector,
            num_warps=config.num_warps,
            VECTOR=problem.vector,
            ROWS=config.rows,
            CHANNELS=config.channels,
            OPERAND_ACTIVATION=inner,
            ACTIVATION=activation,
        )

    run(choose("batch_norm_act_apply", problem, device, pass_heuristic, pass_candidates, run))
    return output


def differentiate(
    upstream: Tensor,
    operand: Gradient,
    normalization: Normalization | None = None,
    residual: Tensor | None = None,
    needed: tuple[bool, bool] = (True, False),
    offset_factor: float = 1.0,
) -> tuple[Tensor | None, Tensor | None]:
    """``operand`` of ``upstream``, and its t, in one pass.

    Args:
        upstream: [N, C, H, W] dense NHWC.
        operand: its ``factor`` may be None beside ``slope`` if ``normalization`` gives it.
        normalization: in place of ``operand``'s scale and shift; its weight / √(var + eps) also is
            the ``factor``.
        residual: like ``upstream``: added before the activation.
        needed: whether the value is wanted, and whether t is.
        offset_factor: what ``operand.offset`` is multiplied with.
    """
    output, residual_output = (
        empty_nhwc(upstream, *upstream.shape[1:]) if need else None for need in needed
    )
    vectors: tuple[Tensor | None, ...]
    if normalization is not None:
        vectors = (
            normalization.mean,
            normalization.var,
            normalization.weight,
            normalization.bias,
        )
    else:
        vectors = (None, None, operand.scale, operand.shift)
    reads_input = operand.activation != "none" or operand.slope is not None
    reads_residual = residual is not None and operand.activation != "none"
    per_image = operand.gate is not None or operand.offset is not None
    problem = _problem(upstream, per_image, 1 + reads_input + reads_residual)

    def run(config: PassConfig) -> None:
        launch(
            _differentiate_kernel,
            _grid(problem, config),
            output,
            residual_output,
            upstream,
            operand.z if reads_input else None,
            residual if reads_residual else None,
            *vectors,
            operand.gate,
            operand.offset,
            operand.factor,
            operand.slope,
            operand.constant,
            0.0 if normalization is None else float(normalization.eps),
            float(offset_factor),
            problem.rows,
            problem.channels // problem.vector,
            num_warps=config.num_warps,
            VECTOR=problem.vector,
            ROWS=config.rows,
            CHANNELS=config.channels,
            ACTIVATION=operand.activation,
        )

    device = device_of(upstream)
    run(
        choose(
            "batch_norm_act_differentiate", problem, device, pass_heuristic, pass_candidates, run
        )
    )
    return output, residual_output


def _problem(input: Tensor, per_image: bool, inputs: int) -> PassProblem:
    images, channels, height, width = input.shape
    rows = height * width
    if not per_image:
        images, rows = 1, images * rows
    return PassProblem(images, rows, channels, vector_width(input.dtype, channels), inputs)


def _grid(problem: PassProblem, config: PassConfig) -> tuple[int]:
    blocks = triton.cdiv(problem.rows, config.rows)
    return (problem.images * blocks * triton.cdiv(problem.channels, config.channels),)
