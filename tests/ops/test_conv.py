from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

from effkernels import native, ops
from effkernels.ops import ACTIVATIONS
from effkernels.testing import assert_matches

from ._cases import (
    AFFINES,
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
    geometry_size,
    gradient_function,
    has_output,
    pairwise,
    random_cases,
)

SIZES = ((1, 1), (1, 9), (2, 3), (5, 2), (7, 7), (8, 6), (3, 13), (14, 15), (9, 1))
AXES = {
    "outputs": (1, 3, 8, 15, 16, 17, 31, 32, 33, 48, 49),
    "channels": (1, 2, 3, 4, 8, 15, 16, 17, 24, 33),
    "size": SIZES,
    "kernel": (1, 3, 5, 7),
    "stride": (1, 2, 3),
    "padding": PADDINGS,
    "dilation": (1, 2),
    "batch": (1, 2, 0, 3),
    "affine": AFFINES,
    "activation": ACTIVATIONS,
    "layout": LAYOUTS,
    "residual": (None, *LAYOUTS),
}
OBLONG_AXES = {
    **AXES,
    "kernel": ((1, 3), (5, 3), (3, 7), (7, 1)),
    "stride": ((1, 2), (3, 1), (2, 4)),
    "dilation": ((2, 1), (1, 3)),
}
RANDOM = {
    **{name: st.sampled_from(values) for name, values in AXES.items()},
    "outputs": st.integers(1, 50),
    "channels": st.integers(1, 40),
    "size": st.tuples(st.integers(1, 16), st.integers(1, 16)),
    "padding": st.one_of(
        st.sampled_from(("symmetric", "same")), st.tuples(*[st.integers(0, 8)] * 4)
    ),
    "batch": st.integers(1, 3),
}
# The stems of EfficientNet-B0 and ResNet at half the resolution, and layers of both families.
LAYERS = [
    Case(batch=n, channels=c, outputs=k, size=(s, s), kernel=r, stride=d, residual=residual)
    for n, c, k, s, r, d, residual in (
        (1, 3, 32, 112, 3, 2, None),
        (3, 3, 24, 65, 3, 2, None),
        (1, 3, 64, 80, 7, 2, None),
        (1, 24, 24, 28, 3, 1, "channels_last"),
        (2, 48, 192, 14, 3, 2, None),
        (1, 128, 128, 14, 3, 1, "channels_last"),
        (1, 64, 128, 28, 1, 2, None),
        (5, 48, 64, 1, 3, 1, None),
        (5, 48, 64, 2, 3, 2, "channels_last"),
    )
]


def arguments(case: Case, dtype: torch.dtype, repetition: int = 0) -> Arguments:
    draw = case.draw(repetition, dtype)
    options = {
        "stride": case.stride,
        "padding": getattr(case, "padding", "symmetric"),
        "dilation": getattr(case, "dilation", 1),
        "activation": getattr(case, "activation", "silu"),
    }
    input = draw.activations(case.batch, case.channels, case.size, getattr(case, "layout", "nchw"))
    weight = draw.weight(case.outputs, case.channels, *both(case.kernel))
    if case.residual is not None:
        size = geometry_size(Case(size=case.size, kernel=case.kernel, **options))
        options["residual"] = draw.activations(case.batch, case.outputs, size, case.residual)
    affine = draw.affine(case.outputs, getattr(case, "affine", "scale32+bias32"))
    return (input, weight), {**affine, **options}


@pytest.mark.parametrize("case", pairwise(AXES, has_output), ids=str)
def test_matches_reference(kernels, dtype, case):
    assert_parity(kernels, ops.conv, partial(arguments, case, dtype))


@pytest.mark.parametrize("case", pairwise(OBLONG_AXES, has_output)[::4], ids=str)
def test_oblong_geometry(kernels, dtype, case):
    assert_parity(kernels, ops.conv, partial(arguments, case, dtype))


@pytest.mark.parametrize("case", LAYERS, ids=str)
def test_real_layers(kernels, dtype, case):
    assert_parity(kernels, ops.conv, partial(arguments, case, dtype))


@random_cases
@given(case=cases_of(RANDOM).filter(has_output))
def test_random_shapes(kernels, dtype, case):
    assert_parity(kernels, ops.conv, partial(arguments, case, dtype))


@pytest.mark.parametrize("case", LAYERS, ids=str)
def test_threads_agree(native_kernels, dtype, case):
    assert_threads_agree(ops.conv, arguments(case, dtype))


@pytest.mark.parametrize("outputs", [1, 17, 48])
@pytest.mark.parametrize("channels", [1, 3, 16])
@pytest.mark.parametrize("kernel,stride", [(1, 2), (3, 1), (3, 2), (7, 2)])
def test_memory(native_kernels, dtype, monkeypatch, outputs, channels, kernel, stride):
    case = Case(
        outputs=outputs,
        channels=channels,
        batch=2,
        size=(5, 13),
        kernel=kernel,
        stride=stride,
        padding="same",
        layout="channels_last",
        residual="channels_last",
    )
    assert_memory_kept(monkeypatch, ops.conv, arguments(case, dtype))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_special_values_stay_where_the_window_sees_them(kernels, value):
    draw = Draw(3)
    input, weight = draw.activations(1, 5, (9, 8)), draw.weight(18, 5, 3, 3)
    input[0, 3, 4, 5] = value
    for activation in ("none", "silu"):
        assert_matches(ops.conv, input, weight, activation=activation, backend=kernels)


# Gradients


def small(*names: str, size: tuple[int, int] = (5, 4)) -> dict[str, torch.Tensor]:
    draw = Draw(0, torch.float64)
    tensors = {
        "input": draw.activations(2, 2, (5, 4)),
        "weight": draw.weight(3, 2, 3, 3),
        **draw.affine(3, "scale+bias"),
        "residual": draw.activations(2, 3, size),
    }
    return {name: tensors[name].requires_grad_() for name in names or tensors}


def run(names, **options):
    return lambda *values: ops.conv(**dict(zip(names, values, strict=True)), **options)


NAMES = [
    ("input", "weight"),
    ("input", "weight", "bias", "residual"),
    ("input", "weight", "scale", "bias"),
]


@pytest.mark.parametrize("names", NAMES, ids=" ".join)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients(activation, names):
    assert gradcheck(run(names, activation=activation), list(small(*names).values()))


@pytest.mark.parametrize("names", NAMES, ids=" ".join)
@pytest.mark.parametrize("activation", ["none", "silu"])
@pytest.mark.parametrize(
    "options,size",
    [
        ({"stride": 2, "padding": "same"}, (3, 2)),
        ({"stride": (1, 2), "padding": (0, 3, 2, 1), "dilation": 2}, (4, 2)),
    ],
    ids=["same", "explicit"],
)
def test_gradients_of_geometry(activation, names, options, size):
    tensors = list(small(*names, size=size).values())
    assert gradcheck(run(names, activation=activation, **options), tensors)


def test_second_gradients():
    assert gradgradcheck(
        lambda x, w, s, b, r: ops.conv(x, w, b, residual=r, activation="silu", scale=s),
        list(small().values()),
    )
    assert gradgradcheck(
        lambda x, w, b: ops.conv(x, w, b, padding="same", stride=2),
        list(small("input", "weight", "bias").values()),
    )


@pytest.mark.parametrize("options", [{"activation": "silu"}, {"padding": (0, 2, 1, 1)}])
def test_gradients_after_native_forward(kernels, options):
    draw = Draw(1)
    tensors = {
        "input": draw.activations(2, 12, (9, 11)),
        "weight": draw.weight(20, 12, 3, 3),
        **draw.affine(20, "bias"),
        "residual": draw.activations(2, 20, (9, 11)),
    }
    assert_matches(gradient_function(ops.conv), tensors, options, backend=kernels)


@pytest.mark.parametrize("activation", ["none", "silu"])
@pytest.mark.parametrize("name", ["input", "weight", "bias", "residual"])
def test_only_needed_gradients_are_computed(name, activation):
    tensors = small("input", "weight", "bias", "residual")
    everything = torch.autograd.grad(
        ops.conv(**tensors, activation=activation).sum(), list(tensors.values())
    )
    alone = {key: value.detach().requires_grad_(key == name) for key, value in tensors.items()}
    ops.conv(**alone, activation=activation).sum().backward()
    for (key, tensor), due in zip(alone.items(), everything, strict=True):
        if key == name:
            torch.testing.assert_close(tensor.grad, due)
        else:
            assert tensor.grad is None


# The dispatcher's rules

X, W, V = torch.randn(2, 3, 6, 5), torch.randn(4, 3, 3, 3), torch.rand(4) + 0.5
R = torch.randn(2, 4, 6, 5)


@pytest.mark.parametrize(
    "arguments",
    [
        (X, W, None, None, [1, 1], [1, 1, 1, 1], [1, 1], None, "none"),
        (X, W, V, V, [2, 1], [0, 2, 2, 3], [1, 2], torch.randn(2, 4, 5, 3), "silu"),
        (
            X.to(memory_format=torch.channels_last).requires_grad_(),
            W.clone().requires_grad_(),
            None,
            V.clone().requires_grad_(),
            [1, 1],
            [1, 1, 1, 1],
            [1, 1],
            R.clone().requires_grad_(),
            "relu6",
        ),
    ],
    ids=["plain", "all", "gradients"],
)
def test_opcheck(arguments):
    torch.library.opcheck(torch.ops.effkernels.conv.default, arguments)


# Bad input

BAD = {
    "input is none": ({"input": None}, TypeError, "input is NoneType, a torch.Tensor is accepted"),
    "input is integer": ({"input": X.byte()}, TypeError, "input has dtype torch.uint8, a floating"),
    "input has 2 dimensions": ({"input": X[0, 0]}, ValueError, r"input has 2 dimensions \(6, 5\)"),
    "weight is a list": ({"weight": [1.0]}, TypeError, "weight is list, a torch.Tensor"),
    "weight has 5 dimensions": ({"weight": W[None]}, ValueError, "weight has 5 dimensions"),
    "weight has other channels": (
        {"weight": torch.randn(4, 1, 3, 3)},
        ValueError,
        "weight has 1 channels, input has 3",
    ),
    "weight has another dtype": (
        {"weight": W.double()},
        TypeError,
        "weight has dtype torch.float64, input has torch.float32",
    ),
    "weight is elsewhere": ({"weight": W.to("meta")}, ValueError, "weight is on meta, input is"),
    "even kernel": ({"weight": W[:, :, :2, :2]}, ValueError, "weight has a 2×2 kernel, odd sizes"),
    "bias has another size": ({"bias": V[:3]}, ValueError, r"bias has shape \(3,\), \(4,\) is"),
    "bias has another dtype": ({"bias": V.half()}, TypeError, "bias has dtype torch.float16"),
    "bias is elsewhere": ({"bias": V.to("meta")}, ValueError, "bias is on meta, input is on cpu"),
    "scale has 2 dimensions": ({"scale": V[None]}, ValueError, r"scale has shape \(1, 4\)"),
    "stride 0": ({"stride": (0, 1)}, ValueError, r"stride is \(0, 1\), a positive integer"),
    "stride is a word": ({"stride": "2"}, ValueError, "stride is '2', a positive integer"),
    "dilation -2": ({"dilation": -2}, ValueError, "dilation is -2, a positive integer"),
    "padding is unknown": ({"padding": "valid"}, ValueError, "padding is 'valid'; accepted are"),
    "padding is negative": (
        {"padding": (0, 0, -1, 0)},
        ValueError,
        r"padding is \(0, 0, -1, 0\); accepted are",
    ),
    "padding leaves nothing": (
        {"dilation": 4, "padding": (1, 1)},
        ValueError,
        r"padding \(1, 1\) leaves no output for a 6×5 .* 3×3 kernel with dilation \(4, 4\)",
    ),
    "activation is unknown": ({"activation": "tanh"}, ValueError, "activation is 'tanh', unknown"),
    "residual has another size": (
        {"residual": R, "stride": 2},
        ValueError,
        r"residual has shape \(2, 4, 6, 5\), \(2, 4, 3, 3\) is accepted",
    ),
    "residual has other channels": ({"residual": X}, ValueError, r"residual has shape \(2, 3, 6"),
    "residual has 3 dimensions": ({"residual": R[0]}, ValueError, "residual has 3 dimensions"),
    "residual has another dtype": (
        {"residual": R.bfloat16()},
        TypeError,
        "residual has dtype torch.bfloat16, input has torch.float32",
    ),
    "residual is elsewhere": ({"residual": R.to("meta")}, ValueError, "residual is on meta, input"),
}


@pytest.mark.parametrize("change,error,message", BAD.values(), ids=BAD)
def test_bad_input(change, error, message):
    with pytest.raises(error, match=f"^conv: {message}"):
        ops.conv(**{"input": X, "weight": W, **change})


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "padding", "taps"),
    [
        ((1, 1), (3, 3), (1, 1), (1, 1, 1, 1), (1, 1)),
        ((1, 4), (5, 5), (1, 1), (2, 2, 2, 2), (1, 5)),
        ((2, 2), (3, 3), (2, 2), (1, 1, 1, 1), (2, 2)),
        ((2, 2), (3, 3), (2, 2), (0, 1, 0, 1), (2, 2)),
        ((2, 2), (3, 3), (1, 1), (1, 1, 1, 1), (3, 3)),
        ((3, 2), (7, 7), (1, 1), (3, 3, 3, 3), (5, 3)),
    ],
)
def test_taps_that_see_padding_alone_are_left_out(
    native_kernels, size, kernel, stride, padding, taps
):
    weight, input = torch.randn(4, 3, *kernel), torch.randn(1, 3, *size)
    packed = native.pack_conv(input, weight, None, None, stride, padding, (1, 1), "none")
    assert tuple(packed.geometry[:2]) == taps
    before = ops.conv(input, weight, stride=stride, padding=padding)
    weight.mul_(2.0)  # seen, although the kernel has packed a part of it
    assert torch.equal(ops.conv(input, weight, stride=stride, padding=padding), 2.0 * before)
