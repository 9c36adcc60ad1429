"""Activations by csrc/silu/cuda.cu."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..native import activation_codes
from . import can_run

__all__ = ["can_run", "silu", "silu_backward"]


def silu(input: Tensor, activation: str) -> Tensor:
    """The op ``silu``."""
    output = torch.empty_like(input)
    torch.ops.effkernels_cuda.activation(
        output, _like(input, output), None, *activation_codes([activation])
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
        output, _like(input, output), _like(upstream, output), *activation_codes([activation])
    )
    return output, None


def _like(tensor: Tensor, output: Tensor) -> Tensor:
    """``tensor`` with its elements in the order of ``output``'s, in its dtype."""
    if tensor.stride() == output.stride() and tensor.dtype == output.dtype:
        return tensor
    return torch.empty_like(output).copy_(tensor)
