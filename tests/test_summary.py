"""summary and explain of networks, from Python and from the command line."""

from __future__ import annotations

import json

import pytest
import torch
import torchvision
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import effkernels as ek
from effkernels.cli import main


def test_resnet18_with_ten_classes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["summary", "resnet18", "--num-classes", "10"]) == 0
    printed = capsys.readouterr().out
    assert "11.18 M" in printed and "106 MB" in printed
    assert main(["summary", "torchvision:resnet18", "--num-classes", "10"]) == 0
    assert "106 MB" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["efficientnet_b0", "efficientnet_lite0", "efficientnet_v2_s"])
def test_totals(name: str) -> None:
    model = ek.models.create_model(name)
    found = ek.models.summary(model, (3, 64, 96))
    assert found.parameters == sum(p.numel() for p in model.parameters())
    assert found.parameters == sum(layer.parameters for layer in found.layers)
    with torch.no_grad(), FlopCounterMode(display=False) as counter, ek.use_backend("reference"):
        model.eval()(torch.randn(1, 3, 64, 96))
    assert 2 * found.macs == counter.get_total_flops()
    values = 3 * 64 * 96 + found.parameters
    outputs = sum(layer.activation_bytes for layer in found.layers)
    assert found.total_bytes == 4 * values + 2 * outputs
    assert not any(module._forward_hooks for module in model.modules())
    assert not any(parameter.is_meta for parameter in model.parameters())


def test_every_layer_once() -> None:
    model = torchvision.models.mobilenet_v2()
    rows = [layer.name for layer in ek.models.summary(model, (3, 32, 32)).layers]
    leaves = [n for n, m in model.named_modules() if not list(m.children())]
    assert [name for name in rows if name in leaves] == leaves
    assert len(set(rows)) == len(rows)


def test_json_and_input(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["summary", "efficientnet_lite0", "--input", "3x64x32", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["input_shape"] == [3, 64, 32]
    assert found["layers"][0]["output_shape"] == [32, 32, 16]
    arguments = ["explain", "torchvision:mobilenet_v3_small", "--input", "3x32x32", "--json"]
    assert main(arguments) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert rows and all(row["backend"] for row in rows)
    assert main(["explain", "efficientnet_lite0", "--input", "3x32x32", "--profile"]) == 0
    assert "time" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["summary", "resnet19"], "nearest are resnet18"),
        (["summary", "resnet18", "--input", "3x224"], "--input: '3x224' is no image shape"),
        (["summary", "resnet18", "--input", "3x0x9"], "--input: '3x0x9' is no image shape"),
        (["explain", "keras:resnet18"], "library 'keras' is not known"),
        (["explain", "torchvision:nothing"], "nothing"),
        (["summary", "resnet18", "--num-classes", "-3"], "num_classes is -3"),
    ],
)
def test_bad_input(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_bad_arguments() -> None:
    with pytest.raises(TypeError, match="summary: model is str"):
        ek.models.summary("resnet18")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"summary: input_shape is \(3, 224\)"):
        ek.models.summary(nn.Identity(), (3, 224))
