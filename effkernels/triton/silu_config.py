"""Sizes that the elementwise kernels run with."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from .launch import Device, Launch
from .promises import Promise, is_vectored


@dataclass(frozen=True)
class SiluProblem:
    """What decides about the speed of an elementwise kernel."""

    elements: int
    itemsize: int  # bytes
    tensors: int  # read and written


@dataclass(frozen=True)
class SiluConfig:
    """``block`` elements a program."""

    block: int
    num_warps: int


def heuristic(problem: SiluProblem, device: Device) -> SiluConfig:
    """Two 16-byte accesses a thread and tensor.

    2048 resident threads then have 64 KB of reads in flight, and a copy at 3 TB/s needs about
    32 KB in each of 132 processors by Little's law (1.4 µs of latency): twice that, by reckoning
    and not by measurement.
    """
    return _config(problem, accesses=2, num_warps=4)


def candidates(problem: SiluProblem, device: Device) -> Iterable[SiluConfig]:
    """One to four accesses, in blocks of 128 and 256 threads."""
    for accesses in (1, 2, 4):
        for num_warps in (4, 8):
            yield _config(problem, accesses, num_warps)


def _config(problem: SiluProblem, accesses: int, num_warps: int) -> SiluConfig:
    return SiluConfig(num_warps * 32 * accesses * 16 // problem.itemsize, num_warps)


def promise(launch: Launch) -> Promise:
    """At least half of a processor's 64 warps; whole vectors wherever the size allows."""
    vectored = is_vectored(launch)
    return Promise(warps=32, vector_loads=vectored, vector_stores=vectored)
