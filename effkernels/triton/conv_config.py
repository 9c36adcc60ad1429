"""Which implementation a dense convolution runs with, and with what sizes.

No GPU has run any of this: the numbers below are reasoned from published rates, not measured.
The autotuner replaces them, shape by shape (``tune.choose``).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import triton

from .launch import Device, Launch
from .promises import Promise

IMPLICIT_GEMM, CUDNN = "implicit_gemm", "cudnn"

# Up to this many channels and this depth the stem's kernel gathers value by value.
STEM_CHANNELS, STEM_DEPTH = 4, 256

# By major compute capability: dense 2-byte matrix FLOP/s, and what a copy reads plus writes a
# second. Only their ratio decides, so other devices of a generation are served as well.
_RATES = {8: (312e12, 1.6e12), 9: (990e12, 3.0e12), 10: (2250e12, 6.5e12)}
# What is assumed to be reached of the matrix rate: cuDNN has TMA's im2col loads and clusters that
# share tiles; the implicit GEMM gathers with cp.async and reads every tile from the L2 once a tap.
_CUDNN_SHARE, _GEMM_SHARE = 0.7, 0.45
_MOST_SPLITS = 16


@dataclass(frozen=True)
class ConvProblem:
    """What decides about the speed of a convolution."""

    batch: int
    channels: int
    height: int
    width: int
    outputs: int
    out_height: int
    out_width: int
    kernel: str  # height x width, as "3x3"
    stride: str
    dilation: str
    symmetric: bool  # the same padding left and right, top and bottom
    itemsize: int  # bytes
    precision: str  # what float32 is multiplied in
    epilogue: bool  # anything after the convolution
    residual: bool

    @property
    def rows(self) -> int:
        """Output pixels."""
        return self.batch * self.out_height * self.out_width

    @property
    def depth(self) -> int:
        """Products in one output."""
        height, width = map(int, self.kernel.split("x"))
        return height * width * self.channels

    @property
    def is_stem(self) -> bool:
        """So few channels that the stem's kernel runs."""
        return self.channels <= STEM_CHANNELS and self.depth <= STEM_DEPTH


@dataclass(frozen=True)
class ConvConfig:
    """Tiles of ``block_m`` pixels by ``block_n`` outputs, ``block_k`` products a step.

    With ``splits`` > 1 as many programs share one tile's products. For cuDNN nothing but
    ``implementation`` counts.
    """

    implementation: str
    block_m: int = 0
    block_n: int = 0
    block_k: int = 0
    splits: int = 1
    num_warps: int = 4
    num_stages: int = 1


@dataclass(frozen=True)
class EpilogueConfig:
    """``block`` elements a program."""

    block: int
    num_warps: int


@dataclass(frozen=True)
class GradientConfig:
    """``steps`` tiles of ``block_rows`` pixels by ``block_channels`` channels a program."""

    block_rows: int
    block_channels: int
    steps: int
    num_warps: int


def heuristic(problem: ConvProblem, device: Device) -> ConvConfig:
    """The implicit GEMM or cuDNN, by reasoning alone.

    - Stems: the implicit GEMM. cuDNN pads 3 channels to 8 before its tensor-core kernels, and the
      epilogue's pass over the output moves more bytes than the whole convolution has to.
    - Channels that 16-byte accesses cannot read: cuDNN. The implicit GEMM would gather them two
      or four bytes at a time.
    - Less than one wave of tiles (batch 1): the implicit GEMM, which splits the products over the
      idle processors; what counts there is latency, not the rate of products.
    - Else the smaller sum of matrix and memory time: cuDNN multiplies faster, but its output is
      read and written once more for the epilogue, and asymmetric padding is one more copy of the
      input. So FusedMBConv (few channels, many pixels) and ResNet's first stage come out as
      implicit GEMMs, ResNet's wider 3x3 convolutions at large batches as cuDNN's.
    """
    config = implicit_gemm(problem, device)
    if problem.is_stem:
        return config
    if problem.channels * problem.itemsize % 16:
        return ConvConfig(CUDNN)
    if _tiles(problem, config.block_m, config.block_n) < device.processors:
        return config
    gemm, cudnn = _seconds(problem, device)
    return config if gemm <= cudnn else ConvConfig(CUDNN)


def _seconds(problem: ConvProblem, device: Device) -> tuple[float, float]:
    """Estimated times of (implicit GEMM, cuDNN with the epilogue's pass)."""
    matrix_rate, copy_rate = _RATES[min(max(device.capability[0], 8), 10)]
    if problem.itemsize == 4:
        matrix_rate /= 2 if problem.precision == "tf32" else 6
    products = 2.0 * problem.rows * problem.outputs * problem.depth
    input = problem.batch * problem.channels * problem.height * problem.width * problem.itemsize
    output = problem.rows * problem.outputs * problem.itemsize
    residual = output if problem.residual else 0
    gemm = max(products / (_GEMM_SHARE * matrix_rate), (input + output + residual) / copy_rate)
    cudnn = max(products / (_CUDNN_SHARE * matrix_rate), (input + output) / copy_rate)
    if problem.epilogue:
        cudnn += (2 * output + residual) / copy_rate
    if not problem.symmetric:
        cudnn += 2 * input / copy_rate
    return gemm, cudnn


def implicit_gemm(problem: ConvProblem, device: Device) -> ConvConfig:
    """Sizes of the implicit GEMM.

    - ``block_k``: 128 bytes of every pixel, a whole cache line, four 16-deep products.
    - ``block_n``: up to 128 outputs; what is padded costs products, but a second column of tiles
      costs another reading of every tap from the L2.
    - ``block_m``: 128 pixels; 64 where that leaves processors idle.
    - Warps: accumulators of 64 registers a thread in the largest tile. Stages: three of 32 KB let
      two blocks share an H100's processor, so that one's epilogue hides behind the other's loop.
    """
    if problem.is_stem:
        return _stem(problem, 128)
    block_n = min(128, max(32, triton.next_power_of_2(problem.outputs)))
    block_m = 128
    if _tiles(problem, block_m, block_n) < device.processors:
        block_m, block_n = 64, min(block_n, 64)
    steps = triton.cdiv(problem.depth, _block_k(problem))
    splits = 1
    # Two steps at least, or the loads of a program have nothing to hide behind.
    while (
        splits < _MOST_SPLITS
        and steps >= 4 * splits
        and splits * _tiles(problem, block_m, block_n) <= device.processors
    ):
        splits *= 2
    return _gemm(problem, block_m, block_n, splits, 3 if block_m == 128 else 4)


def _gemm(
    problem: ConvProblem, block_m: int, block_n: int, splits: int, num_stages: int
) -> ConvConfig:
    num_warps = 8 if block_m * block_n >= 128 * 128 else 4
    return ConvConfig(
        IMPLICIT_GEMM, block_m, block_n, _block_k(problem), splits, num_warps, num_stages
    )


def _stem(problem: ConvProblem, block_m: int) -> ConvConfig:
    """One pixel a thread, so that a warp's loads lie side by side and taps are constants; 32 deep
    steps, because a thread keeps all values of a step in registers: RGB 3x3 is one."""
    block_n = min(64, max(16, triton.next_power_of_2(problem.outputs)))
    return ConvConfig(IMPLICIT_GEMM, block_m, block_n, 32, 1, block_m // 32, 1)


def _block_k(problem: ConvProblem) -> int:
    return 128 // problem.itemsize


def _tiles(problem: ConvProblem, block_m: int, block_n: int) -> int:
    return triton.cdiv(problem.rows, block_m) * triton.cdiv(problem.outputs, block_n)


def candidates(problem: ConvProblem, device: Device) -> Iterable[ConvConfig]:
    """cuDNN, and the implicit GEMM with tiles of 64 to 128 pixels by 32 to 256 outputs."""
    yield ConvConfig(CUDNN)
    yield from gemm_candidates(problem, device)


def gemm_candidates(problem: ConvProblem, device: Device) -> Iterator[ConvConfig]:
    """Those of the implicit GEMM alone."""
    if problem.is_stem:
        for block_m in (64, 128, 256):
            yield _stem(problem, block_m)
        return
    widest = max(32, triton.next_power_of_2(problem.outputs))
    steps = triton.cdiv(problem.depth, _block_k(problem))
    for block_m, block_n in ((64, 32), (64, 64), (64, 128), (128, 32), (128, 64), (128, 128)):
        tiles = _tiles(problem, block_m, block_n)
        if block_n > widest or (block_m == 128 and 4 * tiles < device.processors):
            continue
        for splits in (1, 2, 4, 8, 16):
            if splits > 1 and (2 * splits > steps or splits * tiles > 4 * device.processors):
                break
            for num_stages in (3, 4):
                yield _gemm(problem, block_m, block_n, splits, num_stages)
    if widest >= 256 and problem.itemsize == 2:
        # The most products for what is read from the L2: 171 a byte, where 128 x 128 has 128.
        yield _gemm(problem, 128, 256, 1, 3)


def epilogue(itemsize: int) -> EpilogueConfig:
    """Two 16-byte accesses a thread and tensor, as in ``silu_config``: reckoned, not measured."""
    return EpilogueConfig(4 * 32 * 2 * 16 // itemsize, 4)


def gradient(rows: int, channels: int, itemsize: int, device: Device) -> GradientConfig:
    """Tiles of two 16-byte accesses a thread, at most 128 bytes of a pixel.

    A program adds up as many tiles (sums stay in registers) as leaves eight programs to every
    processor: enough to hide the loads' latency, and few rows for the second stage.
    """
    num_warps = 4
    elements = num_warps * 32 * 2 * 16 // itemsize
    block_channels = min(128 // itemsize, triton.next_power_of_2(channels))
    block_rows = min(elements // block_channels, 512)
    tiles = triton.cdiv(rows, block_rows) * triton.cdiv(channels, block_channels)
    return GradientConfig(
        block_rows, block_channels, max(1, tiles // (8 * device.processors)), num_warps
    )


_ITEMSIZES = {"*fp32": 4, "*bf16": 2, "*fp16": 2}
# Resident warps of one processor, the least of sm_80, 90 and 100 by the compiler's registers.
_EPILOGUE_WARPS, _GRADIENT_WARPS, _SCALE_GRADIENT_WARPS, _TOTALS_WARPS = 40, 28, 16, 32


def promise(launch: Launch) -> Promise:
    """Tensor cores in both products, 16-byte accesses wherever the channels allow.

    Warps: the implicit GEMM's tiles of 128 x 128 leave two blocks of 8 on an H100 (128 registers,
    96 KB) and one on an A100 (its products take their operands from registers), smaller ones three
    of 4 (tf32x3 splits operands in registers: two). The stem's 27 values and 64 sums a thread
    leave 12 warps, 147 values 8.
    """
    name = launch.kernel.fn.__name__
    constants, types = dict(launch.constants), dict(launch.signature)

    def whole(vector: str, pointer: str) -> bool:
        return constants[vector] * _ITEMSIZES[types[pointer]] >= 16

    if name == "_conv_kernel":
        return Promise(
            warps=8 if constants["BLOCK_N"] == 128 or constants["PRECISION"] == "tf32x3" else 12,
            vector_loads=whole("VECTOR", "input_ptr"),
            vector_stores=whole("OUTPUT_VECTOR", "output_ptr"),
            tensor_cores=True,
        )
    if name == "_stem_kernel":
        return Promise(
            warps=12 if constants["KERNEL_HEIGHT"] <= 3 else 8,
            vector_stores=whole("OUTPUT_VECTOR", "output_ptr"),
            tensor_cores=True,
        )
    if name == "_epilogue_kernel":
        vectored = whole("VECTOR", "output_ptr")
        return Promise(_EPILOGUE_WARPS, vector_loads=vectored, vector_stores=vectored)
    if name == "_gradient_kernel":
        vectored = whole("VECTOR", "gradient_ptr")
        written = types["t_ptr"] != "constexpr" or types["scaled_ptr"] != "constexpr"
        summed_twice = types["scale_sums_ptr"] != "constexpr"  # two tiles of sums in registers
        warps = _SCALE_GRADIENT_WARPS if summed_twice else _GRADIENT_WARPS
        return Promise(warps, vector_loads=vectored, vector_stores=vectored and written)
    return Promise(_TOTALS_WARPS)
