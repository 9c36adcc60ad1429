"""The inverted residual as the ops take it, from the modules of whatever library."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from .. import ops
from ..dispatch import runs_on
from .fused import (
    ConvNorm,
    activation_name,
    autocast_dtype,
    cast_weight,
    convolution_kind,
    count_batch,
    geometry,
    norm_parameters,
    uses_batch_statistics,
)
from .hooks import has_global_hooks, is_untouched
from .squeeze_excite import NO_SQUEEZE_EXCITE, SqueezeExciteParts, fused_squeeze_excite


def kept(input: Tensor, probability: float) -> Tensor:
    """What stochastic depth multiplies each sample with, [N]; torchvision and timm draw the same
    random numbers."""
    keep = 1.0 - probability
    noise = input.new_empty(input.shape[0]).bernoulli_(keep)
    return noise.div_(keep) if keep > 0.0 else noise


class Block(NamedTuple):
    """expand → depthwise → squeeze-and-excitation → project [+ input], as modules.

    Whoever makes one has seen that its containers and norms are of the classes that they seem to
    be; convolutions, activations and hooks are looked at here.
    """

    expand: ConvNorm | None
    depthwise: ConvNorm
    project: ConvNorm
    squeeze_excite: nn.Module | SqueezeExciteParts | None
    residual: bool
    drop_path: float = 0.0  # probability that training drops a sample's block
    draw: Callable[[Tensor, float], Tensor] = kept  # what each is multiplied with then, [N]

    def stages(self) -> list[tuple[ConvNorm, str]]:
        """Its convolutions with their kinds, in order."""
        first = [] if self.expand is None else [(self.expand, "pointwise")]
        return [*first, (self.depthwise, "depthwise"), (self.project, "pointwise")]


def block_arguments(
    block: Block, dtype: torch.dtype | None
) -> tuple[ops.MBConvParameters, ops.MBConvGeometry] | None:
    """The block's weights, in ``dtype`` unless that is None, without its norms; and its geometry.

    None if a child is not one that the ops know, or has hooks.
    """
    for stage, kind in block.stages():
        if convolution_kind(stage.conv) != kind or not is_untouched(stage.norm):
            return None
    expand, conv = block.expand, block.depthwise.conv
    activation = activation_name(block.depthwise.activation)
    if activation is None or activation_name(block.project.activation) != "none":
        return None
    if expand is not None and activation_name(expand.activation) != activation:
        return None
    squeeze = NO_SQUEEZE_EXCITE
    if block.squeeze_excite is not None:
        fused = fused_squeeze_excite(block.squeeze_excite, dtype)
        if fused is None:
            return None
        squeeze = fused
    parameters = ops.MBConvParameters(
        cast_weight(conv.weight, dtype),
        cast_weight(block.project.conv.weight, dtype),
        None if expand is None else cast_weight(expand.conv.weight, dtype),
        se_reduce_weight=squeeze.reduce_weight,
        se_reduce_bias=squeeze.reduce_bias,
        se_expand_weight=squeeze.expand_weight,
        se_expand_bias=squeeze.expand_bias,
    )
    return parameters, ops.MBConvGeometry(
        *geometry(block.depthwise),
        block.residual,
        activation,
        squeeze.activation,
        squeeze.gate_activation,
    )


def train_block(block: Block, input: Tensor) -> Tensor | None:
    """The block with the batch's statistics as one op, which keeps little for the backward pass.

    None, and nothing has happened, if it has to go stage by stage: without gradients or images,
    with a frozen norm or a child that must be called, on a device without kernels.

    Args:
        block: its modules.
        input: [N, C, H, W].
    """
    if not torch.is_grad_enabled() or input.numel() == 0 or has_global_hooks():
        return None
    if runs_on("mbconv_training", "reference", input):
        return None  # PyTorch's own formulas for the stages are faster than one for the whole
    for stage, _ in block.stages():
        if stage.conv.bias is not None or not uses_batch_statistics(stage.norm):
            return None
    dtype = autocast_dtype(input)
    arguments = block_arguments(block, dtype)
    if arguments is None:
        return None

    def norm(stage: ConvNorm) -> ops.BatchNormParameters:
        return norm_parameters(cast(nn.BatchNorm2d, stage.norm))

    input = input if dtype is None else input.to(dtype)
    output = ops.mbconv_training(
        input,
        arguments[0],
        None if block.expand is None else norm(block.expand),
        norm(block.depthwise),
        norm(block.project),
        arguments[1],
        block.draw(input, block.drop_path).float() if block.drop_path > 0.0 else None,
    )
    for stage, _ in block.stages():
        count_batch(cast(nn.BatchNorm2d, stage.norm))
    return output
