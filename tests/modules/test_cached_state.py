"""Folded BatchNorms and packed weights follow every change of a parameter or buffer."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import effkernels as ek
from tests.networks import batch_norms, everything_as_modules, make_realistic

TENSORS = [
    "conv_pw.weight",
    "bn1.weight",
    "bn1.bias",
    "bn2.running_mean",
    "bn2.running_var",
    "conv_dw.weight",
    "se.conv_reduce.weight",
    "se.conv_reduce.bias",
    "se.conv_expand.weight",
    "conv_pwl.weight",
    "bn3.bias",
]


def tensor(block: nn.Module, name: str) -> Tensor:
    return dict([*block.named_parameters(), *block.named_buffers()])[name]


def in_place(block: nn.Module, name: str) -> None:
    with torch.no_grad():
        tensor(block, name).add_(0.25)


def in_place_in_inference_mode(block: nn.Module, name: str) -> None:
    with torch.inference_mode():
        tensor(block, name).add_(0.25)


def by_load_state_dict(block: nn.Module, name: str) -> None:
    state = {key: value.clone() for key, value in block.state_dict().items()}
    state[name] += 0.25
    block.load_state_dict(state)


def by_assigning_load(block: nn.Module, name: str) -> None:
    state = {key: value.clone() for key, value in block.state_dict().items()}
    state[name] += 0.25
    block.load_state_dict(state, assign=True)


def by_replacement(block: nn.Module, name: str) -> None:
    owner, _, leaf = name.rpartition(".")
    value = tensor(block, name).detach() + 0.25
    module = block.get_submodule(owner)
    setattr(module, leaf, nn.Parameter(value) if leaf in module._parameters else value)


def by_data_assignment(block: nn.Module, name: str) -> None:
    tensor(block, name).data = tensor(block, name).detach() + 0.25


def by_data_write_and_clear(block: nn.Module, name: str) -> None:
    """Neither the cache nor autograd can see such a write; the cache has to be told."""
    tensor(block, name).data.add_(0.25)
    ek.clear_cache()


@pytest.mark.parametrize(
    "change",
    [
        in_place,
        in_place_in_inference_mode,
        by_load_state_dict,
        by_assigning_load,
        by_replacement,
        by_data_assignment,
        by_data_write_and_clear,
    ],
)
@pytest.mark.parametrize("name", TENSORS)
def test_change_is_seen(name: str, change: Callable[[nn.Module, str], None], backend: str) -> None:
    block = make_realistic(ek.MBConv(8, 8, expand_ratio=4)).eval()
    image = torch.randn(1, 8, 6, 6)
    with torch.no_grad():
        before = [block(image) for _ in range(3)]
        change(block, name)
        after = [block(image) for _ in range(3)]
        with everything_as_modules():
            due = copy.deepcopy(block)(image)
    for output in after:
        torch.testing.assert_close(output, due)
        assert not torch.allclose(output, before[0]), "the change has no effect: a weak test"


def test_dtype_and_back(backend: str) -> None:
    """bfloat16 and back rounds the weights; the block must use the rounded ones."""
    block = make_realistic(ek.MBConv(8, 8, expand_ratio=4)).eval()
    image = torch.randn(1, 8, 6, 6)
    with torch.no_grad():
        before = block(image)
        block.to(torch.bfloat16)(image.bfloat16())
        block.to(torch.float32)
        after = block(image)
        with everything_as_modules():
            due = copy.deepcopy(block)(image)
    torch.testing.assert_close(after, due)
    assert not torch.allclose(after, before)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("implementation", ["for-loop", "foreach", "fused"])
def test_training_steps_then_evaluation(
    optimizer: type[torch.optim.Optimizer], implementation: str, backend: str
) -> None:
    block = make_realistic(ek.MBConv(8, 8, expand_ratio=4))
    flags = {"foreach": implementation == "foreach", "fused": implementation == "fused"}
    steps = optimizer(block.parameters(), lr=0.05, **flags)  # type: ignore[call-arg]
    image = torch.randn(2, 8, 6, 6)
    for _ in range(3):
        with torch.no_grad():  # something is folded and packed before each step
            block.eval()(image)
        steps.zero_grad()
        block.train()(image).square().mean().backward()
        steps.step()
        with torch.no_grad():
            got = block.eval()(image)
            with everything_as_modules():
                due = copy.deepcopy(block)(image)
        torch.testing.assert_close(got, due)


def test_inference_mode_first_then_gradients(backend: str) -> None:
    """What is kept from inference mode must serve a later call that records gradients."""
    block = make_realistic(ek.MBConv(8, 8, expand_ratio=4)).eval().requires_grad_(False)
    image = torch.randn(1, 8, 6, 6)
    with torch.inference_mode():
        before = block(image)
    saliency = image.clone().requires_grad_()
    output = block(saliency)
    torch.testing.assert_close(output.detach(), before.clone())
    output.sum().backward()
    assert saliency.grad is not None and bool(saliency.grad.abs().sum() > 0)


def test_module_built_in_inference_mode(backend: str) -> None:
    """Inference tensors count no versions; nothing of them may be kept."""
    with torch.inference_mode():
        block = make_realistic(ek.MBConv(8, 8, expand_ratio=4)).eval()
        image = torch.randn(1, 8, 6, 6)
        block(image)
        before = block(image)
        block.bn2.bias.add_(1.0)
        after = block(image)
        with everything_as_modules():
            due = block(image)
    torch.testing.assert_close(after, due)
    assert not torch.allclose(before, after)


def test_blocks_do_not_share_what_is_kept(backend: str) -> None:
    """A freed block's memory may come back at the same addresses, holding other weights."""
    image = torch.randn(1, 8, 6, 6)
    with torch.no_grad():
        for seed in range(20):
            torch.manual_seed(seed)
            block = make_realistic(ek.MBConv(8, 8, expand_ratio=4)).eval()
            got = block(image)
            with everything_as_modules():
                due = block(image)
            torch.testing.assert_close(got, due)
            del block


def test_shapes_take_turns(backend: str) -> None:
    block = make_realistic(ek.MBConv(8, 8, expand_ratio=4)).eval()
    with torch.no_grad():
        for _ in range(2):
            for shape in ((1, 8, 6, 6), (3, 8, 6, 6), (1, 8, 5, 9), (0, 8, 6, 6)):
                image = torch.randn(shape)
                got = block(image)
                with everything_as_modules():
                    torch.testing.assert_close(got, block(image))


def test_statistics_of_a_training_pass_are_used(backend: str) -> None:
    block = make_realistic(ek.MBConv(8, 8, expand_ratio=4)).eval()
    image = torch.randn(2, 8, 6, 6)
    with torch.no_grad():
        before = block(image)
        block.train()(image + 1)
        after = block.eval()(image)
        with everything_as_modules():
            due = copy.deepcopy(block)(image)
    torch.testing.assert_close(after, due)
    assert not torch.allclose(after, before)
    assert all(int(norm.num_batches_tracked) == 1 for norm in batch_norms(block))
