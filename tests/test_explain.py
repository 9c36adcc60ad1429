"""explain: every computing part of a network in a row, and nothing about the network changed."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

import effkernels as ek

pytestmark = pytest.mark.skipif(
    not ek.backends()["native"].available, reason="the rows are about native calls"
)


@pytest.fixture
def image() -> Tensor:
    return torch.randn(1, 3, 64, 64)


class Mixed(nn.Module):
    """A network of its own with a block that is known and layers that are not."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, 2, 1)
        self.block = ek.MBConv(16, 24)
        self.head = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.stem(x)).mean((2, 3)))


def computing(network: nn.Module) -> set[str]:
    """Names of the modules that have weights to compute with, without the norms."""
    return {n for n, m in network.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}


def covered(network: nn.Module, report: ek.Report) -> set[str]:
    rows = [row.module for row in report]
    return {n for n in computing(network) if any(n == r or n.startswith(f"{r}.") for r in rows)}


@pytest.mark.parametrize(
    ("make", "blocks"),
    [
        (torchvision.models.mobilenet_v2, 17),
        (torchvision.models.mobilenet_v3_small, 11),
        (torchvision.models.efficientnet_b0, 16),
    ],
)
@pytest.mark.parametrize("prepare", [ek.accelerate, ek.freeze])
def test_every_layer_has_a_row(make: Any, blocks: int, prepare: Any, image: Tensor) -> None:
    network = prepare(make().eval())
    report = ek.explain(network, image)
    assert sum(row.op == "mbconv" for row in report) == blocks
    assert {row.backend for row in report} == {"native"}
    inner = network.model if isinstance(network, ek.Frozen) else network
    assert covered(inner, report) == computing(inner)


def test_own_network(image: Tensor) -> None:
    network = ek.models.efficientnet_b0().eval()
    report = ek.explain(network, image)
    assert len(report) == 1 + 16 + 1 + 1
    assert covered(network, report) == computing(network)
    second = next(row for row in report if row.module == "blocks.1.1")
    assert second.covers == ("expand", "depthwise", "squeeze_excite", "project", "residual")
    assert all(row.why == "" for row in report)


def test_what_is_left_alone_has_a_reason(image: Tensor) -> None:
    report = ek.explain(ek.freeze(torchvision.models.resnet18().eval()), image)
    pooling = [row for row in report if "max_pool2d" in row.op]
    assert [row.backend for row in pooling] == ["PyTorch"]
    assert "no kernel" in pooling[0].why
    last = next(row for row in report if row.module == "layer1.1.conv2")
    assert last.covers == ("convolution", "add", "relu")

    mixed = Mixed().eval()
    rows = {row.module: row for row in ek.explain(mixed, image)}
    assert rows["block"].backend == "native"
    assert rows["stem"].backend == rows["head"].backend == "PyTorch"
    assert rows["stem"].why and rows["head"].why


def test_hooks_and_backends_are_reasons(image: Tensor) -> None:
    network = ek.models.efficientnet_b0().eval()
    network.blocks[1][0].conv_pw.register_forward_hook(lambda *_: None)
    (row,) = ek.explain(network, image)
    assert row.why == "blocks.1.0.conv_pw has a hook"
    plain = ek.models.efficientnet_b0().eval()
    with ek.use_backend("reference"):
        (row,) = ek.explain(plain, image)
    assert "'reference' was asked for" in row.why
    (row,) = ek.explain(plain.double(), image.double())
    assert "float64" in row.why


@pytest.mark.parametrize("make", [Mixed, torchvision.models.mobilenet_v3_small])
def test_profile_and_what_is_left_behind(make: Any, image: Tensor) -> None:
    network = ek.accelerate(make().train())
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    seen: list[Any] = []
    network.register_forward_hook(lambda *_: seen.append(1))
    report = ek.explain(network, image, profile=True)
    assert all(module.training for module in network.modules())
    assert all(torch.equal(before[n], t) for n, t in network.state_dict().items())
    assert all(not m._forward_pre_hooks for m in network.modules())
    shares = [row.share for row in report]
    assert all(share is not None and share >= 0 for share in shares)
    assert sum(s for s in shares if s is not None) == pytest.approx(1.0)
    assert report.milliseconds is not None and report.milliseconds > 0
    assert any("training" in note for note in report.notes)
    table = str(report)
    assert "time" in table.splitlines()[0] and all(row.module in table for row in report)
    assert json.loads(json.dumps(report.to_dict()))["rows"][0]["op"] == report.rows[0].op


def test_bad_input(image: Tensor) -> None:
    with pytest.raises(TypeError, match="explain: x is str"):
        ek.explain(Mixed(), "photo")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="explain: model is int"):
        ek.explain(3, image)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"explain: stem.weight is on the meta device"):
        ek.explain(Mixed().to("meta"), image)
