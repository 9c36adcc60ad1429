"""SiLU, SqueezeExcite, BatchNormAct2d and ConvNormAct against PyTorch, timm and torchvision."""

from __future__ import annotations

from typing import Any

import pytest
import timm.layers
import torch
from timm.models import _efficientnet_blocks as timm_blocks
from torch import Tensor, nn
from torchvision.ops import Conv2dNormActivation, SqueezeExcitation

import effkernels as ek
from tests.networks import assert_networks_agree, make_realistic


def test_silu(backend: str) -> None:
    image = torch.randn(2, 5, 3, 4)
    assert_networks_agree(ek.SiLU(), nn.SiLU(), image, training=True)
    before = image.clone()
    ek.SiLU(inplace=True)(image)
    assert torch.equal(image, before)


@pytest.mark.parametrize("layers", [(nn.SiLU, nn.Sigmoid), (nn.ReLU, nn.Hardsigmoid)], ids=str)
def test_squeeze_excite(layers: tuple[type[nn.Module], type[nn.Module]], backend: str) -> None:
    ours = ek.SqueezeExcite(12, 5, *layers)
    for theirs in (
        timm_blocks.SqueezeExcite(12, rd_channels=5, act_layer=layers[0], gate_layer=layers[1]),
        SqueezeExcitation(12, 5, *layers),
    ):
        theirs.load_state_dict(
            dict(zip(theirs.state_dict(), ours.state_dict().values(), strict=True))
        )
        assert_networks_agree(ours, theirs, torch.randn(3, 12, 5, 4), training=True)


class NormThenAct(nn.Module):
    """BatchNormAct2d in plain PyTorch."""

    def __init__(self, norm: ek.BatchNormAct2d, act: nn.Module) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(norm.num_features, norm.eps, norm.momentum)
        self.norm.load_state_dict(norm.state_dict())
        self.act = act

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        output = self.norm(input)
        return self.act(output if residual is None else output + residual)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("act_layer", [nn.SiLU, nn.ReLU, nn.Identity, nn.GELU])
def test_batch_norm_act(act_layer: type[nn.Module], training: bool, backend: str) -> None:
    ours = make_realistic(ek.BatchNormAct2d(6, 1e-3, 0.2, act_layer=act_layer))
    theirs = NormThenAct(ours, act_layer())
    image = torch.randn(4, 6, 5, 3)
    assert_networks_agree(ours, theirs, image, training)
    assert_networks_agree(ours, theirs, image, training, forward=lambda n, x: n(x, 0.5 * x))


def test_batch_norm_act_like_timm(backend: str) -> None:
    ours = make_realistic(ek.BatchNormAct2d(6, act_layer=nn.ReLU))
    theirs = timm.layers.BatchNormAct2d(6)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    assert_networks_agree(ours, theirs, torch.randn(4, 6, 5, 3), training=True)


def test_batch_norm_act_bad_input() -> None:
    with pytest.raises(ValueError, match="4D"):
        ek.BatchNormAct2d(4)(torch.randn(2, 4))
    with pytest.raises(ValueError, match="residual"):
        ek.BatchNormAct2d(4)(torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 2))


CONVOLUTIONS = [
    {"kernel_size": 3, "stride": 2},
    {"kernel_size": 1},
    {"kernel_size": 1, "stride": 2},
    {"kernel_size": 5, "groups": 8},
    {"kernel_size": 3, "groups": 4},
    {"kernel_size": 7, "act_layer": nn.ReLU6},
    {"kernel_size": 3, "act_layer": None},
    {"kernel_size": 3, "act_layer": nn.ELU},
]


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("options", CONVOLUTIONS, ids=str)
def test_conv_norm_act_like_torchvision(
    options: dict[str, Any], training: bool, backend: str
) -> None:
    ours = make_realistic(ek.ConvNormAct(8, 8, **options))
    foreign = {("activation_layer" if k == "act_layer" else k): v for k, v in options.items()}
    theirs = Conv2dNormActivation(8, 8, **{"activation_layer": nn.SiLU, **foreign})
    theirs.load_state_dict(dict(zip(theirs.state_dict(), ours.state_dict().values(), strict=True)))
    assert_networks_agree(ours, theirs, torch.randn(3, 8, 9, 6), training)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("groups", [1, 8])
def test_conv_norm_act_same_padding_like_timm(
    groups: int, stride: int, training: bool, backend: str
) -> None:
    ours = make_realistic(ek.ConvNormAct(8, 8, 5, stride, groups, padding="same"))
    theirs = timm_blocks.ConvBnAct(
        8, 8, 5, stride, group_size=1 if groups > 1 else 0, pad_type="same", act_layer=nn.SiLU
    )
    assert list(ours.state_dict()) == list(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    assert_networks_agree(ours, theirs, torch.randn(3, 8, 9, 6), training)


class ConvThenAdd(nn.Module):
    """ConvNormAct with a residual in plain PyTorch."""

    def __init__(self, module: ek.ConvNormAct) -> None:
        super().__init__()
        self.conv, self.norm, self.act = module.conv, module.bn1, module.act1

    def forward(self, input: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(input)) + input)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("options", [CONVOLUTIONS[1], CONVOLUTIONS[3], CONVOLUTIONS[5]], ids=str)
def test_conv_norm_act_residual(options: dict[str, Any], training: bool, backend: str) -> None:
    ours = make_realistic(ek.ConvNormAct(8, 8, **options))
    assert_networks_agree(
        ours,
        ConvThenAdd(ours),
        torch.randn(3, 8, 9, 6),
        training,
        forward=lambda network, x: (
            network(x, x) if network.__class__ is ek.ConvNormAct else network(x)
        ),
    )


def test_conv_without_norm(backend: str) -> None:
    ours = ek.ConvNormAct(8, 6, 3, norm_layer=None)
    assert set(ours.state_dict()) == {"conv.weight", "conv.bias"}
    theirs = nn.Sequential(nn.Conv2d(8, 6, 3, padding=1), nn.SiLU())
    theirs[0].load_state_dict(ours.conv.state_dict())
    assert_networks_agree(ours, theirs, torch.randn(2, 8, 5, 5))


def test_convolution_bias_before_norm(backend: str) -> None:
    """Some networks keep the bias that BatchNorm makes redundant; folding has to count it."""
    ours = make_realistic(ek.ConvNormAct(8, 6, 3))
    ours.conv.bias = nn.Parameter(torch.randn(6))
    theirs = nn.Sequential(nn.Conv2d(8, 6, 3, padding=1), nn.BatchNorm2d(6), nn.SiLU())
    theirs.load_state_dict(dict(zip(theirs.state_dict(), ours.state_dict().values(), strict=True)))
    assert_networks_agree(ours, theirs, torch.randn(2, 8, 5, 5))
    ours.eval()
    with torch.no_grad():
        before = ours(torch.ones(1, 8, 3, 3))
        ours.conv.bias.add_(1)
        assert not torch.allclose(ours(torch.ones(1, 8, 3, 3)), before)


@pytest.mark.parametrize(
    ("module", "arguments", "message"),
    [
        (ek.ConvNormAct, (0, 8), "in_channels is 0"),
        (ek.ConvNormAct, (8, 8, 2), "kernel_size is 2, an odd"),
        (ek.ConvNormAct, (8, 8, 3, 0), "stride is 0"),
        (ek.ConvNormAct, (8, 8, 3, 1, 3), "groups is 3, a divisor"),
        (ek.ConvNormAct, (8, 8, 3, 1, 1, "full"), "padding is 'full'"),
        (ek.SqueezeExcite, (8, 0), "reduced_channels is 0"),
        (ek.SqueezeExcite, (-8, 2), "channels is -8"),
        (ek.DepthwiseSeparableConv, (8, 8, 3, 1, -1.0), "se_ratio is -1.0"),
    ],
)
def test_bad_constructor_arguments(module: Any, arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        module(*arguments)
