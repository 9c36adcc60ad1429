"""csrc/depthwise_conv/cuda.cu against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from effkernels import ops
from effkernels.ops import ACTIVATIONS
from tests.ops._cases import (
    Arguments,
    Case,
    assert_memory_kept,
    assert_parity,
    gradient_function,
)

pytestmark = pytest.mark.usefixtures("kernels")

# Around strips of 4 and 7 columns, tiles of 16 to 128 channels, padding of every kind.
CASES = {
    f"{k}x{k} stride {stride} {height}x{width}x{channels} batch {batch} {padding} dil {dilation}": (
        Case(
            batch=batch,
            channels=channels,
            size=(height, width),
            kernel=k,
            stride=stride,
            padding=padding,
            dilation=dilation,
        )
    )
    for batch, channels, height, width, k, stride, padding, dilation in (
        (2, 40, 5, 15, 3, 1, "symmetric", 1),
        (3, 33, 6, 5, 3, 2, "same", 1),
        (1, 72, 4, 8, 5, 1, (0, 1, 2, 0), 1),
        (2, 24, 6, 17, 5, 2, "symmetric", 1),
        (1, 24, 3, 9, 7, 1, "symmetric", 1),
        (1, 17, 6, 7, 7, 2, (5, 1, 0, 4), 1),
        (1, 24, 1, 1, 3, 1, 4, 1),
        (0, 8, 5, 5, 3, 1, "same", 1),
        (1, 40, 7, 6, 3, 2, "symmetric", 2),
        (1, 24, 2, 2, 9, 1, "symmetric", 1),
        (2, 8, 5, 6, 1, 2, 0, 1),
    )
}


def arguments(case: Case, dtype: torch.dtype, device: Any, repetition: int = 0) -> Arguments:
    draw = case.draw(repetition, dtype)
    size = case.kernel if isinstance(case.kernel, tuple) else (case.kernel, case.kernel)
    tensors = {
        "input": draw.activations(case.batch, case.channels, case.size),
        "weight": draw.weight(case.channels, 1, *size),
        **draw.affine(case.channels, getattr(case, "affine", "scale32+bias")),
    }
    chosen = {
        "stride": case.stride,
        "padding": case.padding,
        "dilation": case.dilation,
        "activation": getattr(case, "activation", "silu"),
        "return_mean": True,
    }
    return ({name: tensor.to(device) for name, tensor in tensors.items()}, chosen), {}


def run(tensors: dict[str, Tensor], chosen: dict[str, Any]) -> Any:
    return ops.depthwise_conv(**tensors, **chosen)


@pytest.mark.parametrize("name", CASES)
def test_matches_reference(device, dtype, name):
    case = CASES[name]
    assert_parity("native", run, lambda repetition: arguments(case, dtype, device, repetition))


@pytest.mark.parametrize("name", CASES)
def test_gradient(device, dtype, name):
    case = CASES[name]
    gradients = gradient_function(ops.depthwise_conv)
    assert_parity(
        "native", gradients, lambda repetition: arguments(case, dtype, device, repetition)
    )


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(device, activation):
    case = Case(
        batch=1,
        channels=24,
        size=(4, 4),
        kernel=3,
        stride=1,
        padding="same",
        dilation=1,
        activation=activation,
        affine="bias32",
    )
    assert_parity(
        "native", run, lambda repetition: arguments(case, torch.float32, device, repetition)
    )


@pytest.mark.parametrize("name", list(CASES)[:6])
def test_memory_around_tensors(monkeypatch, device, dtype, name):
    (tensors, chosen), _ = arguments(CASES[name], dtype, device)
    options = {"scale": tensors["scale"], **chosen}
    call = (tensors["input"], tensors["weight"], tensors["bias"])
    assert_memory_kept(monkeypatch, ops.depthwise_conv, (call, options))
