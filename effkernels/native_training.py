"""A block's training pass on the CPU kernels: the op ``mbconv_training``, stage by stage.

csrc/mbconv_training/cpu.cpp says what each stage moves. Between them lie raw outputs of the
convolutions and vectors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import native
from .block_arguments import BlockArguments
from .layout import empty_nhwc, nhwc, output_size

_SUMS = 5  # of csrc/mbconv_training/mbconv_training.h kProductSums


class Norm(NamedTuple):
    """A BatchNorm with the batch's statistics, and the activation behind it, for the kernels."""

    vectors: Tensor  # [4, C] float32: mean, variance, weight, bias
    eps: float
    activation: int

    @property
    def mean(self) -> Tensor:
        """[C]."""
        return self.vectors[0]


def _norm(
    mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, name: str
) -> Norm:
    vectors = [
        mean,
        var,
        torch.ones_like(mean) if weight is None else weight.detach().float(),
        torch.zeros_like(mean) if bias is None else bias.detach().float(),
    ]
    return Norm(torch.stack(vectors), eps, native.activation_codes([name])[0])


class _Before(NamedTuple):
    """What lies between a convolution and the raw output before it; nothing before the first."""

    norm: Tensor | None = None
    eps: float = 0.0
    activation: int = 0


def _before(norm: Norm | None) -> _Before:
    return _Before() if norm is None else _Before(*norm)


def _vector(size: int) -> Tensor:
    return torch.empty(size, dtype=torch.float32)


def _like(weight: Tensor) -> Tensor:
    """For the gradient of a 1x1 convolution: float32, [K, C] in memory, with the strides of the
    weight where that may be: they tell nothing of channels_last, and another would be copied."""
    if weight.is_contiguous():
        return torch.empty_like(weight, dtype=torch.float32)
    return torch.empty(weight.shape, dtype=torch.float32)


def can_run(input: Tensor, *rest: Any) -> str | None:
    """None if the CPU kernels can run the block on these arguments, else the reason why not."""
    if input.numel() == 0:
        return "input is empty"
    return native.can_run(input)


def mbconv_training(*arguments: Any) -> tuple[Tensor, ...]:
    """The op ``mbconv_training``."""
    block = BlockArguments(*arguments)
    kernels = torch.ops.effkernels_cpu
    input = nhwc(block.input)
    channels, outputs = block.depthwise_weight.shape[0], block.project_weight.shape[0]

    def product(
        values: Tensor, weight: Tensor, norm: Norm | None, gate: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        size = weight.shape[0]
        output = empty_nhwc(values, size, *values.shape[2:])
        mean, var = _vector(size), _vector(size)
        before = _before(norm)
        kernels.mbconv_training_product(
            output, mean, var, values, before.norm, gate, native.conv_panels(weight), *before[1:]
        )
        return output, mean, var

    empty = input.new_empty(0)
    expanded, expand_mean, expand_var = empty, empty.clone(), empty.clone()
    values, norm = input, None
    if block.expand_weight is not None:
        values, expand_mean, expand_var = product(input, block.expand_weight, None, None)
        expanded = values
        norm = _norm(expand_mean, expand_var, *block.norms[0])
    size = output_size(input.shape[2:], block.depthwise_weight.shape[2:], *block.geometry)
    hidden = empty_nhwc(input, channels, *size)
    depthwise_mean, depthwise_var = _vector(channels), _vector(channels)
    before = _before(norm)
    kernels.mbconv_training_depthwise(
        hidden,
        depthwise_mean,
        depthwise_var,
        values,
        before.norm,
        native.depthwise_taps(block.depthwise_weight),
        native.kernel_geometry(block.depthwise_weight, *block.geometry),
        *before[1:],
    )
    norm = _norm(depthwise_mean, depthwise_var, *block.norms[1])
    pooled, gate = empty.clone(), None
    if block.se_reduce_weight is not None:
        pooled = torch.empty(input.shape[0], channels, dtype=torch.float32)
        kernels.mbconv_training_pool(pooled, hidden, *norm)
        gate = native.squeeze_excite_gate(
            pooled, *block.squeeze_excite, block.se_activation, block.gate_activation
        )
    projected, project_mean, project_var = product(hidden, block.project_weight, norm, gate)
    norm = _norm(project_mean, project_var, *block.norms[2])
    output = empty_nhwc(input, outputs, *size)
    kernels.mbconv_training_finish(
        output,
        projected,
        norm.vectors,
        None if block.keep is None else block.keep.float().contiguous(),
        input if block.residual else None,
        norm.eps,
    )
    return (
        output,
        expanded,
        hidden,
        projected,
        expand_mean,
        expand_var,
        depthwise_mean,
        depthwise_var,
        project_mean,
        project_var,
        pooled,
    )


def differentiates(arguments: Sequence[Any], gradients: Sequence[Tensor | None]) -> bool:
    """Whether :func:`mbconv_training_backward` is for this call: the output's gradient alone."""
    keep = BlockArguments(*arguments).keep
    learned = keep is not None and keep.requires_grad
    return (
        gradients[0] is not None
        and not learned
        and not any(gradient is not None for gradient in gradients[1:])
    )


def mbconv_training_backward(
    arguments: list[Any],
    needed: list[bool],
    saved: tuple[Tensor, ...],
    gradients: tuple[Tensor | None, ...],
) -> tuple[Tensor | None, ...]:
    """The gradients of :func:`mbconv_training` for its arguments; ``saved`` are its other
    outputs."""
    block = BlockArguments(*arguments)
    kernels = torch.ops.effkernels_cpu
    expanded, hidden, projected, *rest = saved
    expand_mean, expand_var, depthwise_mean, depthwise_var, project_mean, project_var, pooled = rest
    upstream = gradients[0]
    assert upstream is not None
    input, upstream = nhwc(block.input), nhwc(upstream)
    keep = None if block.keep is None else block.keep.float().contiguous()
    results: list[Tensor | None] = [None] * len(arguments)
    channels, outputs = block.depthwise_weight.shape[0], block.project_weight.shape[0]
    # What is needed of the stages before one: nothing, if all their tensors are frozen.
    before_depthwise = needed[0] or any(needed[1:4])
    before_project = before_depthwise or any(needed[4:11])

    def vectors(needed: Sequence[bool], size: int) -> list[Tensor | None]:
        return [_vector(size) if need else None for need in needed]

    # The projection
    norm = _norm(project_mean, project_var, *block.norms[2])
    coefficients: Tensor | None = torch.empty(3, outputs)
    results[12:14] = vectors(needed[12:14], outputs)
    kernels.mbconv_training_norm_backward(
        coefficients, *results[12:14], upstream, projected, norm.vectors, keep, norm.eps
    )
    hidden_norm = _norm(depthwise_mean, depthwise_var, *block.norms[1])
    gate = None
    if block.se_reduce_weight is not None:
        gate = native.squeeze_excite_gate(
            pooled, *block.squeeze_excite, block.se_activation, block.gate_activation
        )
    for_hidden = sums = None
    if before_project:
        for_hidden = empty_nhwc(hidden, *hidden.shape[1:])
        sums = torch.empty(hidden.shape[0], _SUMS, channels, dtype=torch.float32)
    if needed[11]:
        results[11] = _like(block.project_weight)
    if before_project or needed[11]:
        kernels.mbconv_training_product_backward(
            for_hidden,
            results[11],
            sums,
            upstream,
            projected,
            norm.mean,
            coefficients,
            keep,
            hidden,
            hidden_norm.vectors,
            gate,
            native.gemm_panels(block.project_weight.flatten(1).t()),
            None,
            *hidden_norm[1:],
        )
    if for_hidden is None or sums is None:
        return tuple(results)

    # The gate, and the depthwise convolution
    offset = None
    if gate is not None:
        pixels = hidden.shape[2] * hidden.shape[3]
        for_pooled, *results[7:11] = native.squeeze_excite_gate_backward(
            [pooled, *block.squeeze_excite, block.se_activation, block.gate_activation],
            [True, *needed[7:11], False, False],
            (),
            (sums[:, 0].contiguous(),),
        )[:5]
        assert for_pooled is not None
        offset = for_pooled / pixels
    values, values_norm = input, None
    if block.expand_weight is not None:
        values = expanded
        values_norm = _norm(expand_mean, expand_var, *block.norms[0])
    for_values = for_taps = coefficients = None
    if before_depthwise:
        for_values = empty_nhwc(values, *values.shape[1:])
        if values_norm is not None:
            coefficients = torch.empty(3, channels)
            results[2:4] = vectors(needed[2:4], channels)
    if needed[4]:
        for_taps = torch.empty(block.depthwise_weight[0, 0].numel(), channels, dtype=torch.float32)
    results[5:7] = vectors(needed[5:7], channels)
    before = _before(values_norm)
    kernels.mbconv_training_depthwise_backward(
        for_values,
        for_taps,
        coefficients,
        *results[2:4],
        *results[5:7],
        for_hidden,
        hidden,
        hidden_norm.vectors,
        sums,
        gate,
        offset,
        values,
        before.norm,
        native.reversed_taps(block.depthwise_weight),
        upstream if block.residual and values_norm is None else None,
        native.kernel_geometry(block.depthwise_weight, *block.geometry),
        [hidden_norm.eps, before.eps],
        hidden_norm.activation,
    )
    del for_hidden, sums
    if for_taps is not None:
        results[4] = for_taps.t().reshape(block.depthwise_weight.shape)
    if block.expand_weight is None:
        results[0] = for_values
        return tuple(results)
    if for_values is None or values_norm is None or not (needed[0] or needed[1]):
        return tuple(results)

    # The expansion
    if needed[0]:
        results[0] = empty_nhwc(input, *input.shape[1:])
    if needed[1]:
        results[1] = _like(block.expand_weight)
    kernels.mbconv_training_product_backward(
        results[0],
        results[1],
        None,
        for_values,
        expanded,
        values_norm.mean,
        coefficients,
        None,
        input,
        None,
        None,
        native.gemm_panels(block.expand_weight.flatten(1).t()),
        upstream if block.residual else None,
        0.0,
        0,
    )
    return tuple(results)
