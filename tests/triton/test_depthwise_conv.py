from __future__ import annotations

import dataclasses
import importlib.util
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from effkernels import ops, triton
from effkernels.ops import ACTIVATIONS
from effkernels.ops._common import apply_activation
from effkernels.testing import assert_close_to, assert_matches
from effkernels.triton import DTYPES, depthwise_conv, depthwise_conv_config
from effkernels.triton import depthwise_conv_gradient as gradients
from effkernels.triton.operands import Forward, Gradient
from tests.ops._cases import (
    Arguments,
    Case,
    Draw,
    GuardedMemory,
    gradient_function,
    outputs_of,
    same_bits,
)
from tests.triton import aot

# Calls of training, which the networks' layers do not make: prologues, statistics, sums.
TRAINING = ((256, 144, 56, 3, 1), (256, 96, 112, 3, 2), (256, 672, 14, 5, 1), (256, 144, 56, 5, 2))


def aot_calls() -> Iterator[Callable[[], Any]]:
    yield from aot.network_calls("depthwise_conv")
    for dtype in DTYPES:
        for sizes in TRAINING:
            yield partial(_train, dtype, *sizes)
        for kernel_size, stride, dilation in ((7, 1, 1), (7, 2, 1), (9, 1, 1), (3, 2, 2)):
            yield partial(_differentiate, dtype, kernel_size, stride, dilation)


def _train(dtype: torch.dtype, batch: int, channels: int, size: int, k: int, stride: int) -> None:
    geometry: dict[str, Any] = {
        "kernel": (k, k),
        "stride": (stride, stride),
        "padding": (k // 2,) * 4,
        "dilation": (1, 1),
    }
    input = _channels_last(torch.empty(batch, channels, size, size, dtype=dtype))
    taps = torch.empty(k * k, channels, dtype=dtype)
    vector = torch.empty(channels)
    gate = torch.empty(batch, channels)
    forward = Forward(vector, vector, "silu")
    z = depthwise_conv.convolve(input, taps, operand=forward, moments=True, **geometry).output
    depthwise_conv.convolve(input, taps, mean=True, activation="silu", **geometry)
    gradient = Gradient(z, vector, vector, "silu", gate, gate, vector, vector, vector)
    gradients.input_gradient(z, taps, size=(size, size), gradient=gradient, **geometry)
    gradients.weight_gradient(z, gradient, input, forward, **geometry)


def _differentiate(dtype: torch.dtype, kernel_size: int, stride: int, dilation: int) -> None:
    def run(tensors: dict[str, Tensor]) -> Any:
        return ops.depthwise_conv(
            **tensors, stride=stride, dilation=dilation, activation="silu", return_mean=True
        )

    tensors = {"input": (2, 24, 28, 28), "weight": (24, 1, kernel_size, kernel_size), "bias": (24,)}
    aot.differentiate(run, {n: torch.empty(s, dtype=dtype) for n, s in tensors.items()})


def _channels_last(tensor: Tensor) -> Tensor:
    return tensor.to(memory_format=torch.channels_last)


# Parity

# Around strips of 4 and 7 columns, tiles of 32 and 64 channels, padding of every kind.
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
        (2, 40, 7, 9, 3, 1, "symmetric", 1),
        (3, 33, 8, 5, 3, 2, "same", 1),
        (1, 66, 5, 8, 5, 1, (0, 1, 2, 0), 1),
        (2, 24, 6, 9, 5, 2, "symmetric", 1),
        (1, 24, 5, 4, 7, 1, "symmetric", 1),
        (1, 17, 6, 7, 7, 2, (5, 1, 0, 4), 1),
        (1, 24, 1, 1, 3, 1, 4, 1),
        (0, 8, 5, 5, 3, 1, "same", 1),
        (1, 40, 7, 6, 3, 2, "symmetric", 2),
        (1, 24, 4, 5, 9, 1, "symmetric", 1),
        (2, 8, 5, 6, 1, 2, 0, 1),
    )
}
OBLONG = Case(
    batch=2, channels=24, size=(7, 6), kernel=(5, 3), stride=(1, 2), padding="same", dilation=1
)
# What the heuristic would not choose at these sizes. Two or three rows a strip: strips are cut.
STREAMED = {"streamed": True, "rows": 2}
CONFIGS = {
    "streamed": STREAMED,
    "seven columns": {**STREAMED, "columns": 7, "rows": 3},
    "several items": {**STREAMED, "items": 3},
    "one warp": {"strips": 2, "channels": 16, "num_warps": 1},
}


@pytest.fixture
def configure(monkeypatch):
    """A function that overrides fields of the configurations chosen from now on."""

    def override(**fields: Any) -> None:
        def heuristic(problem: Any, device: Any) -> Any:
            chosen = depthwise_conv_config.heuristic(problem, device)
            kept = set() if problem.is_tuned else {"streamed", "columns"}
            if problem.name != "weight_gradient" and not problem.moments:
                kept.add("items")
            return dataclasses.replace(
                chosen, **{name: value for name, value in fields.items() if name not in kept}
            )

        monkeypatch.setattr(depthwise_conv, "heuristic", heuristic)
        monkeypatch.setattr(gradients, "heuristic", heuristic)

    return override


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


def outputs_and_gradients(tensors: dict[str, Tensor], chosen: dict[str, Any]) -> Any:
    differentiate = gradient_function(ops.depthwise_conv)
    return (*run(tensors, chosen), *differentiate(tensors, chosen))


@pytest.mark.parametrize("name", CASES)
def test_matches_reference(device, name):
    """Outputs and gradients for every argument."""
    args, _ = arguments(CASES[name], torch.float32, device)
    assert_matches(outputs_and_gradients, *args, backend="triton")
