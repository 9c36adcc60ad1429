"""The distinct layers of real networks, one CSV row each, and how they are run.

``shapes/<network>.csv`` has two views of a network. Leaving out the rows of ``mbconv`` gives it
layer by layer; leaving out the rows with ``in_block`` gives it as it runs fused, each block as one
op. A classifier is a ``pointwise_conv`` on one pixel; a strided 1×1 convolution is a ``conv``;
pooling is left out. Padding is symmetric everywhere.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.mobilenetv2 import InvertedResidual
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.ops.misc import Conv2dNormActivation, SqueezeExcitation

import effkernels as ek

from .networks import Network
from .tables import CellError, read_rows, write_rows

DIRECTORY = Path(__file__).parent / "shapes"
NETWORKS = (
    "efficientnet_b0",
    "efficientnet_b4",
    "efficientnet_b7",
    "mobilenet_v2",
    "resnet18",
    "resnet50",
)
OPS = ("conv", "pointwise_conv", "depthwise_conv", "squeeze_excite", "mbconv")


@dataclass(frozen=True)
class Layer:
    """One layer, or one MBConv block, of a network: C channels in, K out, E expanded, R reduced."""

    op: str
    count: int  # how often the network has it
    in_block: bool  # part of a row of mbconv
    channels: int
    out_channels: int
    height: int  # of the input
    width: int
    kernel_size: int
    stride: int
    expanded_channels: int  # mbconv; C if it has no expansion; 0 elsewhere
    se_channels: int  # mbconv and squeeze_excite; 0: none
    activation: str
    residual: bool

    def __post_init__(self) -> None:
        if self.op not in OPS:
            raise CellError("op", f"{self.op!r} is given, one of {', '.join(OPS)} is accepted")
        for column in ("count", "channels", "out_channels", "height", "width", "stride"):
            if getattr(self, column) < 1:
                raise CellError(column, f"{getattr(self, column)} is given, >= 1 is accepted")
        if self.kernel_size < 1 or self.kernel_size % 2 == 0:
            raise CellError("kernel_size", f"{self.kernel_size} is given, odd is accepted")
        if self.activation not in ek.ops.ACTIVATIONS:
            accepted = ", ".join(ek.ops.ACTIVATIONS)
            raise CellError("activation", f"{self.activation!r} is given, accepted: {accepted}")
        expands = self.op == "mbconv"
        if (self.expanded_channels > 0) != expands or self.expanded_channels < 0:
            accepted = ">= 1" if expands else "0"
            message = f"{self.expanded_channels} is given, {self.op} accepts {accepted}"
            raise CellError("expanded_channels", message)
        if self.se_channels < 0 or (self.op == "squeeze_excite" and self.se_channels == 0):
            raise CellError("se_channels", f"{self.se_channels} is given, >= 1 is accepted")
        adds_input = self.residual and self.op == "mbconv"
        same_channels = self.op in ("depthwise_conv", "squeeze_excite") or adds_input
        if same_channels and self.out_channels != self.channels:
            message = f"{self.out_channels} is given, channels ({self.channels}) is accepted"
            raise CellError("out_channels", message)
        unstrided = self.op in ("pointwise_conv", "squeeze_excite") or adds_input
        if unstrided and self.stride != 1:
            raise CellError("stride", f"{self.stride} is given, here only 1 is accepted")

    @property
    def out_height(self) -> int:
        return (self.height - 1) // self.stride + 1

    @property
    def out_width(self) -> int:
        return (self.width - 1) // self.stride + 1

    @property
    def label(self) -> str:
        """Short and unambiguous, as ``mbconv 24x56x56 e144 k5 s2 r6 silu -> 40``."""
        words = [self.op, f"{self.channels}x{self.height}x{self.width}"]
        words += [f"e{self.expanded_channels}"] * (self.op == "mbconv")
        if self.op in ("conv", "depthwise_conv", "mbconv"):
            words += [f"k{self.kernel_size}", f"s{self.stride}"]
        words += [f"r{self.se_channels}"] * (self.se_channels > 0)
        words += [self.activation] * (self.activation != "none")
        words += ["+residual"] * self.residual
        if self.op in ("conv", "pointwise_conv", "mbconv"):
            words += ["->", str(self.out_channels)]
        return " ".join(words)

    def flops(self, batch: int) -> int:
        """Two per multiply-add of the convolutions and products."""
        pixels, out_pixels = self.height * self.width, self.out_height * self.out_width
        window = self.kernel_size**2
        expanded = self.expanded_channels
        macs = {
            "conv": out_pixels * window * self.channels * self.out_channels,
            "pointwise_conv": pixels * self.channels * self.out_channels,
            "depthwise_conv": out_pixels * window * self.channels,
            "squeeze_excite": 2 * self.channels * self.se_channels,
            "mbconv": (
                pixels * self.channels * expanded * (expanded != self.channels)
                + out_pixels * expanded * (window + self.out_channels)
                + 2 * expanded * self.se_channels
            ),
        }[self.op]
        return 2 * macs * batch

    def bytes(self, batch: int, itemsize: int) -> int:
        """What must move once: input, output, residual and weights."""
        inputs = self.channels * self.height * self.width
        outputs = self.out_channels * self.out_height * self.out_width
        if self.residual and self.op != "mbconv":  # mbconv's is its input
            inputs += outputs
        weights = sum(_product(shape) for shape in self.parameter_shapes().values())
        return (batch * (inputs + outputs) + weights) * itemsize

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the weights and biases, by argument name."""
        channels, outputs, size = self.channels, self.out_channels, self.kernel_size
        if self.op == "squeeze_excite":
            return _squeeze_excite_shapes(channels, self.se_channels)
        if self.op != "mbconv":
            shape = {
                "conv": (outputs, channels, size, size),
                "pointwise_conv": (outputs, channels, 1, 1),
                "depthwise_conv": (channels, 1, size, size),
            }[self.op]
            return {"weight": shape, "bias": (outputs,)}
        expanded = self.expanded_channels
        shapes: dict[str, tuple[int, ...]] = {}
        if expanded != channels:
            shapes |= {"expand_weight": (expanded, channels, 1, 1), "expand_bias": (expanded,)}
        shapes |= {"depthwise_weight": (expanded, 1, size, size), "depthwise_bias": (expanded,)}
        if self.se_channels:
            se = _squeeze_excite_shapes(expanded, self.se_channels)
            shapes |= {f"se_{name}": shape for name, shape in se.items()}
        return shapes | {"project_weight": (outputs, expanded, 1, 1), "project_bias": (outputs,)}

    def tensors(self, batch: int) -> dict[str, Tensor]:
        """Random input, residual and parameters, channels_last; products keep about their size."""
        found = {"input": torch.randn(batch, self.channels, self.height, self.width)}
        if self.residual and self.op != "mbconv":
            found["residual"] = torch.randn(
                batch, self.out_channels, self.out_height, self.out_width
            )
        found = {
            name: tensor.contiguous(memory_format=torch.channels_last)
            for name, tensor in found.items()
        }
        for name, shape in self.parameter_shapes().items():
            found[name] = torch.randn(shape) * max(_product(shape[1:]), 16) ** -0.5
        return found

    def run(self, tensors: dict[str, Tensor]) -> Tensor:
        """The op on :meth:`tensors`, by the backend in use."""
        if self.op == "mbconv":
            parameters = {name: tensor for name, tensor in tensors.items() if name != "input"}
            geometry = ek.ops.MBConvGeometry(
                stride=self.stride, residual=self.residual, activation=self.activation
            )
            return ek.ops.mbconv(tensors["input"], ek.ops.MBConvParameters(**parameters), geometry)
        options: dict[str, object] = {"activation": self.activation}
        if self.op in ("conv", "depthwise_conv"):
            options["stride"] = self.stride
        function: Callable[..., Tensor] = getattr(ek.ops, self.op)
        return function(**tensors, **options)


def read_layers(name: str) -> list[Layer]:
    """The rows of a network by name, or of a CSV file by path.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: for a bad row, naming file, line and column.
    """
    path = Path(name) if name.endswith(".csv") else DIRECTORY / f"{name}.csv"
    if not path.exists():
        known = ", ".join(sorted(file.stem for file in DIRECTORY.glob("*.csv")))
        raise FileNotFoundError(f"no shapes of {name!r}: a .csv file or one of {known} is accepted")
    return read_rows(path, Layer)


def fused(layers: Iterable[Layer]) -> list[Layer]:
    """The network with every block as one op."""
    return [layer for layer in layers if not layer.in_block]


def unfused(layers: Iterable[Layer]) -> list[Layer]:
    """The network layer by layer."""
    return [layer for layer in layers if layer.op != "mbconv"]


def write_all(directory: Path = DIRECTORY) -> None:
    """Write the file of every network in NETWORKS."""
    for name in NETWORKS:
        write_rows(directory / f"{name}.csv", layers_of(name))


def layers_of(name: str) -> list[Layer]:
    """The distinct layers of torchvision's network ``name``, in the order they run."""
    network = Network.parse(name)
    with torch.device("meta"):
        module = network.build()
        image = torch.empty(1, 3, network.resolution, network.resolution)
    inputs: dict[nn.Module, torch.Size] = {}

    def record(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        inputs[module] = arguments[0].shape

    for child in module.modules():
        child.register_forward_pre_hook(record)
    module(image)
    counts = Counter(_walk(module, inputs))
    return [replace(layer, count=count) for layer, count in counts.items()]


Inputs = dict[nn.Module, torch.Size]


def _walk(module: nn.Module, inputs: Inputs) -> Iterator[Layer]:
    if isinstance(module, (BasicBlock, Bottleneck)):
        yield from _resnet_block(module, inputs)
    elif isinstance(module, torchvision.models.ResNet):
        yield _convolution(module.conv1, inputs, "relu")
        for child in (module.layer1, module.layer2, module.layer3, module.layer4, module.fc):
            yield from _walk(child, inputs)
    elif isinstance(module, (torchvision.models.efficientnet.MBConv, InvertedResidual)):
        yield from _inverted_residual(module, inputs)
    elif isinstance(module, Conv2dNormActivation):
        yield _convolution(module[0], inputs, _activation(module))
    elif isinstance(module, SqueezeExcitation):
        channels = module.fc1.in_channels
        yield _layer("squeeze_excite", inputs[module], channels, "silu", se=module.fc1.out_channels)
    elif isinstance(module, (nn.Conv2d, nn.Linear)):
        yield _convolution(module, inputs)
    else:
        for child in module.children():
            yield from _walk(child, inputs)


def _inverted_residual(module: nn.Module, inputs: Inputs) -> Iterator[Layer]:
    body = module.conv if isinstance(module, InvertedResidual) else module.block
    parts = [replace(layer, in_block=True) for layer in _walk(body, inputs)]
    if module.use_res_connect:
        parts[-1] = replace(parts[-1], residual=True)
    depthwise = next(part for part in parts if part.op == "depthwise_conv")
    yield replace(
        depthwise,
        op="mbconv",
        in_block=False,
        channels=parts[0].channels,
        out_channels=parts[-1].out_channels,
        expanded_channels=depthwise.channels,
        se_channels=sum(part.se_channels for part in parts),
        residual=module.use_res_connect,
    )
    yield from parts


def _resnet_block(block: BasicBlock | Bottleneck, inputs: Inputs) -> Iterator[Layer]:
    convolutions = [block.conv1, block.conv2]
    if isinstance(block, Bottleneck):
        convolutions.append(block.conv3)
    for convolution in convolutions[:-1]:
        yield _convolution(convolution, inputs, "relu")
    if block.downsample is not None:
        yield _convolution(block.downsample[0], inputs)
    yield replace(_convolution(convolutions[-1], inputs, "relu"), residual=True)


def _convolution(module: nn.Conv2d | nn.Linear, inputs: Inputs, activation: str = "none") -> Layer:
    shape = inputs[module]
    if isinstance(module, nn.Linear):
        return _layer("pointwise_conv", (*shape, 1, 1), module.out_features, activation)
    size, stride = module.kernel_size[0], module.stride[0]
    op = "pointwise_conv" if size == stride == 1 else "conv"
    if module.groups > 1:
        op = "depthwise_conv"
    return _layer(op, shape, module.out_channels, activation, size, stride)


def _layer(
    op: str,
    shape: Iterable[int],
    outputs: int,
    activation: str,
    size: int = 1,
    stride: int = 1,
    se: int = 0,
) -> Layer:
    _, channels, height, width = shape
    return Layer(
        op, 1, False, channels, outputs, height, width, size, stride, 0, se, activation, False
    )


def _activation(module: nn.Sequential) -> str:
    names = {nn.SiLU: "silu", nn.ReLU6: "relu6", nn.ReLU: "relu"}
    return names.get(type(module[-1]), "none")


def _squeeze_excite_shapes(channels: int, reduced: int) -> dict[str, tuple[int, ...]]:
    return {
        "reduce_weight": (reduced, channels, 1, 1),
        "reduce_bias": (reduced,),
        "expand_weight": (channels, reduced, 1, 1),
        "expand_bias": (channels,),
    }


def _product(sizes: Iterable[int]) -> int:
    return int(torch.Size(sizes).numel())
