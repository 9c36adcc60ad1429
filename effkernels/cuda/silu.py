"""Activations by csrc/silu/cuda.cu."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..layout import ordered_like
from ..native import activation_codes
from . import can_run

__all__ = ["can_run", "silu", "silu_backward"]


def silu(input: Tensor, activation: str) -> Tensor:
    """The op ``silu``."""
    output = torch.empty_like(input)
    torch.ops.effkernels_cuda.activation(
        output, ordered_like(input, output), None, *activation_codes([activation])
    )
    return output


def silu_backward(
    arguments: list[Any],
    needed: list[bool],
    saved: tuple[Tensor, ...],
    gradients: tuple[Tensor | None, ...],
) -> tuple[Tensor | None, ...]:
    """The gradient of :func:`silu` for its input."""
    input, activation = arguments
    (upstream,) = gradients
    if upstream is None or not needed[0]:
        return None, None
    output = torch.empty_like(input)
    torch.ops.effkernels_cuda.activation(
        output,
        ordered_like(input, output),
        ordered_like(upstream, output),
        *activation_codes([activation]),
    )
    return output, None
