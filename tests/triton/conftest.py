"""Triton kernels are tested on the GPU where there is one, else in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import effkernels as ek
from effkernels import triton


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cpu" if triton.interpreted() else "cuda")


@pytest.fixture(autouse=True)
def _on_triton() -> Iterator[None]:
    """Every op of a test runs on the Triton backend."""
    available, reason = triton.status()
    if not available:
        pytest.fail(f"the Triton kernels cannot be tested: {reason}")
    with ek.use_backend("triton"):
        yield


@pytest.fixture(params=triton.DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param
