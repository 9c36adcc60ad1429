"""The CUDA kernels are tested on the GPU where there is one, else as host C++ on CPU tensors."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import effkernels as ek
from effkernels import cuda
from tests.cuda import emulated

ON_GPU = torch.cuda.is_available() and cuda.load_error() is None


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if ON_GPU else "cpu")


@pytest.fixture
def kernels(device: torch.device) -> Iterator[None]:
    """The native backend is the CUDA kernels, and every op of the test runs on it."""
    with ek.use_backend("native"):
        if device.type == "cuda":
            yield
            return
        emulated.load()
        emulated.configure()
        with cuda.emulated():
            yield


@pytest.fixture(params=cuda.DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param
