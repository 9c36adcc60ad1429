"""Helpers for tests of modules and models: statistics as after training, twins, gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

import effkernels as ek
from effkernels.testing import assert_close_to


def make_realistic(network: nn.Module) -> nn.Module:
    """BatchNorm as after training: affine around 1 and 0, statistics of the data that flows.

    Made-up statistics would let activations shrink or grow without bound over the layers.
    """
    with torch.no_grad():
        for norm in batch_norms(network):
            if norm.weight is not None:
                norm.weight.uniform_(0.7, 1.3)
                norm.bias.normal_(0.0, 0.3)
            if norm.running_mean is not None:
                norm.running_mean.normal_(0.0, 0.3)
                norm.running_var.uniform_(0.5, 1.5)
    return network


def batch_norms(network: nn.Module) -> list[nn.BatchNorm2d]:
    return [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]


def settle(network: nn.Module, image: Tensor) -> nn.Module:
    """Running statistics become those of ``image``, plus some deviation; mode is kept."""
    make_realistic(network)
    modes = [(norm, norm.momentum) for norm in batch_norms(network)]
    training = network.training
    for norm, _ in modes:
        norm.momentum = 1.0
    network.train()
    with torch.no_grad(), ek.use_backend("reference"):
        network(image)
        for norm, momentum in modes:
            norm.momentum = momentum
            assert norm.running_mean is not None and norm.running_var is not None
            norm.running_mean.add_(norm.running_var.sqrt() * 0.1 * torch.randn_like(norm.bias))
            norm.running_var.mul_(torch.empty_like(norm.bias).uniform_(0.8, 1.25))
    return network.train(training)


@contextmanager
def everything_as_modules() -> Iterator[None]:
    """Hooks on every module call of the process, which make blocks call their children."""
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        yield
    finally:
        handle.remove()


def assert_networks_agree(
    ours: nn.Module,
    theirs: nn.Module,
    image: Tensor,
    training: bool = False,
    gradients: bool = True,
    forward: Callable[[nn.Module, Tensor], Tensor] = lambda network, image: network(image),
) -> None:
    """``ours`` is as accurate as ``theirs`` (same parameters, in the same order) in float32.

    Compares outputs, gradients of the input and of every parameter, and after training the
    running statistics, with those of ``theirs`` in float64. The baseline runs in channels_last,
    as the library does: PyTorch's BatchNorm sums in another order there. Runs on copies.
    """
    exact = copy.deepcopy(theirs).double()
    stock = copy.deepcopy(theirs).to(memory_format=torch.channels_last)
    image_last = image.contiguous(memory_format=torch.channels_last)
    due = _run(exact, image.double(), training, gradients, forward)
    baseline = _run(stock, image_last, training, gradients, forward)
    got = _run(copy.deepcopy(ours), image, training, gradients, forward)
    assert got.keys() == baseline.keys() == due.keys()
    for name, expected in due.items():
        # Tensors of one kind are compared together, each divided by the size of its elements:
        # the error of a vector of eight is too random to hold to twice another's.
        sizes = [
            tensor.square().mean().sqrt().clamp_min(1e-30) if tensor.numel() else 1.0
            for tensor in expected
        ]
        pooled = []
        for tensors in (expected, got[name], baseline[name]):
            for index, (tensor, reference) in enumerate(zip(tensors, expected, strict=True)):
                assert tensor.shape == reference.shape, f"{name} {index}: {tensor.shape}"
            pooled.append(
                torch.cat([(t.double() / s).flatten() for t, s in zip(tensors, sizes, strict=True)])
            )
        assert_close_to(pooled[0], pooled[1].float(), pooled[2].float(), name=name)


def _run(
    network: nn.Module,
    image: Tensor,
    training: bool,
    gradients: bool,
    forward: Callable[[nn.Module, Tensor], Tensor],
) -> dict[str, list[Tensor]]:
    """Everything that a forward and a backward pass yield, by kind."""
    network.train(training)
    network.zero_grad(set_to_none=True)
    torch.manual_seed(7)  # the same samples are dropped
    input = image.detach().clone().requires_grad_(gradients)
    with torch.set_grad_enabled(gradients):
        output = forward(network, input)
    assert output.dtype == image.dtype
    found = {"output": [output.detach()]}
    if gradients:
        torch.manual_seed(11)
        output.backward(torch.randn(output.shape).to(output.dtype))
        assert input.grad is not None
        found["gradient of the input"] = [input.grad]
        for name, parameter in network.named_parameters():
            assert parameter.grad is not None, f"{name} got no gradient"
            kind = "vectors" if parameter.dim() == 1 else "weights"
            found.setdefault(f"gradients of {kind}", []).append(parameter.grad)
    if training:
        for norm in batch_norms(network):
            for kind in ("running_mean", "running_var", "num_batches_tracked"):
                value = getattr(norm, kind).detach().clone()
                found.setdefault(kind, []).append(value.double().reshape(-1))
    return found
