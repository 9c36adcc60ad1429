"""csrc/silu/cuda.cu against float64."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from effkernels import ops
from effkernels.ops import ACTIVATIONS
from tests.cuda.emulated import with_mistake
from tests.ops._cases import Arguments, Draw, assert_memory_kept, assert_parity, gradient_function

pytestmark = pytest.mark.usefixtures("kernels")

# around a block: 4096 float32 values or 8192 of two bytes, half of that in the backward pass
SHAPES = ((0,), (1,), (7,), (4095,), (8193,), (2, 24, 9, 10), (4096,), (16384,))
FUNCTIONS = {name: partial(ops.activation, name=name) for name in ACTIVATIONS if name != "none"}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(device, dtype, name, shape):
    def arguments(repetition: int) -> Arguments:
        return (Draw(repetition, dtype).normal(*shape, std=2.5, mean=0.3).to(device),), {}

    assert_parity("native", FUNCTIONS[name], arguments, channels_last=False)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("shape", [(2, 24, 9, 10), (4097,)], ids=str)
def test_gradient(device, dtype, name, shape):
    gradients = gradient_function(FUNCTIONS[name])

    def arguments(repetition: int) -> Arguments:
        input = Draw(repetition, dtype).normal(*shape, std=2.5, mean=0.3).to(device)
        return ({"input": input}, {}), {}

    assert_parity("native", gradients, arguments, channels_last=False)


def test_special_values(device):
    input = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 100.0, -100.0])
    for name, function in FUNCTIONS.items():
        expected = ops._common.apply_activation(input, name)
        torch.testing.assert_close(function(input.to(device)).cpu(), expected, equal_nan=True)


def test_memory_around_tensors(monkeypatch, device, dtype):
    for shape in ((7,), (8193,), (16384,)):
        input = Draw(0, dtype).normal(*shape).to(device)
        assert_memory_kept(monkeypatch, ops.silu, ((input,), {}))


def _check() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for shape in ((7,), (8193,)):
            input = Draw(0, dtype).normal(*shape)
            assert_parity(
                "native", ops.silu, lambda _, input=input: ((input,), {}), channels_last=False
            )


MISTAKES = {
    "a tail": ("silu/cuda.cu", "left[i] = size - block - at;", "left[i] = size - block - at - 1;"),
    "overlap": ("silu/cuda.cu", "ceil_div(args.size, kBlock)", "1 + ceil_div(args.size, kBlock)"),
    "a block": (
        "silu/cuda.cu",
        "int64_t{blockIdx.x} * (kThreads",
        "int64_t{blockIdx.x} / 2 * (kThreads",
    ),
}


@pytest.mark.parametrize("mistake", ["a tail", "a block"])
def test_mistakes_are_found(mistake):
    assert with_mistake(MISTAKES[mistake], _check)


def test_right_kernels_pass_where_mistakes_are_found():
    assert with_mistake(None, _check) == ""
