"""The nets catch kernels that are broken on purpose: each test below fails one of them."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from effkernels.testing import assert_close_to
from effkernels.triton import silu, silu_config
from effkernels.triton.language import activate, kernel
from effkernels.triton.launch import launch
from effkernels.triton.promises import Promise
from tests.triton import aot


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


def digests() -> dict[str, str]:
    """Of the record of compiled launches, as what a result follows from changes."""
    original = silu_config.promise

    def of(capability: int = 90, name: str = "silu", block: int = 1024, warps: int = 4) -> str:
        tensors = ("output_ptr", "*fp32"), ("input_ptr", "*fp32"), ("elements", "i32")
        source = getattr(silu, f"_{name}_kernel")
        constants = ("VECTOR", 4), ("ACTIVATION", "silu"), ("BLOCK", block), ("WIDE", False)
        launch = aot.Launch(source, tensors, constants, (), warps, 1, None)
        return aot.digest([launch], capability)

    found = {
        "first": of(),
        "again": of(),
        "device": of(capability=80),
        "kernel": of(name="silu_backward"),
        "constant": of(block=512),
        "warps": of(warps=8),
    }
    silu_config.promise = lambda launch: Promise(warps=1)
    found["promise"] = of()
    silu_config.promise = original
    return found


def test_record_of_compiled_launches_knows_what_changed():
    found = aot.result_of(f"{__name__}:digests")
    assert found.pop("first") == found.pop("again") not in found.values()
    assert len(set(found.values())) == 5
