"""A training step: what the suites ``training`` and ``campaign`` time and compare."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def without_chance(network: nn.Module) -> nn.Module:
    """``network`` with its dropout and stochastic depth off: gradients can be compared."""
    for child in network.modules():
        if type(child).__name__ in ("StochasticDepth", "Dropout", "DropPath"):
            for name in ("p", "drop_prob"):
                if hasattr(child, name):
                    setattr(child, name, 0.0)
    return network


def cross_entropy(network: Callable[[Tensor], Tensor], image: Tensor, labels: Tensor) -> Tensor:
    """The loss of [N, 3, H, W] with classes [N]."""
    return F.cross_entropy(network(image), labels)


def gradient(network: nn.Module, loss: Callable[[], Tensor]) -> Tensor:
    """Of the network's loss, for all parameters in a row."""
    network.zero_grad(set_to_none=True)
    loss().backward()
    return torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])


def sgd_step(network: nn.Module, loss: Callable[[], Tensor]) -> Callable[[], None]:
    """Gradients freed, forward, backward, SGD with momentum, as one call."""
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-4, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss().backward()
        optimizer.step()

    return step
