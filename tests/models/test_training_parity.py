"""Whole networks of every library in training, accelerated and plain: gradients, ten steps."""

from __future__ import annotations

import copy

import pytest
import torch
import torchvision
from torch import Tensor, nn

import effkernels as ek
from effkernels.testing import FACTOR
from tests.networks import assert_networks_agree, settle
from tests.test_replay import NETWORKS

# The others' activations have kinks: in float32 single values cross them, in any implementation.
SMOOTH = ["torchvision efficientnet_b0", "timm tf_efficientnet_b0", "timm tf_efficientnetv2_b0"]
STEPS = 10


def networks(name: str, image: Tensor) -> tuple[nn.Module, nn.Module]:
    """The network on this library's kernels and as it comes, with the same values."""
    theirs = settle(NETWORKS[name][0](), image)
    return ek.accelerate(copy.deepcopy(theirs)), theirs


@pytest.mark.parametrize("name", NETWORKS)
def test_float64(name: str) -> None:
    """The same formulas: nothing but the order of sums may differ."""
    image = torch.randn(4, 3, 48, 40)
    results = []
    for network in networks(name, image):
        torch.manual_seed(1)
        input = image.double().requires_grad_()
        output = network.double().train()(input)
        wanted = [input, *network.parameters()]
        gradients = torch.autograd.grad(output.square().sum(), wanted, allow_unused=True)
        results.append((output, *gradients, *network.buffers()))
    largest = max(float(g.abs().max()) for g in results[1][1:] if g is not None)
    for got, due in zip(*results, strict=True):
        assert (got is None) == (due is None)
        if due is not None:
            torch.testing.assert_close(got, due, rtol=1e-7, atol=1e-10 * largest)


@pytest.mark.parametrize("name", SMOOTH)
def test_float32(name: str) -> None:
    # A batch's statistics over fewer values would amplify every rounding, PyTorch's and ours.
    image = torch.randn(8, 3, 96, 96)
    ours, theirs = networks(name, image)
    assert_networks_agree(ours, theirs, image, training=True)


def bfloat16(network: nn.Module, image: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return network(image).to(image.dtype)


def test_autocast() -> None:
    image = torch.randn(8, 3, 64, 64)
    ours, theirs = networks(SMOOTH[0], image)
    assert_networks_agree(ours, theirs, image, training=True, forward=bfloat16)


def losses(network: nn.Module, image: Tensor, labels: Tensor) -> Tensor:
    """Of ten steps on the same batch, from the same random numbers."""
    network = copy.deepcopy(network).to(image.dtype).train()
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-4, momentum=0.9)
    torch.manual_seed(3)
    found = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(network(image), labels)
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return torch.tensor(found, dtype=torch.float64)


def test_ten_steps() -> None:
    """Losses stray from float64's like those of PyTorch's own two memory formats.

    Every step multiplies what rounding has done so far, so the measure is the farthest that
    PyTorch has strayed until then; stochastic depth and dropout included.
    """
    theirs = torchvision.models.efficientnet_b0(num_classes=10)
    own = ek.models.efficientnet_b0(num_classes=10, bn_eps=1e-5)
    ek.models.load_checkpoint(own, theirs.state_dict())
    image, labels = torch.randn(8, 3, 48, 48), torch.randint(10, (8,))
    exact = losses(theirs, image.double(), labels)
    assert exact[-1] < exact[0] / 5  # it learns
    stock = torch.zeros(STEPS, dtype=torch.float64)
    for layout in (torch.contiguous_format, torch.channels_last):
        stock = stock.maximum(
            (losses(theirs, image.contiguous(memory_format=layout), labels) - exact).abs()
        )
    for ours in (ek.accelerate(copy.deepcopy(theirs)), own):
        error = (losses(ours, image, labels) - exact).abs()
        ratios = (error + 1e-7) / (stock.cummax(0).values + 1e-7)
        assert float(ratios.log().mean().exp()) <= FACTOR, ratios
        assert float(ratios.max()) <= 10 * FACTOR, ratios
