"""torchvision's EfficientNets (V1, V2), MobileNets, MNASNet and ResNets; in evaluation its other
convolutional networks, too.
"""
# ruff: noqa: D101 -- every class here is torchvision's of the same name

from typing import Any

from torch import nn
from torchvision import models
from torchvision.models import efficientnet, mnasnet, mobilenetv2, mobilenetv3, resnet
from torchvision.ops import StochasticDepth, misc

from ..modules.block import Block
from ..modules.fused import ConvNorm, activation_name
from ..modules.hooks import is_untouched
from ..modules.mbconv import NO_ACTIVATION
from ..modules.squeeze_excite import register_squeeze_excite
from .kinds import (
    Accelerated,
    AcceleratedBlock,
    AcceleratedConvNormAct,
    AcceleratedSqueezeExcite,
)


class Conv2dNormActivation(AcceleratedConvNormAct, misc.Conv2dNormActivation):
    pass


class SqueezeExcitation(AcceleratedSqueezeExcite, misc.SqueezeExcitation):
    pass


register_squeeze_excite(
    SqueezeExcitation, "fc1", "activation", "fc2", "scale_activation", mean="avgpool"
)

CONTAINERS = (nn.Sequential, misc.Conv2dNormActivation, Conv2dNormActivation)


def _leaves(container: nn.Module) -> list[nn.Module] | None:
    """What ``container`` calls one after the other; None: somebody wants to see it called."""
    if not is_untouched(container):
        return None
    found: list[nn.Module] = []
    for child in container.children():
        if type(child) not in CONTAINERS:
            found.append(child)
            continue
        inside = _leaves(child)
        if inside is None:
            return None
        found += inside
    return found


def _block(container: Any, residual: Any, drop_path: float = 0.0) -> Block | None:
    """The block whose convolutions, norms and activations ``container`` calls."""
    stages: list[ConvNorm] = []
    squeeze: nn.Module | None = None
    modules = _leaves(container) or []
    while modules:
        if len(stages) > 0 and squeeze is None and type(modules[0]) is SqueezeExcitation:
            squeeze = modules.pop(0)
        if len(modules) < 2:
            return None
        conv, norm = modules.pop(0), modules.pop(0)
        if not isinstance(conv, nn.Conv2d) or type(norm) is not nn.BatchNorm2d:
            return None
        activation: nn.Module = NO_ACTIVATION
        if modules and activation_name(modules[0]) is not None:
            activation = modules.pop(0)
        stages.append(ConvNorm(conv, norm, activation))
    if len(stages) not in (2, 3):
        return None
    expand = stages[0] if len(stages) == 3 else None
    depthwise, project = stages[-2:]
    return Block(expand, depthwise, project, squeeze, residual, drop_path)


class MBConv(AcceleratedBlock, efficientnet.MBConv):
    def as_block(self) -> Block | None:
        """As :class:`AcceleratedBlock` says."""
        depth: Any = self.stochastic_depth
        if type(depth) is not StochasticDepth or not is_untouched(depth):
            return None
        probability = depth.p if self.use_res_connect and depth.training else 0.0
        if probability > 0.0 and depth.mode != "row":
            return None
        return _block(self.block, self.use_res_connect, probability)


class FusedMBConv(Accelerated, efficientnet.FusedMBConv):
    pass


class EfficientNet(Accelerated, efficientnet.EfficientNet):
    pass


class MobileNetV2Block(AcceleratedBlock, mobilenetv2.InvertedResidual):
    def as_block(self) -> Block | None:
        """As :class:`AcceleratedBlock` says."""
        return _block(self.conv, self.use_res_connect)


class MobileNetV2(Accelerated, mobilenetv2.MobileNetV2):
    pass


class MobileNetV3Block(AcceleratedBlock, mobilenetv3.InvertedResidual):
    def as_block(self) -> Block | None:
        """As :class:`AcceleratedBlock` says."""
        return _block(self.block, self.use_res_connect)


class MobileNetV3(Accelerated, mobilenetv3.MobileNetV3):
    pass


class MNASNetBlock(AcceleratedBlock, mnasnet._InvertedResidual):
    def as_block(self) -> Block | None:
        """As :class:`AcceleratedBlock` says."""
        return _block(self.layers, self.apply_residual)


class MNASNet(Accelerated, mnasnet.MNASNet):
    pass


class BasicBlock(Accelerated, resnet.BasicBlock):
    pass


class Bottleneck(Accelerated, resnet.Bottleneck):
    pass


class ResNet(Accelerated, resnet.ResNet):
    pass


class ConvNeXt(Accelerated, models.ConvNeXt):
    pass


class DenseNet(Accelerated, models.DenseNet):
    pass


class GoogLeNet(Accelerated, models.GoogLeNet):
    pass


class Inception3(Accelerated, models.Inception3):
    pass


class RegNet(Accelerated, models.RegNet):
    pass


class ShuffleNetV2(Accelerated, models.ShuffleNetV2):
    pass


class SqueezeNet(Accelerated, models.SqueezeNet):
    pass


class VGG(Accelerated, models.VGG):
    pass


ADAPTERS = (
    MBConv,
    FusedMBConv,
    EfficientNet,
    MobileNetV2Block,
    MobileNetV2,
    MobileNetV3Block,
    MobileNetV3,
    MNASNetBlock,
    MNASNet,
    BasicBlock,
    Bottleneck,
    ResNet,
    ConvNeXt,
    DenseNet,
    GoogLeNet,
    Inception3,
    RegNet,
    ShuffleNetV2,
    SqueezeNet,
    VGG,
    SqueezeExcitation,
    Conv2dNormActivation,
)
