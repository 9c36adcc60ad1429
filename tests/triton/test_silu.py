from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch

from effkernels import ops
from effkernels.ops import ACTIVATIONS
from effkernels.triton import DTYPES
from tests.ops._cases import Arguments, Draw, assert_parity, gradient_function
from tests.triton import aot

# around a program's block: 1024 float32 values or 2048 of two bytes
SHAPES = ((0,), (1,), (7,), (1023,), (2049,), (2, 24, 9, 10), (4096,))
FUNCTIONS = {name: partial(ops.activation, name=name) for name in ACTIVATIONS if name != "none"}


def aot_calls() -> Iterator[Callable[[], Any]]:
    for dtype in DTYPES:
        for shape in ((1, 32, 112, 112), (256, 1280), (5, 7), (2, 2**30 + 8)):
            for function in FUNCTIONS.values():
                yield lambda shape=shape, dtype=dtype, function=function: aot.differentiate(
                    lambda tensors, function=function: function(**tensors),
                    {"input": torch.empty(shape, dtype=dtype)},
                )


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(device, dtype, name, shape):
    def arguments(repetition: int) -> Arguments:
        return (Draw(repetition, dtype).normal(*shape, std=2.5, mean=0.3).to(device),), {}

    assert_parity("triton", FUNCTIONS[name], arguments, channels_last=False)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradient(device, dtype, name):
    gradients = gradient_function(FUNCTIONS[name])

    def arguments(repetition: int) -> Arguments:
        input = Draw(repetition, dtype).normal(2, 24, 9, 10, std=2.5, mean=0.3).to(device)
        return ({"input": input}, {}), {}

    assert_parity("triton", gradients, arguments, channels_last=False)


def test_special_values(device):
    input = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 100.0, -100.0])
    for name, function in FUNCTIONS.items():
        expected = ops._common.apply_activation(input, name)
        torch.testing.assert_close(function(input.to(device)).cpu(), expected, equal_nan=True)


@pytest.mark.parametrize("capability", aot.DEVICES)
def test_compiles_as_promised(capability):
    compiled, broken = aot.run("silu", capability)
    assert compiled > 0 and not broken, "\n".join(broken)
