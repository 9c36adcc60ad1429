"""MBConv and DepthwiseSeparableConv against timm's and torchvision's blocks."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import timm.layers
import torch
from timm.models import _efficientnet_blocks as timm_blocks
from torch import nn
from torchvision.models.efficientnet import MBConv as TorchvisionMBConv
from torchvision.models.efficientnet import MBConvConfig

import effkernels as ek
from effkernels import ops
from tests.networks import assert_networks_agree, make_realistic

CASES = [
    # in, out, kernel, stride, expand_ratio, se_ratio, size
    (16, 16, 3, 1, 6, 0.25, (9, 7)),
    (16, 24, 5, 2, 6, 0.25, (11, 14)),
    (8, 8, 7, 1, 4, 0.25, (6, 6)),
    (24, 24, 5, 1, 3, 0, (7, 8)),
    (16, 16, 3, 1, 1, 0.25, (9, 9)),
    (16, 8, 3, 2, 1, None, (8, 9)),
    (7, 5, 3, 2, 2.5, 0.5, (5, 3)),
]


def timm_twin(
    ours: ek.MBConv, case: tuple[Any, ...], padding: str, act_layer: type[nn.Module]
) -> nn.Module:
    """timm's block with the parameters of ``ours``."""
    in_channels, out_channels, kernel_size, stride, expand_ratio, se_ratio, _ = case
    options: dict[str, Any] = {
        "dw_kernel_size": kernel_size,
        "stride": stride,
        "pad_type": "same" if padding == "same" else "",
        "act_layer": act_layer,
        "norm_layer": partial(timm.layers.BatchNormAct2d, eps=1e-3),
    }
    if se_ratio:
        reduced = max(1, int(in_channels * se_ratio))
        options["se_layer"] = lambda channels, act_layer, **_: timm_blocks.SqueezeExcite(
            channels, rd_channels=reduced, act_layer=act_layer
        )
    if expand_ratio == 1:
        theirs = timm_blocks.DepthwiseSeparableConv(in_channels, out_channels, **options)
    else:
        options["exp_ratio"] = expand_ratio
        # timm rounds the expanded channels to a multiple of 8
        theirs = timm_blocks.InvertedResidual(in_channels, out_channels, **options)
    assert list(theirs.state_dict()) == list(ours.state_dict())
    theirs.load_state_dict(ours.state_dict())
    return theirs


def our_block(case: tuple[Any, ...], padding: str, act_layer: type[nn.Module]) -> ek.MBConv:
    *arguments, _ = case
    norm_layer = partial(nn.BatchNorm2d, eps=1e-3)
    block = ek.MBConv(*arguments, padding=padding, act_layer=act_layer, norm_layer=norm_layer)
    make_realistic(block)
    return block


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("padding", ["symmetric", "same"])
@pytest.mark.parametrize("case", CASES[:6], ids=str)
def test_like_timm(case: tuple[Any, ...], padding: str, training: bool, backend: str) -> None:
    ours = our_block(case, padding, nn.SiLU)
    theirs = timm_twin(ours, case, padding, nn.SiLU)
    image = torch.randn(3, case[0], *case[-1])
    assert_networks_agree(ours, theirs, image, training)
    assert_networks_agree(ours, theirs, image.contiguous(memory_format=torch.channels_last))


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("act_layer", [nn.ReLU, nn.ReLU6, nn.Hardswish, ek.SiLU, nn.GELU, nn.Tanh])
def test_activations(act_layer: type[nn.Module], training: bool, backend: str) -> None:
    case = (16, 16, 3, 1, 4, 0.25, (7, 7))
    ours = our_block(case, "symmetric", act_layer)
    theirs = timm_twin(ours, case, "symmetric", nn.SiLU if act_layer is ek.SiLU else act_layer)
    assert_networks_agree(ours, theirs, torch.randn(2, 16, 7, 7), training)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("expand_ratio", [1, 6])
def test_like_torchvision(expand_ratio: int, training: bool, backend: str) -> None:
    """torchvision also takes the reduced channels from the block's input: // 4."""
    config = MBConvConfig(expand_ratio, 3, 1, 16, 16, 1, width_mult=1.0, depth_mult=1.0)
    theirs = make_realistic(TorchvisionMBConv(config, 0.0, nn.BatchNorm2d))
    ours = ek.MBConv(16, 16, expand_ratio=expand_ratio)
    state = dict(zip(ours.state_dict(), theirs.state_dict().values(), strict=True))
    ours.load_state_dict(state)
    assert_networks_agree(ours, theirs, torch.randn(2, 16, 9, 8), training)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_depthwise_separable_like_timm(training: bool, backend: str) -> None:
    ours = make_realistic(ek.DepthwiseSeparableConv(12, 12, 5, act_layer=nn.ReLU))
    theirs = timm_blocks.DepthwiseSeparableConv(12, 12, 5, act_layer=nn.ReLU)
    assert list(theirs.state_dict()) == list(ours.state_dict())
    theirs.load_state_dict(ours.state_dict())
    assert_networks_agree(ours, theirs, torch.randn(2, 12, 7, 9), training)


def test_evaluation_is_one_op(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    whole = ops.mbconv
    monkeypatch.setattr(ops, "mbconv", lambda *a: calls.append("mbconv") or whole(*a))
    for name in ("pointwise_conv", "depthwise_conv", "squeeze_excite", "batch_norm_act"):
        monkeypatch.setattr(ops, name, lambda *a, **k: pytest.fail("the block was taken apart"))
    ek.MBConv(8, 8).eval()(torch.randn(1, 8, 5, 5))
    ek.MBConv(8, 8, expand_ratio=1, se_ratio=0, padding="same", stride=2).eval()(
        torch.randn(1, 8, 5, 5)
    )
    assert calls == ["mbconv"] * 2


@pytest.mark.parametrize("padding", ["symmetric", "same"])
@pytest.mark.parametrize("size", [(1, 1), (2, 3), (1, 6)])
def test_image_smaller_than_kernel(size: tuple[int, int], padding: str, backend: str) -> None:
    case = (8, 8, 5, 2, 4, 0.25, size)
    ours = our_block(case, padding, nn.SiLU)
    assert_networks_agree(ours, timm_twin(ours, case, padding, nn.SiLU), torch.randn(2, 8, *size))


def test_empty_batch(backend: str) -> None:
    assert ek.MBConv(8, 12, stride=2).eval()(torch.randn(0, 8, 6, 6)).shape == (0, 12, 3, 3)


def test_odd_channel_counts(backend: str) -> None:
    """Channels that no vector divides, and a ratio that is no integer."""
    block = make_realistic(ek.MBConv(7, 7, 3, 1, 2.5, 0.5)).eval()
    assert block.conv_pw.out_channels == 18
    assert block.se.conv_reduce.out_channels == 3
    exact = ek.MBConv(7, 7, 3, 1, 2.5, 0.5).eval()
    exact.load_state_dict(block.state_dict())
    image = torch.randn(2, 7, 5, 6)
    with torch.no_grad():
        due = exact.double()(image.double()) if backend == "reference" else None
        got = block(image)
    if due is not None:
        torch.testing.assert_close(got, due.float())
    assert got.shape == (2, 7, 5, 6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"in_channels": 0}, "in_channels is 0"),
        ({"in_channels": 8.0}, "in_channels is 8.0"),
        ({"out_channels": -3}, "out_channels is -3"),
        ({"kernel_size": 4}, "kernel_size is 4, an odd"),
        ({"kernel_size": -3}, "kernel_size is -3"),
        ({"stride": 0}, "stride is 0"),
        ({"stride": True}, "stride is True"),
        ({"expand_ratio": 0}, "expand_ratio is 0"),
        ({"expand_ratio": float("inf")}, "expand_ratio is inf"),
        ({"se_ratio": -0.25}, "se_ratio is -0.25"),
        ({"padding": "valid"}, "padding is 'valid', 'symmetric' or 'same'"),
        ({"padding": 1}, "padding is 1"),
        ({"drop_path": 1.0}, r"drop_path is 1.0, a number in \[0, 1\)"),
        ({"drop_path": -0.1}, "drop_path is -0.1"),
    ],
)
def test_bad_constructor_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ek.MBConv(**{"in_channels": 8, "out_channels": 8, **arguments})


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        (torch.randn(8, 5, 5), ValueError, "3 dimensions"),
        (torch.randn(1, 9, 5, 5), ValueError, "8 channels, its input has 9|8 channels, input"),
        (torch.randn(1, 8, 5, 5).double(), TypeError, "dtype"),
        (torch.ones(1, 8, 5, 5, dtype=torch.int64), TypeError, "dtype torch.int64"),
        (torch.randn(1, 8, 5, 5, device="meta"), ValueError, "is on meta|is on cpu"),
    ],
    ids=["3-d", "channels", "float64", "int64", "meta"],
)
def test_bad_input(
    image: torch.Tensor, error: type[Exception], message: str, training: bool
) -> None:
    block = ek.MBConv(8, 8).train(training)
    before = {name: value.clone() for name, value in block.state_dict().items()}
    with pytest.raises(error, match=message):
        block(image)
    for name, value in block.state_dict().items():
        assert torch.equal(value, before[name]), f"{name} changed"
