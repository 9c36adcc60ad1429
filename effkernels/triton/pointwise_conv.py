"""1×1 convolutions: the op, its gradient, and the products that other ops make of them.

    output = activation(scale[k] · Σ_c weight[k, c] · gate[n, c] · input[n, c] + bias[k] + residual)
    mean   = spatial mean of the output

The kernels and what they move: `pointwise_conv_product` (forward, input gradient) and
`pointwise_conv_weight` (weight gradient). The backward pass saves nothing: with an activation it
computes once more what went into it, and every kernel derives the gradient it needs while loading.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..layout import nhwc
from ..operands import Forward, Gradient
from .pointwise_conv_product import Product, product
from .pointwise_conv_weight import materialize, weight_gradient

__all__ = [
    "Product",
    "materialize",
    "pointwise_conv",
    "pointwise_conv_backward",
    "product",
    "weight_gradient",
]


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
    result = product(
        nhwc(input),
        _matrix(weight),
        Forward(gate=gate),
        scale=_dense(scale),
        bias=_dense(bias),
        residual=None if residual is None else nhwc(residual),
        activation=activation,
        mean=return_mean,
    )
    assert result.output is not None
    mean = result.mean
    return result.output, input.new_empty(0) if mean is None else mean.to(input.dtype)


def pointwise_conv_backward(
    arguments: list[Any],
    needed: list[bool],
    saved: tuple[Tensor, ...],
    gradients: tuple[Tensor | None, ...],
) -> tuple[Tensor | None, ...]:
    """The gradients of :func:`pointwise_conv` for its tensors."""
    input, weight, scale, bias, gate, residual, activation, return_mean = arguments
    upstream, mean_gradient = gradients
    if not return_mean:
        mean_gradient = None
    if upstream is None and mean_gradient is None:
        return (None,) * len(arguments)
    input, matrix = nhwc(input), _matrix(weight)
    upstream = None if upstream is None else nhwc(upstream)
    forward = Forward(gate=gate)
    gradient = Gradient(activation=activation)
    if activation != "none":
        before = product(
            input,
            matrix,
            forward,
            scale=_dense(scale),
            bias=_dense(bias),
            residual=None if residual is None else nhwc(residual),
        )
        gradient = gradient._replace(z=before.output)
    if mean_gradient is not None:
        pixels = input.shape[2] * input.shape[3]
        offset = mean_gradient.float() / pixels
        if upstream is None and activation == "none":
            shape = (input.shape[0], matrix.shape[0], *input.shape[2:])
            upstream = nhwc(offset.to(input.dtype)[:, :, None, None].expand(shape))
        else:
            gradient = gradient._replace(offset=offset)

    for_residual = None
    if needed[5]:
        # Written out, so that the products below read it instead of what it is made of.
        for_residual = materialize(upstream, gradient)
        upstream, gradient = for_residual, Gradient()
    for_weight = for_scale = for_bias = None
    if needed[1] or needed[2] or needed[3]:
        unscaled, for_bias = weight_gradient(upstream, gradient, input, forward, bias=needed[3])
        for_weight = unscaled.view(weight.shape)
        if scale is not None:
            # Σ_p gradient · product, with the sum over the pixels already done
            for_scale = (unscaled * matrix).sum(1)
            for_weight = for_weight * scale.float().view(-1, 1, 1, 1)
    for_input = for_gate = None
    if needed[0] or needed[4]:
        if scale is not None:
            gradient = gradient._replace(factor=scale.float())
        result = product(
            upstream,
            matrix,
            gradient,
            transposed=True,
            gate=_dense(gate),
            store=needed[0],
            correlate=input if needed[4] else None,
        )
        for_input, for_gate = result.output, result.correlation
    return for_input, for_weight, for_scale, for_bias, for_gate, for_residual, None, None


def _matrix(weight: Tensor) -> Tensor:
    """[K, C, 1, 1] as [K, C]."""
    return weight.reshape(weight.shape[:2]).contiguous()


def _dense(vector: Tensor | None) -> Tensor | None:
    return None if vector is None else vector.contiguous()
