from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import effkernels as ek
from effkernels import ops, triton
from effkernels.operands import Forward, Gradient
from effkernels.ops import ACTIVATIONS
from effkernels.ops._common import apply_activation
from effkernels.testing import assert_close_to, assert_matches
from effkernels.triton import (
    depthwise_conv,
    depthwise_conv_config,
)
from effkernels.triton import depthwise_conv_gradient as gradients
from tests.ops._cases import (
    Arguments,
    Case,
    GuardedMemory,
    gradient_function,
    outputs_of,
    same_bits,
)
from tests.triton import aot
from tests.triton.cases import broken_module

# Calls of training, which the networks' layers do not make: prologues, statistics, sums.
TRAINING = ((256, 144, 56, 3, 1), (256, 96, 112, 3, 2), (256, 672, 14, 5, 1), (256, 144, 56, 5, 2))


def aot_calls() -> Iterator[Callable[[], Any]]:
    yield from aot.network_calls("depthwise_conv")
    for sizes in TRAINING:
        for dtype in (torch.float32, torch.bfloat16):
            yield partial(_train, dtype, *sizes)
    for kernel_size, stride, dilation in ((7, 1, 1), (7, 2, 1), (9, 1, 1), (3, 2, 2)):
        yield partial(_differentiate, torch.bfloat16, kernel_size, stride, dilation)


def _train(dtype: torch.dtype, batch: int, channels: int, size: int, k: int, stride: int) -> None:
    geometry: dict[str, Any] = {
        "kernel": (k, k),
        "stride": (stride, stride),
        "padding": (k // 2,) * 4,
        "dilation": (1, 1),
    }
    input = _channels_last(torch.empty(batch, channels, size, size, dtype=dtype))
    taps = torch.empty(k * k, channels, dtype=dtype)
    vector = torch.empty(channels)
    gate = torch.empty(batch, channels)
    forward = Forward(vector, vector, "silu")
    z = depthwise_conv.convolve(input, taps, operand=forward, moments=True, **geometry).output
    depthwise_conv.convolve(input, taps, mean=True, activation="silu", **geometry)
    gradient = Gradient(z, vector, vector, "silu", gate, gate, vector, vector, vector)
    gradients.input_gradient(z, taps, size=(size, size), gradient=gradient, **geometry)
    gradients.weight_gradient(z, gradient, input, forward, **geometry)


def _differentiate(dtype: torch.dtype, kernel_size: int, stride: int, dilation: int) -> None:
    def run(tensors: dict[str, Tensor]) -> Any:
        return ops.depthwise_conv(
            **tensors, stride=stride, dilation=dilation, activation="silu", return_mean=True
        )

    tensors = {"input": (2, 24, 28, 28), "weight": (24, 1, kernel_size, kernel_size), "bias": (24,)}
    aot.differentiate(run, {n: torch.empty(s, dtype=dtype) for n, s in tensors.items()})


def _channels_last(tensor: Tensor) -> Tensor:
    return tensor.to(memory_format=torch.channels_last)


# Parity

# Around strips of 4 and 7 columns, tiles of 32 and 64 channels, padding of every kind.
CASES = {
    f"{k}x{k} stride {stride} {height}x{width}x{channels} batch {batch} {padding} dil {dilation}": (
        Case(
            batch=batch,
            channels=channels,
            size=(height, width),
            kernel=k,
            stride=stride,
            padding=padding,
            dilation=dilation,
        )
    )
    for batch, channels, height, width, k, stride, padding, dilation in (
        (2, 40, 5, 9, 3, 1, "symmetric", 1),
        (3, 33, 6, 5, 3, 2, "same", 1),
        (1, 66, 4, 8, 5, 1, (0, 1, 2, 0), 1),
        (2, 24, 6, 9, 5, 2, "symmetric", 1),
        (1, 24, 3, 4, 7, 1, "symmetric", 1),
        (1, 17, 6, 7, 7, 2, (5, 1, 0, 4), 1),
        (1, 24, 1, 1, 3, 1, 4, 1),
        (0, 8, 5, 5, 3, 1, "same", 1),
        (1, 40, 7, 6, 3, 2, "symmetric", 2),
        (1, 24, 2, 2, 9, 1, "symmetric", 1),
        (2, 8, 5, 6, 1, 2, 0, 1),
    )
}
OBLONG = Case(
    batch=2, channels=24, size=(7, 6), kernel=(5, 3), stride=(1, 2), padding="same", dilation=1
)
# What the heuristic would not choose at these sizes. Two or three rows a strip: strips are cut.
STREAMED = {"streamed": True, "rows": 2}
CONFIGS = {
    "streamed": STREAMED,
    "seven columns": {**STREAMED, "columns": 7, "rows": 3},
    "several items": {**STREAMED, "items": 3},
    "one warp": {"strips": 4, "channels": 16, "num_warps": 1},
}


@pytest.fixture
def configure(monkeypatch):
    """A function that overrides fields of the configurations chosen from now on."""

    def override(**fields: Any) -> None:
        def heuristic(problem: Any, device: Any) -> Any:
            chosen = depthwise_conv_config.heuristic(problem, device)
            kept = set() if problem.is_tuned else {"streamed", "columns"}
            if problem.name != "weight_gradient" and not problem.moments:
                kept.add("items")
            return dataclasses.replace(
                chosen, **{name: value for name, value in fields.items() if name not in kept}
            )

        monkeypatch.setattr(depthwise_conv, "heuristic", heuristic)
        monkeypatch.setattr(gradients, "heuristic", heuristic)

    return override


def arguments(case: Case, dtype: torch.dtype, device: Any, repetition: int = 0) -> Arguments:
    draw = case.draw(repetition, dtype)
    size = case.kernel if isinstance(case.kernel, tuple) else (case.kernel, case.kernel)
    tensors = {
        "input": draw.activations(case.batch, case.channels, case.size),
        "weight": draw.weight(case.channels, 1, *size),
        **draw.affine(case.channels, getattr(case, "affine", "scale32+bias")),
    }
    chosen = {
        "stride": case.stride,
        "padding": case.padding,
        "dilation": case.dilation,
        "activation": getattr(case, "activation", "silu"),
        "return_mean": True,
    }
    return ({name: tensor.to(device) for name, tensor in tensors.items()}, chosen), {}


def run(tensors: dict[str, Tensor], chosen: dict[str, Any]) -> Any:
    return ops.depthwise_conv(**tensors, **chosen)


def outputs_and_gradients(tensors: dict[str, Tensor], chosen: dict[str, Any]) -> Any:
    differentiate = gradient_function(ops.depthwise_conv)
    return (*run(tensors, chosen), *differentiate(tensors, chosen))


@pytest.mark.parametrize("name", CASES)
def test_matches_reference(device, name):
    """Outputs and gradients for every argument."""
    args, _ = arguments(CASES[name], torch.float32, device)
    assert_matches(outputs_and_gradients, *args, backend="triton")


@pytest.mark.parametrize("fields", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize(("k", "stride", "padding"), [(3, 2, "same"), (5, 1, "symmetric")])
def test_configurations(device, configure, fields, k, stride, padding):
    case = Case(
        batch=1, channels=16, size=(5, 8), kernel=k, stride=stride, padding=padding, dilation=1
    )
    configure(**fields)
    args, _ = arguments(case, torch.float32, device)
    assert_matches(outputs_and_gradients, *args, backend="triton")


@pytest.mark.parametrize("stride", [1, 2])
def test_dtypes(device, dtype, stride):
    case = Case(
        batch=2, channels=24, size=(4, 7), kernel=3, stride=stride, padding="same", dilation=1
    )
    args, _ = arguments(case, dtype, device)
    assert_matches(outputs_and_gradients, *args, backend="triton")


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(device, activation):
    case = Case(
        batch=1,
        channels=24,
        size=(4, 4),
        kernel=3,
        stride=1,
        padding="same",
        dilation=1,
        activation=activation,
        affine="bias32",
    )
    args, _ = arguments(case, torch.float32, device)
    assert_matches(outputs_and_gradients, *args, backend="triton")


def test_oblong_geometry(device):
    args, _ = arguments(OBLONG, torch.float32, device)
    assert_matches(outputs_and_gradients, *args, backend="triton")


def test_layouts(device):
    """Vectors with gaps between their elements, an input that is not channels_last."""
    draw = OBLONG.draw(0, torch.float32)
    input = draw.activations(2, 24, (7, 6), "sliced").to(device)
    tensors = {
        "input": input,
        "weight": draw.weight(24, 1, 3, 6)[..., ::2].to(device),
        "scale": draw.normal(24, 2)[:, 0].to(device),
        "bias": draw.normal(1).expand(24).to(device),
    }
    chosen = {"stride": 2, "padding": "same", "return_mean": True}
    assert_matches(run, tensors, chosen, backend="triton")


@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (3,), (0, 3)])
def test_only_needed_gradients(device, needed):
    (tensors, chosen), _ = arguments(OBLONG, torch.float32, device)
    values = [tensors[name] for name in ("input", "weight", "scale", "bias")]
    for index in needed:
        values[index] = values[index].clone().requires_grad_()
    results = []
    for backend in ("triton", "reference"):
        with ek.use_backend(backend):
            output = ops.depthwise_conv(*values[:2], values[3], scale=values[2], **chosen)[0]
            wanted = [values[index] for index in needed]
            results.append(torch.autograd.grad(output.square().sum(), wanted))
    for got, due in zip(*results, strict=True):
        torch.testing.assert_close(got, due)


# What other ops use: prologues, statistics, sums


FUSED = [
    Case(batch=2, channels=24, size=(5, 9), kernel=3, stride=1, padding=(1, 1, 1, 1)),
    Case(batch=3, channels=17, size=(6, 5), kernel=5, stride=2, padding=(2, 2, 2, 2)),
    Case(batch=1, channels=8, size=(2, 3), kernel=3, stride=3, padding=(1, 2, 3, 1)),
]


@pytest.mark.parametrize("fields", [{}, {"streamed": True, "rows": 3, "items": 2}], ids=str)
@pytest.mark.parametrize("case", FUSED, ids=str)
def test_prologue_and_statistics(device, dtype, configure, case, fields):
    draw = case.draw(0, dtype)
    input = draw.activations(case.batch, case.channels, case.size)
    weight = draw.weight(case.channels, 1, case.kernel, case.kernel)
    vectors = draw.affine(case.channels, "scale32+bias32")
    gate = draw.gate(case.batch, case.channels)
    bias = draw.affine(case.channels, "bias")["bias"] + 5  # statistics far from zero
    stride, dilation = (case.stride, case.stride), (1, 1)

    def plain(x: Tensor, w: Tensor, s: Tensor, t: Tensor, g: Tensor, b: Tensor) -> Any:
        x = apply_activation(x * channelwise(s, x) + channelwise(t, x), "silu") * g[..., None, None]
        z = F.conv2d(F.pad(x, case.padding), w, b, stride, 0, dilation, case.channels)
        return z, z.mean((2, 3)), z.mean((0, 2, 3)), z.var((0, 2, 3), correction=0)

    tensors = (input, weight, vectors["scale"], vectors["bias"], gate, bias)
    due = plain(*(tensor.double() for tensor in tensors))
    stock = plain(*tensors)
    configure(**fields)
    x, w, s, t, g, b = (tensor.to(device) for tensor in tensors)
    result = depthwise_conv.convolve(
        x,
        depthwise_conv.pack_taps(w),
        w.shape[2:],
        stride,
        case.padding,
        dilation,
        Forward(s, t, "silu", g),
        bias=b,
        mean=True,
        partial_means=True,
        moments=True,
    )
    assert_close_to(due[0], result.output.cpu(), stock[0], "output")
    # In float32 whatever the dtype: as good as PyTorch's of its own result.
    assert_close_to(due[1], result.mean.cpu(), stock[1].float(), "mean")
    assert_close_to(due[2], result.moments[0].cpu(), stock[2].float(), "moments[0]")
    assert_close_to(due[3], result.moments[1].cpu(), stock[3].float(), "moments[1]")
    sums = result.partial_means.sum(1) / result.output[0, 0].numel()
    torch.testing.assert_close(sums, result.mean)


def channelwise(vector: Tensor, like: Tensor) -> Tensor:
    return vector.to(like.dtype).view(1, -1, 1, 1)


@pytest.mark.parametrize("fields", [{}, {"streamed": True, "rows": 3, "items": 2}], ids=str)
@pytest.mark.parametrize("case", FUSED, ids=str)
def test_gradient_prologue(device, dtype, configure, case, fields):
    """Both gradients of a convolution between two BatchNorms, activations and a gate."""
    draw = case.draw(1, dtype)
    input = draw.activations(case.batch, case.channels, case.size)
    weight = draw.weight(case.channels, 1, case.kernel, case.kernel)
    stride, dilation = (case.stride, case.stride), (1, 1)
    z = F.conv2d(F.pad(input, case.padding), weight, None, stride, 0, dilation, case.channels)
    z = draw.activations(*z.shape[:2], z.shape[2:])
    upstream = draw.activations(*z.shape[:2], z.shape[2:])
    gate = draw.gate(case.batch, case.channels)
    vectors = [draw.normal(case.channels, std=0.3, mean=1.0).float() for _ in range(8)]
    offset = draw.normal(case.batch, case.channels).float()

    def plain(x, w, z, up, gate, offset, s, t, factor, slope, constant, scale, xs, xt):
        before = (z * channelwise(s, z) + channelwise(t, z)).requires_grad_()
        after = apply_activation(before, "silu")
        arriving = up * gate[..., None, None] + offset.to(up.dtype)[..., None, None]
        (t2,) = torch.autograd.grad(after, before, arriving)
        t2 = t2 * channelwise(factor, z) + z * channelwise(slope, z) + channelwise(constant, z)
        seen = apply_activation(x * channelwise(xs, x) + channelwise(xt, x), "silu").detach()
        seen, w = seen.requires_grad_(), w.detach().clone().requires_grad_()
        output = F.conv2d(F.pad(seen, case.padding), w, None, stride, 0, dilation, case.channels)
        (for_weight,) = torch.autograd.grad(output, w, t2)
        w = w.detach() * channelwise(scale, w).view(-1, 1, 1, 1)
        output = F.conv2d(F.pad(seen, case.padding), w, None, stride, 0, dilation, case.channels)
        (for_input,) = torch.autograd.grad(output, seen, t2)
        return for_input, for_weight.flatten(1).t(), t2.sum((0, 2, 3))

    tensors = (input, weight, z, upstream, gate, offset, *vectors)
    due = plain(*(tensor.double() for tensor in tensors))
    stock = plain(*tensors)
    configure(**fields)
    x, w, z, up, g, o, s, t, factor, slope, constant, scale, xs, xt = (
        tensor.to(device) for tensor in tensors
    )
    gradient = Gradient(z, s, t, "silu", g, o, factor, slope, constant)
    geometry: Any = (w.shape[2:], stride, case.padding, dilation)
    for_input = gradients.input_gradient(
        up, depthwise_conv.pack_taps(w), *geometry, x.shape[2:], gradient, scale
    )
    forward = Forward(xs, xt, "silu")
    for_taps, for_bias = gradients.weight_gradient(up, gradient, x, forward, *geometry, bias=True)
    assert_close_to(due[0], for_input.cpu(), stock[0], "input")
    assert_close_to(due[1], for_taps.cpu(), stock[1].float(), "taps")
    assert_close_to(due[2], for_bias.cpu(), stock[2].float(), "bias")


# Memory and order

INTERPRETED = pytest.mark.skipif(not triton.interpreted(), reason="watches the CPU's memory")


def guarded_run(monkeypatch: Any, args: Any) -> tuple[Tensor, ...]:
    """Outputs and gradients in memory full of NaN, with guards around it."""
    memory = GuardedMemory()
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", memory.empty)
        patch.setattr(torch, "empty_like", memory.empty_like)
        results = outputs_of(outputs_and_gradients(*args))
    assert memory.check() > 0
    return results


@INTERPRETED
@pytest.mark.parametrize("stride", [1, 2])
def test_memory_and_determinism(monkeypatch, configure, stride):
    case = Case(
        batch=2, channels=8, size=(5, 9), kernel=3, stride=stride, padding="same", dilation=1
    )
    configure(streamed=True, rows=2)
    args, _ = arguments(case, torch.float32, "cpu")
    results = guarded_run(monkeypatch, args)
    assert not any(result.isnan().any() for result in results)
    assert same_bits(results, outputs_and_gradients(*args))


# The nets catch kernels that are broken on purpose

BROKEN = {
    "wrong tap": (
        "depthwise_conv_kernel",
        "taps[(STRIDE_Y * d + phase) * KERNEL_X + j]",
        "taps[(STRIDE_Y * d + phase) * KERNEL_X + KERNEL_X - 1 - j]",
    ),
    "wrong tail": (
        "depthwise_conv_kernel",
        "last = tl.minimum(first + rows, out_height)",
        "last = tl.minimum(first + rows, out_height - 1)",
    ),
    "missing mask": (
        "depthwise_conv_kernel",
        "element_ty), mask=inside)",
        "element_ty), mask=out_x < out_width)",
    ),
    "wrong row": (
        "depthwise_conv_gradient_kernels",
        "window[i // STRIDE_Y * COLUMNS + s] * values",
        "window[(DEPTH - 1 - i // STRIDE_Y) * COLUMNS + s] * values",
    ),
}


@INTERPRETED
@pytest.mark.parametrize("name", BROKEN)
def test_broken_kernels_are_caught(monkeypatch, tmp_path, configure, name):
    module, old, new = BROKEN[name]
    changed = broken_module(tmp_path, module, old, new)
    if module == "depthwise_conv_kernel":
        monkeypatch.setattr(depthwise_conv, "convolve_kernel", changed.convolve_kernel)
    else:
        monkeypatch.setattr(gradients, "weight_gradient_kernel", changed.weight_gradient_kernel)
    case = Case(batch=2, channels=8, size=(5, 9), kernel=3, stride=1, padding="same", dilation=1)
    configure(streamed=True, rows=2)
    args, _ = arguments(case, torch.float32, "cpu")
    with pytest.raises(AssertionError):
        guarded_run(monkeypatch, args)
        assert_matches(outputs_and_gradients, *args, backend="triton")


@pytest.mark.parametrize("capability", aot.DEVICES)
def test_compiles_as_promised(capability):
    compiled, broken = aot.run("depthwise_conv", capability)
    assert compiled > 0 and not broken, "\n".join(broken)


_STATIC = """
import dataclasses
import torch
from effkernels.triton.promises import Promise
from tests.triton import aot
from tests.triton.cases import broken_module
from tests.triton.test_depthwise_conv import _train

launches = aot.launches([lambda: _train(torch.bfloat16, 64, 64, 56, 3, 1)], aot.H100)
launch = next(launch for launch in launches if launch.max_registers == 168)
few = dataclasses.replace(launch, max_registers=40)
print(aot.broken_promises(few, Promise(warps=1), 90))
print(aot.broken_promises(launch, Promise(warps=64, narrowest_load=16, vector_loads=True), 90))
"""


def test_static_checks_catch_broken_promises():
    """Spills, too few warps, narrow loads."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-c", _STATIC],
        capture_output=True,
        text=True,
        env=environment,
        cwd=Path(__file__).parents[2],
    )
    assert result.returncode == 0, result.stderr
    spills, others = result.stdout.splitlines()
    assert "local memory" in spills
    assert "warps fit, 64 promised" in others and "16 are promised" in others
