"""Squeeze-and-excitation (Hu et al., 2018): a gate per image and channel from the spatial mean.

mean[n, c]   = mean over (y, x) of input[n, c, y, x]
gate[n]      = gate_activation(expand · activation(reduce · mean[n] + reduce_bias) + expand_bias)
output[n, c] = gate[n, c] · input[n, c]
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import native
from ..dispatch import Implementation, define
from ..layout import empty_nhwc, nhwc
from ._common import (
    apply_activation,
    check_activation,
    check_filled,
    check_like,
    check_tensor,
    check_vector,
)

OP = "squeeze_excite"
GATE_OP = "squeeze_excite_gate"


def _checked_matrix(op: str, argument: str, weight: Tensor, input: Tensor) -> Tensor:
    """``weight`` [rows, columns, 1, 1] or [rows, columns] as a matrix."""
    check_tensor(op, argument, weight, (2, 4))
    check_filled(op, argument, weight)
    check_like(op, argument, weight, input)
    if weight.dim() == 4:
        if weight.shape[2:] != (1, 1):
            raise ValueError(
                f"{op}: {argument} has shape {tuple(weight.shape)}, a 1×1 kernel is accepted"
            )
        weight = weight.flatten(1)
    return weight


def check_squeeze_excite(
    op: str,
    input: Tensor,
    channels: int,
    weights: tuple[Tensor, Tensor | None, Tensor, Tensor | None],
    prefix: str = "",
) -> tuple[Tensor, Tensor]:
    """The reduce and expand matrices [R, C] and [C, R], checked together with their biases."""
    reduce_weight = _checked_matrix(op, f"{prefix}reduce_weight", weights[0], input)
    expand_weight = _checked_matrix(op, f"{prefix}expand_weight", weights[2], input)
    reduced = reduce_weight.shape[0]
    if reduce_weight.shape[1] != channels:
        raise ValueError(
            f"{op}: {prefix}reduce_weight has {reduce_weight.shape[1]} channels, "
            f"its input has {channels}"
        )
    if tuple(expand_weight.shape) != (channels, reduced):
        raise ValueError(
            f"{op}: {prefix}expand_weight has shape {tuple(expand_weight.shape)}, "
            f"({channels}, {reduced}) is accepted"
        )
    check_vector(op, f"{prefix}reduce_bias", weights[1], reduced, input)
    check_vector(op, f"{prefix}expand_bias", weights[3], channels, input)
    return reduce_weight, expand_weight


def squeeze_excite(
    input: Tensor,
    reduce_weight: Tensor,
    reduce_bias: Tensor | None,
    expand_weight: Tensor,
    expand_bias: Tensor | None,
    activation: str = "silu",
    gate_activation: str = "sigmoid",
) -> Tensor:
    """The whole squeeze-and-excitation on a tensor.

    Args:
        input: [N, C, H, W]; kernels work in channels_last, another layout is converted once.
        reduce_weight: [R, C] or [R, C, 1, 1], in ``input``'s dtype.
        reduce_bias: [R] or None, in ``input``'s dtype or float32.
        expand_weight: [C, R] or [C, R, 1, 1], in ``input``'s dtype.
        expand_bias: [C] or None, in ``input``'s dtype or float32.
        activation: between the two products.
        gate_activation: after them.

    Returns:
        [N, C, H, W] channels_last.

    Raises:
        TypeError, ValueError: naming the argument, what came and what is accepted.
        BackendUnavailable: if a backend was asked for that cannot run this call.
    """
    check_tensor(OP, "input", input, 4)
    check_filled(OP, "input", input, first=1)
    reduce_matrix, expand_matrix = check_squeeze_excite(
        OP, input, input.shape[1], (reduce_weight, reduce_bias, expand_weight, expand_bias)
    )
    check_activation(OP, activation)
    check_activation(OP, gate_activation, "gate_activation")
    return _op(
        input, reduce_matrix, reduce_bias, expand_matrix, expand_bias, activation, gate_activation
    )


def squeeze_excite_gate(
    mean: Tensor,
    reduce_weight: Tensor,
    reduce_bias: Tensor | None,
    expand_weight: Tensor,
    expand_bias: Tensor | None,
    activation: str = "silu",
    gate_activation: str = "sigmoid",
) -> Tensor:
    """The gate alone, from the pooled vector: [N, C] -> [N, C].

    Arguments, errors and dtypes are those of :func:`squeeze_excite`.
    """
    check_tensor(GATE_OP, "mean", mean, 2)
    reduce_matrix, expand_matrix = check_squeeze_excite(
        GATE_OP, mean, mean.shape[1], (reduce_weight, reduce_bias, expand_weight, expand_bias)
    )
    check_activation(GATE_OP, activation)
    check_activation(GATE_OP, gate_activation, "gate_activation")
    return _gate_op(
        mean, reduce_matrix, reduce_bias, expand_matrix, expand_bias, activation, gate_activation
    )


def gate_reference(
    mean: Tensor,
    reduce_weight: Tensor,
    reduce_bias: Tensor | None,
    expand_weight: Tensor,
    expand_bias: Tensor | None,
    activation: str,
    gate_activation: str,
) -> Tensor:
    """:func:`squeeze_excite_gate` in plain PyTorch; the weights are matrices."""
    dtype = mean.dtype
    hidden = F.linear(mean, reduce_weight, None if reduce_bias is None else reduce_bias.to(dtype))
    gate = F.linear(
        apply_activation(hidden, activation),
        expand_weight,
        None if expand_bias is None else expand_bias.to(dtype),
    )
    return apply_activation(gate, gate_activation)


def _reference(
    input: Tensor,
    reduce_weight: Tensor,
    reduce_bias: Tensor | None,
    expand_weight: Tensor,
    expand_bias: Tensor | None,
    activation: str,
    gate_activation: str,
) -> Tensor:
    gate = gate_reference(
        input.mean((2, 3)),
        reduce_weight,
        reduce_bias,
        expand_weight,
        expand_bias,
        activation,
        gate_activation,
    )
    return nhwc(input * gate[:, :, None, None])


def _fake(input: Tensor, *_: object) -> Tensor:
    return empty_nhwc(input, *input.shape[1:])


def _gate_fake(mean: Tensor, *_: object) -> Tensor:
    return torch.empty_like(mean, memory_format=torch.contiguous_format)


_WEIGHTS = (
    "Tensor reduce_weight, Tensor? reduce_bias, Tensor expand_weight, Tensor? expand_bias, "
    "str activation, str gate_activation"
)

_op = define(
    OP,
    f"(Tensor input, {_WEIGHTS}) -> Tensor",
    reference=_reference,
    fake=_fake,
    native=Implementation(native.can_run, native.squeeze_excite, native.squeeze_excite_backward),
)

_gate_op = define(
    GATE_OP,
    f"(Tensor mean, {_WEIGHTS}) -> Tensor",
    reference=gate_reference,
    fake=_gate_fake,
    native=Implementation(
        native.can_run, native.squeeze_excite_gate, native.squeeze_excite_gate_backward
    ),
)
