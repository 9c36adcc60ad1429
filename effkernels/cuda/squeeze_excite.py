"""Squeeze-and-excitation by csrc/squeeze_excite/cuda.cu."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..layout import empty_nhwc, nhwc
from ..native import activation_codes
from . import can_run as can_run_kernels

__all__ = [
    "can_run",
    "gate",
    "squeeze_excite",
    "squeeze_excite_backward",
    "squeeze_excite_gate",
    "squeeze_excite_gate_backward",
]

# So few channels, with the reduced ones, that every device has shared memory for them.
_FEW = 2048


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
    if channels + reduced > _FEW and not torch.ops.effkernels_cuda.squeeze_excite_fits(
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
    mean, *weights, activation, gate_activation = arguments
    results = [_room(need, like) for need, like in zip(needed[:5], arguments[:5], strict=True)]
    torch.ops.effkernels_cuda.squeeze_excite_gate_backward(
        *results,
        upstream.to(mean.dtype).contiguous(),
        mean.contiguous(),
        *_dense(*weights),
        *activation_codes([activation, gate_activation]),
    )
    return (*results, None, None)


def squeeze_excite(
    input: Tensor,
    reduce_weight: Tensor,
    reduce_bias: Tensor | None,
    expand_weight: Tensor,
    expand_bias: Tensor | None,
    activation: str,
    gate_activation: str,
) -> Tensor:
    """The op ``squeeze_excite``: three launches."""
    input = nhwc(input)
    output = empty_nhwc(input, *input.shape[1:])
    torch.ops.effkernels_cuda.squeeze_excite(
        output,
        input,
        *_dense(reduce_weight, reduce_bias, expand_weight, expand_bias),
        *activation_codes([activation, gate_activation]),
    )
    return output


def squeeze_excite_backward(
    arguments: list[Any],
    needed: list[bool],
    saved: tuple[Tensor, ...],
    gradients: tuple[Tensor | None, ...],
) -> tuple[Tensor | None, ...]:
    """The gradients of :func:`squeeze_excite` for its arguments: four launches."""
    (upstream,) = gradients
    if upstream is None:
        return (None,) * len(arguments)
    input, *weights, activation, gate_activation = arguments
    input = nhwc(input)
    input_gradient = empty_nhwc(input, *input.shape[1:]) if needed[0] else None
    results = [_room(need, like) for need, like in zip(needed[1:5], weights, strict=True)]
    torch.ops.effkernels_cuda.squeeze_excite_backward(
        input_gradient,
        *results,
        nhwc(upstream).to(input.dtype),
        input,
        *_dense(*weights),
        *activation_codes([activation, gate_activation]),
    )
    return (input_gradient, *results, None, None)


def _room(want: bool, like: Tensor | None) -> Tensor | None:
    """A dense tensor like ``like``, if it is wanted."""
    if not want or like is None:
        return None
    return torch.empty(like.shape, dtype=like.dtype, device=like.device)


def _dense(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(None if tensor is None else tensor.contiguous() for tensor in tensors)
