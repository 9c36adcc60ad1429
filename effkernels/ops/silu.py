"""SiLU and the other activations of the family, elementwise.

silu(x) = x · sigmoid(x) (Elfwing et al., 2017). The gradient is recomputed from the input, which
is the only tensor saved.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import native
from ..dispatch import Implementation, define
from ._common import apply_activation, check_activation, check_tensor

OP = "silu"


def silu(input: Tensor) -> Tensor:
    """x · sigmoid(x) for every element; any shape, layout kept.

    Raises:
        TypeError: if ``input`` is not a floating-point tensor.
        BackendUnavailable: if a backend was asked for that cannot run this call.
    """
    return activation(input, "silu")


def activation(input: Tensor, name: str) -> Tensor:
    """The activation ``name`` for every element; any shape, layout kept.

    Args:
        input: floating-point tensor.
        name: one of ``none, relu, relu6, silu, hard_swish, sigmoid, hard_sigmoid``.

    Raises:
        TypeError, ValueError: naming the argument, what came and what is accepted.
        BackendUnavailable: if a backend was asked for that cannot run this call.
    """
    check_tensor(OP, "input", input)
    check_activation(OP, name, "name")
    return input if name == "none" else _op(input, name)


def _reference(input: Tensor, activation: str) -> Tensor:
    # An op's result is never its input; "none" reaches this only through the dispatcher.
    return input.clone() if activation == "none" else apply_activation(input, activation)


def _fake(input: Tensor, activation: str) -> Tensor:
    return torch.empty_like(input)


def _backward(
    arguments: list[Any],
    needed: list[bool],
    saved: tuple[Tensor, ...],
    gradients: tuple[Any, ...],
) -> Any:
    input, name = arguments
    (gradient,) = gradients
    return (None if gradient is None else activation_gradient(gradient, input, name), None)


def activation_gradient(gradient: Tensor, input: Tensor, name: str) -> Tensor:
    """Gradient of the activation ``name`` at ``input`` in plain, differentiable PyTorch."""
    if name == "none":
        return gradient
    if name == "silu":
        sigmoid = torch.sigmoid(input)
        return gradient * (sigmoid * (1 + input * (1 - sigmoid)))
    if name == "sigmoid":
        sigmoid = torch.sigmoid(input)
        return gradient * (sigmoid * (1 - sigmoid))
    if name == "relu":
        return gradient * (input > 0)
    if name == "relu6":
        return gradient * ((input > 0) & (input < 6))
    if name == "hard_sigmoid":
        return gradient * (((input > -3) & (input < 3)) / 6)
    slope = torch.where(input < 3, input / 3 + 0.5, torch.ones_like(input))  # hard_swish
    return gradient * torch.where(input > -3, slope, torch.zeros_like(input))


_op = define(
    OP,
    "(Tensor input, str activation) -> Tensor",
    reference=_reference,
    fake=_fake,
    native=Implementation(native.can_run, native.silu, native.silu_backward),
    backward=_backward,
)
