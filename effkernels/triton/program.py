"""Recorded steps in a row on a GPU: what :mod:`effkernels.native` and its programs are on a CPU.

Weights keep their shapes, [K, C, kh, kw], and are packed by having the values in memory in the
order that the kernels read them in. A step is a few launches; nothing in between waits for the
GPU, so a replay can be captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..layout import output_size
from ..native import IMAGE_CHANNELS, Packed, activation_codes, activation_names
from ..program import Kind, Step, Value, inputs_of, outputs_of
from . import can_run, function, interpreted

__all__ = ["NAME", "Program", "can_run", "variant"]

NAME = "triton"
COPIES = False  # torch.cat is one launch for all parts

_TAPS = (2, 3, 1, 0)  # axes of a depthwise weight: each tap's channels side by side


def variant(input: Tensor) -> str:
    """What runs the kernels, for people to read."""
    if interpreted():
        return "interpreter"
    major, minor = torch.cuda.get_device_capability(input.device)
    return f"sm_{major}{minor}"


def is_planar(input: Tensor) -> bool:
    return False  # the kernel looks for itself


def _in_order(weight: Tensor, *order: int) -> Tensor:
    """``weight`` with its axes in memory in this order."""
    moved = weight.detach().permute(order).contiguous()
    return moved.permute([order.index(axis) for axis in range(4)])


def _pack(
    order: tuple[int, int, int, int],
    input: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    activation: str,
) -> Packed:
    size = output_size(input.shape[2:], weight.shape[2:], stride, padding, dilation)
    geometry = [*weight.shape[2:], *stride, *dilation, padding[0], padding[2]]
    weights = (_in_order(weight, *order), scale, bias)
    return Packed(weights, geometry, activation_codes([activation]), (weight.shape[0], *size))


def pack_conv(input: Tensor, weight: Tensor, *arguments: Any) -> Packed:
    # Images have so few channels that their kernel goes over output channels instead.
    order = (1, 2, 3, 0) if weight.shape[1] <= IMAGE_CHANNELS else (0, 2, 3, 1)
    return _pack(order, input, weight, *arguments)


def pack_depthwise_conv(input: Tensor, *arguments: Any) -> Packed:
    return _pack(_TAPS, input, *arguments)


def pack_pointwise_conv(
    input: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None, activation: str
) -> Packed:
    order = (0, 1, 2, 3)
    return _pack(order, input, weight, scale, bias, (1, 1), (0, 0, 0, 0), (1, 1), activation)


def pack_linear(matrix: Tensor, bias: Tensor) -> tuple[Tensor | None, ...]:
    return matrix.detach()[:, :, None, None], None, bias.detach()


def pack_gate(reduce_weight: Tensor, expand_weight: Tensor) -> tuple[Tensor, Tensor]:
    return reduce_weight.detach(), expand_weight.detach()


def pack_squeeze_excite(
    reduce_weight: Tensor,
    reduce_bias: Tensor | None,
    expand_weight: Tensor,
    expand_bias: Tensor | None,
    activation: str,
    gate_activation: str,
) -> tuple[tuple[Tensor | None, ...], list[int]]:
    weights = (reduce_weight.detach(), reduce_bias, expand_weight.detach(), expand_bias)
    return weights, activation_codes([activation, gate_activation])


def pack_mbconv(input: Tensor, *arguments: Any) -> Packed:
    *weights, stride, padding, dilation, _ = arguments[:17]
    depthwise = weights[3] = _in_order(weights[3], *_TAPS)
    size = output_size(input.shape[2:], depthwise.shape[2:], stride, padding, dilation)
    geometry = [*depthwise.shape[2:], *stride, *dilation, padding[0], padding[2]]
    codes = activation_codes(arguments[17:])
    return Packed(tuple(weights), geometry, codes, (weights[10].shape[0], *size))


class Program:
    """Steps in a row, launched one after the other.

    Args:
        steps: at least one.
        wanted: values that somebody needs afterwards.
    """

    def __init__(self, steps: Sequence[Step], wanted: set[Value]) -> None:
        self.inputs = inputs_of(steps)
        self.outputs = outputs_of(steps, wanted)
        read = set(wanted).union(*(step.reads() for step in steps))
        # What is not read any more after a step is dropped there, so that its memory is used again.
        last = {value: i for i, step in enumerate(steps) for value in step.reads()}
        self._steps = [
            (
                step,
                _make_run(step, step.output in read),
                [v for v, i in last.items() if i == index and v not in wanted],
            )
            for index, step in enumerate(steps)
        ]

    def __call__(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        tensors = dict(zip(self.inputs, inputs, strict=True))
        for step, run, unread in self._steps:
            input = _of(step.input, tensors)
            residual = None if step.residual is None else _of(step.residual, tensors)
            output, mean = run(input, residual)
            if output is not None:
                tensors[step.output] = _shaped(output, step.output)
            if step.mean is not None:
                tensors[step.mean] = _shaped(mean, step.mean)
            for value in unread:
                del tensors[value]
        return [tensors[value] for value in self.outputs]


_Run = Callable[[Tensor, Tensor | None], tuple[Tensor | None, Any]]


def _make_run(step: Step, stored: bool) -> _Run:
    """The step as (input, residual) -> (output, mean); without ``stored`` the output is not read
    and need not be written."""
    names = activation_names(step.activations)
    weights, geometry = step.weights, _geometry(step)
    if step.kind == Kind.CONV:
        conv = function("conv")
        return lambda input, residual: (conv(input, *weights, *geometry, residual, *names), None)
    if step.kind == Kind.POINTWISE_CONV:
        weight, scale, bias = weights
        assert weight is not None
        matrix = weight.flatten(1)
        product = function("pointwise_conv", "product")
        wants_mean = step.mean is not None

        def run_product(input: Tensor, residual: Tensor | None) -> tuple[Tensor | None, Any]:
            result = product(
                input,
                matrix,
                scale=scale,
                bias=bias,
                residual=residual,
                activation=names[0],
                mean=wants_mean,
                store=stored,
            )
            return result.output, result.mean

        return run_product
    if step.kind == Kind.DEPTHWISE_CONV:
        depthwise = function("depthwise_conv")
        return lambda input, _: depthwise(input, *weights, *geometry, *names, step.mean is not None)
    if step.kind == Kind.MBCONV:
        block = function("mbconv", "block")
        return lambda input, residual: (block(input, *weights, *geometry, residual, *names), None)
    if step.kind == Kind.SQUEEZE_EXCITE:
        squeeze_excite = function("squeeze_excite")
        return lambda input, _: (squeeze_excite(input, *weights, *names), None)
    if step.kind == Kind.BATCH_NORM_ACT:
        norm = function("batch_norm_act")
        mean, var, *affine = weights  # var has eps in it
        return lambda input, residual: (
            norm(input, *affine, mean, var, residual, False, 0.0, *names)[0],
            None,
        )
    silu = function("silu")

    def run_silu(input: Tensor, residual: Tensor | None) -> tuple[Tensor | None, Any]:
        total = input if residual is None else input + residual
        return total if names == ["none"] else silu(total, *names), None

    return run_silu


def _geometry(step: Step) -> tuple[list[int], list[int], list[int]]:
    """Stride, padding as (left, right, top, bottom) and dilation of a step with windows."""
    kernel, stride, dilation = (step.geometry[i : i + 2] for i in (0, 2, 4))
    begin = {0: step.geometry[7], 1: step.geometry[6]}  # top, left
    end = []
    for axis, size, outputs in zip((0, 1), step.input.images(), step.output.images(), strict=False):
        reach = (outputs - 1) * stride[axis] + dilation[axis] * (kernel[axis] - 1) + 1
        end.append(max(reach - size - begin[axis], 0))
    return stride, [begin[1], end[1], begin[0], end[0]], dilation


def _of(value: Value, tensors: dict[Value, Tensor]) -> Tensor:
    root = tensors[value.root()]
    tensor = root if value.base is None else value.of(root)
    return tensor if tensor.dim() == 4 else tensor[:, :, None, None]


def _shaped(output: Tensor, value: Value) -> Tensor:
    """``output`` as the recorded op gave it: vectors may have come without their two ones."""
    dims = len(value.shape)
    if output.dim() == dims:
        tensor = output
    elif dims == 2:
        tensor = output.flatten(1)
    else:
        tensor = output[:, :, None, None]
    return tensor if tensor.dtype == value.dtype else tensor.to(value.dtype)
