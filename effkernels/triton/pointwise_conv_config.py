"""Sizes that the kernels of 1×1 convolutions run with."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from .launch import Device, Launch
from .promises import Promise, is_vectored

# `_finish_kernel`: it reads little, and as many programs as there can be should share it.
FINISH_ROWS, FINISH_OUTPUTS = 16, 64
# Programs on one processor: with one alone nothing hides what it waits for.
_RESIDENT = 2
_REGISTERS = 65536 // (_RESIDENT * 8 * 32)  # a thread's, for two blocks of eight warps
_ALL_REGISTERS = 255


@dataclass(frozen=True)
class ProductProblem:
    """What decides about the speed of a product."""

    rows: int  # N · H · W
    pixels: int  # H · W
    channels: int
    outputs: int
    itemsize: int  # bytes
    prologue: str
    activation: str
    residual: bool
    mean: bool
    correlation: bool
    moments: bool
    store: bool


@dataclass(frozen=True)
class ProductConfig:
    """A tile, and how the tiles are gone over (`pointwise_conv_product`)."""

    block_rows: int
    block_outputs: int
    block_channels: int  # of one step
    num_warps: int
    num_stages: int
    max_registers: int  # of a thread
    splits: int = 1
    stream: bool = False
    resident: int = _RESIDENT  # programs of a stream on one processor


def product_heuristic(problem: ProductProblem, device: Device) -> ProductConfig:
    """Wide tiles where there are enough to fill the device, small ones and splits where not.

    None of this was measured; the reasons are:
    - 128 × 128 accumulators in eight warps are 64 registers a thread, which lets two programs share
      a processor. float32 moves twice the bytes: half the rows and half the outputs.
    - All outputs in one tile if they fit, so that the input is read from the L2 cache once;
      narrower where that saves an eighth: an epilogue computes what lies beyond the outputs too,
      and 32 → 192 with SiLU at 2 bytes has as much to do for the exponentials as for the memory.
    - Steps of 128 bytes of channels, an L2 line; 3 stages of 128 × 64 and 64 × 128 are 96 KB.
      What lies beyond the channels costs idle lanes of a product but moves no bytes. Half of that
      where a prologue takes them through float32 registers (with 64 channels a gate, norm and SiLU
      took 185 registers a thread), and a quarter of the tile for a correlation, which has another
      tensor of the output's size in registers (250 with the whole tile).
    - A stream pays when every program has several tiles to run ahead in. It keeps more addresses
      and loads ahead, so it is at most 64 wide.
    - The tensor cores of sm_90 need 64 rows for each of their warp groups; where that leaves most
      processors without work, waiting is dearer than narrow instructions: 16 rows.
    - Loops of fewer than 8 steps end before the second launch of a split would begin.
    """
    p = problem
    two_bytes = p.itemsize == 2
    widest, channels = (128, 64) if two_bytes else (64, 32)
    one_step = p.channels <= channels
    if p.prologue != "plain":
        channels //= 2
    outputs = _width(p.outputs, 64 if p.correlation else widest, 64)

    def tiles(rows: int, outputs: int) -> int:
        return -(-p.rows // rows) * -(-p.outputs // outputs)

    if tiles(128, outputs) >= 2 * device.processors:
        rows, num_warps = (128, 8) if two_bytes else (64, 4)
        most = _most_registers(num_warps, device)
        if p.correlation:
            rows, num_warps, most = 64, 4, _most_registers(4, device)
        elif p.mean or (p.prologue.startswith("forward") and outputs > 64):
            most = _ALL_REGISTERS  # 140 to 160 registers; held to 128 they spill
        narrow, summed = _width(p.outputs, 64, 32), p.mean or p.correlation
        if one_step and not summed and tiles(rows, narrow) >= 4 * _RESIDENT * device.processors:
            channels = _covering(p.channels, 16, 64)
            if p.moments and not two_bytes and device.capability[0] >= 10:
                most = _ALL_REGISTERS  # sm_100 takes the product out of tensor memory at once
            return ProductConfig(rows, narrow, channels, num_warps, 3, most, stream=True)
        return ProductConfig(rows, outputs, channels, num_warps, 3, most)
    outputs = min(outputs, 64)
    if tiles(64, outputs) >= device.processors:
        return ProductConfig(64, outputs, channels, 4, 3, _most_registers(4, device))
    outputs = 32
    steps = -(-p.channels // channels)
    splits = min(device.processors // tiles(16, outputs), steps // 4) if steps >= 8 else 1
    return ProductConfig(16, outputs, channels, 4, 3, _most_registers(4, device), max(1, splits))


def product_candidates(problem: ProductProblem, device: Device) -> Iterable[ProductConfig]:
    """Other tiles, numbers of warps, stages and splits around the heuristic's."""
    base = product_heuristic(problem, device)
    for rows, warps in ((16, 4), (64, 4), (128, 4), (128, 8)):
        for outputs in (32, 64, 128, 256):
            for stages in (2, 3, 4):
                for splits in {1, base.splits, 2 * base.splits}:
                    yield replace(
                        base,
                        block_rows=rows,
                        block_outputs=outputs,
                        num_warps=warps,
                        num_stages=stages,
                        max_registers=_most_registers(warps, device),
                        splits=splits if not base.stream else 1,
                    )
    if base.stream:
        yield replace(base, stream=False)
        for resident in (1, 3, 4):
            yield replace(base, resident=resident)


@dataclass(frozen=True)
class WeightProblem:
    """What decides about the speed of a weight gradient."""

    rows: int
    pixels: int
    channels: int
    outputs: int
    itemsize: int
    upstream_prologue: str
    input_prologue: str
    bias: bool


@dataclass(frozen=True)
class WeightConfig:
    """A tile of the matrix, the rows of one step, and how many programs share the rows."""

    block_outputs: int
    block_channels: int
    block_rows: int
    splits: int
    num_warps: int
    num_stages: int
    max_registers: int  # of a thread


def weight_heuristic(problem: WeightProblem, device: Device) -> WeightConfig:
    """Tiles of 64 × 128 (float32: 32 × 64), long where the matrix is, and two programs a processor.

    A split has at least eight steps, so that its partial result (written and read once in float32)
    is small beside what it read. float32 runs on two warps, which is what makes the compiler use
    the older tensor-core instructions: sm_90's own want both operands of tf32 transposed, and the
    copies into shared memory become 4 bytes each. Not measured.
    """
    p = problem
    two_bytes = p.itemsize == 2
    long, short = (128, 64) if two_bytes else (64, 32)
    outputs = _covering(p.outputs, 16, long if p.outputs > p.channels else short)
    channels = _covering(p.channels, 16, short if p.outputs > p.channels else long)
    block_rows = 64 if two_bytes else 32
    if (p.upstream_prologue, p.input_prologue) != ("plain", "plain"):
        block_rows //= 2
    tiles = -(-p.outputs // outputs) * -(-p.channels // channels)
    steps = -(-p.rows // block_rows)
    splits = max(1, min(-(-2 * device.processors // tiles), steps // 8))
    num_warps = 8 if outputs + channels > 128 else 4 if two_bytes else 2
    stages = 3 if two_bytes else 2
    most = _most_registers(num_warps, device)
    if "plain" not in (p.upstream_prologue, p.input_prologue) and num_warps == 8:
        most = _ALL_REGISTERS  # two prologues (a block in training) spill at 128
    return WeightConfig(outputs, channels, block_rows, splits, num_warps, stages, most)


def weight_candidates(problem: WeightProblem, device: Device) -> Iterable[WeightConfig]:
    """Other tiles and splits around the heuristic's."""
    base = weight_heuristic(problem, device)
    for outputs, channels in ((64, 64), (64, 128), (128, 64), (128, 128)):
        for splits in {max(1, base.splits // 2), base.splits, 2 * base.splits}:
            for warps in (4, 8):
                yield replace(
                    base,
                    block_outputs=outputs,
                    block_channels=channels,
                    splits=splits,
                    num_warps=warps,
                    max_registers=_most_registers(warps, device),
                )


def _most_registers(num_warps: int, device: Device) -> int:
    """What a thread may have: always said, for left to itself the assembler aims at one block more
    and spills a register or two in a dozen kernels.

    Three blocks of four warps, and two of eight where that costs nothing: sm_90's kernels need 130
    to 140 registers if they get them, and no spills at 128. Those of sm_80 (operands of the product
    in registers) and sm_100 (results out of tensor memory) spill there.
    """
    if num_warps == 4:
        return 168
    return _REGISTERS if num_warps == 8 and device.capability[0] == 9 else _ALL_REGISTERS


def _width(size: int, most: int, narrow: int) -> int:
    """The power of two from 32 to ``most`` that covers ``size``; ``narrow`` to save an eighth."""
    width = _covering(size, 32, most)
    if width > narrow and _padded(size, narrow) * 8 <= _padded(size, width) * 7:
        width = narrow
    return width


def _padded(size: int, block: int) -> int:
    return -(-size // block) * block


def _covering(size: int, least: int, most: int) -> int:
    """The power of two that holds ``size``, between these two."""
    return min(max(least, 1 << (size - 1).bit_length()), most)


def promise(launch: Launch) -> Promise:
    """What each of the kernels is held to, on every capability.

    Two blocks of eight warps where registers were limited for that, else one; three of four warps.
    A tile of 16 × 32 two-byte values has 8 bytes for a thread to store.
    """
    name = launch.kernel.fn.__name__
    constants = dict(launch.constants)
    if name == "_finish_kernel":
        return Promise(warps=48, vector_loads=is_vectored(launch, "OUTPUT_VECTOR"))
    if name == "_materialize_kernel":
        return Promise(48, is_vectored(launch), is_vectored(launch))
    limited = launch.max_registers != _ALL_REGISTERS
    warps = {2: 8, 4: 12 if limited else 8, 8: 16 if limited else 8}[launch.num_warps]
    vector_loads = is_vectored(launch) and is_vectored(launch, "OUTPUT_VECTOR")
    if name == "_weight_gradient_kernel":
        return Promise(warps, vector_loads, is_vectored(launch), tensor_cores=True)
    types = dict(launch.signature)
    output = types["output_ptr"] if "output_ptr" not in constants else types["partials_ptr"]
    itemsize = {"*fp32": 4, "constexpr": 0}.get(output, 2)
    share = constants["BLOCK_ROWS"] * constants["BLOCK_OUTPUTS"] // (32 * launch.num_warps)
    vector_stores = is_vectored(launch, "OUTPUT_VECTOR") and share * itemsize >= 16
    return Promise(warps, vector_loads, vector_stores, tensor_cores=True)
