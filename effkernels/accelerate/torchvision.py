"""torchvision's EfficientNets (V1, V2), MobileNets, MNASNet and ResNets."""
# ruff: noqa: D101 -- every class here is torchvision's of the same name

from torchvision.models import efficientnet, mnasnet, mobilenetv2, mobilenetv3, resnet
from torchvision.ops import misc

from ..modules.squeeze_excite import register_squeeze_excite
from .kinds import Accelerated, AcceleratedConvNormAct, AcceleratedSqueezeExcite


class MBConv(Accelerated, efficientnet.MBConv):
    pass


class FusedMBConv(Accelerated, efficientnet.FusedMBConv):
    pass


class EfficientNet(Accelerated, efficientnet.EfficientNet):
    pass


class MobileNetV2Block(Accelerated, mobilenetv2.InvertedResidual):
    pass


class MobileNetV2(Accelerated, mobilenetv2.MobileNetV2):
    pass


class MobileNetV3Block(Accelerated, mobilenetv3.InvertedResidual):
    pass


class MobileNetV3(Accelerated, mobilenetv3.MobileNetV3):
    pass


class MNASNetBlock(Accelerated, mnasnet._InvertedResidual):
    pass


class MNASNet(Accelerated, mnasnet.MNASNet):
    pass


class BasicBlock(Accelerated, resnet.BasicBlock):
    pass


class Bottleneck(Accelerated, resnet.Bottleneck):
    pass


class ResNet(Accelerated, resnet.ResNet):
    pass


class SqueezeExcitation(AcceleratedSqueezeExcite, misc.SqueezeExcitation):
    pass


class Conv2dNormActivation(AcceleratedConvNormAct, misc.Conv2dNormActivation):
    pass


register_squeeze_excite(
    SqueezeExcitation, "fc1", "activation", "fc2", "scale_activation", mean="avgpool"
)

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
    SqueezeExcitation,
    Conv2dNormActivation,
)
