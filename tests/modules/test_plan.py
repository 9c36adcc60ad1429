"""A network's prepared chain of native calls: used where it holds, dropped where it does not."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import effkernels as ek
from effkernels.modules.plan import Plan
from tests.networks import everything_as_modules, make_realistic

pytestmark = pytest.mark.skipif(
    not ek.backends()["native"].available, reason="plans are native calls"
)


@pytest.fixture
def network() -> nn.Module:
    return make_realistic(ek.models.efficientnet_b0(num_classes=7)).eval()


@pytest.fixture
def image() -> Tensor:
    return torch.randn(2, 3, 64, 64)


def by_modules(network: nn.Module, image: Tensor) -> Tensor:
    """The output without any plan and any fusion."""
    with everything_as_modules():
        return copy.deepcopy(network)(image)


def plans(network: nn.Module) -> dict[Any, Plan]:
    return network.__dict__.get("_plans", {})


@torch.no_grad()
def test_second_call_uses_the_plan(network: nn.Module, image: Tensor) -> None:
    due = by_modules(network, image)
    first = network(image)
    (plan,) = plans(network).values()
    assert plan.run is not None
    assert torch.equal(network(image), first)
    assert list(plans(network).values()) == [plan]
    torch.testing.assert_close(first, due, rtol=1e-3, atol=1e-3 * float(due.abs().max()))


def test_no_plan_where_somebody_watches(network: nn.Module, image: Tensor) -> None:
    network(image)  # gradients
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        network(image)
    with torch.no_grad(), ek.use_backend("reference"):
        network(image)
    with torch.no_grad(), FlopCounterMode(display=False):
        network(image)
    with torch.no_grad():
        torch.func.vmap(network)(image[:, None])
    assert not plans(network)


CHANGES = {
    "weight in place": lambda n: n.blocks[1][0].conv_pw.weight.mul_(1.5),
    "weight replaced": lambda n: setattr(
        n.blocks[2][1].conv_dw, "weight", nn.Parameter(torch.randn(240, 1, 5, 5) * 0.1)
    ),
    "running statistics": lambda n: n.blocks[3][0].bn2.running_var.mul_(3.0),
    "eps": lambda n: setattr(n.blocks[0][0].bn1, "eps", 0.5),
    "squeeze-and-excitation bias": lambda n: n.blocks[4][0].se.conv_expand.bias.add_(1.0),
    "activation replaced": lambda n: setattr(n.blocks[1][0], "act2", nn.ReLU()),
    "block replaced": lambda n: n.blocks[3].__setitem__(1, nn.Identity()),
    "block appended": lambda n: n.blocks[6].append(make_realistic(ek.MBConv(320, 320)).eval()),
    "stem stride": lambda n: setattr(n.conv_stem, "stride", (1, 1)),
    "padding mode": lambda n: setattr(n.blocks[1][0].conv_dw, "padding_mode", "circular"),
    "residual": lambda n: setattr(n.blocks[1][1], "has_residual", False),
    "classifier": lambda n: setattr(n, "classifier", nn.Linear(1280, 3)),
    "norm in training": lambda n: n.blocks[2][0].bn1.train(),
    "data": lambda n: setattr(n.conv_head.weight, "data", n.conv_head.weight.data * 2),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
@torch.no_grad()
def test_change_is_seen(network: nn.Module, image: Tensor, change: Any) -> None:
    before = network(image)
    change(network)
    due = by_modules(network, image)
    for _ in range(2):
        got = network(image)
        torch.testing.assert_close(got, due, rtol=1e-3, atol=1e-3 * float(due.abs().max()))
    assert got.shape != before.shape or not torch.allclose(got, before, rtol=1e-3)


@pytest.mark.parametrize("name", ["conv_stem", "blocks.0", "blocks.2.1", "blocks.1.0.se", "act2"])
@torch.no_grad()
def test_hooks_run(network: nn.Module, image: Tensor, name: str) -> None:
    before = network(image)
    seen = []
    child = network.get_submodule(name)
    handle = child.register_forward_hook(lambda _, __, output: seen.append(output.shape))
    after = network(image)
    assert len(seen) == 1
    handle.remove()
    network(image)
    assert len(seen) == 1
    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-3 * float(before.abs().max()))


@torch.no_grad()
def test_forward_of_a_subclass_runs(network: nn.Module, image: Tensor) -> None:
    class Doubled(ek.MBConv):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    before = network(image)
    network.blocks[2][1].__class__ = Doubled
    due = by_modules(network, image)
    got = network(image)
    assert not torch.allclose(got, before, rtol=1e-3)
    torch.testing.assert_close(got, due, rtol=1e-3, atol=1e-3 * float(due.abs().max()))


@torch.no_grad()
def test_sizes_and_dtypes_have_plans_of_their_own(network: nn.Module) -> None:
    images = [torch.randn(1, 3, size, 48) for size in (32, 48, 64)]
    first = [network(image) for image in images]
    kept = dict(plans(network))
    assert len(kept) == 3
    assert all(torch.equal(network(i), f) for i, f in zip(images, first, strict=True))
    assert plans(network) == kept
    assert torch.equal(network(images[0].repeat(3, 1, 1, 1))[1:2], first[0])  # any batch
    for size in range(32, 64, 2):
        network(torch.randn(1, 3, size, 32))
    assert len(plans(network)) <= 8


@torch.no_grad()
def test_wrong_input_is_still_an_error(network: nn.Module, image: Tensor) -> None:
    network(image)
    with pytest.raises(ValueError, match="weight has 3 channels, input has 4"):
        network(torch.randn(1, 4, 64, 64))
    with pytest.raises(ValueError, match="dimensions"):
        network(torch.randn(3, 64, 64))
    with pytest.raises(TypeError, match=r"float64|int"):
        network(torch.zeros(1, 3, 64, 64, dtype=torch.int64))


@torch.no_grad()
def test_copies_leave_plans_behind(network: nn.Module, image: Tensor) -> None:
    due = network(image)
    for twin in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        assert not plans(twin)
        assert torch.equal(twin(image), due)
    shallow = copy.copy(network)
    assert torch.equal(shallow(image), due)


@torch.no_grad()
def test_network_is_freed(network: nn.Module, image: Tensor) -> None:
    twin = copy.deepcopy(network)
    twin(image)
    gone = weakref.ref(twin)
    del twin
    gc.collect()
    assert gone() is None


def test_threads_share_a_network(network: nn.Module, image: Tensor) -> None:
    results: list[Tensor] = []

    def run() -> None:
        with torch.no_grad():
            results.extend(network(image) for _ in range(3))

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 12
    assert all(torch.equal(result, results[0]) for result in results)
