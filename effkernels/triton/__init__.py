"""The Triton backend: fused kernels for NVIDIA GPUs (compute capability 8.0 and later).

``<op>.py`` holds an op's kernels and the functions that launch them, ``<op>_config.py`` the sizes
they are launched with. Triton is imported on first use: a process that never asks for a GPU does
without it. With ``TRITON_INTERPRET=1`` the kernels run on CPU tensors, slowly, which is how they
are tested where there is no GPU.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..gpu import capability_error

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OLDEST_TRITON = (3, 5)
LEAST_SHARED_MEMORY = 99 * 1024  # bytes a block; every GPU of these capabilities has it

# Ops that live in another op's file.
_MODULES = {"squeeze_excite_gate": "squeeze_excite"}


def interpreted() -> bool:
    """Kernels run in Triton's interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


@functools.cache
def load_error() -> str | None:
    """Why Triton cannot be used in this process, or None if it can."""
    try:
        import triton
    except Exception as error:  # an ImportError, or whatever a broken installation raises
        return f"Triton cannot be imported: {error}"
    version = tuple(int(part) for part in triton.__version__.split("+")[0].split(".")[:2])
    if version < OLDEST_TRITON:
        oldest = ".".join(map(str, OLDEST_TRITON))
        return f"Triton {triton.__version__} is too old, {oldest} or later is needed"
    return None


@functools.cache
def device_error(index: int) -> str | None:
    """Why the kernels cannot run on this CUDA device, or None if they can."""
    properties = torch.cuda.get_device_properties(index)
    error = capability_error(properties)
    if error is not None:
        return error
    shared_memory = getattr(properties, "shared_memory_per_block_optin", LEAST_SHARED_MEMORY)
    if shared_memory < LEAST_SHARED_MEMORY:
        return (
            f"{properties.name} has {shared_memory} bytes of shared memory a block, "
            f"{LEAST_SHARED_MEMORY} are needed"
        )
    return None


def status() -> tuple[bool, str]:
    """Whether the backend can be used in this process, and why (not)."""
    error = load_error()
    if error is not None:
        return False, error
    if interpreted():
        return True, "Triton's interpreter (TRITON_INTERPRET), for tests: slow, on CPU tensors"
    if not torch.cuda.is_available():
        return False, "no CUDA device"
    error = device_error(torch.cuda.current_device())
    if error is not None:
        return False, error
    import triton

    return True, f"Triton {triton.__version__} on {torch.cuda.get_device_name()}"


def can_run(input: Tensor, *rest: Any) -> str | None:
    """None if the Triton kernels can run an op on these arguments, else the reason why not."""
    error = load_error()
    if error is not None:
        return error
    device = input.device
    if device.type == "cuda":
        if interpreted():
            return "TRITON_INTERPRET is set, which is for CPU tensors"
        index = torch.cuda.current_device() if device.index is None else device.index
        error = device_error(index)
        if error is not None:
            return error
    elif not (device.type == "meta" or (device.type == "cpu" and interpreted())):
        return f"input is on {device}; the Triton kernels run on CUDA devices"
    if input.dtype not in DTYPES:
        return f"input has dtype {input.dtype}; float32, bfloat16 and float16 are accepted"
    return None


def function(op: str, name: str | None = None) -> Callable[..., Any]:
    """``effkernels.triton.<op>.<name>`` (``name`` is ``op``'s if not given), imported when it is
    first called."""

    @functools.cache
    def load() -> Callable[..., Any]:
        module = importlib.import_module(f"{__name__}.{_MODULES.get(op, op)}")
        found: Callable[..., Any] = getattr(module, name or op)
        return found

    def call(*arguments: Any, **options: Any) -> Any:
        return load()(*arguments, **options)

    return call
