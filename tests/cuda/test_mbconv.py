"""csrc/mbconv/cuda.cu against float64, and the whole block."""

from __future__ import annotations

import importlib.util
import sys
import types
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from effkernels import cuda, ops
from effkernels.ops import MBConvGeometry, MBConvParameters
from effkernels.ops.squeeze_excite import gate_reference
from tests.cuda import emulated
from tests.cuda.emulated import with_mistake
from tests.ops._cases import (
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
    "batch": (1, 2),
    "channels": (3, 8, 16, 24),
    "expanded": (24, 40, 65),
    "outputs": (16, 21),
    "reduced": (0, 4),
    "size": ((7, 6), (12, 9)),
    "kernel": (3, 5),
    "stride": (1, 2),
    "padding": ("symmetric", "same", (0, 1, 2, 0), (6, 0, 1, 7)),
    "activation": ("silu", "relu6", "hard_swish", "sigmoid"),
    "affine": (False, True),
}


def has_residual(case: Case) -> bool:
    return (
        case.stride == 1 and case.channels == case.outputs and case.padding in ("symmetric", "same")
    )


def tensors_of(case: Case, draw: Draw) -> dict[str, Tensor]:
    width = case.expanded or case.channels
    found = {"input": draw.activations(case.batch, case.channels, case.size)}
    if case.expanded:
        found["expand_weight"] = draw.weight(case.expanded, case.channels, 1, 1)
    found["depthwise_weight"] = draw.weight(width, 1, case.kernel, case.kernel)
    if case.reduced:
        found["se_reduce_weight"] = draw.weight(case.reduced, width, 1, 1)
        found["se_reduce_bias"] = draw.normal(case.reduced, std=0.3)
        found["se_expand_weight"] = draw.weight(width, case.reduced, 1, 1)
        found["se_expand_bias"] = draw.normal(width, std=0.3)
    found["project_weight"] = draw.weight(case.outputs, width, 1, 1)
    for name in ("expand", "depthwise", "project"):
        if name == "expand" and not case.expanded:
            continue
        size = case.outputs if name == "project" else width
        affine = draw.affine(size, "scale+bias" if case.affine else "bias")
        found |= {f"{name}_{key}": value for key, value in affine.items()}
    return found


def run(case: Case, input: Tensor, **parameters: Tensor) -> Tensor:
    geometry = MBConvGeometry(
        case.stride, case.padding, 1, has_residual(case), case.activation, case.activation
    )
    return ops.mbconv(input, MBConvParameters(**parameters), geometry)


def gate(mean: Tensor, factor: float, *arguments: Any) -> Tensor:
    return gate_reference((mean.sum(1) * factor).to(arguments[0].dtype), *arguments)


@pytest.fixture(autouse=True)
def stand_in(monkeypatch):
    """Squeeze-and-excitation's gate in PyTorch, while there is none in CUDA C++."""
    if importlib.util.find_spec("effkernels.cuda.squeeze_excite") is None:
        module = types.ModuleType("effkernels.cuda.squeeze_excite")
        module.gate = gate
        monkeypatch.setitem(sys.modules, module.__name__, module)


@pytest.mark.parametrize("case", pairwise(AXES), ids=str)
def test_matches_reference(device, case):
    def arguments(repetition: int) -> Arguments:
        tensors = tensors_of(case, case.draw(repetition, case.dtype))
        return (case,), {name: tensor.to(device) for name, tensor in tensors.items()}

    assert_parity("native", run, arguments)
