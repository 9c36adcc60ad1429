"""What the kernels of `reduce` promise; they have one size each."""

from __future__ import annotations

from .launch import Launch
from .promises import Promise


def promise(launch: Launch) -> Promise:
    """Half of a processor's warps: partial results are few, and read from the L2."""
    return Promise(warps=32)
