"""The functional ops: one file per op, each with its schema, shape rule, reference and gradient."""

from ._common import ACTIVATIONS
from .batch_norm_act import batch_norm_act, fold_batch_norm
from .conv import conv
from .depthwise_conv import depthwise_conv
from .depthwise_separable_conv import depthwise_separable_conv
from .mbconv import MBConvGeometry, MBConvParameters, mbconv
from .mbconv_training import BatchNormParameters, mbconv_training
from .pointwise_conv import pointwise_conv
from .silu import activation, silu
from .squeeze_excite import squeeze_excite, squeeze_excite_gate

__all__ = [
    "ACTIVATIONS",
    "BatchNormParameters",
    "MBConvGeometry",
    "MBConvParameters",
    "activation",
    "batch_norm_act",
    "conv",
    "depthwise_conv",
    "depthwise_separable_conv",
    "fold_batch_norm",
    "mbconv",
    "mbconv_training",
    "pointwise_conv",
    "silu",
    "squeeze_excite",
    "squeeze_excite_gate",
]
