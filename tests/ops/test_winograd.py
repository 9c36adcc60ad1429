"""conv by Winograd's algorithm, on shapes of all kinds: also those that it is too slow for."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import effkernels as ek
from effkernels import native, ops
from effkernels.ops import ACTIVATIONS
from effkernels.testing import assert_matches

from ._cases import (
    AFFINES,
    LAYOUTS,
    PADDINGS,
    Case,
    Draw,
    assert_memory_kept,
    assert_parity,
    assert_threads_agree,
    cases_of,
    has_output,
    pairwise,
    random_cases,
    same_bits,
)
from .test_conv import arguments

WIDTHS = (2, 4)  # of tiles

FIXED = {"kernel": (3,), "stride": (1,), "dilation": (1,)}
AXES = {
    **FIXED,
    "outputs": (1, 15, 16, 17, 31, 32, 33, 48, 49, 65),
    "channels": (5, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 129),  # with 4 images may be planar
    "size": (
        *((1, 1), (2, 2), (3, 3), (4, 4), (5, 5), (1, 9), (2, 3), (5, 2), (9, 1)),
        *((7, 7), (8, 6), (3, 13), (14, 15), (6, 8), (10, 29)),
    ),
    "padding": PADDINGS,
    "batch": (1, 2, 0, 3),
    "affine": AFFINES,
    "activation": ACTIVATIONS,
    "layout": LAYOUTS,
    "residual": (None, *LAYOUTS),
}
RANDOM = {
    **{name: st.sampled_from(values) for name, values in AXES.items()},
    "outputs": st.integers(1, 70),
    "channels": st.integers(5, 70),
    "size": st.tuples(st.integers(1, 19), st.integers(1, 19)),
    "padding": st.one_of(
        st.sampled_from(("symmetric", "same")), st.tuples(*[st.integers(0, 8)] * 4)
    ),
    "batch": st.integers(1, 3),
}
# Layers of ResNet, with as many images as threads share them differently.
LAYERS = [
    Case(batch=n, channels=c, outputs=c, size=(s, s), kernel=3, stride=1, residual="channels_last")
    for n, c, s in ((1, 64, 56), (2, 128, 28), (1, 256, 14), (1, 512, 7), (3, 96, 13))
]


def force(monkeypatch: Any, width: int) -> None:
    """All convolutions that can, run with these tiles."""
    monkeypatch.setattr(native, "winograd_width", lambda *_: width)


@pytest.fixture(params=WIDTHS, ids=lambda width: f"2x{width}")
def tiles(request: Any, monkeypatch: Any) -> int:
    force(monkeypatch, request.param)
    return request.param


@pytest.mark.parametrize("case", pairwise(AXES, has_output), ids=str)
def test_matches_reference(kernels, dtype, tiles, case):
    assert_parity(kernels, ops.conv, partial(arguments, case, dtype))


@pytest.mark.parametrize("case", LAYERS, ids=str)
def test_real_layers(kernels, dtype, tiles, case):
    assert_parity(kernels, ops.conv, partial(arguments, case, dtype))


@random_cases
@given(case=cases_of(RANDOM).filter(has_output))
def test_random_shapes(kernels, dtype, tiles, case):
    assert_parity(kernels, ops.conv, partial(arguments, case, dtype))


@pytest.mark.parametrize("case", LAYERS, ids=str)
def test_threads_agree(native_kernels, dtype, tiles, case):
    assert_threads_agree(ops.conv, arguments(case, dtype))


@pytest.mark.parametrize("size", [(5, 13), (8, 8)], ids=str)
@pytest.mark.parametrize("outputs", [1, 17, 48])
@pytest.mark.parametrize("channels", [5, 16, 33])
def test_memory(native_kernels, dtype, tiles, monkeypatch, outputs, channels, size):
    case = Case(
        outputs=outputs,
        channels=channels,
        batch=2,
        size=size,
        kernel=3,
        stride=1,
        padding="same",
        layout="channels_last",
        residual="channels_last",
    )
    assert_memory_kept(monkeypatch, ops.conv, arguments(case, dtype))


def test_images_do_not_depend_on_each_other(native_kernels, dtype, tiles):
    draw = Draw(0, dtype)
    input, weight = draw.activations(5, 40, (9, 11)), draw.weight(33, 40, 3, 3)
    together = ops.conv(input, weight, activation="silu")
    for index in range(5):
        alone = ops.conv(input[index : index + 1], weight, activation="silu")
        assert same_bits(together[index : index + 1], alone)


# Values that the transforms would spread

SPECIAL = [torch.nan, torch.inf, -torch.inf]
PLACES = [(0, 0), (0, 8), (4, 5), (5, 4), (6, 9), (8, 0), (9, 10)]


@pytest.mark.parametrize("value", SPECIAL)
def test_special_values_stay_where_the_window_sees_them(kernels, dtype, tiles, value):
    draw = Draw(3, dtype)
    input, weight = draw.activations(2, 20, (10, 11)), draw.weight(50, 20, 3, 3)
    for y, x in PLACES:
        spoilt = input.clone()
        spoilt[1, 3, y, x] = value
        for activation in ("none", "silu"):
            assert_matches(ops.conv, spoilt, weight, activation=activation, backend=kernels)


def test_many_special_values(kernels, dtype, tiles):
    """Infinities of both signs, which meet, and weights of 0, which make NaN of them."""
    draw = Draw(4, dtype)
    input, weight = draw.activations(2, 33, (9, 30)), draw.weight(50, 33, 3, 3)
    choice = torch.rand(input.shape, generator=draw.generator)
    input[choice < 0.002] = torch.inf
    input[choice > 0.998] = -torch.inf
    weight[torch.rand(weight.shape, generator=draw.generator) < 0.2] = 0.0
    residual = draw.activations(2, 50, (9, 30))
    assert_matches(ops.conv, input, weight, residual=residual, activation="relu", backend=kernels)


@pytest.mark.parametrize("value", SPECIAL)
def test_special_weights_spoil_their_channel_only(kernels, dtype, tiles, value):
    draw = Draw(5, dtype)
    input, weight = draw.activations(1, 20, (10, 11)), draw.weight(50, 20, 3, 3)
    weight[7, 3, 1, 2] = value
    weight[40, 0, 0, 0] = value
    assert_matches(ops.conv, input, weight, backend=kernels)


@pytest.mark.parametrize("scale", [1e37, 3e38])
def test_values_that_overflow_in_the_transforms_only(kernels, dtype, tiles, scale):
    draw = Draw(6, dtype)
    input = draw.uniform(1, 20, 9, 13, low=-1.0, high=1.0) * scale
    weight = draw.weight(33, 20, 3, 3) * 0.01
    assert torch.nn.functional.conv2d(input.double(), weight.double()).abs().max() < 3e38
    assert_matches(ops.conv, input, weight, backend=kernels)


def test_far_from_special_values_nothing_changes(native_kernels, dtype, tiles):
    """Not even a rounding, in tiles that see none."""
    draw = Draw(7, dtype)
    input, weight = draw.activations(1, 20, (12, 24)), draw.weight(50, 20, 3, 3)
    before = ops.conv(input, weight)
    input[0, 3, 5, 11] = torch.inf
    after = ops.conv(input, weight)
    far = torch.ones(12, 24, dtype=torch.bool)
    far[2:9, 7:16] = False
    assert same_bits(before[:, :, far], after[:, :, far])
    near = after[0, 0, 4:7, 10:13]
    assert not near.isfinite().any() and after[0, 0].isfinite().sum() == 12 * 24 - 9


def test_threads_agree_on_special_values(native_kernels, dtype, tiles):
    draw = Draw(8, dtype)
    input, weight = draw.activations(1, 64, (30, 29)), draw.weight(80, 64, 3, 3)
    input[torch.rand(input.shape, generator=draw.generator) < 0.001] = torch.inf
    assert_threads_agree(ops.conv, ((input, weight), {"activation": "silu"}))


# Where it is used


def width(
    outputs: int, channels: int, size: tuple[int, int], kernel: Any = (3, 3), **options: Any
) -> int:
    weight = torch.empty(outputs, channels, *kernel, device="meta")
    given = SimpleNamespace(**{"stride": [1, 1], "dilation": [1, 1], **options})
    return native.winograd_width(weight, given.stride, given.dilation, size)


def test_choice():
    assert width(64, 64, (56, 56)) == 4
    assert width(512, 512, (7, 7)) == 2
    for other in (
        width(64, 64, (56, 56), stride=[2, 2]),
        width(64, 64, (56, 56), stride=[1, 2]),
        width(64, 64, (56, 56), dilation=[2, 2]),
        width(64, 64, (56, 56), (1, 3)),
        width(64, 64, (56, 56), (5, 5)),
        width(64, 3, (56, 56)),
        width(2, 64, (56, 56)),
        width(512, 512, (2, 2)),
    ):
        assert other == 0


@pytest.mark.parametrize("channels_last", [False, True])
def test_weights_are_given_once(native_kernels, channels_last):
    """Dense float32 weights are handed over as they are; only the transformed ones are new."""
    input, weight = torch.randn(1, 64, 20, 20), torch.randn(64, 64, 3, 3)
    if channels_last:
        weight = weight.contiguous(memory_format=torch.channels_last)
    rest = (None, None, [1, 1], [1, 1, 1, 1], [1, 1], "none")
    packed = native.pack_conv(input, weight, *rest)
    given, _, _, transformed = packed.weights
    assert (given.data_ptr() == weight.data_ptr()) is not channels_last
    assert transformed is native.pack_conv(input, weight, *rest).weights[3]
    weight[3, 3] += 1.0
    assert transformed is not native.pack_conv(input, weight, *rest).weights[3]


def test_kernel_refuses_what_it_cannot_run(native_kernels):
    input, weight = torch.randn(1, 64, 20, 20), torch.randn(64, 64, 3, 3)
    nhwc = input.contiguous(memory_format=torch.channels_last)
    transformed = native._winograd_panels(weight, 4)
    geometry = [3, 3, 1, 1, 1, 1, 1, 1]

    def run(geometry: list[int], planar: bool, transformed: torch.Tensor) -> torch.Tensor:
        output = torch.empty_like(nhwc)
        torch.ops.effkernels_cpu.conv(
            output, nhwc, weight, None, None, geometry, None, 0, planar, transformed
        )
        return output

    run(geometry, False, transformed)
    for bad in ((geometry, True, transformed), (geometry, False, transformed[:20])):
        with pytest.raises(RuntimeError, match="transformed"):
            run(*bad)
    for place, number in ((0, 5), (1, 1), (2, 2), (3, 2), (4, 2), (5, 2)):
        with pytest.raises(RuntimeError, match="transformed weights are for 3x3, stride 1"):
            run([*geometry[:place], number, *geometry[place + 1 :]], False, transformed)


def test_replays(native_kernels, dtype, tiles):
    """A frozen network gives the ops' bits, also for special values and other batches."""
    network = nn.Sequential(
        nn.Conv2d(24, 40, 3, padding=1), nn.ReLU(), nn.Conv2d(40, 24, 3, padding=2)
    )
    network.eval().to(dtype)
    frozen = ek.freeze(network)
    first, second = network[0], network[2]
    for batch in (2, 1, 3):
        input = torch.randn(batch, 24, 13, 9, dtype=dtype)
        input[0, 0, 3, 3] = torch.inf
        with torch.no_grad():
            hidden = ops.conv(input, first.weight, first.bias, activation="relu")
            due = ops.conv(hidden, second.weight, second.bias, padding=(2, 2))
            assert same_bits(frozen(input), due)
