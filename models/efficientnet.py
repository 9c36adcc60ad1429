"""EfficientNet B0–B7 (Tan & Le, 2019) and EfficientNet-Lite0–4 (Google, 2020).

One table of stages, one scaling rule; a variant is a row of coefficients. EfficientNetV2's stages
are in ``efficientnet_v2.py``. BatchNorm's eps and momentum, dropout and stochastic depth are those
of the authors' released code (tensorflow/tpu, models/official/efficientnet, and its ``lite``
folder). State-dict keys are timm's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from effkernels.modules import FusedMBConv, MBConv, arguments
from effkernels.modules.conv_norm_act import same_or_own_padding
from effkernels.modules.fused import ConvNorm, conv_norm_act
from effkernels.modules.plan import Planned

from .common import DataConfig, Feature, class_count, last_of_each_resolution
from .scaling import scale_channels, scale_depth


class Stage(NamedTuple):
    """Blocks of one resolution; the first has the stride."""

    blocks: int
    out_channels: int
    kernel_size: int
    stride: int
    expand_ratio: int
    se_ratio: float = 0.25
    fused: bool = False  # FusedMBConv instead of MBConv


STAGES = (
    Stage(1, 16, 3, 1, 1),
    Stage(2, 24, 3, 2, 6),
    Stage(2, 40, 5, 2, 6),
    Stage(3, 80, 3, 2, 6),
    Stage(3, 112, 5, 1, 6),
    Stage(4, 192, 5, 2, 6),
    Stage(1, 320, 3, 1, 6),
)
NAME = "EfficientNet"  # in errors
STEM_CHANNELS = 32
HEAD_CHANNELS = 1280
BN_EPS = 1e-3
DROP_PATH_RATE = 0.2  # of the last block; grows linearly from 0
CROP_MARGIN = 32  # the released code's CROP_PADDING: resize to resolution + 32, then crop


@dataclass(frozen=True)
class Variant:
    """A network of the family, and what its released code trains it with."""

    stages: tuple[Stage, ...]
    stem_channels: int
    head_channels: int
    drop_rate: float  # of the classifier
    data_config: DataConfig
    bn_momentum: float = 0.01  # PyTorch's sense: 0.99 of the old statistics are kept
    act_layer: type[nn.Module] = nn.SiLU
    padding: str = "symmetric"
    fixed_ends: bool = False  # stem, head and the outer stages' depth are not scaled

    def scaled(self, depth: float, width: float, resolution: int) -> Variant:
        """The network with ``depth`` times its blocks and ``width`` times its channels."""
        stages = [
            stage._replace(
                blocks=scale_depth(stage.blocks, depth),
                out_channels=scale_channels(stage.out_channels, width),
            )
            for stage in self.stages
        ]
        stem, head = self.stem_channels, self.head_channels
        if self.fixed_ends:
            for outer in (0, -1):
                stages[outer] = stages[outer]._replace(blocks=self.stages[outer].blocks)
        else:
            stem, head = (scale_channels(channels, width) for channels in (stem, head))
        return replace(
            self,
            stages=tuple(stages),
            stem_channels=stem,
            head_channels=head,
            data_config=self.data_config.at(resolution),
        )


BASE = Variant(
    STAGES,
    STEM_CHANNELS,
    HEAD_CHANNELS,
    drop_rate=0.2,
    data_config=DataConfig(224, 224 + CROP_MARGIN),
)
# The same for phones: no SE, ReLU6, ends that keep their size.
LITE_BASE = replace(
    BASE,
    stages=tuple(stage._replace(se_ratio=0.0) for stage in STAGES),
    data_config=replace(BASE.data_config, mean=(127 / 255,) * 3, std=(128 / 255,) * 3),
    act_layer=nn.ReLU6,
    padding="same",
    fixed_ends=True,
)


class Coefficients(NamedTuple):
    """A row of the released code: what makes a network of the base."""

    width: float
    depth: float
    resolution: int
    drop_rate: float

    def of(self, base: Variant) -> Variant:
        """The network that this row makes of ``base``."""
        variant = base.scaled(self.depth, self.width, self.resolution)
        return replace(variant, drop_rate=self.drop_rate)


COEFFICIENTS = {
    "efficientnet_b0": Coefficients(1.0, 1.0, 224, 0.2),
    "efficientnet_b1": Coefficients(1.0, 1.1, 240, 0.2),
    "efficientnet_b2": Coefficients(1.1, 1.2, 260, 0.3),
    "efficientnet_b3": Coefficients(1.2, 1.4, 300, 0.3),
    "efficientnet_b4": Coefficients(1.4, 1.8, 380, 0.4),
    "efficientnet_b5": Coefficients(1.6, 2.2, 456, 0.4),
    "efficientnet_b6": Coefficients(1.8, 2.6, 528, 0.5),
    "efficientnet_b7": Coefficients(2.0, 3.1, 600, 0.5),
}
LITE_COEFFICIENTS = {
    "efficientnet_lite0": Coefficients(1.0, 1.0, 224, 0.2),
    "efficientnet_lite1": Coefficients(1.0, 1.1, 240, 0.2),
    "efficientnet_lite2": Coefficients(1.1, 1.2, 260, 0.3),
    "efficientnet_lite3": Coefficients(1.2, 1.4, 280, 0.3),
    "efficientnet_lite4": Coefficients(1.4, 1.8, 300, 0.3),
}
VARIANTS = {
    **{name: row.of(BASE) for name, row in COEFFICIENTS.items()},
    **{name: row.of(LITE_BASE) for name, row in LITE_COEFFICIENTS.items()},
}


class _Trunk(Planned):
    """Stem and blocks: what the classifier and the feature extractor share."""

    def __init__(
        self,
        variant: Variant,
        in_channels: int,
        drop_path_rate: float | None,
        padding: str | None,
        norm_layer: Callable[[int], nn.Module],
    ) -> None:
        super().__init__()
        arguments.positive(NAME, "in_channels", in_channels)
        if drop_path_rate is None:
            drop_path_rate = DROP_PATH_RATE
        arguments.probability(NAME, "drop_path_rate", drop_path_rate)
        padding = arguments.padding_mode(NAME, variant.padding if padding is None else padding)
        self.data_config = variant.data_config
        self._same, own_padding = same_or_own_padding(3, 2, padding)
        self.conv_stem = nn.Conv2d(
            in_channels, variant.stem_channels, 3, 2, own_padding, bias=False
        )
        self.bn1 = norm_layer(variant.stem_channels)
        self.act1 = variant.act_layer()

        total = sum(stage.blocks for stage in variant.stages)
        channels, index = variant.stem_channels, 0
        self.blocks = nn.Sequential()
        for stage in variant.stages:
            block = FusedMBConv if stage.fused else MBConv
            blocks: list[nn.Module] = []
            for position in range(stage.blocks):
                blocks.append(
                    block(
                        channels,
                        stage.out_channels,
                        stage.kernel_size,
                        stage.stride if position == 0 else 1,
                        stage.expand_ratio,
                        stage.se_ratio,
                        padding,
                        variant.act_layer,
                        norm_layer,
                        drop_path_rate * index / total,
                    )
                )
                channels, index = stage.out_channels, index + 1
            self.blocks.append(nn.Sequential(*blocks))

    def conv_norms(self) -> tuple[ConvNorm, ...]:
        """The convolutions outside the blocks with the BatchNorms that follow them."""
        return (self._stem(),)

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
        bn_eps: of every BatchNorm. A checkpoint trained elsewhere may need another:
            torchvision's B0 to B4 and timm's own B0 to B4 and V2 use 1e-5.
        bn_momentum: of every BatchNorm; None for the variant's.

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
        bn_momentum: float | None = None,
    ) -> None:
        norm_layer = _norm_layer(variant, bn_eps, bn_momentum)
        super().__init__(variant, in_channels, drop_path_rate, padding, norm_layer)
        self.num_classes = class_count(NAME, num_classes)
        self.drop_rate = arguments.probability(
            NAME, "drop_rate", variant.drop_rate if drop_rate is None else drop_rate
        )
        self.num_features = variant.head_channels
        last_channels = variant.stages[-1].out_channels
        self.conv_head = nn.Conv2d(last_channels, self.num_features, 1, bias=False)
        self.bn2 = norm_layer(self.num_features)
        self.act2 = variant.act_layer()
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
        if self.training:
            features = F.dropout(features, self.drop_rate)
        return self.classifier(features)

    def conv_norms(self) -> tuple[ConvNorm, ...]:
        return self._stem(), self._head()

    def _head(self) -> ConvNorm:
        return ConvNorm(self.conv_head, self.bn2, self.act2)


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
        bn_momentum: float | None = None,
    ) -> None:
        norm_layer = _norm_layer(variant, bn_eps, bn_momentum)
        super().__init__(variant, in_channels, drop_path_rate, padding, norm_layer)
        reduction = 2
        stages = []
        for index, stage in enumerate(variant.stages):
            reduction *= stage.stride
            stages.append(Feature(index, stage.out_channels, reduction))
        self.feature_info = last_of_each_resolution(stages)
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


def _norm_layer(variant: Variant, eps: float, momentum: float | None) -> Callable[[int], nn.Module]:
    momentum = variant.bn_momentum if momentum is None else momentum
    return partial(nn.BatchNorm2d, eps=eps, momentum=momentum)


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
