"""The networks that are measured: torchvision's and timm's own, with weights as after training."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

import torch
import torchvision
from torch import nn

RESOLUTIONS = {
    **{
        f"efficientnet_b{index}": resolution
        for index, resolution in enumerate((224, 240, 260, 300, 380, 456, 528, 600))
    },
    "efficientnet_lite0": 224,
    "efficientnet_lite1": 240,
    "efficientnet_lite2": 260,
    "mobilenet_v2": 224,
    "mobilenet_v3_large": 224,
    "resnet18": 224,
    "resnet34": 224,
    "resnet50": 224,
    "resnet101": 224,
    "resnet152": 224,
}
CALIBRATION_BATCH, CALIBRATION_RESOLUTION = 4, 128


@dataclass(frozen=True)
class Network:
    """A network by name, and the side of the images that it gets."""

    name: str
    resolution: int

    @classmethod
    def parse(cls, text: str) -> Network:
        """``efficientnet_b0``, or ``efficientnet_b0@64`` for another resolution than its own.

        Raises:
            ValueError: for an unknown name (with the nearest ones) or a bad resolution.
        """
        name, at, resolution = text.partition("@")
        if name not in RESOLUTIONS:
            nearest = difflib.get_close_matches(name, RESOLUTIONS, n=3, cutoff=0.5)
            accepted = nearest or list(RESOLUTIONS)
            raise ValueError(f"no network is called {name!r}; nearest are {', '.join(accepted)}")
        if at and (not resolution.isdecimal() or int(resolution) < 1):
            raise ValueError(f"{text!r}: {resolution!r} is no resolution, NAME@PIXELS is accepted")
        return cls(name, int(resolution) if at else RESOLUTIONS[name])

    @property
    def label(self) -> str:
        """What records call it: what :meth:`parse` accepts."""
        own = self.resolution == RESOLUTIONS[self.name]
        return self.name if own else f"{self.name}@{self.resolution}"

    def build(self) -> nn.Module:
        """The library's own module as a user has it, in evaluation mode; BatchNorms are fresh."""
        if not self.name.startswith("efficientnet_lite"):
            return torchvision.models.get_model(self.name).eval()
        import timm  # torchvision has no Lite

        return timm.create_model(f"tf_{self.name}").eval()


def settle(network: nn.Module, resolution: int) -> nn.Module:
    """Give the BatchNorms weights around 1 and statistics of the data that flows.

    With fresh statistics activations would shrink or grow from layer to layer, and denormal
    numbers would be timed instead of the network.
    """
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    side = min(resolution, CALIBRATION_RESOLUTION)
    with torch.no_grad():
        for norm in norms:
            norm.weight.uniform_(0.7, 1.3)
            norm.bias.normal_(0.0, 0.3)
            norm.train()
            norm.momentum = 1.0
        network(torch.randn(CALIBRATION_BATCH, 3, side, side))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.eval()
        norm.momentum = momentum
    return network
