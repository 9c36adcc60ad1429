"""What networks move at every level of fusion, against figures reckoned independently."""

from __future__ import annotations

import pytest

from benchmarks import shapes
from benchmarks.__main__ import main
from benchmarks.gpus import GPUS, named_rates
from benchmarks.levels import LEVELS, block_parts, network_layers, totals, works

# Million multiply-adds and megabytes an image of 2-byte activations at levels S, A, B and C.
KNOWN = {
    "efficientnet_b0": (384, 67.0, 41.5, 27.4, 13.9),
    "efficientnet_b4": (4389, 514.1, 322.5, 204.2, 111.6),
    "efficientnet_b5": (10259, 1041, 655.5, 410.1, 229.6),
    "efficientnet_b7": (37731, 3088, 1949, 1208, 689),
}


@pytest.mark.parametrize("name", KNOWN)
def test_megabytes(name: str) -> None:
    macs, *megabytes = KNOWN[name]
    layers = network_layers(name)
    for level, due in zip(LEVELS, megabytes, strict=True):
        found = totals(layers, level, batch=1, itemsize=2)
        digit = 1.0 if due > 1000 or due == 689 else 0.1
        assert (found["bytes"] - found["weights"]) / 1e6 == pytest.approx(due, abs=digit)
        assert found["flops"] / 2e6 == pytest.approx(macs, rel=0.006)


@pytest.mark.parametrize("name", ["efficientnet_b0", "mobilenet_v2"])
def test_blocks_have_the_layers_of_the_network(name: str) -> None:
    """The two views of a network agree."""
    parts: dict[tuple[object, ...], int] = {}
    listed: dict[tuple[object, ...], int] = {}
    for layer in shapes.read_layers(name):
        if layer.op == "mbconv":
            for part in block_parts(layer).values():
                parts[_key(part)] = parts.get(_key(part), 0) + layer.count
        elif layer.in_block:
            listed[_key(layer)] = listed.get(_key(layer), 0) + layer.count
    assert parts == listed


def _key(layer: shapes.Layer) -> tuple[object, ...]:
    # the activation of SE's own reduction is silu wherever there is SE
    return (layer.label, layer.in_block)


def test_launches_become_fewer() -> None:
    counts = [totals(network_layers("efficientnet_b0"), la, 1, 2)["launches"] for la in LEVELS]
    assert counts == [141, 99, 66, 51]
    assert counts == [
        sum(w.count for w in works(network_layers("efficientnet_b0"), la)) for la in LEVELS
    ]


def test_lite0_is_b0_without_squeeze_and_excitation() -> None:
    ops = {work.op for work in works(network_layers("efficientnet_lite0"), "S")}
    assert not any(op.startswith("SE") for op in ops) and "expand" in ops


def test_resnets_last_convolution_is_averaged_once() -> None:
    found = works(network_layers("resnet50"), "S")
    assert sum(work.count for work in found if work.op == "mean") == 1
    blocks = [work for work in found if work.op == "residual"]
    assert sum(work.count for work in blocks) == 16


def test_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["roofline", "--gpu", "h100"]) == 0
    printed = capsys.readouterr().out
    assert "66.99" in printed and "13.88" in printed and "batch 256" in printed
    assert main(["roofline", "--device", "b200", "--per", "op", "--batch", "1,32"]) == 0
    printed = capsys.readouterr().out
    assert "expand + depthwise" in printed and "batch 1," in printed and "batch 32," in printed


def test_floor_is_that_of_the_slowest_unit() -> None:
    rates = GPUS["h100"]
    assert rates.floor_ms(3e12) == pytest.approx(1e3)
    assert rates.floor_ms(3e9, matrix_flops=8e14) == pytest.approx(1e3)
    assert rates.floor_ms(3e9, 8e11, vector_flops=67e12) == pytest.approx(1e3)
    with pytest.raises(ValueError, match="accepted: a100, h100"):
        named_rates("voodoo")
