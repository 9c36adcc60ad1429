"""create_model and list_models: names, options, and weights from files and from torchvision."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchvision
from effkernels.models import torchvision_weights
from PIL import Image
from torch import nn
from torchvision.models import WeightsEnum, get_model_weights

import effkernels as ek
from effkernels.classify import preprocess
from tests.networks import assert_networks_agree, batch_norms, settle

NAMES = [
    *(f"efficientnet_b{index}" for index in range(8)),
    *(f"efficientnet_lite{index}" for index in range(5)),
    *(f"efficientnet_v2_{size}" for size in "sml"),
    *(f"resnet{layers}" for layers in (18, 34, 50, 101, 152)),
]


def test_list_models() -> None:
    assert ek.models.list_models() == NAMES
    assert ek.models.list_models("*lite?") == [f"efficientnet_lite{i}" for i in range(5)]
    assert ek.models.list_models("resnext*") == []
    for name in NAMES:
        assert callable(getattr(ek.models, name)), name
        assert name in ek.models.__all__


def test_unknown_model_names_the_nearest() -> None:
    with pytest.raises(ValueError, match="'efficientnet_b9'; nearest are efficientnet_b"):
        ek.models.create_model("efficientnet_b9")
    with pytest.raises(ValueError, match="efficientnet_lite0"):
        ek.models.create_model("efficientnet-lite0")
    with pytest.raises(ValueError, match="nearest are resnet18"):
        ek.models.create_model("resnet-18")
    with pytest.raises(ValueError, match="no model is called 'zzz'; accepted"):
        ek.models.create_model("zzz")
    with pytest.raises(ValueError, match="no model is called None"):
        ek.models.create_model(None)


def test_option_of_another_family() -> None:
    with torch.device("meta"):
        with pytest.raises(TypeError, match="stem"):
            ek.models.create_model("efficientnet_b0", stem="cifar")
        with pytest.raises(TypeError, match="padding"):
            ek.models.create_model("resnet18", padding="same")


def test_weights_of_a_file_and_of_a_state_dict(tmp_path: Path) -> None:
    source = ek.models.resnet18(num_classes=3)
    file = tmp_path / "resnet18.pt"
    torch.save(source.state_dict(), file)
    for weights in (file, str(file), source.state_dict()):
        network = ek.models.resnet18(num_classes=3, weights=weights)
        assert torch.equal(network.layer4[1].conv2.weight, source.layer4[1].conv2.weight)
    with pytest.raises(RuntimeError, match=r"fc.weight has shape \(3, 512\)"):
        ek.models.resnet18(num_classes=4, weights=file)
    with pytest.raises(FileNotFoundError):
        ek.models.resnet18(weights=tmp_path / "missing.pt")
    with pytest.raises(TypeError, match="checkpoint is int"):
        ek.models.resnet18(weights=3)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder in which torch.hub looks for files before it downloads them."""
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    return tmp_path / "checkpoints"


def downloaded(hub: Path, theirs: nn.Module, weights: WeightsEnum) -> None:
    torch.save(theirs.state_dict(), hub / weights.url.rpartition("/")[2])


@pytest.mark.parametrize("name", ["efficientnet_b0", "resnet18"])
def test_weights_of_torchvision(name: str, hub: Path) -> None:
    """Nothing but the name and the weights, and results are torchvision's."""
    theirs = torchvision.models.get_model(name)
    weights = get_model_weights(name).DEFAULT
    image = torch.randn(4, 3, 64, 64)
    settle(theirs, image)
    downloaded(hub, theirs, weights)
    ours = ek.models.create_model(name, weights=weights)
    assert_networks_agree(ours, theirs, image, gradients=False)
    for norm, their_norm in zip(batch_norms(ours), batch_norms(theirs), strict=True):
        assert (norm.eps, norm.momentum) == (their_norm.eps, their_norm.momentum)


def test_weights_of_torchvision_without_a_head(hub: Path) -> None:
    theirs = torchvision.models.resnet18()
    weights = torchvision.models.ResNet18_Weights.IMAGENET1K_V1
    downloaded(hub, theirs, weights)
    for options in ({"num_classes": 0}, {"features_only": True, "num_classes": 7}):
        ours = ek.models.resnet18(weights=weights, bn_momentum=0.5, **options)
        assert torch.equal(ours.conv1.weight, theirs.conv1.weight)
        assert {norm.momentum for norm in batch_norms(ours)} == {0.5}


def test_downloads_are_torchvisions(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def download(url: str, file: str, hash_prefix: str | None, progress: bool) -> None:
        calls.append((url, hash_prefix, progress))
        raise URLError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    weights = torchvision.models.ResNet50_Weights.IMAGENET1K_V2
    with pytest.raises(URLError, match="no network"):
        ek.models.resnet50(weights=weights)
    assert calls == [(weights.url, "11ad3fa6", True)]


@pytest.mark.parametrize(
    ("name", "eps", "momentum"),
    [
        *((f"efficientnet_b{index}", 1e-5, 0.1) for index in range(5)),
        *((f"efficientnet_b{index}", 1e-3, 0.01) for index in range(5, 8)),
        ("efficientnet_v2_s", 1e-3, 0.1),
        ("resnet50", 1e-5, 0.1),
    ],
)
def test_batch_norms_of_torchvision(name: str, eps: float, momentum: float) -> None:
    assert torchvision_weights.norm_options(name) == {"bn_eps": eps, "bn_momentum": momentum}


@pytest.mark.parametrize("name", ["efficientnet_b1", "efficientnet_v2_l", "resnet50"])
def test_photographs_are_prepared_as_torchvision_does(name: str) -> None:
    weights = get_model_weights(name).DEFAULT
    pixels = np.random.default_rng(0).integers(0, 256, (300, 520, 3), dtype=np.uint8)
    photo = Image.fromarray(pixels)
    config = torchvision_weights.data_config(weights)
    torch.testing.assert_close(preprocess(photo, config), weights.transforms()(photo)[None])


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("efficientnet_b1", {}, "B0_Weights.* a member of EfficientNet_B1_Weights is accepted"),
        ("efficientnet_lite0", {}, "a file or a state dict is accepted for efficientnet_lite0"),
        ("efficientnet_b0", {"num_classes": 10}, "num_classes is 10, .* has 1000 classes"),
        ("efficientnet_b0", {"in_channels": 0}, "in_channels is 0"),
    ],
)
def test_weights_that_do_not_fit(
    name: str, options: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error before anything is downloaded."""
    monkeypatch.delattr(torch.hub, "download_url_to_file")
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        weights = torchvision.models.EfficientNet_B0_Weights.IMAGENET1K_V1
        ek.models.create_model(name, weights=weights, **options)
