"""Convolution, BatchNorm and activation modules run as fused ops.

A block hands its children to the functions here. They run fused as long as the children are what
they seem; a child with hooks, of another class (SyncBatchNorm, LoRA, quantized, parametrized) or
with a replaced ``forward`` is called as a module, so nothing that a user attached is skipped.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..cache import cached
from ..ops._common import Padding, resolve_padding
from .hooks import has_global_hooks, is_untouched

_ACTIVATION_NAMES: dict[type[nn.Module], str] = {
    nn.Identity: "none",
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.SiLU: "silu",
    nn.Hardswish: "hard_swish",
    nn.Sigmoid: "sigmoid",
    nn.Hardsigmoid: "hard_sigmoid",
}
# What a convolution pads its input by, from the module.
_PADDINGS: dict[type[nn.Module], Callable[[Any], Padding | None]] = {
    nn.Conv2d: lambda conv: None if isinstance(conv.padding, str) else conv.padding
}


class ConvNorm(NamedTuple):
    """A convolution with the BatchNorm and the activation that follow it.

    ``same``: (kernel size, stride) to pad by as TensorFlow's SAME before ``conv``, which then has
    no padding of its own; None: ``conv`` pads. Types are those that a block is built with; what
    users put in their place is asked for its class before anything else.
    """

    conv: nn.Conv2d
    norm: nn.Module
    activation: nn.Module
    same: tuple[int, int] | None = None


def register_activation(module_class: type[nn.Module], name: str) -> None:
    """Let modules of exactly this class run as the activation ``name`` of the ops."""
    _ACTIVATION_NAMES[module_class] = name


def register_convolution(
    module_class: type[nn.Module], padding: Callable[[Any], Padding | None]
) -> None:
    """Let modules of exactly this class run as an nn.Conv2d that pads by ``padding(module)``, as
    the ops take it; where that is None they are called."""
    _PADDINGS[module_class] = padding


def activation_name(module: nn.Module) -> str | None:
    """The ops' name of an activation module; None if it must be called as it is."""
    name = _ACTIVATION_NAMES.get(type(module))
    return name if name is not None and is_untouched(module) else None


def convolution_kind(conv: nn.Conv2d) -> str | None:
    """Which op computes ``conv``: pointwise, depthwise or dense; None: call the module."""
    padding = _own_padding(conv)
    if padding is None or not is_untouched(conv) or conv.padding_mode != "zeros":
        return None
    kernel = conv.kernel_size
    if kernel[0] % 2 == 0 or kernel[1] % 2 == 0:
        return None
    if conv.groups == 1:
        unpadded = padding in ((0, 0), "same")  # which adds nothing to a window of one pixel
        if kernel == (1, 1) and conv.stride in ((1, 1), [1, 1]) and unpadded:
            return "pointwise"
        return "dense"
    return "depthwise" if conv.groups == conv.in_channels == conv.out_channels else None


def _own_padding(conv: nn.Conv2d) -> Any:
    """What ``conv`` pads by, as the ops take it; None: it is not one that they know."""
    padding = _PADDINGS.get(type(conv))
    return None if padding is None else padding(conv)


def is_plain_norm(norm: nn.Module) -> bool:
    """``norm`` is an ordinary BatchNorm2d, or an Identity standing for none."""
    return type(norm) in (nn.BatchNorm2d, nn.Identity) and is_untouched(norm)


def uses_batch_statistics(norm: nn.Module) -> bool:
    """``norm`` normalises with what it sees now: nn.BatchNorm2d's own rule."""
    return isinstance(norm, nn.BatchNorm2d) and (norm.training or norm.running_mean is None)


def autocast_dtype(input: Tensor) -> torch.dtype | None:
    """The dtype that nn.Conv2d would compute in under autocast; None: leave tensors alone."""
    device = input.device.type
    if input.is_meta or input.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def cast_weight(weight: Tensor, dtype: torch.dtype | None) -> Tensor:
    """``weight`` in ``dtype`` (None: as it is), kept between calls where no gradient flows."""
    if dtype is None or weight.dtype == dtype or weight.dtype == torch.float64:
        return weight
    if not _may_cache((weight,)):
        return weight.to(dtype)

    def cast() -> Tensor:
        # Not an inference tensor, whatever mode the first call came in: a later one may train.
        with torch.inference_mode(False), torch.no_grad():
            return weight.to(dtype)

    return cached(("cast", dtype), (weight,), cast)


def _may_cache(tensors: tuple[Tensor, ...]) -> bool:
    if torch.compiler.is_compiling():
        return False
    for tensor in tensors:
        # Fake, distributed and other subclasses have no memory to recognise them by.
        if type(tensor) is not nn.Parameter and type(tensor) is not Tensor:
            return False
    return not torch.is_grad_enabled() or not any(tensor.requires_grad for tensor in tensors)


def fold(conv: nn.Conv2d, norm: nn.Module) -> tuple[Tensor | None, Tensor | None]:
    """``norm`` with its running statistics as (scale, bias) behind ``conv`` without its bias.

    Differentiable where a gradient is needed; otherwise kept until one of its tensors changes.
    """
    offset = _parameter(conv, "bias")
    if type(norm) is nn.Identity:
        return None, offset
    assert isinstance(norm, nn.BatchNorm2d)
    weight, bias = _parameter(norm, "weight"), _parameter(norm, "bias")
    mean, var = norm._buffers["running_mean"], norm._buffers["running_var"]
    assert mean is not None and var is not None
    eps = norm.eps
    sources = tuple([t for t in (weight, bias, mean, var, offset) if t is not None])

    def build() -> tuple[Tensor, Tensor]:
        center = mean if offset is None else mean - offset
        return ops.fold_batch_norm(weight, bias, center, var, eps)

    if not _may_cache(sources):
        return build()

    def build_plain() -> tuple[Tensor, Tensor]:
        with torch.inference_mode(False), torch.no_grad():
            return build()

    given = (weight is None, bias is None, offset is None)
    return cached(("fold", eps, given), sources, build_plain)


def _parameter(module: nn.Module, name: str) -> Tensor | None:
    """``getattr`` in a third of its time, unless FSDP has made the parameter a plain attribute."""
    parameters = module._parameters
    found: Tensor | None = parameters[name] if name in parameters else getattr(module, name)
    return found


def _counts_batches(norm: nn.BatchNorm2d) -> bool:
    return norm.training and norm.track_running_stats and norm.num_batches_tracked is not None


def norm_parameters(norm: nn.BatchNorm2d) -> ops.BatchNormParameters:
    """``norm`` as the ops take it, for one call; :func:`count_batch` belongs after it."""
    momentum = 0.0 if norm.momentum is None else norm.momentum
    if norm.momentum is None and _counts_batches(norm):  # cumulative average
        momentum = 1.0 / (float(norm.num_batches_tracked) + 1.0)  # type: ignore[arg-type]
    update = not norm.training or norm.track_running_stats
    return ops.BatchNormParameters(
        norm.weight,
        norm.bias,
        norm.running_mean if update else None,
        norm.running_var if update else None,
        momentum,
        norm.eps,
    )


def count_batch(norm: nn.BatchNorm2d) -> None:
    """nn.BatchNorm2d's bookkeeping for a batch that an op has taken."""
    if _counts_batches(norm):
        norm.num_batches_tracked.add_(1)  # type: ignore[union-attr]


def batch_norm_act(
    input: Tensor, norm: nn.BatchNorm2d, activation: str, residual: Tensor | None = None
) -> Tensor:
    """activation(norm(input) + residual) as one op, with nn.BatchNorm2d's bookkeeping."""
    weight, bias, running_mean, running_var, momentum, eps = norm_parameters(norm)
    output = ops.batch_norm_act(
        input,
        weight,
        bias,
        running_mean,
        running_var,
        uses_batch_statistics(norm),
        momentum,
        eps,
        activation,
        residual,
    )
    count_batch(norm)
    return output


def conv_norm_act(
    input: Tensor,
    stage: ConvNorm,
    residual: Tensor | None = None,
    return_mean: bool = False,
) -> Tensor:
    """activation(norm(conv(input)) + residual), or with ``return_mean`` its spatial mean.

    Args:
        input: [N, C, H, W].
        stage: the modules.
        residual: [N, K, H', W'] or None.
        return_mean: return [N, K] instead of [N, K, H', W'].
    """
    conv, norm = stage.conv, stage.norm
    kind = convolution_kind(conv)
    name = activation_name(stage.activation)
    if kind is None or name is None or not is_plain_norm(norm) or has_global_hooks():
        return _call_modules(input, stage, residual, return_mean)
    dtype = autocast_dtype(input)
    if dtype is not None:
        input = input.to(dtype)
        residual = None if residual is None else residual.to(dtype)
    weight = cast_weight(conv.weight, dtype)
    if uses_batch_statistics(norm):
        assert isinstance(norm, nn.BatchNorm2d)
        output, _ = _convolve(kind, input, weight, stage, None, conv.bias, "none")
        output = batch_norm_act(output, norm, name, residual)
        return output.mean((2, 3)) if return_mean else output
    scale, bias = fold(conv, norm)
    if residual is not None and kind == "depthwise":  # this op has no residual
        output, _ = _convolve(kind, input, weight, stage, scale, bias, "none")
        output = ops.activation(output + residual, name)
        return output.mean((2, 3)) if return_mean else output
    output, mean = _convolve(kind, input, weight, stage, scale, bias, name, residual, return_mean)
    return mean if return_mean else output


def geometry(stage: ConvNorm) -> tuple[tuple[int, int], Padding, tuple[int, int]]:
    """Stride, padding and dilation, as the ops take them, of a convolution that they know."""
    conv = stage.conv
    padding: Padding = "same" if stage.same is not None else _own_padding(conv)
    return (conv.stride[0], conv.stride[1]), padding, (conv.dilation[0], conv.dilation[1])


def _convolve(
    kind: str,
    input: Tensor,
    weight: Tensor,
    stage: ConvNorm,
    scale: Tensor | None,
    bias: Tensor | None,
    activation: str,
    residual: Tensor | None = None,
    return_mean: bool = False,
) -> tuple[Tensor, Tensor]:
    """(output, its spatial mean; the mean only means something with ``return_mean``)."""
    stride, padding, dilation = geometry(stage)
    if kind == "pointwise":
        result = ops.pointwise_conv(
            input, weight, bias, None, residual, activation, return_mean, scale=scale
        )
    elif kind == "depthwise":
        result = ops.depthwise_conv(
            input,
            weight,
            bias,
            stride,
            padding,
            dilation,
            activation,
            return_mean,
            scale=scale,
        )
    else:
        output = ops.conv(
            input,
            weight,
            bias,
            stride,
            padding,
            dilation,
            residual,
            activation,
            scale=scale,
        )
        result = (output, output.mean((2, 3))) if return_mean else output
    return result if isinstance(result, tuple) else (result, result)


def _call_modules(
    input: Tensor, stage: ConvNorm, residual: Tensor | None, return_mean: bool
) -> Tensor:
    if stage.same is not None:
        kernel, stride = ([value, value] for value in stage.same)
        sides = resolve_padding("padding", "same", input.shape[2:], kernel, stride, [1, 1])
        input = F.pad(input, sides)
    output: Tensor = stage.norm(stage.conv(input))
    if residual is not None:
        output = output + residual
    output = stage.activation(output)
    return output.mean((2, 3)) if return_mean else output
