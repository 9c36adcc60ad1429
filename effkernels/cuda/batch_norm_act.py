"""BatchNorm, residual and activation by csrc/batch_norm_act/cuda.cu."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..layout import empty_nhwc, nhwc
from ..native import activation_codes
from . import can_run

__all__ = ["batch_norm_act", "batch_norm_act_backward", "can_run"]


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
    output = empty_nhwc(input, *input.shape[1:])
    if training:
        mean = torch.empty(input.shape[1], dtype=torch.float32, device=input.device)
        var = torch.empty_like(mean)
        if input.numel() == 0:  # the mean of nothing
            mean.fill_(torch.nan)
            var.fill_(torch.nan)
    else:
        assert running_mean is not None and running_var is not None
        mean, var = running_mean.contiguous(), running_var.contiguous()
    torch.ops.effkernels_cuda.batch_norm_act(
        output,
        input,
        None if residual is None else nhwc(residual),
        mean,
        var,
        None if weight is None else weight.contiguous(),
        None if bias is None else bias.contiguous(),
        training,
        eps,
        *activation_codes([activation]),
    )
    if training:
        return output, mean, var
    return output, input.new_empty(0), input.new_empty(0)


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
    input, upstream = nhwc(input), nhwc(upstream).to(input.dtype)
    mean, var = saved if training else (running_mean.contiguous(), running_var.contiguous())

    def room(want: bool, like: Tensor) -> Tensor | None:
        return torch.empty(like.shape, dtype=like.dtype, device=like.device) if want else None

    def image(want: bool) -> Tensor | None:
        return empty_nhwc(input, *input.shape[1:]) if want else None

    results = [
        image(needed[0]),
        image(needed[5]),
        room(needed[1], weight),
        room(needed[2], bias),
        room(needed[3] and not training, mean),
        room(needed[4] and not training, var),
    ]
    torch.ops.effkernels_cuda.batch_norm_act_backward(
        *results,
        upstream,
        input,
        None if residual is None else nhwc(residual),
        mean,
        var,
        None if weight is None else weight.contiguous(),
        None if bias is None else bias.contiguous(),
        *(None if gradient is None else gradient.contiguous() for gradient in output_gradients),
        training,
        eps,
        *activation_codes([activation]),
    )
    for_input, for_residual, *for_vectors = results
    return for_input, *for_vectors, for_residual, None, None, None
