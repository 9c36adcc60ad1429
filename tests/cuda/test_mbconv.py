"""csrc/mbconv/cuda.cu against float64, and the whole block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.shapes import read_layers
from effkernels import cuda, ops
from effkernels.cuda import mbconv, mbconv_config
from effkernels.cuda.mbconv_config import FusedConfig
from effkernels.ops import MBConvGeometry, MBConvParameters
from effkernels.testing import assert_matches
from tests.cuda import emulated
from tests.cuda.emulated import with_mistake
from tests.ops._cases import (
    Arguments,
    Case,
    Draw,
    assert_memory_kept,
    assert_parity,
    both,
    geometry_size,
    gradient_function,
    pairwise,
    same_bits,
)

pytestmark = pytest.mark.usefixtures("kernels")

AXES = {
    "dtype": cuda.DTYPES,
    "batch": (1, 2),
    "channels": (3, 8, 16, 24),
    "expanded": (24, 40, 65),
    "outputs": (16, 21),
    "reduced": (0, 4),
    "size": ((7, 6), (12, 9)),
    "kernel": (3, 5),
    "stride": (1, 2),
    "padding": ("symmetric", "same", (0, 1, 2, 0), (6, 0, 1, 7)),
    "activation": ("silu", "relu6", "hard_swish", "sigmoid"),
    "affine": (False, True),
}


def has_residual(case: Case) -> bool:
    return (
        case.stride == 1 and case.channels == case.outputs and case.padding in ("symmetric", "same")
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


@pytest.mark.parametrize("case", pairwise(AXES), ids=str)
def test_matches_reference(monkeypatch, device, case):
    monkeypatch.setattr(mbconv, "pays", lambda *_: True)
    assert_block_parity(case, device)


def assert_block_parity(case: Case, device: torch.device) -> None:
    def arguments(repetition: int) -> Arguments:
        tensors = tensors_of(case, case.draw(repetition, case.dtype))
        return (case,), {name: tensor.to(device) for name, tensor in tensors.items()}

    assert_parity("native", run, arguments)


CASE = Case(
    dtype=torch.float32,
    batch=2,
    channels=16,
    expanded=72,
    outputs=16,
    reduced=4,
    size=(13, 10),
    kernel=3,
    stride=1,
    padding="symmetric",
    activation="silu",
    affine=True,
)


CHAINS = (
    Case(**{**vars(CASE), "expanded": 0}),
    Case(**{**vars(CASE), "dtype": torch.bfloat16}),
    Case(**{**vars(CASE), "dtype": torch.float16, "kernel": 7, "stride": 2, "outputs": 21}),
)


@pytest.mark.parametrize("case", CHAINS, ids=str)
def test_chain_matches_reference(monkeypatch, device, case):
    monkeypatch.setattr(mbconv, "pays", lambda *_: False)
    assert_block_parity(case, device)


def changed(case: Case, **values: Any) -> Case:
    return Case(**{**vars(case), **values})


# The first is of one strip, the others end between strips, at the image's edge and beyond it.
TILES = ((4, 4, 1), (6, 3, 2), (5, 10, 3), (13, 7, 1), (16, 16, 2))
TILED = (
    CASE,
    changed(CASE, dtype=torch.bfloat16, kernel=5, padding=(3, 0, 0, 5)),
    changed(CASE, dtype=torch.float16, stride=2, outputs=24, padding="same", reduced=0),
    changed(CASE, dtype=torch.bfloat16, kernel=5, stride=2, expanded=40, outputs=8),
)


@contextmanager
def tiled(*config: int) -> Iterator[None]:
    """Every block is fused, in such tiles."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mbconv, "pays", lambda *_: True)
        patch.setattr(mbconv, "choose", lambda *_: FusedConfig(*config))
        yield


@pytest.mark.parametrize("case", TILED, ids=str)
@pytest.mark.parametrize("tile", TILES, ids=str)
def test_every_tile(device, case, tile):
    tensors = tensors_of(case, Draw(5, case.dtype))
    tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
    with tiled(*tile[:2], min(tile[2], -(-case.expanded // 32))):
        assert_matches(partial(run, case), **tensors)


def test_order_of_threads_changes_nothing(device):
    """Sums are added in a fixed order, whichever thread comes first."""
    case = changed(CASE, dtype=torch.bfloat16, kernel=5)
    tensors = tensors_of(case, Draw(5, case.dtype))
    tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
    with tiled(5, 10, 2):
        first = run(case, **tensors)
        for seed in (1, 2):
            if device.type == "cpu":
                emulated.configure(seed=seed)
            assert same_bits(first, run(case, **tensors))


@pytest.mark.parametrize(
    "case",
    [
        changed(CASE, dtype=torch.bfloat16),
        changed(CASE, stride=2, kernel=5, expanded=40),
        changed(CASE, channels=3, expanded=17, outputs=21, reduced=0, dtype=torch.float16),
    ],
    ids=str,
)
def test_memory_around_tensors(monkeypatch, device, case):
    tensors = tensors_of(case, Draw(5, case.dtype))
    tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
    with tiled(6, 8, 1):
        assert_memory_kept(monkeypatch, run, ((case,), tensors))


def test_gradients_are_the_references(device):
    case = changed(CASE, batch=1, expanded=24, size=(7, 6))
    gradients = gradient_function(lambda **tensors: run(case, **tensors))

    def arguments(repetition: int) -> Arguments:
        tensors = tensors_of(case, case.draw(repetition, case.dtype))
        return ({name: tensor.to(device) for name, tensor in tensors.items()}, {}), {}

    assert_parity("native", gradients, arguments, channels_last=False)


@pytest.mark.parametrize(
    ("kernel", "geometry", "words"),
    [
        ((7, 7), MBConvGeometry(), "7x7"),
        ((3, 5), MBConvGeometry(), "3x5"),
        ((3, 3), MBConvGeometry(stride=(1, 2)), "stride is [1, 2]"),
        ((3, 3), MBConvGeometry(stride=3), "stride is [3, 3]"),
        ((3, 3), MBConvGeometry(dilation=2), "dilation is [2, 2]"),
    ],
    ids=str,
)
def test_what_cannot_be_fused_is_a_chain(device, kernel, geometry, words):
    draw = Draw(3)
    parameters = MBConvParameters(
        draw.weight(24, 1, *kernel).to(device),
        draw.weight(8, 24).to(device),
        draw.weight(24, 8).to(device),
    )
    input = draw.activations(1, 8, (9, 10)).to(device)
    assert words in not_fused(input, parameters, geometry)
    assert_matches(ops.mbconv, input, parameters, geometry=geometry)


def not_fused(input: Tensor, parameters: MBConvParameters, geometry: MBConvGeometry) -> str:
    """Why the fused kernel is not for this block."""
    assert parameters.expand_weight is not None
    found = mbconv.fused_config(
        input,
        parameters.expand_weight,
        parameters.depthwise_weight,
        list(both(geometry.stride)),
        [1, 1, 1, 1],
        list(both(geometry.dilation)),
    )
    assert isinstance(found, str)
    return found


def test_shared_memory_may_be_too_small_to_fuse(device):
    parameters = MBConvParameters(
        torch.ones(24, 1, 5, 5, device=device),
        torch.ones(8, 24, device=device),
        torch.ones(24, 4000, device=device),
    )
    reason = not_fused(torch.ones(1, 4000, 9, 9, device=device), parameters, MBConvGeometry())
    assert "a tile of 4000 channels does not fit into the" in reason


@pytest.mark.parametrize("case", TILED, ids=str)
@pytest.mark.parametrize("tile", [(5, 7), (12, 8)], ids=str)
def test_shared_memory_is_as_counted(device, case, tile):
    """mbconv_config.py knows what csrc/mbconv/cuda.cu asks for."""
    if device.type != "cpu":
        pytest.skip("the emulated GPU's memory has any size")
    case = changed(case, reduced=0, batch=1)
    tensors = tensors_of(case, Draw(5, case.dtype))
    problem = problem_of(case)
    size = mbconv_config.shared_memory(problem, *tile)
    with tiled(*tile, 1):
        emulated.configure(shared_memory=max(size, product_memory(case)))
        run(case, **tensors)
        emulated.configure(shared_memory=size - 1)
        with pytest.raises(RuntimeError, match=f"{size} bytes of shared memory"):
            run(case, **tensors)


def product_memory(case: Case) -> int:
    """Bytes of shared memory of the projection's blocks: four stages of 64 + 32 rows."""
    return 4 * 64 * (64 + 32)


def problem_of(case: Case) -> mbconv_config.FusedProblem:
    size = geometry_size(changed(case, dilation=1))
    return mbconv_config.FusedProblem(
        case.batch,
        case.channels,
        case.expanded,
        *case.size,
        *size,
        case.kernel,
        case.stride,
        case.dtype.itemsize,
    )


def test_choices_fit_and_fill():
    """On an H100 and an A100 two blocks share a processor, in every early block of B0 to B4."""
    for network in ("efficientnet_b0", "efficientnet_b4"):
        for layer in read_layers(network):
            if layer.op != "mbconv" or layer.expanded_channels == layer.channels:
                continue
            for shared in (227, 163):
                problem = mbconv_config.FusedProblem(
                    128,
                    layer.channels,
                    layer.expanded_channels,
                    layer.height,
                    layer.width,
                    layer.out_height,
                    layer.out_width,
                    layer.kernel_size,
                    layer.stride,
                    2,
                )
                config = mbconv_config.choose(problem, 132, shared * 1024)
                assert config is not None
                used = mbconv_config.shared_memory(problem, *config[:2])
                assert used <= shared * 1024 // (2 if layer.channels <= 56 else 1), layer


def _check() -> None:
    for case in (TILED[0], TILED[3]):
        tensors = tensors_of(case, Draw(5, case.dtype))
        with tiled(6, 8, 1):
            assert_matches(partial(run, case), **tensors)


MISTAKES = {
    "a tap": ("taps[tap_row * kKernel + j]", "taps[tap_row * kKernel + kKernel - 1 - j]"),
    "no zeros around the image": ("at < s.input; at +=", "at < s.expanded; at +="),
    "no barrier after the expansion": ("__syncthreads();  // the expanded", "// the expanded"),
    "no barrier after the convolution": ("__syncthreads();  // this chunk's", "// this chunk's"),
    "copies under way": ("wait_copies<0>();\n    __sync", "wait_copies<1>();\n    __sync"),
    "pixels beyond the last": ("if (pixel >= seen) continue;", ""),
    "sums of what is no output": ("(r < rows && c < columns)", "r < rows"),
    "another chunk's weights": ("buffer ^= 1)", "buffer ^= 0)"),
    "no barrier of the warp": ("__syncwarp();\n#pragma", "\n#pragma"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_found(mistake):
    assert with_mistake(("mbconv/cuda.cu", *MISTAKES[mistake]), _check)


def test_check_passes(device):
    if device.type != "cpu":
        pytest.skip("for the emulated GPU")
    _check()


def test_right_kernels_pass_where_mistakes_are_found():
    assert with_mistake(None, _check) == ""
