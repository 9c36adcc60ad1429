"""The inverted-residual block of the EfficientNet family."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .. import ops
from . import arguments
from .block import Block, block_arguments, kept, train_block
from .conv_norm_act import same_or_own_padding
from .fused import (
    ConvNorm,
    autocast_dtype,
    conv_norm_act,
    fold,
    is_plain_norm,
    uses_batch_statistics,
)
from .hooks import has_global_hooks, is_untouched
from .plan import Planned
from .squeeze_excite import SqueezeExcite

__all__ = ["DepthwiseSeparableConv", "MBConv", "drop_path"]

NormLayer = Callable[[int], nn.Module]
ActLayer = Callable[[], nn.Module]


def drop_path(input: Tensor, probability: float) -> Tensor:
    """Zero whole samples with ``probability`` and scale the others by its complement's inverse.

    Stochastic depth (Huang et al., 2016) per sample; [N, ...] -> [N, ...].
    """
    return input * kept(input, probability).view(-1, *(1,) * (input.dim() - 1))


class MBConv(Planned):
    """Inverted residual with squeeze-and-excitation (Sandler et al., 2018; Tan & Le, 2019).

    expand 1×1 → BatchNorm → act → depthwise k×k → BatchNorm → act → SE → project 1×1 → BatchNorm,
    plus the input where stride is 1 and the channels agree. In evaluation the whole block is one
    ``ops.mbconv``, in training one ``ops.mbconv_training``; with BatchNorms of both kinds each
    convolution is followed by one fused BatchNorm + activation.
    Every BatchNorm decides by its own ``training`` flag. Children that have hooks or that were
    replaced are called as modules.

    Children have timm's names: ``conv_pw, bn1, conv_dw, bn2, se, conv_pwl, bn3``; with
    ``expand_ratio=1`` there is no expansion and they are ``conv_dw, bn1, se, conv_pw, bn2``.

    Args:
        in_channels, out_channels: C and K.
        kernel_size: of the depthwise convolution, odd.
        stride: of the depthwise convolution.
        expand_ratio: expanded channels E = round(C · expand_ratio).
        se_ratio: SE reduces to max(1, int(C · se_ratio)) channels, counted from the block's
            input; 0 or None for a block without SE.
        padding: ``"symmetric"`` (kernel_size // 2 on every side) or ``"same"`` (TensorFlow's:
            at stride 2 the odd row and column go bottom and right).
        act_layer: builds an activation.
        norm_layer: builds a BatchNorm from its number of channels.
        drop_path: probability that training drops a sample's block (only with a residual).

    Raises:
        ValueError: naming the argument, what came and what is accepted.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        expand_ratio: float = 6,
        se_ratio: float | None = 0.25,
        padding: str = "symmetric",
        act_layer: ActLayer = nn.SiLU,
        norm_layer: NormLayer = nn.BatchNorm2d,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        arguments.positive(name, "in_channels", in_channels)
        arguments.positive(name, "out_channels", out_channels)
        arguments.odd(name, "kernel_size", kernel_size)
        arguments.positive(name, "stride", stride)
        arguments.ratio(name, "expand_ratio", expand_ratio)
        if se_ratio is not None and se_ratio != 0:
            arguments.ratio(name, "se_ratio", se_ratio)
        arguments.padding_mode(name, padding)
        self.drop_path = arguments.probability(name, "drop_path", drop_path)
        self.has_residual = stride == 1 and in_channels == out_channels
        self._same, own_padding = same_or_own_padding(kernel_size, stride, padding)

        expanded = round(in_channels * expand_ratio)
        arguments.positive(name, "in_channels · expand_ratio", expanded)
        self.has_expansion = expand_ratio != 1
        # Modules are made in the order that timm's state dict has.
        if self.has_expansion:
            self.conv_pw = nn.Conv2d(in_channels, expanded, 1, bias=False)
            self.bn1 = norm_layer(expanded)
            self.act1 = act_layer()
        self.conv_dw = nn.Conv2d(
            expanded, expanded, kernel_size, stride, own_padding, groups=expanded, bias=False
        )
        if self.has_expansion:
            self.bn2 = norm_layer(expanded)
            self.act2 = act_layer()
        else:
            self.bn1 = norm_layer(expanded)
            self.act1 = act_layer()
        self.se: nn.Module = nn.Identity()
        if se_ratio:
            self.se = SqueezeExcite(expanded, max(1, int(in_channels * se_ratio)), act_layer)
        project = nn.Conv2d(expanded, out_channels, 1, bias=False)
        if self.has_expansion:
            self.conv_pwl = project
            self.bn3 = norm_layer(out_channels)
        else:
            self.conv_pw = project
            self.bn2 = norm_layer(out_channels)

    def forward(self, input: Tensor) -> Tensor:
        """The block.

        Args:
            input: [N, C, H, W].

        Returns:
            [N, K, H', W'], H' = ceil(H / stride) with either padding.

        Raises:
            TypeError, ValueError: from the ops, naming the argument.
            BackendUnavailable: if a backend was asked for that cannot run this call.
        """
        output: Tensor = self.planned(self._block, input)
        return output

    def _block(self, input: Tensor) -> Tensor:
        expand, depthwise, project = self._stages()
        dropping = self.training and self.has_residual and self.drop_path > 0.0
        dtype = autocast_dtype(input)
        whole = None if dropping or has_global_hooks() else self._whole_block(dtype)
        if whole is not None:
            return ops.mbconv(input if dtype is None else input.to(dtype), *whole)
        if all(is_plain_norm(stage.norm) for stage in self.conv_norms()):
            trained = train_block(self._block_of_modules(dropping), input)
            if trained is not None:
                return trained
        hidden = input if expand is None else conv_norm_act(input, expand)
        hidden = self.se(conv_norm_act(hidden, depthwise))
        if not self.has_residual:
            return conv_norm_act(hidden, project)
        if not dropping:
            return conv_norm_act(hidden, project, residual=input)
        output = conv_norm_act(hidden, project)
        return drop_path(output, self.drop_path) + input.to(output.dtype)  # autocast may differ

    def conv_norms(self) -> tuple[ConvNorm, ...]:
        """The convolutions with the BatchNorms that follow them."""
        return tuple(stage for stage in self._stages() if stage is not None)

    def _stages(self) -> tuple[ConvNorm | None, ConvNorm, ConvNorm]:
        """Expansion (if any), depthwise convolution and projection."""
        if self.has_expansion:
            return (
                ConvNorm(self.conv_pw, self.bn1, self.act1),
                ConvNorm(self.conv_dw, self.bn2, self.act2, self._same),
                ConvNorm(self.conv_pwl, self.bn3, NO_ACTIVATION),
            )
        return (
            None,
            ConvNorm(self.conv_dw, self.bn1, self.act1, self._same),
            ConvNorm(self.conv_pw, self.bn2, NO_ACTIVATION),
        )

    def _block_of_modules(self, dropping: bool = False) -> Block:
        """The block's children."""
        nothing = type(self.se) is nn.Identity and is_untouched(self.se)
        squeeze = None if nothing else self.se
        probability = self.drop_path if dropping else 0.0
        return Block(*self._stages(), squeeze, self.has_residual, probability)

    def _whole_block(
        self, dtype: torch.dtype | None
    ) -> tuple[ops.MBConvParameters, ops.MBConvGeometry] | None:
        """The block as the arguments of one op, weights in ``dtype`` unless that is None.

        None if the block has to go stage by stage.
        """
        expand, depthwise, project = self._stages()
        if any(
            not is_plain_norm(stage.norm) or uses_batch_statistics(stage.norm)
            for stage in self.conv_norms()
        ):
            return None
        arguments = block_arguments(self._block_of_modules(), dtype)
        if arguments is None:
            return None
        weights, geometry = arguments
        expand_scale = expand_bias = None
        if expand is not None:
            expand_scale, expand_bias = fold(expand.conv, expand.norm)
        depthwise_scale, depthwise_bias = fold(depthwise.conv, depthwise.norm)
        project_scale, project_bias = fold(project.conv, project.norm)
        parameters = weights._replace(
            expand_scale=expand_scale,
            expand_bias=expand_bias,
            depthwise_scale=depthwise_scale,
            depthwise_bias=depthwise_bias,
            project_scale=project_scale,
            project_bias=project_bias,
        )
        return parameters, geometry

    def extra_repr(self) -> str:
        return f"residual={self.has_residual}, drop_path={self.drop_path:g}"


class DepthwiseSeparableConv(MBConv):
    """Depthwise k×k → BatchNorm → act → [SE] → pointwise 1×1 → BatchNorm, plus the input.

    MBConv without the expansion; child names ``conv_dw, bn1, se, conv_pw, bn2``. Arguments are
    those of :class:`MBConv`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        se_ratio: float | None = 0.0,
        padding: str = "symmetric",
        act_layer: ActLayer = nn.SiLU,
        norm_layer: NormLayer = nn.BatchNorm2d,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            1,
            se_ratio,
            padding,
            act_layer,
            norm_layer,
            drop_path,
        )


NO_ACTIVATION = nn.Identity()  # the projection is linear
