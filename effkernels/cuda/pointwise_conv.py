"""1×1 convolutions by csrc/pointwise_conv/cuda.cu; gradients are the reference formula's."""

from __future__ import annotations

import torch
from torch import Tensor

from ..cache import cached
from ..layout import empty_nhwc, nhwc
from ..native import activation_codes
from . import can_run

__all__ = ["can_run", "float32", "pointwise_conv", "product"]

_FEWEST_ROWS = 64  # of a tile; csrc/pointwise_conv/cuda.cu kFewestRows


def pointwise_conv(
    input: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    gate: Tensor | None,
    residual: Tensor | None,
    activation: str,
    return_mean: bool,
) -> tuple[Tensor, Tensor]:
    """The op ``pointwise_conv``: [N, C, H, W] -> [N, K, H, W] channels_last and [N, K] or [0]."""
    input = nhwc(input)
    sums = None
    if return_mean:
        images, _, height, width = input.shape
        places = -(-(height * width - 1) // _FEWEST_ROWS) + 1
        shape = (images, places, weight.shape[0])
        sums = torch.zeros(shape, dtype=torch.float32, device=input.device)
    output = product(
        input,
        weight,
        scale=scale,
        bias=bias,
        gate=gate,
        residual=residual,
        activation=activation,
        sums=sums,
    )
    if sums is None:
        return output, input.new_empty(0)
    return output, (sums.sum(1) / (height * width)).to(input.dtype)


def product(
    input: Tensor,
    weight: Tensor,
    *,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
    sums: Tensor | None = None,
) -> Tensor:
    """activation(scale · weight · (gate · input) + bias + residual), [N, K, H, W].

    Args:
        input: [N, C, H, W] channels_last.
        weight: [K, C] or [K, C, 1, 1].
        gate: [N, C] in ``input``'s dtype.
        residual: [N, K, H, W].
        sums: [N, places, K] float32 zeros, to become sums over pixels of the output.
    """
    output = empty_nhwc(input, weight.shape[0], *input.shape[2:])
    torch.ops.effkernels_cuda.pointwise_conv(
        output,
        sums,
        input,
        weight.contiguous(),
        float32(scale),
        float32(bias),
        None if gate is None else gate.contiguous(),
        None if residual is None else nhwc(residual),
        *activation_codes([activation]),
    )
    return output


def float32(vector: Tensor | None) -> Tensor | None:
    """A parameter as dense float32, kept."""
    if vector is None or (vector.dtype == torch.float32 and vector.is_contiguous()):
        return vector
    return cached("float32", (vector,), lambda: vector.detach().float().contiguous())
