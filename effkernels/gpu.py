"""What the backends on NVIDIA GPUs share: which devices they are for, and small tensors."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .cache import cached

OLDEST_CAPABILITY = (8, 0)  # bfloat16 arithmetic, cp.async


def capability_error(properties: Any) -> str | None:
    """Why the kernels are not for a device with these properties (PyTorch's), or None."""
    if torch.version.hip is not None:
        return f"{properties.name} is an AMD GPU; NVIDIA GPUs are supported"
    capability = (properties.major, properties.minor)
    if capability < OLDEST_CAPABILITY:
        return (
            f"{properties.name} has compute capability {capability[0]}.{capability[1]}, "
            f"{OLDEST_CAPABILITY[0]}.{OLDEST_CAPABILITY[1]} or later is needed"
        )
    return None


class Convolved(NamedTuple):
    """What a depthwise convolution gives, on either backend."""

    output: Tensor  # [N, C, H', W'] channels_last
    mean: Tensor | None  # [N, C] float32: the spatial mean of the output
    moments: tuple[Tensor, Tensor] | None  # [C] float32 each: mean and biased variance of it
    partial_means: Tensor | None  # [N, blocks, C] float32: sums whose sum is that over pixels


def pack_taps(weight: Tensor) -> Tensor:
    """[C, 1, kh, kw] -> [kh · kw, C], dense: a view where memory is in that order already."""
    view = weight.detach().flatten(1).t()
    if view.is_contiguous() or weight.device.type == "meta":
        return view.contiguous()
    return cached("depthwise_taps", (weight,), view.contiguous)


def float32_like(like: Tensor, *shape: int) -> Tensor:
    """An uninitialised float32 tensor of this shape beside ``like``."""
    return torch.empty(shape, dtype=torch.float32, device=like.device)
