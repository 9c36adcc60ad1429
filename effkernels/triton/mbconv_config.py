"""How a block runs: as a chain of kernels, or with its expansion inside the depthwise kernel."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from .launch import Device, Launch
from .promises import Promise, is_vectored


@dataclass(frozen=True)
class BlockProblem:
    """What decides whether fusing the expansion pays."""

    images: int
    inputs: int  # channels
    expanded: int
    height: int
    width: int
    output_height: int
    output_width: int
    kernel: int  # rows
    stride: int
    dilation: int
    itemsize: int


@dataclass(frozen=True)
class FusedConfig:
    """Sizes of `expand_depthwise`; ``band`` 0: the block runs as a chain."""

    band: int = 0  # output rows
    block_channels: int = 32
    block_pixels: int = 64
    block_outputs: int = 64
    block_depth: int = 32
    programs: int = 2  # resident on a processor
    num_warps: int = 8
    num_stages: int = 1


CHAIN = FusedConfig()
BANDS = (16, 8, 4)
# The expanded rows shared by two bands are computed twice. Through DRAM an expanded value costs
# a write and a read, through the L2, twice as fast on an H100 (5.5 TB/s published, 3.0 measured for
# DRAM), half of that: level at twice as many values. Beyond 1.5 times there is nothing to win.
MOST_REPEATED = 1.5
# Deeper products have so much arithmetic that their traffic is no longer what they wait for.
MOST_INPUTS = 128
_SCRATCH_SHARE = 0.6  # of the L2; the rest is for inputs and outputs on their way


def heuristic(problem: BlockProblem, device: Device) -> FusedConfig:
    """Fused where the expanded tensor does not stay in the L2 anyway, and a band is worth it.

    The highest band whose pieces of scratch memory fit, with work for every program. All of it
    counted, nothing measured: no GPU has run it.
    """
    if not can_pay(problem, device):
        return CHAIN
    return next(iter(_fitting(problem, device)), CHAIN)


def candidates(problem: BlockProblem, device: Device) -> Iterable[FusedConfig]:
    """The chain, and every band that fits."""
    return [CHAIN, *_fitting(problem, device)]


def can_pay(problem: BlockProblem, device: Device) -> bool:
    """The expanded tensor is large, and little arithmetic makes it."""
    size = problem.images * problem.height * problem.width * problem.expanded * problem.itemsize
    return size > device.l2 / 2 and problem.inputs <= MOST_INPUTS


def _fitting(problem: BlockProblem, device: Device) -> Iterable[FusedConfig]:
    # 64 channels in a row are a whole line of 128 bytes; 32 where 64 would leave a block half empty
    block_channels = 64 if problem.expanded % 64 == 0 else 32
    for band in BANDS:
        config = replace(
            CHAIN,
            band=band,
            block_channels=block_channels,
            block_outputs=2048 // block_channels,
        )
        reach = (problem.kernel - 1) * problem.dilation
        rows = (band - 1) * problem.stride + reach + 1
        columns = (problem.output_width - 1) * problem.stride + reach + 1
        scratch = rows * columns * block_channels * problem.itemsize
        bands = -(-problem.output_height // band)
        items = problem.images * bands * -(-problem.expanded // block_channels)
        programs = config.programs * device.processors
        if (
            rows <= MOST_REPEATED * band * problem.stride
            and scratch * programs <= _SCRATCH_SHARE * device.l2
            and items >= programs
        ):
            yield config


def promise(launch: Launch) -> Promise:
    """Two programs of 8 warps on a processor, products on tensor cores; sums: a quarter of the
    warps, for five accumulators of 8 values."""
    name = launch.kernel.fn.__name__
    if name == "_gated_kernel":
        return Promise(warps=32)
    vectored = is_vectored(launch)
    if name == "_image_sums_kernel":
        return Promise(warps=16, vector_loads=vectored)
    warps = 8 if dict(launch.constants)["PRECISION"] == "tf32x3" else 16
    return Promise(warps, vector_loads=vectored, vector_stores=vectored, tensor_cores=True)


@dataclass(frozen=True)
class SumsConfig:
    """Sizes of `image_sums`: a program adds ``block_pixels`` pixels of ``channels`` channels."""

    block_pixels: int
    rows: int  # read at a time
    channels: int
    num_warps: int


def sums_heuristic(images: int, pixels: int, channels: int, device: Device) -> SumsConfig:
    """Rows of 64 channels, 8 values a thread, whose five sums take 40 registers.

    As many blocks of pixels as give every processor eight programs of four warps, but no shorter
    than the 16 rows that are read at a time.
    """
    per_image = -(-8 * device.processors // (images * -(-channels // 64)))
    block_pixels = max(-(-pixels // per_image), 16)
    return SumsConfig(-(-block_pixels // 16) * 16, 16, 64, 4)
