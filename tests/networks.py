"""Helpers for tests of modules and models: statistics as after training, twins, gradients."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import effkernels as ek
from effkernels.testing import FACTOR, assert_close_to, relative_error


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


class _Ops(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: Any = (), options: Any = None
    ) -> Any:
        if function.namespace == "effkernels":
            self.names.append(function._opname)
        return function(*arguments, **(options or {}))


def training_ops(network: nn.Module, input: Tensor) -> list[str]:
    """Names of the library's ops that run forward and backward, in order."""
    with _Ops() as ops:
        network(input).sum().backward()
    return ops.names


class Errors:
    """Errors of a network and of PyTorch, over draws of weights and images.

    A deep network with random weights amplifies a few early roundings: of one draw PyTorch's own
    error is up to nine times as large in NCHW as in channels_last, or the other way round. Over a
    dozen draws the ratio says which of two networks rounds more.
    """

    def __init__(self) -> None:
        self.ratios: dict[str, list[float]] = {"norm": [], "largest element": []}

    @torch.no_grad()
    def add(self, original: nn.Module, image: Tensor, *results: Tensor) -> None:
        """Compare ``results`` for ``image`` with what ``original`` makes of it in float64."""
        exact = copy.deepcopy(original).double()(image.double())
        theirs = [
            original(image.contiguous(memory_format=layout))
            for layout in (torch.contiguous_format, torch.channels_last)
        ]
        for result in results:
            assert result.shape == exact.shape and result.dtype == image.dtype
            for name, error in (("norm", relative_error), ("largest element", _largest_error)):
                own = max(error(each, exact) for each in theirs)
                self.ratios[name].append((error(result, exact) + 1e-7) / (own + 1e-7))

    def check(self) -> None:
        """In the (geometric) mean at most FACTOR times PyTorch's own, and never far from it."""
        for name, ratios in self.ratios.items():
            mean = statistics.geometric_mean(ratios)
            assert mean <= FACTOR, f"{name}: {mean:.2f} times PyTorch's error: {ratios}"
            assert max(ratios) <= 10 * FACTOR, f"{name}: times PyTorch's error: {ratios}"


def _largest_error(actual: Tensor, reference: Tensor) -> float:
    """The largest element of the error over that of the reference."""
    return float((actual.double() - reference).abs().max() / reference.abs().max())


def assert_networks_agree(
    ours: nn.Module,
    theirs: nn.Module,
    image: Tensor | Sequence[Tensor],
    training: bool = False,
    gradients: bool = True,
    forward: Callable[[nn.Module, Tensor], Tensor] = lambda network, image: network(image),
) -> None:
    """``ours`` is as accurate as ``theirs`` (same parameters, in the same order) in float32.

    Compares outputs, gradients of the input and of every parameter, and after training the
    running statistics, with those of ``theirs`` in float64. PyTorch sums in another order in
    channels_last than in NCHW; the baseline is whichever is less accurate. Runs on copies.
    Several images (batches) are run one after the other and judged together.
    """
    images = [image] if isinstance(image, Tensor) else list(image)
    exact = copy.deepcopy(theirs).double()
    due = _run(exact, [x.double() for x in images], training, gradients, forward)
    baselines = []
    for layout in (torch.contiguous_format, torch.channels_last):
        stock = copy.deepcopy(theirs).to(memory_format=layout)
        converted = [x.contiguous(memory_format=layout) for x in images]
        baselines.append(_run(stock, converted, training, gradients, forward))
    got = _run(copy.deepcopy(ours), images, training, gradients, forward)
    assert got.keys() == due.keys()
    for name, expected in due.items():
        assert_pooled_close(expected, got[name], [each[name] for each in baselines], name)


def assert_pooled_close(
    expected: Sequence[Tensor],
    got: Sequence[Tensor],
    baselines: Sequence[Sequence[Tensor]],
    name: str,
) -> None:
    """Tensors of one kind, judged together by ``assert_close_to``.

    Args:
        expected: in float64.
        got: what is being tested.
        baselines: runs of PyTorch in ``got``'s dtype; the least accurate one counts.
        name: what the message calls them.
    """
    exact_values = _pooled(expected, expected)
    stock_values = max(
        (_pooled(baseline, expected).float() for baseline in baselines),
        key=lambda values: float((values - exact_values).norm()),
    )
    assert_close_to(exact_values, _pooled(got, expected).float(), stock_values, name=name)


def _pooled(tensors: Sequence[Tensor], expected: Sequence[Tensor]) -> Tensor:
    """All of one kind in one vector, each divided by the size of its expected elements.

    The error of a vector of eight alone is too random to hold to twice another's. Where the
    expected value is nothing but rounding (the gradient of a bias before a BatchNorm), the
    largest tensor's size counts, lest that rounding drown everything else.
    """
    sizes = [float(t.square().mean().sqrt()) if t.numel() else 0.0 for t in expected]
    least = max(1e-2 * max(sizes), 1e-30)
    parts = []
    for index, (tensor, reference) in enumerate(zip(tensors, expected, strict=True)):
        assert tensor.shape == reference.shape, f"{index}: {tensor.shape}, {reference.shape} due"
        parts.append((tensor.double() / max(sizes[index], least)).flatten())
    return torch.cat(parts)


def _run(
    network: nn.Module,
    images: Sequence[Tensor],
    training: bool,
    gradients: bool,
    forward: Callable[[nn.Module, Tensor], Tensor],
) -> dict[str, list[Tensor]]:
    """Everything that a forward and a backward pass of each batch yield, by kind."""
    network.train(training)
    torch.manual_seed(7)  # the same samples are dropped
    found: dict[str, list[Tensor]] = {}

    def note(kind: str, value: Tensor) -> None:
        found.setdefault(kind, []).append(value)

    for index, image in enumerate(images):
        network.zero_grad(set_to_none=True)
        input = image.detach().clone().requires_grad_(gradients)
        with torch.set_grad_enabled(gradients):
            output = forward(network, input)
        assert output.dtype == image.dtype
        note("output", output.detach())
        if gradients:
            generator = torch.Generator().manual_seed(11 + index)
            output.backward(torch.randn(output.shape, generator=generator).to(output.dtype))
            assert input.grad is not None
            note("gradient of the input", input.grad)
            for name, parameter in network.named_parameters():
                assert parameter.grad is not None, f"{name} got no gradient"
                kind = "vectors" if parameter.dim() == 1 else "weights"
                note(f"gradients of {kind}", parameter.grad)
        if training:
            for norm in batch_norms(network):
                for kind in ("running_mean", "running_var", "num_batches_tracked"):
                    note(kind, getattr(norm, kind).detach().clone().double().reshape(-1))
    return found
