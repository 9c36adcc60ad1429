from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
import triton.language as tl
from torch import Tensor

from benchmarks.shapes import NETWORKS, read_layers
from effkernels import ops
from effkernels.operands import Forward, Gradient
from effkernels.ops import ACTIVATIONS
from effkernels.ops._common import apply_activation
from effkernels.testing import assert_close_to, assert_matches, relative_error
from effkernels.triton import DTYPES, batch_norm_act_passes, batch_norm_act_sums, interpreted
from effkernels.triton import batch_norm_act as kernels
from effkernels.triton.batch_norm_act import Normalization
from effkernels.triton.batch_norm_act_config import PassConfig, SumConfig
from effkernels.triton.language import kernel
from effkernels.triton.launch import launch
from effkernels.triton.promises import Promise
from tests.ops._cases import (
    Arguments,
    Case,
    Draw,
    GuardedMemory,
    assert_parity,
    gradient_function,
    pairwise,
    same_bits,
)
from tests.ops.test_batch_norm_act import arguments, has_statistics
from tests.triton import aot

AXES = {
    "channels": (24, 5, 72, 1, 16),
    "size": ((7, 7), (3, 5), (4, 17)),
    "batch": (2, 1, 0),
    "affine": ("weight32+bias32", "none", "weight", "bias", "weight+bias"),
    "statistics32": (True, False),
    "training": (True, False),
    "activation": ACTIVATIONS,
    "layout": ("channels_last", "nchw"),
    "residual": (None, "channels_last", "expanded"),
    # What runs: one kernel for all, the ones for large tensors, these with tiles of a few rows.
    "way": ("small", "large", "tiles"),
    "dtype": DTYPES,
}


def go(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if way == "small":
        return
    monkeypatch.setattr(kernels, "small", lambda *_: None)
    if way == "tiles":
        monkeypatch.setattr(
            batch_norm_act_sums, "sum_heuristic", lambda *_: SumConfig(3, 2, 4, 16, 1)
        )
        monkeypatch.setattr(
            batch_norm_act_passes, "pass_heuristic", lambda *_: PassConfig(8, 16, 1)
        )


def differentiable(case: Case, repetition: int) -> Arguments:
    """`arguments` as `gradient_function` takes them."""
    (input,), options = arguments(case, case.dtype, repetition)
    names = ("weight", "bias", "running_mean", "running_var", "residual")
    tensors = {"input": input, **{name: options.pop(name) for name in names}}
    return (tensors, options), {}


@pytest.mark.parametrize("case", pairwise(AXES, has_statistics), ids=str)
def test_matches_reference(monkeypatch, case):
    go(case.way, monkeypatch)
    assert_parity("triton", ops.batch_norm_act, partial(arguments, case, case.dtype))


@pytest.mark.parametrize("case", pairwise(AXES, has_statistics)[::2], ids=str)
def test_gradients(monkeypatch, case):
    go(case.way, monkeypatch)
    assert_parity(
        "triton",
        gradient_function(ops.batch_norm_act),
        partial(differentiable, case),
        channels_last=False,
    )


@pytest.mark.parametrize("way", AXES["way"])
def test_gradients_of_the_statistics(monkeypatch, way):
    """As the mean and the variance are outputs of the op, they may have gradients, too."""
    go(way, monkeypatch)

    def statistics(input: Tensor, weight: Tensor) -> Any:
        return torch.ops.effkernels.batch_norm_act(
            input, weight, None, None, None, None, True, 1e-3, "silu"
        )

    def only_statistics(input: Tensor, weight: Tensor) -> Any:
        output, mean, var = statistics(input, weight)
        return mean, var + 0 * weight.sum()

    for function in (statistics, only_statistics):

        def case(repetition: int) -> Arguments:
            draw = Draw(repetition)
            input = draw.activations(2, 24, (5, 7))
            return ({"input": input, "weight": draw.normal(24, std=0.3, mean=1.0)}, {}), {}

        assert_parity("triton", gradient_function(function), case, channels_last=False)


@pytest.mark.parametrize("way", ("small", "large"))
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", ["input", "weight", "bias", "residual"])
def test_only_needed_gradients_are_computed(monkeypatch, training, name, way):
    go(way, monkeypatch)
    case = Case(
        batch=2, channels=8, size=(3, 5), training=training, residual="channels_last",
        dtype=torch.float32,
    )  # fmt: skip
    (tensors, options), _ = differentiable(case, 0)
    tensors = {key: value for key, value in tensors.items() if value is not None}
    leaves = {key: value.clone().requires_grad_() for key, value in tensors.items()}
    everything = torch.autograd.grad(
        ops.batch_norm_act(**options, **{"running_mean": None, "running_var": None} | leaves).sum(),
        leaves[name],
    )
    alone = {key: value.clone().requires_grad_(key == name) for key, value in tensors.items()}
    ops.batch_norm_act(
        **options, **{"running_mean": None, "running_var": None} | alone
    ).sum().backward()
    torch.testing.assert_close(alone[name].grad, everything[0])


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_special_values(monkeypatch, value, training):
    for way in ("small", "large"):
        go(way, monkeypatch)
        case = Case(batch=2, channels=20, size=(4, 5), training=training, residual=None)
        (input,), options = arguments(case, torch.float32)
        input[1, 7, 2, 2] = value
        assert_matches(ops.batch_norm_act, input, **options, backend="triton")


@pytest.mark.parametrize("way", AXES["way"])
def test_values_far_from_zero(monkeypatch, device, way):
    """What the rounding of a mean near 1000 loses; E[x²] − E[x]² would lose far more."""
    go(way, monkeypatch)
    input = Draw(0).activations(2, 20, (16, 16)) + 1000
    output = ops.batch_norm_act(input.to(device), None, None, None, None, True)
    exact = torch.nn.functional.batch_norm(input.double(), None, None, training=True)
    assert relative_error(output.cpu(), exact) < 4 * 1000 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("way", AXES["way"])
@pytest.mark.parametrize("training", [False, True])
def test_same_bits_every_time(monkeypatch, training, way):
    go(way, monkeypatch)
    case = Case(
        batch=3, channels=40, size=(9, 7), training=training, residual="channels_last",
        dtype=torch.bfloat16,
    )  # fmt: skip
    (tensors, options), _ = differentiable(case, 0)
    gradients = gradient_function(ops.batch_norm_act)
    assert same_bits(gradients(tensors, options), gradients(tensors, options))


@pytest.mark.skipif(not interpreted(), reason="guards are in the CPU's memory")
@pytest.mark.parametrize("way", AXES["way"])
@pytest.mark.parametrize("channels", [3, 24])
def test_memory(monkeypatch, dtype, channels, way):
    """Every element of what is allocated is written, and nothing around it."""
    go(way, monkeypatch)
    case = Case(
        batch=2, channels=channels, size=(3, 5), training=True, residual="nchw", dtype=dtype
    )
    (tensors, options), _ = differentiable(case, 0)
    gradients = gradient_function(ops.batch_norm_act)
    plain = gradients(tensors, options)
    memory = GuardedMemory()
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", memory.empty)
        patch.setattr(torch, "empty_like", memory.empty_like)
        result = gradients(tensors, options)
    assert memory.check() > 0
    assert same_bits(plain, result)


# The parts, as training MBConv blocks uses them


@pytest.mark.parametrize("way", ("large", "tiles"))
@pytest.mark.parametrize("activation", ("silu", "none"))
def test_parts_with_a_gate(monkeypatch, device, dtype, activation, way):
    """BatchNorm → activation → gate, whose own gradient comes back as an offset."""
    go(way, monkeypatch)
    draw, eps = Draw(1, dtype), 1e-3
    z, upstream = (draw.activations(3, 24, (5, 7)) for _ in range(2))
    weight, bias = draw.normal(24, std=0.3, mean=1.0).float(), draw.normal(24, std=0.3).float()
    gate, offset = draw.gate(3, 24), draw.normal(3, 24, std=0.2).float()

    def stock(dtype: torch.dtype) -> tuple[Tensor, ...]:
        x, w, b, g = (t.detach().to(dtype).requires_grad_() for t in (z, weight, bias, gate))
        plain = torch.nn.functional.batch_norm(x, None, None, w, b, True, 0.0, eps)
        hidden = apply_activation(plain, activation)
        output = hidden * g[:, :, None, None]
        loss = (output * upstream.to(dtype)).sum()
        loss = loss + (hidden * offset.to(dtype)[:, :, None, None]).sum()
        return output.detach(), *torch.autograd.grad(loss, (x, w, b))

    z, upstream, weight, bias, gate, offset = (
        t.to(device) for t in (z, upstream, weight, bias, gate, offset)
    )
    mean, var = kernels.statistics(z)
    scale, shift = kernels.affine(weight, bias, mean, var, eps)
    output = kernels.apply(z, Forward(scale, shift, activation, gate))
    operand = Gradient(z, scale, shift, activation, gate, offset)
    normalization = Normalization(mean, var, weight, bias, eps)
    partials = kernels.gradient_sums(upstream, operand, normalization)
    vectors = kernels.gradient_affine(partials, 3 * 5 * 7, normalization)
    operand = operand._replace(
        factor=vectors.factor, slope=vectors.slope, constant=vectors.constant
    )
    gradient, _ = kernels.differentiate(upstream, operand)
    got = (output, gradient, vectors.weight, vectors.bias)
    due, baseline = stock(torch.float64), stock(torch.float32)
    for exact, result, plain in zip(due, got, baseline, strict=True):
        assert_close_to(exact, result.cpu(), plain.to(result.dtype))


def test_residual_after_an_operand(device, dtype):
    draw = Draw(2, dtype)
    z, residual = (draw.activations(2, 40, (5, 7)) for _ in range(2))
    scale, shift = draw.normal(40).float(), draw.normal(40).float()

    def stock(dtype: torch.dtype) -> Tensor:
        x, r, a, b = (t.to(dtype) for t in (z, residual, scale, shift))
        return torch.relu(x * a[:, None, None] + b[:, None, None] + r)

    vectors = Forward(scale.to(device), shift.to(device))
    got = kernels.apply(z.to(device), vectors, residual.to(device), "relu")
    assert_close_to(stock(torch.float64), got.cpu(), stock(torch.float32).to(dtype))


# The nets


@kernel
def _careless_moments(output_ptr, input_ptr, rows, channels, BLOCK: tl.constexpr):
    """Σ (x − mean)² of one channel, in which the rows past the end count as zeros."""
    r = tl.arange(0, BLOCK)
    x = tl.load(input_ptr + r * channels, mask=r < rows, other=0.0)
    mean = tl.sum(x, 0) / rows
    tl.store(output_ptr, tl.sum((x - mean) * (x - mean), 0))


def test_parity_shows_a_missing_mask(device):
    input, output = torch.randn(50, 1, device=device) + 1, torch.empty(1, device=device)
    launch(_careless_moments, (1,), output, input, 50, 1, BLOCK=64)
    squares = (input - input.mean()).square().sum(0)
    with pytest.raises(AssertionError):
        assert_close_to(squares.double(), output, squares)


def broken() -> dict[str, list[str]]:
    """What the static checks say about launches that are worse than promised."""

    def call(channels: int) -> Callable[[], Any]:
        return lambda: kernels.apply(
            torch.empty(2, channels, 8, 8, dtype=torch.bfloat16).to(
                memory_format=torch.channels_last
            ),
            Forward(torch.empty(channels), torch.empty(channels), "silu"),
        )

    (odd,) = aot.launches([call(7)], aot.DEVICES[90])
    (even,) = aot.launches([call(64)], aot.DEVICES[90])
    promise = Promise(16, vector_loads=True, vector_stores=True)
    return {
        "odd": aot.broken_promises(odd, promise, 90),
        "even": aot.broken_promises(even, promise, 90),
        "crowded": aot.broken_promises(even, Promise(65), 90),
    }


def test_static_checks_show_scalar_accesses():
    result = aot.result_of(f"{__name__}:broken")
    assert result["odd"] == ["no load of 16 bytes", "no store of 16 bytes"]
    assert result["even"] == []
    assert "65 promised" in result["crowded"][0]


def aot_calls() -> Iterator[Callable[[], Any]]:
    """After every convolution of the networks: inference, training; and what MBConv uses."""
    layers = {
        (layer.out_channels, layer.out_height, layer.activation, layer.residual)
        for name in NETWORKS
        for layer in read_layers(name)
        if layer.op in ("conv", "pointwise_conv", "depthwise_conv")
    }
    for channels, size, activation, residual in sorted(layers):
        for dtype in DTYPES:
            for batch in aot.BATCHES:
                options = (batch, channels, size, dtype)
                if size > 1:
                    yield partial(_inference, *options, activation, residual)
                    yield partial(_training, *options, activation, residual)
                if batch > 1 and activation == "silu":
                    yield partial(_parts, *options)
    yield partial(_training, 256, 96, 112, torch.bfloat16, "silu", False, torch.bfloat16)


def _image(batch: int, channels: int, size: int, dtype: torch.dtype) -> Tensor:
    plain = torch.empty(batch, channels, size, size, dtype=dtype)
    return plain.to(memory_format=torch.channels_last)


def _inference(
    batch: int, channels: int, size: int, dtype: torch.dtype, activation: str, residual: bool
) -> None:
    input, vector = _image(batch, channels, size, dtype), torch.empty(channels)
    added = torch.empty_like(input) if residual else None
    ops.batch_norm_act(
        input, vector, vector, vector, vector, False, activation=activation, residual=added
    )


def _training(
    batch: int,
    channels: int,
    size: int,
    dtype: torch.dtype,
    activation: str,
    residual: bool,
    parameters: torch.dtype = torch.float32,
) -> None:
    tensors = {
        "input": _image(batch, channels, size, dtype),
        "weight": torch.empty(channels, dtype=parameters),
        "bias": torch.empty(channels, dtype=parameters),
    }
    if residual:
        tensors["residual"] = torch.empty_like(tensors["input"])
    function = partial(
        ops.batch_norm_act,
        running_mean=None,
        running_var=None,
        training=True,
        activation=activation,
    )
    aot.differentiate(lambda named: function(**named), tensors)


def _parts(batch: int, channels: int, size: int, dtype: torch.dtype) -> None:
    z, vector = _image(batch, channels, size, dtype), torch.empty(channels)
    gate, offset = torch.empty(batch, channels, dtype=dtype), torch.empty(batch, channels)
    kernels.affine(vector, vector, vector, vector, 1e-5)
    normalization = Normalization(vector, vector, vector, vector, 1e-5)
    operand = Gradient(z, vector, vector, "silu", gate, offset)
    partials = kernels.gradient_sums(z, operand, normalization)
    factors = kernels.gradient_affine(partials, 1, normalization)
    kernels.differentiate(z, operand._replace(factor=factors.factor, slope=vector, constant=vector))


@pytest.mark.parametrize("capability", aot.DEVICES)
def test_compiles_as_promised(capability):
    compiled, wrong = aot.run("batch_norm_act", capability)
    assert compiled > 0 and not wrong, "\n".join(wrong)
