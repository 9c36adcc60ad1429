"""Sizes that the kernels over [rows, channels] tiles run with."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from .launch import Device, Launch
from .promises import Promise, is_vectored

# Bytes that one program may go over twice, the second time out of the L2: an SM takes about 50
# bytes a clock from there, so that this is 1.5 µs, less than the two launches it saves.
SMALL = 128 * 1024


@dataclass(frozen=True)
class PassProblem:
    """What decides about the speed of an elementwise pass."""

    images: int  # that have vectors of their own; 1: none has
    rows: int  # of each image
    channels: int
    vector: int  # values an access
    inputs: int  # tensors read


@dataclass(frozen=True)
class PassConfig:
    """A program's tile: ``rows`` x ``channels``."""

    rows: int
    channels: int
    num_warps: int


@dataclass(frozen=True)
class SumProblem:
    """What decides about the speed of a reduction over rows."""

    images: int  # reduced apart
    rows: int  # of each image
    channels: int
    vector: int
    inputs: int


@dataclass(frozen=True)
class SumConfig:
    """A step loads ``unroll`` x ``rows`` x ``channels`` values, those of ``unroll`` per thread."""

    blocks: int  # programs that share an image's rows
    unroll: int
    rows: int
    channels: int
    num_warps: int


def chunk(channels: int, widest: int = 64) -> int:
    """Channels of a tile: of 16, 32 and 64 the one that leaves the fewest lanes without work.

    64 are a 128-byte line of bfloat16. Wider tiles would leave more lanes idle (144 channels: 256)
    and not load better.
    """
    widths = [width for width in (64, 32, 16) if width <= widest]
    return min(widths, key=lambda width: (-(-channels // width) * width, -width))


def pass_heuristic(problem: PassProblem, device: Device) -> PassConfig:
    """Four 16-byte loads in flight per thread, of one tensor or of two; one where that gives more
    processors something to do.

    At 24 resident warps that is 48 KB in flight, and a copy at 3 TB/s needs about 32 KB in each
    of 132 processors by Little's law (1.4 µs of latency). More rows per tile also mean that
    the vectors, as many bytes for a thread as four accesses, are loaded less often.
    """
    config = _pass(problem, 4 if problem.inputs == 1 else 2, 4)
    tiles = -(-problem.rows // config.rows) * -(-problem.channels // config.channels)
    return config if problem.images * tiles >= 2 * device.processors else _pass(problem, 1, 4)


def pass_candidates(problem: PassProblem, device: Device) -> Iterable[PassConfig]:
    """One to four accesses, in blocks of 128 and 256 threads."""
    for accesses in (1, 2, 4):
        for num_warps in (4, 8):
            yield _pass(problem, accesses, num_warps)


def _pass(problem: PassProblem, accesses: int, num_warps: int) -> PassConfig:
    channels = chunk(problem.channels)
    rows = accesses * num_warps * 32 * problem.vector // channels
    return PassConfig(max(rows, 1), channels, num_warps)


def sum_heuristic(problem: SumProblem, device: Device) -> SumConfig:
    """As many programs as fit on the device at once, so that there are few partial results, each
    with four loads in flight per thread (as :func:`pass_heuristic`)."""
    return _sum(problem, device, 8 if problem.inputs == 1 else 4)


def sum_candidates(problem: SumProblem, device: Device) -> Iterable[SumConfig]:
    """Half and twice the programs, and other sizes of them."""
    for num_warps in (4, 8, 16):
        for waves in (1, 2, 4):
            yield _sum(problem, device, num_warps, waves)


def _sum(problem: SumProblem, device: Device, num_warps: int, waves: int = 1) -> SumConfig:
    unroll = 4 if problem.inputs == 1 else 2
    channels = chunk(problem.channels)
    rows = max(num_warps * 32 * problem.vector // channels, 1)
    chunks = max(-(-problem.channels // channels), 1) * max(problem.images, 1)
    resident = device.processors * (24 if problem.inputs == 1 else 16) // num_warps
    blocks = max(resident * waves // chunks, 1)
    blocks = min(blocks, max(-(-problem.rows // (unroll * rows)), 1))
    return SumConfig(blocks, unroll, rows, channels, num_warps)


def small(problem: SumProblem, itemsize: int) -> SumConfig | None:
    """For tensors so small that launches take longer than the work: one program for all rows."""
    channels = chunk(problem.channels, 16 if problem.rows > 512 else 64)
    if problem.rows * channels * itemsize > SMALL:
        return None
    num_warps = 8
    rows = max(num_warps * 32 * problem.vector // channels, 1)
    return SumConfig(1, 4 if problem.inputs == 1 else 2, rows, channels, num_warps)


def promise(launch: Launch) -> Promise:
    """Whole vectors wherever the channels allow, and as many warps as the kernel's registers let
    in: sums hold their channels' vectors (40 values) beside two accumulators, and 16 warps with
    four loads each still have 32 KB in flight."""
    constants = dict(launch.constants)
    name = launch.kernel.fn.__name__
    if "VECTOR" not in constants:  # over a few vectors of C values
        return Promise(warps=32)
    warps = {
        "_apply_kernel": 28,
        "_statistics_kernel": 24,
        "_differentiate_kernel": 24,
        "_small_backward_kernel": 8,  # one program or two on a processor is all there is
    }.get(name, 16)
    if name == "_sums_kernel" and constants.get("gate_ptr", "given") == "given":
        warps = 12  # 44 KB, for the gate and the offset take two loads more
    vectored = is_vectored(launch)
    writes = name not in ("_statistics_kernel", "_sums_kernel")
    return Promise(warps, vectored, vectored and writes)
