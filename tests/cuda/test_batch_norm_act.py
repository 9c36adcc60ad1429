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
from tests.ops.test_batch_norm_act import arguments, has_statistics

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


@pytest.mark.parametrize("size,channels", [((300, 451), 1), ((21, 50), 264), ((64, 160), 40)])
def test_many_rows(size, channels):
    """More blocks than one turn of the kernel that merges them takes; channels of two blocks."""
    case = Case(
        batch=1, channels=channels, size=size, training=True, residual=None, layout="channels_last",
        dtype=torch.float32,
    )  # fmt: skip
    (tensors, options), _ = differentiable(case, 0)
    tensors = {name: tensors[name] for name in ("input", "weight", "bias")}
    options |= {"running_mean": None, "running_var": None}
    assert_matches(gradient_function(ops.batch_norm_act), tensors, options, backend="native")


def test_gradients_of_the_statistics():
    """As the mean and the variance are outputs of the op, they may have gradients, too."""

    def statistics(input: Tensor, weight: Tensor) -> Any:
        return torch.ops.effkernels.batch_norm_act(
            input, weight, None, None, None, None, True, 1e-3, "silu"
        )

    def only_statistics(input: Tensor, weight: Tensor) -> Any:
        output, mean, var = statistics(input, weight)
        return mean, var + 0 * weight.sum()

    for function in (statistics, only_statistics):

        def case(repetition: int) -> Arguments:
            draw = Draw(repetition)
            input = draw.activations(2, 24, (5, 7))
            return ({"input": input, "weight": draw.normal(24, std=0.3, mean=1.0)}, {}), {}

        assert_parity("native", gradient_function(function), case, channels_last=False)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", ["input", "weight", "bias", "residual"])
def test_only_needed_gradients_are_computed(training, name):
    case = Case(
        batch=2, channels=8, size=(3, 5), training=training, residual="channels_last",
        dtype=torch.float32,
    )  # fmt: skip
    (tensors, options), _ = differentiable(case, 0)
    tensors = {key: value for key, value in tensors.items() if value is not None}
    leaves = {key: value.clone().requires_grad_() for key, value in tensors.items()}
    given = {"running_mean": None, "running_var": None}
    everything = torch.autograd.grad(
        ops.batch_norm_act(**options, **given | leaves).sum(), leaves[name]
    )
    alone = {key: value.clone().requires_grad_(key == name) for key, value in tensors.items()}
    ops.batch_norm_act(**options, **given | alone).sum().backward()
    torch.testing.assert_close(alone[name].grad, everything[0])


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_special_values(value, training):
    case = Case(batch=2, channels=20, size=(4, 5), training=training, residual=None)
    (input,), options = arguments(case, torch.float32)
    input[1, 7, 2, 2] = value
    assert_matches(ops.batch_norm_act, input, **options, backend="native")


@pytest.mark.parametrize("size", [(16, 16), (40, 30)])
def test_values_far_from_zero(device, size):
    """What the rounding of a mean near 1000 loses; E[x²] − E[x]² would lose far more."""
    input = Draw(0).activations(2, 20, size) + 1000
    output = ops.batch_norm_act(input.to(device), None, None, None, None, True)
    exact = torch.nn.functional.batch_norm(input.double(), None, None, training=True)
    assert relative_error(output.cpu(), exact) < 4 * 1000 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("training", [False, True])
def test_same_bits_every_time(device, training):
    case = Case(
        batch=3, channels=40, size=(19, 37), training=training, residual="channels_last",
        dtype=torch.bfloat16,
    )  # fmt: skip
    (tensors, options), _ = differentiable(case, 0)
    gradients = gradient_function(ops.batch_norm_act)
    once = gradients(tensors, options)
    if device.type == "cpu":
        emulated.configure(seed=1)
    assert same_bits(once, gradients(tensors, options))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("channels", [3, 24])
def test_memory(monkeypatch, dtype, channels, training):
    """Every element of what is allocated is written, and nothing around it is touched."""
    case = Case(
        batch=2, channels=channels, size=(3, 5), training=training, residual="channels_last",
        dtype=dtype,
    )  # fmt: skip
    (tensors, options), _ = differentiable(case, 0)
    assert_memory_kept(monkeypatch, ops.batch_norm_act, ((), {**tensors, **options}))

    def gradients(**given: Any) -> Any:
        named = {name: given.pop(name) for name in tensors}
        return gradient_function(ops.batch_norm_act)(named, given)

    assert_memory_kept(monkeypatch, gradients, ((), {**tensors, **options}))


def _check() -> None:
    for channels, size, training in ((24, (33, 17), True), (5, (3, 5), True), (12, (7, 5), False)):
        case = Case(
            batch=2, channels=channels, size=size, training=training, residual="channels_last",
            dtype=torch.bfloat16,
        )  # fmt: skip
        assert_parity("native", ops.batch_norm_act, partial(arguments, case, case.dtype))
        assert_parity(
            "native",
            gradient_function(ops.batch_norm_act),
            partial(differentiable, case),
            channels_last=False,
        )


STATISTICS, APPLY, GRADIENT = (
    f"batch_norm_act/cuda_{part}.h" for part in ("statistics", "apply", "gradient")
)
MISTAKES = {
    "a row is counted twice": (
        STATISTICS,
        "for (; row < rows; row += tiles.lanes)",
        "for (row -= tiles.lanes; row < rows; row += tiles.lanes)",
    ),
    "a barrier is missing": (
        STATISTICS,
        "moved[thread] / static_cast<float>(rows);\n  }\n  __syncthreads();",
        "moved[thread] / static_cast<float>(rows);\n  }",
    ),
    "the last block is as long as the others": (
        STATISTICS,
        "const float count = block == args.blocks - 1 ? last : usual;\n      moved",
        "const float count = usual;\n      moved",
    ),
    "an average of averages": (STATISTICS, "sum += distance * distance * (count * weight);", ""),
    "a tail": (STATISTICS, "static_cast<int>(left) : most", "static_cast<int>(left) - 1 : most"),
    "a barrier is missing behind the channels' table": (
        APPLY,
        "__syncthreads();\n  if (lane.count == 0) return;",
        "if (lane.count == 0) return;",
    ),
    "rows of the next block in the gradient's sums": (
        GRADIENT,
        "const int count = row + u * tiles.lanes < rows ? lane.count : 0;",
        "const int count = lane.count;",
    ),
    "a chunk's neighbour": (
        "common/cuda_rows.h",
        "row >= tiles.lanes || left < 0 ? 0",
        "left < 0 ? 0",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_found(mistake):
    assert with_mistake(MISTAKES[mistake], _check)


def test_right_kernels_pass_where_mistakes_are_found():
    assert with_mistake(None, _check) == ""
