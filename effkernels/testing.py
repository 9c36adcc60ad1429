"""How tests decide that a result is right: no worse than PyTorch's own, against float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from . import native

__all__ = ["assert_close_to", "assert_matches", "use_cpu_isa"]

# Our error may be this many times PyTorch's own in the same dtype...
FACTOR = 2.0
# ... plus half an epsilon of the dtype (what rounding the exact result may cost) and two of
# float32 (a sum in another order), for small cases where PyTorch happens to be exact.


def relative_error(actual: Tensor, reference: Tensor) -> float:
    """‖actual − reference‖ / ‖reference‖ in float64."""
    difference = (actual.double() - reference.double()).norm()
    return float(difference / reference.double().norm().clamp_min(1e-300))


def assert_close_to(
    reference: Tensor, actual: Tensor, baseline: Tensor, name: str = "result"
) -> None:
    """``actual`` is as close to ``reference`` as PyTorch's ``baseline`` is, up to a small factor.

    Both the error's norm and its largest element are held to FACTOR times the baseline's plus
    2.4e-7 (bfloat16: 0.004) of the reference's. NaN and infinities must agree.

    Args:
        reference: the float64 result.
        actual: what is being tested.
        baseline: the same computed by PyTorch in ``actual``'s dtype.
        name: what the message calls it.
    """
    assert actual.shape == reference.shape, f"{name}: shape {actual.shape}, {reference.shape} due"
    assert actual.dtype == baseline.dtype, f"{name}: dtype {actual.dtype}, {baseline.dtype} due"
    if reference.numel() == 0:
        return
    expected, got, stock = reference.double(), actual.double(), baseline.double()
    special = ~expected.isfinite()
    if special.any():
        assert torch.equal(
            torch.nan_to_num(got[special], nan=0.5), torch.nan_to_num(expected[special], nan=0.5)
        ), f"{name}: NaN or infinity differ"
        expected, got, stock = expected[~special], got[~special], stock[~special]
        if expected.numel() == 0:
            return
    # (PyTorch 2.14's bfloat16 convolution has NaN of its own on CPUs with AMX now and then.)
    own_error = torch.where(stock.isfinite(), stock - expected, 0.0)
    epsilon = max(0.5 * torch.finfo(actual.dtype).eps, 2 * torch.finfo(torch.float32).eps)
    for measure, size in ((torch.linalg.vector_norm, "norm"), (_largest, "largest element")):
        error = float(measure(got - expected))
        allowed = FACTOR * float(measure(own_error)) + epsilon * float(measure(expected))
        assert error <= allowed, (
            f"{name}: {size} of the error is {error:.3e}, {allowed:.3e} is allowed "
            f"(PyTorch's own {float(measure(own_error)):.3e}, "
            f"of the reference {float(measure(expected)):.3e})"
        )


def _largest(values: Tensor) -> Tensor:
    return values.abs().max()


def _map(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """``value`` with ``change`` applied to every floating-point tensor in it."""
    if isinstance(value, Tensor):
        return change(value) if value.is_floating_point() else value
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_map(item, change) for item in value))
    if isinstance(value, (list, tuple)):
        return type(value)(_map(item, change) for item in value)
    if isinstance(value, dict):
        return {key: _map(item, change) for key, item in value.items()}
    return value


def assert_matches(
    function: Callable[..., Any], *arguments: Any, backend: str = "native", **options: Any
) -> None:
    """``function`` of these tensors on ``backend`` is as accurate as on the reference backend."""
    from .dispatch import use_backend

    doubles = _map(arguments, lambda tensor: tensor.double())
    double_options = _map(options, lambda tensor: tensor.double())
    with use_backend("reference"):
        expected = function(*doubles, **double_options)
        baseline = function(*arguments, **options)
    with use_backend(backend):
        actual = function(*arguments, **options)
    if isinstance(expected, Tensor):
        expected, baseline, actual = (expected,), (baseline,), (actual,)
    for index, (due, stock, got) in enumerate(zip(expected, baseline, actual, strict=True)):
        assert_close_to(due, got, stock, name=f"output {index}")


@contextmanager
def use_cpu_isa(name: str) -> Iterator[None]:
    """Run the native CPU kernels of one instruction set inside the ``with`` block."""
    before = native.cpu_isa()
    native.set_cpu_isa(name)
    try:
        yield
    finally:
        native.set_cpu_isa(before)
