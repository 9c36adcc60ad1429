"""Calls that skip the op functions and their checks: an error, never a read outside a tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import effkernels as ek

pytestmark = pytest.mark.skipif(
    not ek.backends()["native"].available, reason="the reference checks for itself"
)

OPS = torch.ops.effkernels
ONE, ROUND = [1, 1], [1, 1, 1, 1]


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape)


DEPTHWISE = (draw(1, 64, 8, 8), draw(64, 1, 3, 3), None, None, ONE, ROUND, ONE, "none", False)
POINTWISE = (draw(1, 64, 8, 8), draw(8, 64, 1, 1), None, None, None, None, "none", True)
CONV = (draw(1, 6, 8, 8), draw(8, 6, 3, 3), None, None, ONE, ROUND, ONE, None, "none")
EXCITE = (draw(1, 16, 4, 4), draw(4, 16), None, draw(16, 4), None, "silu", "sigmoid")
NORM = (draw(2, 8, 4, 4), None, None, draw(8), draw(8).abs(), None, False, 1e-5, "none")
BLOCK = (
    *(draw(1, 8, 6, 6), draw(16, 8, 1, 1), None, None, draw(16, 1, 3, 3), None, None),
    *(draw(4, 16), None, draw(16, 4), None, draw(8, 16, 1, 1), None, None),
    *(ONE, ROUND, ONE, True, "silu", "silu", "sigmoid", "none"),
)
SEPARABLE = (
    *(draw(1, 8, 6, 6), draw(8, 1, 3, 3), None, None, draw(5, 8, 1, 1), None, None),
    *(ONE, ROUND, ONE, None, "silu", "none"),
)

# op, its arguments, which one to replace and by what
CASES: list[tuple[Callable[..., Any], tuple[Any, ...], int, Any]] = [
    (OPS.depthwise_conv, DEPTHWISE, 1, draw(3, 1, 3, 3)),
    (OPS.depthwise_conv, DEPTHWISE, 2, draw(2)),
    (OPS.depthwise_conv, DEPTHWISE, 3, draw(2)),
    (OPS.depthwise_conv, DEPTHWISE, 5, [-1, 1, 1, 1]),
    (OPS.pointwise_conv, POINTWISE, 1, draw(8, 3, 1, 1)),
    (OPS.pointwise_conv, POINTWISE, 3, draw(2)),
    (OPS.pointwise_conv, POINTWISE, 4, draw(1, 3)),
    (OPS.pointwise_conv, POINTWISE, 5, draw(1, 8, 4, 4)),
    (OPS.pointwise_conv, POINTWISE, 5, draw(1, 8, 8, 8).bfloat16()),
    (OPS.conv, CONV, 1, draw(8, 5, 3, 3)),
    (OPS.conv, CONV, 7, draw(1, 8, 7, 8)),
    (OPS.squeeze_excite, EXCITE, 1, draw(4, 15)),
    (OPS.squeeze_excite, EXCITE, 3, draw(16, 5)),
    (OPS.squeeze_excite, EXCITE, 4, draw(3)),
    (OPS.batch_norm_act, NORM, 3, draw(7)),
    (OPS.batch_norm_act, NORM, 1, draw(7)),
    (OPS.batch_norm_act, NORM, 5, draw(1, 8, 4, 4)),
    (OPS.mbconv, BLOCK, 1, draw(17, 8, 1, 1)),
    (OPS.mbconv, BLOCK, 1, None),
    (OPS.mbconv, BLOCK, 4, draw(17, 1, 3, 3)),
    (OPS.mbconv, BLOCK, 7, draw(4, 8)),
    (OPS.mbconv, BLOCK, 11, draw(9, 16, 1, 1)),  # with a residual of 8 channels
    (OPS.mbconv, BLOCK, 13, draw(3)),
    (OPS.depthwise_separable_conv, SEPARABLE, 1, draw(17, 1, 3, 3)),
    (OPS.depthwise_separable_conv, SEPARABLE, 4, draw(5, 9, 1, 1)),
    (OPS.depthwise_separable_conv, SEPARABLE, 10, draw(1, 5, 5, 6)),
]


@pytest.mark.parametrize(
    ("op", "arguments", "index", "wrong"),
    CASES,
    ids=[f"{case[0].__name__}-{case[2]}-{number}" for number, case in enumerate(CASES)],
)
def test_wrong_size_is_an_error(
    op: Callable[..., Any], arguments: tuple[Any, ...], index: int, wrong: Any
) -> None:
    with ek.use_backend("native"):
        op(*arguments)
        with pytest.raises((RuntimeError, ValueError), match="effkernels_cpu"):
            op(*arguments[:index], wrong, *arguments[index + 1 :])


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize(
    ("function", "tensors", "named"),
    [
        (ek.ops.depthwise_conv, (draw(1, 0, 8, 8), draw(0, 1, 3, 3)), "input"),
        (ek.ops.depthwise_conv, (draw(1, 4, 0, 8), draw(4, 1, 3, 3)), "input"),
        (ek.ops.pointwise_conv, (draw(1, 0, 8, 8), draw(8, 0)), "input"),
        (ek.ops.pointwise_conv, (draw(1, 4, 8, 8), draw(0, 4)), "weight"),
        (ek.ops.conv, (draw(1, 4, 8, 0), draw(8, 4, 3, 3)), "input"),
        (ek.ops.conv, (draw(1, 4, 8, 8), draw(0, 4, 3, 3)), "weight"),
    ],
)
def test_empty_dimension_is_an_error(
    function: Callable[..., Any], tensors: tuple[Any, ...], named: str, backend: str
) -> None:
    with ek.use_backend(backend), pytest.raises(ValueError, match=f"{named} has an empty dim"):
        function(*tensors)
