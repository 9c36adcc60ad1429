"""What the ops share: argument checks with one clear error each, padding, the reference pieces."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..layout import nhwc, output_size

ACTIVATIONS = ("none", "relu", "relu6", "silu", "hard_swish", "sigmoid", "hard_sigmoid")

Padding = str | int | Sequence[int]


def apply_activation(input: Tensor, name: str) -> Tensor:
    """The activation called ``name`` in plain PyTorch."""
    if name == "none":
        return input
    if name == "relu":
        return F.relu(input)
    if name == "relu6":
        return F.relu6(input)
    if name == "silu":
        return F.silu(input)
    if name == "hard_swish":
        return F.hardswish(input)
    if name == "sigmoid":
        return torch.sigmoid(input)
    if name == "hard_sigmoid":
        return F.hardsigmoid(input)
    raise ValueError(f"activation: unknown activation {name!r}; accepted are {_listed()}")


def _listed() -> str:
    return ", ".join(repr(name) for name in ACTIVATIONS)


def check_activation(op: str, name: Any, argument: str = "activation") -> None:
    if name not in ACTIVATIONS:
        raise ValueError(
            f"{op}: {argument} is {name!r}, unknown activation; accepted are {_listed()}"
        )


def check_tensor(op: str, argument: str, value: Any, dims: int | tuple[int, ...] = ()) -> None:
    """``value`` is a floating-point tensor with one of the accepted numbers of dimensions."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {argument} is {type(value).__name__}, a torch.Tensor is accepted")
    if not value.is_floating_point():
        raise TypeError(
            f"{op}: {argument} has dtype {value.dtype}, a floating-point dtype is accepted"
        )
    accepted = (dims,) if isinstance(dims, int) else dims
    if accepted and value.dim() not in accepted:
        wanted = " or ".join(str(count) for count in accepted)
        raise ValueError(
            f"{op}: {argument} has {value.dim()} dimensions {tuple(value.shape)}, "
            f"{wanted} are accepted"
        )


def check_filled(op: str, argument: str, value: Tensor, first: int = 0) -> None:
    """No dimension of ``value`` from ``first`` on is empty."""
    if 0 in value.shape[first:]:
        raise ValueError(
            f"{op}: {argument} has an empty dimension {tuple(value.shape)}, "
            f"{'only an empty batch' if first else 'none'} is accepted"
        )


def check_like(op: str, argument: str, value: Tensor, input: Tensor, name: str = "input") -> None:
    """``value`` has the dtype and device of ``input``."""
    if value.dtype != input.dtype:
        raise TypeError(
            f"{op}: {argument} has dtype {value.dtype}, {name} has {input.dtype}; they must agree"
        )
    check_device(op, argument, value, input, name)


def check_device(op: str, argument: str, value: Tensor, input: Tensor, name: str = "input") -> None:
    if value.device != input.device:
        raise ValueError(
            f"{op}: {argument} is on {value.device}, {name} is on {input.device}; they must agree"
        )


def check_vector(op: str, argument: str, value: Tensor | None, size: int, input: Tensor) -> None:
    """``value`` is None or [size], on ``input``'s device, of its dtype or float32."""
    if value is None:
        return
    check_tensor(op, argument, value)
    if value.dim() != 1 or value.shape[0] != size:
        raise ValueError(f"{op}: {argument} has shape {tuple(value.shape)}, ({size},) is accepted")
    if value.dtype not in (input.dtype, torch.float32):
        raise TypeError(
            f"{op}: {argument} has dtype {value.dtype}, {input.dtype} or torch.float32 is accepted"
        )
    check_device(op, argument, value, input)


def check_shape(op: str, argument: str, value: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(value.shape) != tuple(shape):
        raise ValueError(
            f"{op}: {argument} has shape {tuple(value.shape)}, {tuple(shape)} is accepted"
        )


def pair(op: str, argument: str, value: Any) -> list[int]:
    """``value`` as [vertical, horizontal] positive integers."""
    values = list(value) if isinstance(value, Sequence) else [value, value]
    if len(values) != 2 or any(not isinstance(v, int) or v < 1 for v in values):
        raise ValueError(
            f"{op}: {argument} is {value!r}, a positive integer or a pair of them is accepted"
        )
    return values


def resolve_padding(
    op: str,
    padding: Padding,
    size: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
) -> list[int]:
    """``padding`` as [left, right, top, bottom] for an image of ``size`` (height, width).

    ``"symmetric"`` is dilation·(k − 1)/2 on every side. ``"same"`` is TensorFlow's SAME: the
    output has ceil(size / stride) rows and the odd extra row and column go bottom and right.
    """
    reach = [dilation[axis] * (kernel[axis] - 1) for axis in (0, 1)]
    if padding == "symmetric":
        vertical, horizontal = reach[0] // 2, reach[1] // 2
        return [horizontal, horizontal, vertical, vertical]
    sides: list[Any] = []
    if padding == "same":
        for axis in (1, 0):
            outputs = (size[axis] + stride[axis] - 1) // stride[axis]
            total = max((outputs - 1) * stride[axis] + reach[axis] + 1 - size[axis], 0)
            sides += [total // 2, total - total // 2]
        return sides
    if isinstance(padding, int):
        sides = [padding] * 4
    elif isinstance(padding, Sequence) and not isinstance(padding, str):
        sides = list(padding)
        if len(sides) == 2:
            sides = [sides[1], sides[1], sides[0], sides[0]]
    if len(sides) != 4 or any(not isinstance(s, (int, torch.SymInt)) or s < 0 for s in sides):
        raise ValueError(
            f"{op}: padding is {padding!r}; accepted are 'symmetric', 'same', a non-negative "
            "integer, a (vertical, horizontal) pair or (left, right, top, bottom)"
        )
    return sides


def check_geometry(
    op: str,
    input: Tensor,
    kernel: Sequence[int],
    stride: Any,
    padding: Padding,
    dilation: Any,
) -> tuple[list[int], list[int], list[int]]:
    """Checked (stride, padding, dilation), padding as [left, right, top, bottom]."""
    strides = pair(op, "stride", stride)
    dilations = pair(op, "dilation", dilation)
    if kernel[0] % 2 == 0 or kernel[1] % 2 == 0:
        raise ValueError(
            f"{op}: weight has a {kernel[0]}×{kernel[1]} kernel, odd sizes are accepted"
        )
    size = input.shape[2:]
    sides = resolve_padding(op, padding, size, kernel, strides, dilations)
    height, width = output_size(size, kernel, strides, sides, dilations)
    if height < 1 or width < 1:
        raise ValueError(
            f"{op}: padding {padding!r} leaves no output for a {size[0]}×{size[1]} input and a "
            f"{kernel[0]}×{kernel[1]} kernel with dilation {tuple(dilations)}"
        )
    return strides, sides, dilations


def reference_convolution(
    input: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: str,
    residual: Tensor | None = None,
) -> Tensor:
    """activation(scale · (weight ∗ input) + bias + residual) in plain PyTorch, channels last."""
    left, right, top, bottom = padding
    if left == right and top == bottom:
        output = F.conv2d(input, weight, None, stride, (top, left), dilation, groups)
    else:
        output = F.conv2d(
            F.pad(input, (left, right, top, bottom)), weight, None, stride, 0, dilation, groups
        )
    if scale is not None:
        output = output * scale.to(output.dtype).view(1, -1, 1, 1)
    if bias is not None:
        output = output + bias.to(output.dtype).view(1, -1, 1, 1)
    if residual is not None:
        output = output + residual
    return nhwc(apply_activation(output, activation))


def convolution_gradients(
    gradient: Tensor,
    input: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    needed: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of a plain convolution for (input, weight, bias), those that are ``needed``."""
    left, right, top, bottom = padding
    symmetric = left == right and top == bottom
    padded = input if symmetric else F.pad(input, (left, right, top, bottom))
    for_input, for_weight, for_bias = torch.ops.aten.convolution_backward(
        gradient,
        padded,
        weight,
        [weight.shape[0]],
        list(stride),
        [top, left] if symmetric else [0, 0],
        list(dilation),
        False,
        [0, 0],
        groups,
        list(needed),
    )
    if for_input is not None and not symmetric:
        height, width = input.shape[2:]
        for_input = for_input[:, :, top : top + height, left : left + width]
    return for_input, for_weight, for_bias
