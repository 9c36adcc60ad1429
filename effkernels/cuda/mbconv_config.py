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
_BYTES_A_CLOCK = 13  # of memory, for a processor: an H100's 3.0 TB/s, 132 of them at 1.7 GHz


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

    def values(self) -> int:
        """Of an image, at most: of the input or the output."""
        return max(
            self.height * self.width * self.channels,
            self.output_height * self.output_width * self.expanded,
        )


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
    tiles = [(shared_memory(problem, *tile), *tile) for tile in _tiles(problem)]
    # Alone on a processor a block has nothing to do while it waits at its barriers, and during its
    # expansion the units of its convolution rest: two share one where any tile is small enough.
    fitting = [tile for tile in tiles if tile[0] <= (shared + _OVERHEAD) // 2 - _OVERHEAD]
    fitting = fitting or [tile for tile in tiles if tile[0] <= shared]
    if not fitting:
        return None
    _, height, width = min(fitting, key=lambda tile: clocks(problem, *tile[1:]))
    # Two blocks for every processor, twice over, where there are channels for so many.
    blocks = max(problem.images * _count(problem, height, width), 1)
    chunks = -(-problem.expanded // _CHANNELS)
    return FusedConfig(height, width, min(chunks, -(-4 * processors // blocks)))


@functools.lru_cache(maxsize=1024)
def pays(problem: FusedProblem, config: FusedConfig) -> bool:
    """Whether the fused kernel is faster than a product and a depthwise convolution.

    Each of those waits for memory, or issues as many instructions as the fused kernel does for the
    same without what tiles share or leave empty. All of it counted, nothing measured. At 2 bytes
    that means the 3x3 blocks of B0 up to 14 x 14 pixels. A 5x5 window has more arithmetic and a
    wider rim, and of a tile of 7 x 7 a quarter of the threads convolve.
    """
    inputs = problem.height * problem.width
    outputs = problem.output_height * problem.output_width
    bytes_each = problem.expanded * problem.itemsize
    product = max(
        inputs * (problem.channels * problem.itemsize + bytes_each) / _BYTES_A_CLOCK,
        inputs / 16 * problem.expanded / _CHANNELS * _expansion(problem) / 4,
    )
    convolution = max(
        (inputs + outputs) * bytes_each / _BYTES_A_CLOCK,
        outputs / _TILE**2 * problem.expanded / 64 * _convolution(problem) / 4,
    )
    return clocks(problem, config.tile_height, config.tile_width) < product + convolution


def clocks(problem: FusedProblem, height: int, width: int) -> float:
    """Clocks of a processor for an image in such tiles: what its four schedulers issue, and waits.

    A round convolves 16 strips, one for each 16 threads.
    """
    chunks = -(-problem.expanded // _CHANNELS)
    pixels = _pixels(problem, height, width)
    strips = -(-height // _TILE) * -(-width // _TILE)
    expansion = -(-pixels // 16) * _expansion(problem)
    convolution = -(-strips // _STRIPS) * _WARPS * _convolution(problem)
    loads = pixels * problem.channels * problem.itemsize / _BYTES_A_CLOCK
    barriers = 100 * chunks
    tile = chunks * (expansion + convolution) / 4 + loads + barriers
    return _count(problem, height, width) * tile


def _expansion(problem: FusedProblem) -> int:
    """Instructions of a warp for 16 pixels and 32 channels, counted in sm_90's code."""
    steps = -(-problem.channels * problem.itemsize // (2 * _CHUNK))
    return 145 + 15 * steps * (3 if problem.itemsize == 4 else 1)


def _convolution(problem: FusedProblem) -> int:
    """Instructions of a thread for two channels of 16 outputs, counted in sm_90's code: about 825
    and 1470 for kernels of 3 and 5, 960 and 1640 with strides of 2."""
    span = (_TILE - 1) * problem.stride + problem.kernel
    return _TILE**2 * (2 * problem.kernel**2 + 27) + 3 * span**2


def _count(problem: FusedProblem, height: int, width: int) -> int:
    return -(-problem.output_height // height) * -(-problem.output_width // width)


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
