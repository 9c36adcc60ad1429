from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode

import effkernels as ek
from effkernels import ops
from effkernels.ops import ACTIVATIONS
from effkernels.testing import assert_matches

from ._cases import (
    AFFINES,
    CHANNELS,
    LAYOUTS,
    PADDINGS,
    Arguments,
    Case,
    Draw,
    assert_memory_kept,
    assert_parity,
    assert_threads_agree,
    both,
    cases_of,
    gradient_function,
    has_output,
    pairwise,
    random_cases,
)

SIZES = ((1, 1), (1, 9), (2, 3), (5, 2), (7, 7), (8, 6), (3, 13), (14, 15), (9, 29), (16, 1))
AXES = {
    "channels": CHANNELS,
    "size": SIZES,
    "kernel": (1, 3, 5, 7, 9),
    "stride": (1, 2, 3),
    "padding": PADDINGS,
    "dilation": (1, 2),
    "batch": (1, 2, 0, 3),
    "affine": AFFINES,
    "activation": ACTIVATIONS,
    "layout": LAYOUTS,
    "mean": (False, True),
}
# Kernels and strides that are not square, as (vertical, horizontal).
OBLONG = {
    "kernel": ((1, 3), (5, 3), (3, 7), (9, 1)),
    "stride": ((1, 2), (3, 1), (2, 4)),
    "dilation": ((2, 1), (1, 3)),
}
OBLONG_AXES = {**AXES, **OBLONG}
RANDOM = {
    "channels": st.integers(1, 70),
    "size": st.tuples(st.integers(1, 24), st.integers(1, 24)),
    "kernel": st.sampled_from((1, 3, 5, 7, 9, 11)),
    "stride": st.integers(1, 3),
    "padding": st.one_of(
        st.sampled_from(("symmetric", "same")),
        st.tuples(*[st.integers(0, 12)] * 4),
    ),
    "dilation": st.integers(1, 3),
    "batch": st.integers(1, 3),
    "affine": st.sampled_from(AFFINES),
    "activation": st.sampled_from(ACTIVATIONS),
    "layout": st.sampled_from(LAYOUTS),
    "mean": st.booleans(),
}
# Layers of EfficientNet-B0, at half the resolution where that is large.
LAYERS = [
    Case(batch=n, channels=c, size=(s, s), kernel=k, stride=d, padding="symmetric", dilation=1)
    for n, c, s, k, d in (
        (1, 32, 56, 3, 1),
        (1, 96, 56, 3, 2),
        (2, 144, 28, 5, 2),
        (1, 240, 28, 3, 2),
        (1, 672, 14, 5, 1),
        (3, 1152, 7, 5, 1),
    )
]


def arguments(case: Case, dtype: torch.dtype, repetition: int = 0) -> Arguments:
    draw = case.draw(repetition, dtype)
    input = draw.activations(case.batch, case.channels, case.size, getattr(case, "layout", "nchw"))
    weight = draw.weight(case.channels, 1, *both(case.kernel))
    return (input, weight), {
        **draw.affine(case.channels, getattr(case, "affine", "scale32+bias32")),
        "stride": case.stride,
        "padding": case.padding,
        "dilation": case.dilation,
        "activation": getattr(case, "activation", "silu"),
        "return_mean": getattr(case, "mean", True),
    }


@pytest.mark.parametrize("case", pairwise(AXES, has_output), ids=str)
def test_matches_reference(kernels, dtype, case):
    assert_parity(kernels, ops.depthwise_conv, partial(arguments, case, dtype))


@pytest.mark.parametrize("case", pairwise(OBLONG_AXES, has_output)[::4], ids=str)
def test_oblong_geometry(kernels, dtype, case):
    assert_parity(kernels, ops.depthwise_conv, partial(arguments, case, dtype))


@pytest.mark.parametrize("case", LAYERS, ids=str)
def test_real_layers(kernels, dtype, case):
    assert_parity(kernels, ops.depthwise_conv, partial(arguments, case, dtype))


@random_cases
@given(case=cases_of(RANDOM).filter(has_output))
def test_random_shapes(kernels, dtype, case):
    assert_parity(kernels, ops.depthwise_conv, partial(arguments, case, dtype))


@pytest.mark.parametrize("case", LAYERS, ids=str)
def test_threads_agree(native_kernels, dtype, case):
    assert_threads_agree(ops.depthwise_conv, arguments(case, dtype))


@pytest.mark.parametrize("channels", [1, 17, 64])
@pytest.mark.parametrize("kernel,stride", [(3, 1), (3, 2), (5, 1), (5, 2), (7, 1), (9, 2)])
def test_memory(native_kernels, dtype, monkeypatch, channels, kernel, stride):
    case = Case(
        batch=2,
        channels=channels,
        size=(9, 13),
        kernel=kernel,
        stride=stride,
        padding="same",
        dilation=1,
        layout="channels_last",
    )
    assert_memory_kept(monkeypatch, ops.depthwise_conv, arguments(case, dtype))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_special_values_stay_where_the_window_sees_them(kernels, value):
    draw = Draw(3)
    input = draw.activations(1, 20, (9, 9))
    input[0, 3, 4, 5] = value
    input[0, 18, 0, 0] = value
    weight = draw.weight(20, 1, 3, 3)
    assert_matches(ops.depthwise_conv, input, weight, backend=kernels)
    assert_matches(ops.depthwise_conv, input, weight, activation="silu", backend=kernels)


# Gradients


def small(*names: str) -> dict[str, torch.Tensor]:
    draw = Draw(0, torch.float64)
    tensors = {
        "input": draw.activations(2, 3, (5, 4)),
        "weight": draw.weight(3, 1, 3, 3),
        **draw.affine(3, "scale+bias"),
    }
    return {name: tensors[name].requires_grad_() for name in names or tensors}


def run(names, **options):
    return lambda *values: ops.depthwise_conv(**dict(zip(names, values, strict=True)), **options)


NAMES = [("input", "weight", "bias"), ("input", "weight", "scale")]


@pytest.mark.parametrize("names", NAMES, ids=" ".join)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients(activation, names):
    function = run(names, activation=activation, return_mean=True)
    assert gradcheck(function, list(small(*names).values()))


@pytest.mark.parametrize("names", NAMES, ids=" ".join)
@pytest.mark.parametrize("activation", ["none", "silu"])
@pytest.mark.parametrize(
    "options",
    [
        {"stride": 2, "padding": "same"},
        {"stride": (1, 2), "padding": (0, 3, 2, 1), "dilation": 2},
    ],
    ids=["same", "explicit"],
)
def test_gradients_of_geometry(activation, names, options):
    function = run(names, activation=activation, **options)
    assert gradcheck(function, list(small(*names).values()))


def test_second_gradients():
    tensors = list(small().values())
    assert gradgradcheck(
        lambda x, w, s, b: ops.depthwise_conv(x, w, b, activation="silu", scale=s), tensors
    )
    assert gradgradcheck(
        lambda x, w, b: ops.depthwise_conv(x, w, b, padding="same", stride=2),
        [tensors[0], tensors[1], tensors[3]],
    )


GRADIENT_AXES = {
    **{name: AXES[name] for name in ("size", "kernel", "stride", "padding", "dilation", "layout")},
    "channels": (1, 5, 16, 33, 48),
    "batch": (2, 1, 3, 0),
    # (A float32 bias gets the exact sum of the gradients that came, which are themselves rounded:
    # PyTorch's, rounded once more, may by chance be nearer to what they were rounded from.)
    "affine": ("none", "bias"),
    "activation": ("none",),
    "mean": (False,),
}


def gradient_arguments(case: Case, dtype: torch.dtype, repetition: int = 0) -> Arguments:
    (input, weight), options = arguments(case, dtype, repetition)
    bias = options.pop("bias", None)
    return ({"input": input, "weight": weight, "bias": bias}, options), {}


@pytest.mark.parametrize("case", pairwise(GRADIENT_AXES, has_output), ids=str)
def test_gradients_match_reference(kernels, dtype, case):
    run = gradient_function(ops.depthwise_conv)
    assert_parity(kernels, run, partial(gradient_arguments, case, dtype), channels_last=False)


@pytest.mark.parametrize("case", pairwise({**GRADIENT_AXES, **OBLONG}, has_output)[::4], ids=str)
def test_gradients_of_oblong_geometry(kernels, dtype, case):
    run = gradient_function(ops.depthwise_conv)
    assert_parity(kernels, run, partial(gradient_arguments, case, dtype), channels_last=False)


@pytest.mark.parametrize("options", [{"activation": "silu"}, {"return_mean": True}])
def test_gradients_of_what_has_no_kernels(kernels, options):
    draw = Draw(1)
    tensors = {
        "input": draw.activations(2, 24, (9, 11)),
        "weight": draw.weight(24, 1, 5, 5),
        **draw.affine(24, "scale+bias"),
    }
    assert_matches(gradient_function(ops.depthwise_conv), tensors, options, backend=kernels)


@pytest.mark.parametrize("stride", [1, 2])
def test_gradients_do_not_depend_on_threads(native_kernels, dtype, stride):
    case = Case(batch=3, channels=40, size=(15, 17), kernel=5, stride=stride, padding="same")
    case = Case(**vars(case), dilation=1, affine="none", activation="none", mean=False)
    call = gradient_arguments(case, dtype)
    assert_threads_agree(gradient_function(ops.depthwise_conv), call)


@pytest.mark.parametrize("channels", [1, 16, 17, 33])
@pytest.mark.parametrize("stride", [1, 2])
def test_gradients_keep_memory(native_kernels, dtype, monkeypatch, channels, stride):
    draw = Draw(2, dtype)
    tensors = (draw.activations(2, channels, (6, 7)), draw.weight(channels, 1, 3, 3))

    def function(input: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
        run = gradient_function(ops.depthwise_conv)
        return run({"input": input, "weight": weight}, {"stride": stride})

    assert_memory_kept(monkeypatch, function, (tensors, {}))


class ConvolutionMasks(TorchDispatchMode):
    """Which gradients every call of convolution_backward was asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.masks: list[list[bool]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.convolution_backward.default:
            self.masks.append(list(args[-1]))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (0, 1), (1, 2)])
def test_only_needed_gradients_are_computed(needed):
    draw = Draw(0)
    tensors = [draw.activations(1, 4, (5, 5)), draw.weight(4, 1, 3, 3), draw.weight(4)]
    for index in needed:
        tensors[index].requires_grad_()
    with ek.use_backend("reference"):
        output = ops.depthwise_conv(*tensors)
    with ConvolutionMasks() as seen:
        output.sum().backward()
    assert seen.masks == [[index in needed for index in range(3)]]
    assert [tensor.grad is not None for tensor in tensors] == seen.masks[0]


# The dispatcher's rules

X, W = torch.randn(2, 3, 6, 5), torch.randn(3, 1, 3, 3)
V = torch.rand(3) + 0.5


@pytest.mark.parametrize(
    "arguments",
    [
        (X, W, None, None, [1, 1], [1, 1, 1, 1], [1, 1], "none", False),
        (X, W, V, V, [2, 1], [0, 1, 2, 3], [1, 2], "silu", True),
        (
            X.to(memory_format=torch.channels_last).requires_grad_(),
            W.clone().requires_grad_(),
            None,
            V.clone().requires_grad_(),
            [1, 1],
            [1, 1, 1, 1],
            [1, 1],
            "relu6",
            True,
        ),
    ],
    ids=["plain", "all", "gradients"],
)
def test_opcheck(arguments):
    torch.library.opcheck(torch.ops.effkernels.depthwise_conv.default, arguments)


# Bad input

BAD = {
    "input is an array": ({"input": [1.0]}, TypeError, "input is list, a torch.Tensor"),
    "input is integer": ({"input": X.long()}, TypeError, "input has dtype torch.int64, a floating"),
    "input has 3 dimensions": ({"input": X[0]}, ValueError, r"input has 3 dimensions .* 4 are"),
    "weight is none": ({"weight": None}, TypeError, "weight is NoneType, a torch.Tensor"),
    "weight has 2 dimensions": ({"weight": W[:, 0, 0]}, ValueError, "weight has 2 dimensions"),
    "weight has other channels": (
        {"weight": torch.randn(5, 1, 3, 3)},
        ValueError,
        "weight has 5 channels, input has 3",
    ),
    "weight is dense": (
        {"weight": torch.randn(3, 3, 3, 3)},
        ValueError,
        r"weight has shape \(3, 3, 3, 3\), \(3, 1, 3, 3\) is accepted",
    ),
    "weight has another dtype": (
        {"weight": W.bfloat16()},
        TypeError,
        "weight has dtype torch.bfloat16, input has torch.float32",
    ),
    "weight is elsewhere": (
        {"weight": W.to("meta")},
        ValueError,
        "weight is on meta, input is on cpu",
    ),
    "even kernel": (
        {"weight": torch.randn(3, 1, 4, 3)},
        ValueError,
        "weight has a 4×3 kernel, odd sizes",
    ),
    "empty kernel": (
        {"weight": torch.randn(3, 1, 0, 3)},
        ValueError,
        r"weight has an empty dimension \(3, 1, 0, 3\)",
    ),
    "bias has another size": (
        {"bias": torch.randn(4)},
        ValueError,
        r"bias has shape \(4,\), \(3,\) is accepted",
    ),
    "bias has 2 dimensions": ({"bias": torch.randn(3, 1)}, ValueError, r"bias has shape \(3, 1\)"),
    "bias has another dtype": (
        {"bias": V.double()},
        TypeError,
        "bias has dtype torch.float64, torch.float32",
    ),
    "bias is elsewhere": ({"bias": V.to("meta")}, ValueError, "bias is on meta, input is on cpu"),
    "bias is a number": ({"bias": 1.0}, TypeError, "bias is float, a torch.Tensor"),
    "scale has another size": ({"scale": torch.randn(1)}, ValueError, r"scale has shape \(1,\)"),
    "scale is integer": ({"scale": V.int()}, TypeError, "scale has dtype torch.int32, a floating"),
    "stride 0": ({"stride": 0}, ValueError, "stride is 0, a positive integer or a pair"),
    "stride -1": ({"stride": (1, -1)}, ValueError, r"stride is \(1, -1\), a positive integer"),
    "stride has 3 numbers": ({"stride": (1, 1, 1)}, ValueError, r"stride is \(1, 1, 1\)"),
    "stride is a fraction": ({"stride": 1.5}, ValueError, "stride is 1.5, a positive integer"),
    "stride is none": ({"stride": None}, ValueError, "stride is None, a positive integer"),
    "dilation 0": ({"dilation": 0}, ValueError, "dilation is 0, a positive integer or a pair"),
    "padding is unknown": (
        {"padding": "full"},
        ValueError,
        "padding is 'full'; accepted are 'symmetric', 'same', a non-negative integer",
    ),
    "padding is negative": ({"padding": -1}, ValueError, "padding is -1; accepted are"),
    "padding is none": ({"padding": None}, ValueError, "padding is None; accepted are"),
    "padding has 3 numbers": ({"padding": (1, 1, 1)}, ValueError, r"padding is \(1, 1, 1\); acc"),
    "padding is a fraction": ({"padding": (0.5, 1)}, ValueError, r"padding is \(0.5, 1\); accept"),
    "padding leaves nothing": (
        {"weight": torch.randn(3, 1, 7, 7), "padding": 0},
        ValueError,
        "padding 0 leaves no output for a 6×5 input and a 7×7 kernel",
    ),
    "activation is unknown": (
        {"activation": "gelu"},
        ValueError,
        "activation is 'gelu', unknown activation; accepted are 'none', 'relu', 'relu6', 'silu'",
    ),
    "activation is none": ({"activation": None}, ValueError, "activation is None, unknown"),
}


@pytest.mark.parametrize("change,error,message", BAD.values(), ids=BAD)
def test_bad_input(change, error, message):
    with pytest.raises(error, match=f"^depthwise_conv: {message}"):
        ops.depthwise_conv(**{"input": X, "weight": W, **change})
