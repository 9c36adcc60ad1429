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

    chunk: int  # channels a step of the first
    step: int  # and hidden values
    num_warps: int
    num_stages: int
    tile: int  # images, channels and hidden values of the second


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
    """Two tiles of the first matrix of 16 K values (float32: 8 K) are on their way at any time, in
    registers for one image, in shared memory for 16."""
    reduced = _TILE if split else padded(problem.reduced)
    values = 16384 * 2 // problem.itemsize // reduced
    if images == 1:
        step = max(min(1024 // problem.itemsize, values), 16)
        return GateConfig(split, 1, 64, step, 8 if reduced == _TILE else 16, 1)
    widest = 128 if problem.blocks == 1 else 64  # beside four partial sums of each mean
    return GateConfig(split, _TILE, 64, max(min(widest, values // 2), 16), 4, 3)


def gate_backward_heuristic(problem: GateProblem, device: Device) -> GateBackwardConfig:
    """Steps of 64 x 64 weights (float32: 32 x 32), three of them on their way; in the second
    kernel tiles of 16, which leave room for 24 warps, where those of 32 left room for 8."""
    size = 64 if problem.itemsize == 2 else 32
    return GateBackwardConfig(size, size, 4, 3, 16)


def gate_backward_candidates(problem: GateProblem, device: Device) -> Iterable[GateBackwardConfig]:
    """Other numbers of warps, larger tiles."""
    best = gate_backward_heuristic(problem, device)
    for num_warps in (4, 8):
        for tile in (16, 32):
            yield GateBackwardConfig(best.chunk, best.step, num_warps, best.num_stages, tile)


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
    if name == "_image_kernel":
        return Promise(8)
    if "PRECISION" in constants:
        return Promise(8, tensor_cores=True)
    return promise_of_passes(launch)
