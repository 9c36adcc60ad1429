"""ResNet-18/34/50/101/152 (He et al., 2016), optionally with SE, SiLU or a stem for small images.

One table; bottlenecks stride in their 3×3 convolution, as in torchvision and timm ("v1.5"), whose
state-dict keys these are. A block's last BatchNorm, the residual and the activation are one
epilogue of its last convolution.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple, cast

import torch.nn.functional as F
from torch import Tensor, nn

from effkernels.modules import SqueezeExcite, arguments
from effkernels.modules.fused import ConvNorm, conv_norm_act
from effkernels.modules.mbconv import NO_ACTIVATION
from effkernels.modules.plan import Planned

from .common import DataConfig, Feature, class_count, last_of_each_resolution
from .scaling import scale_channels, scale_depth

NAME = "ResNet"  # in errors
STEM_CHANNELS = 64
WIDTHS = (64, 128, 256, 512)  # of the four layers, before a block's expansion
BN_EPS, BN_MOMENTUM = 1e-5, 0.1

NormLayer = Callable[[int], nn.BatchNorm2d]
ActLayer = Callable[[], nn.Module]

IMAGENET_DATA = DataConfig(224, 256, interpolation="bilinear")
# CIFAR-10's own statistics; its images are taken as they are.
CIFAR_DATA = DataConfig(32, 32, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), "bilinear")
IMAGENET_STEM = "imagenet"
_DATA = {IMAGENET_STEM: IMAGENET_DATA, "cifar": CIFAR_DATA}


def data_of(stem: str) -> DataConfig:
    """What a network with this stem expects, before it is scaled."""
    if stem not in tuple(_DATA):
        accepted = " or ".join(repr(name) for name in _DATA)
        raise ValueError(f"{NAME}: stem is {stem!r}, {accepted} is accepted")
    return _DATA[stem]


class ResNetSqueezeExcite(SqueezeExcite):
    """SE with the child names that timm's ResNets use: ``fc1``, ``fc2``."""

    fc1: nn.Conv2d
    fc2: nn.Conv2d

    def __init__(self, channels: int, reduced_channels: int) -> None:
        super().__init__(channels, reduced_channels, act_layer=nn.ReLU)
        self._modules["fc1"] = self._modules.pop("conv_reduce")
        self._modules["fc2"] = self._modules.pop("conv_expand")

    @property
    def conv_reduce(self) -> nn.Conv2d:  # type: ignore[override]
        return self.fc1

    @property
    def conv_expand(self) -> nn.Conv2d:  # type: ignore[override]
        return self.fc2


class Downsample(nn.Sequential):
    """The shortcut where a block changes its input's shape: 1×1 convolution and BatchNorm."""

    def __init__(
        self, in_channels: int, out_channels: int, stride: int, norm_layer: NormLayer
    ) -> None:
        super().__init__(
            nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), norm_layer(out_channels)
        )

    def forward(self, input: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, K, H', W']."""
        (stage,) = self.conv_norms()
        return conv_norm_act(input, stage)

    def conv_norms(self) -> tuple[ConvNorm, ...]:
        """The convolution with the BatchNorm that follows it."""
        conv = cast(nn.Conv2d, self[0])  # or what a user put in its place
        return (ConvNorm(conv, self[1], NO_ACTIVATION),)


class BasicBlock(nn.Module):
    """act(bn2(3×3(act(bn1(3×3(x))))) + shortcut(x)), SE before the sum if there is any."""

    expansion = 1

    def __init__(
        self,
        in_channels: int,
        channels: int,
        stride: int,
        se_ratio: float | None,
        act_layer: ActLayer,
        norm_layer: NormLayer,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = norm_layer(channels)
        self.act1 = act_layer()
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = norm_layer(channels)
        self.se = _squeeze_excite(channels, se_ratio)
        self.act2 = act_layer()
        self.downsample = _shortcut(in_channels, channels, stride, norm_layer)

    def forward(self, input: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, K, H', W'], H' = ceil(H / stride)."""
        first, last = self.conv_norms()
        hidden = conv_norm_act(input, first)
        return _add_shortcut(hidden, last, self.se, self.downsample(input))

    def conv_norms(self) -> tuple[ConvNorm, ...]:
        """The convolutions with the BatchNorms that follow them."""
        return (
            ConvNorm(self.conv1, self.bn1, self.act1),
            ConvNorm(self.conv2, self.bn2, self.act2),
        )


class Bottleneck(nn.Module):
    """1×1 → 3×3 → 1×1, each with a BatchNorm, to four times ``channels``; else as BasicBlock."""

    expansion = 4

    def __init__(
        self,
        in_channels: int,
        channels: int,
        stride: int,
        se_ratio: float | None,
        act_layer: ActLayer,
        norm_layer: NormLayer,
    ) -> None:
        super().__init__()
        out_channels = channels * self.expansion
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn1 = norm_layer(channels)
        self.act1 = act_layer()
        self.conv2 = nn.Conv2d(channels, channels, 3, stride, 1, bias=False)
        self.bn2 = norm_layer(channels)
        self.act2 = act_layer()
        self.conv3 = nn.Conv2d(channels, out_channels, 1, bias=False)
        self.bn3 = norm_layer(out_channels)
        self.se = _squeeze_excite(out_channels, se_ratio)
        self.act3 = act_layer()
        self.downsample = _shortcut(in_channels, out_channels, stride, norm_layer)

    def forward(self, input: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, K, H', W'], H' = ceil(H / stride)."""
        first, second, last = self.conv_norms()
        hidden = conv_norm_act(conv_norm_act(input, first), second)
        return _add_shortcut(hidden, last, self.se, self.downsample(input))

    def conv_norms(self) -> tuple[ConvNorm, ...]:
        """The convolutions with the BatchNorms that follow them."""
        return (
            ConvNorm(self.conv1, self.bn1, self.act1),
            ConvNorm(self.conv2, self.bn2, self.act2),
            ConvNorm(self.conv3, self.bn3, self.act3),
        )


def _squeeze_excite(channels: int, ratio: float | None) -> nn.Module:
    if not ratio:
        return nn.Identity()
    return ResNetSqueezeExcite(channels, scale_channels(channels, ratio))


def _shortcut(in_channels: int, out_channels: int, stride: int, norm_layer: NormLayer) -> nn.Module:
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    return Downsample(in_channels, out_channels, stride, norm_layer)


def _add_shortcut(hidden: Tensor, last: ConvNorm, se: nn.Module, shortcut: Tensor) -> Tensor:
    """activation(se(norm(conv(hidden))) + shortcut)."""
    if isinstance(se, nn.Identity):
        return conv_norm_act(hidden, last, residual=shortcut)
    gated = se(conv_norm_act(hidden, last._replace(activation=NO_ACTIVATION)))
    output: Tensor = last.activation(gated + shortcut)
    return output


class Variant(NamedTuple):
    """A row of the family."""

    block: type[BasicBlock] | type[Bottleneck]
    blocks: tuple[int, ...]  # in each of the four layers
    widths: tuple[int, ...] = WIDTHS
    stem_channels: int = STEM_CHANNELS
    resolution: int | None = None  # None: the stem's

    def scaled(self, depth: float, width: float, resolution: int) -> Variant:
        """The network with ``depth`` times its blocks and ``width`` times its channels."""
        return self._replace(
            blocks=tuple(scale_depth(blocks, depth) for blocks in self.blocks),
            widths=tuple(scale_channels(channels, width) for channels in self.widths),
            stem_channels=scale_channels(self.stem_channels, width),
            resolution=resolution,
        )


VARIANTS = {
    "resnet18": Variant(BasicBlock, (2, 2, 2, 2)),
    "resnet34": Variant(BasicBlock, (3, 4, 6, 3)),
    "resnet50": Variant(Bottleneck, (3, 4, 6, 3)),
    "resnet101": Variant(Bottleneck, (3, 4, 23, 3)),
    "resnet152": Variant(Bottleneck, (3, 8, 36, 3)),
}


class _Trunk(Planned):
    """Stem and layers: what the classifier and the feature extractor share."""

    layer1: nn.Sequential
    layer2: nn.Sequential
    layer3: nn.Sequential
    layer4: nn.Sequential

    def __init__(
        self,
        variant: Variant,
        in_channels: int,
        stem: str,
        se_ratio: float | None,
        act_layer: ActLayer,
        bn_eps: float,
        bn_momentum: float | None,
    ) -> None:
        super().__init__()
        arguments.positive(NAME, "in_channels", in_channels)
        data = data_of(stem)
        if se_ratio is not None and se_ratio != 0:
            arguments.ratio(NAME, "se_ratio", se_ratio)
        norm_layer = partial(nn.BatchNorm2d, eps=bn_eps, momentum=bn_momentum)
        small = stem == "cifar"
        self.data_config = data.at(variant.resolution or data.resolution)

        kernel_size, stride = (3, 1) if small else (7, 2)
        self.conv1 = nn.Conv2d(
            in_channels, variant.stem_channels, kernel_size, stride, kernel_size // 2, bias=False
        )
        self.bn1 = norm_layer(variant.stem_channels)
        self.act1 = act_layer()
        self.maxpool: nn.Module = nn.Identity() if small else nn.MaxPool2d(3, 2, 1)

        channels, reduction = variant.stem_channels, stride
        maps = [Feature(0, channels, reduction)]
        reduction *= 1 if small else 2
        for index, (blocks, width) in enumerate(
            zip(variant.blocks, variant.widths, strict=True), 1
        ):
            layer = nn.Sequential()
            for position in range(blocks):
                stride = 2 if position == 0 and index > 1 else 1
                layer.append(
                    variant.block(channels, width, stride, se_ratio, act_layer, norm_layer)
                )
                channels = width * variant.block.expansion
                reduction *= stride
            self.add_module(f"layer{index}", layer)
            maps.append(Feature(index, channels, reduction))
        self._stage_maps = tuple(maps)

    def conv_norms(self) -> tuple[ConvNorm, ...]:
        """The convolution outside the blocks with the BatchNorm that follows it."""
        return (ConvNorm(self.conv1, self.bn1, self.act1),)

    def _stages(self, input: Tensor) -> Iterator[Tensor]:
        """What the stem and each of the four layers make of ``input``."""
        (stem,) = self.conv_norms()
        hidden = conv_norm_act(input, stem)
        yield hidden
        hidden = self.maxpool(hidden)
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            hidden = layer(hidden)
            yield hidden


class ResNet(_Trunk):
    """A ResNet classifier.

    Child names are torchvision's and timm's: ``conv1, bn1, layer<i>.<block>, fc``; starting
    weights follow torchvision's distributions.

    Args:
        variant: row of :data:`VARIANTS`.
        num_classes: outputs; 0 for a network that returns the pooled features.
        in_channels: channels of the image.
        stem: ``"imagenet"`` (7×7 at stride 2, then max pooling) or ``"cifar"`` (3×3 at stride 1
            and no pooling, for images of about 32 pixels; He et al., section 4.2).
        se_ratio: SE in each block, reducing to this share of its output channels, rounded to a
            multiple of 8 (1/16 is timm's ``seresnet``); 0 or None for none.
        act_layer: builds the activation of stem and blocks; that in SE is ReLU.
        drop_rate: dropout before the classifier.
        zero_init_residual: every block starts as its shortcut (Goyal et al., 2017, section 5.1).
        bn_eps, bn_momentum: of every BatchNorm.

    Raises:
        ValueError: naming the argument, what came and what is accepted.
    """

    def __init__(
        self,
        variant: Variant,
        num_classes: int = 1000,
        in_channels: int = 3,
        stem: str = IMAGENET_STEM,
        se_ratio: float | None = None,
        act_layer: ActLayer = nn.ReLU,
        drop_rate: float = 0.0,
        zero_init_residual: bool = False,
        bn_eps: float = BN_EPS,
        bn_momentum: float | None = BN_MOMENTUM,
    ) -> None:
        super().__init__(variant, in_channels, stem, se_ratio, act_layer, bn_eps, bn_momentum)
        self.num_classes = class_count(NAME, num_classes)
        self.drop_rate = arguments.probability(NAME, "drop_rate", drop_rate)
        self.num_features = self._stage_maps[-1].channels
        self.fc: nn.Module = nn.Identity()
        if num_classes:
            self.fc = nn.Linear(self.num_features, num_classes)
        _initialize(self, zero_init_residual)

    def forward_features(self, input: Tensor) -> Tensor:
        """[N, C, H, W] -> pooled features [N, F]."""
        *_, last = self._stages(input)
        return last.mean((2, 3))

    def forward(self, input: Tensor) -> Tensor:
        """[N, C, H, W] -> logits [N, num_classes], or with num_classes=0 features [N, F]."""
        logits: Tensor = self.planned(self._classify, input)
        return logits

    def _classify(self, input: Tensor) -> Tensor:
        features = self.forward_features(input)
        if self.training:
            features = F.dropout(features, self.drop_rate)
        output: Tensor = self.fc(features)
        return output


class ResNetFeatures(_Trunk):
    """A ResNet without its classifier that returns a map per resolution.

    Keys are a subset of :class:`ResNet`'s, arguments those that concern them. ``feature_info``
    has a :class:`Feature` for each map.
    """

    def __init__(
        self,
        variant: Variant,
        in_channels: int = 3,
        stem: str = IMAGENET_STEM,
        se_ratio: float | None = None,
        act_layer: ActLayer = nn.ReLU,
        zero_init_residual: bool = False,
        bn_eps: float = BN_EPS,
        bn_momentum: float | None = BN_MOMENTUM,
    ) -> None:
        super().__init__(variant, in_channels, stem, se_ratio, act_layer, bn_eps, bn_momentum)
        self.feature_info = last_of_each_resolution(list(self._stage_maps))
        _initialize(self, zero_init_residual)

    def forward(self, input: Tensor) -> list[Tensor]:
        """[N, C, H, W] -> maps [N, C_i, H / r_i, W / r_i].

        r = 2, 4, 8, 16, 32, or 1, 2, 4, 8 with the stem for small images.
        """
        maps: list[Tensor] = self.planned(self._maps, input)
        return maps

    def _maps(self, input: Tensor) -> list[Tensor]:
        maps = list(self._stages(input))
        return [maps[feature.stage] for feature in self.feature_info]


def _initialize(model: nn.Module, zero_init_residual: bool) -> None:
    """Starting weights of convolutions and, if so wished, of blocks' last BatchNorms."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif zero_init_residual and isinstance(module, (BasicBlock, Bottleneck)):
            last = module.bn3 if isinstance(module, Bottleneck) else module.bn2
            nn.init.zeros_(last.weight)
