"""Squeeze-and-excitation in training: one op, whosever module it is, if nobody watches inside."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import timm
import torch
from timm.models._efficientnet_blocks import SqueezeExcite as TimmSqueezeExcite
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torchvision.models import mobilenet_v3_small
from torchvision.ops import SqueezeExcitation

import effkernels as ek
from effkernels.testing import assert_close_to
from tests.networks import training_ops

MODULES: dict[str, Callable[[], nn.Module]] = {
    "ours": lambda: ek.SqueezeExcite(24, 6),
    "ours, hard": lambda: ek.SqueezeExcite(24, 6, nn.ReLU, nn.Hardsigmoid),
    "torchvision": lambda: SqueezeExcitation(24, 6, nn.SiLU),
    "torchvision, hard": lambda: SqueezeExcitation(24, 6, scale_activation=nn.Hardsigmoid),
    "timm": lambda: TimmSqueezeExcite(24, 0.25, act_layer=nn.SiLU),
    "timm, hard": lambda: TimmSqueezeExcite(24, 0.25, gate_layer="hard_sigmoid"),
}
# The children, in the order of the computation.
REDUCE, EXPAND, GATE = (
    {"ours": "conv_reduce", "torchvision": "fc1", "timm": "conv_reduce"},
    {"ours": "conv_expand", "torchvision": "fc2", "timm": "conv_expand"},
    {"ours": "gate", "torchvision": "scale_activation", "timm": "gate"},
)


def ops_of(module: nn.Module, input: Tensor) -> list[str]:
    return [name for name in training_ops(module, input) if "squeeze_excite" in name]


def made(name: str) -> tuple[nn.Module, nn.Module, Tensor]:
    """The module as it was, accelerated, and an input."""
    torch.manual_seed(len(name))
    original = MODULES[name]().train()
    changed = copy.deepcopy(original)
    if not name.startswith("ours"):
        ek.accelerate(changed)
    return original, changed, torch.randn(3, 24, 7, 9)


def gradients(module: nn.Module, input: Tensor) -> list[Tensor]:
    leaf = input.detach().requires_grad_()
    output = module(leaf)
    output.square().sum().backward()
    assert leaf.grad is not None
    return [output.detach(), leaf.grad, *(p.grad for p in module.parameters())]


ONCE = ["squeeze_excite", "squeeze_excite_backward"]
if not ek.backends()["native"].available:
    ONCE = ONCE[:1]


@pytest.mark.parametrize("name", MODULES)
def test_one_op_each_way(name: str) -> None:
    original, changed, input = made(name)
    due = gradients(copy.deepcopy(original).double(), input.double())
    with ek.use_backend("reference"):
        theirs = gradients(original, input)
    for reference, ours, stock in zip(due, gradients(changed, input), theirs, strict=True):
        assert_close_to(reference, ours, stock)
    assert ops_of(changed, input) == ONCE


@pytest.mark.parametrize("name", ["ours", "torchvision", "timm"])
def test_hooks_are_called(name: str) -> None:
    original, changed, input = made(name)
    due = gradients(original, input)
    for child in (REDUCE[name], EXPAND[name], GATE[name]):
        seen: list[nn.Module] = []
        handle = changed.get_submodule(child).register_forward_hook(
            lambda module, arguments, output, seen=seen: seen.append(module)
        )
        changed.zero_grad()
        torch.testing.assert_close(gradients(changed, input), due)
        assert seen == [changed.get_submodule(child)]
        assert ops_of(changed, input) == []
        handle.remove()
    assert ops_of(changed, input) == ONCE
    calls: list[nn.Module] = []
    with register_module_forward_hook(lambda module, arguments, output: calls.append(module)):
        changed(input)
    assert set(calls) == set(changed.modules())
    changed.register_forward_hook(lambda module, arguments, output: output * 2)  # its own
    torch.testing.assert_close(changed(input), 2 * due[0])
    assert ops_of(changed, input) == ONCE


@pytest.mark.parametrize("name", ["ours", "torchvision", "timm"])
def test_replaced_children_are_used(name: str) -> None:
    original, changed, input = made(name)
    replacements: list[tuple[str, nn.Module]] = [
        (GATE[name], nn.Tanh()),
        (REDUCE[name], nn.Sequential(nn.Conv2d(24, 6, 1), nn.BatchNorm2d(6))),
        (EXPAND[name], nn.Conv2d(6, 24, 1, groups=2)),
    ]
    if name == "torchvision":
        replacements.append(("avgpool", nn.AdaptiveMaxPool2d(1)))
    for child, replacement in replacements:
        one, other = copy.deepcopy(original), copy.deepcopy(changed)
        setattr(one, child, copy.deepcopy(replacement))
        setattr(other, child, copy.deepcopy(replacement))
        torch.testing.assert_close(gradients(other, input), gradients(one, input))
        assert ops_of(other, input) == []
    without = copy.deepcopy(changed)
    getattr(without, REDUCE[name]).bias = None
    assert ops_of(without, input) == ONCE


@pytest.mark.parametrize("name", ["torchvision", "timm"])
def test_evaluation_is_left_to_recording(name: str) -> None:
    _, changed, input = made(name)
    assert ops_of(changed.eval(), input) == []  # differentiable as before
    with torch.no_grad():
        torch.testing.assert_close(changed(input), changed.train()(input))


@pytest.mark.parametrize("name", ["torchvision", "timm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast(name: str, dtype: torch.dtype) -> None:
    """Results have the dtype that the original's have."""
    original, changed, input = made(name)
    input = input.to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        theirs, ours = original(input), changed(input)
    assert ours.dtype == theirs.dtype == dtype
    assert_close_to(original.double()(input.double()).detach(), ours.detach(), theirs.detach())


@pytest.mark.parametrize(
    "make", [mobilenet_v3_small, lambda: timm.create_model("mobilenetv3_small_050")]
)
def test_in_blocks_that_train_stage_by_stage(make: Callable[[], nn.Module]) -> None:
    network = make().train()
    count = sum("SqueezeExcit" in type(module).__name__ for module in network.modules())
    assert count > 0
    for module in network.modules():  # what has a hook is called, so no block is one op
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_hook(lambda module, arguments, output: None)
    ran = ops_of(ek.accelerate(network), torch.randn(2, 3, 64, 64))
    assert ran == ONCE[:1] * count + ONCE[1:] * count
