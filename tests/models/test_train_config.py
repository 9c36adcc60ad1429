"""Arguments of a run, optimizers and learning rates."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from effkernels.models import create_model
from effkernels.models.common import DataConfig
from effkernels.models.training import TrainConfig, data
from effkernels.models.training.layers import layers
from effkernels.models.training.loop import build_network
from effkernels.models.training.schedules import build_optimizer, schedule
from torch import nn


def config(**options: Any) -> TrainConfig:
    return TrainConfig(**({"model": "m", "dataset": "npz", "data": "d", "out": "o"} | options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": ""}, "model is '', a non-empty string"),
        ({"dataset": "mnist"}, "dataset is 'mnist', one of cifar10, "),
        ({"augment": "yes"}, "augment is 'yes', one of none, "),
        ({"optimizer": "lion"}, "optimizer is 'lion', one of sgd, adam, adamw, rmsprop"),
        ({"schedule": "linear"}, "schedule is 'linear', one of cosine, step, constant"),
        ({"dtype": "float64"}, "dtype is 'float64', one of float32, bfloat16, float16"),
        ({"epochs": 0}, "epochs is 0, a positive integer"),
        ({"batch_size": 2.0}, "batch_size is 2.0, a positive integer"),
        ({"accumulate": True}, "accumulate is True"),
        ({"limit_steps": 0}, "limit_steps is 0"),
        ({"resolution": -1}, "resolution is -1"),
        ({"num_classes": 0}, "num_classes is 0"),
        ({"momentum": 1.0}, r"momentum is 1.0, a number in \[0, 1\)"),
        ({"label_smoothing": -0.1}, "label_smoothing is -0.1"),
        ({"ema_decay": 1}, "ema_decay is 1"),
        ({"mixup": math.inf}, "mixup is inf, a number of at least 0"),
        ({"weight_decay": -1.0}, "weight_decay is -1.0, a number of at least 0"),
        ({"lr": 0.0}, "lr is 0.0, a positive number"),
        ({"lr": math.nan}, "lr is nan, a positive number"),
        ({"decay_epochs": 0}, "decay_epochs is 0"),
        ({"fraction": 1.5}, r"fraction is 1.5, a number in \(0, 1\]"),
        ({"fraction": 0}, "fraction is 0, a positive number"),
        ({"layer_decay": 1.5}, r"layer_decay is 1.5, a number in \(0, 1\]"),
        ({"layer_decay": 0.0}, "layer_decay is 0.0, a positive number"),
        ({"coefficients": (1.2, 1.1, 1.15)}, "coefficients are .* none are accepted without phi"),
        ({"phi": 1.0, "coefficients": (1.2, 1.1)}, "coefficients are .* a tuple of α, β and γ"),
        ({"workers": -1}, "workers is -1, an integer in 0 to"),
        ({"seed": 2**63}, "seed is 9223372036854775808, an integer in 0 to"),
        ({"epochs": 2, "warmup_epochs": 3.0}, r"warmup_epochs is 3.0, at most epochs \(2\)"),
        ({"nesterov": True, "optimizer": "adam"}, "nesterov is accepted with optimizer 'sgd'"),
        ({"nesterov": True, "momentum": 0.0}, "nesterov is accepted with optimizer 'sgd'"),
        ({"mixup": 0.2, "batch_size": 1}, "batch_size is 1, mixup needs at least 2"),
        ({"resume": True, "weights": "a.pt"}, "weights is 'a.pt', none are accepted with resume"),
        ({"model_options": {"num_classes": 3}}, "model_options has 'num_classes', not accepted"),
        ({"model_options": {"act_layer": nn.SiLU}}, "model_options has act_layer=<class"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"train: {message}"):
        config(**options)


@pytest.mark.parametrize(
    ("options", "kind", "expected"),
    [
        ({"optimizer": "sgd"}, torch.optim.SGD, {"lr": 0.2, "momentum": 0.9, "nesterov": False}),
        (
            {"optimizer": "sgd", "nesterov": True, "momentum": 0.8, "lr": 0.3},
            torch.optim.SGD,
            {"lr": 0.3, "momentum": 0.8, "nesterov": True, "weight_decay": 1e-4},
        ),
        # the paper's, section 5.2, at its batch of 512 = 2 × 256: 0.256 / 8
        (
            {"optimizer": "rmsprop"},
            torch.optim.RMSprop,
            {"lr": 0.032, "alpha": 0.9, "momentum": 0.9, "weight_decay": 1e-5, "eps": 1e-3},
        ),
        ({"optimizer": "adam"}, torch.optim.Adam, {"lr": 1e-3, "weight_decay": 0.0}),
        ({"optimizer": "adamw"}, torch.optim.AdamW, {"lr": 1e-3, "weight_decay": 1e-2}),
        (
            {"optimizer": "adamw", "weight_decay": 0.3},
            torch.optim.AdamW,
            {"lr": 1e-3, "weight_decay": 0.3},
        ),
    ],
)
def test_optimizers(options: dict[str, Any], kind: type, expected: dict[str, Any]) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Linear(4, 2))
    model[2].bias.requires_grad_(False)
    optimizer = build_optimizer(config(**options), model, 512)
    assert type(optimizer) is kind
    weights, vectors = optimizer.param_groups
    assert {name: weights[name] for name in expected} == pytest.approx(expected)
    assert vectors["weight_decay"] == 0 and vectors["lr"] == weights["lr"]
    assert {id(p) for p in weights["params"]} == {id(model[0].weight), id(model[2].weight)}
    assert len(vectors["params"]) == 3  # frozen ones are left out


def test_layer_wise_learning_rates() -> None:
    network = create_model("efficientnet_lite0", num_classes=3)
    settings = config(optimizer="adam", lr=0.01, layer_decay=0.5, weight_decay=0.1)
    optimizer = build_optimizer(settings, network, 128)
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    # from the head to the input, weights and vectors of each
    expected = [["classifier"], ["conv_head", "bn2"], *([f"blocks.{i}"] for i in range(6, -1, -1))]
    expected += [["conv_stem", "bn1"]]
    seen: list[str] = []
    for index, group in enumerate(optimizer.param_groups):
        layer = expected[index // 2]
        assert group["lr"] == pytest.approx(0.01 * 0.5 ** (index // 2))
        assert group["weight_decay"] == (0.0 if index % 2 else 0.1)
        found = [names[id(parameter)] for parameter in group["params"]]
        assert all((parameter.ndim <= 1) == bool(index % 2) for parameter in group["params"])
        prefixes = tuple(f"{part}." for part in layer)
        wanted = [n for n, p in network.named_parameters() if n.startswith(prefixes)]
        assert found == [n for n in wanted if (network.get_parameter(n).ndim <= 1) == index % 2]
        seen += found
    assert sorted(seen) == sorted(names.values())


def test_layers_of_a_resnet() -> None:
    found = [layer.names for layer in layers(create_model("resnet18"))]
    assert found == [["conv1", "bn1"], ["layer1"], ["layer2"], ["layer3"], ["layer4"], ["fc"]]


def test_phi_scales_the_network_and_the_pictures() -> None:
    scaled = config(model="resnet18", phi=1.0, coefficients=(1.4, 1.0, 1.2))
    names = [name for name, _ in build_network(scaled, 10).named_modules()]
    assert "layer1.2" in names and "layer1.3" not in names  # 2 · 1.4 blocks, rounded up
    small = data.Source([], [], 10, 32)
    expected = DataConfig(224, 256)
    assert data.input_resolution(scaled, small, expected) == 40  # 32 · 1.2 is 38.4
    plain = replace(scaled, phi=None, coefficients=None)
    assert data.input_resolution(plain, small, expected) == 32
    assert data.input_resolution(replace(scaled, resolution=48), small, expected) == 48
    photographs = small._replace(size=None)
    assert data.input_resolution(scaled, photographs, DataConfig(268, 300)) == 268
    with pytest.raises(ValueError, match="phi is 99.0, a number from -20 to 20"):
        config(phi=99.0)
    with pytest.raises(ValueError, match="beta is 0.5, a number of at least 1"):
        config(phi=1.0, coefficients=(1.2, 0.5, 1.1))


def test_the_papers_rate_is_reached_at_its_batch() -> None:
    optimizer = build_optimizer(config(optimizer="rmsprop"), nn.Linear(2, 2), 4096)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.256)


def test_cosine_with_warmup() -> None:
    factor = schedule(config(epochs=4, warmup_epochs=1.0, schedule="cosine"), 4)
    assert [factor(step) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert factor(10) == pytest.approx(0.5)  # half of the 12 steps after the warm-up
    assert factor(15) == pytest.approx((1 + math.cos(math.pi * 11 / 12)) / 2)
    assert factor(16) == factor(99) == 0.0
    assert all(factor(step) > factor(step + 1) for step in range(4, 16))


def test_steps_with_warmup() -> None:
    options = {"epochs": 10, "warmup_epochs": 0.5, "decay_rate": 0.5, "decay_epochs": 2.4}
    factor = schedule(config(**options, schedule="step"), 10)
    assert [factor(step) for step in (0, 4, 5, 23)] == [0.2, 1.0, 1.0, 1.0]
    assert [factor(step) for step in (24, 47, 48, 72)] == [0.5, 0.5, 0.25, 0.125]


def test_constant_and_no_warmup() -> None:
    assert {schedule(config(schedule="constant"), 7)(step) for step in range(70)} == {1.0}
    assert schedule(config(schedule="cosine"), 7)(0) == 1.0
