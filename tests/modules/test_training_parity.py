"""Blocks of every library in training: outputs, gradients and statistics, accelerated and plain.

Nothing here asks how a block trains, only that it does so as its own library's code does.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import efficientnet_lite_pytorch
import efficientnet_pytorch
import pytest
import torch
from timm.models import _efficientnet_blocks as timm_blocks
from torch import Tensor, nn
from torchvision.models import efficientnet, mnasnet, mobilenetv2, mobilenetv3, resnet

import effkernels as ek
from effkernels.testing import assert_close_to
from tests.modules.test_modes import Fixed
from tests.networks import assert_networks_agree, batch_norms, make_realistic

Size = tuple[int, int]


def mbconv(
    ratio: int, kernel: int, stride: int, inputs: int, outputs: int, drop: float = 0.0
) -> nn.Module:
    config = efficientnet.MBConvConfig(ratio, kernel, stride, inputs, outputs, 1, 1.0, 1.0)
    return efficientnet.MBConv(config, drop, partial(nn.BatchNorm2d, eps=1e-3, momentum=0.01))


def fused_mbconv(
    ratio: int, kernel: int, stride: int, inputs: int, outputs: int, drop: float = 0.0
) -> nn.Module:
    config = efficientnet.FusedMBConvConfig(ratio, kernel, stride, inputs, outputs, 1)
    return efficientnet.FusedMBConv(config, drop, nn.BatchNorm2d)


def mobilenet_v3(*config: Any) -> nn.Module:
    """Input, kernel, expanded, output, whether squeeze-and-excitation, activation, stride, ..."""
    options = mobilenetv3.InvertedResidualConfig(*config, width_mult=1.0)
    return mobilenetv3.InvertedResidual(options, partial(nn.BatchNorm2d, eps=0.001, momentum=0.01))


def timm_block(
    inputs: int, outputs: int, act: type[nn.Module] = nn.SiLU, se: bool = True, **options: Any
) -> nn.Module:
    """Without ``exp_ratio`` a depthwise separable convolution."""
    kind = timm_blocks.InvertedResidual
    kind = kind if "exp_ratio" in options else timm_blocks.DepthwiseSeparableConv
    if se:
        options["se_layer"] = partial(timm_blocks.SqueezeExcite, rd_ratio=0.25)
    return kind(inputs, outputs, act_layer=act, **options)


class DropConnect(nn.Module):
    """Calls a block as efficientnet_pytorch's network does."""

    RATE = 0.4

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, input: Tensor) -> Tensor:
        return self.block(input, drop_connect_rate=self.RATE)


def mbconv_block(
    inputs: int,
    outputs: int,
    kernel: int,
    stride: int,
    size: Size | None = None,
    library: Any = efficientnet_pytorch,
    name: str = "efficientnet-b0",
    **options: Any,
) -> nn.Module:
    """The block of efficientnet_pytorch, which pads for images of ``size`` or (None) of any."""
    first, settings = library.utils.get_model_params(name, None)
    block = first[0]._replace(
        num_repeat=1,
        kernel_size=kernel,
        stride=stride,
        input_filters=inputs,
        output_filters=outputs,
        **{"expand_ratio": 4, "se_ratio": 0.25} | options,
    )
    return library.model.MBConvBlock(block, settings, image_size=size)


TIMM = {"dw_kernel_size": 3, "stride": 1, "exp_ratio": 4.0}
# Name -> the block, the size of its images.
BLOCKS: dict[str, tuple[Callable[[], nn.Module], Size]] = {
    "torchvision MBConv": (lambda: mbconv(6, 3, 1, 16, 16), (9, 7)),
    "torchvision MBConv wide image": (lambda: mbconv(6, 3, 1, 24, 24), (29, 45)),
    "torchvision MBConv 5x5 stride 2": (lambda: mbconv(6, 5, 2, 24, 40), (15, 14)),
    "torchvision MBConv 3x3 stride 2": (lambda: mbconv(6, 3, 2, 16, 24), (17, 32)),
    "torchvision MBConv no expansion": (lambda: mbconv(1, 3, 1, 32, 16), (12, 11)),
    "torchvision MBConv no expansion, residual": (lambda: mbconv(1, 5, 1, 24, 24), (7, 8)),
    "torchvision MBConv stochastic depth": (lambda: mbconv(4, 3, 1, 40, 40, 0.5), (6, 9)),
    "torchvision MBConv 1152 channels": (lambda: mbconv(6, 5, 1, 192, 192), (5, 5)),
    "torchvision FusedMBConv": (lambda: fused_mbconv(4, 3, 2, 16, 24), (9, 8)),
    "torchvision FusedMBConv stochastic depth": (lambda: fused_mbconv(1, 3, 1, 8, 8, 0.5), (9, 8)),
    "torchvision MobileNetV2": (lambda: mobilenetv2.InvertedResidual(12, 12, 1, 5), (9, 8)),
    "torchvision MobileNetV2 stride 2": (
        lambda: mobilenetv2.InvertedResidual(10, 20, 2, 3),
        (7, 7),
    ),
    "torchvision MobileNetV2 no expansion": (
        lambda: mobilenetv2.InvertedResidual(18, 9, 1, 1),
        (8, 11),
    ),
    "torchvision MobileNetV3 relu": (
        lambda: mobilenet_v3(16, 3, 64, 24, False, "RE", 2, 1),
        (13, 10),
    ),
    "torchvision MobileNetV3 relu, hard-sigmoid": (
        lambda: mobilenet_v3(40, 5, 120, 40, True, "RE", 1, 1),
        (8, 9),
    ),
    "torchvision MobileNetV3 hard-swish, relu in the gate": (
        lambda: mobilenet_v3(24, 5, 100, 24, True, "HS", 1, 1),
        (7, 10),
    ),
    "torchvision MobileNetV3 dilated": (
        lambda: mobilenet_v3(16, 5, 48, 24, True, "HS", 2, 2),
        (11, 9),
    ),
    "torchvision MNASNet": (lambda: mnasnet._InvertedResidual(16, 16, 5, 1, 3), (8, 7)),
    "torchvision MNASNet stride 2": (lambda: mnasnet._InvertedResidual(16, 24, 3, 2, 6), (9, 9)),
    "torchvision BasicBlock": (lambda: resnet.BasicBlock(16, 16), (8, 7)),
    "timm InvertedResidual": (lambda: timm_block(24, 24, **TIMM), (9, 10)),
    "timm InvertedResidual SAME, stride 2, even": (
        lambda: timm_block(16, 24, **TIMM | {"stride": 2, "pad_type": "same"}),
        (12, 10),
    ),
    "timm InvertedResidual SAME, 5x5, stride 2, odd": (
        lambda: timm_block(16, 24, **TIMM | {"dw_kernel_size": 5, "stride": 2, "pad_type": "same"}),
        (11, 13),
    ),
    "timm InvertedResidual drop-path": (
        lambda: timm_block(24, 24, **TIMM, drop_path_rate=0.5),
        (9, 10),
    ),
    "timm InvertedResidual relu6, no gate": (
        lambda: timm_block(24, 24, nn.ReLU6, False, **TIMM),
        (9, 10),
    ),
    "timm InvertedResidual hard-swish": (lambda: timm_block(24, 16, nn.Hardswish, **TIMM), (7, 7)),
    "timm InvertedResidual dilated": (lambda: timm_block(16, 16, **TIMM, dilation=2), (9, 9)),
    "timm InvertedResidual GELU": (lambda: timm_block(16, 16, nn.GELU, **TIMM), (8, 8)),
    "timm InvertedResidual 12 channels": (lambda: timm_block(12, 20, **TIMM), (5, 9)),
    "timm DepthwiseSeparableConv": (lambda: timm_block(24, 24), (9, 8)),
    "timm DepthwiseSeparableConv SAME, stride 2": (
        lambda: timm_block(20, 12, se=False, stride=2, pad_type="same"),
        (8, 9),
    ),
    "timm DepthwiseSeparableConv drop-path": (
        lambda: timm_block(16, 16, drop_path_rate=0.5),
        (6, 6),
    ),
    "efficientnet_pytorch stride 2, even": (
        lambda: mbconv_block(16, 24, 3, 2, (12, 10)),
        (12, 10),
    ),
    "efficientnet_pytorch 5x5 stride 2, any size": (
        lambda: mbconv_block(16, 24, 5, [2]),
        (10, 13),
    ),
    # As in the network of another size: 0 and 1 pixels, not the 1 and 1 of an odd one.
    "efficientnet_pytorch padded for another size": (
        lambda: mbconv_block(16, 24, 3, 2, (32, 32)),
        (11, 9),
    ),
    "efficientnet_pytorch no expansion, no gate": (
        lambda: mbconv_block(20, 20, 3, 1, (9, 8), expand_ratio=1, se_ratio=None),
        (9, 8),
    ),
    "efficientnet_pytorch residual": (lambda: mbconv_block(16, 16, 5, 1, (9, 8)), (9, 8)),
    "efficientnet_pytorch drop-connect, no residual": (
        lambda: DropConnect(mbconv_block(16, 24, 3, 1, (9, 8))),
        (9, 8),
    ),
    "efficientnet_lite_pytorch stride 2, even": (
        lambda: mbconv_block(
            16, 24, 3, 2, (8, 14), efficientnet_lite_pytorch, "efficientnet-lite0", se_ratio=None
        ),
        (8, 14),
    ),
    "timm EdgeResidual": (
        lambda: timm_blocks.EdgeResidual(16, 24, 3, 2, exp_ratio=4.0, act_layer=nn.SiLU),
        (9, 8),
    ),
    "timm ConvBnAct": (lambda: timm_blocks.ConvBnAct(8, 16, 3, act_layer=nn.SiLU), (9, 8)),
}
# One of every way a block can go; the others differ in sizes only.
VARIED = [
    "torchvision MBConv",
    "torchvision MBConv 5x5 stride 2",
    "torchvision MBConv stochastic depth",
    "torchvision MobileNetV2",
    "torchvision MobileNetV3 hard-swish, relu in the gate",
    "timm InvertedResidual SAME, 5x5, stride 2, odd",
    "timm DepthwiseSeparableConv",
    "efficientnet_pytorch 5x5 stride 2, any size",
]


def blocks(name: str) -> tuple[nn.Module, nn.Module]:
    """The block on this library's kernels and as it comes, with the same values."""
    theirs = make_realistic(BLOCKS[name][0]())
    ours = ek.accelerate(copy.deepcopy(theirs))
    classes = [[type(module) for module in block.modules()] for block in (ours, theirs)]
    assert classes[0] != classes[1]
    return ours, theirs


def image_for(name: str, block: nn.Module, batch: int = 6) -> Tensor:
    """[N, C, H, W] in NCHW; every channel with its own mean."""
    channels = next(m.in_channels for m in block.modules() if isinstance(m, nn.Conv2d))
    return torch.randn(batch, channels, *BLOCKS[name][1]) + 0.3 * torch.randn(channels, 1, 1)


def images(name: str, block: nn.Module, batch: int = 6) -> list[Tensor]:
    """Three draws: of one alone the largest of all errors may be a rare one, in any code."""
    return [image_for(name, block, batch) for _ in range(3)]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("name", BLOCKS)
def test_float32(name: str, layout: torch.memory_format, backend: str) -> None:
    ours, theirs = blocks(name)
    batches = [x.contiguous(memory_format=layout) for x in images(name, theirs)]
    assert_networks_agree(ours.to(memory_format=layout), theirs, batches, training=True)


def assert_same_formulas(got: Sequence[Tensor], due: Sequence[Tensor]) -> None:
    """Both in float64, where a sum in another order is far from any other formula's result."""
    largest = max(float(tensor.abs().max()) for tensor in due)
    for left, right in zip(got, due, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-9, atol=1e-12 * largest)


@pytest.mark.parametrize("name", BLOCKS)
def test_float64(name: str) -> None:
    """The same formulas: nothing but the order of sums may differ."""
    ours, theirs = blocks(name)
    image = image_for(name, theirs)
    results = []
    for block in (ours, theirs):
        torch.manual_seed(1)
        input = image.double().requires_grad_()
        output = block.double().train()(input)
        wanted = [input, *block.parameters()]
        gradients = torch.autograd.grad(output.square().sum(), wanted)
        results.append((output, *gradients, *block.buffers()))
    assert_same_formulas(*results)


@pytest.mark.parametrize("name", VARIED)
def test_bfloat16(name: str, backend: str) -> None:
    ours, theirs = blocks(name)
    batches = [x.bfloat16() for x in images(name, theirs)]
    assert_networks_agree(ours.bfloat16(), theirs.bfloat16(), batches, training=True)


@pytest.mark.parametrize("name", VARIED)
def test_autocast(name: str, backend: str) -> None:
    """Float32 parameters and statistics, bfloat16 between the layers."""

    def forward(network: nn.Module, image: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return network(image).to(image.dtype)

    ours, theirs = blocks(name)
    assert_networks_agree(ours, theirs, images(name, theirs), training=True, forward=forward)


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "autocast"])
def test_drop_connect(precision: str, backend: str) -> None:
    """efficientnet_pytorch's, which draws other random numbers in every dtype: float64 gets the
    original's, and the next draw is the same."""
    dtype = torch.float32 if precision == "float32" else torch.bfloat16
    theirs = make_realistic(mbconv_block(16, 16, 5, 1, (9, 8))).train()
    exact = copy.deepcopy(theirs).double()
    image = torch.randn(8, 16, 9, 8)
    if precision == "bfloat16":
        theirs, image = theirs.bfloat16(), image.bfloat16()
        exact.load_state_dict(theirs.state_dict())
    torch.manual_seed(3)
    ones = torch.ones(8, 1, 1, 1, dtype=dtype)
    factors = efficientnet_pytorch.utils.drop_connect(ones, DropConnect.RATE, True)
    following = torch.rand(())
    assert 0 < factors.count_nonzero() < 8
    results = []
    for block in (exact, theirs, ek.accelerate(copy.deepcopy(theirs))):
        torch.manual_seed(3)
        input = image.to(next(block.parameters()).dtype, copy=True).requires_grad_()
        if block is exact:
            output = input + factors.double() * (block(input) - input)
        else:
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
                output = DropConnect(block)(input).to(dtype)
            assert torch.equal(torch.rand(()), following)
        output.double().square().sum().backward()
        results.append((output.detach(), input.grad))
    for due, stock, got in zip(*results, strict=True):
        assert_close_to(due, got, stock)


@pytest.mark.parametrize("name", VARIED)
def test_batch_norm_options(name: str, backend: str) -> None:
    """Other momenta, a cumulative average, statistics that are no longer kept."""
    ours, theirs = blocks(name)
    for block in (ours, theirs):
        for index, norm in enumerate(batch_norms(block)):
            norm.momentum = (0.3, None, 1.0)[index % 3]
    batches = images(name, theirs)
    assert_networks_agree(ours, theirs, batches, training=True)
    for block in (ours, theirs):
        batch_norms(block)[-1].track_running_stats = False
    assert_networks_agree(ours, theirs, batches, training=True)


@pytest.mark.parametrize("name", VARIED)
def test_without_affine_and_statistics(name: str, backend: str) -> None:
    """What a BatchNorm may lack: its parameters, its buffers."""
    _, theirs = blocks(name)
    for module in theirs.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight = module.bias = None
            module.running_mean = module.running_var = module.num_batches_tracked = None
            module.track_running_stats = False
    results = []
    image = image_for(name, theirs)
    for block in (ek.accelerate(copy.deepcopy(theirs)), theirs, copy.deepcopy(theirs).double()):
        for training in (True, False):
            torch.manual_seed(1)
            block.train(training)
            dtype = next(block.parameters()).dtype
            results.append(block(image.to(dtype)).detach())
    for index in (0, 1):
        assert_close_to(results[4 + index], results[index], results[2 + index])


@pytest.mark.parametrize("frozen", [[0], [-1], [0, 1, 2]], ids=str)
@pytest.mark.parametrize("name", VARIED)
def test_frozen_batch_norms(name: str, frozen: list[int], backend: str) -> None:
    """In evaluation mode inside a training block they use their statistics and keep them."""

    def chosen(network: nn.Module) -> list[nn.Module]:
        norms = batch_norms(network)
        return [norms[index] for index in frozen if index < len(norms)]

    ours, theirs = blocks(name)
    batches = images(name, theirs)
    assert_networks_agree(Fixed(ours, chosen), Fixed(theirs, chosen), batches, training=True)


@pytest.mark.parametrize("name", VARIED)
def test_one_image(name: str, backend: str) -> None:
    ours, theirs = blocks(name)
    assert_networks_agree(ours, theirs, images(name, theirs, batch=1), training=True)


@pytest.mark.parametrize("name", VARIED)
def test_one_value_per_channel_is_an_error(name: str, backend: str) -> None:
    """PyTorch's, and the statistics are as before (PyTorch counts the batch)."""
    ours, theirs = blocks(name)
    pixel = image_for(name, theirs, batch=1)[:, :, :1, :1]
    before = copy.deepcopy(ours.state_dict())
    for block in (theirs, ours):
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            block.train()(pixel)
    for key, value in ours.state_dict().items():
        assert "num_batches" in key or torch.equal(value, before[key]), key


@pytest.mark.parametrize("name", VARIED)
def test_no_images(name: str, backend: str) -> None:
    """Whatever PyTorch makes of an empty batch; timm's and torchvision's blocks take one."""
    ours, theirs = blocks(name)
    results = []
    for block in (ours, theirs):
        input = image_for(name, theirs, batch=0).requires_grad_()
        output = block.train()(input)
        gradients = torch.autograd.grad(output.sum(), [input, *block.parameters()])
        results.append((output, *gradients, *block.buffers()))
    for got, due in zip(*results, strict=True):
        assert torch.equal(got, due)
