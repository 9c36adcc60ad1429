"""csrc/squeeze_excite/cuda.cu against float64."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from effkernels import ops
from effkernels.cuda import DTYPES
from effkernels.cuda import squeeze_excite as kernels
from effkernels.dispatch import BackendUnavailable, use_backend
from effkernels.ops import ACTIVATIONS
from effkernels.testing import assert_close_to, assert_matches
from tests.cuda import emulated
from tests.cuda.emulated import with_mistake
from tests.ops._cases import (
    Arguments,
    Case,
    Draw,
    assert_memory_kept,
    assert_parity,
    gradient_function,
    pairwise,
    same_bits,
)
from tests.ops.test_squeeze_excite import BIASES, arguments, gate_arguments

pytestmark = pytest.mark.usefixtures("kernels")

GATE_AXES = {
    # around vectors, lanes of a row, rows of a warp, slices of 64
    "channels": (24, 5, 8, 72, 264),
    "reduced": (6, 1, 17, 40, 4),
    "batch": (2, 5, 0),
    "biases": BIASES,
    "activations": tuple(zip(ACTIVATIONS, (*ACTIVATIONS[3:], *ACTIVATIONS[:3]), strict=True)),
    # One image a block, or four where images outnumber half of the processors.
    "processors": (132, 2),
    "dtype": DTYPES,
}
AXES = {
    **GATE_AXES,
    "size": ((3, 3), (1, 1), (2, 11), (19, 7)),
    "layout": ("channels_last", "nchw"),
}


def emulate(device: torch.device, processors: int) -> None:
    if device.type == "cpu":
        emulated.configure(seed=processors, processors=processors)


def given(make: Any, case: Case, repetition: int) -> Arguments:
    """The arguments of `arguments` or `gate_arguments`."""
    first, named = make(case, case.dtype, repetition)
    activation, gate_activation = getattr(case, "activations", ("silu", "sigmoid"))
    return first, {**named, "activation": activation, "gate_activation": gate_activation}


def differentiable(make: Any, case: Case, repetition: int) -> Arguments:
    """The same as `gradient_function` takes them."""
    (first,), named = given(make, case, repetition)
    options = {key: named.pop(key) for key in ("activation", "gate_activation")}
    return ({"input" if first.dim() == 4 else "mean": first, **named}, options), {}


@pytest.mark.parametrize("case", pairwise(GATE_AXES), ids=str)
def test_gate_matches_reference(device, case):
    emulate(device, case.processors)
    assert_parity("native", ops.squeeze_excite_gate, partial(given, gate_arguments, case))


@pytest.mark.parametrize("case", pairwise(GATE_AXES)[::3], ids=str)
def test_gradients_of_the_gate(device, case):
    emulate(device, case.processors)
    assert_parity(
        "native",
        gradient_function(ops.squeeze_excite_gate),
        partial(differentiable, gate_arguments, case),
        channels_last=False,
    )


@pytest.mark.parametrize("case", pairwise(AXES), ids=str)
def test_matches_reference(device, case):
    emulate(device, case.processors)
    assert_parity("native", ops.squeeze_excite, partial(given, arguments, case))


@pytest.mark.parametrize("case", pairwise(AXES)[::3], ids=str)
def test_gradients(device, case):
    emulate(device, case.processors)
    assert_parity(
        "native",
        gradient_function(ops.squeeze_excite),
        partial(differentiable, arguments, case),
        channels_last=False,
    )


@pytest.mark.parametrize("processors", [132, 2])
@pytest.mark.parametrize("channels,blocks", [(24, 3), (40, 130), (8, 300), (5, 7)])
def test_gate_of_partial_sums(device, dtype, processors, channels, blocks):
    """Added by one thread, or by several."""
    emulate(device, processors)
    draw = Draw(0, dtype)
    sums = draw.normal(5, blocks, channels, std=9 / blocks, mean=3 / blocks).float()
    weights = (
        draw.weight(6, channels),
        draw.normal(6),
        draw.weight(channels, 6),
        draw.normal(channels),
    )

    def stock(dtype: torch.dtype) -> Tensor:
        wide = torch.promote_types(dtype, torch.float32)
        mean = (sums.to(wide).sum(1) / 9).to(dtype)
        return ops.squeeze_excite_gate(mean, *(weight.to(dtype) for weight in weights))

    with use_backend("reference"):
        due, baseline = stock(torch.float64), stock(dtype)
    got = kernels.gate(
        sums.to(device), 1 / 9, *(weight.to(device) for weight in weights), "silu", "sigmoid"
    )
    assert_close_to(due, got.cpu(), baseline)


@pytest.mark.parametrize(
    "images,channels,reduced", [(1, 300, 300), (70, 40, 6), (3, 1152, 48), (2, 264, 132)]
)
def test_long_vectors(dtype, images, channels, reduced):
    """More values than a warp takes at once; more images than a step of the weights' gradient."""
    case = Case(
        batch=images, channels=channels, reduced=reduced, biases="reduce+expand", dtype=dtype
    )
    (tensors, options), _ = differentiable(gate_arguments, case, 0)
    assert_matches(gradient_function(ops.squeeze_excite_gate), tensors, options, backend="native")
    assert_matches(ops.squeeze_excite_gate, **tensors, **options, backend="native")


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
@pytest.mark.parametrize("processors", [132, 2])
def test_special_values_stay_in_their_image(device, value, processors):
    emulate(device, processors)
    case = Case(batch=3, channels=20, reduced=5, size=(4, 5), biases="reduce+expand")
    (input,), named = arguments(case, torch.float32)
    input[1, 7, 2, 2] = value
    assert_matches(ops.squeeze_excite, input, **named, backend="native")


def test_same_bits_every_time(device):
    case = Case(
        batch=5, channels=24, reduced=17, size=(13, 7), biases="reduce+expand",
        dtype=torch.bfloat16,
    )  # fmt: skip
    (tensors, options), _ = differentiable(arguments, case, 0)
    gradients = gradient_function(ops.squeeze_excite)
    once = gradients(tensors, options)
    if device.type == "cpu":
        emulated.configure(seed=1)
    assert same_bits(once, gradients(tensors, options))


@pytest.mark.parametrize("channels,reduced", [(24, 17), (9, 4)])
def test_memory(monkeypatch, dtype, channels, reduced):
    """Every element of what is allocated is written, and nothing around it is touched."""
    case = Case(
        batch=3, channels=channels, reduced=reduced, size=(3, 5), biases="reduce+expand",
        layout="channels_last", dtype=dtype,
    )  # fmt: skip
    for op, make in (("squeeze_excite", arguments), ("squeeze_excite_gate", gate_arguments)):
        (tensors, options), _ = differentiable(make, case, 0)
        assert_memory_kept(monkeypatch, getattr(ops, op), ((), {**tensors, **options}))

        def gradients(op: str = op, names: tuple[str, ...] = tuple(tensors), **given: Any) -> Any:
            named = {name: given.pop(name) for name in names}
            return gradient_function(getattr(ops, op))(named, given)

        assert_memory_kept(monkeypatch, gradients, ((), {**tensors, **options}))


def test_too_many_channels_are_refused(device):
    if device.type != "cpu":
        pytest.skip("asks for a device with little shared memory")
    emulated.configure(shared_memory=48 * 1024)
    case = Case(batch=1, channels=3000, reduced=8, biases="none")
    first, named = gate_arguments(case, torch.float32)
    with pytest.raises(BackendUnavailable, match="3000 channels, 8 reduced: more than shared"):
        ops.squeeze_excite_gate(*first, **named)


def _check() -> None:
    case = Case(
        batch=3, channels=72, reduced=40, size=(5, 7), biases="reduce+expand",
        dtype=torch.bfloat16,
    )  # fmt: skip
    odd = Case(
        batch=2, channels=12, reduced=5, size=(33, 17), biases="reduce+expand",
        dtype=torch.float32,
    )  # fmt: skip
    for each in (case, odd):
        assert_parity("native", ops.squeeze_excite, partial(given, arguments, each))
        assert_parity(
            "native",
            gradient_function(ops.squeeze_excite),
            partial(differentiable, arguments, each),
            channels_last=False,
        )


GATE, GRADIENT, FILE = (
    f"squeeze_excite/{name}" for name in ("cuda_gate.h", "cuda_gate_gradient.h", "cuda.cu")
)
MISTAKES = {
    "a barrier is missing behind the means": (
        GATE,
        "add_partials<T, kImages>(args.mean, args, first, mean, scratch);\n    __syncthreads();",
        "add_partials<T, kImages>(args.mean, args, first, mean, scratch);",
    ),
    "a row of the first matrix": (
        GATE,
        "r + i < args.reduced ? args.channels",
        "r + i < args.reduced - 1 ? args.channels",
    ),
    "a shuffle": (GATE, "distance < lanes; distance *= 2", "distance < lanes / 2; distance *= 2"),
    "half of a warp's channels": (GATE, "lane & 2 ? half[1] : half[0]", "half[0]"),
    "a barrier is missing in the product": (
        GRADIENT,
        "    }\n    __syncthreads();\n  }\n\n  // The sharers' sums",
        "    }\n  }\n\n  // The sharers' sums",
    ),
    "images past the end": (
        GRADIENT,
        "const bool inside = k < product.k;",
        "const bool inside = true;",
    ),
    "a pixel": (
        FILE,
        "const int count = row + u * tiles.lanes < rows ?",
        "const int count = row + u * tiles.lanes < rows - 1 ?",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_found(mistake):
    assert with_mistake(MISTAKES[mistake], _check)


def test_right_kernels_pass_where_mistakes_are_found():
    assert with_mistake(None, _check) == ""
