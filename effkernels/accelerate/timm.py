"""timm's networks of inverted residuals: EfficientNets (V1, V2, Lite, TF), MobileNets, MnasNet,
MixNet, FBNet, TinyNet; and its ResNets.
"""
# ruff: noqa: D101 -- every class here is timm's of the same name

from timm.layers import norm_act
from timm.models import _efficientnet_blocks, efficientnet, mobilenetv3, resnet

from ..modules.squeeze_excite import register_squeeze_excite
from .kinds import Accelerated, AcceleratedNormAct, AcceleratedSqueezeExcite


class InvertedResidual(Accelerated, _efficientnet_blocks.InvertedResidual):
    pass


class DepthwiseSeparableConv(Accelerated, _efficientnet_blocks.DepthwiseSeparableConv):
    pass


class EdgeResidual(Accelerated, _efficientnet_blocks.EdgeResidual):
    pass


class ConvBnAct(Accelerated, _efficientnet_blocks.ConvBnAct):
    pass


class SqueezeExcite(AcceleratedSqueezeExcite, _efficientnet_blocks.SqueezeExcite):
    pass


class BatchNormAct2d(AcceleratedNormAct, norm_act.BatchNormAct2d):
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


register_squeeze_excite(SqueezeExcite, "conv_reduce", "act1", "conv_expand", "gate")

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
)
