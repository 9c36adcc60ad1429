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
    Arguments,
    Case,
    Draw,
    assert_memory_kept,
    assert_parity,
    assert_threads_agree,
    cases_of,
    gradient_function,
    pairwise,
    random_cases,
)

# Pixels of an image, around the multiples of 6, 8, 12 and 14 rows that a register tile may have.
ROWS = (1, 2, 5, 6, 7, 8, 11, 12, 13, 14, 15, 23, 25, 27, 29, 43, 56)
AXES = {
    "rows": ROWS,
    "outputs": CHANNELS,
    "channels": (1, 2, 3, 5, 8, 15, 16, 17, 33, 64, 100, 257),
    "batch": (1, 2, 0, 3),
    "affine": AFFINES,
    "activation": ACTIVATIONS,
    "layout": LAYOUTS,
    "gate": (False, True),
    "residual": (None, *LAYOUTS),
    "mean": (False, True),
}
RANDOM = {
    **{name: st.sampled_from(values) for name, values in AXES.items()},
    "rows": st.integers(1, 80),
    "outputs": st.integers(1, 100),
    "channels": st.integers(1, 150),
    "batch": st.integers(1, 3),
}
# Expand, project and head layers of EfficientNet-B0, the largest with fewer pixels.
LAYERS = [
    Case(batch=n, channels=c, outputs=k, size=(s, s), gate=gate, residual=residual)
    for n, c, k, s, gate, residual in (
        (1, 16, 96, 56, False, None),
        (1, 96, 24, 28, True, None),
        (1, 144, 24, 28, True, "channels_last"),
        (2, 33, 9, 5, False, None),  # one channel more than half a panel of weights
        (1, 64, 25, 14, True, "channels_last"),
        (3, 240, 40, 14, True, "channels_last"),
        (1, 80, 480, 14, False, None),
        (1, 1152, 320, 7, True, None),
        (2, 320, 1280, 7, False, None),
    )
]


def image(rows: int) -> tuple[int, int]:
    """Height and width with ``rows`` pixels."""
    height = next((h for h in (7, 6, 5, 4, 3, 2) if rows % h == 0), 1)
    return height, rows // height


def arguments(case: Case, dtype: torch.dtype, repetition: int = 0) -> Arguments:
    draw = case.draw(repetition, dtype)
    size = image(case.rows) if hasattr(case, "rows") else case.size
    input = draw.activations(case.batch, case.channels, size, getattr(case, "layout", "nchw"))
    weight = draw.weight(case.outputs, case.channels, 1, 1)
    if case.residual is None:
        residual = None
    else:
        residual = draw.activations(case.batch, case.outputs, size, case.residual)
    return (input, weight if repetition % 2 == 0 else weight[:, :, 0, 0]), {
        **draw.affine(case.outputs, getattr(case, "affine", "scale32+bias32")),
        "gate": draw.gate(case.batch, case.channels) if case.gate else None,
        "residual": residual,
        "activation": getattr(case, "activation", "silu"),
        "return_mean": getattr(case, "mean", True),
    }


@pytest.mark.parametrize("case", pairwise(AXES), ids=str)
def test_matches_reference(kernels, dtype, case):
    assert_parity(kernels, ops.pointwise_conv, partial(arguments, case, dtype))


@pytest.mark.parametrize("case", LAYERS, ids=str)
def test_real_layers(kernels, dtype, case):
    assert_parity(kernels, ops.pointwise_conv, partial(arguments, case, dtype))


@random_cases
@given(case=cases_of(RANDOM))
def test_random_shapes(kernels, dtype, case):
    assert_parity(kernels, ops.pointwise_conv, partial(arguments, case, dtype))


def test_gate_of_four_dimensions_is_the_same(kernels, dtype):
    draw = Draw(0, dtype)
    input, weight = draw.activations(2, 19, (3, 5)), draw.weight(21, 19)
    gate = draw.gate(2, 19)
    flat = ops.pointwise_conv(input, weight, gate=gate)
    assert torch.equal(flat, ops.pointwise_conv(input, weight, gate=gate[:, :, None, None]))
    assert not torch.equal(flat, ops.pointwise_conv(input, weight))


@pytest.mark.parametrize("case", LAYERS, ids=str)
def test_threads_agree(native_kernels, dtype, case):
    assert_threads_agree(ops.pointwise_conv, arguments(case, dtype))


@pytest.mark.parametrize("outputs", [1, 17, 48])
@pytest.mark.parametrize("channels", [1, 16, 33])
@pytest.mark.parametrize("rows", [1, 13, 29])
def test_memory(native_kernels, dtype, monkeypatch, rows, channels, outputs):
    case = Case(
        rows=rows,
        outputs=outputs,
        channels=channels,
        batch=2,
        layout="channels_last",
        gate=True,
        residual="channels_last",
    )
    assert_memory_kept(monkeypatch, ops.pointwise_conv, arguments(case, dtype))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_special_values_stay_in_their_pixel(kernels, value):
    draw = Draw(3)
    input, weight = draw.activations(2, 20, (5, 7)), draw.weight(33, 20)
    input[1, 19, 2, 3] = value
    for activation in ("none", "silu"):
        assert_matches(ops.pointwise_conv, input, weight, activation=activation, backend=kernels)


# Gradients


def small(*names: str) -> dict[str, torch.Tensor]:
    draw = Draw(0, torch.float64)
    tensors = {
        "input": draw.activations(2, 3, (2, 3)),
        "weight": draw.weight(4, 3, 1, 1),
        **draw.affine(4, "scale+bias"),
        "gate": draw.gate(2, 3),
        "residual": draw.activations(2, 4, (2, 3)),
    }
    return {name: tensors[name].requires_grad_() for name in names or tensors}


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("return_mean", [False, True])
@pytest.mark.parametrize(
    "names",
    [
        ("input", "weight"),
        ("input", "weight", "bias", "residual"),
        ("input", "weight", "scale", "bias", "gate", "residual"),
    ],
    ids=" ".join,
)
def test_gradients(activation, return_mean, names):
    def run(*values):
        return ops.pointwise_conv(
            **dict(zip(names, values, strict=True)), activation=activation, return_mean=return_mean
        )

    assert gradcheck(run, list(small(*names).values()))


def test_second_gradients():
    names = ("input", "weight", "bias", "gate", "residual")

    def run(*values):
        return ops.pointwise_conv(**dict(zip(names, values, strict=True)), activation="silu")

    assert gradgradcheck(run, list(small(*names).values()))
    assert gradgradcheck(ops.pointwise_conv, list(small("input", "weight", "bias").values()))


@pytest.mark.parametrize("plain", [True, False])
def test_gradients_after_native_forward(kernels, plain):
    draw = Draw(1)
    tensors = {
        "input": draw.activations(2, 24, (9, 11)),
        "weight": draw.weight(40, 24, 1, 1),
        "bias": draw.normal(40),
        "residual": draw.activations(2, 40, (9, 11)),
    }
    if not plain:
        tensors["gate"] = draw.gate(2, 24)
    options = {"activation": "none" if plain else "silu", "return_mean": not plain}
    assert_matches(gradient_function(ops.pointwise_conv), tensors, options, backend=kernels)


@pytest.mark.parametrize("name", ["input", "weight", "bias", "gate", "residual"])
def test_only_needed_gradients_are_computed(name):
    tensors = small("input", "weight", "bias", "gate", "residual")
    everything = torch.autograd.grad(
        ops.pointwise_conv(**tensors, activation="silu").sum(), list(tensors.values())
    )
    alone = {key: value.detach().requires_grad_(key == name) for key, value in tensors.items()}
    ops.pointwise_conv(**alone, activation="silu").sum().backward()
    for (key, tensor), due in zip(alone.items(), everything, strict=True):
        if key == name:
            torch.testing.assert_close(tensor.grad, due)
        else:
            assert tensor.grad is None


# The dispatcher's rules

X, W, V = torch.randn(2, 3, 4, 5), torch.randn(6, 3, 1, 1), torch.rand(6) + 0.5
G, R = torch.rand(2, 3), torch.randn(2, 6, 4, 5)


@pytest.mark.parametrize(
    "arguments",
    [
        (X, W, None, None, None, None, "none", False),
        (X, W, V, V, G, R, "silu", True),
        (
            X.to(memory_format=torch.channels_last).requires_grad_(),
            W.clone().requires_grad_(),
            None,
            V.clone().requires_grad_(),
            G.clone().requires_grad_(),
            R.clone().requires_grad_(),
            "hard_swish",
            True,
        ),
    ],
    ids=["plain", "all", "gradients"],
)
def test_opcheck(arguments):
    torch.library.opcheck(torch.ops.effkernels.pointwise_conv.default, arguments)


# Bad input

BAD = {
    "input is a number": ({"input": 3}, TypeError, "input is int, a torch.Tensor"),
    "input is integer": ({"input": X.int()}, TypeError, "input has dtype torch.int32, a floating"),
    "input has 5 dimensions": ({"input": X[None]}, ValueError, r"input has 5 dimensions .* 4 are"),
    "input has no pixels": (
        {"input": X[:, :, :0]},
        ValueError,
        r"input has an empty dimension \(2, 3, 0, 5\)",
    ),
    "weight is none": ({"weight": None}, TypeError, "weight is NoneType, a torch.Tensor"),
    "weight has 3 dimensions": (
        {"weight": W[..., 0]},
        ValueError,
        "weight has 3 dimensions .* 2 or 4 are accepted",
    ),
    "weight has other channels": (
        {"weight": torch.randn(6, 4)},
        ValueError,
        "weight has 4 channels, input has 3",
    ),
    "weight is 3×3": (
        {"weight": torch.randn(6, 3, 3, 3)},
        ValueError,
        r"weight has shape \(6, 3, 3, 3\), \(6, 3, 1, 1\) is accepted",
    ),
    "weight has another dtype": (
        {"weight": W.half()},
        TypeError,
        "weight has dtype torch.float16, input has torch.float32",
    ),
    "weight is elsewhere": ({"weight": W.to("meta")}, ValueError, "weight is on meta, input is"),
    "bias has another size": (
        {"bias": torch.randn(3)},
        ValueError,
        r"bias has shape \(3,\), \(6,\) is accepted",
    ),
    "bias has another dtype": (
        {"bias": V.bfloat16()},
        TypeError,
        "bias has dtype torch.bfloat16, torch.float32",
    ),
    "scale has another size": ({"scale": V[:5]}, ValueError, r"scale has shape \(5,\), \(6,\) is"),
    "scale is elsewhere": ({"scale": V.to("meta")}, ValueError, "scale is on meta, input is on"),
    "gate has another batch": (
        {"gate": G[:1]},
        ValueError,
        r"gate has shape \(1, 3\), \(2, 3\) is accepted",
    ),
    "gate is a map": (
        {"gate": torch.rand(2, 3, 4, 5)},
        ValueError,
        r"gate has shape \(2, 3, 4, 5\), \(2, 3, 1, 1\) is accepted",
    ),
    "gate is a vector": ({"gate": G[0]}, ValueError, "gate has 1 dimensions"),
    "gate has another dtype": (
        {"gate": G.double()},
        TypeError,
        "gate has dtype torch.float64, input has torch.float32",
    ),
    "residual has other channels": (
        {"residual": R[:, :5]},
        ValueError,
        r"residual has shape \(2, 5, 4, 5\), \(2, 6, 4, 5\) is accepted",
    ),
    "residual broadcasts": ({"residual": R[:1]}, ValueError, r"residual has shape \(1, 6, 4, 5\)"),
    "residual has 3 dimensions": ({"residual": R[0]}, ValueError, "residual has 3 dimensions"),
    "residual has another dtype": (
        {"residual": R.half()},
        TypeError,
        "residual has dtype torch.float16",
    ),
    "residual is elsewhere": ({"residual": R.to("meta")}, ValueError, "residual is on meta, input"),
    "activation is unknown": (
        {"activation": "SiLU"},
        ValueError,
        "activation is 'SiLU', unknown activation; accepted are 'none', 'relu', 'relu6', 'silu'",
    ),
}


@pytest.mark.parametrize("change,error,message", BAD.values(), ids=BAD)
def test_bad_input(change, error, message):
    with pytest.raises(error, match=f"^pointwise_conv: {message}"):
        ops.pointwise_conv(**{"input": X, "weight": W, **change})
