"""Drop-in modules: ordinary parameters and children, fused forward."""

from .activation import SiLU
from .batch_norm_act import BatchNormAct2d
from .conv_norm_act import ConvNormAct
from .fused_mbconv import FusedMBConv
from .mbconv import DepthwiseSeparableConv, MBConv
from .squeeze_excite import SqueezeExcite

__all__ = [
    "BatchNormAct2d",
    "ConvNormAct",
    "DepthwiseSeparableConv",
    "FusedMBConv",
    "MBConv",
    "SiLU",
    "SqueezeExcite",
]
