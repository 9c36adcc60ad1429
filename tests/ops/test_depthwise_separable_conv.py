from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

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
    geometry_size,
    gradient_function,
    has_output,
    pairwise,
    random_cases,
)

AXES = {
    "channels": CHANNELS,
    "outputs": (1, 3, 8, 15, 16, 17, 24, 32, 33, 49),
    "size": ((1, 1), (1, 9), (2, 3), (5, 2), (7, 7), (3, 13), (14, 15), (9, 29), (16, 1)),
    "kernel": (1, 3, 5, 7, (3, 5)),
    "stride": (1, 2, 3, (2, 1)),
    "padding": PADDINGS,
    "dilation": (1, 2),
    "batch": (1, 2, 0, 3),
    "depthwise_affine": AFFINES,
    "pointwise_affine": AFFINES,
    "depthwise_activation": ACTIVATIONS,
    "activation": ACTIVATIONS,
    "layout": LAYOUTS,
    "residual": (None, *LAYOUTS),
}
RANDOM = {
    **{name: st.sampled_from(values) for name, values in AXES.items()},
    "channels": st.integers(1, 70),
    "outputs": st.integers(1, 50),
    "size": st.tuples(st.integers(1, 20), st.integers(1, 20)),
    "padding": st.one_of(
        st.sampled_from(("symmetric", "same")), st.tuples(*[st.integers(0, 10)] * 4)
    ),
    "batch": st.integers(1, 3),
}
LAYERS = [
    Case(batch=n, channels=c, outputs=k, size=(s, s), kernel=r, stride=d, residual=residual)
    for n, c, k, s, r, d, residual in (
        (1, 32, 16, 56, 3, 1, None),
        (1, 48, 48, 40, 3, 1, "channels_last"),
        (3, 144, 40, 28, 5, 2, None),
        (2, 512, 512, 14, 3, 1, None),
    )
]


def arguments(case: Case, dtype: torch.dtype, repetition: int = 0) -> Arguments:
    draw = case.draw(repetition, dtype)
    options = {
        "stride": case.stride,
        "padding": getattr(case, "padding", "symmetric"),
        "dilation": getattr(case, "dilation", 1),
        "depthwise_activation": getattr(case, "depthwise_activation", "silu"),
        "activation": getattr(case, "activation", "none"),
        "depthwise_bias": None,
    }
    for prefix, channels in (("depthwise", case.channels), ("pointwise", case.outputs)):
        affine = draw.affine(channels, getattr(case, f"{prefix}_affine", "scale32+bias32"))
        options.update({f"{prefix}_{name}": value for name, value in affine.items()})
    shape = (1, 1) if repetition % 2 == 0 else ()
    if case.residual is not None:
        size = geometry_size(Case(size=case.size, kernel=case.kernel, **options))
        options["residual"] = draw.activations(case.batch, case.outputs, size, case.residual)
    return (), {
        "input": draw.activations(
            case.batch, case.channels, case.size, getattr(case, "layout", "nchw")
        ),
        "depthwise_weight": draw.weight(case.channels, 1, *both(case.kernel)),
        "pointwise_weight": draw.weight(case.outputs, case.channels, *shape),
        **options,
    }


@pytest.mark.parametrize("case", pairwise(AXES, has_output), ids=str)
def test_matches_reference(kernels, dtype, case):
    assert_parity(kernels, ops.depthwise_separable_conv, partial(arguments, case, dtype))


@pytest.mark.parametrize("case", LAYERS, ids=str)
def test_real_layers(kernels, dtype, case):
    assert_parity(kernels, ops.depthwise_separable_conv, partial(arguments, case, dtype))


@random_cases
@given(case=cases_of(RANDOM).filter(has_output))
def test_random_shapes(kernels, dtype, case):
    assert_parity(kernels, ops.depthwise_separable_conv, partial(arguments, case, dtype))


def test_is_depthwise_then_pointwise():
    """The reference itself, against the two ops it joins."""
    _, named = arguments(LAYERS[1], torch.float64)
    hidden = ops.depthwise_conv(
        named["input"],
        named["depthwise_weight"],
        named["depthwise_bias"],
        activation="silu",
        scale=named["depthwise_scale"],
    )
    due = ops.pointwise_conv(
        hidden,
        named["pointwise_weight"],
        named["pointwise_bias"],
        residual=named["residual"],
        scale=named["pointwise_scale"],
    )
    torch.testing.assert_close(ops.depthwise_separable_conv(**named), due)


@pytest.mark.parametrize("case", LAYERS, ids=str)
def test_threads_agree(native_kernels, dtype, case):
    assert_threads_agree(ops.depthwise_separable_conv, arguments(case, dtype))


@pytest.mark.parametrize("channels", [1, 16, 33])
@pytest.mark.parametrize("outputs", [1, 17, 48])
@pytest.mark.parametrize("kernel,stride", [(3, 1), (3, 2), (5, 1), (7, 2)])
def test_memory(native_kernels, dtype, monkeypatch, channels, outputs, kernel, stride):
    case = Case(
        channels=channels,
        outputs=outputs,
        batch=2,
        size=(9, 13),
        kernel=kernel,
        stride=stride,
        layout="channels_last",
        residual="channels_last",
    )
    assert_memory_kept(monkeypatch, ops.depthwise_separable_conv, arguments(case, dtype))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_special_values_stay_where_the_window_sees_them(kernels, value):
    case = Case(batch=2, channels=20, outputs=18, size=(9, 8), kernel=3, stride=1, residual=None)
    _, named = arguments(case, torch.float32)
    named["input"][1, 3, 4, 5] = value
    assert_matches(ops.depthwise_separable_conv, **named, backend=kernels)


# Gradients

NAMES = (
    "input",
    "depthwise_weight",
    "depthwise_bias",
    "pointwise_weight",
    "pointwise_bias",
    "residual",
)
SCALES = ("depthwise_scale", "pointwise_scale")


def small(*names: str, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    draw = Draw(0, dtype)
    tensors = {
        "input": draw.activations(2, 3, (4, 3)),
        "depthwise_weight": draw.weight(3, 1, 3, 3),
        "pointwise_weight": draw.weight(4, 3, 1, 1),
        "residual": draw.activations(2, 4, (4, 3)),
    }
    for prefix, channels in (("depthwise", 3), ("pointwise", 4)):
        affine = draw.affine(channels, "scale+bias")
        tensors.update({f"{prefix}_{name}": value for name, value in affine.items()})
    return {name: tensors[name].requires_grad_() for name in names}


def run(names, **options):
    def function(*values):
        named = dict(zip(names, values, strict=True))
        return ops.depthwise_separable_conv(**{"depthwise_bias": None, **named}, **options)

    return function


@pytest.mark.parametrize(
    "depthwise_activation,activation",
    [("silu", "none"), ("relu6", "relu"), ("hard_swish", "sigmoid"), ("none", "silu")],
)
def test_gradients(depthwise_activation, activation):
    names = (*NAMES, *SCALES)
    function = run(names, depthwise_activation=depthwise_activation, activation=activation)
    assert gradcheck(function, list(small(*names).values()))


def test_gradients_of_geometry():
    names = ("input", "depthwise_weight", "pointwise_weight")
    for options in (
        {"stride": 2, "padding": "same"},
        {"padding": (0, 3, 2, 1), "dilation": (2, 1)},
    ):
        assert gradcheck(run(names, activation="silu", **options), list(small(*names).values()))


def test_second_gradients():
    assert gradgradcheck(
        run(NAMES, depthwise_activation="silu", activation="sigmoid"), list(small(*NAMES).values())
    )


def test_gradients_after_native_forward(kernels):
    tensors = small(*NAMES, *SCALES, dtype=torch.float32)
    options = {"depthwise_activation": "silu"}
    function = gradient_function(ops.depthwise_separable_conv)
    assert_matches(function, tensors, options, backend=kernels)


@pytest.mark.parametrize("name", NAMES)
def test_only_needed_gradients_are_computed(name):
    tensors = small(*NAMES)
    function = run(NAMES, activation="silu")
    everything = torch.autograd.grad(function(*tensors.values()).sum(), list(tensors.values()))
    alone = {key: value.detach().requires_grad_(key == name) for key, value in tensors.items()}
    function(*alone.values()).sum().backward()
    for (key, tensor), due in zip(alone.items(), everything, strict=True):
        if key == name:
            torch.testing.assert_close(tensor.grad, due)
        else:
            assert tensor.grad is None


# The dispatcher's rules

X, R = torch.randn(2, 3, 6, 5), torch.randn(2, 4, 6, 5)
D, P = torch.randn(3, 1, 3, 3), torch.randn(4, 3, 1, 1)
DV, PV = torch.rand(3) + 0.5, torch.rand(4) + 0.5
PLAIN = ([1, 1], [1, 1, 1, 1], [1, 1])


@pytest.mark.parametrize(
    "arguments",
    [
        (X, D, None, None, P, None, None, *PLAIN, None, "none", "none"),
        (X, D, DV, DV, P, PV, PV, [2, 2], [0, 1, 1, 2], [1, 1], None, "silu", "relu"),
        (
            X.to(memory_format=torch.channels_last).requires_grad_(),
            D.clone().requires_grad_(),
            DV,
            DV.clone().requires_grad_(),
            P.clone().requires_grad_(),
            None,
            PV.clone().requires_grad_(),
            *PLAIN,
            R.clone().requires_grad_(),
            "relu6",
            "none",
        ),
    ],
    ids=["plain", "all", "gradients"],
)
def test_opcheck(arguments):
    torch.library.opcheck(torch.ops.effkernels.depthwise_separable_conv.default, arguments)


# Bad input

BAD = {
    "input is none": ({"input": None}, TypeError, "input is NoneType, a torch.Tensor is accepted"),
    "input is integer": ({"input": X.int()}, TypeError, "input has dtype torch.int32, a floating"),
    "input has 3 dimensions": ({"input": X[0]}, ValueError, "input has 3 dimensions .* 4 are acc"),
    "depthwise_weight has other channels": (
        {"depthwise_weight": torch.randn(6, 1, 3, 3)},
        ValueError,
        "depthwise_weight has 6 channels, input has 3",
    ),
    "depthwise_weight is dense": (
        {"depthwise_weight": torch.randn(3, 3, 3, 3)},
        ValueError,
        r"depthwise_weight has shape \(3, 3, 3, 3\), \(3, 1, 3, 3\) is accepted",
    ),
    "depthwise_weight has another dtype": (
        {"depthwise_weight": D.half()},
        TypeError,
        "depthwise_weight has dtype torch.float16, input has torch.float32",
    ),
    "even kernel": (
        {"depthwise_weight": torch.randn(3, 1, 3, 6)},
        ValueError,
        "weight has a 3×6 kernel, odd sizes are accepted",
    ),
    "pointwise_weight has 3 dimensions": (
        {"pointwise_weight": P[..., 0]},
        ValueError,
        "pointwise_weight has 3 dimensions .* 2 or 4 are accepted",
    ),
    "pointwise_weight has other channels": (
        {"pointwise_weight": torch.randn(4, 5)},
        ValueError,
        r"pointwise_weight has shape \(4, 5, 1, 1\), \(4, 3, 1, 1\) is accepted",
    ),
    "pointwise_weight is elsewhere": (
        {"pointwise_weight": P.to("meta")},
        ValueError,
        "pointwise_weight is on meta, input is on cpu",
    ),
    "depthwise_bias has another size": (
        {"depthwise_bias": PV},
        ValueError,
        r"depthwise_bias has shape \(4,\), \(3,\) is accepted",
    ),
    "depthwise_scale has another dtype": (
        {"depthwise_scale": DV.double()},
        TypeError,
        "depthwise_scale has dtype torch.float64, torch.float32",
    ),
    "pointwise_bias has another size": (
        {"pointwise_bias": DV},
        ValueError,
        r"pointwise_bias has shape \(3,\), \(4,\) is accepted",
    ),
    "pointwise_scale is a number": (
        {"pointwise_scale": 2},
        TypeError,
        "pointwise_scale is int, a torch.Tensor is accepted",
    ),
    "stride 0": ({"stride": 0}, ValueError, "stride is 0, a positive integer"),
    "dilation 0": ({"dilation": (1, 0)}, ValueError, r"dilation is \(1, 0\), a positive integer"),
    "padding is unknown": ({"padding": "SAME"}, ValueError, "padding is 'SAME'; accepted are"),
    "padding leaves nothing": (
        {"padding": 0, "dilation": 3},
        ValueError,
        "padding 0 leaves no output for a 6×5 input",
    ),
    "residual has another size": (
        {"residual": R[:, :, :3]},
        ValueError,
        r"residual has shape \(2, 4, 3, 5\), \(2, 4, 6, 5\) is accepted",
    ),
    "residual has another dtype": (
        {"residual": R.bfloat16()},
        TypeError,
        "residual has dtype torch.bfloat16, input has torch.float32",
    ),
    "activation is unknown": ({"activation": "mish"}, ValueError, "activation is 'mish', unknown"),
    "depthwise_activation is unknown": (
        {"depthwise_activation": "mish"},
        ValueError,
        "depthwise_activation is 'mish', unknown activation; accepted are",
    ),
}


@pytest.mark.parametrize("change,error,message", BAD.values(), ids=BAD)
def test_bad_input(change, error, message):
    good = {"input": X, "depthwise_weight": D, "depthwise_bias": None, "pointwise_weight": P}
    with pytest.raises(error, match=f"^depthwise_separable_conv: {message}"):
        ops.depthwise_separable_conv(**{**good, **change})
