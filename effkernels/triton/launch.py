"""The one place where kernels are launched, and what is known about the device they run on.

:func:`collect` notes launches instead of making them, so that everything a model needs can be
compiled ahead of time, on meta tensors, for a device that is not there.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int32: "*i32",
}
_ALIGNMENT = 16  # bytes
_INT32 = 2**31
_IDLE_END = 2**20  # elements; no block is larger


@dataclass(frozen=True)
class Device:
    """What heuristics look at."""

    name: str
    capability: tuple[int, int]
    processors: int  # streaming multiprocessors
    shared_memory: int  # bytes that one block may have
    l2: int  # bytes


# For tests and for compiling ahead of time; sizes as published by NVIDIA.
A100 = Device("NVIDIA A100-SXM4-80GB", (8, 0), 108, 163 * 1024, 40 * 2**20)
H100 = Device("NVIDIA H100 80GB HBM3", (9, 0), 132, 227 * 1024, 50 * 2**20)
B200 = Device("NVIDIA B200", (10, 0), 148, 227 * 1024, 126 * 2**20)


@dataclass(frozen=True)
class Launch:
    """A launch as far as the compiler sees it."""

    kernel: Any
    signature: tuple[tuple[str, str], ...]  # parameter, type
    constants: tuple[tuple[str, Any], ...]
    aligned: tuple[str, ...]  # parameters that are multiples of 16
    num_warps: int
    num_stages: int
    max_registers: int | None  # of a thread


_collecting: ContextVar[tuple[Device, dict[Launch, None]] | None] = ContextVar(
    "effkernels_collecting", default=None
)


@contextmanager
def collect(device: Device) -> Iterator[dict[Launch, None]]:
    """Launches inside the ``with`` block are noted, each once, as if on ``device``, and not made.

    Meta tensors will do as arguments of ops.
    """
    launches: dict[Launch, None] = {}
    token = _collecting.set((device, launches))
    try:
        yield launches
    finally:
        _collecting.reset(token)


@functools.cache
def _properties(index: int) -> Device:
    p = torch.cuda.get_device_properties(index)
    return Device(
        p.name,
        (p.major, p.minor),
        p.multi_processor_count,
        getattr(p, "shared_memory_per_block_optin", 99 * 1024),
        p.L2_cache_size,
    )


def device_of(tensor: Tensor) -> Device:
    """The device whose kernels ``tensor`` will be given to."""
    collecting = _collecting.get()
    if collecting is not None:
        return collecting[0]
    if tensor.device.type == "cuda":
        index = tensor.device.index
        return _properties(torch.cuda.current_device() if index is None else index)
    return H100  # the interpreter takes the decisions of this one


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    *arguments: Any,
    num_warps: int = 4,
    num_stages: int = 1,
    max_registers: int | None = None,
    **constants: Any,
) -> None:
    """``kernel[grid](*arguments, **constants)`` on the first tensor's device, current stream.

    Args:
        arguments: tensors, integers, floats and None, in the kernel's order.
        max_registers: of a thread; None: as many as the compiler likes.
        constants: its ``tl.constexpr`` parameters.
    """
    collecting = _collecting.get()
    if collecting is not None:
        signature = _describe(kernel, arguments, constants)
        collecting[1][Launch(kernel, *signature, num_warps, num_stages, max_registers)] = None
        return
    if 0 in grid:
        return
    tensor = next(argument for argument in arguments if isinstance(argument, Tensor))
    with torch.cuda.device_of(tensor):
        kernel[grid](
            *arguments,
            **constants,
            num_warps=num_warps,
            num_stages=num_stages,
            maxnreg=max_registers,
        )


def _describe(
    kernel: Any, arguments: tuple[Any, ...], constants: dict[str, Any]
) -> tuple[tuple[tuple[str, str], ...], tuple[tuple[str, Any], ...], tuple[str, ...]]:
    """As ``triton.jit`` would specialise the call; see :func:`effkernels.triton.language.kernel`"""
    signature: list[tuple[str, str]] = []
    fixed: list[tuple[str, Any]] = []
    aligned: list[str] = []
    names = kernel.arg_names
    for name, value in zip(
        names, (*arguments, *[constants.get(n) for n in names[len(arguments) :]]), strict=True
    ):
        if name in constants or value is None:
            signature.append((name, "constexpr"))
            fixed.append((name, value))
        elif isinstance(value, Tensor):
            signature.append((name, _TYPES[value.dtype]))
            if value.storage_offset() * value.element_size() % _ALIGNMENT == 0:
                aligned.append(name)
        elif isinstance(value, float):
            signature.append((name, "fp32"))
        else:
            signature.append((name, "i32" if -_INT32 <= value < _INT32 else "i64"))
    return tuple(signature), tuple(fixed), tuple(aligned)


def vector_width(dtype: torch.dtype, *sizes: int) -> int:
    """How many values of ``dtype`` one access moves if rows have these ``sizes``: 16 bytes' worth
    where every size is a multiple of it, else the largest power of two that divides them all."""
    width = _ALIGNMENT // dtype.itemsize
    while any(size % width for size in sizes):
        width //= 2
    return width


def is_wide(*tensors: Tensor | None) -> bool:
    """Whether offsets into these need 64 bits; those of a last block's idle end count, too."""
    return any(tensor is not None and tensor.numel() >= _INT32 - _IDLE_END for tensor in tensors)


def product_precision(dtype: torch.dtype) -> str:
    """What float32 operands of a product are multiplied in: as PyTorch's convolutions do it."""
    if dtype == torch.float32 and not torch.backends.cudnn.allow_tf32:
        return "tf32x3"
    return "tf32"  # no other type looks at it
