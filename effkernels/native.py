"""The compiled CPU kernels: loading, instruction sets, and each op's call into them.

A function here takes the arguments of the op of its name, packs the weights (cached), allocates
the outputs and calls ``effkernels_cpu::<op>``, which sees dense NHWC tensors and float32 vectors
only. Packing is plain PyTorch, one layout for every instruction set.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .build_info import why_not_built
from .cache import cached
from .layout import empty_nhwc, nhwc, output_size

_PANEL = 16  # output channels side by side in packed weights; csrc/common/gemm.h kPanel
_DTYPES = (torch.float32, torch.bfloat16)
# ruff: noqa: D103 -- a function here is the op of its name, documented in effkernels/ops
# The order of `enum class Activation` in csrc/common/types.h.
_ACTIVATION_CODES = {
    name: code
    for code, name in enumerate(
        ("none", "relu", "relu6", "silu", "hard_swish", "sigmoid", "hard_sigmoid")
    )
}


def _load() -> str | None:
    """Load the library; None, or why there is none."""
    override = os.environ.get("EFFKERNELS_LIBRARY")
    path = Path(override or Path(__file__).with_name("_cpu.so"))
    if not path.exists():
        reason = f"{path} is missing" if override else why_not_built("cpu")
        return f"the CPU kernels were not built: {reason}"
    try:
        torch.ops.load_library(str(path))
    except (OSError, RuntimeError) as error:
        return f"{path} cannot be loaded: {error}"
    wanted = os.environ.get("EFFKERNELS_CPU_ISA")
    if wanted:
        set_cpu_isa(wanted)
    return None


def load_error() -> str | None:
    """Why the compiled kernels cannot be used in this process, or None if they can."""
    return _error


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
    """None if the CPU kernels can run an op on these arguments, else the reason why not."""
    if _error is not None:
        return _error
    if input.device.type != "cpu":
        return f"input is on {input.device}; the native kernels of this version run on the CPU"
    if input.dtype not in _DTYPES:
        return f"input has dtype {input.dtype}; float32 and bfloat16 are accepted"
    return None


def _float32(vector: Tensor | None) -> Tensor | None:
    """``vector`` as dense float32."""
    if vector is None or (vector.dtype == torch.float32 and vector.is_contiguous()):
        return vector
    return cached("float32", (vector,), lambda: vector.detach().float().contiguous())


def _gemm_panels(weight: Tensor) -> Tensor:
    """[K, C, kh, kw] as float32 panels [ceil(K / 16), kh·kw·C, 16], zero beyond K."""

    def pack() -> Tensor:
        matrix = weight.detach().float().permute(0, 2, 3, 1).flatten(1)  # [K, kh·kw·C]
        channels, depth = matrix.shape
        matrix = F.pad(matrix, (0, 0, 0, -channels % _PANEL))
        return matrix.view(-1, _PANEL, depth).transpose(1, 2).contiguous()

    return cached("gemm", (weight,), pack)


def _depthwise_taps(weight: Tensor) -> Tensor:
    """[C, 1, kh, kw] as float32 [kh·kw, C rounded up to 16], zero beyond C."""

    def pack() -> Tensor:
        taps = weight.detach().float().flatten(1).t()
        return F.pad(taps, (0, -weight.shape[0] % _PANEL)).contiguous()

    return cached("depthwise", (weight,), pack)


def _matrix(weight: Tensor) -> Tensor:
    """[rows, columns] as dense float32."""
    if weight.dtype == torch.float32 and weight.is_contiguous():
        return weight.detach()
    return cached("matrix", (weight,), lambda: weight.detach().float().contiguous())


def _transposed(weight: Tensor) -> Tensor:
    """[rows, columns] as dense float32 [columns, rows]."""
    return cached("transposed", (weight,), lambda: weight.detach().float().t().contiguous())


def _geometry(
    weight: Tensor, stride: list[int], padding: list[int], dilation: list[int]
) -> list[int]:
    """csrc/common/types.h `Geometry`: kernel, stride, dilation (height, width), left, top."""
    return [*weight.shape[2:], *stride, *dilation, padding[0], padding[2]]


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
    geometry = _geometry(weight, stride, padding, dilation)
    output = empty_nhwc(
        input,
        input.shape[1],
        *output_size(input.shape[2:], geometry[:2], stride, padding, dilation),
    )
    mean = torch.empty(output.shape[:2] if return_mean else 0, dtype=input.dtype)
    torch.ops.effkernels_cpu.depthwise_conv(
        output,
        mean if return_mean else None,
        nhwc(input),
        _depthwise_taps(weight),
        _float32(scale),
        _float32(bias),
        geometry,
        _ACTIVATION_CODES[activation],
    )
    return output, mean


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
    return prepare_pointwise_conv(
        input, weight, scale, bias, gate, residual, activation, return_mean
    )(input)


def prepare_pointwise_conv(
    example: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    gate: Tensor | None,
    residual: Tensor | None,
    activation: str,
    return_mean: bool,
) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """The op with everything but its input bound; see :func:`prepare_mbconv`."""
    arguments = (
        _gemm_panels(weight),
        _float32(scale),
        _float32(bias),
        None if gate is None else gate.float().contiguous(),
        None if residual is None else nhwc(residual),
        _ACTIVATION_CODES[activation],
    )
    channels = weight.shape[0]
    op = torch.ops.effkernels_cpu.pointwise_conv.default

    def run(input: Tensor) -> tuple[Tensor, Tensor]:
        output = empty_nhwc(input, channels, *input.shape[2:])
        mean = torch.empty(output.shape[:2] if return_mean else 0, dtype=input.dtype)
        op(output, mean if return_mean else None, nhwc(input), *arguments)
        return output, mean

    return run


def conv(input: Tensor, *arguments: Any) -> Tensor:
    return prepare_conv(input, *arguments)(input)


def prepare_conv(
    example: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    residual: Tensor | None,
    activation: str,
) -> Callable[[Tensor], Tensor]:
    """The op with everything but its input bound; see :func:`prepare_mbconv`."""
    geometry = _geometry(weight, stride, padding, dilation)
    arguments = (
        _gemm_panels(weight),
        _float32(scale),
        _float32(bias),
        geometry,
        None if residual is None else nhwc(residual),
        _ACTIVATION_CODES[activation],
    )
    channels = weight.shape[0]
    size = output_size(example.shape[2:], geometry[:2], stride, padding, dilation)
    op = torch.ops.effkernels_cpu.conv.default

    def run(input: Tensor) -> Tensor:
        output = empty_nhwc(input, channels, *size)
        op(output, nhwc(input), *arguments)
        return output

    return run


def squeeze_excite(
    input: Tensor,
    reduce_weight: Tensor,
    reduce_bias: Tensor | None,
    expand_weight: Tensor,
    expand_bias: Tensor | None,
    activation: str,
    gate_activation: str,
) -> Tensor:
    output = empty_nhwc(input, *input.shape[1:])
    torch.ops.effkernels_cpu.squeeze_excite(
        output,
        nhwc(input),
        _matrix(reduce_weight),
        _float32(reduce_bias),
        _transposed(expand_weight),
        _float32(expand_bias),
        _ACTIVATION_CODES[activation],
        _ACTIVATION_CODES[gate_activation],
    )
    return output


def squeeze_excite_gate(
    mean: Tensor,
    reduce_weight: Tensor,
    reduce_bias: Tensor | None,
    expand_weight: Tensor,
    expand_bias: Tensor | None,
    activation: str,
    gate_activation: str,
) -> Tensor:
    gate = torch.empty(mean.shape, dtype=torch.float32)
    torch.ops.effkernels_cpu.squeeze_excite_gate(
        gate,
        mean.float().contiguous(),
        _matrix(reduce_weight),
        _float32(reduce_bias),
        _transposed(expand_weight),
        _float32(expand_bias),
        _ACTIVATION_CODES[activation],
        _ACTIVATION_CODES[gate_activation],
    )
    return gate.to(mean.dtype)


def silu(input: Tensor, activation: str) -> Tensor:
    output = torch.empty_like(input)
    if output.stride() != input.stride():  # not dense: empty_like chose another layout
        input = torch.empty_like(output).copy_(input)
    torch.ops.effkernels_cpu.silu(output, input, _ACTIVATION_CODES[activation])
    return output


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
    geometry = _geometry(depthwise_weight, stride, padding, dilation)
    size = output_size(input.shape[2:], geometry[:2], stride, padding, dilation)
    output = empty_nhwc(input, pointwise_weight.shape[0], *size)
    torch.ops.effkernels_cpu.depthwise_separable_conv(
        output,
        nhwc(input),
        _depthwise_taps(depthwise_weight),
        _float32(depthwise_scale),
        _float32(depthwise_bias),
        _gemm_panels(pointwise_weight),
        _float32(pointwise_scale),
        _float32(pointwise_bias),
        geometry,
        None if residual is None else nhwc(residual),
        _ACTIVATION_CODES[depthwise_activation],
        _ACTIVATION_CODES[activation],
    )
    return output


def mbconv(input: Tensor, *arguments: Any) -> Tensor:
    return prepare_mbconv(input, *arguments)(input)


def prepare_mbconv(
    example: Tensor,
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
) -> Callable[[Tensor], Tensor]:
    """The op with everything but its input bound, for inputs of ``example``'s shape (but for the
    batch), dtype and device.
    """
    weights = (
        None if expand_weight is None else _gemm_panels(expand_weight),
        _float32(expand_scale),
        _float32(expand_bias),
        _depthwise_taps(depthwise_weight),
        _float32(depthwise_scale),
        _float32(depthwise_bias),
        None if se_reduce_weight is None else _matrix(se_reduce_weight),
        _float32(se_reduce_bias),
        None if se_expand_weight is None else _transposed(se_expand_weight),
        _float32(se_expand_bias),
        _gemm_panels(project_weight),
        _float32(project_scale),
        _float32(project_bias),
    )
    geometry = _geometry(depthwise_weight, stride, padding, dilation)
    names = (activation, se_activation, gate_activation, project_activation)
    options = (geometry, residual, [_ACTIVATION_CODES[name] for name in names])
    size = output_size(example.shape[2:], geometry[:2], stride, padding, dilation)
    channels = project_weight.shape[0]
    op = torch.ops.effkernels_cpu.mbconv.default

    def run(input: Tensor) -> Tensor:
        output = empty_nhwc(input, channels, *size)
        op(output, nhwc(input), *weights, *options)
        return output

    return run
