"""The whole inverted residual in as few passes over memory as pay.

    expanded = activation(expand(input))            product: 1×1 convolution
    hidden   = activation(depthwise(expanded))      convolution; its sums over pixels beside it
    gate     = squeeze_excite_gate(mean(hidden))    one small kernel, from the sums
    output   = project(gate · hidden) + input       product; gate in its prologue

Four launches, three without squeeze-and-excitation ("level B": every tensor is written once and
read once). Where the expanded tensor would not stay in the L2, its product runs inside the
depthwise kernel (`expand_depthwise`, "level C"), and three launches are left, or two.

At batch 256 in bfloat16 B0 moves 27.4 MB an image at level B and 13.9 at C; at 3.0 TB/s that
is 109,000 and 216,000 images/s. No GPU has run this.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..gpu import pack_taps
from ..layout import nhwc, output_size
from ..operands import Forward
from . import depthwise_conv as depthwise
from . import pointwise_conv as pointwise
from . import squeeze_excite as excite
from .expand_depthwise import expand_depthwise
from .launch import device_of, product_precision
from .mbconv_config import CHAIN, BlockProblem, FusedConfig, candidates, heuristic
from .tune import choose


def block(
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
    residual: Tensor | None,
    activation: str,
    se_activation: str,
    gate_activation: str,
    project_activation: str,
) -> Tensor:
    """The op ``mbconv`` with any tensor as its residual, [N, K, H', W'] or None."""
    input = nhwc(input)
    kernel = list(depthwise_weight.shape[2:])
    taps = pack_taps(depthwise_weight)
    gated = se_reduce_weight is not None

    def run(config: FusedConfig) -> Tensor:
        expanded = input
        if expand_weight is not None and config.band:
            hidden, partial_means = expand_depthwise(
                input,
                expand_weight.flatten(1),
                expand_scale,
                expand_bias,
                taps,
                depthwise_scale,
                depthwise_bias,
                kernel,
                stride,
                padding,
                dilation,
                activation,
                gated,
                config,
                product_precision(input.dtype),
            )
        else:
            if expand_weight is not None:
                expanded = _output(
                    pointwise.product(
                        input,
                        expand_weight.flatten(1),
                        scale=expand_scale,
                        bias=expand_bias,
                        activation=activation,
                    ).output
                )
            convolved = depthwise.convolve(
                expanded,
                taps,
                kernel,
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
            pixels = hidden.shape[2] * hidden.shape[3]
            gate = excite.gate(
                partial_means,
                1 / pixels,
                se_reduce_weight,
                se_reduce_bias,
                se_expand_weight,
                se_expand_bias,
                se_activation,
                gate_activation,
            )
        return _output(
            pointwise.product(
                hidden,
                project_weight.flatten(1),
                Forward(gate=gate),
                scale=project_scale,
                bias=project_bias,
                residual=residual,
                activation=project_activation,
            ).output
        )

    if expand_weight is None:
        return run(CHAIN)
    size = output_size(input.shape[2:], kernel, stride, padding, dilation)
    problem = BlockProblem(
        images=input.shape[0],
        inputs=input.shape[1],
        expanded=expand_weight.shape[0],
        height=input.shape[2],
        width=input.shape[3],
        output_height=size[0],
        output_width=size[1],
        kernel=kernel[0],
        stride=stride[0],
        dilation=dilation[0],
        itemsize=input.element_size(),
    )
    return run(choose("mbconv", problem, device_of(input), heuristic, candidates, run))


def _output(output: Tensor | None) -> Tensor:
    assert output is not None
    return output


def mbconv(*arguments: Any) -> Tensor:
    """The op ``mbconv``."""
    return block(*_block_arguments(arguments))


def _block_arguments(arguments: Sequence[Any]) -> list[Any]:
    """The op's arguments, the input as its own residual."""
    residual = nhwc(arguments[0]) if arguments[17] else None
    return [*arguments[:17], residual, *arguments[18:]]


def mbconv_backward(
    arguments: list[Any],
    needed: list[bool],
    saved: tuple[Tensor, ...],
    gradients: tuple[Tensor | None, ...],
) -> tuple[Tensor | None, ...]:
    """The gradients of :func:`mbconv` for its arguments."""
    (upstream,) = gradients
    if upstream is None:
        return (None,) * len(arguments)
    *results, for_residual = block_gradients(
        _block_arguments(arguments), [*needed[:14], needed[0] and arguments[17]], upstream
    )
    if for_residual is not None:
        assert results[0] is not None
        results[0] = results[0] + for_residual
    return (*results, *[None] * (len(arguments) - 14))


def block_gradients(
    arguments: list[Any], needed: list[bool], upstream: Tensor
) -> list[Tensor | None]:
    """The gradients of :func:`block`, from the convolutions' own, running it again in between.

    For training with frozen BatchNorms; `mbconv_training` is for the others.

    Args:
        arguments: of :func:`block`, in its order.
        needed: for the 14 tensors that ``arguments`` begin with, and for the residual.
        upstream: [N, K, H', W'].
    """
    input, *weights = arguments[:14]
    stride, padding, dilation, residual, activation, *activations, project_activation = arguments[
        14:
    ]
    expand, depthwise_weights = weights[:3], weights[3:6]
    squeeze, project = weights[6:10], weights[10:13]
    gated, expands = squeeze[0] is not None, expand[0] is not None

    # Forward
    expand_arguments = [nhwc(input), *expand, None, None, activation, False]
    expanded = pointwise.pointwise_conv(*expand_arguments)[0] if expands else nhwc(input)
    depthwise_arguments = [
        expanded,
        *depthwise_weights,
        stride,
        padding,
        dilation,
        activation,
        gated,
    ]
    hidden, mean = depthwise.depthwise_conv(*depthwise_arguments)
    gate_arguments = [mean, *squeeze, *activations]
    gate = excite.squeeze_excite_gate(*gate_arguments) if gated else None
    project_arguments = [hidden, *project, gate, residual, project_activation, False]

    # Backward; what comes before a stage is needed if anything there is.
    before_depthwise = any(needed[:4])
    before_gate = any(needed[:7])
    before_project = any(needed[:11])
    for_hidden, *for_project, for_gate, for_residual, _, _ = pointwise.pointwise_conv_backward(
        project_arguments,
        [
            before_gate,
            *needed[11:14],
            gated and before_project,
            needed[14],
            False,
            False,
        ],
        (),
        (upstream, None),
    )
    for_mean: Tensor | None = None
    for_squeeze: list[Tensor | None] = [None] * 4
    if gated and before_project:
        for_mean, *for_squeeze = excite.squeeze_excite_gate_backward(
            gate_arguments, [before_gate, *needed[7:11], False, False], (), (for_gate,)
        )[:5]
    for_depthwise: list[Tensor | None] = [None] * 3
    for_expand: list[Tensor | None] = [None] * 3
    for_input = None
    if before_gate:
        for_expanded, *for_depthwise = depthwise.depthwise_conv_backward(
            depthwise_arguments,
            [before_depthwise, *needed[4:7], False, False, False, False, False],
            (),
            (for_hidden, for_mean),
        )[:4]
        for_input = for_expanded
        if expands and before_depthwise:
            for_input, *for_expand = pointwise.pointwise_conv_backward(
                expand_arguments,
                [needed[0], *needed[1:4], False, False, False, False],
                (),
                (for_expanded, None),
            )[:4]
    return [for_input, *for_expand, *for_depthwise, *for_squeeze, *for_project, for_residual]
