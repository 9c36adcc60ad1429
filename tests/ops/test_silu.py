from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

from effkernels import ops
from effkernels.dispatch import use_backend
from effkernels.ops import ACTIVATIONS
from effkernels.testing import assert_matches

from ._cases import (
    Arguments,
    Case,
    Draw,
    assert_memory_kept,
    assert_parity,
    assert_threads_agree,
    cases_of,
    gradient_function,
    random_cases,
)

SHAPES = (
    *[(n,) for n in (0, 1, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 1000)],
    (),
    (2, 0, 3),
    (3, 5),
    (2, 17, 3, 5),
    (1, 1, 1, 1),
    (2, 3, 4, 5, 6),
)
OUTPUT = {"silu": ops.silu, **{n: partial(ops.activation, name=n) for n in ACTIVATIONS}}


def values(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return Draw(seed, dtype).normal(*shape, std=2.5, mean=0.3)


def layouts(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    base = values((4, 6, 5, 8), dtype)
    return {
        "channels_last": base.to(memory_format=torch.channels_last),
        "transposed": base.transpose(1, 3),
        "every second": base[:, ::2, :, 1::2],
        "offset": base.flatten()[3:],
        "expanded": base[:, :1].expand(4, 6, 5, 8),
        "one dimension expanded": base[0, 0, 0, :1].expand(70),
        "channels_last_3d": base[None].to(memory_format=torch.channels_last_3d),
    }


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(kernels, dtype, name, shape):
    def arguments(repetition: int) -> Arguments:
        return (values(shape, dtype, repetition),), {}

    assert_parity(kernels, OUTPUT[name], arguments, channels_last=False)


@pytest.mark.parametrize("name", ["silu", "hard_swish"])
@pytest.mark.parametrize("layout", layouts(torch.float32))
def test_layouts(kernels, dtype, name, layout):
    input = layouts(dtype)[layout]
    assert_matches(OUTPUT[name], input, backend=kernels)
    with use_backend(kernels):
        output = OUTPUT[name](input)
    assert output.stride() == torch.empty_like(input).stride()
    assert output.data_ptr() != input.data_ptr()


@random_cases
@given(
    case=cases_of(
        {
            "shape": st.lists(st.integers(0, 40), max_size=3).map(tuple),
            "name": st.sampled_from(ACTIVATIONS),
            "std": st.sampled_from((1e-30, 1e-3, 1.0, 30.0, 1e4)),
        }
    )
)
def test_random_shapes(kernels, dtype, case: Case):
    def arguments(repetition: int) -> Arguments:
        return (case.draw(repetition, dtype).normal(*case.shape, std=case.std),), {}

    assert_parity(kernels, OUTPUT[case.name], arguments, channels_last=False)


# Accuracy of every float32, wherever an activation is applied

SMALLEST_NORMAL = torch.finfo(torch.float32).tiny


def every_exponent(count: int) -> torch.Tensor:
    """Floats of random sign and mantissa, the same number for each exponent."""
    generator = torch.Generator().manual_seed(1)
    pattern = torch.randint(-(2**31), 2**31, (count,), generator=generator, dtype=torch.int64)
    return pattern.to(torch.int32).view(torch.float32)


def awkward() -> torch.Tensor:
    """Where exp over- or underflows, kinks, zeros, subnormals and the largest numbers."""
    edges = torch.tensor([-110.0, -104.0, -103.3, -88.8, -88.0, -87.3, 3.0, 6.0, 17.0, 88.0, 110.0])
    near = edges[:, None] * (1 + torch.linspace(-1e-2, 1e-2, 401))
    special = torch.tensor([0.0, -0.0, 1e-45, -1e-45, 1e-40, -1e-38, 3.4e38, -3.4e38, 1e30, -1e30])
    return torch.cat([near.flatten(), torch.linspace(-120, 120, 24001), special])


def through_depthwise(input: torch.Tensor, name: str) -> torch.Tensor:
    return ops.depthwise_conv(
        input.view(1, 1, 1, -1), input.new_ones(1, 1, 1, 1), activation=name
    ).flatten()


def through_pointwise(input: torch.Tensor, name: str) -> torch.Tensor:
    return ops.pointwise_conv(
        input.view(1, 1, 1, -1), input.new_ones(1, 1), activation=name
    ).flatten()


def through_conv(input: torch.Tensor, name: str) -> torch.Tensor:
    return ops.conv(input.view(1, 1, 1, -1), input.new_ones(1, 1, 1, 1), activation=name).flatten()


def through_batch_norm(input: torch.Tensor, name: str) -> torch.Tensor:
    mean, var = input.new_zeros(1), input.new_ones(1)
    return ops.batch_norm_act(
        input.view(1, 1, 1, -1), None, None, mean, var, False, eps=0.0, activation=name
    ).flatten()


PLACES = {
    "alone": ops.activation,
    "depthwise_conv": through_depthwise,
    "pointwise_conv": through_pointwise,
    "conv": through_conv,
    "batch_norm_act": through_batch_norm,
}


@pytest.mark.parametrize("name", [name for name in ACTIVATIONS if name != "none"])
@pytest.mark.parametrize("place", PLACES)
def test_accuracy_over_all_floats(native_kernels, name, place):
    """Better than PyTorch, whose silu is 0 from -88.73 down, where e^88.73 is infinite."""
    input = torch.cat([awkward(), every_exponent(2**18)])
    input = input[input.isfinite()]
    if name == "hard_swish":  # x · relu6(x + 3) may be infinite before the division by 6
        input = input[input.abs() < torch.finfo(torch.float32).max / 8]
    with use_backend("native"):
        output = PLACES[place](input, name).double()
    with use_backend("reference"):
        exact = ops.activation(input.double(), name)
    normal = exact.abs() >= SMALLEST_NORMAL
    error = (output - exact).abs()
    relative = (error / exact.abs())[normal]
    worst = int(relative.argmax())
    assert float(relative[worst]) <= 1e-6, f"at {float(input[normal][worst])!r}"
    assert float(error[~normal].max()) <= SMALLEST_NORMAL


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("place", PLACES)
def test_special_values(kernels, name, place):
    special = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 1e30, -1e30])
    input = special.repeat(9)[1:]  # in every lane of a vector, and in the rest after the last
    assert_matches(PLACES[place], input, name, backend=kernels)


@pytest.mark.parametrize("name", ["silu", "sigmoid"])
def test_special_values_bfloat16(kernels, name):
    special = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, 88.0, -88.0, 1e30, -1e30])
    assert_matches(ops.activation, special.bfloat16().repeat(9), name, backend=kernels)


@pytest.mark.parametrize("name", ACTIVATIONS[1:])
@pytest.mark.parametrize("shape", [(1_000_003,), (3, 40, 65, 65)], ids=str)
def test_threads_agree(native_kernels, dtype, name, shape):
    assert_threads_agree(ops.activation, ((values(shape, dtype), name), {}))


@pytest.mark.parametrize("name", ACTIVATIONS[1:])
@pytest.mark.parametrize("shape", [(1,), (31,), (64,), (77,), (2, 5, 3, 7)], ids=str)
def test_memory(native_kernels, dtype, monkeypatch, name, shape):
    assert_memory_kept(monkeypatch, ops.activation, ((values(shape, dtype), name), {}))


def test_none_is_the_input():
    input = torch.randn(3)
    assert ops.activation(input, "none") is input


# Gradients


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_gradients(name):
    input = values((3, 4, 5), torch.float64).requires_grad_()
    assert gradcheck(OUTPUT[name], [input])
    assert gradgradcheck(OUTPUT[name], [input])


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_gradients_are_those_of_pytorch(name):
    """At the kinks, too."""
    functions = {
        "none": lambda x: x,
        "relu": torch.relu,
        "relu6": torch.nn.functional.relu6,
        "silu": torch.nn.functional.silu,
        "hard_swish": torch.nn.functional.hardswish,
        "sigmoid": torch.sigmoid,
        "hard_sigmoid": torch.nn.functional.hardsigmoid,
    }
    input = torch.tensor([-100.0, -3.0, -2.9, -0.0, 0.0, 2.5, 3.0, 6.0, 7.0, 100.0])
    ours, theirs = input.clone().requires_grad_(), input.clone().requires_grad_()
    ops.activation(ours, name).sum().backward()
    functions[name](theirs).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize("name", ACTIVATIONS[1:])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients_match_reference(kernels, dtype, name, shape):
    def arguments(repetition: int) -> Arguments:
        return ({"input": values(shape, dtype, repetition)}, {"name": name}), {}

    assert_parity(kernels, gradient_function(ops.activation), arguments, channels_last=False)


@pytest.mark.parametrize("name", ["silu", "hard_swish"])
@pytest.mark.parametrize("layout", layouts(torch.float32))
def test_layouts_of_gradients(kernels, dtype, name, layout):
    input = layouts(dtype)[layout]

    def gradient(input: torch.Tensor) -> torch.Tensor:
        leaf = input.detach().requires_grad_()
        output = ops.activation(leaf, name)
        # Not laid out like the output.
        upstream = input.flip(0).transpose(0, -1).contiguous().transpose(0, -1)
        return torch.autograd.grad(output, leaf, upstream)[0]

    assert_matches(gradient, input, backend=kernels)
    with use_backend(kernels):
        assert gradient(input).stride() == torch.empty_like(input).stride()


@pytest.mark.parametrize("name", ["silu", "sigmoid"])
def test_gradients_far_from_zero(native_kernels, name):
    """As close to float64 as the slope's size, 1 or so, allows in float32."""
    input = torch.cat([awkward(), every_exponent(2**14)])
    input = input[input.isfinite()]
    with use_backend("native"):
        leaf = input.clone().requires_grad_()
        ops.activation(leaf, name).sum().backward()
    exact = input.double().requires_grad_()
    with use_backend("reference"):
        ops.activation(exact, name).sum().backward()
    assert float((leaf.grad.double() - exact.grad).abs().max()) <= 1e-6


@pytest.mark.parametrize("name", ["silu", "sigmoid"])
def test_gradients_of_special_values(kernels, name):
    special = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 1e30, -1e30])
    tensors = {"input": special.repeat(9)[1:]}
    assert_matches(gradient_function(ops.activation), tensors, {"name": name}, backend=kernels)


@pytest.mark.parametrize("name", ACTIVATIONS[1:])
def test_threads_agree_on_gradients(native_kernels, dtype, name):
    arguments = (({"input": values((3, 40, 65, 65), dtype)}, {"name": name}), {})
    assert_threads_agree(gradient_function(ops.activation), arguments)


@pytest.mark.parametrize("name", ACTIVATIONS[1:])
@pytest.mark.parametrize("shape", [(1,), (31,), (64,), (77,), (2, 5, 3, 7)], ids=str)
def test_gradients_keep_memory(native_kernels, dtype, monkeypatch, name, shape):
    def function(input: torch.Tensor):
        return gradient_function(ops.activation)({"input": input}, {"name": name})

    assert_memory_kept(monkeypatch, function, ((values(shape, dtype),), {}))


# The dispatcher's rules


@pytest.mark.parametrize(
    "input",
    [
        torch.randn(3, 5),
        torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last).requires_grad_(),
        torch.randn(0, 3).bfloat16(),
    ],
    ids=["plain", "gradients", "empty"],
)
@pytest.mark.parametrize("name", ["silu", "none"])
def test_opcheck(input, name):
    torch.library.opcheck(torch.ops.effkernels.silu.default, (input, name))


# Bad input

BAD = {
    "input is a list": (([1.0], "relu"), TypeError, "input is list, a torch.Tensor is accepted"),
    "input is integer": (
        (torch.arange(3), "relu"),
        TypeError,
        "input has dtype torch.int64, a floating-point dtype is accepted",
    ),
    "input is complex": (
        (torch.ones(3, dtype=torch.complex64), "silu"),
        TypeError,
        "input has dtype torch.complex64, a floating-point dtype is accepted",
    ),
    "name is unknown": (
        (torch.ones(3), "swish"),
        ValueError,
        "name is 'swish', unknown activation; accepted are 'none', 'relu', 'relu6', 'silu', "
        "'hard_swish', 'sigmoid', 'hard_sigmoid'",
    ),
    "name is a function": ((torch.ones(3), len), ValueError, "name is <built-in function len>"),
    "name cannot be hashed": ((torch.ones(3), ["silu"]), ValueError, r"name is \['silu'\], unk"),
}


@pytest.mark.parametrize("arguments,error,message", BAD.values(), ids=BAD)
def test_bad_input(arguments, error, message):
    with pytest.raises(error, match=f"^silu: {message}"):
        ops.activation(*arguments)


def test_bad_input_of_silu():
    with pytest.raises(TypeError, match="^silu: input is str, a torch.Tensor is accepted"):
        ops.silu("silu")
