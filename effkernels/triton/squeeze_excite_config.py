"""Sizes that squeeze-and-excitation's kernels run with."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from .batch_norm_act_config import SumConfig, SumProblem, chunk
from .batch_norm_act_config import promise as promise_of_passes
from .launch import Device, Launch
from .promises import Promise, is_vectored

_TILE = 16  # rows of the smallest product on tensor cores


@dataclass(frozen=True)
class GateProblem:
    """What decides about the speed of the kernel from the mean to the gate."""

    images: int
    blocks: int  # partial sums an image
    channels: int
    reduced: int
    itemsize: int  # bytes of a weight


@dataclass(frozen=True)
class GateConfig:
    """A program makes the gates of ``images`` images (1: without tensor cores) and
    ``slice_channels`` channels, going through the means in steps of ``chunk`` channels."""

    split: bool  # the hidden vector by a kernel of its own
    images: int
    slice_channels: int
    chunk: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class GateBackwardConfig:
    """Sizes of the gate's two backward kernels."""

    slices: int  # programs that share the channels of 16 images
    chunk: int  # channels a step
    channels: int  # of the second kernel's programs
    num_warps: int


def padded(reduced: int) -> int:
    """The power of two that holds the hidden vector, 16 at least."""
    return max(_TILE, 1 << (reduced - 1).bit_length())


# Bytes of the first matrix above which each program no longer reads all of it: an SM takes about
# 55 bytes a clock from the L2, so that this is 2.8 µs, and another launch costs 2.
_SPLIT = 256 * 1024


def gate_heuristic(problem: GateProblem, device: Device) -> GateConfig:
    """One image a program up to a batch of 8, else 16 that share what is read of the weights."""
    split = problem.channels * problem.reduced * problem.itemsize > _SPLIT
    return _gate(problem, split, 1 if problem.images <= 8 else _TILE)


def gate_candidates(problem: GateProblem, device: Device) -> Iterable[GateConfig]:
    """Both ways to take images, both numbers of kernels."""
    for split in (False, True):
        for images in (1, _TILE):
            yield _gate(problem, split, images)


def _gate(problem: GateProblem, split: bool, images: int) -> GateConfig:
    """Tiles of the first matrix of 32 KB (two-byte weights) in flight: two SM's worth of what
    Little's law asks of the L2 (64 bytes a clock, 300 clocks)."""
    reduced = _TILE if split else padded(problem.reduced)
    if images == 1:
        return GateConfig(split, 1, 64, min(512, 16384 // reduced), 8, 1)
    # 64 KB of shared memory in three stages at most: three programs fit on a processor.
    step = min(128, 8192 * 2 // problem.itemsize // reduced)
    return GateConfig(split, _TILE, 64, max(step, 16), 4, 3)


def gate_backward_heuristic(problem: GateProblem, device: Device) -> GateBackwardConfig:
    """Enough slices that half of the processors have something to do; 4 KB accumulators."""
    reduced = padded(problem.reduced)
    step = max(16, min(64, 4096 * 2 // problem.itemsize // reduced))
    tiles = max(-(-problem.images // _TILE), 1)
    slices = max(1, min(device.processors // 2 // tiles, -(-problem.channels // 128)))
    return GateBackwardConfig(slices, step, 32 if reduced <= 64 else 16, 4 if reduced <= 64 else 8)


def gate_backward_candidates(
    problem: GateProblem, device: Device
) -> Iterable[GateBackwardConfig]:
    """Twice and half as many warps."""
    best = gate_backward_heuristic(problem, device)
    for num_warps in (4, 8):
        yield GateBackwardConfig(best.slices, best.chunk, best.channels, num_warps)


def pool_heuristic(problem: SumProblem, device: Device) -> SumConfig:
    """Four loads in flight per thread, and one partial sum an image if that gives every processor
    32 warps to work on."""
    return _pool(problem, device, 4)


def pool_candidates(problem: SumProblem, device: Device) -> Iterable[SumConfig]:
    """Programs of other sizes."""
    for num_warps in (2, 4, 8):
        yield _pool(problem, device, num_warps)


def _pool(problem: SumProblem, device: Device, num_warps: int) -> SumConfig:
    unroll = 4 if problem.inputs == 1 else 2
    channels = chunk(problem.channels)
    rows = max(num_warps * 32 * problem.vector // channels, 1)
    programs = max(problem.images * -(-problem.channels // channels), 1)
    wanted = device.processors * 32 // num_warps
    blocks = min(-(-wanted // programs), -(-problem.rows // (unroll * rows)))
    return SumConfig(max(blocks, 1), unroll, rows, channels, num_warps)


def promise(launch: Launch) -> Promise:
    """Tensor cores where images are taken 16 at a time."""
    constants = dict(launch.constants)
    name = launch.kernel.fn.__name__
    if name == "_pool_kernel":
        return Promise(16, vector_loads=is_vectored(launch))
    if "IMAGES" in constants:
        return Promise(8, tensor_cores=constants["IMAGES"] > 1)
    return promise_of_passes(launch)
