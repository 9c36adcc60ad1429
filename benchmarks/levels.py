"""Bytes, operations and floors of a network on a GPU, by how much of it is fused.

Nothing is measured here. A network is a list of :class:`Work`, one for every kernel launch that
the level needs, and each kernel reads its inputs and writes its outputs once. BatchNorm is folded
at every level. What is left out: vectors of one value per image and channel (means, gates), and
everything that a cache would save between one kernel and the next.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tabulate import tabulate

from .gpus import Rates
from .networks import Network
from .shapes import DIRECTORY, Layer, fused, layers_of, read_layers

LEVELS = {
    "S": "every op separate",
    "A": "activation and residual fused into their convolution",
    "B": "+ SE's mean in the depthwise epilogue, its gate in the project prologue",
    "C": "+ expand and depthwise in one kernel",
}


@dataclass(frozen=True)
class Work:
    """One kernel, for one image.

    Attributes:
        op: what kind of kernel it is.
        layer: the layer that it belongs to.
        count: how often the network launches it.
        elements: values of activations, read and written.
        weights: values of weights, read once for all images of a batch.
        matrix_flops, vector_flops: on tensor cores and outside of them, two per multiply-add.
    """

    op: str
    layer: str
    count: int
    elements: int
    weights: int = 0
    matrix_flops: int = 0
    vector_flops: int = 0

    def bytes(self, batch: int, itemsize: int) -> int:
        """Of one launch for ``batch`` images."""
        return (batch * self.elements + self.weights) * itemsize

    def floor_ms(self, rates: Rates, batch: int, itemsize: int) -> float:
        """Of one launch for ``batch`` images."""
        return rates.floor_ms(
            self.bytes(batch, itemsize), batch * self.matrix_flops, batch * self.vector_flops
        )


@functools.cache
def network_layers(name: str) -> tuple[Layer, ...]:
    """The layers of a network that :meth:`Network.parse` accepts, with every block as one."""
    network = Network.parse(name)
    if network.name == "efficientnet_lite0":
        return tuple(map(_without_se, network_layers(name.replace("lite0", "b0"))))
    known = (DIRECTORY / f"{name}.csv").exists()
    return tuple(fused(read_layers(name) if known else layers_of(name)))


def _without_se(layer: Layer) -> Layer:
    """The layer of EfficientNet-Lite0 that is B0's ``layer``."""
    return replace(layer, se_channels=0, activation=layer.activation.replace("silu", "relu6"))


def works(layers: Iterable[Layer], level: str) -> list[Work]:
    """The kernels of a network at a level, in the order that they run.

    Args:
        layers: as :func:`network_layers` gives them.
        level: one of LEVELS.
    """
    layers = list(layers)
    # Whatever comes last before the classifier's single pixel is averaged.
    pooled = max(
        (index for index, la in enumerate(layers) if la.height * la.width > 1), default=None
    )
    found: list[Work] = []
    for index, layer in enumerate(layers):
        if index == pooled and layer.op != "mbconv":
            if layer.count > 1:
                found += _layer(replace(layer, count=layer.count - 1), level, layer.label)
            found += _pooled(replace(layer, count=1), level)
        elif layer.op == "mbconv":
            found += _block(layer, level)
        else:
            found += _layer(layer, level, layer.label)
    return found


def totals(layers: Iterable[Layer], level: str, batch: int, itemsize: int) -> dict[str, float]:
    """A whole network's launches, bytes (``weights``: those of them) and operations."""
    found = works(layers, level)
    return {
        "launches": sum(work.count for work in found),
        "bytes": sum(work.count * work.bytes(batch, itemsize) for work in found),
        "weights": sum(work.count * work.weights * itemsize for work in found),
        "flops": sum(w.count * batch * (w.matrix_flops + w.vector_flops) for w in found),
    }


def network_floor_ms(
    layers: Iterable[Layer], level: str, rates: Rates, batch: int, itemsize: int
) -> float:
    """The sum of the kernels' floors: launches and gaps between them are left out."""
    return sum(work.count * work.floor_ms(rates, batch, itemsize) for work in works(layers, level))


def table(
    name: str,
    rates: Rates,
    batch: int,
    itemsize: int = 2,
    per: str = "layer",
    markdown: bool = False,
) -> str:
    """Bytes an image, operations and floors of a network at all levels.

    Args:
        name: what :meth:`Network.parse` accepts.
        rates: the device's.
        batch: images.
        itemsize: bytes of a value.
        per: ``"layer"`` or ``"op"``.
        markdown: the table alone, as Markdown.
    """
    layers = network_layers(name)
    by_level = {level: works(layers, level) for level in LEVELS}
    key = {"layer": lambda work: work.layer, "op": lambda work: work.op}[per]
    names = list(dict.fromkeys(key(work) for found in by_level.values() for work in found))
    rows: list[list[Any]] = []
    for title in [*names, "all"]:
        chosen = {
            level: [work for work in found if title in (key(work), "all")]
            for level, found in by_level.items()
        }
        first = next(found for found in chosen.values() if found)
        flops = sum(w.count * (w.matrix_flops + w.vector_flops) for w in first)
        rows.append(
            [
                title,
                flops / 1e6,
                sum(w.count * w.weights for w in first) * itemsize / 1e6,
                *(_megabytes(found, itemsize) for found in chosen.values()),
                *(_floor(found, rates, batch, itemsize) for found in chosen.values()),
                *(sum(w.count for w in found) or None for found in chosen.values()),
            ]
        )
    headers = [
        *(per, "MFLOP", "weights MB"),
        *(f"{what} {level}" for what in ("MB", "ms", "launches") for level in LEVELS),
    ]
    formats = ("", ".1f", ".2f", *[".2f"] * 4, *[".3f"] * 4, *[""] * 4)
    style = "github" if markdown else "simple"
    shown = tabulate(rows, headers, tablefmt=style, floatfmt=formats, missingval="-")
    if markdown:
        return shown
    floors = [network_floor_ms(layers, level, rates, batch, itemsize) for level in LEVELS]
    speeds = [f"{level} {1e3 * batch / ms:,.0f}" for level, ms in zip(LEVELS, floors, strict=True)]
    lines = [
        f"{name}, batch {batch}, {itemsize} bytes a value. {rates.source}.",
        "MFLOP and MB of activations for one image, weights once, floors in ms for the batch.",
        "; ".join(f"{level}: {text}" for level, text in LEVELS.items()) + ".",
        f"Images/s at the floors, launches for nothing: {', '.join(speeds)}.",
    ]
    return "\n".join([*lines, "", shown])


def _megabytes(found: Sequence[Work], itemsize: int) -> float | None:
    if not found:
        return None
    return sum(work.count * work.elements for work in found) * itemsize / 1e6


def _floor(found: Sequence[Work], rates: Rates, batch: int, itemsize: int) -> float | None:
    if not found:
        return None
    return sum(work.count * work.floor_ms(rates, batch, itemsize) for work in found)


def _layer(layer: Layer, level: str, label: str, op: str = "") -> Iterator[Work]:
    """A convolution with what follows it, or SE of a tensor."""
    outputs = layer.out_channels * layer.out_height * layer.out_width
    inputs = layer.channels * layer.height * layer.width
    weights = sum(_product(shape) for shape in layer.parameter_shapes().values())
    if layer.op == "squeeze_excite":
        if level in "SA":
            yield Work("SE mean", label, layer.count, inputs)
        yield Work("SE gate", label, layer.count, 0, weights, vector_flops=layer.flops(1))
        if level in "SA":
            yield Work("SE multiply", label, layer.count, 2 * inputs)
        return
    on_tensor_cores = layer.op != "depthwise_conv"
    flops = layer.flops(1)
    fused_residual = layer.residual and level != "S"
    yield Work(
        op or layer.op,
        label,
        layer.count,
        inputs + outputs + outputs * fused_residual,
        weights,
        flops if on_tensor_cores else 0,
        0 if on_tensor_cores else flops,
    )
    if level != "S":
        return
    if layer.residual:
        yield Work("residual", label, layer.count, 3 * outputs)
    if layer.activation != "none":
        yield Work("activation", label, layer.count, 2 * outputs)


def _pooled(layer: Layer, level: str) -> Iterator[Work]:
    """A layer whose result is averaged over the image: from B on, only the means are written."""
    first, *rest = _layer(layer, level, layer.label)
    outputs = layer.out_channels * layer.out_height * layer.out_width
    if level in "SA":
        yield from (first, *rest)
        yield Work("mean", layer.label, layer.count, outputs)
    else:
        yield replace(first, elements=first.elements - outputs)


def _block(block: Layer, level: str) -> Iterator[Work]:
    """The kernels of an MBConv block."""
    parts = block_parts(block)
    expand, depthwise = parts.get("expand"), parts["depthwise"]
    if expand is not None and level == "C":
        (first,) = _layer(expand, level, "")
        (second,) = _layer(depthwise, level, "")
        hidden = 2 * block.expanded_channels * block.height * block.width
        yield Work(
            "expand + depthwise",
            f"{expand.label} + {depthwise.label}",
            block.count,
            first.elements + second.elements - hidden,
            first.weights + second.weights,
            first.matrix_flops,
            second.vector_flops,
        )
    else:
        if expand is not None:
            yield from _layer(expand, level, expand.label, "expand")
        yield from _layer(depthwise, level, depthwise.label, "depthwise")
    if "squeeze_excite" in parts:
        yield from _layer(parts["squeeze_excite"], level, parts["squeeze_excite"].label)
    yield from _layer(parts["project"], level, parts["project"].label, "project")


def block_parts(block: Layer) -> dict[str, Layer]:
    """The layers of an MBConv block: expand (if it has one), depthwise, squeeze_excite, project."""
    plain: dict[str, Any] = {
        **{"in_block": True, "kernel_size": 1, "residual": False},
        **{"expanded_channels": 0, "se_channels": 0},
    }
    wide = {"channels": block.expanded_channels, "out_channels": block.expanded_channels}
    after = {"height": block.out_height, "width": block.out_width, "stride": 1}
    changes: dict[str, dict[str, Any]] = {}
    if block.expanded_channels != block.channels:
        changes["expand"] = {
            **{"op": "pointwise_conv", "out_channels": block.expanded_channels, "stride": 1}
        }
    changes["depthwise"] = {"op": "depthwise_conv", "kernel_size": block.kernel_size, **wide}
    if block.se_channels:
        changes["squeeze_excite"] = {
            **{"op": "squeeze_excite", "se_channels": block.se_channels, **wide, **after}
        }
    changes["project"] = {
        **{"op": "pointwise_conv", "channels": block.expanded_channels, **after},
        **{"activation": "none", "residual": block.residual},
    }
    return {name: replace(block, **{**plain, **part}) for name, part in changes.items()}


def _product(shape: Iterable[int]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product
