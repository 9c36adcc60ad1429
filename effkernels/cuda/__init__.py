"""The native backend on NVIDIA GPUs: kernels in CUDA C++, compute capability 8.0 and later.

``<op>.py`` has the functions ``<op>`` and ``<op>_backward``, which lay tensors out, allocate the
outputs and call ``effkernels_cuda::<kernel>`` (`csrc/bindings/cuda.cpp`). On a machine without a
GPU the kernels are tested as host C++ on CPU tensors: see :func:`emulated`.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..build_info import read_build_info, why_not_built
from ..gpu import capability_error

# ops -> the file here that has them; without gradient kernels: in _WITHOUT_BACKWARD
_OPS = {
    "batch_norm_act": "batch_norm_act",
    "depthwise_conv": "depthwise_conv",
    "mbconv": "mbconv",
    "pointwise_conv": "pointwise_conv",
    "silu": "silu",
    "squeeze_excite": "squeeze_excite",
    "squeeze_excite_gate": "squeeze_excite",
}
_WITHOUT_BACKWARD: frozenset[str] = frozenset({"mbconv", "pointwise_conv"})

# Ops whose CUDA C++ comes before Triton's in "auto". Not measured, no GPU has run either: forward
# both move the same bytes in as many instructions; backward CUDA C++ reads the gradient and the
# output once for both gradients, and so moves 4 tensors where Triton's two kernels move 6.
BEFORE_TRITON = frozenset({"depthwise_conv"})

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_emulating = False


@functools.cache
def load_error() -> str | None:
    """Why the CUDA kernels cannot be used in this process, or None if they can. Loads them."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    path = Path(__file__).parents[1] / "_cuda.so"
    if not path.exists():
        return f"the CUDA kernels were not built: {why_not_built('cuda')}"
    try:
        torch.ops.load_library(str(path))
    except (OSError, RuntimeError) as error:
        return f"{path} cannot be loaded: {error}"
    return None


@functools.cache
def device_error(index: int) -> str | None:
    """Why the kernels cannot run on this CUDA device, or None if they can."""
    properties = torch.cuda.get_device_properties(index)
    error = capability_error(properties)
    if error is not None:
        return error
    capability = (properties.major, properties.minor)
    info = read_build_info()
    built = info["modules"]["cuda"].get("architectures", []) if info else []
    if not any(runs_on(name, capability) for name in built):
        return (
            f"the CUDA kernels were built for {', '.join(built)}, {properties.name} has "
            f"{capability[0]}.{capability[1]} (TORCH_CUDA_ARCH_LIST)"
        )
    return None


def runs_on(architecture: str, capability: tuple[int, int]) -> bool:
    """Whether code for ``architecture``, as TORCH_CUDA_ARCH_LIST has it, runs on this device:
    machine code within its major version, PTX on everything later, "9.0a" on 9.0 alone."""
    name = architecture.removesuffix("+PTX")
    major, minor = (int(part) for part in name.rstrip("af").split("."))
    if name.endswith("a"):
        return capability == (major, minor)
    if architecture.endswith("+PTX") and capability >= (major, minor):
        return True
    return capability[0] == major and capability[1] >= minor


def device_limits(input: Tensor) -> tuple[int, int]:
    """Processors of ``input``'s device, and bytes of shared memory that a block may have."""
    if _emulating:
        return EMULATED_LIMITS
    index = input.device.index
    return _limits(torch.cuda.current_device() if index is None else index)


@functools.cache
def _limits(index: int) -> tuple[int, int]:
    properties = torch.cuda.get_device_properties(index)
    shared: int = getattr(properties, "shared_memory_per_block_optin", _LEAST_SHARED)
    return properties.multi_processor_count, shared


_LEAST_SHARED = 99 * 1024  # of any device that the kernels run on
EMULATED_LIMITS = (132, 227 * 1024)  # of an H100


@contextmanager
def emulated() -> Iterator[None]:
    """The native backend takes CPU tensors to an emulated GPU inside the ``with`` block, for tests:
    ``effkernels_cuda`` must be loaded, compiled as host C++."""
    global _emulating
    _emulating = True
    try:
        yield
    finally:
        _emulating = False


def takes(input: Tensor) -> bool:
    """Whether the native backend means CUDA kernels for this tensor."""
    return input.device.type == "cuda" or _emulating


def can_run(input: Tensor, *rest: Any) -> str | None:
    """None if the CUDA kernels can run an op on these arguments, else the reason why not."""
    if not _emulating:
        error = load_error()
        if error is not None:
            return error
        index = input.device.index
        error = device_error(torch.cuda.current_device() if index is None else index)
        if error is not None:
            return error
    if input.dtype not in DTYPES:
        return f"input has dtype {input.dtype}; float32, bfloat16 and float16 are accepted"
    return None


def implementation(op: str, make: Callable[..., Any]) -> Any:
    """``make(can_run, run, backward)`` of ``op``'s functions here; None if it has none."""
    if op not in _OPS:
        return None
    backward = None if op in _WITHOUT_BACKWARD else _function(_OPS[op], f"{op}_backward")
    return make(_function(_OPS[op], "can_run"), _function(_OPS[op], op), backward)


def _function(module: str, name: str) -> Callable[..., Any]:
    """``effkernels.cuda.<module>.<name>``, imported when it is first called."""

    @functools.cache
    def load() -> Callable[..., Any]:
        found: Callable[..., Any] = getattr(importlib.import_module(f"{__name__}.{module}"), name)
        return found

    return lambda *arguments: load()(*arguments)
