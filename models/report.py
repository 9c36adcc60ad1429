"""Published tables of the family, counted anew: ``python -m effkernels.models.report``.

Writes ``docs/tables.md``. Every figure stands beside its source's; where the two differ by more
than rounding, a remark says why. ``--check`` verifies that, and that the file is what this makes.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from dataclasses import astuple, dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torchvision.models import get_model_weights

from effkernels.modules import MBConv

from . import efficientnet, registry
from .budget import ScaledNetwork
from .scaling import CompoundScaling
from .summary import BYTES, summary

OUT = Path(__file__).resolve().parents[1] / "docs" / "tables.md"
PAPER = "Tan & Le, 2019"
_PAPER_SCALING = CompoundScaling()


@dataclass(frozen=True)
class Figure:
    """A published number and ours, in the source's unit.

    Args:
        what: which number.
        ours: as counted here.
        source: as printed there; its last digit tells how it was rounded.
        remark: why they differ; empty if they do not.
    """

    what: str
    ours: float
    source: str
    remark: str = ""

    @property
    def agrees(self) -> bool:
        """Ours rounds to what the source prints."""
        _, _, decimals = self.source.partition(".")
        half = 0.5 * 10.0 ** -len(decimals)
        return abs(self.ours - float(self.source)) <= half * (1 + 1e-9)

    @property
    def problem(self) -> str | None:
        """What is wrong with it: an unexplained difference, or a remark on none."""
        if self.agrees and self.remark:
            return f"{self.what}: {self.ours:.6g} agrees with {self.source}, yet has a remark"
        if not self.agrees and not self.remark:
            return f"{self.what}: {self.ours:.6g} differs from {self.source} without a remark"
        return None

    def cell(self, digits: int = 2) -> str:
        """Ours, and the source's in bold where it differs."""
        shown = self.source if self.agrees else f"**{self.source}**"
        return f"{self.ours:,.{digits}f} / {shown}"


class Section(NamedTuple):
    """A part of the page."""

    lines: list[str]
    figures: list[Figure]


def _markdown(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return [*lines, *("| " + " | ".join(map(str, row)) + " |" for row in rows)]


def _remarks(figures: Iterable[Figure]) -> list[str]:
    lines = [f"- {figure.what}: {figure.remark}" for figure in figures if figure.remark]
    return ["", *lines] if lines else []


def _on_meta(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return build()


# --- EfficientNet-B0's stages


class _B0Stage(NamedTuple):
    operator: str
    resolution: int  # of the input
    channels: int  # of the output
    layers: int


# Tan & Le, 2019, table 1
_B0_SOURCE = (
    _B0Stage("Conv3x3", 224, 32, 1),
    _B0Stage("MBConv1, k3x3", 112, 16, 1),
    _B0Stage("MBConv6, k3x3", 112, 24, 2),
    _B0Stage("MBConv6, k5x5", 56, 40, 2),
    _B0Stage("MBConv6, k3x3", 28, 80, 3),
    _B0Stage("MBConv6, k5x5", 14, 112, 3),
    _B0Stage("MBConv6, k5x5", 14, 192, 4),
    _B0Stage("MBConv6, k3x3", 7, 320, 1),
    _B0Stage("Conv1x1 & Pooling & FC", 7, 1280, 1),
)


def b0_stages() -> Section:
    """The stages of the network as it is built and run, not of the table it is built from."""
    model = _on_meta(lambda: registry.create_model("efficientnet_b0"))
    assert isinstance(model, efficientnet.EfficientNet)
    stages = [_conv_stage(model.conv_stem)]
    stages += [_block_stage(stage) for stage in model.blocks.children()]
    stages.append(_conv_stage(model.conv_head, " & Pooling & FC"))
    sizes: list[int] = []

    def note(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        sizes.append(inputs[0].shape[2])

    for module in (model.conv_stem, *model.blocks.children(), model.conv_head):
        module.register_forward_pre_hook(note)
    resolution = model.data_config.resolution
    with torch.no_grad():
        model.eval()(torch.empty(1, 3, resolution, resolution, device="meta"))
    rows, figures = [], []
    pairs = zip(stages, sizes, _B0_SOURCE, strict=True)
    for number, (stage, size, source) in enumerate(pairs, 1):
        ours = stage._replace(resolution=size)
        cells = [
            str(value) if value == wanted else f"{value} / **{wanted}**"
            for value, wanted in zip(ours, source, strict=True)
        ]
        rows.append([number, *cells])
        name = f"EfficientNet-B0, stage {number}"
        figures.append(Figure(f"{name}, operator", ours.operator == source.operator, "1"))
        for column in ("resolution", "channels", "layers"):
            wanted = str(getattr(source, column))
            figures.append(Figure(f"{name}, {column}", getattr(ours, column), wanted))
    head = ["stage", "operator", "input resolution", "output channels", "layers"]
    text = (
        f"Source: {PAPER}, table 1. Operators, sizes and channels are read off the network while "
        "it runs; a second figure, in bold, would be the source's where it differs."
    )
    return Section(["## EfficientNet-B0", "", text, "", *_markdown(head, rows)], figures)


def _conv_stage(conv: nn.Conv2d, more: str = "") -> _B0Stage:
    rows, columns = conv.kernel_size
    return _B0Stage(f"Conv{rows}x{columns}{more}", 0, conv.out_channels, 1)


def _block_stage(stage: nn.Module) -> _B0Stage:
    blocks = [block for block in stage.children() if isinstance(block, MBConv)]
    first = blocks[0]
    depthwise, project = _depthwise_and_project(first)
    ratio = depthwise.in_channels // _in_channels(first)
    rows, columns = depthwise.kernel_size
    return _B0Stage(f"MBConv{ratio}, k{rows}x{columns}", 0, project.out_channels, len(blocks))


def _convolutions(block: nn.Module) -> list[nn.Conv2d]:
    """A block's convolutions without those of squeeze-and-excitation."""
    return [module for module in block.children() if isinstance(module, nn.Conv2d)]


def _in_channels(block: nn.Module) -> int:
    return _convolutions(block)[0].in_channels


def _depthwise_and_project(block: nn.Module) -> tuple[nn.Conv2d, nn.Conv2d]:
    convolutions = _convolutions(block)
    depthwise = next(conv for conv in convolutions if conv.groups > 1)
    return depthwise, convolutions[convolutions.index(depthwise) + 1]


# --- B0 to B7


class _FamilySource(NamedTuple):
    resolution: str
    parameters: str  # M
    flops: str  # G, which are multiply-adds


# Tan & Le, 2019, table 2; resolutions are those of the authors' released code
_FAMILY_SOURCE = {
    "efficientnet_b0": _FamilySource("224", "5.3", "0.39"),
    "efficientnet_b1": _FamilySource("240", "7.8", "0.70"),
    "efficientnet_b2": _FamilySource("260", "9.2", "1.0"),
    "efficientnet_b3": _FamilySource("300", "12", "1.8"),
    "efficientnet_b4": _FamilySource("380", "19", "4.2"),
    "efficientnet_b5": _FamilySource("456", "30", "9.9"),
    "efficientnet_b6": _FamilySource("528", "43", "19"),
    "efficientnet_b7": _FamilySource("600", "66", "37"),
}


def family() -> Section:
    """B0 to B7."""
    rows, figures = [], []
    for name, source in _FAMILY_SOURCE.items():
        coefficients = efficientnet.COEFFICIENTS[name]
        model = _on_meta(partial(registry.create_model, name))
        assert isinstance(model, efficientnet.EfficientNet)
        resolution = model.data_config.resolution
        found = summary(model, (3, resolution, resolution))
        peer = next(iter(get_model_weights(name)))
        peer_side = peer.transforms.keywords["crop_size"]
        peer_macs, peer_parameters = peer.meta["_ops"], peer.meta["num_params"] / 1e6
        label = f"B{name[-1]}"
        parameters, macs = found.parameters / 1e6, found.macs / 1e9
        mine = [
            Figure(f"{label}, resolution", resolution, source.resolution),
            _explained(
                Figure(f"{label}, parameters (M)", parameters, source.parameters),
                f"torchvision's network has {peer_parameters:.3f} M, too, with the shapes of the "
                f"released code; the paper prints {source.parameters}",
                parameters,
                peer_parameters,
            ),
            _explained(
                Figure(f"{label}, multiply-adds (G)", macs, source.flops),
                f"torchvision counts {peer_macs:.3f} G at {peer_side}², too; the paper prints "
                f"{source.flops} and does not say how it counts",
                macs if peer_side == resolution else math.nan,
                peer_macs,
            ),
        ]
        figures += mine
        phi = [
            math.log(coefficients.depth, _PAPER_SCALING.alpha),
            math.log(coefficients.width, _PAPER_SCALING.beta),
            math.log(resolution / 224, _PAPER_SCALING.gamma),
        ]
        rows.append(
            [
                label,
                mine[0].cell(0),
                f"{coefficients.depth:g}",
                f"{coefficients.width:g}",
                mine[1].cell(),
                f"{peer_parameters:.2f}",
                mine[2].cell(3),
                f"{peer_macs:.3f}" + ("" if peer_side == resolution else f" (at {peer_side}²)"),
                f"{2 * macs:.3f}",
                ", ".join(f"{value:.1f}" for value in phi),
            ]
        )
    head = ["", "resolution", "depth", "width", "parameters, M", "torchvision's"]
    head += ["multiply-adds, G", "torchvision's", "FLOPs, G", "φ of depth, width, resolution"]
    text = [
        f"Source: {PAPER}, table 2, and the coefficients of the authors' released code. Ours / "
        "the source's, in bold where it differs. **What the paper calls FLOPs are "
        "multiply-adds**; FLOPs here are two per multiply-add. torchvision's figures are those "
        "that it publishes with its weights (`num_params`, `_ops`).",
        "",
        "The last column is the φ at which 1.2^φ, 1.1^φ and 1.15^φ would give a row's "
        "coefficients: the released networks follow the rule in spirit, with coefficients that "
        "were rounded and adjusted. `create_scaled` follows it to the letter.",
    ]
    lines = ["## EfficientNet B0 to B7", "", *text, "", *_markdown(head, rows)]
    return Section([*lines, *_remarks(figures)], figures)


def _explained(figure: Figure, remark: str, ours: float, peer: float) -> Figure:
    """``figure`` with the remark that a second count gives the same, if it is needed and true."""
    if figure.agrees or not math.isclose(ours, peer, rel_tol=1e-3):
        return figure
    return replace(figure, remark=remark)


# --- depthwise separable convolutions

_SAVING_SOURCE = "75"  # per cent, of any layer


def separable() -> Section:
    """What each depthwise separable convolution of B0 saves against a dense one."""
    model = _on_meta(lambda: registry.create_model("efficientnet_b0"))
    layers = {layer.name: layer for layer in summary(model).layers}
    rows, savings = [], []
    dense_total = separable_total = 0
    blocks = [
        (name, module) for name, module in model.named_modules() if isinstance(module, MBConv)
    ]
    for name, block in blocks:
        depthwise, project = _depthwise_and_project(block)
        pair = [
            layers[f"{name}.{child}"]
            for child, module in block.named_children()
            if module is depthwise or module is project
        ]
        separable = sum(layer.macs for layer in pair)
        kernel = depthwise.kernel_size[0]
        _, height, width = pair[-1].output_shape
        channels = project.out_channels
        dense = kernel**2 * depthwise.in_channels * channels * height * width
        saving = 100 * (1 - separable / dense)
        dense_total, separable_total = dense_total + dense, separable_total + separable
        savings.append(saving)
        rows.append(
            [
                name,
                f"{kernel}×{kernel}, {depthwise.in_channels} → {channels}",
                f"{height}×{width}",
                f"{dense / 1e6:,.1f}",
                f"{separable / 1e6:,.1f}",
                f"{saving:.1f} %",
                f"{100 * (1 - 1 / channels - 1 / kernel**2):.1f} %",
            ]
        )
    remark = (
        "multiply-adds of k×k depthwise and 1×1 to K channels are 1/K + 1/k² of a dense "
        "convolution's. A quarter of them would be a 2×2 kernel with very many channels, or 3×3 "
        "with 7 output channels; with a real layer's, 3×3 saves up to 89 % and 5×5 up to 96 %"
    )
    figures = [
        Figure("saving of the layer that saves least (%)", min(savings), _SAVING_SOURCE, remark),
        Figure("saving of the layer that saves most (%)", max(savings), _SAVING_SOURCE, remark),
    ]
    total = 100 * (1 - separable_total / dense_total)
    text = [
        "A depthwise convolution and the 1×1 behind it, in every block of EfficientNet-B0 at 224², "
        "against one dense convolution with the same kernel, input, output and stride. "
        f"A source says that {_SAVING_SOURCE} % are saved.",
    ]
    head = ["block", "kernel, channels", "output", "dense, M multiply-adds", "separable, M"]
    head += ["saved", "1 − 1/K − 1/k²"]
    lines = ["## What a depthwise separable convolution saves", "", *text, ""]
    lines += [*_markdown(head, rows), ""]
    lines += [
        f"All of them together: {dense_total / 1e9:.2f} G dense, {separable_total / 1e9:.3f} G "
        f"separable, {total:.1f} % saved. The source's {_SAVING_SOURCE} % is right for no layer: "
        f"{remark}."
    ]
    return Section(lines, figures)


# --- ResNet-18

# He et al., 2016, table 1: output sizes at 224², and FLOPs, which are multiply-adds
_RESNET_SIZES = {"conv1": 112, "layer1": 56, "layer2": 28, "layer3": 14, "layer4": 7}
_RESNET_MACS = "1.8"
_RESNET_PARAMETERS, _RESNET_MB = "11.18", "106"  # with 10 classes


def resnet18() -> Section:
    """Layers of ResNet-18 with 10 classes at 224²."""
    model = _on_meta(lambda: registry.create_model("resnet18", num_classes=10))
    found = summary(model)
    figures = []
    for layer in found.layers:
        stage = layer.name.partition(".")[0]
        if layer.type in ("Conv2d", "BasicBlock"):
            wanted = str(_RESNET_SIZES[stage])
            figures.append(
                Figure(f"ResNet-18, size of {layer.name}", layer.output_shape[1], wanted)
            )
    outputs = sum(layer.activation_bytes for layer in found.layers)
    parts = [3 * 224 * 224 * BYTES, 2 * outputs, found.parameters * BYTES]
    image, passes, parameters = (size / 2**20 for size in parts)
    figures += [
        Figure("ResNet-18, 10 classes, parameters (M)", found.parameters / 1e6, _RESNET_PARAMETERS),
        Figure("ResNet-18, 10 classes, MB", found.total_bytes / 2**20, _RESNET_MB),
        Figure("ResNet-18, 10 classes, multiply-adds (G)", found.macs / 1e9, _RESNET_MACS),
    ]
    *_, count, size, macs = figures
    rows = [
        [
            layer.name,
            layer.type,
            "×".join(map(str, layer.output_shape)),
            f"{layer.parameters:,}" if layer.parameters else "",
            f"{layer.macs / 1e6:,.1f}" if layer.macs else "",
        ]
        for layer in found.layers
        if layer.type in ("Conv2d", "MaxPool2d", "Linear")
    ]
    text = [
        "Source: He et al., 2016, table 1, for the sizes of feature maps and the multiply-adds; a "
        "lab's printout for parameters and MB, with 10 classes.",
        "",
        f"Parameters {count.cell()} M, multiply-adds {macs.cell(3)} G, {size.cell()} MB.",
        "",
        "The MB are what torchsummary calls the estimated total size, in units of 2²⁰ bytes: input "
        f"{image:.2f}, forward and backward pass {passes:.2f} (every row's output, twice), "
        f"parameters {parameters:.2f}, in float32, for one image. Nothing that runs needs just "
        "that: inference keeps only what is still read, training does not save every output but "
        "adds gradients of parameters and the optimizer's state. `effkernels scale` predicts both.",
        "",
        "BatchNorms and activations, left out here, have the shape of the row above them.",
    ]
    head = ["layer", "type", "output", "parameters", "M multiply-adds"]
    return Section(["## ResNet-18 at 224²", "", *text, "", *_markdown(head, rows)], figures)


# --- compound-scaled ResNet-18 on CIFAR

# A lab's table: input, "B" FLOPs
_CIFAR_SOURCE = {0: ("32", "1.8"), 1: ("36", "2.4"), 2: ("48", "3.1")}
_SIDES = range(32, 321, 4)


def scaled_resnet18() -> Section:
    """φ = 0, 1, 2 with the CIFAR stem, and what the printed figures could be."""
    rows, figures, search = [], [], []
    for phi, (side, printed) in _CIFAR_SOURCE.items():
        network = ScaledNetwork("resnet18", phi, options={"stem": "cifar", "num_classes": 10})
        resolution = Figure(f"φ = {phi}, resolution", network.resolution, side)
        if not resolution.agrees:
            exact = 32 * network.multipliers.resolution
            remark = (
                f"32 · 1.15^{phi} is {exact:.1f}, which rounds to {network.resolution}; the "
                f"source's {side} is 32 · {int(side) / 32:g}"
            )
            resolution = replace(resolution, remark=remark)
        macs = _resnet18_macs("cifar", phi, int(side))
        remark = (
            f"at {side}² this network needs {macs:.3f} G multiply-adds or {2 * macs:.3f} G FLOPs; "
            f"more on {printed} is below"
        )
        figures += [resolution, Figure(f"φ = {phi}, multiply-adds (G)", macs, printed, remark)]
        rows.append(
            [
                phi,
                "-".join(map(str, network.blocks)),
                "-".join(map(str, network.channels)),
                resolution.cell(0),
                f"{network.parameters / 1e6:.2f}",
                f"{network.macs / 1e9:.3f}",
                f"{network.flops / 1e9:.3f}",
                f"{macs:.3f}",
                f"{2 * macs:.3f}",
                f"**{printed}**",
            ]
        )
        for stem, kind in (("imagenet", "7×7, stride 2, pooling"), ("cifar", "3×3, stride 1")):
            cells = [_sides(stem, of, printed, flops) for flops in (1, 2) for of in (0, phi)]
            if phi == 0:
                cells = [cells[0], "", cells[2], ""]
            search.append([printed, kind, *cells])
    head = ["φ", "blocks", "channels", "resolution", "parameters, M", "multiply-adds, G"]
    head += ["FLOPs, G", "multiply-adds at the source's resolution, G", "FLOPs there, G"]
    search_head = ['the source\'s "B"', "stem", "as multiply-adds: ResNet-18 itself"]
    search_head += ["scaled to that φ", "as FLOPs: ResNet-18 itself", "scaled to that φ"]
    itself = {side: f"{_resnet18_macs('imagenet', 0, side):.3f}" for side in (224, 256, 288, 292)}
    alpha, beta, gamma = astuple(_PAPER_SCALING)
    by_resolution, by_both = (
        ", ".join(f"{1.8 * factor**phi:.2f}" for phi in _CIFAR_SOURCE)
        for factor in (gamma**2, alpha * beta)
    )
    lines = [
        "## Compound-scaled ResNet-18 on CIFAR",
        "",
        "Depth by blocks per stage, width by channels, resolution by the input; 3×3 stem of stride "
        "1, 10 classes, the paper's α, β and γ. Resolution: ours / the source's.",
        "",
        *_markdown([*head, 'the source\'s "B"'], rows),
        *_remarks(figures),
        "",
        "Sides of square inputs, multiples of 4 from 32 to 320, with which a stem gives the "
        "source's figures:",
        "",
        *_markdown(search_head, search),
        "",
        f"1.8 is ResNet-18 with the ImageNet stem at 224² ({itself[224]} G multiply-adds), not at "
        f"32². 2.4 is the same network, neither deeper nor wider, at 256² ({itself[256]} G); "
        "224 · 1.15 is 257.6. Really scaled to φ = 1 it would need "
        f"{_resnet18_macs('imagenet', 1, 256):.3f} G there. 3.1 is none of these networks at any "
        f"such input: ResNet-18 itself has {itself[288]} G at 288² and {itself[292]} G at 292². "
        "But two formulas give all three: 1.8 · γ^(2φ), growth by resolution alone, is "
        f"{by_resolution}, and 1.8 · (α · β)^φ is {by_both}. The source seems to have multiplied a "
        "published figure instead of counting its networks.",
    ]
    return Section(lines, figures)


@cache
def _resnet18(stem: str, phi: int) -> nn.Module:
    return _on_meta(lambda: registry.create_scaled("resnet18", phi, stem=stem, num_classes=10))


@cache
def _resnet18_macs(stem: str, phi: int, side: int) -> float:
    """G multiply-adds of the network scaled in depth and width, with an input of this side."""
    return summary(_resnet18(stem, phi), (3, side, side)).macs / 1e9


def _sides(stem: str, phi: int, printed: str, flops: int) -> str:
    """Which inputs give ``printed`` G, counting ``flops`` for each multiply-add."""

    def count(side: int) -> float:
        return flops * _resnet18_macs(stem, phi, side)

    first = bisect_left(_SIDES, float(printed) - 0.1, key=count)  # it grows with the side
    found = []
    for side in _SIDES[first:]:
        if count(side) > float(printed) + 0.1:
            break
        if Figure("", count(side), printed).agrees:
            found.append(f"{side}²")
    return ", ".join(found) or "none"


# --- the page

SECTIONS: tuple[Callable[[], Section], ...] = (
    b0_stages,
    family,
    separable,
    resnet18,
    scaled_resnet18,
)


def report() -> tuple[str, list[Figure]]:
    """The page, and every figure of it that has a source."""
    sections = [section() for section in SECTIONS]
    head = [
        "# Published tables, counted anew",
        "",
        "Made by `python -m effkernels.models.report`; `--check` verifies that every figure is "
        "within rounding of its source, or that a remark says why not.",
    ]
    parts = [head, *(section.lines for section in sections)]
    page = "\n\n".join("\n".join(lines) for lines in parts) + "\n"
    return page, [figure for section in sections for figure in section.figures]


def check(page: str, figures: Iterable[Figure], path: Path) -> list[str]:
    """What is wrong: figures without a remark that they need, a file that is not ``page``."""
    problems = [figure.problem for figure in figures if figure.problem is not None]
    if not path.is_file():
        problems.append(f"{path} is missing: python -m effkernels.models.report writes it")
    elif path.read_text() != page:
        problems.append(f"{path} is out of date: python -m effkernels.models.report writes it")
    return problems


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit status, 1 if the check fails and 2 for a bad argument."""
    parser = argparse.ArgumentParser(
        prog="python -m effkernels.models.report", description="Published tables, counted anew."
    )
    parser.add_argument("--check", action="store_true", help="verify, write nothing")
    parser.add_argument("--out", type=Path, default=OUT, help="file (default: docs/tables.md)")
    parsed = parser.parse_args(arguments)
    if not parsed.out.absolute().parent.is_dir():
        print(f"--out: {str(parsed.out.parent)!r} is no folder", file=sys.stderr)
        return 2
    page, figures = report()
    if not parsed.check:
        partial = parsed.out.with_name(parsed.out.name + ".part")
        partial.write_text(page)
        os.replace(partial, parsed.out)
    problems = check(page, figures, parsed.out)
    for problem in problems:
        print(problem, file=sys.stderr)
    differ = sum(not figure.agrees for figure in figures)
    print(
        f"{len(figures)} figures have a source, {differ} differ from it, {len(problems)} problems"
    )
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
