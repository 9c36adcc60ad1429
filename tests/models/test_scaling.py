"""Compound scaling: how products become whole numbers, and the networks that come of it."""

from __future__ import annotations

import math

import pytest
import torch
from effkernels.models import CompoundScaling, create_model, create_scaled, efficientnet
from effkernels.models.registry import scaled_variant
from effkernels.models.scaling import scale_channels, scale_depth, scale_resolution
from hypothesis import example, given
from hypothesis import strategies as st
from torch import nn

import effkernels as ek

FACTORS = st.floats(0.05, 8.0)


@given(st.integers(1, 40) | st.integers(1, 4096), FACTORS)
@example(10, 0.95)  # 9.5, whose nearest multiple has lost 16 %
@example(19, 1.0001)
def test_channels_are_multiples_of_eight_and_lose_at_most_a_tenth(
    channels: int, width: float
) -> None:
    found = scale_channels(channels, width)
    if width == 1.0:
        assert found == channels
        return
    assert found % 8 == 0 and found >= 8
    assert found >= 0.9 * channels * width - 1e-6
    assert found - channels * width < 8
    nearest = math.floor(channels * width / 8 + 0.5) * 8  # a half goes up
    assert found in (nearest, nearest + 8) or found == 8


@given(st.integers(1, 64), st.floats(0.1, 8.0))
def test_depth_is_rounded_up(blocks: int, depth: float) -> None:
    found = scale_depth(blocks, depth)
    assert found >= 1
    assert blocks * depth - 1e-6 <= found < blocks * depth + 1


def test_decimal_products_are_exact() -> None:
    assert 100 * 1.1 > 110  # in binary
    assert scale_depth(100, 1.1) == 110
    assert scale_depth(5, 1.2) == 6
    assert scale_channels(40, 1.1) == 48  # 44 is halfway, a half goes up


@given(st.integers(4, 2048), FACTORS)
def test_resolution_is_the_nearest_multiple_of_four(resolution: int, factor: float) -> None:
    found = scale_resolution(resolution, factor)
    if factor == 1.0:
        assert found == resolution
        return
    assert found % 4 == 0 and found >= 4
    assert abs(found - resolution * factor) <= 2 + 1e-6 or found == 4


@given(st.integers(1, 256), FACTORS, FACTORS)
def test_all_three_grow_with_the_factor(eights: int, a: float, b: float) -> None:
    low, high = sorted((a, b))
    assert scale_channels(8 * eights, low) <= scale_channels(8 * eights, high)
    assert scale_depth(eights, low) <= scale_depth(eights, high)
    assert scale_resolution(4 * eights, low) <= scale_resolution(4 * eights, high)


def test_the_papers_coefficients() -> None:
    scaling = CompoundScaling()
    assert (scaling.alpha, scaling.beta, scaling.gamma) == (1.2, 1.1, 1.15)
    assert scaling.cost == pytest.approx(1.2 * 1.21 * 1.3225)
    assert scaling.at(0) == (1, 1, 1)
    assert scaling.at(2) == pytest.approx((1.44, 1.21, 1.3225))
    assert scaling.at(-1) == pytest.approx((1 / 1.2, 1 / 1.1, 1 / 1.15))


@pytest.mark.parametrize("name", list(efficientnet.VARIANTS))
def test_variants_come_from_the_stage_table_and_a_row(name: str) -> None:
    lite = "lite" in name
    rows = efficientnet.LITE_COEFFICIENTS if lite else efficientnet.COEFFICIENTS
    row, variant = rows[name], efficientnet.VARIANTS[name]
    for index, (stage, base) in enumerate(zip(variant.stages, efficientnet.STAGES, strict=True)):
        outer = lite and index in (0, len(efficientnet.STAGES) - 1)
        assert stage.blocks == (base.blocks if outer else scale_depth(base.blocks, row.depth))
        assert stage.out_channels == scale_channels(base.out_channels, row.width)
    assert variant.stem_channels == (32 if lite else scale_channels(32, row.width))
    assert variant.head_channels == (1280 if lite else scale_channels(1280, row.width))
    assert variant.drop_rate == row.drop_rate
    assert variant.data_config.resolution == row.resolution
    assert variant.data_config.resize == row.resolution + 32


@pytest.mark.parametrize("base", ek.models.list_models())
def test_phi_zero_is_the_base(base: str) -> None:
    with torch.device("meta"):
        model, scaled = create_model(base), create_scaled(base, 0)
    shapes = {key: value.shape for key, value in model.state_dict().items()}
    assert {key: value.shape for key, value in scaled.state_dict().items()} == shapes
    assert scaled.data_config == model.data_config


def test_scaled_resnet18() -> None:
    """Depth by blocks of each stage, width by channels, resolution by the input."""
    model = create_scaled("resnet18", 1, stem="cifar", num_classes=10).eval()
    assert [len(getattr(model, f"layer{index}")) for index in (1, 2, 3, 4)] == [3, 3, 3, 3]
    assert model.conv1.out_channels == 72
    assert [getattr(model, f"layer{i}")[-1].conv2.out_channels for i in (1, 2, 3, 4)] == [
        *(72, 144, 280, 560)
    ]
    assert model.data_config.resolution == model.data_config.resize == 36
    image = torch.randn(2, 3, 36, 36)
    with torch.no_grad():
        logits = model(image)
        with ek.use_backend("reference"):
            expected = model(image)
    assert logits.shape == (2, 10)
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-4)


def test_scaled_networks_train_and_give_features() -> None:
    scaling = CompoundScaling(1.5, 1.3, 1.0)
    model = create_scaled("efficientnet_b0", -1, scaling, num_classes=3).train()
    model(torch.randn(2, 3, 64, 64)).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    features = create_scaled("resnet50", -2, scaling, features_only=True, num_classes=3).eval()
    with torch.no_grad():
        maps = features(torch.randn(1, 3, 64, 64))
    assert [part.shape[1] for part in maps] == [info.channels for info in features.feature_info]


def test_lite_keeps_its_ends() -> None:
    variant = scaled_variant("efficientnet_lite0", 2)
    assert isinstance(variant, efficientnet.Variant)
    assert (variant.stem_channels, variant.head_channels) == (32, 1280)
    assert [stage.blocks for stage in variant.stages] == [1, 3, 3, 5, 5, 6, 1]


def test_flops_grow_as_the_paper_says() -> None:
    """About (α · β² · γ²)^φ; rounding depth up adds to it."""
    scaling = CompoundScaling()
    macs = []
    for phi in (0, 1, 2, 3):
        with torch.device("meta"):
            model = create_scaled("efficientnet_b0", phi)
        side = model.data_config.resolution
        macs.append(ek.models.summary(model, (3, side, side)).macs)
    for phi, count in enumerate(macs):
        assert 0.95 <= count / macs[0] / scaling.cost**phi <= 1.3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0.9, 1.1, 1.1), "alpha is 0.9, a number of at least 1"),
        ((1.2, "x", 1.1), "beta is 'x'"),
        ((1.2, 1.1, math.inf), "gamma is inf"),
        ((1.2, 1.1, True), "gamma is True"),
    ],
)
def test_bad_coefficients(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CompoundScaling(*arguments)


@pytest.mark.parametrize(
    ("base", "phi", "options", "message"),
    [
        ("resnet81", 1, {}, "create_scaled: no model is called 'resnet81'; nearest are resnet18"),
        ("resnet18", math.nan, {}, "phi is nan, a number from -20 to 20"),
        ("resnet18", 1e9, {}, "phi is 1000000000.0"),
        ("resnet18", "1", {}, "phi is '1'"),
        ("resnet18", -15, {}, "phi is -15, which makes resnet18's images 28 pixels wide; 32 or"),
        ("resnet18", -1, {"stem": "cifar"}, "images 28 pixels wide"),
        ("resnet18", 1, {"stem": "mnist"}, "stem is 'mnist', 'imagenet' or 'cifar' is accepted"),
        ("efficientnet_b0", 1, {"num_classes": -1}, "num_classes is -1"),
    ],
)
def test_bad_input(base: str, phi: float, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_scaled(base, phi, **options)


def test_no_other_options() -> None:
    with pytest.raises(TypeError, match="stem"):
        create_scaled("efficientnet_b0", 1, stem="cifar")
    assert issubclass(type(create_scaled("resnet18", 0)), nn.Module)
