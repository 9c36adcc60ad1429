"""The whole inverted-residual block in training, as one op that keeps little.

expanded  = expand_weight · input                                                   (if given)
hidden    = depthwise_weight ∗ activation(norm(expanded))
gate      = squeeze_excite_gate(mean(activation(norm(hidden))), ...)                (if given)
projected = project_weight · (gate · activation(norm(hidden)))
output    = keep · norm(projected) [+ input]

norm is BatchNorm (Ioffe & Szegedy, 2015) with the batch's own statistics. Kept for the backward
pass are the input, ``expanded``, ``hidden`` and ``projected`` (what the convolutions put out), and
vectors: BatchNorm, activation and gate are recomputed from them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import native_training
from ..block_arguments import BlockArguments
from ..dispatch import Implementation, define
from ..layout import empty_nhwc, nhwc, output_size
from ._common import apply_activation, check_tensor, check_vector, reference_convolution
from .batch_norm_act import normalize, statistics
from .mbconv import MBConvGeometry, MBConvParameters, mbconv_arguments
from .squeeze_excite import gate_reference

OP = "mbconv_training"


class BatchNormParameters(NamedTuple):
    """A BatchNorm's tensors, [C] or None, and numbers, as ``batch_norm_act`` takes them."""

    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    momentum: float = 0.1
    eps: float = 1e-5


def mbconv_training(
    input: Tensor,
    parameters: MBConvParameters,
    expand_norm: BatchNormParameters | None,
    depthwise_norm: BatchNormParameters,
    project_norm: BatchNormParameters,
    geometry: MBConvGeometry | None = None,
    keep: Tensor | None = None,
) -> Tensor:
    """The block with the batch's statistics; running ones are updated in place.

    Args:
        input: [N, C, H, W]; kernels work in channels_last, another layout is converted once.
        parameters: the block's weights; scales and biases of convolutions must be None, for
            BatchNorm would cancel them.
        expand_norm, depthwise_norm, project_norm: the BatchNorms behind the three convolutions;
            ``expand_norm`` is None where there is no expansion.
        geometry: stride, padding, dilation, residual and activations; the projection has none.
        keep: [N] float32 or None: what each image's block is multiplied with before the residual
            is added (stochastic depth).

    Returns:
        [N, K, H', W'] channels_last.

    Raises:
        TypeError, ValueError: naming the argument, what came and what is accepted; also for a
            batch with one value per channel, as PyTorch does.
        BackendUnavailable: if a backend was asked for that cannot run this call.
    """
    geometry = MBConvGeometry() if geometry is None else geometry
    checked = mbconv_arguments(input, parameters, geometry)
    for name in ("expand", "depthwise", "project"):
        for vector in ("scale", "bias"):
            if getattr(parameters, f"{name}_{vector}") is not None:
                raise ValueError(f"{OP}: {name}_{vector} is given, None is accepted")
    if geometry.project_activation != "none":
        raise ValueError(
            f"{OP}: project_activation is {geometry.project_activation!r}, 'none' is accepted"
        )
    if (expand_norm is None) != (parameters.expand_weight is None):
        raise ValueError(f"{OP}: expand_norm and expand_weight must be given together")
    weights, (stride, padding, dilation) = checked[1:14], checked[14:17]
    norms = {"expand": expand_norm, "depthwise": depthwise_norm, "project": project_norm}
    sizes = {
        "expand": weights[3].shape[0],
        "depthwise": weights[3].shape[0],
        "project": weights[10].shape[0],
    }
    height, width = output_size(input.shape[2:], weights[3].shape[2:], stride, padding, dilation)
    counts = dict.fromkeys(norms, input.shape[0] * height * width)
    counts["expand"] = input.shape[0] * input.shape[2] * input.shape[3]
    for name, norm in norms.items():
        if norm is None:
            continue
        for vector in ("weight", "bias", "running_mean", "running_var"):
            check_vector(OP, f"{name}_norm.{vector}", getattr(norm, vector), sizes[name], input)
        if counts[name] == 1:
            raise ValueError(
                f"{OP}: {name}_norm: expected more than 1 value per channel when training, "
                f"got input size {tuple(input.shape)}"
            )
    if keep is not None:
        check_tensor(OP, "keep", keep, 1)
        check_vector(OP, "keep", keep, input.shape[0], input)
    no_norm = BatchNormParameters(None, None, None, None)
    result = _op(
        input,
        weights[0],
        *(expand_norm or no_norm)[:2],
        weights[3],
        *depthwise_norm[:2],
        *weights[6:11],
        *project_norm[:2],
        keep,
        stride,
        padding,
        dilation,
        geometry.residual,
        [(norm or no_norm).eps for norm in norms.values()],
        geometry.activation,
        geometry.se_activation,
        geometry.gate_activation,
    )
    with torch.no_grad():
        for index, (name, norm) in enumerate(norms.items()):
            if norm is None or counts[name] == 0:
                continue
            mean, var = result[4 + 2 * index], result[5 + 2 * index]
            if norm.running_mean is not None:
                norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), norm.momentum)
            if norm.running_var is not None:
                unbiased = var * (counts[name] / (counts[name] - 1))
                norm.running_var.lerp_(unbiased.to(norm.running_var.dtype), norm.momentum)
    output: Tensor = result[0]
    return output


def _reference(*arguments: Any) -> tuple[Tensor, ...]:
    block = BlockArguments(*arguments)
    one, none = (1, 1), (0, 0, 0, 0)
    empty = block.input.new_empty(0)

    def convolve(
        values: Tensor,
        weight: Tensor,
        stride: Sequence[int] = one,
        padding: Sequence[int] = none,
        dilation: Sequence[int] = one,
        groups: int = 1,
    ) -> Tensor:
        return reference_convolution(
            values, weight, None, None, stride, padding, dilation, groups, "none"
        )

    def normalized(values: Tensor, index: int) -> tuple[Tensor, Tensor, Tensor]:
        mean, var = statistics(values)
        weight, bias, eps, _ = block.norms[index]
        return normalize(values, weight, bias, mean, var, None, eps), mean, var

    def activated(values: Tensor) -> Tensor:
        return nhwc(apply_activation(values, block.activation).to(block.input.dtype))

    expanded, expand_mean, expand_var = empty, empty.clone(), empty.clone()
    values = block.input
    if block.expand_weight is not None:
        expanded = convolve(block.input, block.expand_weight)
        values, expand_mean, expand_var = normalized(expanded, 0)
        values = activated(values)
    channels = block.depthwise_weight.shape[0]
    hidden = convolve(values, block.depthwise_weight, *block.geometry, channels)
    values, depthwise_mean, depthwise_var = normalized(hidden, 1)
    values = activated(values)
    pooled = empty.clone()
    if block.se_reduce_weight is not None:
        pooled = values.mean((2, 3))
        gate = gate_reference(
            pooled, *block.squeeze_excite, block.se_activation, block.gate_activation
        )
        values = values * gate[:, :, None, None]
        pooled = pooled.to(torch.promote_types(block.input.dtype, torch.float32))
    projected = convolve(values, block.project_weight)
    output, project_mean, project_var = normalized(projected, 2)
    if block.keep is not None:
        output = output * block.keep.to(output.dtype).view(-1, 1, 1, 1)
    if block.residual:
        output = output + block.input
    return (
        nhwc(output.to(block.input.dtype)),
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


def _fake(
    input: Tensor,
    expand_weight: Tensor | None,
    expand_norm_weight: Tensor | None,
    expand_norm_bias: Tensor | None,
    depthwise_weight: Tensor,
    depthwise_norm_weight: Tensor | None,
    depthwise_norm_bias: Tensor | None,
    se_reduce_weight: Tensor | None,
    se_reduce_bias: Tensor | None,
    se_expand_weight: Tensor | None,
    se_expand_bias: Tensor | None,
    project_weight: Tensor,
    project_norm_weight: Tensor | None,
    project_norm_bias: Tensor | None,
    keep: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    *_: object,
) -> tuple[Tensor, ...]:
    images, image = input.shape[0], input.shape[2:]
    channels, outputs = depthwise_weight.shape[0], project_weight.shape[0]
    size = output_size(image, depthwise_weight.shape[2:], stride, padding, dilation)
    dtype = torch.promote_types(input.dtype, torch.float32)

    def vectors(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return input.new_empty(list(shape), dtype=dtype)

    nothing = expand_weight is None
    return (
        empty_nhwc(input, outputs, *size),
        vectors(0, dtype=input.dtype) if nothing else empty_nhwc(input, channels, *image),
        empty_nhwc(input, channels, *size),
        empty_nhwc(input, outputs, *size),
        *(vectors(0, dtype=input.dtype) if nothing else vectors(channels) for _ in ("mean", "var")),
        vectors(channels),
        vectors(channels),
        vectors(outputs),
        vectors(outputs),
        vectors(0, dtype=input.dtype) if se_reduce_weight is None else vectors(images, channels),
    )


_op = define(
    OP,
    "(Tensor input, Tensor? expand_weight, Tensor? expand_norm_weight, Tensor? expand_norm_bias, "
    "Tensor depthwise_weight, Tensor? depthwise_norm_weight, Tensor? depthwise_norm_bias, "
    "Tensor? se_reduce_weight, Tensor? se_reduce_bias, Tensor? se_expand_weight, "
    "Tensor? se_expand_bias, Tensor project_weight, Tensor? project_norm_weight, "
    "Tensor? project_norm_bias, Tensor? keep, int[] stride, SymInt[] padding, int[] dilation, "
    "bool residual, float[] eps, str activation, str se_activation, str gate_activation) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=_reference,
    fake=_fake,
    native=Implementation(
        native_training.can_run,
        native_training.mbconv_training,
        native_training.mbconv_training_backward,
        native_training.differentiates,
    ),
    saves=tuple(range(1, 11)),
)
