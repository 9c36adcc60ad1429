"""csrc/depthwise_conv/cuda.cu against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import effkernels as ek
from effkernels import ops
from effkernels.cuda import depthwise_conv
from effkernels.cuda import depthwise_conv_gradient as gradients
from effkernels.cuda.depthwise_conv_config import DepthwiseTile
from effkernels.operands import Forward, Gradient
from effkernels.ops import ACTIVATIONS
from effkernels.ops._common import apply_activation
from effkernels.testing import assert_close_to, assert_matches
from tests.cuda.emulated import with_mistake
from tests.ops._cases import (
    Arguments,
    Case,
    assert_memory_kept,
    assert_parity,
    gradient_function,
    same_bits,
)

pytestmark = pytest.mark.usefixtures("kernels")

# Around strips of 4 and 7 columns, tiles of 16 to 128 channels, padding of every kind.
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
        (2, 40, 5, 15, 3, 1, "symmetric", 1),
        (3, 33, 6, 5, 3, 2, "same", 1),
        (1, 72, 4, 8, 5, 1, (0, 1, 2, 0), 1),
        (2, 24, 6, 17, 5, 2, "symmetric", 1),
        (1, 24, 3, 9, 7, 1, "symmetric", 1),
        (1, 17, 6, 7, 7, 2, (5, 1, 0, 4), 1),
        (1, 24, 1, 1, 3, 1, 4, 1),
        (0, 8, 5, 5, 3, 1, "same", 1),
        (1, 40, 7, 6, 3, 2, "symmetric", 2),
        (1, 24, 2, 2, 9, 1, "symmetric", 1),
        (2, 8, 5, 6, 1, 2, 0, 1),
    )
}


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


@pytest.mark.parametrize("name", CASES)
def test_matches_reference(device, dtype, name):
    case = CASES[name]
    assert_parity("native", run, lambda repetition: arguments(case, dtype, device, repetition))


@pytest.mark.parametrize("name", CASES)
def test_gradient(device, dtype, name):
    case = CASES[name]
    gradients = gradient_function(ops.depthwise_conv)
    assert_parity(
        "native", gradients, lambda repetition: arguments(case, dtype, device, repetition)
    )


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
    assert_parity(
        "native", run, lambda repetition: arguments(case, torch.float32, device, repetition)
    )


def outputs_and_gradients(
    input: Tensor, weight: Tensor, scale: Tensor, bias: Tensor, **options: Any
) -> tuple[Tensor, ...]:
    tensors = {"input": input, "weight": weight, "scale": scale, "bias": bias}
    differentiate = gradient_function(ops.depthwise_conv)
    return (*run(tensors, options), *differentiate(tensors, options))


@pytest.mark.parametrize("name", list(CASES)[:6])
def test_memory_around_tensors(monkeypatch, device, dtype, name):
    (tensors, chosen), _ = arguments(CASES[name], dtype, device)
    call = tuple(tensors[name] for name in ("input", "weight", "scale", "bias"))
    assert_memory_kept(monkeypatch, outputs_and_gradients, (call, chosen))


def test_layouts(device):
    """Vectors with gaps between their elements, an input that is not channels_last."""
    case = Case(kernel=(5, 3), stride=(1, 2), channels=24)
    draw = case.draw(0, torch.float32)
    tensors = {
        "input": draw.activations(2, 24, (7, 6), "sliced").to(device),
        "weight": draw.weight(24, 1, 3, 6)[..., ::2].to(device),
        "scale": draw.normal(24, 2)[:, 0].to(device),
        "bias": draw.normal(1).expand(24).to(device),
    }
    chosen = {"stride": 2, "padding": "same", "return_mean": True}
    assert_parity("native", run, lambda _: ((tensors, chosen), {}))


@pytest.mark.parametrize(
    ("needed", "stride"), [((0,), 1), ((0,), 2), ((1,), 1), ((2,), 2), ((3,), 1), ((0, 3), 2)]
)
def test_only_needed_gradients(device, needed, stride):
    case = Case(
        batch=2, channels=24, size=(5, 9), kernel=3, stride=stride, padding="same", dilation=1
    )

    def differentiate(tensors: dict[str, Tensor], chosen: dict[str, Any]) -> tuple[Tensor, ...]:
        values = [tensors[name] for name in ("input", "weight", "scale", "bias")]
        for index in needed:
            values[index] = values[index].detach().requires_grad_()
        output = ops.depthwise_conv(*values[:2], values[3], scale=values[2], **chosen)[0]
        return torch.autograd.grad(output.square().sum(), [values[index] for index in needed])

    assert_parity(
        "native",
        differentiate,
        lambda repetition: arguments(case, torch.float32, device, repetition),
    )


# Tiles that the heuristic would not choose at these sizes: several blocks across and down an image,
# images side by side, pairs that are no whole warp.

TILES = [
    DepthwiseTile(pairs=8, strips=1, images=4, rows=2),
    DepthwiseTile(pairs=24, strips=2, images=2, rows=3),
    DepthwiseTile(pairs=16, strips=3, images=1, rows=1),
]


@pytest.fixture
def configure(monkeypatch):
    """A function that fixes the tile, and the processors that share the sums for the taps."""

    def override(tile: DepthwiseTile, processors: int = 132) -> None:
        monkeypatch.setattr(depthwise_conv, "choose", lambda *_: tile)
        monkeypatch.setattr(gradients, "device_limits", lambda _: (processors, 0))

    return override


@pytest.mark.parametrize(
    ("tile", "k", "stride", "processors"),
    [
        (TILES[0], 3, 1, 1),
        (TILES[0], 5, 2, 132),
        (TILES[1], 3, 2, 1),
        (TILES[1], 5, 1, 132),
        (TILES[2], 5, 1, 1),
        (TILES[2], 5, 2, 1),
    ],
    ids=str,
)
def test_tiles(device, configure, tile, k, stride, processors):
    case = Case(
        batch=3, channels=24, size=(5, 16), kernel=k, stride=stride, padding="same", dilation=1
    )
    configure(tile, processors)
    (tensors, chosen), _ = arguments(case, torch.bfloat16, device)
    call = [tensors[name] for name in ("input", "weight", "scale", "bias")]
    assert_matches(outputs_and_gradients, *call, **chosen)
    assert same_bits(outputs_and_gradients(*call, **chosen), outputs_and_gradients(*call, **chosen))


# What other ops use: prologues, statistics, sums

FUSED = [
    Case(batch=2, channels=24, size=(5, 9), kernel=3, stride=1, padding=(1, 1, 1, 1)),
    Case(batch=3, channels=17, size=(6, 5), kernel=5, stride=2, padding=(2, 2, 2, 2)),
    Case(batch=1, channels=8, size=(6, 16), kernel=5, stride=1, padding=(2, 2, 2, 2)),
    Case(batch=1, channels=8, size=(2, 3), kernel=3, stride=3, padding=(1, 2, 3, 1)),
]


def channelwise(vector: Tensor, like: Tensor) -> Tensor:
    return vector.to(like.dtype).view(1, -1, 1, 1)


@pytest.mark.parametrize("tile", [None, TILES[0]], ids=str)
@pytest.mark.parametrize("case", FUSED, ids=str)
def test_prologue_and_statistics(device, dtype, configure, case, tile):
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
    if tile is not None:
        configure(tile)
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
    assert result.mean is not None and result.moments is not None
    assert result.partial_means is not None
    assert_close_to(due[0], result.output.cpu(), stock[0], "output")
    # In float32 whatever the dtype: as good as PyTorch's of its own result.
    assert_close_to(due[1], result.mean.cpu(), stock[1].float(), "mean")
    assert_close_to(due[2], result.moments[0].cpu(), stock[2].float(), "moments[0]")
    assert_close_to(due[3], result.moments[1].cpu(), stock[3].float(), "moments[1]")
    sums = result.partial_means.sum(1) / result.output[0, 0].numel()
    torch.testing.assert_close(sums, result.mean)


def test_many_moments(device, configure):
    """More partial results than one block merges at a time."""
    draw = Case(name="moments").draw(0, torch.float32)
    input = draw.activations(9, 8, (62, 8)) + 3
    configure(DepthwiseTile(pairs=8, strips=1, images=1, rows=1))
    result = depthwise_conv.convolve(
        input.to(device),
        torch.ones(9, 8, device=device),
        (3, 3),
        (1, 1),
        (0, 0, 0, 0),
        (1, 1),
        moments=True,
    )
    assert result.moments is not None
    due = F.avg_pool2d(input.double(), 3, 1) * 9
    torch.testing.assert_close(result.moments[0].cpu(), due.mean((0, 2, 3)).float())
    variance = due.var((0, 2, 3), correction=0).float()
    torch.testing.assert_close(result.moments[1].cpu(), variance)


@pytest.mark.parametrize("tile", [None, TILES[0]], ids=str)
@pytest.mark.parametrize("case", FUSED, ids=str)
def test_gradient_prologue(device, dtype, configure, case, tile):
    """Both gradients of a convolution between two BatchNorms, activations and a gate."""
    draw = case.draw(1, dtype)
    input = draw.activations(case.batch, case.channels, case.size)
    weight = draw.weight(case.channels, 1, case.kernel, case.kernel)
    stride, dilation = (case.stride, case.stride), (1, 1)
    z = F.conv2d(F.pad(input, case.padding), weight, None, stride, 0, dilation, case.channels)
    z = draw.activations(z.shape[0], z.shape[1], z.shape[2:])
    upstream = draw.activations(z.shape[0], z.shape[1], z.shape[2:])
    gate = draw.gate(case.batch, case.channels)
    vectors = [draw.normal(case.channels, std=0.3, mean=1.0).float() for _ in range(8)]
    offset = draw.normal(case.batch, case.channels).float()

    def plain(
        x: Tensor,
        w: Tensor,
        z: Tensor,
        up: Tensor,
        gate: Tensor,
        offset: Tensor,
        s: Tensor,
        t: Tensor,
        factor: Tensor,
        slope: Tensor,
        constant: Tensor,
        scale: Tensor,
        xs: Tensor,
        xt: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
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
    if tile is not None:
        configure(tile)
    x, w, z, up, g, o, s, t, factor, slope, constant, scale, xs, xt = (
        tensor.to(device) for tensor in tensors
    )
    gradient = Gradient(z, s, t, "silu", g, o, factor, slope, constant)
    forward = Forward(xs, xt, "silu")
    geometry: Any = (w.shape[2:], stride, case.padding, dilation)
    taps = depthwise_conv.pack_taps(w)
    alone = (
        gradients.input_gradient(up, taps, *geometry, x.shape[2:], gradient, scale),
        *gradients.weight_gradient(up, gradient, x, forward, *geometry, bias=True),
    )
    both = gradients.both_gradients(up, gradient, x, forward, taps, *geometry, scale)
    for results in (alone, both):
        assert_close_to(due[0], results[0].cpu(), stock[0], "input")
        assert_close_to(due[1], results[1].cpu(), stock[1].float(), "taps")
        assert_close_to(due[2], results[2].cpu(), stock[2].float(), "bias")


# The host refuses what cannot run


def test_what_cannot_run_is_refused(device, configure):
    input = torch.zeros(1, 8, 4, 4, device=device).to(memory_format=torch.channels_last)
    taps = torch.zeros(9, 8, device=device)
    geometry: Any = ((3, 3), (1, 1), (1, 1, 1, 1), (1, 1))
    for tile, reason in (
        (DepthwiseTile(7, 1, 1, 4), "whole vectors"),
        (DepthwiseTile(64, 3, 1, 4), "too large"),
        (DepthwiseTile(0, 1, 1, 4), "tile"),
    ):
        configure(tile)
        with pytest.raises((RuntimeError, ValueError), match=reason):
            depthwise_conv.convolve(input, taps, *geometry)


# The nets catch kernels that are broken on purpose


def _check() -> None:
    """Small calls that reach every part of the tuned kernels."""
    torch.manual_seed(0)
    for k, stride, channels, tile in ((3, 1, 10, (4, 1, 2, 2)), (5, 2, 8, (4, 1, 1, 3))):
        case = Case(
            batch=2,
            channels=channels,
            size=(4, 9),
            kernel=k,
            stride=stride,
            padding="symmetric",
            dilation=1,
        )
        (tensors, chosen), _ = arguments(case, torch.float32, "cpu")
        call = tuple(tensors[name] for name in ("input", "weight", "scale", "bias"))
        with ek.use_backend("native"), pytest.MonkeyPatch.context() as patch:
            patch.setattr(depthwise_conv, "choose", lambda *_, tile=tile: DepthwiseTile(*tile))
            patch.setattr(gradients, "device_limits", lambda _: (1, 0))
            assert_matches(outputs_and_gradients, *call, **chosen)
            assert_memory_kept(patch, outputs_and_gradients, (call, chosen))
            draw = case.draw(1, torch.float32)
            z = draw.activations(2, channels, (4, 9)) + 3
            vector = draw.normal(channels)
            taps = depthwise_conv.pack_taps(tensors["weight"])
            got = depthwise_conv.convolve(
                z,
                taps,
                (k, k),
                (stride, stride),
                (k // 2,) * 4,
                (1, 1),
                Forward(vector, vector, "silu"),
                moments=True,
            )
        seen = F.silu(z * channelwise(vector, z) + channelwise(vector, z))
        due = F.conv2d(seen, tensors["weight"], None, stride, k // 2, 1, channels)
        torch.testing.assert_close(got.output, due, rtol=1e-4, atol=1e-4)
        assert got.moments is not None
        variance = due.var((0, 2, 3), correction=0)
        torch.testing.assert_close(got.moments[1], variance, rtol=1e-4, atol=1e-4)


MISTAKES = {
    "a tap": ("forward", "taps[i * kKernel + j]", "taps[i * kKernel + kKernel - 1 - j]"),
    "a row too early": ("forward", "wait_copies<kRing - 2>()", "wait_copies<kRing - 1>()"),
    "no barrier": ("forward", "    __syncthreads();\n    fetch(", "    fetch("),
    "a channel too many": (
        "window",
        "c < kVector<T> && c < left; c++) {\n        to[j",
        "c < kVector<T> && c <= left; c++) {\n        to[j",
    ),
    "no left edge": (
        "window",
        "static_cast<unsigned>(x + at) < static_cast<unsigned>(width)",
        "x + at < width",
    ),
    "an upstream row": ("gradient", "slot - e < 0 ? slot - e + kRing", "slot - e < 1 ? kRing - 1"),
    "a bias twice": ("gradient", "row_block == 0 ? 0 : begin", "row_block == 0 ? 0 : begin - 1"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_found(mistake):
    name, old, new = MISTAKES[mistake]
    assert with_mistake((f"depthwise_conv/cuda_{name}.h", old, new), _check)


def test_right_kernels_pass_where_mistakes_are_found():
    assert with_mistake(None, _check) == ""
