from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
import triton.language as tl
from torch import Tensor

from effkernels import ops
from effkernels.operands import Forward
from effkernels.ops import ACTIVATIONS
from effkernels.testing import assert_close_to, assert_matches
from effkernels.triton import DTYPES, batch_norm_act_passes, interpreted, squeeze_excite_gate
from effkernels.triton import squeeze_excite as kernels
from effkernels.triton import squeeze_excite_gate_backward as backward
from effkernels.triton.batch_norm_act_config import PassConfig, SumConfig
from effkernels.triton.language import kernel
from effkernels.triton.launch import launch
from effkernels.triton.promises import Promise
from effkernels.triton.squeeze_excite_config import GateBackwardConfig, GateConfig
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
from tests.ops.test_squeeze_excite import BIASES, arguments, gate_arguments
from tests.triton import aot

AXES = {
    "op": ("squeeze_excite", "squeeze_excite_gate"),
    "channels": (24, 5, 33),
    "reduced": (6, 1, 17),
    "batch": (2, 9, 0),
    "biases": BIASES,
    "activations": tuple(zip(ACTIVATIONS, (*ACTIVATIONS[3:], *ACTIVATIONS[:3]), strict=True)),
    "size": ((3, 3), (1, 1), (2, 11)),
    "layout": ("channels_last", "nchw"),
    # What runs: what the heuristics say, one or two kernels to the gate, of one or 16 images, all
    # in tiles so small that every loop has several steps.
    "way": ("chosen", "image", "split image", "tile", "split tile"),
    "dtype": DTYPES,
}


def go(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if way == "chosen":
        return
    gate = GateConfig("split" in way, 1 if "image" in way else 16, 16, 16, 1, 1)
    monkeypatch.setattr(squeeze_excite_gate, "gate_heuristic", lambda *_: gate)
    monkeypatch.setattr(
        backward, "gate_backward_heuristic", lambda *_: GateBackwardConfig(16, 16, 1, 1, 16)
    )
    monkeypatch.setattr(kernels, "pool_heuristic", lambda *_: SumConfig(3, 2, 4, 16, 1))
    monkeypatch.setattr(batch_norm_act_passes, "pass_heuristic", lambda *_: PassConfig(8, 16, 1))


def given(case: Case, repetition: int) -> Arguments:
    make = arguments if case.op == "squeeze_excite" else gate_arguments
    activation, gate_activation = getattr(case, "activations", ("silu", "sigmoid"))
    first, named = make(case, case.dtype, repetition)
    return first, {**named, "activation": activation, "gate_activation": gate_activation}


def differentiable(case: Case, repetition: int) -> Arguments:
    """The arguments as `gradient_function` takes them."""
    (first,), named = given(case, repetition)
    options = {key: named.pop(key) for key in ("activation", "gate_activation")}
    return ({"input" if first.dim() == 4 else "mean": first, **named}, options), {}


@pytest.mark.parametrize("case", pairwise(AXES), ids=str)
def test_matches_reference(monkeypatch, case):
    go(case.way, monkeypatch)
    assert_parity("triton", getattr(ops, case.op), partial(given, case))


@pytest.mark.parametrize("case", pairwise(AXES)[::3], ids=str)
def test_gradients(monkeypatch, case):
    go(case.way, monkeypatch)
    assert_parity(
        "triton",
        gradient_function(getattr(ops, case.op)),
        partial(differentiable, case),
        channels_last=False,
    )


@pytest.mark.parametrize("way", AXES["way"])
@pytest.mark.parametrize("blocks", [3, 9])
def test_gate_of_partial_sums(monkeypatch, device, dtype, way, blocks):
    go(way, monkeypatch)
    draw = Draw(0, dtype)
    sums = draw.normal(17, blocks, 24, std=9 / blocks).float()
    weights = (draw.weight(6, 24), draw.normal(6), draw.weight(24, 6), draw.normal(24))

    def stock(dtype: torch.dtype) -> Tensor:
        mean = (sums.double().sum(1) / 9).to(dtype)
        return ops.squeeze_excite_gate(mean, *(weight.to(dtype) for weight in weights))

    with ops_on_reference():
        due, baseline = stock(torch.float64), stock(dtype)
    got = kernels.gate(
        sums.to(device), 1 / 9, *(weight.to(device) for weight in weights), "silu", "sigmoid"
    )
    assert_close_to(due, got.cpu(), baseline)


def ops_on_reference() -> Any:
    from effkernels.dispatch import use_backend

    return use_backend("reference")


@pytest.mark.parametrize("way", ("chosen", "tile"))
def test_pool_of_an_operand(monkeypatch, device, dtype, way):
    """What MBConv's backward pass asks for: Σ upstream · silu(scale · z + shift)."""
    go(way, monkeypatch)
    draw = Draw(3, dtype)
    z, upstream = (draw.activations(2, 40, (5, 7)) for _ in range(2))
    scale, shift = draw.normal(40).float(), draw.normal(40).float()

    def stock(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        x = z.to(dtype) * scale.to(dtype)[:, None, None] + shift.to(dtype)[:, None, None]
        x = torch.nn.functional.silu(x)
        return x.sum((2, 3)), (x * upstream.to(dtype)).sum((2, 3))

    vectors = Forward(scale.to(device), shift.to(device), "silu")
    got = kernels.pool(z.to(device), vectors, upstream.to(device))
    for due, partials, baseline in zip(
        stock(torch.float64), got, stock(torch.float32), strict=True
    ):
        assert_close_to(due, partials.sum(1).cpu(), baseline)
    assert kernels.pool(z.to(device), vectors, upstream.to(device), sums=False)[0] is None


@pytest.mark.parametrize("op", ["squeeze_excite", "squeeze_excite_gate"])
@pytest.mark.parametrize("index", range(5))
def test_only_needed_gradients_are_computed(op, index):
    case = Case(batch=2, channels=24, reduced=6, size=(3, 5), biases="reduce+expand")
    make = arguments if op == "squeeze_excite" else gate_arguments
    (first,), named = make(case, torch.float32, 1)
    tensors = [first, *(value for value in named.values() if isinstance(value, Tensor))]
    leaves = [value.detach().clone().requires_grad_() for value in tensors]
    everything = torch.autograd.grad(getattr(ops, op)(*leaves).sum(), leaves)
    alone = [value.detach().clone().requires_grad_(i == index) for i, value in enumerate(tensors)]
    getattr(ops, op)(*alone).sum().backward()
    torch.testing.assert_close(alone[index].grad, everything[index])


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("batch", [3, 17])
def test_special_values_stay_in_their_image(value, batch):
    case = Case(batch=batch, channels=20, reduced=5, size=(4, 5), biases="reduce+expand")
    (input,), named = arguments(case, torch.float32)
    input[1, 7, 2, 2] = value
    assert_matches(ops.squeeze_excite, input, **named, backend="triton")


@pytest.mark.parametrize("way", AXES["way"])
def test_same_bits_every_time(monkeypatch, way):
    go(way, monkeypatch)
    case = Case(
        op="squeeze_excite",
        batch=17,
        channels=24,
        reduced=17,
        size=(3, 7),
        biases="reduce+expand",
        dtype=torch.bfloat16,
    )
    (tensors, options), _ = differentiable(case, 0)
    gradients = gradient_function(ops.squeeze_excite)
    assert same_bits(gradients(tensors, options), gradients(tensors, options))


@pytest.mark.skipif(not interpreted(), reason="guards are in the CPU's memory")
@pytest.mark.parametrize("way", AXES["way"])
def test_memory(monkeypatch, dtype, way):
    """Every element of what is allocated is written, and nothing around it."""
    go(way, monkeypatch)
    case = Case(
        op="squeeze_excite",
        batch=3,
        channels=24,
        reduced=17,
        size=(3, 5),
        biases="reduce+expand",
        dtype=dtype,
    )
    (tensors, options), _ = differentiable(case, 0)
    gradients = gradient_function(ops.squeeze_excite)
    plain = gradients(tensors, options)
    memory = GuardedMemory()
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", memory.empty)
        patch.setattr(torch, "empty_like", memory.empty_like)
        result = gradients(tensors, options)
    assert memory.check() > 0
    assert same_bits(plain, result)


# The nets


@kernel
def _careless_mean(output_ptr, input_ptr, rows, channels, CHANNELS: tl.constexpr):
    """Channel sums that forget the last row."""
    c = tl.arange(0, CHANNELS)
    total = tl.zeros([CHANNELS], tl.float32)
    for row in range(0, rows - 1):
        total += tl.load(input_ptr + row * channels + c, mask=c < channels, other=0.0)
    tl.store(output_ptr + c, total, mask=c < channels)


def test_parity_shows_a_missing_row(device):
    input, output = torch.randn(50, 24, device=device), torch.empty(24, device=device)
    launch(_careless_mean, (1,), output, input, 50, 24, CHANNELS=32)
    with pytest.raises(AssertionError):
        assert_close_to(input.double().sum(0), output, input.sum(0))


def broken() -> dict[str, list[str]]:
    """What the static checks say about configurations that the heuristic avoids."""
    weights = torch.empty(160, 3840), torch.empty(160), torch.empty(3840, 160), torch.empty(3840)

    def call() -> None:
        kernels.gate(torch.empty(32, 3840), 1.0, *weights, "silu", "sigmoid")

    chosen = squeeze_excite_gate.gate_heuristic
    squeeze_excite_gate.gate_heuristic = lambda *_: GateConfig(False, 16, 64, 64, 4, 1)
    try:
        (crowded,) = aot.launches([lambda: call()], aot.DEVICES[90])
        squeeze_excite_gate.gate_heuristic = lambda *_: GateConfig(False, 1, 64, 16, 16, 1)
        (scalar,) = aot.launches([lambda: call()], aot.DEVICES[90])
    finally:
        squeeze_excite_gate.gate_heuristic = chosen
    return {
        "crowded": aot.broken_promises(crowded, Promise(4), 90),
        "no tensor cores": aot.broken_promises(scalar, Promise(4, tensor_cores=True), 90),
    }


def test_static_checks_show_spills_and_missing_tensor_cores():
    result = aot.result_of(f"{__name__}:broken")
    assert any("local memory" in wrong for wrong in result["crowded"])
    assert "no tensor-core instruction" in result["no tensor cores"]


def aot_calls() -> Iterator[Callable[[], Any]]:
    """The networks' layers; their gates alone; and what MBConv uses."""
    yield from aot.network_calls("squeeze_excite")
    shapes = ((32, 8), (96, 4), (144, 6), (1152, 48), (1632, 68), (2688, 112), (3840, 160))
    for channels, reduced in shapes:
        for dtype in DTYPES:
            for batch in aot.BATCHES:
                yield partial(_gate, batch, channels, reduced, dtype)


def _gate(batch: int, channels: int, reduced: int, dtype: torch.dtype) -> None:
    weights = {
        "reduce_weight": torch.empty(reduced, channels, dtype=dtype),
        "reduce_bias": torch.empty(reduced, dtype=dtype),
        "expand_weight": torch.empty(channels, reduced, dtype=dtype),
        "expand_bias": torch.empty(channels, dtype=dtype),
    }
    for blocks in (1, 7):
        sums = torch.empty(batch, blocks, channels)
        kernels.gate(sums, 0.5, *weights.values(), "silu", "sigmoid")
    mean = torch.empty(batch, channels, dtype=dtype)
    aot.differentiate(lambda named: ops.squeeze_excite_gate(**named), {"mean": mean, **weights})
    z = torch.empty(batch, channels, 14, 14, dtype=dtype).to(memory_format=torch.channels_last)
    vectors = Forward(torch.empty(channels), torch.empty(channels), "silu")
    kernels.pool(z, vectors, z, sums=False)


@pytest.mark.parametrize("capability", aot.DEVICES)
def test_compiles_as_promised(capability):
    compiled, wrong = aot.run("squeeze_excite", capability)
    assert compiled > 0 and not wrong, "\n".join(wrong)
