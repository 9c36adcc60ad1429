"""Which tile of its output a block of the fused expansion and depthwise convolution takes."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import NamedTuple

# csrc/mbconv/cuda.cu
_CHANNELS = 32  # expanded at a time
_STRIPS = 16  # of 4 x 4 outputs, convolved at a time
_TILE = 4
_WARPS = 8
_CHUNK = 16  # bytes
KERNELS = (3, 5)
STRIDES = (1, 2)
# A processor keeps 1 KB of shared memory for itself for every block.
_OVERHEAD = 1024
# By blocks on a processor: alone, one has nothing to do while it waits at its barriers, and in its
# expansion the units of its convolution rest. Guessed.
_ALONE = {1: 1.5, 2: 1.1, 3: 1.0}


class FusedProblem(NamedTuple):
    """What decides about a tile."""

    images: int
    channels: int
    expanded: int
    height: int
    width: int
    output_height: int
    output_width: int
    kernel: int
    stride: int
    itemsize: int


class FusedConfig(NamedTuple):
    """Outputs of a block, and how many blocks share a tile's expanded channels."""

    tile_height: int
    tile_width: int
    groups: int


def shared_memory(problem: FusedProblem, tile_height: int, tile_width: int) -> int:
    """Bytes that a block needs: csrc/mbconv/cuda.cu `layout_of`."""
    kernel, itemsize = problem.kernel, problem.itemsize
    seen = _seen(problem, _up(tile_height, _TILE)) * _seen(problem, _up(tile_width, _TILE))
    pixel = _CHANNELS * itemsize + (8 if itemsize == 2 and problem.stride == 2 else 16)
    half = _TILE * _CHANNELS * itemsize + (64 if itemsize == 2 else 0)
    row = _up(problem.channels * itemsize, 2 * _CHUNK) + _CHUNK
    pixels = _pixels(problem, tile_height, tile_width)
    return (
        _up(seen * pixel, _CHUNK)
        + pixels * row
        + 2 * _CHANNELS * (row + kernel * kernel * itemsize + 4 * 4)
        + 4 * _STRIPS * _CHANNELS
        + 3 * _CHUNK
        + 2 * _WARPS * half
        + _up(4 * pixels, _CHUNK)
    )


@functools.lru_cache(maxsize=1024)
def choose(problem: FusedProblem, processors: int, shared: int) -> FusedConfig | None:
    """The tile with the least work in it for an image; None if none fits.

    Args:
        processors: of the device.
        shared: bytes of shared memory that a block may have; a processor has little more.
    """
    best: tuple[float, int, int, int] | None = None
    for height, width in _tiles(problem):
        used = shared_memory(problem, height, width)
        if used > shared:
            continue
        tiles = -(-problem.output_height // height) * -(-problem.output_width // width)
        resident = min(3, (shared + _OVERHEAD) // (used + _OVERHEAD))
        cost = tiles * _clocks(problem, height, width) * _ALONE[resident]
        if best is None or cost < best[0]:
            best = cost, height, width, tiles
    if best is None:
        return None
    _, height, width, tiles = best
    # Two blocks for every processor, twice over, where there are channels for so many.
    chunks = -(-problem.expanded // _CHANNELS)
    wanted = -(-4 * processors // max(problem.images * tiles, 1))
    return FusedConfig(height, width, min(chunks, wanted))


def _clocks(problem: FusedProblem, height: int, width: int) -> float:
    """Clocks of a processor for a tile, by instructions of four schedulers; counted, not measured.

    Of the products only what comes after counts, 24 clocks for every 16 pixels: tensor cores and
    ldmatrix need fewer at up to 40 channels. A round of 256 threads convolves 16 strips.
    """
    kernel, stride = problem.kernel, problem.stride
    chunks = -(-problem.expanded // _CHANNELS)
    expansion = 32 * -(-_pixels(problem, height, width) // 16)
    strips = -(-height // _TILE) * -(-width // _TILE)
    span = (_TILE - 1) * stride + kernel
    thread = 2 * _TILE**2 * (kernel**2 + 5) + 3 * span**2
    convolution = -(-strips // _STRIPS) * _WARPS * thread / 4
    loads = _pixels(problem, height, width) * problem.channels * problem.itemsize / 13
    return chunks * (expansion + convolution + 100) + loads + 1000


def _tiles(problem: FusedProblem) -> Iterator[tuple[int, int]]:
    for height in _parts(problem.output_height):
        for width in _parts(problem.output_width):
            yield height, width


def _parts(size: int) -> list[int]:
    """Even parts of ``size``, of 4 to 32."""
    return sorted({-(-size // n) for n in range(1, size + 1) if 4 <= -(-size // n) <= 32} or {size})


def _pixels(problem: FusedProblem, height: int, width: int) -> int:
    """Of the input that the windows of a tile see, at most."""
    return min(_seen(problem, height), problem.height) * min(_seen(problem, width), problem.width)


def _seen(problem: FusedProblem, outputs: int) -> int:
    return (outputs - 1) * problem.stride + problem.kernel


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
