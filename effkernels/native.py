"""The compiled CPU kernels: loading, instruction sets, and each op's call into them.

A function here takes the arguments of the op of its name, packs the weights (cached), allocates
the outputs and calls ``effkernels_cpu::<op>``, which sees dense NHWC tensors and float32 vectors
only. Packed weights have one layout for every instruction set.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .build_info import why_not_built
from .cache import cached
from .layout import empty_nhwc, nhwc, ordered_like, output_size
from .program import Program as Program  # one of the names that effkernels/kernels.py lists

NAME = "native"  # of this backend
_PANEL = 16  # output channels side by side in packed weights; csrc/common/gemm.h kPanel
COPIES = True  # programs copy channels: tensors next to each other, and parts of one
_NO_GEOMETRY = [1, 1, 1, 1, 1, 1, 0, 0]
IMAGE_CHANNELS = 4  # at most; with more, values of a pixel next to each other read faster
MBCONV_RESIDUAL = 16  # place of `residual` among mbconv's arguments after its input
DTYPES = (torch.float32, torch.bfloat16)
# ruff: noqa: D103 -- a function here is the op of its name, documented in effkernels/ops
# The order of `enum class Activation` in csrc/common/types.h.
_ACTIVATION_CODES = {
    name: code
    for code, name in enumerate(
        ("none", "relu", "relu6", "silu", "hard_swish", "sigmoid", "hard_sigmoid")
    )
}


_OVERRIDE = os.environ.get("EFFKERNELS_LIBRARY")
_PATH = Path(_OVERRIDE or Path(__file__).with_name("_cpu.so"))


def _load() -> str | None:
    """Load the library; None, or why there is none."""
    if not _PATH.exists():
        reason = f"{_PATH} is missing" if _OVERRIDE else why_not_built("cpu")
        return f"the CPU kernels were not built: {reason}"
    try:
        torch.ops.load_library(str(_PATH))
    except (OSError, RuntimeError) as error:
        return f"{_PATH} cannot be loaded: {error}"
    wanted = os.environ.get("EFFKERNELS_CPU_ISA")
    if wanted:
        set_cpu_isa(wanted)
    return None


def load_error() -> str | None:
    """Why the compiled kernels cannot be used in this process, or None if they can."""
    return _error


def with_interpreter_lock() -> ctypes.PyDLL | None:
    """The library's functions that look at Python objects (csrc/bindings/snapshot.cpp)."""
    return None if _error else ctypes.PyDLL(str(_PATH))


def cpu_isas() -> list[str]:
    """Instruction sets that were compiled and that this CPU has, slowest first."""
    return [] if _error else torch.ops.effkernels_cpu.isas().split()


def cpu_isa() -> str:
    """The instruction set whose kernels run; ``""`` if none were compiled."""
    return "" if _error else torch.ops.effkernels_cpu.isa()


def set_cpu_isa(name: str) -> None:
    """Choose the instruction set for the whole process, as EFFKERNELS_CPU_ISA does at start.

    Raises:
        ValueError: if ``name`` was not compiled or this CPU does not have it.
    """
    accepted = torch.ops.effkernels_cpu.isas().split()
    if name not in accepted:
        raise ValueError(f"EFFKERNELS_CPU_ISA: {name!r} cannot run here; accepted are {accepted}")
    torch.ops.effkernels_cpu.set_isa(name)


_error = _load()


def can_run(input: Tensor, *rest: Any) -> str | None:
    """None if the CPU kernels can run an op on these arguments, else the reason why not.

    Meta tensors, of which no kernel runs, go the way that the CPU's would go with kernels.
    """
    device = input.device.type
    if _error is not None and device != "meta":
        return _error
    if device not in ("cpu", "meta"):
        return f"input is on {input.device}; the native kernels of this version run on the CPU"
    if input.dtype not in DTYPES:
        return f"input has dtype {input.dtype}; float32 and bfloat16 are accepted"
    return None


def variant(input: Tensor) -> str:
    """The instruction set that runs, for people to read."""
    return cpu_isa()


def activation_codes(names: Sequence[str]) -> list[int]:
    """The kernels' numbers of activations."""
    return [_ACTIVATION_CODES[name] for name in names]


def activation_names(codes: Sequence[int]) -> list[str]:
    """The reverse of :func:`activation_codes`."""
    names = list(_ACTIVATION_CODES)
    return [names[code] for code in codes]


def _float32(vector: Tensor | None) -> Tensor | None:
    """``vector`` as dense float32."""
    if vector is None or (vector.dtype == torch.float32 and vector.is_contiguous()):
        return vector
    return cached("float32", (vector,), lambda: vector.detach().float().contiguous())


def gemm_panels(matrix: Tensor) -> Tensor:
    """[K, depth] as float32 panels [ceil(K / 16), depth, 16], zero beyond K."""
    channels, depth = matrix.shape
    panels = torch.empty(-(-channels // _PANEL), depth, _PANEL)
    torch.ops.effkernels_cpu.pack_panels(panels, matrix.detach().float())
    return panels


def conv_panels(
    weight: Tensor, rows: tuple[int, int] | None = None, columns: tuple[int, int] | None = None
) -> Tensor:
    """[K, C, kh, kw] as panels of depth kh·kw·C, kept; of the taps from first to end, if given."""

    rows, columns = rows or (0, weight.shape[2]), columns or (0, weight.shape[3])

    def pack() -> Tensor:
        taps = weight.detach()[:, :, slice(*rows), slice(*columns)]
        return gemm_panels(taps.permute(0, 2, 3, 1).flatten(1))

    # Not of a view: below autograd it would not share the weight's version.
    return cached(("gemm", rows, columns), (weight,), pack)


# Winograd's algorithm (csrc/conv/winograd.h) along one axis, by outputs of a tile: G, so that a
# kernel g becomes G g.
_A, _B = 0.75, 1.5
_N = _A * _A - _B * _B
_WINOGRAD = {
    2: ((1.0, 0.0, 0.0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0.0, 0.0, 1.0)),
    4: (
        (1.0 / (_A * _B) ** 2, 0.0, 0.0),
        *[tuple(p**i / (2 * _A * _A * _N) for i in range(3)) for p in (_A, -_A)],
        *[tuple(p**i / (-2 * _B * _B * _N) for i in range(3)) for p in (_B, -_B)],
        (0.0, 0.0, 1.0),
    ),
}


_WINOGRAD_CACHED = 2**15  # channels times channels whose 16 matrices stay in a cache of 2 MB


def _winograd_panels(weight: Tensor, width: int) -> Tensor:
    """[K, C, 3, 3], transformed for tiles of 2 x ``width``: 16 or 24 matrices, in panels, kept."""

    def pack() -> Tensor:
        depth = weight.shape[1]
        down, across = (torch.tensor(_WINOGRAD[n], dtype=torch.float64) for n in (2, width))
        transform = torch.kron(down, across)  # [matrices, taps]
        panels = gemm_panels(weight.detach().permute(0, 2, 3, 1).flatten(1))
        packed = torch.empty(len(transform), len(panels), depth, _PANEL)
        for index, panel in enumerate(panels):  # one after the other, in the caches
            packed[:, index] = (transform @ panel.view(9, -1).double()).view(-1, depth, _PANEL)
        return packed

    return cached(("winograd", width), (weight,), pack)


def _dense(weight: Tensor) -> Tensor:
    """``weight`` as dense float32, in its own order."""
    if weight.dtype == torch.float32 and weight.is_contiguous():
        return weight.detach()
    return cached("dense", (weight,), lambda: weight.detach().float().contiguous())


def winograd_width(
    weight: Tensor, stride: Sequence[int], dilation: Sequence[int], size: tuple[int, int]
) -> int:
    """Width of the tiles of Winograd's algorithm (csrc/conv/winograd.h), 2 or 4; 0: not by it.

    Measured on an Intel Xeon, avx512 and avx2, one thread, against the direct convolution:

    - with 16 channels on both sides it wins from 14x14 outputs on (1.1 times), with 8 it loses;
    - a tile that sticks out computes for nothing: from 4x4 outputs on it wins (64 channels, 5x5:
      1.3 times), on 3x3 of 512 it takes 1.6 times as long;
    - weights that come from the last cache must be used often: with 512 channels 4x4 and 5x5
      outputs are level, 7x7 are 1.3 times as fast;
    - tiles of 2x4 are ahead by 15 to 25 % from 28 pixels a row on. On smaller images, where many
      channels make the weights large, 7 % are not worth half as many again in memory.
    """
    channels, depth, *kernel = weight.shape
    if kernel != [3, 3] or [*stride, *dilation] != [1, 1, 1, 1]:
        return 0
    pixels = 49 if channels * depth > _WINOGRAD_CACHED else 16
    if min(channels, depth) < 16 or min(size) < 4 or size[0] * size[1] < pixels:
        return 0
    return 4 if size[1] >= 20 else 2


def packed_bytes(weight: Tensor, winograd_width: int = 0) -> int:
    """Bytes of a convolution's weight, [K, ...] or a depthwise one's, as its kernel reads it."""
    channels, values = weight.shape[0], weight[0].numel()
    if winograd_width:  # its matrices instead of nine taps
        values = values // 9 * len(_WINOGRAD[2]) * len(_WINOGRAD[winograd_width])
    return -(-channels // _PANEL) * _PANEL * values * torch.float32.itemsize


def prepack(
    weight: Tensor, stride: Sequence[int], dilation: Sequence[int], depthwise: bool
) -> None:
    """Do now what the first call with a convolution's weight would do, if that is known."""
    if depthwise:
        depthwise_taps(weight)
    elif winograd_width(weight, stride, dilation, (64, 64)) == 0:  # else the image's size decides
        conv_panels(weight)


def depthwise_taps(weight: Tensor) -> Tensor:
    """[C, 1, kh, kw] as float32 [kh·kw, C rounded up to 16], zero beyond C, kept."""
    return cached("depthwise", (weight,), lambda: _taps(weight, False))


def reversed_taps(weight: Tensor) -> Tensor:
    """:func:`depthwise_taps` of the convolution that turns gradients back, not kept."""
    return _taps(weight, True)


def _taps(weight: Tensor, reversed: bool) -> Tensor:
    matrix = weight.detach().float().flatten(1)
    taps = torch.empty(matrix.shape[1], -(-len(matrix) // _PANEL) * _PANEL)
    torch.ops.effkernels_cpu.pack_taps(taps, matrix, reversed)
    return taps


def _matrix(weight: Tensor) -> Tensor:
    """[rows, columns] as dense float32."""
    if weight.dtype == torch.float32 and weight.is_contiguous():
        return weight.detach()
    return cached("matrix", (weight,), lambda: weight.detach().float().contiguous())


def _transposed(weight: Tensor) -> Tensor:
    """[rows, columns] as dense float32 [columns, rows]."""
    return cached("transposed", (weight,), lambda: weight.detach().float().t().contiguous())


class Packed(NamedTuple):
    """What a convolution's kernel is given besides images; the same in an op and in a program."""

    weights: tuple[Tensor | None, ...]  # packed, in the order of the op's arguments
    geometry: list[int]
    activations: list[int]
    size: tuple[int, int, int]  # channels, height, width of the output


def kernel_geometry(
    weight: Tensor, stride: list[int], padding: list[int], dilation: list[int]
) -> list[int]:
    """csrc/common/types.h `Geometry`: kernel, stride, dilation (height, width), left, top."""
    return [*weight.shape[2:], *stride, *dilation, padding[0], padding[2]]


def _pack_convolution(
    pack_weight: Callable[[Tensor], Tensor],
    input: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    activation: str,
) -> Packed:
    geometry = kernel_geometry(weight, stride, padding, dilation)
    size = output_size(input.shape[2:], geometry[:2], stride, padding, dilation)
    return Packed(
        (pack_weight(weight), _float32(scale), _float32(bias)),
        geometry,
        activation_codes([activation]),
        (weight.shape[0], *size),
    )


def pack_depthwise_conv(input: Tensor, *arguments: Any) -> Packed:
    return _pack_convolution(depthwise_taps, input, *arguments)


def depthwise_conv(
    input: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    activation: str,
    return_mean: bool,
) -> tuple[Tensor, Tensor]:
    packed = pack_depthwise_conv(input, weight, scale, bias, stride, padding, dilation, activation)
    output = empty_nhwc(input, *packed.size)
    mean = torch.empty(output.shape[:2] if return_mean else 0, dtype=input.dtype)
    torch.ops.effkernels_cpu.depthwise_conv(
        output,
        mean if return_mean else None,
        nhwc(input),
        *packed.weights,
        packed.geometry,
        *packed.activations,
    )
    return output, mean


def differentiates_depthwise_conv(
    arguments: Sequence[Any], gradients: Sequence[Tensor | None]
) -> bool:
    """Whether :func:`depthwise_conv_backward` is for this call: the convolution alone, as it comes
    in training, where BatchNorm follows."""
    _, _, scale, _, _, _, _, activation, _ = arguments
    upstream, mean_gradient = gradients
    plain = scale is None and activation == "none"
    return plain and upstream is not None and mean_gradient is None


def depthwise_conv_backward(
    arguments: list[Any],
    needed: list[bool],
    saved: tuple[Tensor, ...],
    gradients: tuple[Tensor | None, ...],
) -> tuple[Tensor | None, ...]:
    """The gradients of :func:`depthwise_conv` for input, weight and bias."""
    input, weight, _, bias, stride, padding, dilation, *_ = arguments
    upstream = gradients[0]
    assert upstream is not None
    upstream = nhwc(upstream)
    geometry = kernel_geometry(weight, stride, padding, dilation)
    for_input = gathered = for_taps = None
    if needed[0]:
        for_input = gathered = empty_nhwc(input, *input.shape[1:])
        kernel = weight.shape[2:]
        corner = [dilation[i] * (kernel[i] - 1) - padding[2 - 2 * i] for i in (0, 1)]  # top, left
        if list(stride) == [1, 1] and min(corner) >= 0:
            # The same convolution with reversed taps, whose kernel reads every row once.
            torch.ops.effkernels_cpu.depthwise_conv(
                for_input,
                None,
                upstream,
                reversed_taps(weight),
                None,
                None,
                [*kernel, 1, 1, *dilation, corner[1], corner[0]],
                _ACTIVATION_CODES["none"],
            )
            gathered = None
    if needed[1]:
        taps = (weight.shape[2] * weight.shape[3], weight.shape[0])
        for_taps = torch.empty(taps, dtype=torch.float32)
    if gathered is not None or for_taps is not None:
        torch.ops.effkernels_cpu.depthwise_conv_backward(
            gathered, for_taps, upstream, nhwc(input), depthwise_taps(weight), geometry
        )
    for_weight = None if for_taps is None else for_taps.t().reshape(weight.shape)
    for_bias = upstream.sum((0, 2, 3), dtype=torch.float32) if needed[3] else None
    return for_input, for_weight, None, for_bias, None, None, None, None, None


def pack_pointwise_conv(
    input: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None, activation: str
) -> Packed:
    return Packed(
        (conv_panels(weight), _float32(scale), _float32(bias)),
        _NO_GEOMETRY,
        activation_codes([activation]),
        (weight.shape[0], *input.shape[2:]),
    )


def pointwise_conv(
    input: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    gate: Tensor | None,
    residual: Tensor | None,
    activation: str,
    return_mean: bool,
) -> tuple[Tensor, Tensor]:
    packed = pack_pointwise_conv(input, weight, scale, bias, activation)
    output = empty_nhwc(input, *packed.size)
    mean = torch.empty(output.shape[:2] if return_mean else 0, dtype=input.dtype)
    torch.ops.effkernels_cpu.pointwise_conv(
        output,
        mean if return_mean else None,
        nhwc(input),
        *packed.weights,
        None if gate is None else gate.float().contiguous(),
        None if residual is None else nhwc(residual),
        *packed.activations,
    )
    return output, mean


def is_planar(input: Tensor) -> bool:
    """``input`` is best read where it is, in NCHW order: an image, rather than a hidden layer."""
    return input.shape[1] <= IMAGE_CHANNELS and input.is_contiguous()


def _used_taps(
    pixels: int, outputs: int, taps: int, stride: int, before: int, dilation: int
) -> tuple[int, int]:
    """Along one dimension: first and end of the taps that some output has inside the image."""
    first = max(0, min(before, before - (outputs - 1) * stride)) // dilation
    end = min(taps, (pixels - 1 + before) // dilation + 1)
    return (first, end) if first < end else (0, taps)


def pack_conv(input: Tensor, *arguments: Any) -> Packed:
    """With a fourth weight where Winograd's algorithm is used; the first is then unpacked.

    Taps that see padding alone are left out: a 3x3 convolution of a single pixel is a product with
    its middle tap (128 images of 512 channels: 24 -> 0.9 ms on a Xeon, PyTorch 1.2).
    """
    weight, _, _, stride, padding, dilation, _ = arguments
    kernel = weight.shape[2:]
    size = output_size(input.shape[2:], kernel, stride, padding, dilation)
    width = winograd_width(weight, stride, dilation, size)
    if width:
        packed = _pack_convolution(_dense, input, *arguments)
        return packed._replace(weights=(*packed.weights, _winograd_panels(weight, width)))
    axes = zip(input.shape[2:], size, kernel, stride, padding[2::-2], dilation, strict=True)
    rows, columns = [(0, 1), (0, 1)] if kernel == (1, 1) else [_used_taps(*axis) for axis in axes]
    packed = _pack_convolution(lambda weight: conv_panels(weight, rows, columns), input, *arguments)
    left, top = padding[0] - columns[0] * dilation[1], padding[2] - rows[0] * dilation[0]
    taps = [rows[1] - rows[0], columns[1] - columns[0]]
    return packed._replace(geometry=[*taps, *packed.geometry[2:6], left, top])


def conv(
    input: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    residual: Tensor | None,
    activation: str,
) -> Tensor:
    packed = pack_conv(input, weight, scale, bias, stride, padding, dilation, activation)
    panels, scale, bias, *transformed = packed.weights
    output = empty_nhwc(input, *packed.size)
    planar = is_planar(input)
    torch.ops.effkernels_cpu.conv(
        output,
        input if planar else nhwc(input),
        panels,
        scale,
        bias,
        packed.geometry,
        None if residual is None else nhwc(residual),
        *packed.activations,
        planar,
        *transformed,
    )
    return output


def pack_linear(matrix: Tensor, bias: Tensor) -> tuple[Tensor | None, ...]:
    """The weights of a pointwise convolution that is a linear layer with this [K, C] matrix.

    Not kept by the cache: a recording's views of weights have no versions to go by.
    """
    return gemm_panels(matrix), None, bias.detach().float().contiguous()


def pack_gate(reduce_weight: Tensor, expand_weight: Tensor) -> tuple[Tensor, Tensor]:
    """The two matrices of squeeze-and-excitation, [r, C] and [C, r], as the kernels take them."""
    return _matrix(reduce_weight), _transposed(expand_weight)


def pack_squeeze_excite(
    reduce_weight: Tensor,
    reduce_bias: Tensor | None,
    expand_weight: Tensor,
    expand_bias: Tensor | None,
    activation: str,
    gate_activation: str,
) -> tuple[tuple[Tensor | None, ...], list[int]]:
    """Weights and activations; there is no more to know."""
    return (
        (
            _matrix(reduce_weight),
            _float32(reduce_bias),
            _transposed(expand_weight),
            _float32(expand_bias),
        ),
        activation_codes([activation, gate_activation]),
    )


def squeeze_excite(input: Tensor, *arguments: Any) -> Tensor:
    weights, activations = pack_squeeze_excite(*arguments)
    output = empty_nhwc(input, *input.shape[1:])
    torch.ops.effkernels_cpu.squeeze_excite(output, nhwc(input), *weights, *activations)
    return output


def squeeze_excite_gate(mean: Tensor, *arguments: Any) -> Tensor:
    weights, activations = pack_squeeze_excite(*arguments)
    gate = torch.empty(mean.shape, dtype=torch.float32)
    torch.ops.effkernels_cpu.squeeze_excite_gate(
        gate, mean.float().contiguous(), *weights, *activations
    )
    return gate.to(mean.dtype)


def squeeze_excite_backward(
    arguments: list[Any],
    needed: list[bool],
    saved: tuple[Tensor, ...],
    gradients: tuple[Tensor | None, ...],
) -> tuple[Tensor | None, ...]:
    """The gradients of :func:`squeeze_excite` for its arguments."""
    input = arguments[0]
    (upstream,) = gradients
    if upstream is None:
        return (None,) * len(arguments)
    for_input = empty_nhwc(input, *input.shape[1:]) if needed[0] else None
    weights, activations = pack_squeeze_excite(*arguments[1:])
    for_weights = _gate_gradients(needed, arguments)
    torch.ops.effkernels_cpu.squeeze_excite_backward(
        for_input, *for_weights, nhwc(upstream), nhwc(input), *weights, *activations
    )
    return (for_input, *_as_given(for_weights), None, None)


def squeeze_excite_gate_backward(
    arguments: list[Any],
    needed: list[bool],
    saved: tuple[Tensor, ...],
    gradients: tuple[Tensor | None, ...],
) -> tuple[Tensor | None, ...]:
    """The gradients of :func:`squeeze_excite_gate` for its arguments, in float32."""
    mean = arguments[0]
    (upstream,) = gradients
    if upstream is None:
        return (None,) * len(arguments)
    for_mean = torch.empty(mean.shape, dtype=torch.float32) if needed[0] else None
    weights, activations = pack_squeeze_excite(*arguments[1:])
    for_weights = _gate_gradients(needed, arguments)
    torch.ops.effkernels_cpu.squeeze_excite_gate_backward(
        for_mean,
        *for_weights,
        upstream.float().contiguous(),
        mean.float().contiguous(),
        *weights,
        *activations,
    )
    return (for_mean, *_as_given(for_weights), None, None)


def _gate_gradients(needed: Sequence[bool], arguments: Sequence[Any]) -> list[Tensor | None]:
    """Room for the gradients of a gate's four parameters, the expanding matrix transposed."""
    reduced, channels = arguments[1].shape
    sizes = ((reduced, channels), (reduced,), (reduced, channels), (channels,))
    return [
        torch.empty(size, dtype=torch.float32) if need else None
        for size, need in zip(sizes, needed[1:5], strict=True)
    ]


def _as_given(gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Those of :func:`_gate_gradients` in the shapes of the op's arguments."""
    reduce_weight, reduce_bias, expand_weight, expand_bias = gradients
    expand_weight = None if expand_weight is None else expand_weight.t()
    return [reduce_weight, reduce_bias, expand_weight, expand_bias]


def silu(input: Tensor, activation: str) -> Tensor:
    output = torch.empty_like(input)  # dense, whatever input is
    code = _ACTIVATION_CODES[activation]
    torch.ops.effkernels_cpu.silu(output, ordered_like(input, output), code)
    return output


def silu_backward(
    arguments: list[Any],
    needed: list[bool],
    saved: tuple[Tensor, ...],
    gradients: tuple[Tensor | None, ...],
) -> tuple[Tensor | None, ...]:
    """The gradients of :func:`silu` for its arguments."""
    input, activation = arguments
    (upstream,) = gradients
    if upstream is None:
        return None, None
    for_input = torch.empty_like(input)
    torch.ops.effkernels_cpu.silu_backward(
        for_input,
        ordered_like(upstream, for_input),
        ordered_like(input, for_input),
        _ACTIVATION_CODES[activation],
    )
    return for_input, None


def batch_norm_act(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    residual: Tensor | None,
    training: bool,
    eps: float,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    channels = input.shape[1]
    output = empty_nhwc(input, *input.shape[1:])
    if training:
        mean = torch.empty(channels, dtype=torch.float32)
        var = torch.empty(channels, dtype=torch.float32)
    else:
        mean, var = input.new_empty(0), input.new_empty(0)
    torch.ops.effkernels_cpu.batch_norm_act(
        output,
        mean if training else _float32(running_mean),
        var if training else _float32(running_var),
        nhwc(input),
        _float32(weight),
        _float32(bias),
        None if residual is None else nhwc(residual),
        training,
        eps,
        _ACTIVATION_CODES[activation],
    )
    return output, mean, var


def batch_norm_act_backward(
    arguments: list[Any],
    needed: list[bool],
    saved: tuple[Tensor, ...],
    gradients: tuple[Tensor | None, ...],
) -> tuple[Tensor | None, ...]:
    """The gradients of :func:`batch_norm_act` for its arguments; ``saved`` are mean and var."""
    input, weight, bias, running_mean, running_var, residual, training, eps, activation = arguments
    upstream, *statistics = gradients
    if not training:
        statistics = [None, None]  # those of empty tensors
    if upstream is None:
        if statistics == [None, None]:
            return (None,) * len(arguments)
        upstream = torch.zeros_like(input)
    if input.numel() == 0:  # the statistics are NaN; the dispatcher makes zeros of None
        return (None,) * len(arguments)

    def images(need: bool) -> Tensor | None:
        return empty_nhwc(input, *input.shape[1:]) if need else None

    def vector(need: bool) -> Tensor | None:
        return torch.empty(input.shape[1], dtype=torch.float32) if need else None

    for_input, for_residual = images(needed[0]), images(needed[5])
    for_weight, for_bias = vector(needed[1]), vector(needed[2])
    for_mean, for_var = (vector(need and not training) for need in needed[3:5])
    mean, var = saved if training else (running_mean, running_var)
    torch.ops.effkernels_cpu.batch_norm_act_backward(
        for_input,
        for_residual,
        for_weight,
        for_bias,
        for_mean,
        for_var,
        nhwc(upstream),
        nhwc(input),
        _float32(mean),
        _float32(var),
        _float32(weight),
        _float32(bias),
        None if residual is None else nhwc(residual),
        *(None if gradient is None else gradient.float().contiguous() for gradient in statistics),
        training,
        eps,
        _ACTIVATION_CODES[activation],
    )
    return for_input, for_weight, for_bias, for_mean, for_var, for_residual, None, None, None


def depthwise_separable_conv(
    input: Tensor,
    depthwise_weight: Tensor,
    depthwise_scale: Tensor | None,
    depthwise_bias: Tensor | None,
    pointwise_weight: Tensor,
    pointwise_scale: Tensor | None,
    pointwise_bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    residual: Tensor | None,
    depthwise_activation: str,
    activation: str,
) -> Tensor:
    geometry = kernel_geometry(depthwise_weight, stride, padding, dilation)
    size = output_size(input.shape[2:], geometry[:2], stride, padding, dilation)
    output = empty_nhwc(input, pointwise_weight.shape[0], *size)
    torch.ops.effkernels_cpu.depthwise_separable_conv(
        output,
        nhwc(input),
        depthwise_taps(depthwise_weight),
        _float32(depthwise_scale),
        _float32(depthwise_bias),
        conv_panels(pointwise_weight),
        _float32(pointwise_scale),
        _float32(pointwise_bias),
        geometry,
        None if residual is None else nhwc(residual),
        _ACTIVATION_CODES[depthwise_activation],
        _ACTIVATION_CODES[activation],
    )
    return output


def pack_mbconv(
    input: Tensor,
    expand_weight: Tensor | None,
    expand_scale: Tensor | None,
    expand_bias: Tensor | None,
    depthwise_weight: Tensor,
    depthwise_scale: Tensor | None,
    depthwise_bias: Tensor | None,
    se_reduce_weight: Tensor | None,
    se_reduce_bias: Tensor | None,
    se_expand_weight: Tensor | None,
    se_expand_bias: Tensor | None,
    project_weight: Tensor,
    project_scale: Tensor | None,
    project_bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    residual: bool,
    activation: str,
    se_activation: str,
    gate_activation: str,
    project_activation: str,
) -> Packed:
    weights = (
        None if expand_weight is None else conv_panels(expand_weight),
        _float32(expand_scale),
        _float32(expand_bias),
        depthwise_taps(depthwise_weight),
        _float32(depthwise_scale),
        _float32(depthwise_bias),
        None if se_reduce_weight is None else _matrix(se_reduce_weight),
        _float32(se_reduce_bias),
        None if se_expand_weight is None else _transposed(se_expand_weight),
        _float32(se_expand_bias),
        conv_panels(project_weight),
        _float32(project_scale),
        _float32(project_bias),
    )
    geometry = kernel_geometry(depthwise_weight, stride, padding, dilation)
    names = (activation, se_activation, gate_activation, project_activation)
    size = output_size(input.shape[2:], geometry[:2], stride, padding, dilation)
    return Packed(
        weights,
        geometry,
        activation_codes(names),
        (project_weight.shape[0], *size),
    )


def mbconv(input: Tensor, *arguments: Any) -> Tensor:
    packed = pack_mbconv(input, *arguments)
    output = empty_nhwc(input, *packed.size)
    residual = arguments[MBCONV_RESIDUAL]
    torch.ops.effkernels_cpu.mbconv(
        output, nhwc(input), *packed.weights, packed.geometry, residual, packed.activations
    )
    return output
