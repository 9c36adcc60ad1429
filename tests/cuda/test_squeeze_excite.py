"""csrc/squeeze_excite/cuda.cu against float64."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from effkernels import ops
from effkernels.cuda import DTYPES
from effkernels.cuda import squeeze_excite as kernels
from effkernels.dispatch import use_backend
from effkernels.ops import ACTIVATIONS
from effkernels.testing import assert_close_to
from tests.cuda import emulated
from tests.ops._cases import (
    Arguments,
    Case,
    Draw,
    assert_parity,
    pairwise,
)
from tests.ops.test_squeeze_excite import BIASES, gate_arguments

pytestmark = pytest.mark.usefixtures("kernels")

GATE_AXES = {
    # around vectors, lanes of a row, rows of a warp, slices of 64
    "channels": (24, 5, 8, 72, 264),
    "reduced": (6, 1, 17, 40, 4),
    "batch": (2, 5, 0),
    "biases": BIASES,
    "activations": tuple(zip(ACTIVATIONS, (*ACTIVATIONS[3:], *ACTIVATIONS[:3]), strict=True)),
    # One image a block, or four where images outnumber half of the processors.
    "processors": (132, 2),
    "dtype": DTYPES,
}


def given(case: Case, repetition: int) -> Arguments:
    first, named = gate_arguments(case, case.dtype, repetition)
    activation, gate_activation = case.activations
    return first, {**named, "activation": activation, "gate_activation": gate_activation}


def emulate(device: torch.device, processors: int) -> None:
    if device.type == "cpu":
        emulated.configure(seed=processors, processors=processors)


@pytest.mark.parametrize("case", pairwise(GATE_AXES), ids=str)
def test_gate_matches_reference(device, case):
    emulate(device, case.processors)
    assert_parity("native", ops.squeeze_excite_gate, partial(given, case))


@pytest.mark.parametrize("processors", [132, 2])
@pytest.mark.parametrize("channels,blocks", [(24, 3), (40, 130), (8, 300), (5, 7)])
def test_gate_of_partial_sums(device, dtype, processors, channels, blocks):
    """Added by one thread, or by several."""
    emulate(device, processors)
    draw = Draw(0, dtype)
    sums = draw.normal(5, blocks, channels, std=9 / blocks, mean=3 / blocks).float()
    weights = (
        draw.weight(6, channels),
        draw.normal(6),
        draw.weight(channels, 6),
        draw.normal(channels),
    )

    def stock(dtype: torch.dtype) -> Tensor:
        wide = torch.promote_types(dtype, torch.float32)
        mean = (sums.to(wide).sum(1) / 9).to(dtype)
        return ops.squeeze_excite_gate(mean, *(weight.to(dtype) for weight in weights))

    with use_backend("reference"):
        due, baseline = stock(torch.float64), stock(dtype)
    got = kernels.gate(
        sums.to(device), 1 / 9, *(weight.to(device) for weight in weights), "silu", "sigmoid"
    )
    assert_close_to(due, got.cpu(), baseline)
