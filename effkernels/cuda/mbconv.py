"""The whole inverted residual by csrc/mbconv/cuda.cu; gradients are the reference formula's.

    hidden = activation(depthwise(activation(expand(input)))), and its sums: one kernel
    gate   = squeeze_excite_gate(mean(hidden))                               from the sums
    output = project(gate · hidden) + input                                  one product

Three launches, two without squeeze-and-excitation. Where the fused kernel cannot run or does not
pay (`mbconv_config.pays`), a product and a depthwise convolution run in its place.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..gpu import pack_taps
from ..layout import empty_nhwc, nhwc, output_size
from ..native import activation_codes
from . import can_run as device_can_run
from . import device_limits, squeeze_excite
from .mbconv_config import KERNELS, STRIDES, FusedConfig, FusedProblem, choose, pays
from .pointwise_conv import float32, product

__all__ = ["can_run", "expand_depthwise", "mbconv"]


def can_run(*arguments: Any) -> str | None:
    """None if the CUDA kernels can run the op on these arguments, else the reason why not."""
    reason = device_can_run(*arguments)
    if reason is not None or len(arguments) == 1:
        return reason
    input = arguments[0]
    if arguments[7] is not None:
        reason = squeeze_excite.can_run(input, *arguments[7:11], *arguments[19:21])
    return reason


def fused_config(
    input: Tensor,
    expand_weight: Tensor,
    depthwise_weight: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
) -> FusedConfig | str:
    """How the expansion runs inside the depthwise convolution, or the reason why it cannot."""
    kernel = depthwise_weight.shape[2:]
    if kernel[0] != kernel[1] or kernel[0] not in KERNELS:
        return f"depthwise_weight is {kernel[0]}x{kernel[1]}; 3x3 and 5x5 are accepted"
    if stride[0] != stride[1] or stride[0] not in STRIDES:
        return f"stride is {stride}; [1, 1] and [2, 2] are accepted"
    if list(dilation) != [1, 1]:
        return f"dilation is {dilation}; [1, 1] is accepted"
    problem = _problem(input, expand_weight, kernel[0], stride, padding)
    if problem.values() >= 2**31:
        return f"an image has {problem.values()} values; fewer than 2^31 are accepted"
    limits = device_limits(input)
    return choose(problem, *limits) or (
        f"a tile of {input.shape[1]} channels does not fit into the {limits[1] // 1024} KB of "
        "shared memory that a block may have"
    )


def mbconv(
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
    """The op ``mbconv``."""
    input = nhwc(input)
    gated = se_reduce_weight is not None
    taps = pack_taps(depthwise_weight)
    config = None
    if expand_weight is not None:
        arguments = (input, expand_weight, depthwise_weight, stride, padding, dilation)
        config = _config_that_pays(*arguments)
    if expand_weight is not None and config is not None:
        hidden, partial_means = expand_depthwise(
            input,
            expand_weight,
            expand_scale,
            expand_bias,
            taps,
            depthwise_scale,
            depthwise_bias,
            depthwise_weight.shape[2],
            stride,
            padding,
            activation,
            gated,
            config,
        )
    else:
        from .depthwise_conv import convolve

        expanded = input
        if expand_weight is not None:
            expanded = product(
                input, expand_weight, scale=expand_scale, bias=expand_bias, activation=activation
            )
        convolved = convolve(
            expanded,
            taps,
            list(depthwise_weight.shape[2:]),
            stride,
            padding,
            dilation,
            scale=depthwise_scale,
            bias=depthwise_bias,
            activation=activation,
            partial_means=gated,
        )
        hidden, partial_means = convolved.output, convolved.partial_means
    gate = None
    if se_reduce_weight is not None and se_expand_weight is not None:
        assert partial_means is not None
        gate = squeeze_excite.gate(
            partial_means,
            1 / (hidden.shape[2] * hidden.shape[3]),
            se_reduce_weight,
            se_reduce_bias,
            se_expand_weight,
            se_expand_bias,
            se_activation,
            gate_activation,
        )
    return product(
        hidden,
        project_weight,
        scale=project_scale,
        bias=project_bias,
        gate=gate,
        residual=input if residual else None,
        activation=project_activation,
    )


def _config_that_pays(
    input: Tensor,
    expand_weight: Tensor,
    depthwise_weight: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
) -> FusedConfig | None:
    """None: a product and a depthwise convolution run in place of the fused kernel."""
    config = fused_config(input, expand_weight, depthwise_weight, stride, padding, dilation)
    if isinstance(config, str):
        return None
    problem = _problem(input, expand_weight, depthwise_weight.shape[2], stride, padding)
    return config if pays(problem, config) else None


class ExpandedDepthwise(NamedTuple):
    """What :func:`expand_depthwise` gives."""

    output: Tensor  # [N, E, H', W'] channels_last
    partial_means: Tensor | None  # [N, tiles, E] float32, whose sum over tiles is that over pixels


def expand_depthwise(
    input: Tensor,
    expand_weight: Tensor,
    expand_scale: Tensor | None,
    expand_bias: Tensor | None,
    taps: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    kernel: int,
    stride: list[int],
    padding: list[int],
    activation: str,
    mean: bool,
    config: FusedConfig,
) -> ExpandedDepthwise:
    """activation(depthwise(activation(expansion))) without the expanded tensor.

    Args:
        input: [N, C, H, W] channels_last.
        expand_weight: [E, C] or [E, C, 1, 1].
        expand_scale, expand_bias, scale, bias: [E] or None.
        taps: [kernel · kernel, E], dense.
        stride: height, width.
        padding: left, right, top, bottom.
        mean: also give the sums over pixels.
        config: see :func:`fused_config`.
    """
    expanded = expand_weight.shape[0]
    kernels = [kernel, kernel]
    size = output_size(input.shape[2:], kernels, stride, padding, [1, 1])
    output = empty_nhwc(input, expanded, *size)
    partials = None
    if mean:
        tiles = -(-size[0] // config.tile_height) * -(-size[1] // config.tile_width)
        shape = (input.shape[0], tiles, expanded)
        partials = torch.empty(shape, dtype=torch.float32, device=input.device)
    torch.ops.effkernels_cuda.expand_depthwise(
        output,
        partials,
        input,
        expand_weight.contiguous(),
        float32(expand_scale),
        float32(expand_bias),
        taps,
        float32(scale),
        float32(bias),
        [*kernels, *stride, 1, 1, padding[0], padding[2]],
        list(config),
        *activation_codes([activation]),
    )
    return ExpandedDepthwise(output, partials)


def _problem(
    input: Tensor,
    expand_weight: Tensor,
    kernel: int,
    stride: list[int],
    padding: list[int],
) -> FusedProblem:
    size = output_size(input.shape[2:], [kernel, kernel], stride, padding, [1, 1])
    return FusedProblem(
        images=input.shape[0],
        channels=input.shape[1],
        expanded=expand_weight.shape[0],
        height=input.shape[2],
        width=input.shape[3],
        output_height=size[0],
        output_width=size[1],
        kernel=kernel,
        stride=stride[0],
        itemsize=input.element_size(),
    )
