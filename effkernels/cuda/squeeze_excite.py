"""Squeeze-and-excitation by csrc/squeeze_excite/cuda.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from ..native import activation_codes
from . import can_run as can_run_kernels

__all__ = ["can_run", "gate", "squeeze_excite_gate"]

# Floats of shared memory that a block has on every device.
_FITS = 16384


def can_run(
    input: Tensor,
    reduce_weight: Tensor,
    reduce_bias: Tensor | None,
    expand_weight: Tensor,
    expand_bias: Tensor | None,
    activation: str,
    gate_activation: str,
) -> str | None:
    """None if the kernels can run the op on these arguments, else the reason why not."""
    error = can_run_kernels(input)
    if error is not None:
        return error
    reduced, channels = reduce_weight.shape
    if channels + 2 * reduced > _FITS and not torch.ops.effkernels_cuda.squeeze_excite_fits(
        input, channels, reduced
    ):
        return f"{channels} channels, {reduced} reduced: more than shared memory has room for"
    return None


def gate(
    partial_means: Tensor,
    factor: float,
    reduce_weight: Tensor,
    reduce_bias: Tensor | None,
    expand_weight: Tensor,
    expand_bias: Tensor | None,
    activation: str,
    gate_activation: str,
) -> Tensor:
    """The gate [N, C] of images, in the weights' dtype, by one kernel.

    Args:
        partial_means: [N, C], or [N, blocks, C] partial sums; times ``factor`` they are the means.
        factor: see there.
        reduce_weight, expand_weight: [R, C] and [C, R].
        reduce_bias, expand_bias: [R] and [C], or None.
        activation, gate_activation: behind the two products.
    """
    output = torch.empty(
        (partial_means.shape[0], partial_means.shape[-1]),
        dtype=expand_weight.dtype,
        device=partial_means.device,
    )
    torch.ops.effkernels_cuda.squeeze_excite_gate(
        output,
        partial_means.contiguous(),
        factor,
        *_dense(reduce_weight, reduce_bias, expand_weight, expand_bias),
        *activation_codes([activation, gate_activation]),
    )
    return output


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


def _dense(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(None if tensor is None else tensor.contiguous() for tensor in tensors)
