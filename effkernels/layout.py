"""Shapes and memory layout, shared by the ops and the native kernels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def nhwc(input: Tensor) -> Tensor:
    """``input`` [N, C, H, W] dense in NHWC order (channels_last); itself if it already is.

    What a torch.func transform hands out too: vmap refuses to look at its layout.
    """
    if torch._C._functorch.is_functorch_wrapped_tensor(input):
        return input
    return input.contiguous(memory_format=torch.channels_last)


def ordered_like(tensor: Tensor, output: Tensor) -> Tensor:
    """``tensor`` with its elements in the order of ``output``'s in memory, in its dtype; itself if
    they are."""
    if tensor.stride() == output.stride() and tensor.dtype == output.dtype:
        return tensor
    return torch.empty_like(output).copy_(tensor)


def empty_nhwc(input: Tensor, channels: int, height: int, width: int) -> Tensor:
    """An uninitialised channels_last [N, channels, height, width] like ``input``."""
    return torch.empty(
        (input.shape[0], channels, height, width),
        dtype=input.dtype,
        device=input.device,
        memory_format=torch.channels_last,
    )


def output_size(
    size: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> tuple[int, int]:
    """Height and width of a convolution's output; ``padding`` as (left, right, top, bottom)."""
    left, right, top, bottom = padding
    height = (size[0] + top + bottom - dilation[0] * (kernel[0] - 1) - 1) // stride[0] + 1
    width = (size[1] + left + right - dilation[1] * (kernel[1] - 1) - 1) // stride[1] + 1
    return height, width
