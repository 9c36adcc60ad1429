"""ResNet against torchvision and timm."""

from __future__ import annotations

import copy
import pickle
from functools import partial
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

import effkernels as ek
from effkernels.testing import assert_close_to
from tests.models.feature_maps import assert_feature_maps_agree
from tests.networks import assert_networks_agree, settle

PARAMETERS = {
    "resnet18": 11_689_512,
    "resnet34": 21_797_672,
    "resnet50": 25_557_032,
    "resnet101": 44_549_160,
    "resnet152": 60_192_808,
}


def shapes(network: nn.Module) -> dict[str, torch.Size]:
    return {key: value.shape for key, value in network.state_dict().items()}


def parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.parametrize("name", PARAMETERS)
def test_structure_is_torchvisions_and_timms(name: str) -> None:
    with torch.device("meta"):
        ours = ek.models.create_model(name)
        squeezing = ek.models.create_model(name, se_ratio=1 / 16)
        theirs = torchvision.models.get_model(name)
        timms = timm.create_model(name)
        timms_squeezing = timm.create_model(f"se{name}")
    assert list(ours.state_dict()) == list(theirs.state_dict()) == list(timms.state_dict())
    assert shapes(ours) == shapes(theirs) == shapes(timms)
    assert parameters(ours) == PARAMETERS[name]
    assert list(squeezing.state_dict()) == list(timms_squeezing.state_dict())
    assert shapes(squeezing) == shapes(timms_squeezing)


def test_ten_classes() -> None:
    with torch.device("meta"):
        assert parameters(ek.models.resnet18(num_classes=10)) == 11_181_642


def test_starts_like_torchvisions() -> None:
    """The same seed gives the same weights."""
    for options in ({}, {"zero_init_residual": True}):
        torch.manual_seed(3)
        ours = ek.models.resnet18(num_classes=5, **options).state_dict()
        torch.manual_seed(3)
        theirs = torchvision.models.resnet18(num_classes=5, **options).state_dict()
        for key, value in theirs.items():
            assert torch.equal(ours[key], value), key


def test_zero_init_residual_of_bottlenecks() -> None:
    network = ek.models.resnet50(num_classes=5, zero_init_residual=True)
    for block in (block for layer in (network.layer1, network.layer4) for block in layer):
        assert not block.bn3.weight.any() and block.bn2.weight.all()


def twins(
    name: str, size: tuple[int, int], batch: int = 2, **options: Any
) -> tuple[nn.Module, nn.Module, Tensor]:
    """Our network, torchvision's, and a batch; same weights."""
    theirs = torchvision.models.get_model(name, num_classes=100)
    ours = ek.models.create_model(name, num_classes=100, **options)
    if ours.data_config.resolution == 32:
        theirs.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
        theirs.maxpool = nn.Identity()
    image = torch.randn(batch, 3, *size)
    settle(theirs, image)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs, image


def squeezing_twins(batch: int, size: int) -> tuple[nn.Module, nn.Module, Tensor]:
    """With SE and SiLU, which has no kinks: our ResNet-18, timm's, and a batch."""
    theirs = timm.create_model("seresnet18", num_classes=100, act_layer=nn.SiLU)
    ours = ek.models.resnet18(num_classes=100, se_ratio=1 / 16, act_layer=nn.SiLU)
    image = torch.randn(batch, 3, size, size)
    settle(theirs, image)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs, image


@pytest.mark.parametrize(
    ("name", "size", "options"),
    [
        ("resnet18", (65, 96), {}),
        ("resnet18", (33, 32), {"stem": "cifar"}),
        ("resnet50", (64, 75), {}),
    ],
)
def test_evaluation_like_torchvision(
    name: str, size: tuple[int, int], options: dict[str, Any], backend: str
) -> None:
    ours, theirs, image = twins(name, size, **options)
    assert_networks_agree(ours, theirs, image, gradients=False)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_squeeze_excite_and_silu_like_timm(training: bool, backend: str) -> None:
    ours, theirs, image = squeezing_twins(8, 64)
    assert_networks_agree(ours, theirs, image, training)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_gradients_like_torchvision(name: str, training: bool) -> None:
    """In float64: in float32 single values cross ReLU's kink, in any implementation."""
    ours, theirs, image = twins(name, (48, 48))
    gradients = []
    for network in (ours.double(), theirs.double()):
        network.train(training)
        network(image.double()).square().sum().backward()
        gradients.append([parameter.grad for parameter in network.parameters()])
    largest = max(float(gradient.abs().max()) for gradient in gradients[1])
    for got, due in zip(*gradients, strict=True):
        torch.testing.assert_close(got, due, rtol=1e-8, atol=1e-12 * largest)


def test_training_in_float32_like_torchvision(backend: str) -> None:
    ours, theirs, image = twins("resnet18", (64, 64), batch=4)
    assert_networks_agree(ours, theirs, image, training=True, gradients=False)


def test_bfloat16(backend: str) -> None:
    ours, theirs, image = twins("resnet18", (64, 64))
    for network in (ours, theirs):
        network.eval().to(torch.bfloat16)
    image = image.bfloat16()
    with torch.no_grad():
        due = copy.deepcopy(theirs).double()(image.double())
        assert_close_to(due, ours(image), theirs(image))


def test_dropout_is_in_training_only() -> None:
    network = ek.models.resnet18(num_classes=10, stem="cifar", drop_rate=0.5)
    image = torch.randn(2, 3, 16, 16)
    network.fc = nn.Identity()
    network.eval()
    assert torch.equal(network(image), network.forward_features(image))
    network.train()
    assert 0.3 < float((network(image) == 0).float().mean()) < 0.7


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_feature_maps_like_timm(name: str, backend: str) -> None:
    ours = ek.models.create_model(name, features_only=True, num_classes=3)
    assert_feature_maps_agree(ours, timm.create_model(name, features_only=True))


@pytest.mark.parametrize(
    ("stem", "reductions"), [("imagenet", [2, 4, 8, 16, 32]), ("cifar", [1, 2, 4, 8])]
)
def test_feature_info_says_what_comes(stem: str, reductions: list[int]) -> None:
    with torch.device("meta"):
        network = ek.models.resnet50(features_only=True, stem=stem).eval()
        maps = network(torch.empty(1, 3, 64, 64))
    assert [feature.reduction for feature in network.feature_info] == reductions
    for feature, found in zip(network.feature_info, maps, strict=True):
        side = 64 // feature.reduction
        assert found.shape == (1, feature.channels, side, side)


def test_without_classifier_and_other_images(backend: str) -> None:
    network = ek.models.resnet18(num_classes=0, in_channels=1, stem="cifar").eval()
    with torch.no_grad():
        assert network(torch.randn(2, 1, 16, 16)).shape == (2, network.num_features) == (2, 512)
        assert network(torch.randn(0, 1, 16, 16)).shape == (0, 512)


@pytest.mark.parametrize(
    "name",
    [
        "act1",
        "maxpool",
        "layer1.0.act2",
        "layer1.1.conv2",
        "layer2.0.downsample",
        "layer2.0.downsample.1",
        "layer3.0.se",
        "layer3.0.se.fc1",
        "layer4",
        "fc",
    ],
)
def test_hooks_run(name: str) -> None:
    network = ek.models.resnet18(num_classes=3, se_ratio=1 / 16, act_layer=nn.SiLU)
    network.eval()
    image = torch.randn(1, 3, 32, 32)
    seen = []
    with torch.no_grad():
        due = network(image)
        network.get_submodule(name).register_forward_hook(lambda *_: seen.append(name))
        torch.testing.assert_close(network(image), due)
    assert seen == [name]


def test_replaced_children_run(backend: str) -> None:
    class Doubled(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, input: Tensor) -> Tensor:
            return 2 * self.inner(input)

    ours, theirs, image = twins("resnet18", (32, 32))
    for network in (ours, theirs):
        block = network.layer2[0]
        block.downsample[0] = Doubled(block.downsample[0])
        block.conv2 = Doubled(block.conv2)
    assert_networks_agree(ours, theirs, image, gradients=False)


def test_compiles_exports_and_copies() -> None:
    network, _, image = squeezing_twins(2, 32)
    network.eval()
    with torch.no_grad():
        due = network(image)
        # The same kernels in other groups round otherwise, and this network multiplies that.
        close = partial(torch.testing.assert_close, rtol=0.0, atol=1e-3 * float(due.abs().max()))
        compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
        close(compiled(image), due)
        exported = torch.export.export(network, (image,)).module()
        close(exported(image), due)
        assert torch.equal(copy.deepcopy(network)(image), due)
        assert torch.equal(pickle.loads(pickle.dumps(network))(image), due)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": -1}, "num_classes is -1"),
        ({"in_channels": 0}, "in_channels is 0"),
        ({"drop_rate": 1.0}, "drop_rate is 1.0"),
        ({"stem": "mnist"}, "stem is 'mnist', 'imagenet' or 'cifar' is accepted"),
        ({"se_ratio": -1}, "se_ratio is -1"),
        ({"stem": None, "features_only": True}, "stem is None"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        ek.models.create_model("resnet18", **options)
