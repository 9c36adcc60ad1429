"""csrc/pointwise_conv/cuda.cu against float64."""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from effkernels import cuda, ops
from effkernels.ops import ACTIVATIONS
from effkernels.testing import assert_matches
from tests.cuda import emulated
from tests.cuda.emulated import with_mistake
from tests.ops._cases import (
    AFFINES,
    LAYOUTS,
    Arguments,
    Case,
    Draw,
    assert_memory_kept,
    assert_parity,
    gradient_function,
    pairwise,
    same_bits,
)

pytestmark = pytest.mark.usefixtures("kernels")

AXES = {
    "dtype": cuda.DTYPES,
    "processors": (1, 132),  # large tiles, small ones
    "outputs": (8, 17, 40, 65),
    "channels": (1, 3, 16, 24, 40, 65, 136),
    "size": ((2, 3), (7, 7), (5, 13)),
    "affine": AFFINES,
    "activation": ACTIVATIONS,
    "gate": (False, True),
    "residual": (None, "channels_last", "nchw"),
    "mean": (False, True),
}
CASES = [
    Case(**{"batch": batch, "layout": layout, **vars(case)})
    for case, batch, layout in zip(
        pairwise(AXES)[::2], itertools.cycle((2, 3, 1)), itertools.cycle(LAYOUTS)
    )
]


def arguments_of(case: Case, device: torch.device, repetition: int) -> Arguments:
    draw = case.draw(repetition, case.dtype)
    options: dict[str, Any] = {
        "input": draw.activations(case.batch, case.channels, case.size, case.layout),
        "weight": draw.weight(case.outputs, case.channels, 1, 1),
        **draw.affine(case.outputs, case.affine),
    }
    if case.gate:
        options["gate"] = draw.gate(case.batch, case.channels)
    if case.residual:
        options["residual"] = draw.activations(case.batch, case.outputs, case.size, case.residual)
    options = {name: value.to(device) for name, value in options.items()}
    return (), {**options, "activation": case.activation, "return_mean": case.mean}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_reference(device, case):
    if device.type == "cpu":
        emulated.configure(processors=case.processors)
    assert_parity("native", ops.pointwise_conv, partial(arguments_of, case, device))


# N, C, K, height, width: a row of the batch's pixels in one tile, tiles that end inside images, a
# tile of many images, one step of channels and more than there are stages
SIZES = (
    (1, 40, 24, 3, 7),
    (3, 24, 72, 9, 9),
    (70, 8, 8, 1, 1),
    (2, 160, 8, 8, 8),
    (5, 200, 33, 3, 3),
)


def everything(size: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    n, c, k, *pixels = size
    draw = Draw(7, dtype)
    options = {
        "input": draw.activations(n, c, pixels),
        "weight": draw.weight(k, c, 1, 1),
        **draw.affine(k, "scale32+bias32"),
        "gate": draw.gate(n, c),
        "residual": draw.activations(n, k, pixels),
    }
    options = {name: value.to(device) for name, value in options.items()}
    return {**options, "activation": "silu", "return_mean": True}


@pytest.mark.parametrize("processors", (1, 132))
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_tiles(device, dtype, size, processors):
    """Large tiles where there is one processor, small ones where there are many."""
    if device.type == "cpu":
        emulated.configure(processors=processors)
    options = everything(size, dtype, device)
    assert_matches(ops.pointwise_conv, **options)
    options["residual"] = options["gate"] = None
    assert_matches(ops.pointwise_conv, **options)


def test_empty_batch(device):
    output, mean = ops.pointwise_conv(
        torch.empty(0, 8, 3, 3, device=device), torch.ones(5, 8, device=device), return_mean=True
    )
    assert output.shape == (0, 5, 3, 3) and mean.shape == (0, 5)


def test_order_of_threads_changes_nothing(device):
    options = everything(SIZES[1], torch.bfloat16, device)
    first = ops.pointwise_conv(**options)
    for seed in (1, 2):
        if device.type == "cpu":
            emulated.configure(seed=seed)
        assert same_bits(first, ops.pointwise_conv(**options))


@pytest.mark.parametrize("processors", (1, 132))
@pytest.mark.parametrize("size", (SIZES[1], (3, 9, 17, 5, 5)), ids=str)
def test_memory_around_tensors(monkeypatch, device, dtype, size, processors):
    if device.type == "cpu":
        emulated.configure(processors=processors)
    options = everything(size, dtype, device)
    assert_memory_kept(monkeypatch, ops.pointwise_conv, ((), options))


def test_gradients_are_the_references(device):
    gradients = gradient_function(partial(ops.pointwise_conv, activation="silu"))

    def arguments(repetition: int) -> Arguments:
        options = everything(SIZES[0], torch.float32, device)
        tensors = {name: value for name, value in options.items() if isinstance(value, Tensor)}
        return (tensors, {}), {}

    assert_parity("native", gradients, arguments, channels_last=False)


def _check() -> None:
    """In bfloat16 and float32, with tiles of 128 and of 64 pixels."""
    for size, dtype, processors in (
        (SIZES[1], torch.bfloat16, 1),
        (SIZES[3], torch.float32, 132),
        (SIZES[4], torch.bfloat16, 132),
    ):
        emulated.configure(processors=processors)
        assert_matches(ops.pointwise_conv, **everything(size, dtype, torch.device("cpu")))


def test_check_passes(device):
    if device.type != "cpu":
        pytest.skip("for the emulated GPU")
    _check()


MISTAKES = {
    "rows beyond the last": ("if (row >= rows || v >= left) continue;", "if (v >= left) continue;"),
    "another image's gate": ("row < rows ? row : rows - 1)) / p.pixels", "0)) / p.pixels"),
    "no barrier between stages": ("__syncthreads();\n    if (stage", "if (stage"),
    "a stage too early": ("wait_copies<kStages - 2>", "wait_copies<kStages - 1>"),
    "the order of outputs": (
        "to + place_of(row, chunk), weight",
        "to + place_of(output, chunk), weight",
    ),
    "sums of the next image": ("row >= begin && row < end &&", "row >= begin &&"),
    "a forgotten tail": (
        "(p.channels + kStageValues - 1) / kStageValues",
        "p.channels / kStageValues",
    ),
    "no barrier before the sums": ("__syncthreads();\n#pragma", "#pragma"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_found(mistake):
    assert with_mistake(("pointwise_conv/cuda.cu", *MISTAKES[mistake]), _check)


def test_right_kernels_pass_where_mistakes_are_found():
    assert with_mistake(None, _check) == ""
