"""BatchNorm, residual and activation, forward and backward.

    output   = activation((input − mean) / √(var + eps) · weight + bias + residual)
    t        = output_gradient · activation'(before)     before is recomputed, nothing is saved
    gradient = factor · t + slope · input + constant                (residual's gradient: t)

Layout: NHWC; rows are pixels. The parts are in ``batch_norm_act_sums.py`` and
``batch_norm_act_passes.py``, which training MBConv blocks uses one by one:

    inference          1 pass                              1 launch
    training           statistics; merge; apply            3 launches, tensor read twice
    its gradient       sums; merge; differentiate          3 launches, tensors read twice
    small tensors      one kernel for all of it            1 launch each

A tensor is small where one program can take all rows of its channels twice, the second time out
of the L2, in less time than two launches take: up to 128 KB, which in bfloat16 is every layer of
B0 at batch 1 but those of 112 x 112 pixels.

Moves: training 3 tensors' bytes (input twice, output; with a residual one more), its gradient 5.
B0's largest layer at batch 256 (96 channels, 112 x 112, bfloat16, 617 MB a tensor): 0.62 ms and
1.03 ms at 3.0 TB/s.
No GPU has run this.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..layout import empty_nhwc, nhwc
from ..operands import Gradient
from .batch_norm_act_config import small
from .batch_norm_act_passes import (
    Normalization,
    apply,
    differentiate,
    normalization_scale,
    normalized,
    vector_of,
)
from .batch_norm_act_sums import (
    GradientVectors,
    affine,
    gradient_affine,
    gradient_sums,
    gradient_sums_of_rows,
    gradient_vectors,
    moments_of_rows,
    statistics,
    store_gradient_vectors,
    sum_problem,
)
from .language import activate, kernel, rounded, slope
from .launch import launch

__all__ = [
    "GradientVectors",
    "Normalization",
    "affine",
    "apply",
    "batch_norm_act",
    "batch_norm_act_backward",
    "differentiate",
    "gradient_affine",
    "gradient_sums",
    "statistics",
]


@kernel
def _small_kernel(
    output_ptr,
    mean_ptr,
    var_ptr,
    input_ptr,
    residual_ptr,
    weight_ptr,
    bias_ptr,
    eps,
    rows,
    channel_vectors,
    VECTOR: tl.constexpr,
    UNROLL: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    channels = channel_vectors * VECTOR
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    inside = c < channels
    mean, squares = moments_of_rows(input_ptr, rows, channels, c, UNROLL, ROWS, CHANNELS)
    var = squares / rows.to(tl.float32)
    tl.store(mean_ptr + c, mean, mask=inside)
    tl.store(var_ptr + c, var, mask=inside)
    mean = mean[None, :]
    scale = tl.rsqrt(var + eps)[None, :]
    if weight_ptr is not None:
        scale *= vector_of(weight_ptr, c, inside, 0.0)
    r = tl.arange(0, UNROLL * ROWS)
    for start in range(0, rows, UNROLL * ROWS):
        mask = (start + r < rows)[:, None] & inside[None, :]
        offsets = (start + r)[:, None] * channels + c[None, :]
        x = tl.load(input_ptr + offsets, mask=mask).to(tl.float32)
        x = normalized(x, mean, scale, bias_ptr, c, inside)
        if residual_ptr is not None:
            x += tl.load(residual_ptr + offsets, mask=mask).to(tl.float32)
        x = rounded(activate(x, ACTIVATION), output_ptr.dtype.element_ty)
        tl.store(output_ptr + offsets, x, mask=mask)


@kernel
def _small_backward_kernel(
    output_ptr,
    residual_output_ptr,
    weight_gradient_ptr,
    bias_gradient_ptr,
    mean_gradient_ptr,
    var_gradient_ptr,
    upstream_ptr,
    input_ptr,
    residual_ptr,
    mean_ptr,
    var_ptr,
    weight_ptr,
    bias_ptr,
    eps,
    rows,
    channel_vectors,
    VECTOR: tl.constexpr,
    UNROLL: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    TRAINING: tl.constexpr,
):
    channels = channel_vectors * VECTOR
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    inside = c < channels
    total, product = gradient_sums_of_rows(
        0,
        rows,
        rows,
        channels,
        c,
        upstream_ptr,
        input_ptr,
        residual_ptr,
        mean_ptr,
        var_ptr,
        weight_ptr,
        bias_ptr,
        None,
        None,
        0,
        eps,
        UNROLL,
        ROWS,
        CHANNELS,
        ACTIVATION,
    )
    deviation = tl.rsqrt(tl.load(var_ptr + c, mask=inside, other=1.0).to(tl.float32) + eps)
    factor, gradient_slope, constant = store_gradient_vectors(
        total,
        product * deviation,
        None,
        None,
        None,
        weight_gradient_ptr,
        bias_gradient_ptr,
        mean_gradient_ptr,
        var_gradient_ptr,
        weight_ptr,
        mean_ptr,
        var_ptr,
        eps,
        rows.to(tl.float32),
        c,
        inside,
        TRAINING,
    )
    r = tl.arange(0, UNROLL * ROWS)
    for start in range(0, rows, UNROLL * ROWS):
        mask = (start + r < rows)[:, None] & inside[None, :]
        offsets = (start + r)[:, None] * channels + c[None, :]
        t = tl.load(upstream_ptr + offsets, mask=mask).to(tl.float32)
        x = tl.load(input_ptr + offsets, mask=mask).to(tl.float32)
        if ACTIVATION != "none":
            mean = vector_of(mean_ptr, c, inside, 0.0)
            scale = normalization_scale(weight_ptr, var_ptr, eps, c, inside)
            before = normalized(x, mean, scale, bias_ptr, c, inside)
            if residual_ptr is not None:
                before += tl.load(residual_ptr + offsets, mask=mask).to(tl.float32)
            t *= slope(before, ACTIVATION)
        if residual_output_ptr is not None:
            kept = rounded(t, residual_output_ptr.dtype.element_ty)
            tl.store(residual_output_ptr + offsets, kept, mask=mask)
        if output_ptr is not None:
            t = t * factor[None, :]
            if TRAINING:
                t += x * gradient_slope[None, :] + constant[None, :]
            t = rounded(t, output_ptr.dtype.element_ty)
            tl.store(output_ptr + offsets, t, mask=mask)


def batch_norm_act(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    residual: Tensor | None,
    training: bool,
    eps: float,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The op ``batch_norm_act``: (output, mean, var); no statistics in inference."""
    input = nhwc(input)
    residual = None if residual is None else nhwc(residual)
    if not training:
        assert running_mean is not None and running_var is not None
        normalization = Normalization(running_mean, running_var, weight, bias, eps)
        output = apply(input, normalization, residual, activation)
        return output, input.new_empty(0), input.new_empty(0)
    problem = sum_problem(input, 1)
    config = small(problem, input.element_size())
    if config is None:
        mean, var = statistics(input)
        output = apply(input, Normalization(mean, var, weight, bias, eps), residual, activation)
        return output, mean, var
    output = empty_nhwc(input, *input.shape[1:])
    mean = torch.empty(problem.channels, dtype=torch.float32, device=input.device)
    var = torch.empty_like(mean)
    launch(
        _small_kernel,
        (triton.cdiv(problem.channels, config.channels),),
        output,
        mean,
        var,
        input,
        residual,
        weight,
        bias,
        float(eps),
        problem.rows,
        problem.channels // problem.vector,
        num_warps=config.num_warps,
        VECTOR=problem.vector,
        UNROLL=config.unroll,
        ROWS=config.rows,
        CHANNELS=config.channels,
        ACTIVATION=activation,
    )
    return output, mean, var


def batch_norm_act_backward(
    arguments: list[Any],
    needed: list[bool],
    saved: tuple[Tensor, ...],
    gradients: tuple[Tensor | None, ...],
) -> tuple[Tensor | None, ...]:
    """The gradients of :func:`batch_norm_act` for its arguments; ``saved`` are mean and var."""
    input, weight, bias, running_mean, running_var, residual, training, eps, activation = arguments
    upstream, *output_gradients = gradients
    if not training:
        output_gradients = [None, None]  # those of empty tensors
    if upstream is None:
        if all(gradient is None for gradient in output_gradients):
            return (None,) * len(arguments)
        upstream = torch.zeros_like(input)
    if input.numel() == 0:  # the statistics are NaN; the dispatcher makes zeros of None
        return (None,) * len(arguments)
    input, upstream = nhwc(input), nhwc(upstream)
    residual = None if residual is None else nhwc(residual)
    mean, var = saved if training else (running_mean, running_var)
    normalization = Normalization(mean, var, weight, bias, eps)
    outputs = (needed[0], needed[5])  # of the size of the tensor
    parameters = (needed[1], needed[2])
    statistics_needed = (needed[3] and not training, needed[4] and not training)
    sums_needed = any(parameters + statistics_needed) or (training and needed[0])

    problem = sum_problem(input, 2 + (residual is not None and activation != "none"))
    config = small(problem, input.element_size()) if sums_needed and any(outputs) else None
    if config is not None:
        vectors = gradient_vectors(normalization, training, (False, *parameters), statistics_needed)
        results = tuple(empty_nhwc(input, *input.shape[1:]) if need else None for need in outputs)
        statistics_pointers = output_gradients if training else (vectors.mean, vectors.var)
        launch(
            _small_backward_kernel,
            (triton.cdiv(problem.channels, config.channels),),
            *results,
            vectors.weight,
            vectors.bias,
            *statistics_pointers,
            upstream,
            input,
            residual if activation != "none" else None,
            mean,
            var,
            weight,
            bias,
            float(eps),
            problem.rows,
            problem.channels // problem.vector,
            num_warps=config.num_warps,
            VECTOR=problem.vector,
            UNROLL=config.unroll,
            ROWS=config.rows,
            CHANNELS=config.channels,
            ACTIVATION=activation,
            TRAINING=training,
        )
    else:
        vectors = GradientVectors(*(None,) * 7)
        if sums_needed:
            vectors = gradient_affine(
                gradient_sums(
                    upstream, Gradient(input, activation=activation), normalization, residual
                ),
                problem.rows,
                normalization,
                training=training,
                needed=(needed[0] and training, *parameters),
                output_gradients=(output_gradients[0], output_gradients[1]),
                statistics_needed=statistics_needed,
            )
        results = (None, None)
        if any(outputs):
            operand = Gradient(
                input, activation=activation, slope=vectors.slope, constant=vectors.constant
            )
            results = differentiate(upstream, operand, normalization, residual, outputs)
    return (
        results[0],
        vectors.weight,
        vectors.bias,
        vectors.mean,
        vectors.var,
        results[1],
        None,
        None,
        None,
    )
