"""The block of efficientnet_pytorch, and of efficientnet_lite_pytorch, which was made from it."""

from __future__ import annotations

from functools import partial
from types import ModuleType
from typing import Any, ClassVar

from torch import Tensor, nn

from ..modules.block import Block
from ..modules.fused import ConvNorm, register_activation, register_convolution
from ..modules.hooks import is_untouched
from ..modules.mbconv import NO_ACTIVATION
from ..modules.squeeze_excite import SqueezeExciteParts
from .kinds import AcceleratedBlock

SIGMOID = nn.Sigmoid()  # they call the function


class AcceleratedMBConvBlock(AcceleratedBlock):
    """In front of a library's MBConvBlock; its children have the same names in both."""

    library: ClassVar[ModuleType]  # its module `utils`

    def as_block(self, drop_connect_rate: float | None = None) -> Block | None:
        """As :class:`AcceleratedBlock` says."""
        module: Any = self
        options, swish = module._block_args, module._swish
        expands = options.expand_ratio != 1
        norms = [module._bn1, module._bn2, *([module._bn0] if expands else [])]
        rate = drop_connect_rate or 0.0
        if any(type(norm) is not nn.BatchNorm2d for norm in norms) or not 0.0 <= rate <= 1.0:
            return None
        residual = (
            module.id_skip
            and options.stride == 1
            and options.input_filters == options.output_filters
        )
        return Block(
            ConvNorm(module._expand_conv, module._bn0, swish) if expands else None,
            ConvNorm(module._depthwise_conv, module._bn1, swish),
            ConvNorm(module._project_conv, module._bn2, NO_ACTIVATION),
            SqueezeExciteParts(module._se_reduce, swish, module._se_expand, SIGMOID)
            if module.has_se
            else None,
            residual,
            rate if residual else 0.0,
            self._kept,
        )

    def _kept(self, input: Tensor, rate: float) -> Tensor:
        """What ``drop_connect`` multiplies each sample with, [N]: it draws in its own way."""
        kept: Tensor = self.library.drop_connect(input.new_ones(len(input), 1, 1, 1), rate, True)
        return kept.flatten()

    def forward(self, inputs: Any, drop_connect_rate: float | None = None) -> Any:
        """As the original's, which looks at ``drop_connect_rate`` in training only."""
        if self.training:
            return super().forward(inputs, drop_connect_rate=drop_connect_rate)
        return super().forward(inputs)


def register(library: ModuleType) -> None:
    """Let the convolutions and activations of its module ``utils`` run as the ops' own."""
    for activation in (library.Swish, library.MemoryEfficientSwish):
        register_activation(activation, "silu")
    register_convolution(library.Conv2dDynamicSamePadding, lambda conv: "same")
    identity = getattr(library, "Identity", nn.Identity)
    register_convolution(library.Conv2dStaticSamePadding, partial(_static_padding, identity))


def _static_padding(identity: type[nn.Module], conv: Any) -> tuple[int, ...] | None:
    """What a convolution made for images of one size pads all of them by."""
    child = conv.static_padding
    if any(conv.padding) or not is_untouched(child):
        return None
    if type(child) is identity:
        return (0, 0)
    return tuple(child.padding) if type(child) is nn.ZeroPad2d else None
