"""EfficientNet and EfficientNet-Lite against timm, torchvision and efficientnet_pytorch."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

import effkernels as ek
from effkernels.testing import assert_close_to
from tests.models.feature_maps import assert_feature_maps_agree
from tests.networks import Errors, assert_networks_agree, batch_norms, settle

PARAMETERS = {
    "efficientnet_b0": 5_288_548,
    "efficientnet_b1": 7_794_184,
    "efficientnet_b2": 9_109_994,
    "efficientnet_b3": 12_233_232,
    "efficientnet_b4": 19_341_616,
    "efficientnet_b5": 30_389_784,
    "efficientnet_b6": 43_040_704,
    "efficientnet_b7": 66_347_960,
    "efficientnet_lite0": 4_652_008,
    "efficientnet_lite1": 5_416_680,
    "efficientnet_lite2": 6_092_072,
    "efficientnet_lite3": 8_197_096,
    "efficientnet_lite4": 13_006_568,
}


def timm_name(name: str) -> str:
    return f"tf_{name}" if "lite" in name else name


def twins(
    name: str, size: tuple[int, int], batch: int = 3, **options: Any
) -> tuple[nn.Module, nn.Module, Tensor]:
    """Our network, timm's TensorFlow variant (eps 1e-3, SAME), and a batch; same weights."""
    foreign = {"drop_rate": options.get("drop_rate", 0.0), "num_classes": 100}
    theirs = timm.create_model(f"tf_{name}", **foreign)
    options = {"num_classes": 100, "drop_path_rate": 0.0, "drop_rate": 0.0, **options}
    ours = ek.models.create_model(name, padding="same", **options)
    image = torch.randn(batch, 3, *size)
    settle(theirs, image)
    ours.load_state_dict(theirs.state_dict())
    for norm, foreign_norm in zip(batch_norms(ours), batch_norms(theirs), strict=True):
        foreign_norm.momentum = norm.momentum
        assert norm.eps == foreign_norm.eps == 1e-3
    return ours, theirs, image


@pytest.mark.parametrize("name", PARAMETERS)
def test_structure_is_timms(name: str) -> None:
    with torch.device("meta"):
        ours = ek.models.create_model(name)
        theirs = timm.create_model(timm_name(name))
    assert {k: v.shape for k, v in ours.state_dict().items()} == {
        k: v.shape for k, v in theirs.state_dict().items()
    }
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert sum(parameter.numel() for parameter in ours.parameters()) == PARAMETERS[name]


@pytest.mark.parametrize("index", range(8))
def test_size_is_torchvisions(index: int) -> None:
    with torch.device("meta"):
        theirs = getattr(torchvision.models, f"efficientnet_b{index}")()
    count = sum(parameter.numel() for parameter in theirs.parameters())
    assert count == PARAMETERS[f"efficientnet_b{index}"]


def test_hyperparameters_of_the_released_code() -> None:
    rows = {
        name: (variant.data_config.resolution, variant.drop_rate)
        for name, variant in ek.models.efficientnet.VARIANTS.items()
    }
    assert [rows[f"efficientnet_b{i}"] for i in range(8)] == [
        (224, 0.2), (240, 0.2), (260, 0.3), (300, 0.3),
        (380, 0.4), (456, 0.4), (528, 0.5), (600, 0.5),
    ]  # fmt: skip
    assert [rows[f"efficientnet_lite{i}"] for i in range(5)] == [
        (224, 0.2), (240, 0.2), (260, 0.3), (280, 0.3), (300, 0.3),
    ]  # fmt: skip
    with torch.device("meta"):
        network = ek.models.efficientnet_b0()
        lite = ek.models.efficientnet_lite4()
    assert {(norm.eps, norm.momentum) for norm in batch_norms(network)} == {(1e-3, 0.01)}
    blocks = [block for stage in network.blocks for block in stage]
    assert [round(block.drop_path, 6) for block in blocks] == [
        round(0.2 * index / 16, 6) for index in range(16)
    ]
    assert network.drop_rate == 0.2
    assert lite.data_config.mean == (127 / 255,) * 3 and lite.data_config.std == (128 / 255,) * 3
    assert not any(isinstance(module, ek.SqueezeExcite) for module in lite.modules())


def one_by_one(network: nn.Module, images: Tensor) -> Tensor:
    return torch.cat([network(image) for image in images.split(1)])


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("efficientnet_b0", (65, 96)),
        ("efficientnet_b2", (64, 64)),
        ("efficientnet_lite0", (70, 97)),
    ],
)
def test_evaluation_like_timm(name: str, size: tuple[int, int], backend: str) -> None:
    ours, theirs, image = twins(name, size)
    assert_networks_agree(ours, theirs, image, gradients=False)
    assert_networks_agree(ours, theirs, image, gradients=False, forward=one_by_one)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_gradients_like_timm(training: bool, backend: str) -> None:
    # A batch's statistics over fewer values would amplify every rounding, PyTorch's and ours.
    ours, theirs, image = twins("efficientnet_b0", (96, 96), batch=8)
    assert_networks_agree(ours, theirs, image, training)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_gradients_of_lite_like_timm(training: bool) -> None:
    """In float64: in float32 single values cross ReLU6's kinks, in any implementation."""
    ours, theirs, image = twins("efficientnet_lite0", (64, 64))
    gradients = []
    for network in (ours.double(), theirs.double()):
        network.train(training)
        network(image.double()).square().sum().backward()
        gradients.append([parameter.grad for parameter in network.parameters()])
    largest = max(float(gradient.abs().max()) for gradient in gradients[1])
    for got, due in zip(*gradients, strict=True):
        torch.testing.assert_close(got, due, rtol=1e-8, atol=1e-12 * largest)


@pytest.mark.parametrize("size", [(64, 64), (33, 75)])
def test_evaluation_like_torchvision(size: tuple[int, int], backend: str) -> None:
    """Symmetric padding; torchvision's B0 has another eps, which is the source model's to say."""
    errors, image = Errors(), torch.randn(2, 3, *size)
    for _ in range(6):
        theirs = settle(torchvision.models.efficientnet_b0(num_classes=100), image).eval()
        ours = ek.models.efficientnet_b0(num_classes=100, bn_eps=1e-5).eval()
        ek.models.load_checkpoint(ours, theirs.state_dict())
        with torch.no_grad():
            errors.add(theirs, image, ours(image))
    errors.check()


def test_dropout_is_in_training_only(backend: str) -> None:
    ours, theirs, image = twins("efficientnet_lite0", (40, 40), drop_rate=0.4)
    assert_networks_agree(ours, theirs, image, training=True, gradients=False)
    ours.eval()
    with torch.no_grad():
        assert torch.equal(ours(image), ours(image))


def test_drop_path_like_timm(backend: str) -> None:
    ours, theirs, image = twins("efficientnet_lite0", (40, 40), drop_path_rate=0.5)
    dropping = timm.create_model("tf_efficientnet_lite0", num_classes=100, drop_path_rate=0.5)
    dropping.load_state_dict(theirs.state_dict())
    for norm in batch_norms(dropping):
        norm.momentum = 0.01
    assert_networks_agree(ours, dropping, image, training=True, gradients=False)


def test_bfloat16(backend: str) -> None:
    ours, theirs, image = twins("efficientnet_b0", (64, 64))
    for network in (ours, theirs):
        network.eval().to(torch.bfloat16)
    image = image.bfloat16()
    with torch.no_grad():
        due = copy.deepcopy(theirs).double()(image.double())
        assert_close_to(due, ours(image), theirs(image))


def test_native_runs_the_whole_network() -> None:
    if not ek.backends()["native"].available:
        pytest.skip(ek.backends()["native"].reason)
    network = ek.models.efficientnet_b0(num_classes=100).eval()
    with torch.no_grad(), ek.use_backend("native"):
        assert network(torch.randn(1, 3, 64, 64)).shape == (1, 100)


@pytest.mark.parametrize("threads", [2])
def test_threads_do_not_change_a_bit(threads: int, backend: str) -> None:
    if backend == "reference":
        pytest.skip("PyTorch's own kernels do not promise it")
    network, _, image = twins("efficientnet_b0", (64, 64))
    network.eval()
    with torch.no_grad():
        for batch in (image[:1], image):
            torch.set_num_threads(1)
            one = network(batch)
            torch.set_num_threads(threads)
            assert torch.equal(network(batch), one)


def test_feature_maps_like_timm(backend: str) -> None:
    ours = ek.models.efficientnet_b0(features_only=True, padding="same")
    assert_feature_maps_agree(ours, timm.create_model("tf_efficientnet_b0", features_only=True))


@pytest.mark.parametrize("name", ["efficientnet_b3", "efficientnet_lite2"])
def test_feature_info_says_what_comes(name: str) -> None:
    with torch.device("meta"):
        network = ek.models.create_model(name, features_only=True).eval()
        maps = network(torch.empty(1, 3, 128, 128))
    for feature, found in zip(network.feature_info, maps, strict=True):
        side = 128 // feature.reduction
        assert found.shape == (1, feature.channels, side, side)


def test_without_classifier_and_other_images(backend: str) -> None:
    network = ek.models.efficientnet_lite0(num_classes=0, in_channels=1).eval()
    with torch.no_grad():
        assert network(torch.randn(2, 1, 40, 40)).shape == (2, network.num_features) == (2, 1280)
        assert network(torch.randn(0, 1, 40, 40)).shape == (0, 1280)


def test_compiles_without_a_break(backend: str) -> None:
    network, _, image = twins("efficientnet_lite0", (40, 40))
    network.eval()
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(image), network(image))


def test_exports_and_copies() -> None:
    network, _, image = twins("efficientnet_lite0", (40, 40))
    network.eval()
    with torch.no_grad():
        due = network(image)
        exported = torch.export.export(network, (image,)).module()
        torch.testing.assert_close(exported(image), due)
        assert torch.equal(copy.deepcopy(network)(image), due)
        assert torch.equal(pickle.loads(pickle.dumps(network))(image), due)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": -1}, "num_classes is -1"),
        ({"num_classes": 2.5}, "num_classes is 2.5"),
        ({"in_channels": 0}, "in_channels is 0"),
        ({"drop_rate": 1.0}, "drop_rate is 1.0"),
        ({"drop_path_rate": -0.1}, "drop_path_rate is -0.1"),
        ({"padding": "valid"}, "padding is 'valid'"),
        ({"padding": "valid", "features_only": True}, "padding is 'valid'"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        ek.models.create_model("efficientnet_b0", **options)


def test_misspelt_option() -> None:
    with pytest.raises(TypeError, match="num_class"):
        ek.models.create_model("efficientnet_b0", num_class=3)


@pytest.mark.parametrize(
    ("shape", "message"),
    [((3, 64, 64), "dimensions"), ((1, 4, 64, 64), "channels"), ((1, 3, 0, 64), "empty dimension")],
)
def test_bad_images(shape: tuple[int, ...], message: str) -> None:
    network = ek.models.efficientnet_lite0(num_classes=2).eval()
    with pytest.raises(ValueError, match=message):
        network(torch.zeros(shape))
