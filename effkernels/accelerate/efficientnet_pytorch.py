"""efficientnet_pytorch's EfficientNets."""
# ruff: noqa: D101 -- every class here is efficientnet_pytorch's of the same name

from efficientnet_pytorch import model, utils

from .kinds import Accelerated
from .mbconv_block import AcceleratedMBConvBlock, register

register(utils)


class MBConvBlock(AcceleratedMBConvBlock, model.MBConvBlock):
    library = utils


class EfficientNet(Accelerated, model.EfficientNet):
    pass


ADAPTERS = (MBConvBlock, EfficientNet)
