"""Every kernel test runs once per instruction set of this machine."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

import effkernels as ek
from effkernels import native
from effkernels.testing import use_cpu_isa

# Without compiled kernels the parity tests still run, the reference against float64, and what
# only native code can fail is skipped.
INSTRUCTION_SETS = native.cpu_isas() or ["reference"]


@pytest.fixture(params=INSTRUCTION_SETS)
def kernels(request: pytest.FixtureRequest) -> Iterator[str]:
    """The backend to test, "native" on one instruction set after the other."""
    if request.param == "reference":
        if os.environ.get("EFFKERNELS_REQUIRE_NATIVE"):
            pytest.fail(f"native kernels are required: {ek.backends()['native'].reason}")
        yield "reference"
        return
    with use_cpu_isa(request.param):
        yield "native"


@pytest.fixture
def native_kernels(kernels: str) -> str:
    """As ``kernels``, for what only compiled code can get wrong."""
    if kernels != "native":
        pytest.skip(ek.backends()["native"].reason)
    return kernels


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param
