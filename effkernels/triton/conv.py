"""Dense small-kernel convolution: the stem, FusedMBConv, ResNet.

    output = activation(scale[k] · (weight[k] ∗ input) + bias[k] + residual)

Two implementations, chosen by shape (``conv_config``): an implicit matrix product with everything
in its epilogue (``conv_gemm``: one launch, two where the depth is split), or cuDNN followed by one
pass for the rest (``conv_epilogue``). The gradient recomputes the raw convolution where an
activation or ``scale`` asks for it, so that a training pass keeps the input alone; one kernel makes
of it the gradients of residual, bias and scale and what cuDNN's own gradient kernels are given for
input and weight. Those follow ``torch.backends.cudnn.deterministic``, as everywhere in PyTorch; all
kernels here always give the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from ..cache import cached
from ..layout import empty_nhwc, nhwc, output_size
from ..ops._common import convolution_gradients
from . import conv_config, reduce
from .conv_config import CUDNN, ConvConfig, ConvProblem
from .conv_epilogue import _epilogue_kernel, _gradient_kernel
from .conv_gemm import _conv_kernel, _stem_kernel
from .launch import device_of, is_wide, launch, product_precision, vector_width
from .tune import choose


class _Convolution(NamedTuple):
    """A convolution without what follows it."""

    input: Tensor
    weight: Tensor
    stride: Sequence[int]
    padding: Sequence[int]  # left, right, top, bottom
    dilation: Sequence[int]

    def empty_output(self) -> Tensor:
        size = output_size(
            self.input.shape[2:], self.weight.shape[2:], self.stride, self.padding, self.dilation
        )
        return empty_nhwc(self.input, self.weight.shape[0], *size)

    def top_left(self) -> tuple[int, int]:
        return self.padding[2], self.padding[0]


class _Epilogue(NamedTuple):
    """What follows it: activation(scale · P + bias + residual)."""

    scale: Tensor | None = None
    bias: Tensor | None = None
    residual: Tensor | None = None
    activation: str = "none"

    def is_empty(self) -> bool:
        tensors = (self.scale, self.bias, self.residual)
        return self.activation == "none" and all(tensor is None for tensor in tensors)


def conv(
    input: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    residual: Tensor | None,
    activation: str,
) -> Tensor:
    """The op ``conv``; [N, K, H', W'] channels_last."""
    convolution = _Convolution(input, weight, stride, padding, dilation)
    return _forward(convolution, _epilogue(scale, bias, residual, activation))


def conv_backward(
    arguments: list[Any],
    needed: list[bool],
    saved: tuple[Tensor, ...],
    gradients: tuple[Tensor | None, ...],
) -> tuple[Tensor | None, ...]:
    """Gradients of :func:`conv` for its tensors, those that are ``needed``."""
    input, weight, scale, bias, stride, padding, dilation, residual, activation = arguments
    (gradient,) = gradients
    if gradient is None or not any(needed):
        return (None,) * len(arguments)
    convolution = _Convolution(nhwc(input), weight, stride, padding, dilation)
    epilogue = _epilogue(scale, bias, residual, activation)
    t, scaled, for_scale, for_bias = _gradient(
        nhwc(gradient),
        convolution,
        epilogue,
        for_t=needed[7] or (scale is None and (needed[0] or needed[1])),
        for_scaled=scale is not None and (needed[0] or needed[1]),
        for_scale=needed[2],
        for_bias=needed[3],
    )
    for_input = for_weight = None
    incoming = t if scale is None else scaled
    if incoming is not None and (needed[0] or needed[1]):
        for_input, for_weight, _ = convolution_gradients(
            incoming,
            convolution.input,
            nhwc(weight),
            stride,
            padding,
            dilation,
            1,
            (needed[0], needed[1], False),
        )
    for_residual = t if needed[7] else None
    return for_input, for_weight, for_scale, for_bias, None, None, None, for_residual, None


def _epilogue(
    scale: Tensor | None, bias: Tensor | None, residual: Tensor | None, activation: str
) -> _Epilogue:
    """With every tensor dense."""
    return _Epilogue(
        None if scale is None else scale.contiguous(),
        None if bias is None else bias.contiguous(),
        None if residual is None else nhwc(residual),
        activation,
    )


def _forward(convolution: _Convolution, epilogue: _Epilogue) -> Tensor:
    input, weight = convolution.input, convolution.weight
    output = convolution.empty_output()
    left, right, top, bottom = convolution.padding
    problem = ConvProblem(
        batch=input.shape[0],
        channels=input.shape[1],
        height=input.shape[2],
        width=input.shape[3],
        outputs=output.shape[1],
        out_height=output.shape[2],
        out_width=output.shape[3],
        kernel="x".join(map(str, weight.shape[2:])),
        stride="x".join(map(str, convolution.stride)),
        dilation="x".join(map(str, convolution.dilation)),
        symmetric=left == right and top == bottom,
        itemsize=input.element_size(),
        precision=product_precision(input.dtype),
        epilogue=not epilogue.is_empty(),
        residual=epilogue.residual is not None,
    )

    def run(config: ConvConfig) -> Tensor:
        if config.implementation == CUDNN:
            return _cudnn(convolution, epilogue)
        if problem.is_stem:
            return _stem(convolution, epilogue, output, problem, config)
        return _implicit_gemm(convolution, epilogue, output, problem, config)

    device = device_of(input)
    config = choose("conv", problem, device, conv_config.heuristic, conv_config.candidates, run)
    return run(config)


def _cudnn(convolution: _Convolution, epilogue: _Epilogue) -> Tensor:
    """cuDNN's convolution; what follows happens in place."""
    input, weight = nhwc(convolution.input), _packed(convolution.weight).permute(0, 3, 1, 2)
    left, right, top, bottom = convolution.padding
    padding = (top, left)
    if left != right or top != bottom:
        input, padding = F.pad(input, (left, right, top, bottom)), (0, 0)
    stride, dilation = tuple(convolution.stride), tuple(convolution.dilation)
    output = nhwc(F.conv2d(input, weight, None, stride, padding, dilation))
    if not epilogue.is_empty():
        _finish(output, output, 1, epilogue)
    return output


def _packed(weight: Tensor) -> Tensor:
    """[K, C, kh, kw] as dense [K, kh, kw, C]: a view where the model is channels_last."""
    view = weight.detach().permute(0, 2, 3, 1)
    return view if view.is_contiguous() else cached("triton conv", (weight,), view.contiguous)


def _depth_first(weight: Tensor) -> Tensor:
    """[K, C, kh, kw] as dense [C · kh · kw, K]."""
    view = weight.detach().flatten(1).t()
    return view if view.is_contiguous() else cached("triton stem", (weight,), view.contiguous)


def _implicit_gemm(
    convolution: _Convolution,
    epilogue: _Epilogue,
    output: Tensor,
    problem: ConvProblem,
    config: ConvConfig,
) -> Tensor:
    input = nhwc(convolution.input)
    outputs, (kernel_height, kernel_width) = problem.outputs, convolution.weight.shape[2:]
    steps = triton.cdiv(problem.depth, config.block_k)
    split_steps = triton.cdiv(steps, config.splits)
    splits = triton.cdiv(steps, split_steps)  # none of them is empty
    target, vectors = output, epilogue
    if splits > 1:
        target = torch.empty(
            (splits, problem.rows, outputs), dtype=torch.float32, device=input.device
        )
        vectors = _Epilogue()
    vector, output_vector = (
        vector_width(input.dtype, size) for size in (problem.channels, outputs)
    )
    tiles = triton.cdiv(problem.rows, config.block_m) * triton.cdiv(outputs, config.block_n)
    launch(
        _conv_kernel,
        (tiles * splits,),
        target,
        input,
        _packed(convolution.weight),
        vectors.scale,
        vectors.bias,
        vectors.residual,
        problem.rows,
        problem.height,
        problem.width,
        problem.out_height,
        problem.out_width,
        problem.channels // vector,
        outputs // output_vector,
        kernel_height,
        kernel_width,
        *convolution.stride,
        *convolution.top_left(),
        *convolution.dilation,
        split_steps,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        VECTOR=vector,
        OUTPUT_VECTOR=output_vector,
        ACTIVATION=vectors.activation,
        PRECISION=problem.precision,
        FLAT=problem.channels % config.block_k != 0,
        SPLIT=splits > 1,
        WIDE=is_wide(input, output, convolution.weight),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
    )
    if splits > 1:
        _finish(output, target, splits, epilogue)
    return output


def _stem(
    convolution: _Convolution,
    epilogue: _Epilogue,
    output: Tensor,
    problem: ConvProblem,
    config: ConvConfig,
) -> Tensor:
    input, weight = convolution.input, convolution.weight
    if not input.is_contiguous():
        input = nhwc(input)
    output_vector = vector_width(input.dtype, problem.outputs)
    image_stride, channel_stride, row_stride, column_stride = input.stride()
    launch(
        _stem_kernel,
        (triton.cdiv(problem.rows, config.block_m) * triton.cdiv(problem.outputs, config.block_n),),
        output,
        input,
        _depth_first(weight),
        epilogue.scale,
        epilogue.bias,
        epilogue.residual,
        problem.rows,
        problem.height,
        problem.width,
        problem.out_height,
        problem.out_width,
        problem.outputs // output_vector,
        image_stride,
        channel_stride,
        row_stride,
        column_stride,
        *convolution.stride,
        *convolution.top_left(),
        *convolution.dilation,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        CHANNELS=problem.channels,
        KERNEL_HEIGHT=weight.shape[2],
        KERNEL_WIDTH=weight.shape[3],
        OUTPUT_VECTOR=output_vector,
        ACTIVATION=epilogue.activation,
        PRECISION=problem.precision,
        WIDE=is_wide(input, output),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
    )
    return output


def _finish(output: Tensor, source: Tensor, splits: int, epilogue: _Epilogue) -> None:
    """``output`` = ``epilogue`` of the sum of ``source``'s [splits, pixels, K]; may be in place."""
    channels = output.shape[1]
    vector = vector_width(output.dtype, channels)
    config = conv_config.epilogue(output.element_size())
    launch(
        _epilogue_kernel,
        (triton.cdiv(output.numel(), config.block),),
        output,
        source,
        epilogue.scale,
        epilogue.bias,
        epilogue.residual,
        output.numel() // channels,
        channels // vector,
        splits,
        num_warps=config.num_warps,
        VECTOR=vector,
        ACTIVATION=epilogue.activation,
        SPLIT=splits > 1,
        WIDE=is_wide(output),
        BLOCK=config.block,
    )


def _gradient(
    gradient: Tensor,
    convolution: _Convolution,
    epilogue: _Epilogue,
    *,
    for_t: bool,
    for_scaled: bool,
    for_scale: bool,
    for_bias: bool,
) -> tuple[Tensor | None, ...]:
    """(t, scale · t, Σ t · P, Σ t) of ``conv_epilogue``, None where nobody asks.

    t is the gradient of the residual and, times scale, of the raw convolution P, which is computed
    once more where it is needed.
    """
    plain = epilogue.activation == "none"
    t = scaled = scale_sums = bias_sums = None
    if for_t:
        t = gradient if plain else torch.empty_like(gradient)
    if for_scaled:
        scaled = torch.empty_like(gradient)
    writes_t = for_t and not plain
    if not (writes_t or for_scaled or for_scale or for_bias):
        return t, None, None, None
    raw = None
    if for_scale or not plain:
        raw = _forward(convolution, _Epilogue())
    channels = gradient.shape[1]
    rows = gradient.numel() // channels
    vector = vector_width(gradient.dtype, channels)
    config = conv_config.gradient(rows, channels, gradient.element_size(), device_of(gradient))
    parts = triton.cdiv(rows, config.block_rows * config.steps)
    shape = (1, parts, channels)
    if for_scale:
        scale_sums = torch.empty(shape, dtype=torch.float32, device=gradient.device)
    if for_bias:
        bias_sums = torch.empty(shape, dtype=torch.float32, device=gradient.device)
    launch(
        _gradient_kernel,
        (parts * triton.cdiv(channels, config.block_channels),),
        t if writes_t else None,
        scaled,
        bias_sums,
        scale_sums,
        gradient,
        raw,
        epilogue.scale,
        None if plain else epilogue.bias,
        None if plain else epilogue.residual,
        rows,
        channels // vector,
        config.steps,
        num_warps=config.num_warps,
        VECTOR=vector,
        ACTIVATION=epilogue.activation,
        WIDE=is_wide(gradient) or parts * config.steps * config.block_rows >= 2**31,
        BLOCK_ROWS=config.block_rows,
        BLOCK_CHANNELS=config.block_channels,
    )
    for_scale_total = None if scale_sums is None else reduce.totals(scale_sums)[0]
    for_bias_total = None if bias_sums is None else reduce.totals(bias_sums)[0]
    return t, scaled, for_scale_total, for_bias_total
