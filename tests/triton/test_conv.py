"""Convolutions by implicit GEMM (whole and split), by the stem's kernel and by cuDNN's stand-in."""

from __future__ import annotations

import dataclasses
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

import effkernels as ek
from effkernels import ops
from effkernels.ops import ACTIVATIONS
from effkernels.testing import assert_matches
from effkernels.triton import DTYPES, conv_config
from effkernels.triton.conv_config import CUDNN, IMPLICIT_GEMM, ConvConfig
from effkernels.triton.launch import H100
from tests.ops._cases import (
    AFFINES,
    LAYOUTS,
    Arguments,
    Case,
    GuardedMemory,
    assert_parity,
    both,
    geometry_size,
    gradient_function,
    has_output,
    pairwise,
    same_bits,
)
from tests.triton import aot
from tests.triton.cases import broken_module

# Tiles about as small as tests' tensors; a GPU's dot needs 16 of everything.
CONFIGS = {
    "chosen": None,
    "cudnn": ConvConfig(CUDNN),
    "gemm": ConvConfig(IMPLICIT_GEMM, 64, 32, 16, 1, 4, 2),
    "wide-step": ConvConfig(IMPLICIT_GEMM, 32, 16, 64, 1, 4, 3),
    "split": ConvConfig(IMPLICIT_GEMM, 64, 32, 32, 3, 4, 2),
}
AXES = {
    "outputs": (1, 8, 17, 24, 33),
    "channels": (1, 3, 5, 8, 16, 24, 32, 33),
    "size": ((1, 1), (1, 9), (5, 2), (7, 7), (6, 11)),
    "kernel": (1, 3, (3, 5), 5),
    "stride": (1, 2, (2, 1), 3),
    "padding": ("symmetric", "same", 0, (2, 1), (0, 1, 2, 0), (3, 0, 0, 5)),
    "dilation": (1, 2, (2, 1)),
    "batch": (1, 2, 0),
    "affine": AFFINES,
    "activation": ACTIVATIONS,
    "layout": LAYOUTS,
    "residual": (None, "channels_last", "nchw", "sliced"),
    "config": tuple(CONFIGS),
    "dtype": DTYPES,
}
GRADIENT_AXES = {
    **AXES,
    "outputs": (1, 8, 17, 40),
    "channels": (1, 3, 8, 17),
    "size": ((1, 9), (5, 2), (7, 7)),
    "kernel": (1, 3),
    "padding": ("symmetric", "same", (0, 1, 2, 0)),
    "batch": (1, 2),
    "layout": ("channels_last", "nchw"),
    "residual": (None, "channels_last"),
    "config": ("chosen", "cudnn", "split"),
}
# Where the slope jumps, one more rounding before it moves a whole gradient: whether that happens to
# one of these few elements says nothing in a dtype of two bytes.
SMOOTH = ("none", "silu", "sigmoid")


def has_gradient(case: Case) -> bool:
    return has_output(case) and (case.dtype == torch.float32 or case.activation in SMOOTH)


# The stems of EfficientNet and ResNet, and layers of FusedMBConv and ResNet, at small sizes.
LAYERS = [
    Case(batch=n, channels=c, outputs=k, size=s, kernel=r, stride=d, layout=layout, config=config)
    for n, c, k, s, r, d, layout, config in (
        (1, 3, 32, (32, 30), 3, 2, "nchw", "chosen"),
        (2, 3, 48, (19, 17), 3, 2, "channels_last", "chosen"),
        (1, 3, 64, (24, 24), 7, 2, "nchw", "chosen"),
        (1, 3, 64, (24, 24), 7, 2, "channels_last", "chosen"),
        (1, 24, 96, (13, 12), 3, 2, "channels_last", "chosen"),
        (1, 48, 48, (12, 12), 3, 1, "channels_last", "chosen"),
        (1, 64, 64, (14, 14), 3, 1, "channels_last", "chosen"),
        (1, 128, 32, (7, 7), 3, 1, "channels_last", "chosen"),
        (1, 64, 128, (14, 14), 1, 2, "channels_last", "chosen"),
    )
]
# EfficientNetV2-S's stages: C, K, kernel, stride, size.
FUSED_MBCONV = ((24, 24, 3, 1, 192), (24, 96, 3, 2, 192), (48, 192, 3, 1, 96), (64, 256, 3, 1, 48))


def configure(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    config = CONFIGS[name]
    if config is not None:
        monkeypatch.setattr(conv_config, "heuristic", lambda problem, device: config)


def arguments(
    case: Case, dtype: torch.dtype, device: torch.device, repetition: int = 0
) -> Arguments:
    draw = case.draw(repetition, dtype)
    options = {
        "stride": case.stride,
        "padding": getattr(case, "padding", "symmetric"),
        "dilation": getattr(case, "dilation", 1),
    }
    tensors = {
        "input": draw.activations(case.batch, case.channels, case.size, case.layout),
        "weight": draw.weight(case.outputs, case.channels, *both(case.kernel)),
        **draw.affine(case.outputs, getattr(case, "affine", "scale32+bias32")),
    }
    residual = getattr(case, "residual", None)
    if residual is not None:
        size = geometry_size(Case(size=case.size, kernel=case.kernel, **options))
        tensors["residual"] = draw.activations(case.batch, case.outputs, size, residual)
    options["activation"] = getattr(case, "activation", "silu")
    return ({name: tensor.to(device) for name, tensor in tensors.items()}, options), {}


def run(tensors: dict[str, torch.Tensor], options: dict[str, Any]) -> torch.Tensor:
    return ops.conv(**tensors, **options)


@pytest.mark.parametrize("case", pairwise(AXES, has_output), ids=str)
def test_matches_reference(device, case, monkeypatch):
    configure(monkeypatch, case.config)
    assert_parity("triton", run, partial(arguments, case, case.dtype, device))


@pytest.mark.parametrize("case", LAYERS, ids=str)
def test_real_layers(device, dtype, case, monkeypatch):
    configure(monkeypatch, case.config)
    assert_parity("triton", run, partial(arguments, case, dtype, device))


@pytest.mark.parametrize("case", pairwise(GRADIENT_AXES, has_gradient), ids=str)
def test_gradients(device, case, monkeypatch):
    configure(monkeypatch, case.config)
    gradients = gradient_function(ops.conv)
    drawn = partial(arguments, case, case.dtype, device)
    assert_parity("triton", gradients, drawn, channels_last=False)


SMALL = Case(
    batch=2,
    channels=16,
    outputs=24,
    size=(6, 5),
    kernel=(3, 5),
    stride=1,
    padding=(3, 1, 2, 0),
    layout="channels_last",
    residual="channels_last",
)
STEM = Case(**{**vars(SMALL), "channels": 3, "layout": "nchw"})
SCALED = ("input", "weight", "bias", "residual", "scale")


@pytest.mark.parametrize("needed", [*[(name,) for name in SCALED], ("weight", "scale")], ids=str)
@pytest.mark.parametrize("activation", ["none", "relu6"])
def test_only_needed_gradients(device, needed, activation):
    """Each gradient alone is what it is among all."""
    (tensors, options), _ = arguments(SMALL, torch.float32, device)
    options["activation"] = activation
    everything = torch.autograd.grad(
        run({n: t.requires_grad_() for n, t in tensors.items()}, options).square().sum(),
        [tensors[name] for name in needed],
    )
    alone = {n: t.detach().requires_grad_(n in needed) for n, t in tensors.items()}
    run(alone, options).square().sum().backward()
    for name, due in zip(needed, everything, strict=True):
        torch.testing.assert_close(alone[name].grad, due)
    assert all(alone[name].grad is None for name in SCALED if name not in needed)


@pytest.mark.parametrize("case", [SMALL, STEM], ids=str)
@pytest.mark.parametrize("config", ["cudnn", "gemm", "split"])
def test_wide_offsets(device, dtype, case, config, monkeypatch):
    """64-bit offsets, as of tensors of 2³¹ elements, give the same bits."""
    configure(monkeypatch, config)
    gradients = gradient_function(ops.conv)
    ((tensors, options), _) = arguments(case, dtype, device)
    narrow = gradients(tensors, options)
    monkeypatch.setattr("effkernels.triton.conv.is_wide", lambda *tensors: True)
    assert same_bits(narrow, gradients(tensors, options))


@pytest.mark.parametrize("config", ["cudnn", "gemm", "split"])
def test_same_bits_twice(device, dtype, config, monkeypatch):
    configure(monkeypatch, config)
    gradients = gradient_function(ops.conv)
    ((tensors, options), _) = arguments(SMALL, dtype, device)
    assert same_bits(gradients(tensors, options), gradients(tensors, options))


@pytest.mark.parametrize("case", [SMALL, STEM], ids=str)
@pytest.mark.parametrize("config", ["cudnn", "gemm", "split"])
def test_every_element_is_written(device, dtype, case, config, monkeypatch):
    configure(monkeypatch, config)
    gradients = gradient_function(ops.conv)
    ((tensors, options), _) = arguments(case, dtype, device)
    due = gradients(tensors, options)
    assert same_bits(due, in_poisoned_memory(monkeypatch, gradients, tensors, options))


def in_poisoned_memory(monkeypatch: Any, function: Callable[..., Any], *args: Any) -> Any:
    """``function`` where new memory is full of NaN, with guards around that must stay so."""
    memory = GuardedMemory()
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", memory.empty)
        patch.setattr(torch, "empty_like", memory.empty_like)
        result = function(*args)
    memory.check()
    return result


def test_kept_weights_follow_the_weight(device, monkeypatch):
    for case, config in ((SMALL, "gemm"), (STEM, "chosen")):
        configure(monkeypatch, config)
        ((tensors, options), _) = arguments(case, torch.float32, device)
        run(tensors, options)
        tensors["weight"].mul_(-0.5)
        with ek.use_backend("reference"):
            due = run(tensors, options)
        torch.testing.assert_close(run(tensors, options), due)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_special_values_stay_where_the_window_sees_them(device, value, monkeypatch):
    configure(monkeypatch, "gemm")
    for channels in (3, 8, 16):
        case = Case(**{**vars(SMALL), "channels": channels})
        ((tensors, options), _) = arguments(case, torch.float32, device)
        tensors["input"][0, 1, 4, 3] = value
        with ek.use_backend("reference"):
            due = run(tensors, options)
        torch.testing.assert_close(run(tensors, options), due, equal_nan=True)


def problem(layer: tuple[int, int, int, int, int], batch: int, **options: Any) -> Any:
    channels, outputs, kernel, stride, size = layer
    out = (size - 1) // stride + 1
    sizes = (batch, channels, size, size, outputs, out, out, f"{kernel}x{kernel}")
    rest = {"symmetric": True, "itemsize": 2, "epilogue": True, "residual": False, **options}
    return conv_config.ConvProblem(*sizes, f"{stride}x{stride}", "1x1", precision="tf32", **rest)


def test_heuristic_says_what_it_says():
    """The choices that its description names."""

    def chosen(*args: Any, **options: Any) -> ConvConfig:
        return conv_config.heuristic(problem(*args, **options), H100)

    assert chosen((3, 32, 3, 2, 224), 256).implementation == IMPLICIT_GEMM
    assert chosen((17, 32, 3, 1, 56), 256).implementation == CUDNN
    assert chosen((512, 512, 3, 1, 7), 1).splits == 16
    assert chosen((256, 256, 3, 1, 14), 256).implementation == CUDNN
    assert all(chosen(layer, 256).implementation == IMPLICIT_GEMM for layer in FUSED_MBCONV[:3])


# Ahead of time


def aot_calls() -> Iterator[Callable[[], Any]]:
    """What the heuristic chooses, and then the implicit GEMM wherever it does not."""
    yield from aot.network_calls("conv")
    chosen = conv_config.heuristic
    conv_config.heuristic = conv_config.implicit_gemm
    try:
        yield from aot.network_calls("conv")
    finally:
        conv_config.heuristic = chosen
    for dtype in DTYPES:
        for layer in FUSED_MBCONV:
            yield partial(_fused_mbconv, *layer, dtype)
        for batch in (1, 256):
            yield partial(_fused_mbconv, 64, 64, 3, 1, 56, dtype, batch, residual=True)
            yield partial(_fused_mbconv, 128, 128, 3, 1, 28, dtype, batch, residual=True)
        yield partial(_fused_mbconv, *FUSED_MBCONV[0], dtype, batch=2**31 // (24 * 192**2) + 1)
    allow = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield partial(_fused_mbconv, *FUSED_MBCONV[0], torch.float32)
        yield partial(_fused_mbconv, 3, 32, 3, 2, 224, torch.float32)
    finally:
        torch.backends.cudnn.allow_tf32 = allow


def _fused_mbconv(
    channels: int,
    outputs: int,
    kernel: int,
    stride: int,
    size: int,
    dtype: torch.dtype,
    batch: int = 256,
    residual: bool = False,
) -> None:
    """With a folded BatchNorm, as a network in inference or with frozen statistics runs it."""
    tensors = {
        "input": torch.empty(batch, channels, size, size, dtype=dtype),
        "weight": torch.empty(outputs, channels, kernel, kernel, dtype=dtype),
        "scale": torch.empty(outputs),
        "bias": torch.empty(outputs),
    }
    if residual:
        tensors["residual"] = torch.empty(batch, outputs, size, size, dtype=dtype)
    function = partial(ops.conv, stride=stride, activation="silu")
    if channels > 4:
        tensors["input"] = tensors["input"].to(memory_format=torch.channels_last)
    aot.differentiate(lambda tensors: function(**tensors), tensors)


@pytest.mark.parametrize("capability", aot.DEVICES)
def test_compiles_as_promised(capability):
    compiled, broken = aot.run("conv", capability)
    assert compiled > 0 and not broken, "\n".join(broken)


# Kernels that are broken on purpose: the nets must catch them.

BROKEN = {
    "wrong tap": ("conv_gemm", SMALL, "tap // kernel_width * d", "tap // kernel_height * d"),
    "odometer turns late": ("conv_gemm", SMALL, "tap_column == kernel_width", "tap_column > 9"),
    "no left and right border": (
        "conv_gemm",
        SMALL,
        "inside(tl.where(inside(h, height), w, _OUTSIDE), width)",
        "inside(h, height)",
    ),
    "last product forgotten": ("conv_gemm", SMALL, "seen & (d < depth)", "seen & (d < depth - 1)"),
    "last pixel not written": (
        "conv_gemm",
        SMALL,
        "mask = (m < rows)[:, None]",
        "mask = (m < rows - 1)[:, None]",
    ),
    "wrong tap of the stem": (
        "conv_gemm",
        STEM,
        "w = d % KERNEL_WIDTH",
        "w = d % KERNEL_HEIGHT",
    ),
    "one part not added": ("conv_epilogue", SMALL, "range(1, splits)", "range(2, splits)"),
    "slope of the wrong place": ("conv_epilogue", SMALL, "raw * scale + bias", "raw + bias"),
    "sums of another factor": ("conv_epilogue", SMALL, "scale_sums += t * raw", "scale_sums += t"),
    "last pixel not summed": (
        "conv_epilogue",
        SMALL,
        "mask = (m < rows)[:, None]",
        "mask = (m < rows - 1)[:, None]",
    ),
}
FLAT = {"wrong tap", "last product forgotten"}  # need steps that do not divide the channels
SPLIT = {"one part not added"}


@pytest.mark.parametrize("mistake", BROKEN)
def test_parity_catches(device, mistake, monkeypatch, tmp_path):
    name, case, old, new = BROKEN[mistake]
    config = ConvConfig(IMPLICIT_GEMM, 32, 16, 32 if mistake in FLAT else 16, 3, 4, 2)
    if mistake not in SPLIT:
        config = dataclasses.replace(config, splits=1)
    monkeypatch.setattr(conv_config, "heuristic", lambda problem, device: config)
    gradients = gradient_function(ops.conv)

    def poisoned(*args: Any) -> Any:
        return in_poisoned_memory(monkeypatch, gradients, *args)

    ((tensors, options), _) = arguments(case, torch.float32, device)
    check = partial(assert_matches, poisoned, tensors, options, backend="triton")
    check()
    module = broken_module(tmp_path, name, old, new)
    for kernel in ("_conv_kernel", "_stem_kernel", "_epilogue_kernel", "_gradient_kernel"):
        if hasattr(module, kernel):
            monkeypatch.setattr(f"effkernels.triton.conv.{kernel}", getattr(module, kernel))
    with pytest.raises(AssertionError):
        check()


def print_broken_promises(capability: int) -> None:
    """Of launches that no heuristic would make, what is wrong with each, as one JSON object."""
    (launch,) = (
        found
        for found in aot.launches(
            [partial(_fused_mbconv, *FUSED_MBCONV[0], torch.bfloat16)], aot.DEVICES[capability]
        )
        if found.kernel.fn.__name__ == "_conv_kernel"
        if dict(found.constants)["ACTIVATION"] == "silu"
    )

    def changed(num_warps: int, num_stages: int, **changes: Any) -> list[str]:
        constants = tuple((n, changes.get(n, value)) for n, value in launch.constants)
        other = dataclasses.replace(
            launch, constants=constants, num_warps=num_warps, num_stages=num_stages
        )
        return aot.broken_promises(other, conv_config.promise(launch), capability)

    print(
        json.dumps(
            {
                "as it is": changed(launch.num_warps, launch.num_stages),
                "no vectors": changed(4, 1, VECTOR=1),
                "spills": changed(4, 3, BLOCK_M=128, BLOCK_N=256),
                "shared memory": changed(8, 8, BLOCK_N=128),
            }
        )
    )


def test_static_checks_catch():
    command = "from tests.triton import test_conv; test_conv.print_broken_promises(80)"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    output = subprocess.run(
        [sys.executable, "-c", command],
        capture_output=True,
        text=True,
        env=environment,
        cwd=Path(__file__).parents[2],
    )
    assert output.returncode == 0, output.stderr
    found = {name: "; ".join(wrong) for name, wrong in json.loads(output.stdout).items()}
    assert found["as it is"] == ""
    assert "no load of 16 bytes" in found["no vectors"]
    assert "local memory" in found["spills"]
    assert "shared memory a block" in found["shared memory"]
