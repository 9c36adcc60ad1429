"""The whole inverted-residual block (Sandler et al., 2018; Tan & Le, 2019) as one op.

expanded = activation(expand_scale · (expand_weight · input) + expand_bias)        (if given)
hidden   = activation(depthwise_scale · (depthwise_weight ∗ expanded) + depthwise_bias)
gated    = squeeze_excite_gate(mean(hidden), ...) · hidden                         (if given)
output   = project_activation(project_scale · (project_weight · gated) + project_bias
                              [+ input])
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from .. import native
from ..dispatch import Implementation, define
from ..layout import empty_nhwc, output_size
from ._common import (
    Padding,
    check_activation,
    check_filled,
    check_geometry,
    check_like,
    check_shape,
    check_tensor,
    check_vector,
    reference_convolution,
)
from .squeeze_excite import check_squeeze_excite, gate_reference

OP = "mbconv"


class MBConvParameters(NamedTuple):
    """The block's tensors. C input, E expanded, R reduced and K output channels.

    BatchNorm is folded into ``*_scale`` and ``*_bias`` (``fold_batch_norm``), so that the weights
    stay the user's own parameters. A weight has ``input``'s dtype; scales and biases that or
    float32. No ``expand_weight``: E = C. No ``se_reduce_weight``: no squeeze-and-excitation.
    """

    depthwise_weight: Tensor  # [E, 1, k, k]
    project_weight: Tensor  # [K, E, 1, 1]
    expand_weight: Tensor | None = None  # [E, C, 1, 1]
    expand_scale: Tensor | None = None  # [E]
    expand_bias: Tensor | None = None  # [E]
    depthwise_scale: Tensor | None = None  # [E]
    depthwise_bias: Tensor | None = None  # [E]
    se_reduce_weight: Tensor | None = None  # [R, E, 1, 1]
    se_reduce_bias: Tensor | None = None  # [R]
    se_expand_weight: Tensor | None = None  # [E, R, 1, 1]
    se_expand_bias: Tensor | None = None  # [E]
    project_scale: Tensor | None = None  # [K]
    project_bias: Tensor | None = None  # [K]


class MBConvGeometry(NamedTuple):
    """Everything about the block that is not a tensor."""

    stride: int | tuple[int, int] = 1
    padding: Padding = "symmetric"
    dilation: int | tuple[int, int] = 1
    residual: bool = False  # add the input to the output; needs stride 1 and K = C
    activation: str = "silu"
    se_activation: str = "silu"
    gate_activation: str = "sigmoid"
    project_activation: str = "none"


def mbconv(
    input: Tensor, parameters: MBConvParameters, geometry: MBConvGeometry | None = None
) -> Tensor:
    """The block in as few passes over memory as the device allows.

    Args:
        input: [N, C, H, W]; kernels work in channels_last, another layout is converted once.
        parameters: the block's tensors.
        geometry: stride, padding, dilation, residual and activations.

    Returns:
        [N, K, H', W'] channels_last.

    Raises:
        TypeError, ValueError: naming the argument, what came and what is accepted.
        BackendUnavailable: if a backend was asked for that cannot run this call.
    """
    return _op(*mbconv_arguments(input, parameters, geometry))


def mbconv_arguments(
    input: Tensor, parameters: MBConvParameters, geometry: MBConvGeometry | None
) -> tuple[Any, ...]:
    """The dispatcher op's arguments, checked as :func:`mbconv` says."""
    geometry = MBConvGeometry() if geometry is None else geometry
    check_tensor(OP, "input", input, 4)
    check_filled(OP, "input", input, first=1)
    p = parameters
    channels = input.shape[1]
    expand_weight = p.expand_weight
    if expand_weight is not None:
        expand_weight = _checked_pointwise("expand_weight", expand_weight, channels, input)
        check_vector(OP, "expand_scale", p.expand_scale, expand_weight.shape[0], input)
        check_vector(OP, "expand_bias", p.expand_bias, expand_weight.shape[0], input)
    expanded = channels if expand_weight is None else expand_weight.shape[0]
    check_tensor(OP, "depthwise_weight", p.depthwise_weight, 4)
    check_filled(OP, "depthwise_weight", p.depthwise_weight)
    if p.depthwise_weight.shape[0] != expanded:
        raise ValueError(
            f"{OP}: depthwise_weight has {p.depthwise_weight.shape[0]} channels, "
            f"its input has {expanded}"
        )
    kernel = p.depthwise_weight.shape[2:]
    check_shape(OP, "depthwise_weight", p.depthwise_weight, (expanded, 1, *kernel))
    check_like(OP, "depthwise_weight", p.depthwise_weight, input)
    check_vector(OP, "depthwise_scale", p.depthwise_scale, expanded, input)
    check_vector(OP, "depthwise_bias", p.depthwise_bias, expanded, input)
    se_reduce_weight, se_expand_weight = p.se_reduce_weight, p.se_expand_weight
    if (se_reduce_weight is None) != (se_expand_weight is None):
        raise ValueError(f"{OP}: se_reduce_weight and se_expand_weight must be given together")
    if se_reduce_weight is not None and se_expand_weight is not None:
        se_reduce_weight, se_expand_weight = check_squeeze_excite(
            OP,
            input,
            expanded,
            (se_reduce_weight, p.se_reduce_bias, se_expand_weight, p.se_expand_bias),
            prefix="se_",
        )
    project_weight = _checked_pointwise("project_weight", p.project_weight, expanded, input)
    outputs = project_weight.shape[0]
    check_vector(OP, "project_scale", p.project_scale, outputs, input)
    check_vector(OP, "project_bias", p.project_bias, outputs, input)
    for argument in ("activation", "se_activation", "gate_activation", "project_activation"):
        check_activation(OP, getattr(geometry, argument), argument)
    strides, sides, dilations = check_geometry(
        OP, input, kernel, geometry.stride, geometry.padding, geometry.dilation
    )
    if geometry.residual:
        size = output_size(input.shape[2:], kernel, strides, sides, dilations)
        if outputs != channels or size != tuple(input.shape[2:]):
            raise ValueError(
                f"{OP}: residual=True needs an output like the input {tuple(input.shape)}, "
                f"it has {outputs} channels and size {size}"
            )
    return (
        input,
        expand_weight,
        p.expand_scale,
        p.expand_bias,
        p.depthwise_weight,
        p.depthwise_scale,
        p.depthwise_bias,
        se_reduce_weight,
        p.se_reduce_bias,
        se_expand_weight,
        p.se_expand_bias,
        project_weight,
        p.project_scale,
        p.project_bias,
        strides,
        sides,
        dilations,
        geometry.residual,
        geometry.activation,
        geometry.se_activation,
        geometry.gate_activation,
        geometry.project_activation,
    )


def _checked_pointwise(argument: str, weight: Tensor, channels: int, input: Tensor) -> Tensor:
    """``weight`` as [K, channels, 1, 1]."""
    check_tensor(OP, argument, weight, (2, 4))
    check_filled(OP, argument, weight)
    if weight.shape[1] != channels:
        raise ValueError(
            f"{OP}: {argument} has {weight.shape[1]} channels, its input has {channels}"
        )
    if weight.dim() == 2:
        weight = weight[:, :, None, None]
    check_shape(OP, argument, weight, (weight.shape[0], channels, 1, 1))
    check_like(OP, argument, weight, input)
    return weight


def _reference(
    input: Tensor,
    expand_weight: Tensor | None,
    expand_scale: Tensor | None,
    expand_bias: Tensor | None,
    depthwise_weight: Tensor,
    depthwise_scale: Tensor | None,
    depthwise_bias: Tensor | None,
    se_reduce_weight: Tensor | None,
    se_reduce_bias: Tensor | None,
    se_expand_weight: Tensor | None,
    se_expand_bias: Tensor | None,
    project_weight: Tensor,
    project_scale: Tensor | None,
    project_bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    residual: bool,
    activation: str,
    se_activation: str,
    gate_activation: str,
    project_activation: str,
) -> Tensor:
    one, none = (1, 1), (0, 0, 0, 0)
    hidden = input
    if expand_weight is not None:
        hidden = reference_convolution(
            hidden, expand_weight, expand_scale, expand_bias, one, none, one, 1, activation
        )
    hidden = reference_convolution(
        hidden,
        depthwise_weight,
        depthwise_scale,
        depthwise_bias,
        stride,
        padding,
        dilation,
        hidden.shape[1],
        activation,
    )
    if se_reduce_weight is not None and se_expand_weight is not None:
        gate = gate_reference(
            hidden.mean((2, 3)),
            se_reduce_weight,
            se_reduce_bias,
            se_expand_weight,
            se_expand_bias,
            se_activation,
            gate_activation,
        )
        hidden = hidden * gate[:, :, None, None]
    return reference_convolution(
        hidden,
        project_weight,
        project_scale,
        project_bias,
        one,
        none,
        one,
        1,
        project_activation,
        input if residual else None,
    )


def _fake(
    input: Tensor,
    expand_weight: Tensor | None,
    expand_scale: Tensor | None,
    expand_bias: Tensor | None,
    depthwise_weight: Tensor,
    depthwise_scale: Tensor | None,
    depthwise_bias: Tensor | None,
    se_reduce_weight: Tensor | None,
    se_reduce_bias: Tensor | None,
    se_expand_weight: Tensor | None,
    se_expand_bias: Tensor | None,
    project_weight: Tensor,
    project_scale: Tensor | None,
    project_bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    *_: object,
) -> Tensor:
    size = output_size(input.shape[2:], depthwise_weight.shape[2:], stride, padding, dilation)
    return empty_nhwc(input, project_weight.shape[0], *size)


_op = define(
    OP,
    "(Tensor input, Tensor? expand_weight, Tensor? expand_scale, Tensor? expand_bias, "
    "Tensor depthwise_weight, Tensor? depthwise_scale, Tensor? depthwise_bias, "
    "Tensor? se_reduce_weight, Tensor? se_reduce_bias, Tensor? se_expand_weight, "
    "Tensor? se_expand_bias, Tensor project_weight, Tensor? project_scale, Tensor? project_bias, "
    "int[] stride, SymInt[] padding, int[] dilation, bool residual, str activation, "
    "str se_activation, str gate_activation, str project_activation) -> Tensor",
    reference=_reference,
    fake=_fake,
    native=Implementation(native.can_run, native.mbconv),
)
