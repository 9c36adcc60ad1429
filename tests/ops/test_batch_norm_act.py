from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

from effkernels import ops
from effkernels.dispatch import use_backend
from effkernels.ops import ACTIVATIONS
from effkernels.testing import assert_close_to, assert_matches, relative_error

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
    same_bits,
    threads,
)

# Which of weight and bias are given; "32": in float32 whatever the input's dtype, as AMP has it.
AFFINES = ("none", "weight", "bias", "weight+bias", "weight32+bias32")
AXES = {
    "channels": CHANNELS,
    "size": ((1, 2), (1, 1), (3, 5), (7, 7), (4, 17), (14, 19)),
    "batch": (2, 1, 3, 0),
    "affine": AFFINES,
    "statistics32": (False, True),
    "training": (False, True),
    "eps": (1e-5, 1e-3),
    "activation": ACTIVATIONS,
    "layout": LAYOUTS,
    "residual": (None, *LAYOUTS),
}
RANDOM = {
    **{name: st.sampled_from(values) for name, values in AXES.items()},
    "channels": st.integers(1, 100),
    "batch": st.integers(1, 4),
    "size": st.tuples(st.integers(1, 16), st.integers(1, 16)),
}
LAYERS = [
    Case(batch=n, channels=c, size=(s, s), training=training, residual=residual)
    for n, c, s, training, residual in (
        (1, 32, 112, False, None),
        (1, 32, 112, True, None),
        (3, 96, 56, True, None),
        (3, 24, 56, False, "channels_last"),
        (1, 1152, 7, False, None),
        (2, 1152, 7, True, "channels_last"),
    )
]


def has_statistics(case: Case) -> bool:
    """Not so few different values per channel that their variance is nothing but rounding."""
    height, width = case.size
    values = width if case.layout == "expanded" else case.batch * height * width
    return not case.training or case.batch == 0 or values >= 16


def arguments(case: Case, dtype: torch.dtype, repetition: int = 0) -> Arguments:
    draw = case.draw(repetition, dtype)
    channels, affine = case.channels, getattr(case, "affine", "weight32+bias32")
    input = draw.activations(case.batch, channels, case.size, getattr(case, "layout", "nchw"))
    mean, var = draw.normal(channels, std=0.5, mean=0.2), draw.uniform(channels, low=0.3, high=2.0)
    weight, bias = draw.normal(channels, std=0.3, mean=1.0), draw.normal(channels, std=0.3)
    if "32" in affine:
        weight, bias = weight.float(), bias.float()
    if getattr(case, "statistics32", True):
        mean, var = mean.float(), var.float()
    if case.training:
        mean = var = None  # updated in place: tested apart
    residual = None
    if case.residual is not None:
        residual = draw.activations(case.batch, channels, case.size, case.residual)
    return (input,), {
        "weight": weight if "weight" in affine else None,
        "bias": bias if "bias" in affine else None,
        "running_mean": mean,
        "running_var": var,
        "training": case.training,
        "eps": getattr(case, "eps", 1e-5),
        "activation": getattr(case, "activation", "silu"),
        "residual": residual,
    }


@pytest.mark.parametrize("case", pairwise(AXES, has_statistics), ids=str)
def test_matches_reference(kernels, dtype, case):
    assert_parity(kernels, ops.batch_norm_act, partial(arguments, case, dtype))


@pytest.mark.parametrize("case", LAYERS, ids=str)
def test_real_layers(kernels, dtype, case):
    assert_parity(kernels, ops.batch_norm_act, partial(arguments, case, dtype))


@random_cases
@given(case=cases_of(RANDOM).filter(has_statistics))
def test_random_shapes(kernels, dtype, case):
    assert_parity(kernels, ops.batch_norm_act, partial(arguments, case, dtype))


@pytest.mark.parametrize("momentum", [0.1, 0.01, 1.0, 0.0])
@pytest.mark.parametrize("channels", [1, 5, 16, 33])
def test_running_statistics_are_those_of_pytorch(kernels, dtype, channels, momentum):
    draw = Draw(channels, dtype)
    input = draw.activations(3, channels, (7, 9))
    mean, var = torch.full((channels,), 0.5), torch.full((channels,), 2.0)
    exact, stock = (mean.double(), var.double()), (mean.clone(), var.clone())
    with use_backend(kernels):
        ops.batch_norm_act(input, None, None, mean, var, True, momentum=momentum)
    F.batch_norm(input.double(), *exact, training=True, momentum=momentum)
    F.batch_norm(input.float(), *stock, training=True, momentum=momentum)
    assert_close_to(exact[0], mean, stock[0], "running_mean")
    assert_close_to(exact[1], var, stock[1], "running_var")


def test_inference_leaves_the_statistics_alone(kernels):
    draw = Draw(0)
    mean, var = draw.normal(8), draw.uniform(8, low=0.5)
    before = mean.clone(), var.clone()
    with use_backend(kernels):
        ops.batch_norm_act(draw.activations(2, 8, (3, 3)), None, None, mean, var, False)
    assert torch.equal(mean, before[0]) and torch.equal(var, before[1])


def test_variance_of_values_far_from_zero(kernels):
    """The rounding of a mean near 1000 is all that is lost; E[x²] − E[x]² would lose far more."""
    input = Draw(0).activations(2, 20, (16, 16)) + 1000.0
    with use_backend(kernels):
        output = ops.batch_norm_act(input, None, None, None, None, True)
    exact = F.batch_norm(input.double(), None, None, training=True)
    assert relative_error(output, exact) < 4 * 1000 * torch.finfo(torch.float32).eps


def test_no_images_leave_the_statistics_alone(kernels):
    mean, var = torch.zeros(4), torch.ones(4)
    with use_backend(kernels):
        output = ops.batch_norm_act(torch.empty(0, 4, 3, 3), None, None, mean, var, True)
    assert output.shape == (0, 4, 3, 3)
    assert torch.equal(mean, torch.zeros(4)) and torch.equal(var, torch.ones(4))


@pytest.mark.parametrize("training", [False, True])
def test_matches_pytorch(training):
    """The reference itself, in float64."""
    draw = Draw(0, torch.float64)
    input = draw.activations(3, 6, (5, 7))
    weight, bias, mean, var = draw.normal(6), draw.normal(6), draw.normal(6), draw.uniform(6) + 0.1
    theirs = F.silu(
        F.batch_norm(input, mean.clone(), var.clone(), weight, bias, training, 0.1, 1e-3) + input
    )
    ours = ops.batch_norm_act(
        input, weight, bias, mean, var, training, 0.1, 1e-3, "silu", residual=input
    )
    torch.testing.assert_close(ours, theirs)


def test_fold_batch_norm():
    draw = Draw(0, torch.float64)
    input = draw.activations(3, 6, (5, 7))
    weight, bias, mean, var = draw.normal(6), draw.normal(6), draw.normal(6), draw.uniform(6) + 0.1
    scale, shift = ops.fold_batch_norm(weight, bias, mean, var, 1e-3)
    due = F.batch_norm(input, mean, var, weight, bias, False, 0.1, 1e-3)
    torch.testing.assert_close(input * scale[:, None, None] + shift[:, None, None], due)
    folded = ops.fold_batch_norm(None, None, mean.float(), var.bfloat16(), 1e-3)
    assert [value.dtype for value in folded] == [torch.float32] * 2


@pytest.mark.parametrize("case", LAYERS, ids=str)
def test_threads_agree(native_kernels, dtype, case):
    assert_threads_agree(ops.batch_norm_act, arguments(case, dtype))


def test_threads_agree_on_running_statistics(native_kernels):
    input = Draw(0).activations(3, 96, (56, 56))
    results = []
    for count in (1, 2):
        mean, var = torch.zeros(96), torch.ones(96)
        with threads(count), use_backend("native"):
            ops.batch_norm_act(input, None, None, mean, var, True)
        results.append((mean, var))
    assert same_bits(*results)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("channels", [1, 16, 17, 33])
def test_memory(native_kernels, dtype, monkeypatch, channels, training):
    case = Case(
        batch=2,
        channels=channels,
        size=(3, 5),
        training=training,
        layout="channels_last",
        residual="channels_last",
    )
    assert_memory_kept(monkeypatch, ops.batch_norm_act, arguments(case, dtype))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_special_values(kernels, value, training):
    case = Case(batch=2, channels=20, size=(4, 5), training=training, residual=None)
    (input,), options = arguments(case, torch.float32)
    input[1, 7, 2, 2] = value
    assert_matches(ops.batch_norm_act, input, **options, backend=kernels)


# Gradients


def small(*names: str) -> dict[str, torch.Tensor]:
    draw = Draw(0, torch.float64)
    tensors = {
        "input": draw.activations(2, 3, (2, 3)),
        "weight": draw.normal(3, mean=1.0, std=0.3),
        "bias": draw.normal(3),
        "residual": draw.activations(2, 3, (2, 3)),
    }
    return {name: tensors[name].requires_grad_() for name in names}


def run(names, training, **options):
    """The op as a function of the tensors that are named, in this order."""
    statistics = {
        "running_mean": None if training else torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64),
        "running_var": None if training else torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64),
    }

    def function(*values):
        given = dict.fromkeys(("weight", "bias")) | dict(zip(names, values, strict=True))
        return ops.batch_norm_act(**given, **statistics, training=training, **options)

    return function


@pytest.mark.parametrize("names", [("input",), ("input", "weight", "bias", "residual")], ids=len)
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients(activation, training, names):
    assert gradcheck(run(names, training, activation=activation), list(small(*names).values()))


@pytest.mark.parametrize("training", [False, True])
def test_second_gradients(training):
    names = ("input", "weight", "bias", "residual")
    assert gradgradcheck(run(names, training, activation="silu"), list(small(*names).values()))


GRADIENT_AXES = {
    "channels": (1, 5, 16, 33, 64, 80, 129),
    "size": ((7, 7), (3, 5), (9, 13)),
    "batch": (3, 2),
    "affine": AFFINES,
    "training": (False, True),
    "activation": ACTIVATIONS,
    "layout": LAYOUTS,
    "residual": (None, "channels_last", "nchw"),
}


def gradient_arguments(case: Case, dtype: torch.dtype, repetition: int = 0) -> Arguments:
    """Tensors that get a gradient, and options; the running statistics get one in inference."""
    (input,), options = arguments(case, dtype, repetition)
    names = ("weight", "bias", "residual", "running_mean", "running_var")
    tensors = {"input": input, **{name: options.pop(name) for name in names}}
    none = [name for name, tensor in tensors.items() if tensor is None]
    options |= {name: tensors.pop(name) for name in none}
    return (tensors, options), {}


@pytest.mark.parametrize("case", pairwise(GRADIENT_AXES, has_statistics), ids=str)
def test_gradients_match_reference(kernels, dtype, case):
    assert_parity(
        kernels,
        gradient_function(ops.batch_norm_act),
        lambda repetition: gradient_arguments(case, dtype, repetition),
        channels_last=False,
    )


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("channels", [1, 16, 17, 33, 96])
def test_gradients_keep_memory(native_kernels, dtype, monkeypatch, channels, training):
    case = Case(batch=2, channels=channels, size=(3, 5), training=training, residual="nchw")
    run = gradient_function(ops.batch_norm_act)

    def function(*tensors: torch.Tensor, **options):
        return run(dict(zip(names, tensors, strict=True)), options)

    (tensors, options), _ = gradient_arguments(case, dtype)
    names = tuple(tensors)
    assert_memory_kept(monkeypatch, function, (tuple(tensors.values()), options))


@pytest.mark.parametrize("training", [False, True])
def test_threads_agree_on_gradients(native_kernels, dtype, training):
    case = Case(batch=3, channels=96, size=(28, 28), training=training, residual="nchw")
    arguments = gradient_arguments(case, dtype)
    assert_threads_agree(gradient_function(ops.batch_norm_act), arguments)


def test_gradients_of_the_statistics(kernels):
    """The dispatcher's op gives the batch's mean and variance, too, which have gradients."""
    draw = Draw(3)

    def function(input: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.ops.effkernels.batch_norm_act(
            input, None, None, None, None, None, True, 1e-5, "silu"
        )

    tensors = {"input": draw.activations(2, 24, (9, 11))}
    assert_matches(gradient_function(function), tensors, {}, backend=kernels)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", ["input", "weight", "bias", "residual"])
def test_only_needed_gradients_are_computed(name, training):
    tensors = small("input", "weight", "bias", "residual")
    function = run(tuple(tensors), training, activation="silu")
    everything = torch.autograd.grad(function(*tensors.values()).sum(), list(tensors.values()))
    alone = {key: value.detach().requires_grad_(key == name) for key, value in tensors.items()}
    function(*alone.values()).sum().backward()
    for (key, tensor), due in zip(alone.items(), everything, strict=True):
        if key == name:
            torch.testing.assert_close(tensor.grad, due)
        else:
            assert tensor.grad is None


@pytest.mark.parametrize("training", [False, True])
def test_gradients_of_bfloat16_with_float32_parameters(kernels, training):
    """As in mixed precision: every gradient has its parameter's dtype."""
    draw = Draw(2, torch.bfloat16)
    input = draw.activations(2, 6, (5, 5)).requires_grad_()
    weight, bias = torch.ones(6).requires_grad_(), torch.zeros(6).requires_grad_()
    residual = draw.activations(2, 6, (5, 5)).requires_grad_()
    with use_backend(kernels):
        output = ops.batch_norm_act(
            input,
            weight,
            bias,
            torch.zeros(6),
            torch.ones(6),
            training,
            activation="silu",
            residual=residual,
        )
        output.float().sum().backward()
    leaves = (input, weight, bias, residual)
    assert [leaf.grad.dtype for leaf in leaves] == [leaf.dtype for leaf in leaves]


# The dispatcher's rules

X, V = torch.randn(2, 3, 4, 5), torch.rand(3) + 0.5


@pytest.mark.parametrize(
    "arguments",
    [
        (X, None, None, V, V, None, False, 1e-5, "none"),
        (X, V, V, None, None, X.clone(), True, 1e-3, "silu"),
        (X.bfloat16(), V, V, None, None, None, True, 1e-3, "relu"),
        (
            X.to(memory_format=torch.channels_last).requires_grad_(),
            V.clone().requires_grad_(),
            V.clone().requires_grad_(),
            V,
            V,
            X.clone().requires_grad_(),
            False,
            1e-5,
            "relu6",
        ),
        (
            X.clone().requires_grad_(),
            V.clone().requires_grad_(),
            V.clone().requires_grad_(),
            None,
            None,
            None,
            True,
            1e-5,
            "silu",
        ),
    ],
    ids=["inference", "training", "bfloat16", "inference gradients", "training gradients"],
)
def test_opcheck(arguments):
    torch.library.opcheck(torch.ops.effkernels.batch_norm_act.default, arguments)


# Bad input

BAD = {
    "input is a list": ({"input": [X]}, TypeError, "input is list, a torch.Tensor is accepted"),
    "input is integer": ({"input": X.int()}, TypeError, "input has dtype torch.int32, a floating"),
    "input has 3 dimensions": ({"input": X[0]}, ValueError, "input has 3 dimensions .* 4 are"),
    "input has one value per channel": (
        {"input": X[:1, :, :1, :1], "training": True},
        ValueError,
        r"input has one value per channel \(1, 3, 1, 1\), training needs more than 1",
    ),
    "weight has another size": ({"weight": V[:2]}, ValueError, r"weight has shape \(2,\), \(3,\)"),
    "weight has another dtype": (
        {"weight": V.half()},
        TypeError,
        "weight has dtype torch.float16, torch.float32",
    ),
    "weight is elsewhere": ({"weight": V.to("meta")}, ValueError, "weight is on meta, input is on"),
    "bias has 2 dimensions": ({"bias": V[None]}, ValueError, r"bias has shape \(1, 3\), \(3,\) is"),
    "bias is a number": ({"bias": 0.5}, TypeError, "bias is float, a torch.Tensor"),
    "running_mean has another size": (
        {"running_mean": torch.zeros(5)},
        ValueError,
        r"running_mean has shape \(5,\), \(3,\) is accepted",
    ),
    "running_var is integer": (
        {"running_var": V.int()},
        TypeError,
        "running_var has dtype torch.int32, a floating-point dtype",
    ),
    "running_var is elsewhere": (
        {"running_var": V.to("meta")},
        ValueError,
        "running_var is on meta, input is on cpu",
    ),
    "activation is unknown": ({"activation": ""}, ValueError, "activation is '', unknown"),
    "residual has another size": (
        {"residual": X[..., :4]},
        ValueError,
        r"residual has shape \(2, 3, 4, 4\), \(2, 3, 4, 5\) is accepted",
    ),
    "residual has another dtype": (
        {"residual": X.double()},
        TypeError,
        "residual has dtype torch.float64, input has torch.float32",
    ),
    "residual is elsewhere": ({"residual": X.to("meta")}, ValueError, "residual is on meta, input"),
}


@pytest.mark.parametrize("change,error,message", BAD.values(), ids=BAD)
@pytest.mark.parametrize("training", [False, True])
def test_bad_input(change, error, message, training):
    mean, var = torch.zeros(3), torch.ones(3)
    good = {"input": X, "weight": V, "bias": V, "running_mean": mean, "running_var": var}
    with pytest.raises(error, match=f"^batch_norm_act: {message}"):
        ops.batch_norm_act(**{**good, "training": training, **change})
    assert torch.equal(mean, torch.zeros(3)) and torch.equal(var, torch.ones(3))


@pytest.mark.parametrize("missing", [{"running_mean": None}, {"running_var": None}])
def test_inference_needs_statistics(missing):
    statistics = {"running_mean": V, "running_var": V, **missing}
    with pytest.raises(
        ValueError, match="^batch_norm_act: running_mean and running_var are needed when training=F"
    ):
        ops.batch_norm_act(X, V, V, **statistics, training=False)
