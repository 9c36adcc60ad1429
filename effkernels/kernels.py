"""The backends whose kernels a recorded forward pass can be made of.

Each is a module with ``NAME``, ``COPIES``, ``can_run``, ``variant``, functions ``pack_<op>`` that
give an op's weights, geometry and activations as its kernels take them, and ``Program``, steps in a
row as one call.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from . import native
from .dispatch import backends_for, requested
from .triton import program as triton

_MODULES = {"native": native, "triton": triton}


def kernels_for(input: Tensor) -> Any | None:
    """The backend that the rule of :mod:`effkernels.dispatch` gives for ops on ``input``; None if
    that is the reference, which has no kernels."""
    if input.device.type == "meta":
        return None
    for name in backends_for(input):
        module: Any = _MODULES.get(name)
        if module is None:
            return None
        if module.can_run(input) is None:
            return module
    return None


def why_no_kernels(input: Tensor) -> str:
    """Why :func:`kernels_for` gives None for ``input``."""
    choice = requested()
    reasons = [_MODULES[name].can_run(input) for name in backends_for(input) if name in _MODULES]
    if choice != "auto" and not reasons:
        return f"backend {choice!r} was asked for"
    return "; ".join(filter(None, reasons)) or f"no kernels for {input.device.type}"
