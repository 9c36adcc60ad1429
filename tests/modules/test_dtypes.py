"""bfloat16, float16, float64 and autocast; memory formats."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import effkernels as ek
from effkernels.testing import assert_close_to
from tests.modules.test_mbconv import CASES, our_block, timm_twin
from tests.networks import make_realistic

CASE = CASES[0]


@pytest.mark.parametrize("case", CASES[:6], ids=str)
def test_bfloat16(case: tuple, backend: str) -> None:
    ours = our_block(case, "symmetric", nn.SiLU).eval()
    theirs = timm_twin(ours, case, "symmetric", nn.SiLU).eval()
    # What both see is the rounded weights.
    ours.to(torch.bfloat16)
    theirs.to(torch.bfloat16)
    exact = copy.deepcopy(theirs).double()
    image = torch.randn(2, case[0], *case[-1]).bfloat16()
    with torch.no_grad():
        assert_close_to(exact(image.double()), ours(image), theirs(image))


def test_bfloat16_training(backend: str) -> None:
    ours = our_block(CASE, "symmetric", nn.SiLU).to(torch.bfloat16)
    theirs = timm_twin(ours.float(), CASE, "symmetric", nn.SiLU).to(torch.bfloat16)
    ours.to(torch.bfloat16)
    exact = copy.deepcopy(theirs).double()
    image = torch.randn(4, CASE[0], *CASE[-1]).bfloat16()
    outputs = [network.train()(image) for network in (ours, theirs)]
    assert_close_to(
        exact.train()(image.double()).detach(), outputs[0].detach(), outputs[1].detach()
    )
    outputs[0].float().square().mean().backward()
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None and bool(parameter.grad.isfinite().all()), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_dtypes_of_the_reference(dtype: torch.dtype) -> None:
    block = our_block(CASE, "symmetric", nn.SiLU).eval()
    image = torch.randn(2, CASE[0], *CASE[-1])
    with torch.no_grad():
        due = copy.deepcopy(block).double()(image.double())
        output = block.to(dtype)(image.to(dtype))
    assert output.dtype == dtype
    tolerance = 1e-12 if dtype == torch.float64 else 2e-3
    assert float((output.double() - due).norm() / due.norm()) <= tolerance


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_autocast(training: bool, backend: str) -> None:
    """Computes in bfloat16 as nn.Conv2d would, from float32 parameters that get gradients."""
    block = our_block(CASE, "symmetric", nn.SiLU).train(training)
    theirs = timm_twin(block, CASE, "symmetric", nn.SiLU).train(training)
    exact = copy.deepcopy(theirs).double()
    image = torch.randn(4, CASE[0], *CASE[-1])
    with torch.autocast("cpu", torch.bfloat16):
        outputs = [network(image) for network in (block, theirs)]
    assert outputs[0].dtype == torch.bfloat16
    due = exact(image.double()).detach()
    # timm adds its residual in float32; rounding the sum is what bfloat16 costs at least.
    baseline = outputs[1].detach().bfloat16()
    assert_close_to(due, outputs[0].detach(), baseline)
    outputs[0].float().square().mean().backward()
    for name, parameter in block.named_parameters():
        assert parameter.grad is not None and parameter.grad.dtype == torch.float32, name
        assert bool(parameter.grad.isfinite().all()), name


def test_autocast_weights_follow_changes(backend: str) -> None:
    block = our_block(CASE, "symmetric", nn.SiLU).eval()
    image = torch.randn(1, CASE[0], *CASE[-1])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        before = block(image)
        assert torch.equal(block(image), before)
        block.conv_dw.weight.mul_(2)
        after = block(image)
    assert not torch.allclose(before, after)
    with torch.no_grad():
        assert block(image).dtype == torch.float32


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_memory_formats_agree(training: bool, backend: str) -> None:
    block = make_realistic(ek.MBConv(8, 8)).train(training)
    image = torch.randn(3, 8, 7, 9)
    wide = torch.randn(3, 16, 9, 9)
    wide[:, ::2, 1:8] = image
    outputs = []
    for view in (image, image.contiguous(memory_format=torch.channels_last), wide[:, ::2, 1:8]):
        output = copy.deepcopy(block)(view)
        assert output.is_contiguous(memory_format=torch.channels_last)
        outputs.append(output.detach())
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])
    # Weights in channels_last are the same weights.
    converted = copy.deepcopy(block).to(memory_format=torch.channels_last)
    torch.testing.assert_close(converted(image).detach(), outputs[0])


def test_mixed_dtypes_are_an_error() -> None:
    with pytest.raises(TypeError, match="dtype"):
        ek.MBConv(8, 8).eval()(torch.randn(1, 8, 5, 5).bfloat16())


def test_meta() -> None:
    with torch.device("meta"):
        block = ek.MBConv(8, 12, stride=2)
        image = torch.empty(2, 8, 7, 7)
    for training in (False, True):
        assert block.train(training)(image).shape == (2, 12, 4, 4)
