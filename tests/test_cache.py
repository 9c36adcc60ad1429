"""What is kept between calls is dropped as soon as the parameter it came from changes."""

from __future__ import annotations

import gc
import threading

import pytest
import torch
from torch import nn

import effkernels as ek
from effkernels import cache, native, ops
from effkernels.cache import cached


@pytest.fixture(autouse=True)
def empty_cache():
    ek.clear_cache()
    yield
    ek.clear_cache()


class Doubled:
    """Twice a tensor, cached; counts how often it is computed."""

    def __init__(self) -> None:
        self.built = 0

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        def build() -> torch.Tensor:
            self.built += 1
            return tensor.detach().clone() * 2

        return cached("doubled", (tensor,), build)

    def assert_fresh(self, tensor: torch.Tensor, built: int) -> None:
        """The value is right, and was built the ``built``-th time."""
        for _ in range(2):
            torch.testing.assert_close(self(tensor), tensor.detach() * 2)
        assert self.built == built


@pytest.fixture
def doubled() -> Doubled:
    return Doubled()


def test_an_unchanged_tensor_is_built_once(doubled):
    weight = nn.Parameter(torch.randn(3))
    assert doubled(weight) is doubled(weight)
    assert doubled(weight) is doubled(weight.detach())  # the same memory at the same version
    doubled.assert_fresh(weight, 1)


def test_in_place_updates(doubled):
    weight = nn.Parameter(torch.randn(3))
    doubled.assert_fresh(weight, 1)
    with torch.no_grad():
        weight.mul_(3)
    doubled.assert_fresh(weight, 2)
    with torch.no_grad():
        weight[1] = 5.0
    doubled.assert_fresh(weight, 3)
    weight.detach().zero_()  # a detached tensor counts with the same counter
    doubled.assert_fresh(weight, 4)
    with torch.no_grad():
        weight.view(-1)[0] = 1.0
    doubled.assert_fresh(weight, 5)


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_optimizer_steps(doubled, optimizer, foreach):
    layer = nn.Linear(3, 2)
    doubled.assert_fresh(layer.weight, 1)
    stepper = optimizer(layer.parameters(), lr=0.1, foreach=foreach)
    for step in range(2, 4):
        layer(torch.randn(4, 3)).square().sum().backward()
        stepper.step()
        doubled.assert_fresh(layer.weight, step)


@pytest.mark.parametrize("assign", [False, True])
def test_load_state_dict(doubled, assign):
    layer, other = nn.Linear(3, 2), nn.Linear(3, 2)
    doubled.assert_fresh(layer.weight, 1)
    layer.load_state_dict(other.state_dict(), assign=assign)
    assert torch.equal(layer.weight, other.weight)
    doubled.assert_fresh(layer.weight, 2)


def test_to_another_dtype_and_back(doubled):
    layer = nn.Linear(3, 2)
    doubled.assert_fresh(layer.weight, 1)
    layer.to(torch.bfloat16)
    doubled.assert_fresh(layer.weight, 2)
    layer.to(torch.float32)  # rounded: not what it was
    doubled.assert_fresh(layer.weight, 3)


def test_parameters_swapped_through_data(doubled):
    weight = nn.Parameter(torch.randn(3))
    doubled.assert_fresh(weight, 1)
    weight.data = torch.randn(3)
    doubled.assert_fresh(weight, 2)


def test_a_new_tensor_at_a_recycled_address(doubled):
    """Freed memory comes back at once; what was made of its last owner must not."""
    memory = bytearray(4 * 16)
    for built in range(1, 5):
        weight = torch.frombuffer(memory, dtype=torch.float32)  # a new storage, the same address
        weight.fill_(built)
        doubled.assert_fresh(weight, built)
        del weight


def test_views_are_told_apart(doubled):
    matrix = torch.arange(16.0).view(4, 4)
    for built, view in enumerate((matrix, matrix.t(), matrix[:2], matrix[1:3], matrix[:, :2]), 1):
        doubled.assert_fresh(view, built)
    doubled.assert_fresh(matrix.view(torch.int32).view(torch.float32), 5)
    matrix[3, 3] = 0  # all of them share one counter
    doubled.assert_fresh(matrix, 6)


def test_kinds_are_told_apart():
    weight = torch.randn(3)
    assert cached("one", (weight,), lambda: 1) == 1
    assert cached("two", (weight,), lambda: 2) == 2
    assert cached("one", (weight,), lambda: 3) == 1


def test_a_value_of_several_tensors():
    mean, var = torch.zeros(3), torch.ones(3)
    calls = []

    def total() -> float:
        return cached("sum", (mean, var), lambda: calls.append(1) or float((mean + var).sum()))

    assert (total(), total(), len(calls)) == (3.0, 3.0, 1)
    var.add_(1)
    assert (total(), total(), len(calls)) == (6.0, 6.0, 2)
    mean.add_(1)
    assert (total(), total(), len(calls)) == (9.0, 9.0, 3)


def test_inference_tensors_are_never_kept(doubled):
    """They count no versions, so that a change would go unseen."""
    with torch.inference_mode():
        weight = torch.ones(3)
        assert doubled(weight).tolist() == [2.0] * 3
        weight.fill_(5)
        assert doubled(weight).tolist() == [10.0] * 3
    assert doubled.built == 2
    assert not cache._entries


def test_parameters_are_kept_in_inference_mode(doubled):
    weight = nn.Parameter(torch.randn(3))
    with torch.inference_mode():
        doubled.assert_fresh(weight, 1)
    with torch.no_grad():
        weight.add_(1)
    with torch.inference_mode():
        doubled.assert_fresh(weight, 2)
        weight.add_(1)
        doubled.assert_fresh(weight, 3)


def test_writes_through_data_need_clear_cache(doubled):
    """The documented hole: neither this nor autograd sees them."""
    weight = nn.Parameter(torch.ones(3))
    doubled.assert_fresh(weight, 1)
    weight.data.fill_(3)
    assert doubled(weight).tolist() == [2.0] * 3
    ek.clear_cache()
    doubled.assert_fresh(weight, 2)


def test_values_of_deleted_tensors_are_freed(doubled):
    for _ in range(cache._SWEEP_EVERY * 3):
        doubled(torch.randn(2, 2).expand(2, 2))
    gc.collect()
    assert len(cache._entries) <= cache._SWEEP_EVERY
    kept = torch.randn(5)
    doubled(kept)
    built = doubled.built
    hoard = [torch.randn(3) for _ in range(cache._SWEEP_EVERY)]
    for tensor in hoard:
        doubled(tensor)
    doubled(kept)  # a sweep spares what is alive
    assert doubled.built == built + len(hoard)
    assert len(cache._entries) >= len(hoard) + 1


def test_threads():
    """Many threads read, change and drop weights; each only ever sees its own, up to date."""
    errors: list[str] = []
    start = threading.Barrier(4)

    def work(number: int) -> None:
        doubled = Doubled()
        start.wait()
        for round in range(300):
            weight = torch.full((8,), float(1000 * number + round))
            for _ in range(2):
                if doubled(weight)[0] != 2 * weight[0]:
                    errors.append(f"thread {number}, round {round}")
            weight.add_(0.5)
            if doubled(weight)[0] != 2 * weight[0]:
                errors.append(f"thread {number}, round {round}, after the update")

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors[:5]


def test_one_weight_in_two_threads():
    weight, values = torch.randn(64), []
    start = threading.Barrier(2)

    def work() -> None:
        start.wait()
        for _ in range(200):
            values.append(cached("sum", (weight,), lambda: float(weight.sum())))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert values == [float(weight.sum())] * 400


# The packed weights of the native kernels


needs_kernels = pytest.mark.skipif(
    not ek.backends()["native"].available, reason=ek.backends()["native"].reason
)


@needs_kernels
@pytest.mark.parametrize("shape", [(1, 3, 3, 3), (16, 4, 1, 1), (17, 5, 3, 5)])
def test_gemm_panels(shape):
    weight = torch.randn(shape)
    panels = native.conv_panels(weight)
    outputs, channels, height, width = shape
    assert panels.shape == (-(-outputs // 16), height * width * channels, 16)
    assert panels.is_contiguous() and panels.dtype == torch.float32
    matrix = panels.transpose(1, 2).flatten(0, 1)  # [outputs rounded up, depth]
    unpacked = matrix[:outputs].view(outputs, height, width, channels).permute(0, 3, 1, 2)
    assert torch.equal(unpacked, weight)
    assert not matrix[outputs:].any()
    assert native.conv_panels(weight) is panels


@needs_kernels
@pytest.mark.parametrize("channels", [1, 16, 21])
def test_depthwise_taps(channels):
    weight = torch.randn(channels, 1, 3, 5).bfloat16()
    taps = native.depthwise_taps(weight)
    assert taps.shape == (15, -(-channels // 16) * 16)
    assert taps.is_contiguous() and taps.dtype == torch.float32
    assert torch.equal(taps[:, :channels].t().view(channels, 1, 3, 5).bfloat16(), weight)
    assert not taps[:, channels:].any()
    assert torch.equal(native.reversed_taps(weight), taps.flip(0))
    assert native.depthwise_taps(weight) is taps


@needs_kernels
def test_a_trained_weight_is_packed_again():
    """The whole way: the native op after every kind of update."""
    weight = nn.Parameter(torch.randn(8, 3, 3, 3))
    scale, bias = torch.ones(8), torch.zeros(8).bfloat16().float()
    input = torch.randn(1, 3, 6, 6)

    def both_agree() -> None:
        results = []
        for backend in ("native", "reference"):
            with ek.use_backend(backend), torch.no_grad():
                results.append(ops.conv(input, weight, bias, scale=scale))
        torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)

    both_agree()
    with torch.no_grad():
        weight.mul_(2)
    both_agree()
    torch.optim.SGD([weight], lr=1.0).zero_grad()
    ops.conv(input, weight, bias, scale=scale).sum().backward()
    torch.optim.SGD([weight], lr=0.1).step()
    both_agree()
    scale.fill_(3)
    bias.add_(1)
    both_agree()
    weight.data = torch.randn(8, 3, 3, 3)
    both_agree()
