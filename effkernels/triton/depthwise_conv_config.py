"""Sizes that the depthwise kernels run with, and what the compiled kernels promise."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from .launch import Device, Launch
from .promises import Promise, is_vectored

LARGEST_KERNEL = 7  # whose taps fit into registers, two channels a thread
LARGEST_STRIDE = 2


@dataclass(frozen=True)
class DepthwiseProblem:
    """One convolution, or one of its gradients, as far as speed goes."""

    pass_: str  # "forward", "input_gradient" or "weight_gradient"
    batch: int
    channels: int
    height: int  # of the output; of the input for the gradient for a strided input
    width: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    itemsize: int  # bytes
    operand: str  # "plain", "forward" or "gradient": the prologue
    moments: bool  # the batch statistics of the output are wanted, too

    @property
    def is_tuned(self) -> bool:
        """The window fits into registers; what does not takes the general kernels."""
        return (
            max(self.kernel) <= LARGEST_KERNEL
            and max(self.stride) <= LARGEST_STRIDE
            and self.dilation == (1, 1)
        )


@dataclass(frozen=True)
class DepthwiseConfig:
    """A program: ``strips`` x ``channels`` values a tensor, ``columns`` x ``rows`` outputs a strip.

    Attributes:
        streamed: rows pass through the registers once; else each output row loads its window.
        columns: neighbouring outputs that a thread has.
        rows: outputs below each other.
        strips: of a program, side by side.
        channels: of a program.
        items: how many times ``strips`` a program works through, one after the other.
        num_warps: ``strips * channels / (32 * num_warps)`` channels a thread.
    """

    streamed: bool
    columns: int
    rows: int
    strips: int
    channels: int
    items: int = 1
    num_warps: int = 4
    registers: int | None = None

    def programs(self, problem: DepthwiseProblem) -> int:
        across = -(-problem.batch * -(-problem.width // self.columns) // self.strips)
        items = across * -(-problem.height // self.rows)
        return -(-items // self.items) * -(-problem.channels // self.channels)


def heuristic(problem: DepthwiseProblem, device: Device) -> DepthwiseConfig:
    """Registers decide: of 65536, the window's taps and sums leave room for 12 to 16 warps.

    - 3x3: 4 channels a thread, 4 columns: 36 taps and 48 sums; 128 registers, 16 warps.
    - 5x5 and 7x7: 2 channels a thread (a warp still reads 128 bytes together), 50 or 98 taps and
      40 or 56 sums. 5x5 is bound by its instructions, and columns that stick out of the image cost
      as much as others: 7 columns (168 registers, 12 warps) where the width is a multiple of 7.
    - rows: all of a 28 pixel high image, since each strip reads k - 1 rows more than it makes;
      less, where that leaves a processor less than two of its blocks.
    - A grid that does not fill the device is a matter of latency: a row at a time, all its loads
      at once.
    """
    tuned = problem.is_tuned
    size = max(problem.kernel)
    plain = problem.operand == "plain" and not problem.moments
    wide = size == 5 and problem.width % 7 == 0 and problem.stride == (1, 1)
    config = DepthwiseConfig(
        streamed=tuned,
        columns=1 if not tuned else 7 if wide else 4,
        rows=min(problem.height, 28),
        strips=4 if size > 3 else 16 if plain else 8,
        channels=64 if size > 3 else 32,
        registers=168 if plain and size <= 5 and not wide else None,
    )
    enough = 2 * 4 * device.processors
    while config.rows > 4 and config.programs(problem) < enough:
        config = replace(config, rows=-(-config.rows // 2))
    if config.programs(problem) < enough and problem.pass_ == "forward":
        config = replace(config, streamed=False, columns=min(config.columns, 4), rows=1)
        while config.programs(problem) > enough:
            config = replace(config, rows=2 * config.rows)
    if problem.moments or problem.pass_ == "weight_gradient":
        # Few partial results: as many programs as run at a time.
        items = config.programs(problem) // (4 * device.processors)
        config = replace(config, items=max(1, items))
    return config


def candidates(problem: DepthwiseProblem, device: Device) -> Iterator[DepthwiseConfig]:
    """Around the heuristic's choice: other columns, rows, tiles."""
    config = heuristic(problem, device)
    for rows in sorted({1, 4, 7, 14, 28, 56, problem.height}):
        for columns in (2, 4, 7) if problem.is_tuned else (1,):
            for strips, channels in ((16, 32), (8, 32), (4, 64), (8, 64), (2, 64)):
                yield replace(
                    config, rows=min(rows, problem.height), columns=columns, strips=strips,
                    channels=channels, streamed=problem.is_tuned and rows > 1,
                )


def promise(launch: Launch) -> Promise:
    raise NotImplementedError
