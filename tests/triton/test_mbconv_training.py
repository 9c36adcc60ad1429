from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import effkernels as ek
from benchmarks.shapes import read_layers
from effkernels.testing import assert_close_to
from effkernels.triton import DTYPES
from tests.ops._blocks import assert_block_parity, block_tensors, run_block
from tests.ops._cases import Case, Draw, gradient_function, same_bits
from tests.ops.test_mbconv_training import BLOCK, assert_trains_as_one_op
from tests.triton import aot
from tests.triton.cases import few_dtypes

CASES = [
    BLOCK,
    Case(**{**vars(BLOCK), "expanded": 0, "reduced": 0, "activation": "relu6"}),
    Case(**{**vars(BLOCK), "stride": 2, "residual": False, "outputs": 21, "kernel": 5}),
    Case(**{**vars(BLOCK), "channels": 13, "outputs": 13, "expanded": 39, "activation": "relu"}),
]
KEEP = torch.tensor([0.0, 1.25, 1.5])


def aot_calls() -> Iterator[Callable[[], Any]]:
    # What a block is made of is compiled for all networks by those ops' own tests.
    for name in ("efficientnet_b0", "mobilenet_v2"):
        layers = {dataclasses.replace(n, count=1) for n in read_layers(name) if n.op == "mbconv"}
        for layer in sorted(layers, key=str):
            for dtype in DTYPES:
                yield lambda layer=layer, dtype=dtype: _train(layer, dtype)


def _train(layer: Any, dtype: torch.dtype) -> None:
    fused = layer.expanded_channels != layer.channels
    case = Case(
        batch=128,
        channels=layer.channels,
        expanded=layer.expanded_channels if fused else 0,
        outputs=layer.out_channels,
        reduced=layer.se_channels,
        size=(layer.height, layer.width),
        kernel=layer.kernel_size,
        stride=layer.stride,
        padding="symmetric",
        residual=layer.residual,
        activation=layer.activation,
    )
    aot.differentiate(lambda tensors: run_block(case, tensors), block_tensors(case, _Empty(dtype)))


class _Empty:
    """Shapes alone, in place of `Draw`."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype

    def activations(self, batch: int, channels: int, size: tuple[int, int]) -> torch.Tensor:
        input = torch.empty(batch, channels, *size, dtype=self._dtype)
        return input.to(memory_format=torch.channels_last)

    def normal(self, *shape: int, **_: float) -> torch.Tensor:
        return torch.empty(shape, dtype=self._dtype)

    weight = uniform = normal


@pytest.mark.parametrize(("case", "dtype"), few_dtypes(CASES, 1), ids=str)
@pytest.mark.parametrize("keep", [None, KEEP], ids=["all", "keep"])
def test_matches_reference(device, dtype, case, keep):
    if keep is not None and (case is not BLOCK or dtype != torch.float32):
        pytest.skip("one block shows it")
    assert_block_parity("triton", case, dtype, device, keep)


@pytest.mark.parametrize("frozen", ["input", "depthwise", "project_weight"])
def test_only_needed_gradients(device, frozen):
    """A gradient does not depend on which others are wanted."""
    tensors = block_tensors(BLOCK, Draw(5))
    everything = gradient_function(lambda **leaves: run_block(BLOCK, leaves))
    expected = dict(zip(tensors, everything(tensors, {}), strict=True))
    fixed = {n: t.to(device) for n, t in tensors.items() if n.startswith(frozen)}
    free = {n: t for n, t in tensors.items() if n not in fixed}
    some = gradient_function(lambda **leaves: run_block(BLOCK, {**leaves, **fixed}))
    for name, gradient in zip(free, some(free, {}), strict=True):
        assert same_bits(gradient, expected[name]), name


def test_module_trains_as_one_op(device):
    assert_trains_as_one_op("triton", device)


def test_bit_identical(device):
    tensors = block_tensors(BLOCK, Draw(7))
    tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
    gradients = gradient_function(lambda **leaves: run_block(BLOCK, leaves))
    assert same_bits(gradients(tensors, {}), gradients(tensors, {}))


def test_running_statistics(device):
    tensors = block_tensors(BLOCK, Draw(8))
    sizes = {"expand": 48, "depthwise": 48, "project": 16}

    def run(dtype: torch.dtype, backend: str) -> list[torch.Tensor]:
        running = {
            n: (
                torch.zeros(s, dtype=dtype, device=device),
                torch.ones(s, dtype=dtype, device=device),
            )
            for n, s in sizes.items()
        }
        with ek.use_backend(backend):
            run_block(BLOCK, {n: t.to(device, dtype) for n, t in tensors.items()}, running)
        return [tensor.cpu() for pair in running.values() for tensor in pair]

    for got, stock, due in zip(
        run(torch.float32, "triton"),
        run(torch.float32, "reference"),
        run(torch.float64, "reference"),
        strict=True,
    ):
        assert_close_to(due, got, stock)


@pytest.mark.parametrize("capability", aot.DEVICES)
def test_compiles_as_promised(capability):
    compiled, broken = aot.run("mbconv_training", capability)
    assert compiled > 0 and not broken, "\n".join(broken)
