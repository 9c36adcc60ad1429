"""A block's forward and backward pass in training, kept to the convolutions' raw outputs.

Forward, with z the raw outputs, the BatchNorms' vectors in between made by kernels of a few µs:

    z1 = expand · x                            product; its mean and variance in the epilogue
    z2 = depthwise ∗ act(norm1(z1))            convolution; the norm and activation in its prologue
    gate from Σ act(norm2(z2))                 a pass over z2, for norm2 needs all of z2 first
    z3 = project · (gate · act(norm2(z2)))     product; all of that in its prologue
    y  = keep · norm3(z3) + x                  a pass

Backward, u_i the gradient for what comes after norm_i and its activation:

    norm3's sums                               a pass over dy and z3
    d project, u2 = projectᵀ · dz3             products; dz3 and the gated activation in prologues
    d gate, norm2's sums                       a pass over u2 and z2 (`image_sums`)
    d depthwise, u1                            convolutions; dz2 and act(norm1(z1)) in prologues
    norm1's sums                               a pass over u1 and z1
    d expand, dx = expandᵀ · dz1 + dy          products; dz1 in prologues, the residual in one

Of the size of the expanded tensor (6 times the input) the forward pass writes two tensors and reads
four, the backward pass writes two and reads twelve; eager PyTorch's forward pass alone writes seven
and reads nine, and keeps six. No GPU has run this.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..block_arguments import BlockArguments
from ..gpu import pack_taps
from ..layout import nhwc
from ..operands import Forward, Gradient
from . import depthwise_conv as depthwise
from . import depthwise_conv_gradient as depthwise_gradient
from . import pointwise_conv as pointwise
from . import squeeze_excite as excite
from .batch_norm_act_passes import Normalization, apply
from .batch_norm_act_sums import affine, gradient_affine, gradient_sums
from .image_sums import gated, image_sums
from .reduce import totals


def mbconv_training(*arguments: Any) -> tuple[Tensor, ...]:
    """The op ``mbconv_training``."""
    block = BlockArguments(*arguments)
    input = nhwc(block.input)
    empty = input.new_empty(0)
    kernel = list(block.depthwise_weight.shape[2:])
    expanded, expand_mean, expand_var = empty, empty.clone(), empty.clone()
    values, operand = input, Forward()
    if block.expand_weight is not None:
        made = pointwise.product(input, block.expand_weight.flatten(1), moments=True)
        assert made.output is not None and made.moments is not None
        values = expanded = made.output
        expand_mean, expand_var = made.moments
        normalization = Normalization(expand_mean, expand_var, *block.norms[0][:3])
        operand = _after(normalization, block.activation)
    convolved = depthwise.convolve(
        values,
        pack_taps(block.depthwise_weight),
        kernel,
        *block.geometry,
        operand,
        moments=True,
    )
    hidden = convolved.output
    assert convolved.moments is not None
    depthwise_mean, depthwise_var = convolved.moments
    normalization = Normalization(depthwise_mean, depthwise_var, *block.norms[1][:3])
    operand, pooled = _after(normalization, block.activation), empty.clone()
    if block.se_reduce_weight is not None:
        pixels = hidden.shape[2] * hidden.shape[3]
        sums, _ = excite.pool(hidden, operand)
        assert sums is not None
        pooled = totals(sums, 1 / pixels)
        gate = excite.gate(
            pooled, 1.0, *block.squeeze_excite, block.se_activation, block.gate_activation
        )
        operand = operand._replace(gate=gate)
    made = pointwise.product(hidden, block.project_weight.flatten(1), operand, moments=True)
    assert made.output is not None and made.moments is not None
    projected, (project_mean, project_var) = made.output, made.moments
    normalization = Normalization(project_mean, project_var, *block.norms[2][:3])
    last: Forward | Normalization = normalization
    if block.keep is not None:
        last = _after(normalization, "none")._replace(gate=_per_channel(block.keep, projected))
    output = apply(projected, last, input if block.residual else None)
    return (
        output,
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


def mbconv_training_backward(
    arguments: list[Any],
    needed: list[bool],
    saved: tuple[Tensor, ...],
    gradients: tuple[Tensor | None, ...],
) -> tuple[Tensor | None, ...]:
    """The gradients of :func:`mbconv_training` for its arguments; ``saved`` are its other outputs,
    whose own gradients must be None."""
    block = BlockArguments(*arguments)
    expanded, hidden, projected, *statistics, pooled = saved
    upstream = gradients[0]
    results: list[Tensor | None] = [None] * len(arguments)
    if any(gradient is not None for gradient in gradients[1:]):
        raise NotImplementedError("mbconv_training: only its output can be differentiated")
    if upstream is None:
        return tuple(results)
    input, upstream = nhwc(block.input), nhwc(upstream)
    kernel = list(block.depthwise_weight.shape[2:])
    taps = pack_taps(block.depthwise_weight)
    norms = [
        Normalization(mean, var, *norm[:3])
        for mean, var, norm in zip(statistics[::2], statistics[1::2], block.norms, strict=True)
    ]
    # What is needed of the stages before one: nothing, if all their tensors are frozen.
    before_depthwise = needed[0] or any(needed[1:4])
    before_project = before_depthwise or any(needed[4:11])

    # The projection
    gradient = Gradient(z=projected)
    if block.keep is not None:
        gradient = gradient._replace(gate=_per_channel(block.keep, projected))
    gradient, results[12], results[13] = _normalized(
        gradient, gradient_sums(upstream, gradient, norms[2]), norms[2], projected, needed[12:14]
    )
    operand, gate = _after(norms[1], block.activation), None
    if block.se_reduce_weight is not None:
        gate = excite.gate(
            pooled, 1.0, *block.squeeze_excite, block.se_activation, block.gate_activation
        )
        operand = operand._replace(gate=gate)
    if needed[11]:
        matrix, _ = pointwise.weight_gradient(upstream, gradient, hidden, operand)
        results[11] = matrix.view(block.project_weight.shape)
    if needed[14]:
        raise NotImplementedError("mbconv_training: keep has no gradient")
    if before_project:
        after_depthwise = pointwise.product(
            upstream, block.project_weight.flatten(1), gradient, transposed=True
        ).output
        assert after_depthwise is not None

        # The gate, and the depthwise convolution
        sums = image_sums(hidden, norms[1], block.activation, after_depthwise)
        gradient = Gradient(z=hidden, scale=operand.scale, shift=operand.shift)
        gradient = gradient._replace(activation=block.activation)
        pixels = hidden.shape[2] * hidden.shape[3]
        if gate is not None:
            for_pooled, results[7:11] = _gate_gradients(
                totals(sums[0]),
                pooled,
                block.squeeze_excite,
                block.se_activation,
                block.gate_activation,
                needed[7:11],
            )
            offset = for_pooled / pixels
            gradient = gradient._replace(gate=gate, offset=offset)
            sums = gated(sums, gate, offset)
        else:
            sums = gated(sums, None, None)
        gradient, results[5], results[6] = _normalized(
            gradient, sums, norms[1], hidden, needed[5:7]
        )
        values, operand = input, Forward()
        if block.expand_weight is not None:
            values, operand = expanded, _after(norms[0], block.activation)
        geometry = (kernel, *block.geometry)
        if needed[4]:
            for_taps, _ = depthwise_gradient.weight_gradient(
                after_depthwise, gradient, values, operand, *geometry
            )
            results[4] = for_taps.t().reshape(block.depthwise_weight.shape)
        if before_depthwise:
            size = (values.shape[2], values.shape[3])
            for_values = depthwise_gradient.input_gradient(
                after_depthwise, taps, *geometry, size, gradient
            )
            if block.expand_weight is None:
                results[0] = for_values + upstream if block.residual else for_values
                return tuple(results)

            # The expansion
            gradient = Gradient(z=expanded, scale=operand.scale, shift=operand.shift)
            gradient = gradient._replace(activation=block.activation)
            gradient, results[2], results[3] = _normalized(
                gradient,
                gradient_sums(for_values, gradient, norms[0]),
                norms[0],
                expanded,
                needed[2:4],
            )
            if needed[1]:
                matrix, _ = pointwise.weight_gradient(for_values, gradient, input, Forward())
                results[1] = matrix.view(block.expand_weight.shape)
            if needed[0]:
                results[0] = pointwise.product(
                    for_values,
                    block.expand_weight.flatten(1),
                    gradient,
                    transposed=True,
                    residual=upstream if block.residual else None,
                ).output
    return tuple(results)


def _after(normalization: Normalization, activation: str) -> Forward:
    """activation(normalization(z)) as a prologue."""
    mean, var, weight, bias, eps = normalization
    scale, shift = affine(weight, bias, mean, var, eps)
    return Forward(scale, shift, activation)


def _per_channel(keep: Tensor, tensor: Tensor) -> Tensor:
    """[N] as a gate [N, C]."""
    return keep[:, None].expand(tensor.shape[:2]).contiguous()


def _normalized(
    gradient: Gradient,
    sums: Tensor,
    normalization: Normalization,
    z: Tensor,
    needed: list[bool],
) -> tuple[Gradient, Tensor | None, Tensor | None]:
    """``gradient`` with BatchNorm's backward pass at its end; and its weight's and bias's."""
    count = z.shape[0] * z.shape[2] * z.shape[3]
    vectors = gradient_affine(sums, count, normalization, needed=(True, needed[0], needed[1]))
    gradient = gradient._replace(
        factor=vectors.factor, slope=vectors.slope, constant=vectors.constant
    )
    return gradient, vectors.weight, vectors.bias


def _gate_gradients(
    for_gate: Tensor,
    pooled: Tensor,
    weights: tuple[Tensor | None, ...],
    activation: str,
    gate_activation: str,
    needed: list[bool],
) -> tuple[Tensor, list[Tensor | None]]:
    """The gradients for the pooled vector and for squeeze-and-excitation's four tensors."""
    for_pooled, *results = excite.squeeze_excite_gate_backward(
        [pooled, *weights, activation, gate_activation],
        [True, *needed, False, False],
        (),
        (for_gate,),
    )[:5]
    assert for_pooled is not None
    return for_pooled, results
