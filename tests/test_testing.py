"""The measure that every parity test relies on: it must fail what is wrong."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch

from effkernels import dispatch, ops
from effkernels.testing import assert_close_to, assert_matches, relative_error


@pytest.fixture
def exact() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1000, generator=generator, dtype=torch.float64)


def test_relative_error():
    reference = torch.tensor([3.0, 4.0], dtype=torch.float64)
    assert relative_error(torch.tensor([3.0, 4.5]), reference) == pytest.approx(0.1)
    assert relative_error(reference, reference) == 0.0
    assert relative_error(torch.zeros(2), torch.zeros(2)) == 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_of_the_exact_result_passes(exact, dtype):
    rounded = exact.to(dtype)
    assert_close_to(exact, rounded, rounded)
    assert_close_to(exact, rounded, (exact * (1 + torch.finfo(dtype).eps)).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_errors_beyond_those_of_pytorch_fail(exact, dtype):
    stock = exact.to(dtype)
    wrong = (exact * (1 + 4 * torch.finfo(dtype).eps)).to(dtype)
    with pytest.raises(AssertionError, match="norm of the error is"):
        assert_close_to(exact, wrong, stock)
    assert_close_to(exact, wrong, wrong)  # PyTorch errs as much: accepted


def test_nan_of_pytorch_itself_is_no_excuse(exact):
    """Where the baseline is NaN it allows nothing, and what is tested must be right."""
    stock = exact.float()
    stock[3] = float("nan")
    assert_close_to(exact, exact.float(), stock)
    with pytest.raises(AssertionError, match="norm of the error is"):
        assert_close_to(exact, exact.float() * 1.01, stock)
    with pytest.raises(AssertionError, match="norm of the error is"):
        assert_close_to(exact, stock, stock)


def test_one_wrong_element_fails(exact):
    """The norm of a thousand hides it, the largest does not."""
    stock = exact.float() * (1 + 1e-6)
    wrong = stock.clone()
    wrong[17] += 2e-5
    assert float((wrong - exact).norm()) < 2 * float((stock - exact).norm())
    with pytest.raises(AssertionError, match="largest element of the error"):
        assert_close_to(exact, wrong, stock)


def test_zeros_fail(exact):
    with pytest.raises(AssertionError, match="norm"):
        assert_close_to(exact, torch.zeros(1000), exact.float())


def test_an_exact_zero_must_be_met():
    with pytest.raises(AssertionError):
        assert_close_to(torch.zeros(3).double(), torch.full((3,), 1e-30), torch.zeros(3))
    assert_close_to(torch.zeros(3).double(), torch.zeros(3), torch.zeros(3))


@pytest.mark.parametrize("got", [0.0, 1.0, torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("due", [torch.inf, -torch.inf, torch.nan])
def test_special_values_must_agree(exact, due, got):
    expected, actual = exact.clone(), exact.float()
    expected[5], actual[5] = due, got
    if str(due) == str(got):
        assert_close_to(expected, actual, exact.float())
    else:
        with pytest.raises(AssertionError, match="NaN or infinity differ"):
            assert_close_to(expected, actual, exact.float())


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_special_values_that_are_not_due_fail(exact, value):
    actual = exact.float()
    actual[5] = value
    with pytest.raises(AssertionError):
        assert_close_to(exact, actual, exact.float())


def test_shape_and_dtype_must_agree(exact):
    with pytest.raises(AssertionError, match="out: shape .* due"):
        assert_close_to(exact, exact.float().view(10, 100), exact.float(), "out")
    with pytest.raises(AssertionError, match="out: dtype torch.float64, torch.float32 due"):
        assert_close_to(exact, exact, exact.float(), "out")
    assert_close_to(torch.empty(0, 3).double(), torch.empty(0, 3), torch.empty(0, 3))


class Pair(NamedTuple):
    input: torch.Tensor
    name: str


def test_matches_converts_structures():
    """Float64 goes as deep as the arguments do, and leaves everything else."""
    seen = []

    def function(pair: Pair, numbers: list[int], *, options: dict[str, torch.Tensor]):
        tensor = options["index"]
        seen.append((type(pair), pair.input.dtype, numbers, tensor.dtype))
        return pair.input * 2, ops.activation(pair.input, pair.name)

    arguments = Pair(torch.randn(5), "relu"), [1, 2]
    assert_matches(function, *arguments, backend="reference", options={"index": torch.arange(3)})
    assert [dtype for _, dtype, _, _ in seen] == [torch.float64, torch.float32, torch.float32]
    assert {(kind, index) for kind, _, _, index in seen} == {(Pair, torch.int64)}


def test_matches_sees_a_broken_kernel(monkeypatch):
    operator = dispatch.operators["silu"]
    broken = dispatch.Implementation(
        lambda *_: None, lambda x, name: torch.sigmoid(x) * x * 1.00001
    )
    monkeypatch.setitem(operator.implementations, "native", broken)
    with pytest.raises(AssertionError, match="output 0: norm of the error"):
        assert_matches(ops.silu, torch.randn(100))
    right = operator.implementations["reference"]
    monkeypatch.setitem(operator.implementations, "native", right)
    assert_matches(ops.silu, torch.randn(100))
