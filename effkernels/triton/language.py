"""What kernels share, in Triton's language: activations and their slopes, products, offsets.

Values are float32 here; kernels convert when they load and store.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl

from . import interpreted

INTERPRETED = tl.constexpr(interpreted())


def kernel(function: Callable[..., Any]) -> Any:
    """``triton.jit`` that compiles once for all sizes.

    Triton would compile an integer argument anew for multiples of 16 and for 1. Sizes of
    EfficientNet's layers are all of these, so no integer is looked at; what vector loads need to
    know comes as a constant: ``channels = channel_vectors * VECTOR``. Names of pointers end in
    ``_ptr``, which keeps their alignment.
    """
    sizes = [
        name
        for name, parameter in inspect.signature(function).parameters.items()
        if not name.endswith("_ptr") and "constexpr" not in str(parameter.annotation)
    ]
    return triton.jit(function, do_not_specialize=sizes)


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """The activation of this name; NaN stays NaN."""
    if ACTIVATION == "relu":
        x = tl.where(x < 0, 0.0, x)
    elif ACTIVATION == "relu6":
        x = tl.where(x < 0, 0.0, tl.where(x > 6, 6.0, x))
    elif ACTIVATION == "silu":
        x = x / (1 + tl.exp(-x))
    elif ACTIVATION == "hard_swish":
        x = x * tl.where(x < -3, 0.0, tl.where(x > 3, 1.0, x / 6 + 0.5))
    elif ACTIVATION == "sigmoid":
        x = 1 / (1 + tl.exp(-x))
    elif ACTIVATION == "hard_sigmoid":
        x = tl.where(x < -3, 0.0, tl.where(x > 3, 1.0, x / 6 + 0.5))
    else:
        tl.static_assert(ACTIVATION == "none")
    return x


@triton.jit
def slope(x, ACTIVATION: tl.constexpr):
    """The derivative at ``x`` of the activation of this name, PyTorch's choice at the corners."""
    if ACTIVATION == "relu":
        s = tl.where(x > 0, 1.0, 0.0)
    elif ACTIVATION == "relu6":
        s = tl.where((x > 0) & (x < 6), 1.0, 0.0)
    elif ACTIVATION == "silu":
        sigmoid = 1 / (1 + tl.exp(-x))
        s = sigmoid * (1 + x * (1 - sigmoid))
    elif ACTIVATION == "hard_swish":
        s = tl.where(x <= -3, 0.0, tl.where(x < 3, x / 3 + 0.5, 1.0))
    elif ACTIVATION == "sigmoid":
        sigmoid = 1 / (1 + tl.exp(-x))
        s = sigmoid * (1 - sigmoid)
    elif ACTIVATION == "hard_sigmoid":
        s = tl.where((x > -3) & (x < 3), 1.0 / 6, 0.0)
    else:
        tl.static_assert(ACTIVATION == "none")
        s = tl.full(x.shape, 1.0, tl.float32)
    return s


@triton.jit
def rounded(x, TYPE: tl.constexpr):
    """``x`` in this type, to the nearest.

    So does the GPU by itself; Triton 3.8's interpreter cuts float32 off where bfloat16 ends, even
    if asked to round, and every value would come out a few thousandths too small.
    """
    if INTERPRETED and x.dtype == tl.float32 and TYPE.is_bf16():
        bits = x.to(tl.uint32, bitcast=True)
        up = (bits + 0x7FFF + ((bits >> 16) & 1)).to(tl.float32, bitcast=True)
        x = tl.where(x == x, up, x)
    return x.to(TYPE)


@triton.jit
def dot(a, b, accumulator, PRECISION: tl.constexpr):
    """accumulator + a · b; PRECISION is what float32 operands are multiplied in.

    Triton 3.8's interpreter computes garbage for bfloat16 operands, so there they are converted,
    which is exact.
    """
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, accumulator, input_precision=PRECISION)


@triton.jit
def row_offsets(rows, row_size, WIDE: tl.constexpr):
    """``rows * row_size``, in 64 bits for tensors of 2³¹ elements or more."""
    if WIDE:
        rows = rows.to(tl.int64)
    return rows * row_size


@triton.jit
def forward_operand(
    z,
    scale,
    shift,
    gate,
    AFFINE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
):
    """`operands.Forward` of float32 values; the vectors must broadcast against ``z``."""
    if AFFINE:
        z = z * scale + shift
    z = activate(z, ACTIVATION)
    if GATED:
        z = z * gate
    return z


@triton.jit
def gradient_operand(
    upstream,
    z,
    scale,
    shift,
    gate,
    offset,
    factor,
    gradient_slope,
    constant,
    AFFINE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    OFFSET: tl.constexpr,
    NORMALIZED: tl.constexpr,
):
    """`operands.Gradient` of float32 values; the vectors must broadcast against ``z``."""
    t = upstream
    if GATED:
        t = t * gate
    if OFFSET:
        t = t + offset
    if ACTIVATION != "none":
        before = z
        if AFFINE:
            before = z * scale + shift
        t = t * slope(before, ACTIVATION)
    if NORMALIZED:
        t = t * factor + z * gradient_slope + constant
    return t
