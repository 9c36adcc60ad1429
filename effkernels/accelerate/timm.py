"""timm's networks of inverted residuals: EfficientNets (V1, V2, Lite, TF), MobileNets, MnasNet,
MixNet, FBNet, TinyNet; and its ResNets. In evaluation some of its other convolutional networks,
too.
"""
# ruff: noqa: D101 -- every class here is timm's of the same name

from collections.abc import Sequence
from typing import Any

from timm.layers import Conv2dSame, drop, norm_act
from timm.models import (
    _efficientnet_blocks,
    byobnet,
    convnext,
    densenet,
    efficientnet,
    efficientvit_mit,
    mobilenetv3,
    regnet,
    resnet,
    rexnet,
)
from torch import nn

from ..modules.block import Block
from ..modules.fused import ConvNorm, register_convolution
from ..modules.hooks import is_untouched
from ..modules.squeeze_excite import register_squeeze_excite
from .kinds import Accelerated, AcceleratedBlock, AcceleratedNormAct, AcceleratedSqueezeExcite


class BatchNormAct2d(AcceleratedNormAct, norm_act.BatchNormAct2d):
    pass


class SqueezeExcite(AcceleratedSqueezeExcite, _efficientnet_blocks.SqueezeExcite):
    pass


register_squeeze_excite(SqueezeExcite, "conv_reduce", "act1", "conv_expand", "gate")
register_convolution(Conv2dSame, lambda conv: "same")


def _stage(conv: nn.Module, norm: nn.Module) -> ConvNorm | None:
    """The two as the ops take them; None: they must be called."""
    if not isinstance(conv, nn.Conv2d) or type(norm) is not BatchNormAct2d:
        return None
    if type(norm.drop) is not nn.Identity or not is_untouched(norm.drop):
        return None
    return ConvNorm(conv, norm, norm.act)


def _block(module: Any, stages: Sequence[ConvNorm | None]) -> Block | None:
    """A block of timm's with these convolutions, an expansion among them or not."""
    expand, depthwise, project = (None, *stages)[-3:]
    if depthwise is None or project is None or (len(stages) == 3 and expand is None):
        return None
    aside = module.aa if module.conv_s2d is None else module.conv_s2d
    if type(aside) is not nn.Identity or not is_untouched(aside):
        return None
    nothing = type(module.se) is nn.Identity and is_untouched(module.se)
    squeeze, probability = None if nothing else module.se, 0.0
    path = module.drop_path
    if module.has_skip and type(path) is drop.DropPath:
        if not is_untouched(path) or not path.scale_by_keep:
            return None
        probability = path.drop_prob if path.training else 0.0
    elif module.has_skip and (type(path) is not nn.Identity or not is_untouched(path)):
        return None
    return Block(expand, depthwise, project, squeeze, module.has_skip, probability)


class InvertedResidual(AcceleratedBlock, _efficientnet_blocks.InvertedResidual):
    def as_block(self) -> Block | None:
        """As :class:`AcceleratedBlock` says."""
        expand = _stage(self.conv_pw, self.bn1)
        return _block(
            self, (expand, _stage(self.conv_dw, self.bn2), _stage(self.conv_pwl, self.bn3))
        )


class DepthwiseSeparableConv(AcceleratedBlock, _efficientnet_blocks.DepthwiseSeparableConv):
    def as_block(self) -> Block | None:
        """As :class:`AcceleratedBlock` says."""
        return _block(self, (_stage(self.conv_dw, self.bn1), _stage(self.conv_pw, self.bn2)))


class EdgeResidual(Accelerated, _efficientnet_blocks.EdgeResidual):
    pass


class ConvBnAct(Accelerated, _efficientnet_blocks.ConvBnAct):
    pass


class EfficientNet(Accelerated, efficientnet.EfficientNet):
    pass


class EfficientNetFeatures(Accelerated, efficientnet.EfficientNetFeatures):
    pass


class MobileNetV3(Accelerated, mobilenetv3.MobileNetV3):
    pass


class MobileNetV3Features(Accelerated, mobilenetv3.MobileNetV3Features):
    pass


class BasicBlock(Accelerated, resnet.BasicBlock):
    pass


class Bottleneck(Accelerated, resnet.Bottleneck):
    pass


class ResNet(Accelerated, resnet.ResNet):
    pass


class ByobNet(Accelerated, byobnet.ByobNet):
    pass


class ConvNeXt(Accelerated, convnext.ConvNeXt):
    pass


class DenseNet(Accelerated, densenet.DenseNet):
    pass


class EfficientVit(Accelerated, efficientvit_mit.EfficientVit):
    pass


class RegNet(Accelerated, regnet.RegNet):
    pass


class RexNet(Accelerated, rexnet.RexNet):
    pass


ADAPTERS = (
    InvertedResidual,
    DepthwiseSeparableConv,
    EdgeResidual,
    ConvBnAct,
    SqueezeExcite,
    BatchNormAct2d,
    EfficientNet,
    EfficientNetFeatures,
    MobileNetV3,
    MobileNetV3Features,
    BasicBlock,
    Bottleneck,
    ResNet,
    ByobNet,
    ConvNeXt,
    DenseNet,
    EfficientVit,
    RegNet,
    RexNet,
)
