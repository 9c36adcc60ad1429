"""A network's layers from the input to the head, for learning rates that differ between them.

Layers are the stem, each stage of blocks, EfficientNet's last convolution and the classifier: nine
or ten in an EfficientNet, six in a ResNet. The early ones have learned what all pictures have in
common, so fine-tuning changes them less (Howard & Ruder, 2018, section 3.2).
"""

from __future__ import annotations

from typing import NamedTuple

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


class Layer(NamedTuple):
    """Modules that learn with the same learning rate."""

    names: list[str]  # "conv_stem", "bn1"; "blocks.0"; ...
    parameters: list[nn.Parameter]


def layers(model: nn.Module) -> list[Layer]:
    """The layers of ``model`` that have parameters, in the order in which they run.

    Children of ``model`` are layers; a BatchNorm belongs to the one before it, and every stage of
    an EfficientNet's ``blocks`` is one of its own. Each parameter is in exactly one of them.
    """
    found: list[Layer] = []
    for name, child in model.named_children():
        stages = [(name, child)]
        if name == "blocks":
            stages = [(f"{name}.{stage}", module) for stage, module in child.named_children()]
        for stage, module in stages:
            parameters = list(module.parameters())
            if isinstance(module, _BatchNorm) and found:
                found[-1].names.append(stage)
                found[-1].parameters.extend(parameters)
            elif parameters:
                found.append(Layer([stage], parameters))
    return found
