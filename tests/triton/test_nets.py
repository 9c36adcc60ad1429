"""The nets catch kernels that are broken on purpose: each test below fails one of them."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from effkernels.testing import assert_close_to
from effkernels.triton.language import activate, kernel
from effkernels.triton.launch import launch


@kernel
def _wrong_tail(output_ptr, input_ptr, elements, BLOCK: tl.constexpr):
    """Silu, with a mask that forgets the last element."""
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(input_ptr + offsets, mask=offsets < elements).to(tl.float32)
    tl.store(output_ptr + offsets, activate(x, "silu"), mask=offsets < elements - 1)


def test_poison_shows_a_wrong_tail(device):
    input = torch.randn(100, device=device)
    output = torch.full_like(input, torch.nan)
    launch(_wrong_tail, (triton.cdiv(100, 64),), output, input, 100, BLOCK=64)
    expected = torch.nn.functional.silu(input)
    with pytest.raises(AssertionError):
        assert_close_to(expected.double(), output, expected)
