"""csrc/batch_norm_act/cuda.cu against float64."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from effkernels import ops
from effkernels.cuda import DTYPES
from effkernels.ops import ACTIVATIONS
from effkernels.testing import assert_matches, relative_error
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
from tests.ops.test_batch_norm_act import arguments, has_statistics

from tests.cuda import emulated
from tests.cuda.emulated import with_mistake

pytestmark = pytest.mark.usefixtures("kernels")

AXES = {
    # around vectors, and the 32 of them that a block takes
    "channels": (24, 5, 72, 1, 8),
    # few rows go to one block; of more of them each block has some, the last perhaps fewer
    "size": ((7, 7), (3, 5), (4, 17), (33, 17)),
    "batch": (2, 1, 0),
    "affine": ("weight32+bias32", "none", "weight", "bias", "weight+bias"),
    "statistics32": (True, False),
    "training": (True, False),
    "activation": ACTIVATIONS,
    "layout": ("channels_last", "nchw"),
    "residual": (None, "channels_last", "expanded"),
    "dtype": DTYPES,
}


def differentiable(case: Case, repetition: int) -> Arguments:
    """`arguments` as `gradient_function` takes them."""
    (input,), options = arguments(case, case.dtype, repetition)
    names = ("weight", "bias", "running_mean", "running_var", "residual")
    tensors = {"input": input, **{name: options.pop(name) for name in names}}
    return (tensors, options), {}


@pytest.mark.parametrize("case", pairwise(AXES, has_statistics), ids=str)
def test_matches_reference(case):
    assert_parity("native", ops.batch_norm_act, partial(arguments, case, case.dtype))


@pytest.mark.parametrize("case", pairwise(AXES, has_statistics)[::2], ids=str)
def test_gradients(case):
    assert_parity(
        "native",
        gradient_function(ops.batch_norm_act),
        partial(differentiable, case),
        channels_last=False,
    )
