"""Denormal numbers: zero inside kernels, and as before for everybody else."""

from __future__ import annotations

import subprocess
import sys

import torch

from effkernels import ops

TINY = 1e-40


def test_kernels_flush_them(native_kernels: str) -> None:
    x = torch.full((1, 16, 9, 9), -95.0)  # silu of it is -5e-40
    assert torch.equal(ops.silu(x), torch.zeros_like(x))
    weight = torch.eye(16).reshape(16, 16, 1, 1)
    assert torch.equal(ops.pointwise_conv(torch.full_like(x, TINY), weight), torch.zeros_like(x))
    normal = torch.full_like(x, 1.2e-38)
    assert torch.equal(ops.pointwise_conv(normal, weight), normal)


def test_other_code_keeps_them(native_kernels: str) -> None:
    """On this thread and on the pool's."""
    torch.set_num_threads(2)
    x = torch.randn(4, 64, 56, 56)
    ops.depthwise_conv(x, torch.randn(64, 1, 3, 3))
    small = torch.full((1 << 20,), TINY)
    assert float(torch.tensor(TINY) * 0.5) > 0.0
    assert bool((small * 0.5 > 0.0).all())


def test_new_threads_keep_them(native_kernels: str) -> None:
    """A process whose pool is started by one of our ops."""
    code = f"""
import subprocess
import sys

import torch
from effkernels import ops
torch.set_num_threads(1)
x = torch.randn(4, 64, 56, 56).to(memory_format=torch.channels_last)
torch.set_num_threads(2)
ops.depthwise_conv(x, torch.randn(64, 1, 3, 3))
small = torch.full((1 << 20,), {TINY})
assert bool((small * 0.5 > 0.0).all())
"""
    subprocess.run([sys.executable, "-c", code], check=True)
