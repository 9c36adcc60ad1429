"""Tiles that the depthwise kernels of csrc/depthwise_conv run with."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

_THREADS = 128  # of a block, at most; csrc/depthwise_conv/cuda.h kDepthwiseThreads
_PAIRS = (8, 16, 24, 32, 48, 64)
_FEWEST_THREADS = 64  # of a block
_WARPS = {3: 16, 5: 12, 7: 8}  # that registers allow on a processor, by the kernel's size
_FETCHING = 3  # steps of a block before its first


@dataclass(frozen=True)
class DepthwiseTile:
    """What a block works on: ``pairs`` x ``strips`` x ``images`` threads.

    Attributes:
        pairs: of channels.
        strips: of :func:`columns` neighbouring outputs, side by side; they share their input.
        images: of the batch.
        rows: outputs below each other. A block reads kernel - stride rows more than it needs.
    """

    pairs: int
    strips: int
    images: int
    rows: int

    def numbers(self) -> list[int]:
        """As the kernels take it."""
        return [self.pairs, self.strips, self.images, self.rows]


def columns(kernel: Sequence[int]) -> int:
    """Outputs of a thread, side by side; csrc/depthwise_conv/cuda.h depthwise_columns."""
    return 4 if kernel[0] == 7 else 7


def gradient_columns(stride: Sequence[int]) -> int:
    """The same of groups of ``stride`` inputs; cuda.h depthwise_gradient_columns."""
    return 7 if stride[0] == 1 else 4


def is_tuned(
    kernel: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    between: Sequence[int] = (1, 1),
) -> bool:
    """Whether the window fits into registers; csrc/depthwise_conv/cuda.cu depthwise_is_tuned."""
    return (
        kernel[0] == kernel[1]
        and kernel[0] in (3, 5, 7)
        and stride[0] == stride[1]
        and stride[0] <= 2
        and tuple(dilation) == (1, 1)
        and tuple(between) == (1, 1)
    )


def groups(before: int, size: int, stride: int) -> int:
    """Groups of ``stride`` rows that an image's are in, counted with ``before`` of padding."""
    return -(-(before + size) // stride) - before // stride


def gradient_is_tuned(
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    size: Sequence[int],
    up_size: Sequence[int],
) -> bool:
    """Whether one kernel gives both gradients; cuda.cu depthwise_gradient_is_tuned."""

    def in_reach(before: int, size: int, up_size: int) -> bool:
        reach = -(-kernel[0] // stride[0])
        return before // stride[0] < reach and up_size <= -(-(before + size) // stride[0])

    left, _, top, _ = padding
    return (
        is_tuned(kernel, stride, dilation)
        and kernel[0] <= 5
        and in_reach(top, size[0], up_size[0])
        and in_reach(left, size[1], up_size[1])
    )


def shared_memory(
    tile: DepthwiseTile, kernel: int, stride: int, itemsize: int, gradient: bool
) -> int:
    """Bytes that a block has at most; ``forward_shared`` and ``gradient_shared`` of csrc."""
    kept, vectors = 16 * _THREADS, 64  # bytes of what threads keep, of a pair's vectors
    if gradient:
        groups = tile.strips * gradient_columns((stride, stride))
        reach = -(-kernel // stride)
        values = (reach + 4) * (groups + reach - 1) + 5 * stride * groups * stride
        return tile.images * tile.pairs * (values * 2 * itemsize + 2 * vectors) + 5 * kept
    outputs = tile.strips * columns((kernel, kernel))
    tensors = 2 if stride == 1 else 1  # with z
    rows = tensors * (4 if stride == 1 else 3 * stride)
    values = rows * ((outputs - 1) * stride + kernel) + 2 * outputs
    return tile.images * tile.pairs * (values * 2 * itemsize + vectors) + 4 * kept


@functools.lru_cache(maxsize=4096)
def choose(
    batch: int,
    channels: int,
    height: int,
    width: int,
    kernel: int,
    stride: int,
    itemsize: int,
    gradient: bool,
    processors: int,
    limit: int,
) -> DepthwiseTile:
    """The tile for outputs of this size, or for inputs in groups of ``stride``: not measured.

    No block has more than ``limit`` bytes of shared memory.

    Channels, strips and images: the share of threads that have something to do decides, for a
    column that sticks out of the image, an idle thread and a channel too many cost as much as
    others. Among equals more pairs, whose pixels are read in longer pieces (up to 128 bytes of two
    a value), then more strips, which share the columns between them.

    Rows: the fewest steps, counted over the times that the device has to be filled with blocks. A
    block's first steps fetch, and finish no row.
    """
    across = gradient_columns((stride, stride)) if gradient else columns((kernel, kernel))
    vector = 8 // itemsize  # pairs in 16 bytes
    best: tuple[tuple[float, int, int], DepthwiseTile] | None = None
    most = -(-width // across)
    for pairs in _PAIRS:
        if pairs % vector:
            continue
        for strips in range(1, min(most, _THREADS // pairs) + 1):
            for images in range(1, max(1, min(batch, _THREADS // (pairs * strips))) + 1):
                used = pairs * strips * images
                if used < _FEWEST_THREADS and images < batch and 2 * used <= _THREADS:
                    continue  # a block of one warp waits for its own loads
                tile = DepthwiseTile(pairs, strips, images, max(1, height))
                if shared_memory(tile, kernel, stride, itemsize, gradient) > limit:
                    continue
                threads = -(-used // 32) * 32
                blocks = -(-channels // (2 * pairs)) * -(-most // strips) * -(-batch // images)
                share = batch * channels * width / (blocks * threads * 2 * across)
                key = (round(share, 3), min(pairs, 32), strips)
                if best is None or key > best[0]:
                    best = key, tile
    assert best is not None
    tile = best[1]
    used = tile.pairs * tile.strips * tile.images
    across_device = processors * max(1, _WARPS[kernel] // -(-used // 32))  # blocks at a time
    blocks = -(-channels // (2 * tile.pairs)) * -(-most // tile.strips) * -(-batch // tile.images)
    extra = -(-kernel // stride) - 1 + _FETCHING

    def steps(parts: int) -> float:
        rows = -(-height // parts)
        fillings = blocks * -(-height // rows) / across_device
        # The last filling takes as long as a whole one, but many are out of step by then.
        return (fillings + 0.5 if fillings > 2 else -(-fillings // 1)) * (rows + extra)

    parts = min(range(1, max(1, height) + 1), key=steps)
    return DepthwiseTile(tile.pairs, tile.strips, tile.images, max(1, -(-height // parts)))
