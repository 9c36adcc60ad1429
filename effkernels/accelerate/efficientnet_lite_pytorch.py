"""efficientnet_lite_pytorch's EfficientNets."""
# ruff: noqa: D101 -- every class here is efficientnet_lite_pytorch's of the same name

from typing import Any

from efficientnet_lite_pytorch import model

from .kinds import Accelerated


class MBConvBlock(Accelerated, model.MBConvBlock):
    def forward(self, inputs: Any, drop_connect_rate: float | None = None) -> Any:
        """As the original's, which looks at ``drop_connect_rate`` in training only."""
        if self.training:
            return super().forward(inputs, drop_connect_rate=drop_connect_rate)
        return super().forward(inputs)


class EfficientNet(Accelerated, model.EfficientNet):
    pass


ADAPTERS = (MBConvBlock, EfficientNet)
