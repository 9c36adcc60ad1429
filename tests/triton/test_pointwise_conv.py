from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from effkernels import ops
from effkernels.dispatch import requested
from effkernels.operands import Forward, Gradient
from effkernels.ops import ACTIVATIONS
from effkernels.ops._common import apply_activation
from effkernels.testing import assert_close_to
from effkernels.triton import DTYPES, interpreted, pointwise_conv_product, pointwise_conv_weight
from effkernels.triton.language import dot, kernel
from effkernels.triton.launch import H100, launch
from effkernels.triton.pointwise_conv import Product, product, weight_gradient
from effkernels.triton.pointwise_conv_config import (
    ProductConfig,
    ProductProblem,
    WeightConfig,
    product_heuristic,
    promise,
)
from effkernels.triton.pointwise_conv_operand import images_of_a_tile
from tests.ops._cases import (
    AFFINES,
    LAYOUTS,
    Arguments,
    Case,
    Draw,
    GuardedMemory,
    assert_parity,
    gradient_function,
    outputs_of,
    pairwise,
    same_bits,
)
from tests.triton import aot

# Ahead of time

# C, K, height and width of projections with a gate, compiled with their gradients
PROJECTIONS = (
    (144, 24, 56, torch.bfloat16),
    (480, 112, 14, torch.float32),
    (672, 112, 14, torch.float16),
    (1152, 192, 7, torch.bfloat16),
)


def aot_calls() -> Iterator[Callable[[], Any]]:
    yield from aot.network_calls("pointwise_conv")
    for batch in aot.BATCHES:
        for sizes in PROJECTIONS:
            yield partial(_projection, batch, *sizes)
            yield partial(_training, batch, *sizes)
        yield partial(_exact, partial(_projection, batch, 480, 112, 14, torch.float32))
        yield partial(_head, batch, torch.bfloat16)


def _image(batch: int, channels: int, size: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(
        (batch, channels, size, size), dtype=dtype, memory_format=torch.channels_last
    )


def _projection(batch: int, channels: int, outputs: int, size: int, dtype: torch.dtype) -> None:
    aot.differentiate(
        lambda tensors: ops.pointwise_conv(**tensors),
        {
            "input": _image(batch, channels, size, dtype),
            "weight": torch.empty(outputs, channels, 1, 1, dtype=dtype),
            "gate": torch.empty(batch, channels, dtype=dtype),
            "bias": torch.empty(outputs),
            "scale": torch.empty(outputs),
        },
    )


def _training(batch: int, channels: int, outputs: int, size: int, dtype: torch.dtype) -> None:
    """What an MBConv block in training makes of its convolutions: expansion and projection."""
    narrow, wide = _image(batch, outputs, size, dtype), _image(batch, channels, size, dtype)
    matrix = torch.empty(outputs, channels, dtype=dtype)
    of_wide = Forward(
        torch.empty(channels),
        torch.empty(channels),
        "silu",
        torch.empty(batch, channels, dtype=dtype),
    )
    normalized = (torch.empty(outputs),) * 3
    of_narrow = Gradient(narrow, None, None, "none", None, None, *normalized)
    product(wide, matrix, of_wide, moments=True)
    product(narrow, matrix, of_narrow, transposed=True, correlate=wide, correlate_operand=of_wide)
    weight_gradient(narrow, of_narrow, wide, of_wide)
    product(narrow, matrix.t().contiguous(), moments=True)
    vector = torch.empty(channels)
    expanded = Gradient(wide, vector, vector, "silu", None, None, vector, vector, vector)
    product(wide, matrix.t().contiguous(), expanded, transposed=True, residual=narrow)
    weight_gradient(wide, expanded, narrow, Forward())


def _head(batch: int, dtype: torch.dtype) -> None:
    input, matrix = _image(batch, 320, 7, dtype), torch.empty(1280, 320, dtype=dtype)
    product(input, matrix, bias=torch.empty(1280), activation="silu", mean=True, store=False)
    aot.differentiate(
        lambda tensors: ops.pointwise_conv(**tensors, activation="silu", return_mean=True),
        {"input": input, "weight": matrix, "bias": torch.empty(1280)},
    )


def _exact(call: Callable[[], None]) -> None:
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        call()
    finally:
        torch.backends.cudnn.allow_tf32 = before


@pytest.mark.parametrize("capability", aot.DEVICES)
def test_compiles_as_promised(capability):
    compiled, broken = aot.run("pointwise_conv", capability)
    assert compiled > 0 and not broken, "\n".join(broken)


# The op

AXES = {
    "dtype": DTYPES,
    "outputs": (8, 17, 40, 65),
    "channels": (1, 3, 16, 24, 65, 72),
    "size": ((2, 3), (7, 7), (5, 13)),
    "affine": AFFINES,
    "activation": ACTIVATIONS,
    "gate": (False, True),
    "residual": (None, "channels_last", "nchw"),
    "mean": (False, True),
}
CASES = [
    # every activation, dtype and number of channels with every other kind of thing would take
    # the interpreter minutes; what goes together goes through the same code
    Case(**{"batch": batch, "layout": layout, **vars(case)})
    for case, batch, layout in zip(
        pairwise(AXES)[::5], itertools.cycle((2, 3, 1)), itertools.cycle(LAYOUTS)
    )
]


def arguments(case: Case, dtype: torch.dtype, device: Any, repetition: int = 0) -> Arguments:
    draw = case.draw(repetition, dtype)
    n, c, k, size = case.batch, case.channels, case.outputs, case.size
    tensors = {
        "input": draw.activations(n, c, size, case.layout),
        "weight": draw.weight(k, c, 1, 1),
        **draw.affine(k, case.affine),
        "gate": draw.gate(n, c) if case.gate else None,
        "residual": draw.activations(n, k, size, case.residual) if case.residual else None,
    }
    options = {"activation": case.activation, "return_mean": case.mean}
    return (_to(tensors, device), options), {}


def _to(value: Any, device: Any) -> Any:
    """Every tensor in ``value`` on ``device``, as it is laid out."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {name: _to(item, device) for name, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_to(item, device) for item in value))
    return value


def forward(tensors: dict[str, Any], options: dict[str, Any]) -> Any:
    return ops.pointwise_conv(**tensors, **options)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_reference(device, case):
    assert_parity("triton", forward, partial(arguments, case, case.dtype, device))


GRADIENTS = [
    Case(
        **dict(zip(("batch", "channels", "outputs", "size", "activation"), sizes, strict=True)),
        layout="channels_last",
        affine=affine,
        gate=gate,
        residual="channels_last" if residual else None,
        mean=mean,
    )
    for sizes, affine, gate, residual, mean in (
        ((2, 24, 40, (5, 8), "silu"), "scale+bias", True, True, True),
        ((2, 24, 40, (5, 8), "none"), "none", False, False, False),
        ((3, 13, 17, (5, 7), "hard_swish"), "bias32", True, False, False),
        ((1, 8, 33, (3, 3), "relu6"), "scale32+bias32", False, False, False),
        ((2, 16, 8, (7, 7), "none"), "scale", True, False, True),
        ((2, 40, 16, (7, 7), "sigmoid"), "bias", False, False, True),
        ((0, 8, 8, (2, 2), "silu"), "scale+bias", True, True, True),
    )
]


# the first with everything in every dtype, the others in one
@pytest.mark.parametrize(
    ("case", "dtype"),
    [(GRADIENTS[0], dtype) for dtype in DTYPES] + list(zip(GRADIENTS[1:], DTYPES * 2, strict=True)),
    ids=str,
)
def test_gradients(device, case, dtype):
    gradients = gradient_function(ops.pointwise_conv)
    assert_parity("triton", gradients, partial(arguments, case, dtype, device), channels_last=False)


@pytest.mark.parametrize(("output", "activation"), [(0, "silu"), (1, "none"), (1, "silu")])
def test_gradients_of_one_output(device, output, activation):
    """The other's gradient is None, not zero."""
    options = {"activation": activation, "residual": None, "size": (3, 3)}
    case = Case(**{**vars(GRADIENTS[0]), **options})

    def run(tensors: dict[str, Any], options: dict[str, Any]) -> tuple[Tensor, ...]:
        return gradient_function(lambda **all: ops.pointwise_conv(**all)[output])(tensors, options)

    make = partial(arguments, case, torch.float32, device)
    assert_parity("triton", run, make, channels_last=False)


@pytest.mark.parametrize("name", ["input", "weight", "scale", "bias", "gate", "residual"])
def test_only_needed_gradients_are_computed(device, monkeypatch, name):
    case = Case(**{**vars(GRADIENTS[0]), "size": (3, 3)})
    (tensors, options), _ = arguments(case, torch.float32, device)
    everything = dict(
        zip(tensors, gradient_function(ops.pointwise_conv)(tensors, options), strict=True)
    )
    leaves = {key: value.detach().requires_grad_(key == name) for key, value in tensors.items()}
    outputs = outputs_of(ops.pointwise_conv(**leaves, **options))
    incoming = [
        torch.linspace(-1, 1.5, o.numel(), dtype=torch.float64).cos().view(o.shape).to(o)
        for o in outputs
    ]
    if name in ("input", "gate", "residual"):
        monkeypatch.setattr("effkernels.triton.pointwise_conv.weight_gradient", None)
    (alone,) = torch.autograd.grad(outputs, leaves[name], incoming)
    torch.testing.assert_close(alone, everything[name])


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_special_values_stay_in_their_pixel(device, value):
    draw = Draw(3)
    input, weight = draw.activations(2, 20, (5, 7)), draw.weight(33, 20)
    clean = ops.pointwise_conv(input.to(device), weight.to(device))
    input[1, 19, 2, 3] = value
    output = ops.pointwise_conv(input.to(device), weight.to(device))
    assert not output[1, :, 2, 3].isfinite().any()
    output[1, :, 2, 3] = clean[1, :, 2, 3]
    assert torch.equal(output, clean)


# The products that other ops make


def operand_reference(tensor: Tensor | None, operand: Forward | Gradient) -> Tensor:
    """What `operands` says, in plain PyTorch of the tensor's dtype."""

    def wide(vector: Tensor) -> Tensor:
        shape = (1, -1, 1, 1) if vector.dim() == 1 else (*vector.shape, 1, 1)
        return vector.view(shape).to(like.dtype)

    if isinstance(operand, Forward):
        assert tensor is not None
        like = value = tensor
        if operand.scale is not None:
            value = value * wide(operand.scale) + wide(operand.shift)
        value = apply_activation(value, operand.activation)
        return value if operand.gate is None else value * wide(operand.gate)
    like = operand.z if tensor is None else tensor
    t = torch.zeros_like(like) if tensor is None else tensor
    if operand.gate is not None:
        t = t * wide(operand.gate)
    if operand.offset is not None:
        t = t + wide(operand.offset)
    if operand.activation != "none":
        before = operand.z
        if operand.scale is not None:
            before = before * wide(operand.scale) + wide(operand.shift)
        with torch.enable_grad():
            leaf = before.detach().requires_grad_()
            result = apply_activation(leaf, operand.activation)
            (t,) = torch.autograd.grad(result, leaf, t)
    if operand.factor is not None:
        t = t * wide(operand.factor)
    if operand.slope is not None:
        t = t + operand.z * wide(operand.slope) + wide(operand.constant)
    return t


def product_reference(
    input: Any,
    matrix: Tensor,
    operand: Any = Forward(),  # noqa: B008
    *,
    transposed: bool = False,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
    mean: bool = False,
    moments: bool = False,
    store: bool = True,
    correlate: Tensor | None = None,
    correlate_operand: Forward = Forward(),  # noqa: B008
    gate: Tensor | None = None,
) -> Product:
    value = operand_reference(input, operand)
    weight = matrix.t() if transposed else matrix
    output = torch.nn.functional.conv2d(value, weight[:, :, None, None])
    if scale is not None:
        output = output * scale.to(output.dtype)[:, None, None]
    if bias is not None:
        output = output + bias.to(output.dtype)[:, None, None]
    if residual is not None:
        output = output + residual
    output = apply_activation(output, activation)
    statistics = correlation = None
    precise = torch.promote_types(output.dtype, torch.float32)
    if moments:
        var, average = torch.var_mean(output.to(precise), (0, 2, 3), correction=0)
        statistics = average, var
    if correlate is not None:
        other = operand_reference(correlate, correlate_operand)
        correlation = (output * other).to(precise).sum((2, 3))
    averages = output.to(precise).mean((2, 3)) if mean else None
    if gate is not None:
        output = output * gate[:, :, None, None]
    return Product(output if store else None, averages, statistics, correlation)


def run_product(options: dict[str, Any], reference: bool | None = None) -> tuple[Tensor, ...]:
    is_reference = requested() == "reference" if reference is None else reference
    result = (product_reference if is_reference else product)(**options)
    flat = [result.output, result.mean, *(result.moments or ()), result.correlation]
    return tuple(value for value in flat if value is not None)


@dataclasses.dataclass(frozen=True)
class Asked:
    """Which operand and which epilogue a product has."""

    operand: str = "plain"
    activation: str = "none"
    epilogue: str = ""  # of scale, bias, residual, mean, moments, gate, correlate, nothing
    transposed: bool = False

    def __str__(self) -> str:
        return "-".join(str(value) for value in dataclasses.astuple(self))


def draw_operand(draw: Draw, kind: str, n: int, c: int, size: tuple[int, int], device: Any) -> Any:
    """(tensor, operand) of [n, c, *size]."""
    tensor: Tensor | None = draw.activations(n, c, size)
    exact = Draw(draw.generator.initial_seed() + 1)
    affine = exact.normal(c, std=0.3, mean=1.0), exact.normal(c, std=0.3)
    gate, offset = draw.gate(n, c), exact.normal(n, c, std=0.1)
    last = exact.normal(c, mean=1.0), exact.normal(c, std=0.1), exact.normal(c, std=0.1)
    z = draw.activations(n, c, size)
    operand: Any = {
        "plain": Forward(),
        "affine": Forward(*affine),
        "gated": Forward(gate=gate),
        "forward": Forward(*affine, "silu", gate),
        "sigmoid": Forward(None, None, "sigmoid"),
        "slope": Gradient(z, activation="silu"),
        "factor": Gradient(factor=last[0]),
        "gradient": Gradient(z, *affine, "hard_swish", gate, offset, *last),
        "normalized": Gradient(z, None, None, "none", None, None, *last),
        "offset": Gradient(z, *affine, "silu", None, offset),
    }[kind]
    tensor = None if kind == "offset" else tensor
    return _to(tensor, device), _to(operand, device)


def draw_product(
    asked: Asked, sizes: tuple[int, ...], dtype: torch.dtype, device: Any, repetition: int = 0
) -> Arguments:
    n, c, k, *size = sizes
    draw = Draw(repetition, dtype)
    input, operand = draw_operand(draw, asked.operand, n, c, (size[0], size[1]), device)
    exact = Draw(1000 + repetition)
    options: dict[str, Any] = {
        "input": input,
        "matrix": draw.weight(k, c),
        "operand": operand,
        "transposed": asked.transposed,
        "activation": asked.activation,
        "mean": "mean" in asked.epilogue,
        "moments": "moments" in asked.epilogue,
        "store": "nothing" not in asked.epilogue,
    }
    if asked.transposed:
        options["matrix"] = options["matrix"].t().contiguous()
    image = draw.activations(n, k, size)
    if "scale" in asked.epilogue:
        options["scale"] = exact.normal(k, std=0.3, mean=1.0)
    if "bias" in asked.epilogue:
        options["bias"] = exact.normal(k, mean=2.0)
    if "residual" in asked.epilogue:
        options["residual"] = image
    if "correlate" in asked.epilogue:
        options["correlate"] = image
        options["correlate_operand"] = Forward(
            exact.normal(k, std=0.3, mean=1.0), exact.normal(k), "silu"
        )
    if "gate" in asked.epilogue:
        options["gate"] = draw.gate(n, k)
    return (_to(options, device),), {}


ASKED = (
    Asked("affine", "none", "moments"),
    Asked("forward", "silu", "bias mean"),
    Asked("forward", "none", "scale bias residual moments"),
    Asked("sigmoid", "relu", "residual mean"),
    Asked("slope", "none", "correlate gate", True),
    Asked("gradient", "none", "gate", True),
    Asked("normalized", "none", "", True),
    Asked("offset", "none", "correlate", True),
    Asked("factor", "none", "residual", True),
)
# N, C, K, H, W: rows around tiles of 16 and 64, images within and across tiles
SIZES = ((3, 24, 40, 5, 7), (2, 9, 17, 5, 5), (2, 72, 8, 8, 8))


@pytest.mark.parametrize(
    ("asked", "dtype", "sizes"),
    list(zip(ASKED, DTYPES * 3, (*SIZES, *SIZES[1:], *SIZES, SIZES[0]), strict=True)),
    ids=str,
)
def test_product(device, asked, dtype, sizes):
    assert_parity("triton", run_product, partial(draw_product, asked, sizes, dtype, device))


def test_nothing_is_stored(device):
    """Leaving the output out changes nothing else."""
    (options,), _ = draw_product(ASKED[1], SIZES[0], torch.float32, device)
    whole = product(**options)
    part = product(**{**options, "store": False})
    assert part.output is None and torch.equal(whole.mean, part.mean)


CONFIGS = {
    "tiles": ProductConfig(64, 32, 16, 4, 2, 255),
    "splits": ProductConfig(16, 32, 16, 4, 2, 255, splits=3),
    "more splits than steps": ProductConfig(16, 16, 64, 4, 2, 255, splits=4),
    "stream": ProductConfig(16, 32, 128, 4, 2, 255, stream=True, resident=2),
}


@contextlib.contextmanager
def configured(monkeypatch: Any, config: ProductConfig) -> Iterator[None]:
    """Products run like this, on one processor: a stream then has several tiles for a program."""
    with monkeypatch.context() as patch:
        patch.setattr(pointwise_conv_product, "product_heuristic", lambda *_: config)
        small = dataclasses.replace(H100, processors=1)
        patch.setattr(pointwise_conv_product, "device_of", lambda _: small)
        yield


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("asked", ASKED[2:5], ids=str)
def test_product_in_every_way(device, monkeypatch, config, asked):
    with configured(monkeypatch, config):
        make = partial(draw_product, asked, (3, 72, 40, 5, 5), torch.float32, device)
        assert_parity("triton", run_product, make)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_moments_far_from_zero(device, monkeypatch, config):
    """Sums of squares alone would lose three digits of the variance here."""
    (options,), _ = draw_product(ASKED[0], (3, 24, 40, 7, 7), torch.float32, device)
    options["bias"] = torch.full((40,), 30.0, device=device)
    doubles = {
        name: value.double() if isinstance(value, Tensor) else value
        for name, value in options.items()
    }
    doubles["operand"] = Forward(*(v.double() for v in options["operand"][:2]))
    due, stock = product_reference(**doubles), product_reference(**options)
    with configured(monkeypatch, config):
        got = product(**options)
    for a, b, c in zip(due.moments, got.moments, stock.moments, strict=True):
        assert_close_to(a, b, c)


@pytest.mark.parametrize("asked", [ASKED[2], Asked("gradient", "none", "mean gate")], ids=str)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_wide_offsets_are_the_same(device, monkeypatch, config, asked):
    (options,), _ = draw_product(asked, (3, 24, 40, 5, 5), torch.float32, device)
    with configured(monkeypatch, config):
        narrow = run_product(options, reference=False)
        monkeypatch.setattr(pointwise_conv_product, "is_wide", lambda *_: True)
        assert same_bits(narrow, run_product(options, reference=False))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("asked", [ASKED[2], ASKED[4]], ids=str)
def test_memory(device, monkeypatch, config, asked):
    """Everything is written, nothing beside it, and nothing that was not written is read."""
    if not interpreted():
        pytest.skip("guards are put around CPU tensors")
    (options,), _ = draw_product(asked, (3, 24, 40, 5, 5), torch.bfloat16, device)
    gradient = draw_operand(Draw(5), "gradient", 3, 24, (5, 5), device)
    input = draw_operand(Draw(6), "forward", 3, 40, (5, 5), device)
    with configured(monkeypatch, config):
        plain = run_product(options, reference=False)
        plain += weight_gradient(*gradient, *input, bias=True)
        memory = GuardedMemory()
        with monkeypatch.context() as patch:
            patch.setattr(torch, "empty", memory.empty)
            result = run_product(options, reference=False)
            result += weight_gradient(*gradient, *input, bias=True)
        assert memory.check() > 0
    assert same_bits(plain, result)


def test_images_of_a_tile():
    for pixels in (1, 2, 9, 49, 64, 127, 128, 196):
        for block in (16, 64, 128):
            touched = max(
                (start + block - 1) // pixels - start // pixels + 1
                for start in range(0, 50 * block, block)
            )
            found = images_of_a_tile(block, pixels, 1000)
            assert found >= touched or (found == 0 and touched > 2)


# The weight gradient


def run_weight(options: dict[str, Any]) -> tuple[Tensor, ...]:
    if requested() == "reference":
        gradient = operand_reference(options["upstream"], options["gradient"])
        value = operand_reference(options["input"], options["forward"])
        precise = torch.promote_types(value.dtype, torch.float32)
        rows = gradient.permute(1, 0, 2, 3).flatten(1)
        matrix = rows @ value.permute(0, 2, 3, 1).flatten(0, 2)
        return matrix.to(precise), rows.to(precise).sum(1)
    matrix, sums = weight_gradient(**options, bias=True)
    assert sums is not None
    assert same_bits(weight_gradient(**options)[0], matrix)
    return matrix, sums


def draw_weight(
    kinds: tuple[str, str],
    sizes: tuple[int, ...],
    dtype: torch.dtype,
    device: Any,
    repetition: int = 0,
) -> Arguments:
    n, c, k, *size = sizes
    draw = Draw(repetition, dtype)
    upstream, gradient = draw_operand(draw, kinds[0], n, k, (size[0], size[1]), device)
    input, forward = draw_operand(draw, kinds[1], n, c, (size[0], size[1]), device)
    if kinds[0] == "plain":
        gradient = Gradient()
    options = {"upstream": upstream, "gradient": gradient, "input": input, "forward": forward}
    return (options,), {}


@pytest.mark.parametrize(
    ("kinds", "dtype", "sizes"),
    [
        (("plain", "plain"), torch.bfloat16, SIZES[1]),
        (("gradient", "forward"), torch.float32, SIZES[0]),
        (("normalized", "gated"), torch.float16, SIZES[2]),
        (("offset", "plain"), torch.float32, SIZES[1]),
        (("plain", "affine"), torch.bfloat16, SIZES[2]),
    ],
    ids=str,
)
def test_weight_gradient(device, monkeypatch, kinds, dtype, sizes):
    make = partial(draw_weight, kinds, sizes, dtype, device)
    assert_parity("triton", run_weight, make)
    if dtype != torch.float32:
        return
    # three splits, the last of them short, 64-bit offsets
    config = WeightConfig(16, 32, 16, 3, 4, 2, 255)
    monkeypatch.setattr(pointwise_conv_weight, "weight_heuristic", lambda *_: config)
    monkeypatch.setattr(pointwise_conv_weight, "is_wide", lambda *_: True)
    assert_parity("triton", run_weight, make)


# Choices


def test_the_choice_fills_the_device():
    """No layer that could be shared out is left to few processors."""
    for rows, channels, outputs in ((49, 1152, 192), (1, 1280, 1000), (196, 672, 112)):
        problem = ProductProblem(
            rows, rows, channels, outputs, 2, "plain", "none", False, False, False, False, True
        )
        config = product_heuristic(problem, H100)
        programs = -(-rows // config.block_rows) * -(-outputs // config.block_outputs)
        assert programs * config.splits >= 48, config


def test_is_the_same_every_time(device):
    (options,), _ = draw_product(
        Asked("gradient", "none", "correlate gate", True), (3, 72, 40, 7, 7), torch.float32, device
    )
    (weight,), _ = draw_weight(("gradient", "forward"), SIZES[0], torch.float32, device)
    assert same_bits(run_product(options, reference=False), run_product(options, reference=False))
    assert same_bits(run_weight(weight), run_weight(weight))


# What the nets must catch


@kernel
def _wrong_tail(output_ptr, input_ptr, matrix_ptr, rows, channels, outputs, BLOCK: tl.constexpr):
    """A product that goes over whole steps of channels and forgets the rest."""
    r = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    k = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK, BLOCK], tl.float32)
    for first in range(0, channels // BLOCK * BLOCK, BLOCK):
        c = first + tl.arange(0, BLOCK)
        value = tl.load(
            input_ptr + r[:, None] * channels + c[None, :], mask=(r < rows)[:, None], other=0.0
        )
        matrix = tl.load(
            matrix_ptr + c[:, None] + k[None, :] * channels, mask=(k < outputs)[None, :], other=0.0
        )
        total = dot(value, matrix, total, "tf32x3")
    inside = (r < rows)[:, None] & (k < outputs)[None, :]
    tl.store(output_ptr + r[:, None] * outputs + k[None, :], total, mask=inside)


@pytest.mark.parametrize("channels", [32, 40])
def test_parity_shows_a_wrong_tail(device, channels):
    draw = Draw(0)
    input, matrix = draw.normal(50, channels).to(device), draw.weight(16, channels).to(device)
    output = torch.empty(50, 16, device=device)
    launch(_wrong_tail, (triton.cdiv(50, 16),), output, input, matrix, 50, channels, 16, BLOCK=16)
    due, stock = input.double() @ matrix.double().t(), input @ matrix.t()
    with pytest.raises(AssertionError) if channels % 16 else contextlib.nullcontext():
        assert_close_to(due, output, stock)


SPOILT: dict[str, Callable[[aot.Launch], aot.Launch]] = {
    "nothing": lambda good: good,
    "no load of 16 bytes": lambda good: dataclasses.replace(
        good, constants=tuple((dict(good.constants) | {"VECTOR": 1}).items())
    ),
    # an address for each of the elements then, more than there are registers
    "of local memory": lambda good: dataclasses.replace(
        good, constants=tuple((dict(good.constants) | {"OUTPUT_VECTOR": 1, "VECTOR": 1}).items())
    ),
    "warps fit": lambda good: dataclasses.replace(good, num_stages=4),
}


def broken_launches() -> None:
    """Print what the static check says of launches that were spoilt."""
    matrix = torch.empty(1152, 192, dtype=torch.bfloat16, device="meta")
    input = _image(256, 192, 7, torch.bfloat16).to("meta")
    (good,) = aot.launches([lambda: product(input, matrix)], H100)
    for name, spoil in SPOILT.items():
        wrong = aot.broken_promises(spoil(good), promise(good), 90)
        print(json.dumps({"spoilt": name, "wrong": wrong}))


def test_static_check_shows_spoilt_launches():
    result = subprocess.run(
        [sys.executable, "-c", f"from {__name__} import broken_launches as b; b()"],
        capture_output=True,
        text=True,
        env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"},
        cwd=Path(__file__).parents[2],
    )
    assert result.returncode == 0, result.stderr
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(lines) == len(SPOILT)
    for line in lines:
        if line["spoilt"] == "nothing":
            assert not line["wrong"]
        else:
            assert any(line["spoilt"] in wrong for wrong in line["wrong"]), line
