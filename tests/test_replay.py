"""Networks of other libraries, accelerated and frozen: outputs, gradients, and what runs."""

from __future__ import annotations

import copy
import io
import pickle
import random
import subprocess
import sys
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import efficientnet_lite_pytorch
import efficientnet_pytorch
import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

import effkernels as ek
from effkernels.program import Call, Program, Replay
from effkernels.record import _rehearse, record
from effkernels.testing import assert_close_to
from tests.networks import Errors, make_realistic, settle

pytestmark = pytest.mark.skipif(
    not ek.backends()["native"].available, reason="forward passes are recorded for native kernels"
)

# Name -> how to make it, inverted residuals that have to be one step each.
NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "torchvision efficientnet_b0": (torchvision.models.efficientnet_b0, 16),
    "torchvision mobilenet_v2": (torchvision.models.mobilenet_v2, 17),
    "torchvision mobilenet_v3_small": (torchvision.models.mobilenet_v3_small, 11),
    "torchvision mnasnet0_5": (torchvision.models.mnasnet0_5, 17),
    "torchvision resnet18": (torchvision.models.resnet18, 0),
    "timm tf_efficientnet_b0": (lambda: timm.create_model("tf_efficientnet_b0"), 16),
    "timm tf_efficientnetv2_b0": (lambda: timm.create_model("tf_efficientnetv2_b0"), 16),
    "timm tf_efficientnet_lite0": (lambda: timm.create_model("tf_efficientnet_lite0"), 16),
    "timm mobilenetv3_small_050": (lambda: timm.create_model("mobilenetv3_small_050"), 11),
    "timm mixnet_s": (lambda: timm.create_model("mixnet_s"), 0),
    "timm fbnetc_100": (lambda: timm.create_model("fbnetc_100"), 20),
    "timm tinynet_e": (lambda: timm.create_model("tinynet_e"), 10),
    "efficientnet_pytorch b0": (
        lambda: efficientnet_pytorch.EfficientNet.from_name("efficientnet-b0"),
        16,
    ),
    "efficientnet_lite_pytorch lite0": (
        lambda: efficientnet_lite_pytorch.EfficientNet.from_name("efficientnet-lite0"),
        16,
    ),
}
SMALL = "torchvision mobilenet_v3_small"
MODELS = torchvision.models


def small_vgg() -> nn.Module:
    features = MODELS.vgg.make_layers([8, "M", 16, "M", 16, 512], batch_norm=True)
    network = MODELS.VGG(features, init_weights=False)
    network.classifier = nn.Sequential(nn.Linear(512 * 7 * 7, 10))
    return network


# Recorded as wholes in evaluation; their blocks are not known.
WHOLES: dict[str, Callable[[], nn.Module]] = {
    "torchvision convnext": lambda: MODELS.ConvNeXt(
        [MODELS.convnext.CNBlockConfig(16, 32, 2), MODELS.convnext.CNBlockConfig(32, None, 2)]
    ),
    "torchvision densenet": lambda: MODELS.DenseNet(8, (2, 2, 2), 16),
    "torchvision googlenet": lambda: MODELS.GoogLeNet(aux_logits=False, init_weights=False),
    "torchvision inception": lambda: MODELS.Inception3(aux_logits=False, init_weights=False),
    "torchvision regnet_y_400mf": MODELS.regnet_y_400mf,
    "torchvision shufflenet_v2_x0_5": MODELS.shufflenet_v2_x0_5,
    "torchvision squeezenet1_1": MODELS.squeezenet1_1,
    "torchvision vgg": small_vgg,
    "timm convnext_atto": lambda: timm.create_model("convnext_atto"),
    "timm densenet": lambda: timm.models.densenet.DenseNet(8, (2, 2, 2)),
    "timm efficientvit_b0": lambda: timm.create_model("efficientvit_b0"),
    "timm gernet_s": lambda: timm.create_model("gernet_s"),
    "timm mobileone_s0": lambda: timm.create_model("mobileone_s0"),
    "timm regnety_002": lambda: timm.create_model("regnety_002"),
    "timm repvgg_a0": lambda: timm.create_model("repvgg_a0"),
    "timm rexnet_100": lambda: timm.create_model("rexnet_100"),
}


def settled(name: str, image: Tensor, seed: int | None = None) -> nn.Module:
    torch.manual_seed(len(name) if seed is None else seed)
    return settle(NETWORKS[name][0](), image).eval()


@pytest.fixture
def image() -> Tensor:
    return torch.randn(3, 3, 64, 64)


@pytest.fixture
def small(image: Tensor) -> nn.Module:
    return settled(SMALL, image)


def steps_of(replay: Replay | None) -> Counter[str]:
    assert replay is not None
    return Counter(
        step.function._schema.name if isinstance(step, Call) else step.kind.name.lower()
        for step in replay.steps
    )


def replay_of(network: nn.Module) -> Replay:
    (plan,) = network.__dict__["_plans"].values()
    return plan.run


@pytest.mark.parametrize("name", NETWORKS)
def test_outputs(name: str, image: Tensor) -> None:
    """Accelerated and frozen: as near to float64 as PyTorch, also for other batches and layouts."""
    errors = Errors()
    odd = torch.randn(2, 3, 71, 57)
    for seed in range(3):
        original = settled(name, image, seed)
        network = ek.accelerate(copy.deepcopy(original))
        frozen = ek.freeze(original)
        assert not any(isinstance(m, nn.BatchNorm2d) for m in frozen.modules()) or "mixnet" in name
        for x in (image, image[:1], image.to(memory_format=torch.channels_last), odd):
            with torch.no_grad():
                errors.add(original, x, network(x), frozen(x))
                assert torch.equal(network(x), network(x))
    errors.check()
    blocks = NETWORKS[name][1]
    kept = next(iter(frozen._replays.values())).replay
    assert steps_of(kept)["mbconv"] >= blocks


@pytest.mark.parametrize("name", WHOLES)
def test_whole_networks(name: str) -> None:
    """As near to float64 as PyTorch, by a replay that sees every change of the network."""
    errors = Errors()
    image = torch.randn(2, 3, 96, 96)
    for seed in range(3):
        torch.manual_seed(seed)
        original = settle(WHOLES[name](), torch.randn(8, 3, 96, 96)).eval()
        network = ek.accelerate(copy.deepcopy(original))
        with torch.no_grad():
            for x in (image, image.to(memory_format=torch.channels_last)):
                errors.add(original, x, network(x), ek.freeze(original)(x))
            assert replay_of(network) is not None
    errors.check()
    with torch.no_grad():
        before = network(image)
        for parameter in network.parameters():
            parameter.mul_(1.01)
        assert not torch.allclose(network(image), before)
        assert torch.equal(copy.deepcopy(network)(image), network(image))


def test_attribute_of_a_foreign_block_is_seen() -> None:
    """What such a block does is its own business: whatever it keeps may decide that."""
    network = ek.accelerate(timm.create_model("rexnet_100").eval())
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        before = network(image)
        block = next(block for block in network.features if block.use_shortcut)
        block.use_shortcut = False
        assert not torch.allclose(network(image), before)


@pytest.mark.parametrize("name", ["ghostnet_050", "mixnet_s"])
def test_pieces_alone_run_as_before(name: str) -> None:
    """In evaluation a replay of a normalisation or a gate alone is slower than PyTorch."""
    network = ek.accelerate(timm.create_model(name).eval())
    with torch.no_grad():
        network(torch.randn(1, 3, 64, 64))
    planned = {type(m).__name__ for m in network.modules() if m.__dict__.get("_plans")}
    assert planned and not planned & {"BatchNormAct2d", "SqueezeExcite"}


@pytest.mark.parametrize("name", NETWORKS)
def test_training(name: str, image: Tensor) -> None:
    original = settled(name, image).train()
    network = ek.accelerate(copy.deepcopy(original))
    exact = copy.deepcopy(original).double()
    results = []
    for model, x in ((exact, image.double()), (original, image), (network, image)):
        torch.manual_seed(7)  # dropout
        for module in model.modules():
            if isinstance(module, (nn.Dropout, torchvision.ops.StochasticDepth)):
                module.p = 0.0
        output = model(x)
        output.square().mean().backward()
        gradients = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        results.append((output.detach(), gradients, torch.cat([b.flatten() for b in stats(model)])))
    for reference, theirs, ours in zip(*results, strict=True):
        assert_close_to(reference, ours, theirs)


def stats(model: nn.Module) -> list[Tensor]:
    return [buffer for name, buffer in model.named_buffers() if name.endswith(("_mean", "_var"))]


def test_nothing_else_changes(small: nn.Module, image: Tensor) -> None:
    untouched = copy.deepcopy(small)
    before = {name: tensor.clone() for name, tensor in small.state_dict().items()}
    parameters = list(small.parameters())
    classes = [type(module) for module in small.modules()]
    small.features[1].requires_grad_(False)
    assert ek.accelerate(small) is small
    accelerated = [type(module) for module in small.modules()]
    assert accelerated != classes
    assert all(issubclass(new, old) for new, old in zip(accelerated, classes, strict=True))
    assert all(a is b for a, b in zip(small.parameters(), parameters, strict=True))
    assert list(small.state_dict()) == list(before)
    assert all(torch.equal(before[n], t) for n, t in small.state_dict().items())
    assert not any(p.requires_grad for p in small.features[1].parameters())
    ek.accelerate(small)
    assert [type(module) for module in small.modules()] == accelerated
    with torch.no_grad():
        due = small(image)
        for twin in (copy.deepcopy(small), pickle.loads(pickle.dumps(small))):
            assert type(twin) is type(small) and torch.equal(twin(image), due)
        ek.restore(small)
        assert [type(module) for module in small.modules()] == classes
        assert torch.equal(small(image), untouched(image))


def test_an_optimizer_from_before(small: nn.Module, image: Tensor) -> None:
    for module in small.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    twin = copy.deepcopy(small)
    optimizers = [torch.optim.SGD(model.parameters(), 1e-3) for model in (small, twin)]
    ek.accelerate(small)
    for model, optimizer in zip((small, twin), optimizers, strict=True):
        model.train()
        for _ in range(3):
            optimizer.zero_grad()
            model(image).square().mean().backward()
            optimizer.step()
        model.eval()
    loaded = copy.deepcopy(twin)
    loaded.load_state_dict(small.state_dict())
    with torch.no_grad():
        ours, theirs = loaded(image), twin(image)
        assert (ours - theirs).norm() < 1e-3 * theirs.norm()
        now = small(image)
        assert (now - ours).norm() < 1e-5 * ours.norm()


@pytest.mark.parametrize("prepare", [ek.accelerate, ek.freeze])
def test_changes_and_hooks_are_seen(prepare: Any, small: nn.Module, image: Tensor) -> None:
    network = prepare(small)
    inner = network.model if isinstance(network, ek.Frozen) else network
    with torch.no_grad():
        before = network(image)
        inner.features[0][0].weight.mul_(1.5)
        after = network(image)
        assert not torch.allclose(before, after)
        assert torch.allclose(after, copy.deepcopy(inner)(image), rtol=1e-3, atol=1e-4)
        seen: list[int] = []
        handle = inner.features[3].register_forward_hook(lambda *_: seen.append(1))
        hooked = network(image)
        assert seen == [1]
        torch.testing.assert_close(hooked, after, rtol=1e-3, atol=1e-4)
        handle.remove()
        network(image)
        assert seen == [1]


def test_frozen_copies_files_and_threads(small: nn.Module, image: Tensor) -> None:
    state = {name: tensor.clone() for name, tensor in small.state_dict().items()}
    frozen = ek.freeze(small)
    assert all(torch.equal(state[n], t) for n, t in small.state_dict().items())
    due = frozen(image)
    file = io.BytesIO()
    torch.save(frozen, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    again = ek.freeze(small)
    again.load_state_dict(frozen.state_dict())
    for twin in (loaded, copy.deepcopy(frozen), ek.freeze(frozen), again):
        assert torch.equal(twin(image), due)
    results: list[Tensor] = []
    threads = [threading.Thread(target=lambda: results.append(frozen(image))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4 and all(torch.equal(result, due) for result in results)


def test_frozen_exports_and_compiles(small: nn.Module, image: Tensor) -> None:
    frozen = ek.freeze(small)
    due = frozen(image)
    exported = torch.export.export(frozen, (image,)).module()
    compiled = torch.compile(frozen, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        for result in (exported(image), compiled(image)):
            assert (result - due).norm() < 1e-4 * due.norm()


def test_frozen_is_for_inference(small: nn.Module, image: Tensor) -> None:
    with pytest.warns(UserWarning, match="freeze: model is in training mode"):
        frozen = ek.freeze(small.train())
    assert small.training and not frozen.training
    with pytest.raises(RuntimeError, match="cannot train"):
        frozen.train()
    with pytest.raises(RuntimeError, match="cannot train"):
        frozen.requires_grad_()
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    x = image.clone().requires_grad_()
    frozen(x).sum().backward()  # gradients of the input are to be had
    assert x.grad is not None and x.grad.abs().sum() > 0
    with torch.autocast("cpu", torch.bfloat16):
        assert frozen(image).isfinite().all()


@pytest.mark.parametrize("function", [ek.accelerate, ek.freeze])
def test_bad_models(function: Any) -> None:
    name = function.__name__
    with pytest.raises(TypeError, match=f"^{name}: model is str"):
        function("resnet18")
    with torch.device("meta"):
        network = torchvision.models.mobilenet_v3_small()
    classes = [type(module) for module in network.modules()]
    with pytest.raises(ValueError, match=rf"^{name}: features.0.0.weight is on the meta device"):
        function(network)
    assert [type(module) for module in network.modules()] == classes


def test_unknown_models_are_said_once() -> None:
    class Mine(nn.Sequential):
        pass

    network = Mine(nn.Linear(2, 2))
    with pytest.warns(UserWarning, match="nothing in Mine is recognised"):
        assert ek.accelerate(network) is network
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ek.accelerate(network)
        ek.accelerate(ek.models.efficientnet_lite0())
        ek.restore(network)

    class Subclass(torchvision.models.MobileNetV2):
        def forward(self, x: Tensor) -> Tensor:
            return -super().forward(x)

    theirs = Subclass().eval()
    ek.accelerate(theirs)
    assert type(theirs) is Subclass


def test_distributed_wrapper(small: nn.Module, image: Tensor, tmp_path: Path) -> None:
    ek.accelerate(small)
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(small.train())
        wrapped(image).square().mean().backward()
        assert all(parameter.grad is not None for parameter in small.parameters())
        with torch.no_grad():
            assert torch.equal(wrapped.eval()(image), small(image))
    finally:
        torch.distributed.destroy_process_group()


def test_quantized_models_are_refused() -> None:
    layer = torch.ao.nn.quantized.Conv2d(3, 8, 1)
    network = nn.Sequential(layer, torchvision.models.mobilenetv2.InvertedResidual(8, 8, 1, 2))
    for function in (ek.accelerate, ek.freeze):
        with pytest.raises(ValueError, match="is quantized"):
            function(network)
    assert type(network[1]) is torchvision.models.mobilenetv2.InvertedResidual


def test_libraries_are_not_imported() -> None:
    script = (
        "import sys, torchvision, effkernels as ek;"
        "ek.accelerate(torchvision.models.mobilenet_v3_small());"
        "sys.exit('timm' in sys.modules or 'efficientnet_pytorch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


# ---- What is recorded, on small functions.


def conv(channels: int = 8, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(channels, channels, 3, padding=1, **options).eval()


def norm(channels: int = 8) -> nn.BatchNorm2d:
    module = nn.BatchNorm2d(channels).eval()
    make_realistic(module)
    return module


@torch.no_grad()
def check(function: Callable[[Tensor], Any], expected: dict[str, int] | None) -> None:
    """The replay gives what the function gives, in these steps; None: it cannot be replayed."""
    x, other = torch.randn(2, 8, 9, 10), torch.randn(2, 8, 9, 10)
    _, replay = record(function, x)
    if expected is None:
        assert replay is None
        return
    assert steps_of(replay) == expected
    assert replay is not None
    for image in (x, other):
        due = function(image.clone())
        results = replay(image)
        for ours, theirs in zip(leaves(results), leaves(due), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def leaves(result: Any) -> list[Tensor]:
    return torch.utils._pytree.tree_leaves(result)


def test_epilogues() -> None:
    a, b, n, act = conv(), conv(), norm(), nn.ReLU(inplace=True)
    check(lambda x: act(n(a(x))), {"conv": 1})
    check(lambda x: act(n(a(x)) + x), {"conv": 1})
    check(lambda x: act(x + n(a(x))), {"conv": 1})
    check(lambda x: n(a(act(a(x)))) + b(x), {"conv": 3})
    check(lambda x: torch.nn.functional.silu(a(x)).mean((2, 3)), {"conv": 1, "aten::mean": 1})
    pointwise = nn.Conv2d(8, 24, 1).eval()
    check(lambda x: pointwise(x).relu().mean((2, 3)), {"pointwise_conv": 1})
    check(lambda x: a(x) * torch.sigmoid(b(x)), {"conv": 2, "aten::mul": 1})

    def swish(x: Tensor) -> Tensor:
        hidden = a(x)
        return hidden * hidden.sigmoid()

    check(swish, {"conv": 1})


@pytest.mark.parametrize("bias", [False, True])
def test_a_norm_goes_into_a_foreign_convolution(bias: bool) -> None:
    grouped, n = nn.Conv2d(8, 8, 3, 2, 1, groups=2, bias=bias), norm()
    check(lambda x: n(grouped(x)), {"aten::convolution": 1})
    plain = norm()
    plain.weight = plain.bias = None
    check(lambda x: plain(n(grouped(x))), {"aten::convolution": 1})
    check(lambda x: n(grouped(x)).relu(), {"aten::convolution": 1, "silu": 1})

    def read_twice(x: Tensor) -> Tensor:
        hidden = grouped(x)
        return n(hidden) + hidden

    unfolded = {"aten::convolution": 1, "batch_norm_act": 1}
    check(read_twice, unfolded)  # which adds it, too
    check(lambda x: [y := grouped(x), n(y)], unfolded)
    wide = nn.ConvTranspose2d(8, 8, 3)
    check(lambda x: n(wide(x)), unfolded)
    check(
        lambda x: n(
            nn.functional.conv2d(x, x.mean((0, 2, 3)).view(8, 1, 1, 1).expand(8, 4, 3, 3), groups=2)
        ),
        {**unfolded, "aten::mean": 1, "aten::reshape": 1, "aten::expand": 1},
    )


def test_what_must_not_fuse() -> None:
    a, n = conv(), norm()

    def read_twice(x: Tensor) -> Tensor:
        hidden = a(x)
        return hidden.relu() + hidden

    def added_then_normalised(x: Tensor) -> Tensor:
        return n(a(x) + x)

    def activated_then_added(x: Tensor) -> Tensor:
        return a(x).relu() + x

    def wanted(x: Tensor) -> list[Tensor]:
        hidden = a(x)
        return [hidden, hidden.relu()]

    check(read_twice, {"conv": 1, "silu": 2})
    check(added_then_normalised, {"conv": 1, "batch_norm_act": 1})
    check(activated_then_added, {"conv": 1, "silu": 1})
    check(wanted, {"conv": 1, "silu": 1})
    check(lambda x: a(x) + torch.ones(8, 9, 10), {"conv": 1, "aten::add": 1})
    check(lambda x: nn.functional.hardtanh(a(x), -1, 1), {"conv": 1, "aten::hardtanh": 1})


def test_inverted_residuals() -> None:
    """As one step, but with one activation in front of the projection only."""
    expand, widen = nn.Conv2d(8, 32, 1).eval(), conv(32, groups=32)
    project, other = nn.Conv2d(32, 8, 1).eval(), nn.Conv2d(8, 32, 1).eval()
    silu, relu = nn.functional.silu, nn.functional.relu
    check(lambda x: project(silu(widen(silu(expand(x))))) + x, {"mbconv": 1})
    check(
        lambda x: relu(project(relu(widen(x.repeat(1, 4, 1, 1))))), {"aten::repeat": 1, "mbconv": 1}
    )
    separate = {"pointwise_conv": 1, "mbconv": 1}  # depthwise and projection are still one
    check(lambda x: project(silu(widen(relu(expand(x))))), separate)

    def expanded_is_read_twice(x: Tensor) -> Tensor:
        hidden = silu(expand(x))
        return torch.cat([project(silu(widen(hidden))), hidden], 1)

    def hidden_is_read_twice(x: Tensor) -> Tensor:
        hidden = silu(widen(silu(expand(x))))
        return torch.cat([project(hidden), hidden], 1)

    check(expanded_is_read_twice, {**separate, "copy": 2})
    check(hidden_is_read_twice, {"pointwise_conv": 2, "depthwise_conv": 1, "copy": 2})

    def gated(x: Tensor, gate_of: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        hidden = silu(widen(silu(expand(x))))
        return project(hidden * gate_of(x, hidden.mean((2, 3), keepdim=True)))

    reduce = nn.Conv2d(32, 8, 1).eval()
    check(lambda x: gated(x, lambda _, m: other(silu(reduce(m))).sigmoid()), {"mbconv": 1})
    check(
        lambda x: gated(x, lambda x, _: other(silu(x.mean((2, 3), keepdim=True))).sigmoid()),
        {"aten::mean": 1, "silu": 1, "pointwise_conv": 3, "depthwise_conv": 1, "aten::mul": 1},
    )
    check(
        lambda x: gated(x, lambda _, m: other(silu(reduce(m)) + reduce(m)).sigmoid()),
        {"pointwise_conv": 5, "depthwise_conv": 1, "aten::mul": 1},
    )


def test_squeeze_excite() -> None:
    """Wherever it is: behind other convolutions, other ops, with a norm in it."""
    a, point, grouped = conv(), nn.Conv2d(8, 8, 1).eval(), nn.Conv2d(8, 8, 3, 1, 1, groups=2).eval()
    reduce, widen, n = nn.Conv2d(8, 4, 1).eval(), nn.Conv2d(4, 8, 1).eval(), norm(4)

    def squeezed(x: Tensor, inner: Callable[[Tensor], Tensor] = reduce, sides: Any = (2, 3)) -> Any:
        mean = x.mean(sides, keepdim=True)
        return x * widen(inner(mean).relu()).sigmoid()

    check(squeezed, {"squeeze_excite": 1})
    check(lambda x: squeezed(a(x)), {"conv": 1, "squeeze_excite": 1})
    check(lambda x: squeezed(point(x).relu()), {"pointwise_conv": 1, "squeeze_excite": 1})
    check(lambda x: squeezed(grouped(x)), {"aten::convolution": 1, "squeeze_excite": 1})
    check(lambda x: squeezed(a(x), lambda m: n(reduce(m))), {"conv": 1, "squeeze_excite": 1})
    check(lambda x: squeezed(x, sides=(-1, -2)), {"squeeze_excite": 1})
    with torch.no_grad():
        _, replay = record(lambda x: squeezed(point(x)), torch.randn(2, 8, 9, 10))
    assert replay is not None and not any(step.mean for step in replay.steps)  # not computed twice

    parts = {"pointwise_conv": 2, "aten::mean": 1, "aten::mul": 1}

    def mean_is_read_twice(x: Tensor) -> Tensor:
        mean = x.mean((2, 3), keepdim=True)
        return x * widen(reduce(mean)).sigmoid() + mean

    def mean_is_wanted(x: Tensor) -> list[Tensor]:
        mean = x.mean((2, 3), keepdim=True)
        return [x * widen(reduce(mean)).sigmoid(), mean]

    def of_another(x: Tensor) -> Tensor:
        hidden = a(x)
        return hidden * widen(reduce(x.mean((2, 3), keepdim=True))).sigmoid()

    check(mean_is_read_twice, {**parts, "aten::add": 1})
    check(mean_is_wanted, parts)
    check(of_another, {**parts, "conv": 1})


def test_norm_alone() -> None:
    """One pass with the addition and the activation behind it."""
    a, n, plain, flat = conv(), norm(), norm(), nn.BatchNorm1d(8).eval()
    plain.weight = plain.bias = None
    check(lambda x: n(x).relu(), {"batch_norm_act": 1})
    check(lambda x: (n(x) + x).relu(), {"batch_norm_act": 1})
    check(lambda x: a(plain(x)), {"batch_norm_act": 1, "conv": 1})
    check(lambda x: plain(n(x)), {"batch_norm_act": 2})
    check(lambda x: n(a(x).relu()), {"batch_norm_act": 1, "conv": 1})
    check(lambda x: flat(x.mean((2, 3))), {"aten::mean": 1, "batch_norm_act": 1})
    check(lambda x: [y := n(x), y.relu()], {"batch_norm_act": 1, "silu": 1})
    check(
        lambda x: torch.ops.aten._native_batch_norm_legit_no_training(
            x, n.weight, n.bias, n.running_mean, n.running_var, 0.1, 1e-3
        )[0],
        {"batch_norm_act": 1},
    )


def test_additions() -> None:
    """With the activation behind them; in the convolution before, where there is one."""
    a, depthwise = conv(), conv(groups=8)
    check(lambda x: nn.functional.silu(x + x.relu()), {"silu": 2})
    check(lambda x: (depthwise(x) + x).relu(), {"depthwise_conv": 1, "silu": 1})
    check(lambda x: a(x) + a(x).relu() + x, {"conv": 2, "silu": 2})
    check(lambda x: (x + x).relu(), {"silu": 1})
    # no SiLU: the sigmoid is of something else
    check(lambda x: x * torch.sigmoid(x + x.relu()), {"silu": 2, "aten::mul": 1})
    check(lambda x: [y := depthwise(x) + x, y.relu()], {"depthwise_conv": 1, "silu": 2})
    check(lambda x: depthwise(x).add_(x).mul(2.0), {"depthwise_conv": 1, "silu": 1, "aten::mul": 1})
    check(lambda x: torch.add(x, a(x), alpha=2.0), {"conv": 1, "aten::add": 1})
    check(
        lambda x: x + a(x).mean((2, 3), keepdim=True), {"conv": 1, "aten::mean": 1, "aten::add": 1}
    )


def test_channels_side_by_side() -> None:
    """Concatenations, and parts of the channels: copies within one program."""
    a, b, n, d = conv(), nn.Conv2d(8, 4, 1).eval(), norm(12), conv(groups=8)
    both = {"conv": 1, "pointwise_conv": 1, "copy": 2}

    def beside(x: Tensor) -> Tensor:
        return torch.cat([a(x), b(x)], 1)

    check(beside, both)
    check(lambda x: torch.cat([x, a(x), x], -3), {"conv": 1, "copy": 3})
    check(lambda x: torch.cat([a(x)], 1), {"conv": 1, "copy": 1})
    # Normalisation and activation go to where the parts are made.
    check(lambda x: n(beside(x)).relu(), both)
    check(lambda x: nn.functional.silu(beside(x)), both)
    check(lambda x: n(torch.cat([a(x), x[:, 2:6]], 1)), {"conv": 1, "copy": 3, "batch_norm_act": 1})
    check(lambda x: n(torch.cat([a(x) + x, b(x)], 1)), {**both, "batch_norm_act": 1})
    check(lambda x: [y := beside(x), y.relu()], {**both, "silu": 1})

    def part_is_read_twice(x: Tensor) -> Tensor:
        part = b(x)
        return torch.cat([part, torch.cat([a(x), part], 1).relu()], 1)

    check(part_is_read_twice, {"conv": 1, "pointwise_conv": 1, "silu": 1, "copy": 4})
    check(
        lambda x: torch.cat([c := b(x), c], 1).relu(), {"pointwise_conv": 1, "copy": 2, "silu": 1}
    )

    def split(x: Tensor) -> Tensor:
        one, two, three = torch.split(a(x), [3, 1, 4], 1)
        return torch.cat([three.relu(), one.relu(), two], 1)

    check(split, {"conv": 1, "copy": 6, "silu": 2})
    check(lambda x: d(torch.cat(x.chunk(2, 1)[::-1], 1)), {"depthwise_conv": 1, "copy": 4})
    check(lambda x: b(x)[:, -3:-1] + b(x)[:, 1:3], {"pointwise_conv": 2, "copy": 2, "silu": 1})
    check(lambda x: a(x)[:, 1:5].relu() + a(x)[:, :4], {"conv": 2, "copy": 2, "silu": 2})
    # along other axes, or of vectors
    check(lambda x: torch.cat([a(x), x], 2), {"conv": 1, "aten::cat": 1})
    check(lambda x: a(x)[:, :, 1:].relu(), {"conv": 1, "aten::slice": 1, "silu": 1})
    check(lambda x: a(x)[:, ::2].relu(), {"conv": 1, "aten::slice": 1, "silu": 1})
    flat = {"aten::mean": 1, "copy": 3, "silu": 1}
    check(lambda x: torch.cat([m := x.mean((2, 3)), m.relu()[:, 2:]], 1), flat)


def test_padding() -> None:
    a = nn.Conv2d(8, 8, 3, stride=2).eval()
    pad = torch.nn.functional.pad
    check(lambda x: a(pad(x, (0, 1, 0, 1))), {"conv": 1})
    check(lambda x: a(pad(x, (1, 2, 0, 1))), {"conv": 1})
    check(lambda x: a(pad(x, (0, 1, 0, 1), value=1.0)), {"aten::constant_pad_nd": 1, "conv": 1})
    check(lambda x: a(pad(x, (-1, 1, 0, 1))), {"aten::constant_pad_nd": 1, "conv": 1})


def test_names_of_a_tensor() -> None:
    a = conv()

    def changed_behind_a_view(x: Tensor) -> Tensor:
        hidden = a(x)
        view = hidden.view(2, 8, 90)
        hidden.relu_()
        return view.sum(2)

    check(changed_behind_a_view, None)
    check(lambda x: a(x.relu_()), None)  # the caller's tensor
    check(
        lambda x: a(x).relu_().view(2, 8, 90).sum(2),
        {"conv": 1, "aten::reshape": 1, "aten::sum": 1},
    )


def test_what_a_replay_would_not_repeat() -> None:
    a, counter, training = conv(), torch.zeros(1), nn.BatchNorm2d(8)
    check(lambda x: nn.functional.dropout(a(x), 0.5), None)
    check(lambda x: a(x) + torch.rand(1), None)
    check(lambda x: a(x) * float(x.mean()), None)
    check(lambda x: a(x) + counter.add_(1), None)
    check(lambda x: training(a(x)), None)


def test_outputs_of_every_shape() -> None:
    a, b = conv(), conv(groups=8)
    check(lambda x: {"one": a(x), "two": [b(x), a(b(x))]}, {"conv": 2, "depthwise_conv": 2})
    check(lambda x: a(x).mean((2, 3)).reshape(2, 8, 1, 1), {"conv": 1, "aten::mean": 1})
    check(lambda x: torch.cat([a(x), b(x)], 1), {"conv": 1, "depthwise_conv": 1, "copy": 2})


@torch.no_grad()
def test_memory_of_a_program_is_shared_but_never_while_needed() -> None:
    """Random chains with long shortcuts: a value that is overwritten too early would show."""
    convs = [conv() for _ in range(6)] * 2
    for _ in range(10):
        picks = [int(torch.randint(1 + layer, (1,))) for layer in range(len(convs))]

        def tangled(x: Tensor, picks: list[int] = picks) -> Tensor:
            values = [x]
            for layer, pick in zip(convs, picks, strict=True):
                hidden = layer(values[-1])
                if layer is convs[2]:
                    hidden = torch.cat([values[pick][:, :3], hidden[:, 3:]], 1)
                values.append(hidden.relu() if pick % 2 else hidden + values[pick])
            return values[-1]

        x = torch.randn(1, 8, 6, 6)
        due, replay = tangled(x), record(tangled, x)[1]
        assert replay is not None and replay.any_batch
        torch.testing.assert_close(replay(x), due, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("seed", range(30))
@torch.no_grad()
def test_tangles_of_everything(seed: int) -> None:
    """Random networks of all that steps are made of, whose values are read here and there."""
    torch.manual_seed(seed)
    draw = random.Random(seed)
    chosen = [draw.randrange(len(MOVES)) for _ in range(14)]
    layers = {
        "conv": conv(),
        "depthwise": conv(groups=8),
        "grouped": nn.Conv2d(8, 8, 3, padding=1, groups=4),
        "point": nn.Conv2d(8, 8, 1),
        "norm": norm(),
        "gate": torchvision.ops.SqueezeExcitation(8, 4),
    }
    picks = [draw.random() for _ in chosen]

    def tangle(x: Tensor) -> list[Tensor]:
        values = [x]
        for move, pick in zip(chosen, picks, strict=True):
            # the last one more often than not, as in real networks
            other = values[int(pick * len(values))]
            one = values[-1] if pick < 0.7 else other
            values.append(MOVES[move](layers, one, other))
        return [values[-1], values[len(values) // 2]]

    x = torch.randn(2, 8, 7, 6)
    due, replay = tangle(x), record(tangle, x)[1]
    assert replay is not None
    for got, expected in zip(replay(x), due, strict=True):
        torch.testing.assert_close(
            got, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max())
        )


Layers = dict[str, nn.Module]
MOVES: list[Callable[[Layers, Tensor, Tensor], Tensor]] = [
    lambda layers, x, _: layers["conv"](x),
    lambda layers, x, _: layers["depthwise"](x),
    lambda layers, x, _: layers["grouped"](x),
    lambda layers, x, _: layers["point"](x),
    lambda layers, x, _: layers["norm"](x),
    lambda layers, x, _: layers["gate"](x),
    lambda layers, x, _: nn.functional.silu(x),
    lambda layers, x, _: x * x.sigmoid(),
    lambda layers, x, y: x * y.sigmoid(),
    lambda layers, x, _: x.relu(),
    lambda layers, x, y: x + y,
    lambda layers, x, y: y + x,
    lambda layers, x, y: torch.cat([x[:, 4:], y[:, :4]], 1),
    lambda layers, x, y: layers["norm"](torch.cat([x, y], 1)[:, 3:11]),
    lambda layers, x, _: torch.cat(layers["point"](x).split([2, 6], 1)[::-1], 1).relu(),
    lambda layers, x, y: x * layers["gate"].fc2(layers["gate"].fc1(y.mean((2, 3), True))).sigmoid(),
    lambda layers, x, y: x + y.mean((2, 3), keepdim=True),
]


def test_programs_are_freed_and_check_their_arguments() -> None:
    x = torch.randn(1, 8, 6, 6)
    with torch.no_grad():
        _, replay = record(conv(), x)
    assert replay is not None
    (program,) = replay._parts
    assert isinstance(program, Program)
    run, handle = torch.ops.effkernels_cpu.program_run, program._handle
    output = torch.empty(1, 8, 6, 6)
    with pytest.raises(RuntimeError, match="another number of tensors"):
        run(handle, [x])
    with pytest.raises(RuntimeError, match="accepted"):
        run(handle, [x, output[:, :, :5]])
    with pytest.raises(RuntimeError, match="another dtype"):
        run(handle, [x, output.bfloat16()])
    create = torch.ops.effkernels_cpu.program_create
    with pytest.raises(RuntimeError, match="incomplete"):
        create([1, 1, 1], [], [], False)
    with pytest.raises(RuntimeError, match="no value"):
        create([1, 1, 8, -1], [5, 0, -1, 7, -1] + [0] * 26, [], False)
    with pytest.raises(RuntimeError, match="unknown step"):
        create([1, 1, 8, -1], [99, 0, -1, 0, -1] + [0] * 26, [], False)
    with pytest.raises(RuntimeError, match="no weight"):
        create([1, 1, 8, -1], [1, 0, -1, 0, -1] + [0] * 13 + [5] * 13, [], False)
    del program, replay
    with pytest.raises(RuntimeError, match="no program"):
        run(handle, [x, output])


class Looks(nn.Module):
    """A network that goes by its values."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.calls = conv(), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        y = self.a(x)
        if float(y.abs().max()) == 0.0:
            raise ValueError("only zeros")
        return y


@pytest.fixture
def _empty_is_nan() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def pooled(x: Tensor) -> Tensor:
    scale = nn.functional.adaptive_avg_pool2d(x, 1).sigmoid()
    return nn.functional.silu(x) * scale + x


@torch.no_grad()
@pytest.mark.usefixtures("_empty_is_nan")
@pytest.mark.parametrize("inference", [False, True], ids=["no_grad", "inference_mode"])
def test_recording_computes_only_what_is_asked_for(inference: bool) -> None:
    x, network = torch.randn(1, 8, 6, 6), Looks()
    convolution, permuted = conv(), conv().to(memory_format=torch.channels_last)
    block = ek.MBConv(8, 8, kernel_size=3).eval()
    for function in (convolution, permuted, block, lambda x: pooled(convolution(x))):
        for image in (x, x.to(memory_format=torch.channels_last)):
            seen: list[Tensor] = []

            def watched(
                image: Tensor, function: Callable[..., Any] = function, seen: Any = seen
            ) -> Tensor:
                seen.append(function(image))
                return seen[-1].relu()

            with torch.inference_mode(inference):
                replay = _rehearse(watched, image)
                due = function(image)
                assert replay is not None and seen[0].isnan().all()  # nobody looked at it
                assert seen[0].shape == due.shape and seen[0].stride() == due.stride()
                assert torch.allclose(replay(image), due.relu(), atol=1e-5)
    assert _rehearse(network, x) is None
    frozen = ek.freeze(network)
    frozen.model.calls = 0
    for _ in range(2):
        assert torch.allclose(frozen(x), network.a(x), atol=1e-5)
    assert frozen.model.calls == 3  # rehearsed in vain, recorded, and run as it is
