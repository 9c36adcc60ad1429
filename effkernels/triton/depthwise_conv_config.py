"""Sizes that the depthwise kernels run with, and what the compiled kernels promise."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from .launch import Device, Launch
from .promises import Promise, itemsize

LARGEST_KERNEL = 7  # whose taps fit into registers, two channels a thread
LARGEST_STRIDE = 2


@dataclass(frozen=True)
class DepthwiseProblem:
    """One convolution, or one of its gradients, as far as speed goes."""

    name: str  # "forward", "input_gradient" (for a strided input) or "weight_gradient"
    batch: int
    channels: int
    height: int  # of the convolution's output; of what is made is stride times as much
    width: int  # for "input_gradient"
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
        registers: the most a thread may have. Left alone, the compiler spills a few to fit
            another block; with 255, all there are, it does not.
    """

    streamed: bool
    columns: int
    rows: int
    strips: int
    channels: int
    items: int = 1
    num_warps: int = 4
    registers: int = 255

    def programs(self, problem: DepthwiseProblem) -> int:
        across = -(-problem.batch * -(-problem.width // self.columns) // self.strips)
        items = across * -(-problem.height // self.rows)
        return -(-items // self.items) * -(-problem.channels // self.channels)


def heuristic(problem: DepthwiseProblem, device: Device) -> DepthwiseConfig:
    """Registers decide: taps and sums of the window stay in them.

    Registers as the compiler reports them for sm_90, bfloat16; none of this has been measured.

    - 3x3: 4 channels a thread, 4 columns: 36 taps, 48 sums, 168 registers. With stride 2, a
      prologue or statistics 2 channels: with 4 they spilled, or took 244.
    - 5x5 and 7x7: 2 channels a thread, 50 or 98 taps and 40 or 56 sums; 167 registers, 7x7 255. A
      warp still reads 128 neighbouring bytes. 4 channels do not fit.
    - 5x5 without prologue is bound by its instructions, and columns that stick out of the image
      cost as much as others: 7 columns where the width is a multiple of 7 (14 or 7 pixels in 4s:
      an eighth is lost), at 214 registers and 8 warps, which one row ahead keeps busy.
    - A limit of 168 registers, that is 12 warps a processor, where it is known to cost no spill;
      else 8 warps.
    - Rows: all of a 28 pixel high image, for each strip reads k - 1 rows more than it makes; less,
      where a processor would get less than eight programs.
    - A grid too small even so is a matter of latency: one row, all its loads at once, as few
      warps as hold the strips there are.
    - Partial results (statistics, weight gradients): as many programs as run at a time, four a
      processor, each with its share of the image.
    """
    tuned = problem.is_tuned
    size = max(problem.kernel)
    inference = problem.name == "forward" and problem.operand == "plain" and not problem.moments
    wide = inference and size == 5 and problem.stride == (1, 1) and problem.width % 7 == 0
    four_channels = inference and size <= 3 and max(problem.stride) == 1
    config = DepthwiseConfig(
        streamed=tuned,
        columns=1 if not tuned else 7 if wide else 4,
        rows=min(problem.height, 28),
        strips=4 if size > 3 else 16 if four_channels else 8,
        channels=64 if size > 3 else 32,
    )
    weight = problem.name == "weight_gradient"
    if tuned and not wide and (size <= 3 and not weight or inference and size <= 5):
        config = replace(config, registers=168)
    narrow = problem.itemsize == 4 or problem.operand == "gradient"
    if weight and max(problem.stride) > 1 and size > 3 and narrow:
        config = replace(config, columns=2)  # else float32 spills, and what has two prologues
    enough = 8 * device.processors
    while config.rows > 4 and config.programs(problem) < enough:
        config = replace(config, rows=-(-config.rows // 2))
    if tuned and inference and size <= 5 and config.programs(problem) < enough:
        config = replace(config, streamed=False, columns=4, rows=1, registers=255)
        warps = 4 if size > 3 else 2
        config = replace(config, num_warps=warps, strips=config.strips * warps // 4)
        while config.programs(problem) > 2 * enough:
            config = replace(config, rows=2 * config.rows)
    if problem.moments or weight:
        items = config.programs(problem) // (4 * device.processors)
        config = replace(config, items=max(1, items))
    return config


def candidates(problem: DepthwiseProblem, device: Device) -> Iterator[DepthwiseConfig]:
    """Around the heuristic's choice: other columns, rows, tiles and limits."""
    config = heuristic(problem, device)
    for rows in sorted({1, 4, 7, 14, 28, 56, problem.height}):
        for columns in (2, 4, 7) if problem.is_tuned else (1,):
            for strips, channels in ((16, 32), (8, 32), (4, 64), (8, 64)):
                for registers in (255, 128, 168):
                    yield replace(
                        config,
                        streamed=problem.is_tuned and rows > 1,
                        rows=min(rows, problem.height),
                        columns=columns,
                        strips=strips,
                        channels=channels,
                        num_warps=4,
                        registers=registers,
                    )


def promise(launch: Launch) -> Promise:
    """Of a processor's 64 warps 12 where the registers are limited to that, else 8 or more.

    Loads are as wide as a thread's channels: 16 bytes for 3x3 in float32, else half or a quarter
    of it, of which a warp reads 128 bytes or more side by side.
    """
    constants = dict(launch.constants)
    if "KERNEL_Y" not in constants or constants["STRIDE_Y"] == 0:  # the general kernels
        return Promise(warps=32)
    each = (
        constants["STRIPS"] * constants["CHANNELS"] // (32 * launch.num_warps)
    )  # channels of a thread
    width = min(each, constants["VECTOR"]) * itemsize(launch)
    return Promise(
        warps=12 if launch.max_registers == 168 else 8,
        vector_loads=width >= 16,
        vector_stores=width >= 16 and not _gives_sums(launch),
        narrowest_load=width,
    )


def _gives_sums(launch: Launch) -> bool:
    """The launch writes nothing but sums, for which a thread has one channel."""
    return any(name == "partials_ptr" for name, _ in launch.signature)
