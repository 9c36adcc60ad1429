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
