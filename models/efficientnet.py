"""EfficientNet B0–B7 (Tan & Le, 2019) and EfficientNet-Lite0–4 (Google, 2020).

One table of stages, one scaling rule; a variant is a row. BatchNorm's eps and momentum, dropout
and stochastic depth are those of the authors' released code (tensorflow/tpu, models/official/
efficientnet, and its ``lite`` folder). State-dict keys are timm's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from effkernels.modules import MBConv, arguments
from effkernels.modules.conv_norm_act import same_or_own_padding
from effkernels.modules.fused import ConvNorm, conv_norm_act
from effkernels.modules.plan import Planned

from .scaling import scale_channels, scale_depth


class Stage(NamedTuple):
    """Blocks of one resolution, before scaling."""

    blocks: int
    out_channels: int
    kernel_size: int
    stride: int
    expand_ratio: int


STAGES = (
    Stage(1, 16, 3, 1, 1),
    Stage(2, 24, 3, 2, 6),
    Stage(2, 40, 5, 2, 6),
    Stage(3, 80, 3, 2, 6),
    Stage(3, 112, 5, 1, 6),
    Stage(4, 192, 5, 2, 6),
    Stage(1, 320, 3, 1, 6),
)
STEM_CHANNELS = 32
HEAD_CHANNELS = 1280
SE_RATIO = 0.25
BN_EPS = 1e-3
BN_MOMENTUM = 0.01  # PyTorch's sense: the released code keeps 0.99 of the old statistics
DROP_PATH_RATE = 0.2  # of the last block; grows linearly from 0
CROP_MARGIN = 32  # the released code's CROP_PADDING: resize to resolution + 32, then crop

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class DataConfig:
    """What a network expects of a photograph.

    The shorter side is resized to ``resize``, the centre ``resolution``² is cropped, values in
    [0, 1] become (x − mean) / std.
    """

    resolution: int
    resize: int
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    interpolation: str = "bicubic"


@dataclass(frozen=True)
class Variant:
    """A row of the family: scaling factors, input resolution, dropout of the classifier."""

    width: float
    depth: float
    resolution: int
    drop_rate: float
    lite: bool = False

    @property
    def data_config(self) -> DataConfig:
        resize = self.resolution + CROP_MARGIN
        if not self.lite:
            return DataConfig(self.resolution, resize)
        return DataConfig(self.resolution, resize, (127 / 255,) * 3, (128 / 255,) * 3)


VARIANTS = {
    "efficientnet_b0": Variant(1.0, 1.0, 224, 0.2),
    "efficientnet_b1": Variant(1.0, 1.1, 240, 0.2),
    "efficientnet_b2": Variant(1.1, 1.2, 260, 0.3),
    "efficientnet_b3": Variant(1.2, 1.4, 300, 0.3),
    "efficientnet_b4": Variant(1.4, 1.8, 380, 0.4),
    "efficientnet_b5": Variant(1.6, 2.2, 456, 0.4),
    "efficientnet_b6": Variant(1.8, 2.6, 528, 0.5),
    "efficientnet_b7": Variant(2.0, 3.1, 600, 0.5),
    "efficientnet_lite0": Variant(1.0, 1.0, 224, 0.2, lite=True),
    "efficientnet_lite1": Variant(1.0, 1.1, 240, 0.2, lite=True),
    "efficientnet_lite2": Variant(1.1, 1.2, 260, 0.3, lite=True),
    "efficientnet_lite3": Variant(1.2, 1.4, 280, 0.3, lite=True),
    "efficientnet_lite4": Variant(1.4, 1.8, 300, 0.3, lite=True),
}


def scaled_stages(variant: Variant) -> list[Stage]:
    """The stage table scaled for ``variant``; Lite keeps the depth of the first and the last."""
    scaled = []
    for index, stage in enumerate(STAGES):
        fixed = variant.lite and index in (0, len(STAGES) - 1)
        scaled.append(
            stage._replace(
                blocks=stage.blocks if fixed else scale_depth(stage.blocks, variant.depth),
                out_channels=scale_channels(stage.out_channels, variant.width),
            )
        )
    return scaled


class _Trunk(Planned):
    """Stem and blocks: what the classifier and the feature extractor share."""

    def __init__(
        self,
        variant: Variant,
        in_channels: int,
        drop_path_rate: float,
        padding: str,
        norm_layer: Callable[[int], nn.Module],
    ) -> None:
        super().__init__()
        self.data_config = variant.data_config
        self.act_layer: type[nn.Module] = nn.ReLU6 if variant.lite else nn.SiLU
        stem = STEM_CHANNELS if variant.lite else scale_channels(STEM_CHANNELS, variant.width)
        self._same, own_padding = same_or_own_padding(3, 2, padding)
        self.conv_stem = nn.Conv2d(in_channels, stem, 3, 2, own_padding, bias=False)
        self.bn1 = norm_layer(stem)
        self.act1 = self.act_layer()

        stages = scaled_stages(variant)
        total = sum(stage.blocks for stage in stages)
        channels, index = stem, 0
        self.blocks = nn.Sequential()
        for stage in stages:
            blocks = []
            for position in range(stage.blocks):
                blocks.append(
                    MBConv(
                        channels,
                        stage.out_channels,
                        stage.kernel_size,
                        stage.stride if position == 0 else 1,
                        stage.expand_ratio,
                        0.0 if variant.lite else SE_RATIO,
                        padding,
                        self.act_layer,
                        norm_layer,
                        drop_path_rate * index / total,
                    )
                )
                channels, index = stage.out_channels, index + 1
            self.blocks.append(nn.Sequential(*blocks))
        self.stages = tuple(stages)

    def _stem(self) -> ConvNorm:
        return ConvNorm(self.conv_stem, self.bn1, self.act1, self._same)


class EfficientNet(_Trunk):
    """An EfficientNet classifier.

    Child names are timm's: ``conv_stem, bn1, blocks.<stage>.<block>, conv_head, bn2,
    classifier``. Convolutions start from a normal distribution of variance 2 / fan-out, the
    classifier from a uniform one of ±1/√num_classes, as in the released code.

    Args:
        variant: row of :data:`VARIANTS`.
        num_classes: outputs; 0 for a network that returns the pooled features.
        in_channels: channels of the image.
        drop_rate: dropout before the classifier; None for the variant's.
        drop_path_rate: stochastic depth of the last block, growing linearly over the blocks.
        padding: ``"symmetric"`` or ``"same"``; None for ``"same"`` in Lite, else symmetric.
        bn_eps, bn_momentum: of every BatchNorm. A checkpoint trained elsewhere may need
            others: torchvision's and timm's own B0 to B4 use 1e-5.

    Raises:
        ValueError: naming the argument, what came and what is accepted.
    """

    def __init__(
        self,
        variant: Variant,
        num_classes: int = 1000,
        in_channels: int = 3,
        drop_rate: float | None = None,
        drop_path_rate: float | None = None,
        padding: str | None = None,
        bn_eps: float = BN_EPS,
        bn_momentum: float | None = BN_MOMENTUM,
    ) -> None:
        if isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < 0:
            raise ValueError(
                f"EfficientNet: num_classes is {num_classes!r}, a non-negative integer is accepted"
            )
        norm_layer = partial(nn.BatchNorm2d, eps=bn_eps, momentum=bn_momentum)
        super().__init__(
            variant, **_trunk_arguments(variant, in_channels, drop_path_rate, padding, norm_layer)
        )
        self.drop_rate = arguments.probability(
            "EfficientNet", "drop_rate", variant.drop_rate if drop_rate is None else drop_rate
        )
        self.num_classes = num_classes
        width = 1.0 if variant.lite else variant.width
        self.num_features = scale_channels(HEAD_CHANNELS, width)
        self.conv_head = nn.Conv2d(self.stages[-1].out_channels, self.num_features, 1, bias=False)
        self.bn2 = norm_layer(self.num_features)
        self.act2 = self.act_layer()
        self.classifier: nn.Module = nn.Identity()
        if num_classes:
            self.classifier = nn.Linear(self.num_features, num_classes)
        initialize(self)

    def forward_features(self, input: Tensor) -> Tensor:
        """[N, C, H, W] -> pooled features [N, F]; the head's pooling is part of its 1×1."""
        hidden = self.blocks(conv_norm_act(input, self._stem()))
        return conv_norm_act(hidden, self._head(), return_mean=True)

    def forward(self, input: Tensor) -> Tensor:
        """[N, C, H, W] -> logits [N, num_classes], or with num_classes=0 features [N, F]."""
        output: Tensor = self.planned(self._classify, input)
        return output

    def _classify(self, input: Tensor) -> Tensor:
        features = self.forward_features(input)
        features = F.dropout(features, self.drop_rate, self.training)
        return self.classifier(features)

    def _head(self) -> ConvNorm:
        return ConvNorm(self.conv_head, self.bn2, self.act2)


class Feature(NamedTuple):
    """One map of a feature extractor."""

    stage: int  # index into ``blocks``
    channels: int
    reduction: int  # input pixels per pixel, in each direction


class EfficientNetFeatures(_Trunk):
    """An EfficientNet without its head that returns a map per resolution.

    Keys are a subset of :class:`EfficientNet`'s. ``feature_info`` has a :class:`Feature` for
    each map.
    """

    def __init__(
        self,
        variant: Variant,
        in_channels: int = 3,
        drop_path_rate: float | None = None,
        padding: str | None = None,
        bn_eps: float = BN_EPS,
        bn_momentum: float | None = BN_MOMENTUM,
    ) -> None:
        norm_layer = partial(nn.BatchNorm2d, eps=bn_eps, momentum=bn_momentum)
        super().__init__(
            variant, **_trunk_arguments(variant, in_channels, drop_path_rate, padding, norm_layer)
        )
        reduction = 2
        self.feature_info: list[Feature] = []
        for index, stage in enumerate(self.stages):
            reduction *= stage.stride
            following = self.stages[index + 1 : index + 2]
            if not following or following[0].stride > 1:
                self.feature_info.append(Feature(index, stage.out_channels, reduction))
        initialize(self)

    def forward(self, input: Tensor) -> list[Tensor]:
        """[N, C, H, W] -> maps [N, C_i, H / r_i, W / r_i] for r = 2, 4, 8, 16, 32."""
        output: list[Tensor] = self.planned(self._maps, input)
        return output

    def _maps(self, input: Tensor) -> list[Tensor]:
        hidden = conv_norm_act(input, self._stem())
        wanted = [feature.stage for feature in self.feature_info]
        maps = []
        for index, stage in enumerate(self.blocks):
            hidden = stage(hidden)
            if index in wanted:
                maps.append(hidden)
        return maps


def _trunk_arguments(
    variant: Variant,
    in_channels: int,
    drop_path_rate: float | None,
    padding: str | None,
    norm_layer: Callable[[int], nn.Module],
) -> dict[str, Any]:
    """Checked arguments of :class:`_Trunk`, defaults filled in."""
    name = "EfficientNet"
    if padding is None:
        padding = "same" if variant.lite else "symmetric"
    return {
        "in_channels": arguments.positive(name, "in_channels", in_channels),
        "drop_path_rate": arguments.probability(
            name, "drop_path_rate", DROP_PATH_RATE if drop_path_rate is None else drop_path_rate
        ),
        "padding": arguments.padding_mode(name, padding),
        "norm_layer": norm_layer,
    }


def initialize(model: nn.Module) -> None:
    """Starting weights of the released code, for convolutions and linear layers of ``model``."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            rows, columns = module.kernel_size
            fan_out = rows * columns * module.out_channels // module.groups
            nn.init.normal_(module.weight, 0.0, math.sqrt(2.0 / fan_out))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            bound = 1.0 / math.sqrt(module.out_features)
            nn.init.uniform_(module.weight, -bound, bound)
            nn.init.zeros_(module.bias)
