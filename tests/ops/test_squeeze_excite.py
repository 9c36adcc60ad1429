from __future__ import annotations

from collections.abc import Callable
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

# Which biases are given; "32": in float32 whatever the input's dtype.
BIASES = ("none", "reduce", "expand", "reduce+expand", "reduce32+expand32")
GATE_AXES = {
    "channels": (*CHANNELS, 240),
    "reduced": (1, 2, 4, 7, 8, 9, 15, 16, 17),
    "batch": (1, 2, 0, 3),
    "biases": BIASES,
    "activation": ACTIVATIONS,
    "gate_activation": ACTIVATIONS,
}
AXES = {
    **GATE_AXES,
    "size": ((1, 1), (1, 2), (3, 1), (2, 5), (7, 7), (4, 15), (14, 17)),
    "layout": LAYOUTS,
}
RANDOM = {
    **{name: st.sampled_from(values) for name, values in AXES.items()},
    "channels": st.integers(1, 100),
    "reduced": st.integers(1, 40),
    "batch": st.integers(1, 4),
    "size": st.tuples(st.integers(1, 16), st.integers(1, 16)),
}
# Layers of EfficientNet-B0, (batch, channels, reduced, side).
LAYERS = [
    Case(batch=n, channels=c, reduced=r, size=(s, s), biases="reduce+expand")
    for n, c, r, s in ((1, 32, 8, 112), (3, 96, 4, 56), (1, 240, 10, 28), (2, 1152, 48, 7))
]


def weights(case: Case, draw: Draw, repetition: int = 0) -> dict[str, torch.Tensor | None]:
    """As the modules have them, or as matrices."""
    shape = (1, 1) if repetition % 2 == 0 else ()
    biases = case.biases
    values: dict[str, torch.Tensor | None] = {
        "reduce_weight": draw.weight(case.reduced, case.channels, *shape),
        "reduce_bias": draw.normal(case.reduced, std=0.3) if "reduce" in biases else None,
        "expand_weight": draw.weight(case.channels, case.reduced, *shape),
        "expand_bias": draw.normal(case.channels, std=0.3) if "expand" in biases else None,
    }
    if "32" in biases:
        for name in ("reduce_bias", "expand_bias"):
            values[name] = values[name].float()
    return values


def options(case: Case) -> dict[str, str]:
    return {
        "activation": getattr(case, "activation", "silu"),
        "gate_activation": getattr(case, "gate_activation", "sigmoid"),
    }


def arguments(case: Case, dtype: torch.dtype, repetition: int = 0) -> Arguments:
    draw = case.draw(repetition, dtype)
    input = draw.activations(case.batch, case.channels, case.size, getattr(case, "layout", "nchw"))
    return (input,), {**weights(case, draw, repetition), **options(case)}


def gate_arguments(case: Case, dtype: torch.dtype, repetition: int = 0) -> Arguments:
    draw = case.draw(repetition, dtype)
    mean = draw.normal(case.batch, case.channels, std=0.4, mean=0.3)
    if repetition % 2 == 1:  # not contiguous
        mean = mean.t().contiguous().t()
    return (mean,), {**weights(case, draw, repetition), **options(case)}


@pytest.mark.parametrize("case", pairwise(AXES), ids=str)
def test_matches_reference(kernels, dtype, case):
    assert_parity(kernels, ops.squeeze_excite, partial(arguments, case, dtype))


@pytest.mark.parametrize("case", pairwise(GATE_AXES), ids=str)
def test_gate_matches_reference(kernels, dtype, case):
    assert_parity(kernels, ops.squeeze_excite_gate, partial(gate_arguments, case, dtype))


@pytest.mark.parametrize("case", LAYERS, ids=str)
def test_real_layers(kernels, dtype, case):
    assert_parity(kernels, ops.squeeze_excite, partial(arguments, case, dtype))
    assert_parity(kernels, ops.squeeze_excite_gate, partial(gate_arguments, case, dtype))


@random_cases
@given(case=cases_of(RANDOM))
def test_random_shapes(kernels, dtype, case):
    assert_parity(kernels, ops.squeeze_excite, partial(arguments, case, dtype))
    assert_parity(kernels, ops.squeeze_excite_gate, partial(gate_arguments, case, dtype))


@pytest.mark.parametrize("case", LAYERS, ids=str)
def test_threads_agree(native_kernels, dtype, case):
    assert_threads_agree(ops.squeeze_excite, arguments(case, dtype))
    assert_threads_agree(ops.squeeze_excite_gate, gate_arguments(case, dtype))


@pytest.mark.parametrize("channels,reduced", [(1, 1), (16, 4), (17, 3), (49, 17)])
def test_memory(native_kernels, dtype, monkeypatch, channels, reduced):
    case = Case(
        batch=2,
        channels=channels,
        reduced=reduced,
        size=(3, 5),
        biases="reduce+expand",
        layout="channels_last",
    )
    assert_memory_kept(monkeypatch, ops.squeeze_excite, arguments(case, dtype))
    assert_memory_kept(monkeypatch, ops.squeeze_excite_gate, gate_arguments(case, dtype))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_special_values_stay_in_their_image(kernels, value):
    case = Case(batch=3, channels=20, reduced=5, size=(4, 5), biases="reduce+expand")
    (input,), named = arguments(case, torch.float32)
    input[1, 7, 2, 2] = value
    assert_matches(ops.squeeze_excite, input, **named, backend=kernels)
    assert_matches(ops.squeeze_excite_gate, input.mean((2, 3)), **named, backend=kernels)


# Gradients


def small(*names: str) -> dict[str, torch.Tensor]:
    draw = Draw(0, torch.float64)
    tensors = {
        "input": draw.activations(2, 4, (2, 3)),
        "mean": draw.normal(2, 4),
        **weights(Case(channels=4, reduced=3, biases="reduce+expand"), draw),
    }
    return {name: tensors[name].requires_grad_() for name in names}


WEIGHTS = ("reduce_weight", "reduce_bias", "expand_weight", "expand_bias")
NAMED_OPS = {
    "whole": (ops.squeeze_excite, ("input", *WEIGHTS)),
    "gate": (ops.squeeze_excite_gate, ("mean", *WEIGHTS)),
}


@pytest.mark.parametrize("which", NAMED_OPS)
@pytest.mark.parametrize(
    "activation,gate_activation",
    [
        ("silu", "sigmoid"),
        ("relu", "hard_swish"),
        ("sigmoid", "relu6"),
        ("hard_swish", "none"),
        ("relu", "hard_sigmoid"),
    ],
)
def test_gradients(which, activation, gate_activation):
    op, names = NAMED_OPS[which]

    def run(*values):
        return op(*values, activation=activation, gate_activation=gate_activation)

    assert gradcheck(run, list(small(*names).values()))


@pytest.mark.parametrize("which", NAMED_OPS)
def test_second_gradients(which):
    op, names = NAMED_OPS[which]
    assert gradgradcheck(op, list(small(*names).values()))


def test_gradients_without_biases():
    tensors = small("input", "reduce_weight", "expand_weight")
    assert gradcheck(
        lambda x, r, e: ops.squeeze_excite(x, r, None, e, None), list(tensors.values())
    )


def with_gradients(op, inputs: Callable[..., Arguments]) -> Callable[..., Arguments]:
    """``inputs`` with all tensors in one dictionary, as ``gradient_function`` takes them."""

    def changed(case: Case, dtype: torch.dtype, repetition: int = 0) -> Arguments:
        (first,), named = inputs(case, dtype, repetition)
        tensors = {NAMED_OPS[op][1][0]: first, **{name: named.pop(name) for name in WEIGHTS}}
        none = [name for name, value in tensors.items() if value is None]
        named |= {name: tensors.pop(name) for name in none}
        return (tensors, named), {}

    return changed


GRADIENTS = {
    "whole": with_gradients("whole", arguments),
    "gate": with_gradients("gate", gate_arguments),
}


GRADIENT_AXES = {
    "channels": (1, 5, 16, 33, 64, 80, 129),
    "reduced": (2, 4, 8, 17, 33),
    "batch": (3, 2, 0),
    "biases": BIASES,
    "activation": ACTIVATIONS,
    "gate_activation": ACTIVATIONS,
    "size": ((7, 7), (3, 5), (9, 13)),
    "layout": LAYOUTS,
}


@pytest.mark.parametrize("which", NAMED_OPS)
@pytest.mark.parametrize("case", pairwise(GRADIENT_AXES), ids=str)
def test_gradients_match_reference(kernels, dtype, case, which):
    assert_parity(
        kernels,
        gradient_function(NAMED_OPS[which][0]),
        partial(GRADIENTS[which], case, dtype),
        channels_last=False,
    )


@pytest.mark.parametrize("which", NAMED_OPS)
@pytest.mark.parametrize("case", LAYERS, ids=str)
def test_gradients_of_real_layers(kernels, dtype, case, which):
    assert_parity(
        kernels,
        gradient_function(NAMED_OPS[which][0]),
        partial(GRADIENTS[which], case, dtype),
        channels_last=False,
    )


@pytest.mark.parametrize("which", NAMED_OPS)
@pytest.mark.parametrize("reduced", [1, 9])
def test_gradients_of_many_images(kernels, dtype, which, reduced):
    """More than one chain of a sum over images."""
    case = Case(batch=150, channels=40, reduced=reduced, size=(2, 3), biases="reduce+expand")
    assert_parity(
        kernels,
        gradient_function(NAMED_OPS[which][0]),
        partial(GRADIENTS[which], case, dtype),
        channels_last=False,
    )


@pytest.mark.parametrize("which", NAMED_OPS)
@pytest.mark.parametrize("case", LAYERS, ids=str)
def test_threads_agree_on_gradients(native_kernels, dtype, case, which):
    assert_threads_agree(gradient_function(NAMED_OPS[which][0]), GRADIENTS[which](case, dtype))


@pytest.mark.parametrize("which", NAMED_OPS)
@pytest.mark.parametrize("channels,reduced", [(1, 1), (16, 4), (17, 3), (49, 17), (65, 33)])
def test_gradients_keep_memory(native_kernels, dtype, monkeypatch, channels, reduced, which):
    case = Case(
        batch=2,
        channels=channels,
        reduced=reduced,
        size=(3, 5),
        biases="reduce+expand",
        layout="channels_last",
    )
    run = gradient_function(NAMED_OPS[which][0])
    (tensors, options), _ = GRADIENTS[which](case, dtype)

    def function(*values: torch.Tensor, **named):
        return run(dict(zip(tensors, values, strict=True)), named)

    assert_memory_kept(monkeypatch, function, (tuple(tensors.values()), options))


@pytest.mark.parametrize("which", NAMED_OPS)
@pytest.mark.parametrize("index", range(5))
def test_only_needed_gradients_are_computed(which, index):
    op, names = NAMED_OPS[which]
    tensors = list(small(*names).values())
    everything = torch.autograd.grad(op(*tensors).sum(), tensors)
    alone = [value.detach().requires_grad_(i == index) for i, value in enumerate(tensors)]
    op(*alone).sum().backward()
    for i, (tensor, due) in enumerate(zip(alone, everything, strict=True)):
        if i == index:
            torch.testing.assert_close(tensor.grad, due)
        else:
            assert tensor.grad is None


# The dispatcher's rules

X, M = torch.randn(2, 4, 3, 5), torch.randn(2, 4)
R, E, RB, EB = torch.randn(3, 4), torch.randn(4, 3), torch.randn(3), torch.randn(4)


@pytest.mark.parametrize("which,first", [("squeeze_excite", X), ("squeeze_excite_gate", M)])
@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("biases", [False, True])
def test_opcheck(which, first, gradients, biases):
    tensors = [first, R, RB if biases else None, E, EB if biases else None]
    if gradients:
        tensors = [value if value is None else value.clone().requires_grad_() for value in tensors]
    op = getattr(torch.ops.effkernels, which).default
    torch.library.opcheck(op, (*tensors, "silu", "sigmoid"))


# Bad input, the same for both ops but for the first argument

BAD = {
    "reduce_weight is none": (
        {"reduce_weight": None},
        TypeError,
        "reduce_weight is NoneType, a torch.Tensor",
    ),
    "reduce_weight has other channels": (
        {"reduce_weight": torch.randn(3, 5)},
        ValueError,
        "reduce_weight has 5 channels, its input has 4",
    ),
    "reduce_weight has 3 dimensions": (
        {"reduce_weight": R[..., None]},
        ValueError,
        r"reduce_weight has 3 dimensions \(3, 4, 1\), 2 or 4 are accepted",
    ),
    "reduce_weight is 3×3": (
        {"reduce_weight": torch.randn(3, 4, 3, 3)},
        ValueError,
        r"reduce_weight has shape \(3, 4, 3, 3\), a 1×1 kernel is accepted",
    ),
    "reduce_weight has another dtype": (
        {"reduce_weight": R.bfloat16()},
        TypeError,
        "reduce_weight has dtype torch.bfloat16, .* has torch.float32",
    ),
    "reduce_weight is elsewhere": (
        {"reduce_weight": R.to("meta")},
        ValueError,
        "reduce_weight is on meta, .* is on cpu",
    ),
    "expand_weight is transposed": (
        {"expand_weight": E.t()},
        ValueError,
        r"expand_weight has shape \(3, 4\), \(4, 3\) is accepted",
    ),
    "expand_weight is integer": (
        {"expand_weight": E.int()},
        TypeError,
        "expand_weight has dtype torch.int32, a floating-point dtype",
    ),
    "expand_weight is elsewhere": (
        {"expand_weight": E.to("meta")},
        ValueError,
        "expand_weight is on meta",
    ),
    "reduce_bias has another size": (
        {"reduce_bias": EB},
        ValueError,
        r"reduce_bias has shape \(4,\), \(3,\) is accepted",
    ),
    "reduce_bias has another dtype": (
        {"reduce_bias": RB.double()},
        TypeError,
        "reduce_bias has dtype torch.float64, torch.float32",
    ),
    "expand_bias has another size": (
        {"expand_bias": RB},
        ValueError,
        r"expand_bias has shape \(3,\), \(4,\) is accepted",
    ),
    "expand_bias is elsewhere": (
        {"expand_bias": EB.to("meta")},
        ValueError,
        "expand_bias is on meta",
    ),
    "activation is unknown": (
        {"activation": "elu"},
        ValueError,
        "activation is 'elu', unknown activation; accepted are",
    ),
    "gate_activation is unknown": (
        {"gate_activation": "tanh"},
        ValueError,
        "gate_activation is 'tanh', unknown activation; accepted are",
    ),
}
BAD_INPUT = {
    "input is none": ({"input": None}, TypeError, "input is NoneType, a torch.Tensor"),
    "input is integer": ({"input": X.short()}, TypeError, "input has dtype torch.int16, a float"),
    "input has 2 dimensions": ({"input": M}, ValueError, r"input has 2 dimensions \(2, 4\), 4 are"),
    "input has no pixels": (
        {"input": X[..., :0]},
        ValueError,
        r"input has an empty dimension \(2, 4, 3, 0\)",
    ),
}
BAD_MEAN = {
    "mean is none": ({"mean": None}, TypeError, "mean is NoneType, a torch.Tensor"),
    "mean is integer": ({"mean": M.long()}, TypeError, "mean has dtype torch.int64, a floating"),
    "mean has 4 dimensions": ({"mean": X}, ValueError, "mean has 4 dimensions .* 2 are accepted"),
}
GOOD = dict(zip(WEIGHTS, (R, RB, E, EB), strict=True))


@pytest.mark.parametrize(
    "change,error,message", [*BAD.values(), *BAD_INPUT.values()], ids=[*BAD, *BAD_INPUT]
)
def test_bad_input(change, error, message):
    with pytest.raises(error, match=f"^squeeze_excite: {message}"):
        ops.squeeze_excite(**{"input": X, **GOOD, **change})


@pytest.mark.parametrize(
    "change,error,message", [*BAD.values(), *BAD_MEAN.values()], ids=[*BAD, *BAD_MEAN]
)
def test_bad_input_of_the_gate(change, error, message):
    with pytest.raises(error, match=f"^squeeze_excite_gate: {message}"):
        ops.squeeze_excite_gate(**{"mean": M, **GOOD, **change})
