"""What decides how a block runs: BatchNorm flags, drop-path, hooks, replaced children."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm.layers import DropPath
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torchvision.ops import stochastic_depth

import effkernels as ek
from effkernels.modules.mbconv import drop_path
from tests.modules.test_mbconv import our_block, timm_twin
from tests.networks import (
    assert_networks_agree,
    batch_norms,
    everything_as_modules,
    make_realistic,
)

CASE = (8, 8, 3, 1, 4, 0.25, (7, 6))


class Plain(nn.Module):
    """A block's children called one after the other in plain PyTorch."""

    def __init__(self, block: ek.MBConv) -> None:
        super().__init__()
        self.block = copy.deepcopy(block)
        self.se_activation = nn.SiLU()

    def forward(self, input: Tensor) -> Tensor:
        block = self.block
        hidden = block.act1(block.bn1(block.conv_pw(input)))
        hidden = block.act2(block.bn2(block.conv_dw(hidden)))
        if isinstance(block.se, ek.SqueezeExcite):
            se = block.se
            gate = se.conv_reduce(hidden.mean((2, 3), keepdim=True))
            hidden = hidden * se.gate(se.conv_expand(se.act1(gate)))
        return block.bn3(block.conv_pwl(hidden)) + input


class Fixed(nn.Module):
    """Keeps chosen children in evaluation mode whatever train() says, as frozen backbones do."""

    def __init__(self, network: nn.Module, frozen: Callable[[nn.Module], list[nn.Module]]) -> None:
        super().__init__()
        self.network = network
        self.frozen = frozen

    def forward(self, input: Tensor) -> Tensor:
        for module in self.frozen(self.network):
            module.eval()
        return self.network(input)


def block(**options: Any) -> ek.MBConv:
    return make_realistic(ek.MBConv(*CASE[:-1], **options))


def image(batch: int = 3) -> Tensor:
    return torch.randn(batch, CASE[0], *CASE[-1])


@pytest.mark.parametrize("frozen", [[0], [1], [2], [0, 2], [0, 1, 2]], ids=str)
def test_frozen_batch_norms(frozen: list[int], backend: str) -> None:
    """A BatchNorm in evaluation mode inside a training block uses and keeps its statistics."""

    def chosen(network: nn.Module) -> list[nn.Module]:
        return [batch_norms(network)[index] for index in frozen]

    ours = block()
    assert_networks_agree(Fixed(ours, chosen), Fixed(Plain(ours), chosen), image(), training=True)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("affine", [False, True])
def test_batch_norm_options(affine: bool, training: bool, backend: str) -> None:
    ours = block(norm_layer=lambda c: nn.BatchNorm2d(c, eps=0.1, momentum=0.3, affine=affine))
    assert_networks_agree(ours, Plain(ours), image(), training)


def test_cumulative_average(backend: str) -> None:
    ours = block(norm_layer=lambda channels: nn.BatchNorm2d(channels, momentum=None))
    plain = Plain(ours)
    for _ in range(3):
        batch = image()
        ours(batch)
        plain(batch)
    for got, due in zip(batch_norms(ours), batch_norms(plain), strict=True):
        assert int(got.num_batches_tracked) == int(due.num_batches_tracked) == 3
        torch.testing.assert_close(got.running_mean, due.running_mean)
        torch.testing.assert_close(got.running_var, due.running_var)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_without_running_statistics(training: bool, backend: str) -> None:
    ours = block(norm_layer=lambda channels: nn.BatchNorm2d(channels, track_running_stats=False))
    plain = Plain(ours)
    batch = image()
    for network in (ours, plain):
        network.train(training)
    torch.testing.assert_close(ours(batch), plain(batch))


def test_tracking_switched_off_later(backend: str) -> None:
    """nn.BatchNorm2d then trains without touching its buffers, and evaluates with them."""
    ours = block()
    for norm in batch_norms(ours):
        norm.track_running_stats = False
    before = copy.deepcopy(ours.state_dict())
    plain = Plain(ours)
    batch = image()
    torch.testing.assert_close(ours(batch), plain(batch))
    for name, value in ours.state_dict().items():
        assert torch.equal(value, before[name]), name
    torch.testing.assert_close(ours.eval()(batch), plain.eval()(batch))


def test_one_value_per_channel_cannot_train() -> None:
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        ek.MBConv(8, 8).train()(torch.randn(1, 8, 1, 1))


@pytest.mark.parametrize("probability", [0.0, 0.3, 0.9])
def test_drop_path_is_stochastic_depth(probability: float) -> None:
    """The same samples as torchvision's and timm's from the same seed."""
    input = torch.randn(16, 3, 2, 2)
    results = []
    for function in (
        lambda: drop_path(input, probability),
        lambda: stochastic_depth(input, probability, "row", training=True),
        lambda: DropPath(probability).train()(input),
    ):
        torch.manual_seed(3)
        results.append(function())
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    if probability:
        dropped = (results[0] == 0).flatten(1).all(1)
        assert 0 < int(dropped.sum()) < 16


def test_drop_path_in_training_only(backend: str) -> None:
    ours = our_block(CASE, "symmetric", nn.SiLU)
    ours.drop_path = 0.5
    theirs = timm_twin(ours, CASE, "symmetric", nn.SiLU)
    theirs.drop_path = DropPath(0.5)
    batch = image(8)
    assert_networks_agree(ours, theirs, batch, training=True)
    assert_networks_agree(ours, theirs, batch, training=False)
    torch.manual_seed(1)
    output = ours.train()(batch)
    unchanged = [torch.equal(o, i) for o, i in zip(output, batch, strict=True)]
    assert any(unchanged) and not all(unchanged)


def test_drop_path_needs_a_residual(backend: str) -> None:
    ours = make_realistic(ek.MBConv(8, 12, drop_path=0.9)).train()
    assert bool((ours(image(8)).flatten(1).abs().sum(1) > 0).all())


CHILDREN = ["conv_pw", "bn1", "act1", "conv_dw", "bn2", "act2", "se", "se.conv_reduce", "se.act1"]
CHILDREN += ["se.gate", "conv_pwl", "bn3"]


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", CHILDREN)
def test_forward_hooks_see_and_change_a_child(name: str, training: bool, backend: str) -> None:
    ours = block()
    plain = Plain(ours)
    if name == "se":  # Plain calls the children of se, so compare with hooks everywhere
        plain.forward = copy.deepcopy(ours).train(training).forward  # type: ignore[method-assign]
    batch = image()
    ours.train(training)(batch)  # whatever is prepared on a first call must not outlive the hook
    with torch.no_grad():
        ours.eval()(batch)
        ours.eval()(batch)
    for norm, due in zip(batch_norms(ours), batch_norms(plain), strict=True):
        norm.load_state_dict(due.state_dict())
    seen = []

    def double(module: nn.Module, arguments: Any, output: Tensor) -> Tensor:
        seen.append(module)
        return 2 * output

    handle = ours.get_submodule(name).register_forward_hook(double)
    with torch.no_grad():
        got = ours.train(training)(batch)
        assert seen == [ours.get_submodule(name)]
        if name != "se":
            plain.block.get_submodule(name).register_forward_hook(double)
            torch.testing.assert_close(got, plain.train(training)(batch))
        handle.remove()
        ours.train(training)(batch)
    assert seen.count(ours.get_submodule(name)) == 1


@pytest.mark.parametrize("name", ["conv_dw", "bn2", "se.conv_expand", "conv_pwl"])
def test_forward_pre_hooks(name: str, backend: str) -> None:
    ours = block().eval()
    plain = Plain(ours).eval()
    batch = image()
    with torch.no_grad():
        ours(batch)
        for network in (ours, plain.block):
            network.get_submodule(name).register_forward_pre_hook(lambda _, inputs: inputs[0] + 1)
        torch.testing.assert_close(ours(batch), plain(batch))


def test_global_hooks_see_every_child() -> None:
    ours = block().eval()
    calls = []
    with everything_as_modules():
        handle = ours.conv_dw.register_forward_hook(lambda *_: calls.append("conv_dw"))
        handle.remove()
        hook = nn.modules.module.register_module_forward_hook(
            lambda module, *_: calls.append(type(module).__name__)
        )
        with torch.no_grad():
            ours(image())
        hook.remove()
    assert calls.count("Conv2d") == 5 and calls.count("BatchNorm2d") == 3


def test_replaced_forward_is_called(backend: str) -> None:
    """Offloading libraries assign ``module.forward``."""
    ours = block().eval()
    with torch.no_grad():
        ours(image())
        inner = ours.conv_dw.forward
        ours.conv_dw.forward = lambda input: 0 * inner(input)  # type: ignore[method-assign]
        plain = Plain(ours).eval()
        nn.init.zeros_(plain.block.conv_dw.weight)
        del plain.block.conv_dw.forward
        batch = image()
        torch.testing.assert_close(ours(batch), plain(batch))


class LowRank(nn.Module):
    """A convolution with something added, as fine-tuning adapters do."""

    def __init__(self, inner: nn.Conv2d) -> None:
        super().__init__()
        self.inner = inner
        self.scale = nn.Parameter(torch.tensor(0.5))

    def forward(self, input: Tensor) -> Tensor:
        return self.inner(input) * self.scale


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("name", ["conv_pw", "conv_dw", "conv_pwl"])
def test_replaced_convolution(name: str, stride: int, training: bool, backend: str) -> None:
    ours = make_realistic(ek.MBConv(8, 8, 3, stride, 4, padding="same")).train(training)
    batch = image()
    with torch.no_grad():
        ours(batch)
    plain = copy.deepcopy(ours)
    convolution = getattr(ours, name)
    setattr(ours, name, LowRank(convolution))
    with torch.no_grad():
        getattr(plain, name).weight.mul_(0.5)
        torch.testing.assert_close(ours(batch), plain(batch))


def test_sync_batch_norm_and_parametrized_weight(backend: str) -> None:
    ours = block().eval()
    batch = image()
    with torch.no_grad():
        due = ours(batch)
        synchronized = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(ours))
        torch.testing.assert_close(synchronized(batch), due)
        parametrizations.weight_norm(ours.conv_pw)
        torch.testing.assert_close(ours(batch), due)
        ours.conv_pw.parametrizations.weight.original0.mul_(2)
        assert not torch.allclose(ours(batch), due)


def test_squeeze_excite_replaced(backend: str) -> None:
    ours = block().eval()
    with torch.no_grad():
        ours(image())
        ours.se = nn.Identity()
        plain = Plain(ours).eval()
        batch = image()
        torch.testing.assert_close(ours(batch), plain(batch))


def test_geometry_changed_in_place(backend: str) -> None:
    """Segmentation code trades stride for dilation on the convolutions themselves."""
    ours = make_realistic(ek.MBConv(8, 12, 3, 2, 4)).eval()
    batch = image()
    with torch.no_grad():
        assert ours(batch).shape[2:] == (4, 3)
        ours.conv_dw.stride, ours.conv_dw.dilation, ours.conv_dw.padding = (1, 1), (2, 2), (2, 2)
        plain = copy.deepcopy(ours)
        with everything_as_modules():
            due = plain(batch)
        got = ours(batch)
    assert got.shape[2:] == (7, 6)
    torch.testing.assert_close(got, due)
