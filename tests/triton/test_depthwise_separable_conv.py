from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from effkernels import ops
from tests.ops._cases import Arguments, Case, Draw, assert_parity, gradient_function, pairwise
from tests.triton.cases import few_dtypes

AXES = {
    "batch": (1, 2),
    "channels": (5, 16),
    "outputs": (7, 24),
    "size": ((5, 6), (9, 8)),
    "kernel": (3, 5),
    "stride": (1, 2),
    "padding": ("symmetric", "same", (0, 1, 2, 0)),
    "residual": (False, True),
    "affine": ("none", "bias", "scale+bias"),
    "inner": ("silu", "relu6"),
    "activation": ("none", "relu"),
}
# Compiling ahead of time: the blocks of tests/triton/test_mbconv.py contain this chain.


def tensors_of(case: Case, draw: Draw) -> dict[str, Tensor]:
    kernel = (case.kernel, case.kernel)
    found = {
        "input": draw.activations(case.batch, case.channels, case.size),
        "depthwise_weight": draw.weight(case.channels, 1, *kernel),
        "pointwise_weight": draw.weight(case.outputs, case.channels, 1, 1),
    }
    for name, channels in (("depthwise", case.channels), ("pointwise", case.outputs)):
        affine = draw.affine(channels, case.affine)
        found |= {f"{name}_{key}": value for key, value in affine.items()}
    if case.residual:
        with torch.device("meta"):
            shape = run(case, **{name: torch.empty_like(t) for name, t in found.items()}).shape
        found["residual"] = draw.activations(shape[0], shape[1], shape[2:])
    return found


def run(case: Case, **tensors: Any) -> Tensor:
    arguments = {"depthwise_bias": None, "pointwise_bias": None, **tensors}
    return ops.depthwise_separable_conv(
        **arguments,
        stride=case.stride,
        padding=case.padding,
        depthwise_activation=case.inner,
        activation=case.activation,
    )


@pytest.mark.parametrize(("case", "dtype"), few_dtypes(pairwise(AXES)), ids=str)
def test_matches_reference(device, dtype, case):
    def arguments(repetition: int) -> Arguments:
        tensors = tensors_of(case, case.draw(repetition, dtype))
        return (case,), {name: tensor.to(device) for name, tensor in tensors.items()}

    assert_parity("triton", run, arguments)


@pytest.mark.parametrize(("case", "dtype"), few_dtypes(pairwise(AXES)[:2], 1), ids=str)
def test_gradients(device, dtype, case):
    gradients = gradient_function(lambda **tensors: run(case, **tensors))

    def arguments(repetition: int) -> Arguments:
        tensors = tensors_of(case, case.draw(repetition, dtype))
        return ({name: tensor.to(device) for name, tensor in tensors.items()}, {}), {}

    assert_parity("triton", gradients, arguments, channels_last=False)
