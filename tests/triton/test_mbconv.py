from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.shapes import read_layers
from effkernels import ops
from effkernels.ops import MBConvGeometry, MBConvParameters
from effkernels.testing import assert_matches
from effkernels.triton import DTYPES, expand_depthwise, launch, mbconv, mbconv_config
from tests.ops._cases import Arguments, Case, Draw, assert_parity, gradient_function, pairwise
from tests.triton import aot
from tests.triton.cases import broken_module, few_dtypes

AXES = {
    "batch": (2, 3),
    "channels": (3, 8, 16),
    "expanded": (0, 24, 40),
    "outputs": (16, 21),
    "reduced": (0, 4),
    "size": ((7, 6), (9, 8)),
    "kernel": (3, 5),
    "stride": (1, 2),
    "padding": ("symmetric", "same", (0, 1, 2, 0)),
    "activation": ("silu", "relu6", "hard_swish"),
    "affine": (False, True),
    "fused": (False, True),
}


def valid(case: Case) -> bool:
    return not case.fused or case.expanded > 0


def has_residual(case: Case) -> bool:
    return (
        case.stride == 1
        and case.channels == case.outputs
        and (case.padding == "same" or case.padding == "symmetric")
    )


def aot_calls() -> Iterator[Callable[[], Any]]:
    # What a block is made of is compiled for all networks by those ops' own tests.
    yield from aot.network_calls("mbconv", ("efficientnet_b0", "mobilenet_v2"))
    # every band that could be chosen: they are the same kernel
    for layer in read_layers("efficientnet_b4"):
        if layer.op == "mbconv":
            exact = (torch.float32, "tf32x3")
            for dtype, precision in [*((dtype, "tf32") for dtype in DTYPES), exact]:
                yield lambda layer=layer, dtype=dtype, precision=precision: _fused(
                    layer, dtype, precision
                )


def _fused(layer: Any, dtype: torch.dtype, precision: str) -> None:
    if layer.expanded_channels == layer.channels:
        return
    input = torch.empty(256, layer.channels, layer.height, layer.width, dtype=dtype)
    input = input.to(memory_format=torch.channels_last)
    kernel = [layer.kernel_size] * 2
    problem = mbconv_config.BlockProblem(
        256,
        layer.channels,
        layer.expanded_channels,
        layer.height,
        layer.width,
        layer.out_height,
        layer.out_width,
        layer.kernel_size,
        layer.stride,
        1,
        dtype.itemsize,
    )
    for config in mbconv_config.candidates(problem, launch.device_of(input)):
        if config.band:
            expand_depthwise.expand_depthwise(
                input,
                torch.empty(layer.expanded_channels, layer.channels, dtype=dtype),
                None,
                torch.empty(layer.expanded_channels, dtype=dtype),
                torch.empty(kernel[0] * kernel[1], layer.expanded_channels, dtype=dtype),
                None,
                torch.empty(layer.expanded_channels, dtype=dtype),
                kernel,
                [layer.stride] * 2,
                [layer.kernel_size // 2] * 4,
                [1, 1],
                layer.activation,
                layer.se_channels > 0,
                config,
                precision,
            )


def tensors_of(case: Case, draw: Draw) -> dict[str, Tensor]:
    width = case.expanded or case.channels
    found = {"input": draw.activations(case.batch, case.channels, case.size)}
    if case.expanded:
        found["expand_weight"] = draw.weight(case.expanded, case.channels, 1, 1)
    found["depthwise_weight"] = draw.weight(width, 1, case.kernel, case.kernel)
    if case.reduced:
        found["se_reduce_weight"] = draw.weight(case.reduced, width, 1, 1)
        found["se_reduce_bias"] = draw.normal(case.reduced, std=0.3)
        found["se_expand_weight"] = draw.weight(width, case.reduced, 1, 1)
        found["se_expand_bias"] = draw.normal(width, std=0.3)
    found["project_weight"] = draw.weight(case.outputs, width, 1, 1)
    for name in ("expand", "depthwise", "project"):
        if name == "expand" and not case.expanded:
            continue
        size = case.outputs if name == "project" else width
        affine = draw.affine(size, "scale+bias" if case.affine else "bias")
        found |= {f"{name}_{key}": value for key, value in affine.items()}
    return found


def run(case: Case, input: Tensor, **parameters: Tensor) -> Tensor:
    geometry = MBConvGeometry(
        case.stride, case.padding, 1, has_residual(case), case.activation, case.activation
    )
    return ops.mbconv(input, MBConvParameters(**parameters), geometry)


def force(monkeypatch: pytest.MonkeyPatch, band: int) -> None:
    """Every block with an expansion runs with this band (0: as a chain), in small pieces."""
    config = dataclasses.replace(
        mbconv_config.CHAIN, band=band, block_pixels=32, block_outputs=32, block_depth=16
    )
    monkeypatch.setattr(mbconv, "heuristic", lambda problem, device: config)


@pytest.mark.parametrize(("case", "dtype"), few_dtypes(pairwise(AXES, valid)), ids=str)
def test_matches_reference(monkeypatch, device, dtype, case):
    force(monkeypatch, 3 if case.fused else 0)

    def arguments(repetition: int) -> Arguments:
        tensors = tensors_of(case, case.draw(repetition, dtype))
        return (case,), {name: tensor.to(device) for name, tensor in tensors.items()}

    assert_parity("triton", run, arguments)


BROKEN = {
    "wrong tap": ("j * DILATION_WIDTH", "(KERNEL_WIDTH - 1 - j) * DILATION_WIDTH"),
    "no zeros around the image": ("tl.where(inside[:, None], activate", "tl.where(True, activate"),
    "a row of the next band": ("(row < band_rows) & (", "(row < band_rows - 1) & ("),
    "sums of other bands' rows": ("tl.where(wanted[:, None], result, 0.0)", "result"),
}


@pytest.mark.parametrize("mistake", BROKEN)
def test_mistakes_are_caught(monkeypatch, device, tmp_path, mistake):
    force(monkeypatch, 3)
    changes = {"outputs": 16, "kernel": 3, "stride": 1, "padding": "same", "affine": True}
    case = Case(**{**vars(GRADIENT_CASE), **changes, "expanded": 40, "size": (7, 6)})

    def check() -> None:
        tensors = tensors_of(case, Draw(3))
        tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
        assert_matches(partial(run, case), backend="triton", **tensors)

    check()
    module = broken_module(tmp_path, "expand_depthwise", *BROKEN[mistake])
    monkeypatch.setattr(mbconv, "expand_depthwise", module.expand_depthwise)
    with pytest.raises(AssertionError):
        check()


GRADIENT_CASE = Case(
    batch=3,
    channels=16,
    expanded=24,
    outputs=16,
    reduced=4,
    size=(7, 6),
    kernel=3,
    stride=1,
    padding="symmetric",
    activation="silu",
    affine=True,
)
GRADIENT_CASES = [
    GRADIENT_CASE,
    Case(**{**vars(GRADIENT_CASE), "expanded": 0, "activation": "relu6"}),
    Case(**{**vars(GRADIENT_CASE), "reduced": 0, "stride": 2, "outputs": 21, "affine": False}),
]


@pytest.mark.parametrize(("case", "dtype"), few_dtypes(GRADIENT_CASES, 1), ids=str)
def test_gradients(device, dtype, case):
    gradients = gradient_function(lambda **tensors: run(case, **tensors))

    def arguments(repetition: int) -> Arguments:
        tensors = tensors_of(case, case.draw(repetition, dtype))
        return ({name: tensor.to(device) for name, tensor in tensors.items()}, {}), {}

    assert_parity("triton", gradients, arguments, channels_last=False)


def test_empty_batch(device):
    tensors = tensors_of(GRADIENT_CASE, Draw(0))
    output = run(GRADIENT_CASE, tensors.pop("input")[:0].to(device), **tensors)
    assert output.shape == (0, 16, 7, 6)


def problem(**changes: int) -> mbconv_config.BlockProblem:
    """B0's second block at batch 256, bfloat16."""
    return mbconv_config.BlockProblem(
        **{
            "images": 256,
            "inputs": 16,
            "expanded": 96,
            "height": 112,
            "width": 112,
            "output_height": 56,
            "output_width": 56,
            "kernel": 3,
            "stride": 2,
            "dilation": 1,
            "itemsize": 2,
            **changes,
        }
    )


def test_when_the_expansion_is_fused():
    heuristic = mbconv_config.heuristic
    assert heuristic(problem(), launch.H100).band > 0
    assert heuristic(problem(images=1), launch.H100).band == 0, "2.4 MB stay in the L2"
    deep = problem(inputs=192, expanded=1152, height=7, width=7, output_height=7, output_width=7)
    assert heuristic(deep, launch.H100).band == 0, "products wait for arithmetic"
    for candidate in mbconv_config.candidates(problem(), launch.H100):
        if candidate.band:
            scratch = expand_depthwise.scratch_values([3, 3], [2, 2], [1, 1], 56, candidate)
            assert scratch * 2 * candidate.programs * launch.H100.processors < launch.H100.l2


@pytest.mark.parametrize("capability", aot.DEVICES)
def test_compiles_as_promised(capability):
    compiled, broken = aot.run("mbconv", capability)
    assert compiled > 0 and not broken, "\n".join(broken)
