"""FusedMBConv against timm's EdgeResidual and ConvBnAct, and torchvision's FusedMBConv."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import timm.layers
import torch
from timm.models import _efficientnet_blocks as timm_blocks
from torch import nn
from torchvision.models.efficientnet import FusedMBConv as TorchvisionFusedMBConv
from torchvision.models.efficientnet import FusedMBConvConfig

import effkernels as ek
from tests.networks import assert_networks_agree, make_realistic

CASES = [
    # in, out, kernel, stride, expand_ratio, se_ratio, size
    (16, 16, 3, 1, 4, 0, (9, 7)),
    (16, 24, 3, 2, 4, 0, (11, 14)),
    (8, 8, 5, 1, 3, 0.25, (6, 6)),
    (16, 16, 3, 1, 1, 0, (9, 9)),
    (16, 8, 3, 2, 1, None, (8, 9)),
]


def timm_twin(ours: ek.FusedMBConv, case: tuple[Any, ...], padding: str) -> nn.Module:
    in_channels, out_channels, kernel_size, stride, expand_ratio, se_ratio, _ = case
    options: dict[str, Any] = {
        "stride": stride,
        "pad_type": "same" if padding == "same" else "",
        "act_layer": nn.SiLU,
        "norm_layer": partial(timm.layers.BatchNormAct2d, eps=1e-3),
    }
    if expand_ratio == 1:
        options["skip"] = True
        theirs = timm_blocks.ConvBnAct(in_channels, out_channels, kernel_size, **options)
    else:
        if se_ratio:
            reduced = max(1, int(in_channels * se_ratio))
            options["se_layer"] = lambda channels, act_layer, **_: timm_blocks.SqueezeExcite(
                channels, rd_channels=reduced, act_layer=act_layer
            )
        theirs = timm_blocks.EdgeResidual(
            in_channels, out_channels, kernel_size, exp_ratio=expand_ratio, **options
        )
    assert list(theirs.state_dict()) == list(ours.state_dict())
    theirs.load_state_dict(ours.state_dict())
    return theirs


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("padding", ["symmetric", "same"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_like_timm(case: tuple[Any, ...], padding: str, training: bool, backend: str) -> None:
    *arguments, size = case
    norm_layer = partial(nn.BatchNorm2d, eps=1e-3)
    ours = ek.FusedMBConv(*arguments, padding=padding, norm_layer=norm_layer)
    make_realistic(ours)
    image = torch.randn(3, case[0], *size)
    assert_networks_agree(ours, timm_twin(ours, case, padding), image, training)


@pytest.mark.parametrize("expand_ratio", [1, 4])
def test_like_torchvision(expand_ratio: int, backend: str) -> None:
    config = FusedMBConvConfig(expand_ratio, 3, 1, 8, 8, 1)
    theirs = make_realistic(TorchvisionFusedMBConv(config, 0.0, nn.BatchNorm2d))
    ours = ek.FusedMBConv(8, 8, expand_ratio=expand_ratio)
    values = theirs.state_dict().values()
    ours.load_state_dict(dict(zip(ours.state_dict(), values, strict=True)))
    assert_networks_agree(ours, theirs, torch.randn(2, 8, 9, 7))


def test_dropped_samples_are_the_input(backend: str) -> None:
    for expand_ratio in (1, 4):
        block = ek.FusedMBConv(8, 8, expand_ratio=expand_ratio, drop_path=0.5).train()
        image = torch.randn(64, 8, 5, 5)
        output = block(image)
        dropped = (output == image).flatten(1).all(1)
        assert 0 < int(dropped.sum()) < 64
        assert torch.isfinite(output).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel_size": 4}, "FusedMBConv: kernel_size"),
        ({"stride": 0}, "FusedMBConv: stride"),
        ({"padding": "valid"}, "FusedMBConv: padding"),
        ({"drop_path": 1.0}, "FusedMBConv: drop_path"),
        ({"expand_ratio": 1, "se_ratio": 0.25}, "FusedMBConv: se_ratio"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ek.FusedMBConv(8, 8, **options)
