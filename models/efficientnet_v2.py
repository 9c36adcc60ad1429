"""EfficientNetV2-S, M and L (Tan & Le, 2021): rows for :class:`EfficientNet`.

Dense convolutions in the first stages, no SE there, smaller expansions. Resolutions are those of
evaluation; BatchNorm, dropout and input range are those of the authors' released code
(google/automl, efficientnetv2).
"""

from __future__ import annotations

from .common import DataConfig
from .efficientnet import HEAD_CHANNELS, Stage, Variant


def _fused(blocks: int, out_channels: int, stride: int, expand_ratio: int) -> Stage:
    return Stage(blocks, out_channels, 3, stride, expand_ratio, se_ratio=0.0, fused=True)


def _variant(stages: tuple[Stage, ...], resolution: int, drop_rate: float) -> Variant:
    return Variant(
        stages,
        stem_channels=stages[0].out_channels,
        head_channels=HEAD_CHANNELS,
        drop_rate=drop_rate,
        data_config=DataConfig(resolution, resolution, mean=(0.5,) * 3, std=(0.5,) * 3),
        bn_momentum=0.1,
    )


_S = (
    _fused(2, 24, 1, 1),
    _fused(4, 48, 2, 4),
    _fused(4, 64, 2, 4),
    Stage(6, 128, 3, 2, 4),
    Stage(9, 160, 3, 1, 6),
    Stage(15, 256, 3, 2, 6),
)
_M = (
    _fused(3, 24, 1, 1),
    _fused(5, 48, 2, 4),
    _fused(5, 80, 2, 4),
    Stage(7, 160, 3, 2, 4),
    Stage(14, 176, 3, 1, 6),
    Stage(18, 304, 3, 2, 6),
    Stage(5, 512, 3, 1, 6),
)
_L = (
    _fused(4, 32, 1, 1),
    _fused(7, 64, 2, 4),
    _fused(7, 96, 2, 4),
    Stage(10, 192, 3, 2, 4),
    Stage(19, 224, 3, 1, 6),
    Stage(25, 384, 3, 2, 6),
    Stage(7, 640, 3, 1, 6),
)

VARIANTS = {
    "efficientnet_v2_s": _variant(_S, 384, 0.2),
    "efficientnet_v2_m": _variant(_M, 480, 0.3),
    "efficientnet_v2_l": _variant(_L, 480, 0.4),
}
