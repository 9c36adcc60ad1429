"""What a network is made of, layer by layer, without running it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .common import text_table

BYTES = 4  # of a value, whatever dtype the network has: figures of float32
CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.Identity)


@dataclass(frozen=True)
class Layer:
    """A module's call. Blocks have rows, too, behind those of their layers."""

    name: str
    type: str
    output_shape: tuple[int, ...]  # without the batch
    parameters: int  # of its own, not of its children
    macs: int  # multiply-adds of convolutions and fully connected layers, per image
    activation_bytes: int  # of its output, per image


@dataclass(frozen=True)
class Summary:
    """Layers in the order they run, and totals. Prints as a table."""

    layers: tuple[Layer, ...]
    input_shape: tuple[int, ...]
    parameters: int
    macs: int
    total_bytes: int  # input + 2 × outputs of all layers + parameters

    def to_dict(self) -> dict[str, Any]:
        """Layers and totals for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        head = ("layer", "type", "output", "parameters", "MACs", "activation")
        rows = [
            (
                layer.name,
                layer.type,
                "×".join(map(str, layer.output_shape)),
                f"{layer.parameters:,}" if layer.parameters else "",
                f"{layer.macs:,}" if layer.macs else "",
                f"{layer.activation_bytes / 2**10:,.1f} KiB",
            )
            for layer in self.layers
        ]
        lines = text_table(head, rows, left=3)
        return "\n".join(
            [
                *lines,
                f"parameters    {self.parameters / 1e6:.2f} M",
                f"multiply-adds {self.macs / 1e9:.3f} G",
                f"memory        {self.total_bytes / 2**20:.0f} MB "
                "(input + 2 × outputs + parameters)",
            ]
        )


def summary(model: nn.Module, input_shape: Sequence[int] = (3, 224, 224)) -> Summary:
    """Every layer of ``model`` with its output, parameters and multiply-adds, for one image.

    Works on a copy on the meta device: nothing is computed, ``model`` is left as it is. Memory is
    counted as training without any reuse would need it, every layer's output and its gradient.

    Args:
        model: takes one image batch.
        input_shape: of one image, (C, H, W).

    Raises:
        TypeError: if ``model`` is no module.
        ValueError: if ``input_shape`` is not three positive integers, or from ``model``.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"summary: model is {type(model).__name__}, a torch.nn.Module is accepted")
    shape = tuple(input_shape)
    if len(shape) != 3 or any(not isinstance(size, int) or size < 1 for size in shape):
        raise ValueError(
            f"summary: input_shape is {input_shape!r}, "
            "three positive integers (C, H, W) are accepted"
        )
    with torch.no_grad():
        twin = copy.deepcopy(model).to("meta").eval()
    layers: list[Layer] = []
    for name, module in twin.named_modules():
        if module is not twin and not isinstance(module, CONTAINERS):
            # A module that has a hook is called as a module, also inside of fused blocks.
            module.register_forward_hook(_note(name, layers))
    with torch.no_grad():
        twin(torch.empty(1, *shape, device="meta"))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    values = torch.Size(shape).numel() + parameters
    outputs = sum(layer.activation_bytes for layer in layers)
    return Summary(
        tuple(layers),
        shape,
        parameters,
        sum(layer.macs for layer in layers),
        values * BYTES + 2 * outputs,
    )


def _note(name: str, layers: list[Layer]) -> Any:
    def note(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if not isinstance(output, Tensor):
            return
        layers.append(
            Layer(
                name,
                type(module).__name__,
                tuple(output.shape[1:]),
                sum(parameter.numel() for parameter in module.parameters(recurse=False)),
                _macs(module, output),
                output[0].numel() * BYTES,
            )
        )

    return note


def _macs(module: nn.Module, output: Tensor) -> int:
    if isinstance(module, nn.Conv2d):
        return output[0].numel() * module.weight[0].numel()
    if isinstance(module, nn.Linear):
        return output[0].numel() * module.in_features
    return 0
