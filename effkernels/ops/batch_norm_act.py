"""BatchNorm (Ioffe & Szegedy, 2015), residual and activation in one op.

output[n, c] = activation((input[n, c] − mean[c]) / √(var[c] + eps) · weight[c] + bias[c]
                          + residual[n, c])

mean and var are the batch's (biased) in training, the running ones in inference.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import native
from ..dispatch import Implementation, define
from ..layout import empty_nhwc, nhwc
from ._common import (
    apply_activation,
    check_activation,
    check_like,
    check_shape,
    check_tensor,
    check_vector,
)
from .silu import activation_gradient

OP = "batch_norm_act"


def batch_norm_act(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float = 0.1,
    eps: float = 1e-5,
    activation: str = "none",
    residual: Tensor | None = None,
) -> Tensor:
    """BatchNorm over (N, H, W), then the residual, then the activation.

    Args:
        input: [N, C, H, W]; kernels work in channels_last, another layout is converted once.
        weight, bias: [C] or None, in ``input``'s dtype or float32.
        running_mean, running_var: [C] or None. In training they are updated in place as
            ``torch.nn.functional.batch_norm`` does (``var`` unbiased); in inference they are
            what normalises and must be given.
        training: use the batch's statistics.
        momentum: share of the new statistics in the running ones.
        eps: added to the variance.
        activation: one of ``none, relu, relu6, silu, hard_swish, sigmoid, hard_sigmoid``.
        residual: [N, C, H, W] or None: added before the activation.

    Returns:
        [N, C, H, W] channels_last.

    Raises:
        TypeError, ValueError: naming the argument, what came and what is accepted; in training
            also for a batch with one value per channel, as PyTorch does.
        BackendUnavailable: if a backend was asked for that cannot run this call.
    """
    check_tensor(OP, "input", input, 4)
    channels = input.shape[1]
    for argument, value in (
        ("weight", weight),
        ("bias", bias),
        ("running_mean", running_mean),
        ("running_var", running_var),
    ):
        check_vector(OP, argument, value, channels, input)
    check_activation(OP, activation)
    if residual is not None:
        check_tensor(OP, "residual", residual, 4)
        check_shape(OP, "residual", residual, tuple(input.shape))
        check_like(OP, "residual", residual, input)
    if not training:
        if running_mean is None or running_var is None:
            raise ValueError(f"{OP}: running_mean and running_var are needed when training=False")
        output, _, _ = _op(
            input, weight, bias, running_mean, running_var, residual, False, eps, activation
        )
        return output
    count = input.shape[0] * input.shape[2] * input.shape[3]
    if count == 1:
        raise ValueError(
            f"{OP}: input has one value per channel {tuple(input.shape)}, training needs more "
            "than 1 value per channel"
        )
    output, mean, var = _op(input, weight, bias, None, None, residual, True, eps, activation)
    if count > 0:
        with torch.no_grad():
            if running_mean is not None:
                running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            if running_var is not None:
                unbiased = var * (count / (count - 1))
                running_var.lerp_(unbiased.to(running_var.dtype), momentum)
    return output


def fold_batch_norm(
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """A BatchNorm's inference as ``(scale, bias)``, both [C]: x · scale + bias.

    Computed in float64, returned in float32 (float64 statistics stay float64).
    """
    scale = torch.rsqrt(running_var.double() + eps)
    if weight is not None:
        scale = scale * weight.double()
    shift = -running_mean.double() * scale
    if bias is not None:
        shift = shift + bias.double()
    dtype = torch.float64 if running_var.dtype == torch.float64 else torch.float32
    return scale.to(dtype), shift.to(dtype)


def statistics(input: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance per channel, [C] each, in at least float32."""
    values = input.to(torch.promote_types(input.dtype, torch.float32))
    var, mean = torch.var_mean(values, (0, 2, 3), correction=0)
    return mean, var


def normalize(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    residual: Tensor | None,
    eps: float,
) -> Tensor:
    """The op before its activation, in at least float32, differentiable in everything."""

    def channelwise(vector: Tensor) -> Tensor:
        return vector.to(values.dtype).view(1, -1, 1, 1)

    values = input.to(torch.promote_types(input.dtype, torch.float32))
    output = (values - channelwise(mean)) * torch.rsqrt(channelwise(var) + eps)
    if weight is not None:
        output = output * channelwise(weight)
    if bias is not None:
        output = output + channelwise(bias)
    return output if residual is None else output + residual


def _reference(
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
    if training:
        mean, var = statistics(input)
    else:
        assert running_mean is not None and running_var is not None
        mean, var = running_mean, running_var
    output = normalize(input, weight, bias, mean, var, residual, eps)
    output = nhwc(apply_activation(output, activation).to(input.dtype))
    if training:
        return output, mean, var
    empty = input.new_empty(0)
    return output, empty, torch.empty_like(empty)


def _fake(
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
    output = empty_nhwc(input, *input.shape[1:])
    if not training:
        return output, input.new_empty(0), input.new_empty(0)
    dtype = torch.promote_types(input.dtype, torch.float32)
    mean = input.new_empty(input.shape[1], dtype=dtype)
    return output, mean, torch.empty_like(mean)


def _backward(
    arguments: list[Any],
    needed: list[bool],
    saved: tuple[Tensor, ...],
    gradients: tuple[Any, ...],
) -> Any:
    input, weight, bias, _, _, residual, training, eps, activation = arguments
    gradient, mean_gradient, var_gradient = gradients
    if (
        not training
        or gradient is None
        or mean_gradient is not None
        or var_gradient is not None
        or torch.is_grad_enabled()  # double backward: differentiate the reference instead
        or input.numel() == 0  # PyTorch's formula divides by the number of values
    ):
        return NotImplemented
    mean, var = saved
    if activation != "none":
        before = normalize(input, weight, bias, mean, var, residual, eps)
        gradient = activation_gradient(gradient.to(before.dtype), before, activation)
        gradient = gradient.to(input.dtype)
    # PyTorch's formula takes parameters of the statistics' dtype, or all of the input's.
    factor = torch.ones_like(mean) if weight is None else weight.to(mean.dtype)
    for_input, for_weight, for_bias = torch.ops.aten.native_batch_norm_backward(
        gradient,
        input,
        factor,
        None,
        None,
        mean,
        torch.rsqrt(var + eps),
        True,
        eps,
        [needed[0], needed[1], needed[2]],
    )
    for_residual = gradient if needed[5] else None
    if for_weight is not None and weight is not None:
        for_weight = for_weight.to(weight.dtype)
    if for_bias is not None and bias is not None:
        for_bias = for_bias.to(bias.dtype)
    return for_input, for_weight, for_bias, None, None, for_residual, None, None, None


_op = define(
    OP,
    "(Tensor input, Tensor? weight, Tensor? bias, Tensor? running_mean, Tensor? running_var, "
    "Tensor? residual, bool training, float eps, str activation) -> (Tensor, Tensor, Tensor)",
    reference=_reference,
    fake=_fake,
    native=Implementation(native.can_run, native.batch_norm_act, native.batch_norm_act_backward),
    backward=_backward,
    saves=(1, 2),
)
