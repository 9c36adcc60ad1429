"""load_checkpoint: every format, strictness, and files that are no checkpoint."""

from __future__ import annotations

import copy
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import efficientnet_lite_pytorch
import efficientnet_pytorch
import pytest
import timm
import torch
import torchvision
from effkernels.models import LoadResult, convert_state_dict, load_checkpoint
from torch import Tensor, nn

import effkernels as ek
from tests.networks import assert_networks_agree, settle


@pytest.fixture
def network() -> nn.Module:
    return ek.models.efficientnet_lite0(num_classes=3)


def values(network: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in network.state_dict().items()}


def assert_unchanged(network: nn.Module, before: dict[str, Tensor]) -> None:
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name]), f"{name} changed"


def assert_loaded_like(network: nn.Module, theirs: nn.Module, size: int) -> None:
    # Several images: the last maps have a few pixels, too few for the statistics of one image, and
    # the error of four outputs alone is too random to hold to twice another's.
    image = torch.randn(8, 3, size, size)
    settle(theirs, image)
    assert load_checkpoint(network, theirs.state_dict()) == LoadResult([], [])
    assert_networks_agree(network, theirs, image, gradients=False)


@pytest.mark.parametrize("name", ["efficientnet_b0", "efficientnet_b1"])
def test_torchvision(name: str) -> None:
    theirs = getattr(torchvision.models, name)(num_classes=4)
    assert_loaded_like(ek.models.create_model(name, num_classes=4, bn_eps=1e-5), theirs, 96)


def test_timm() -> None:
    theirs = timm.create_model("tf_efficientnet_lite0", num_classes=4)
    assert_loaded_like(ek.models.efficientnet_lite0(num_classes=4), theirs, 96)


@pytest.mark.parametrize("name", ["efficientnet-b0", "efficientnet-b1"])
def test_efficientnet_pytorch(name: str) -> None:
    """Its SAME padding is fixed to the image size that it is built for."""
    theirs = efficientnet_pytorch.EfficientNet.from_name(name, num_classes=4, image_size=96)
    ours = ek.models.create_model(name.replace("-", "_"), num_classes=4, padding="same")
    assert_loaded_like(ours, theirs, 96)


def test_efficientnet_lite_pytorch() -> None:
    theirs = efficientnet_lite_pytorch.EfficientNet.from_name("efficientnet-lite0")
    size = 224  # the only one that its padding is made for
    image = torch.randn(1, 3, size, size)
    settle(theirs, image)
    ours = ek.models.efficientnet_lite0()
    load_checkpoint(ours, theirs.state_dict())
    assert_networks_agree(ours, theirs, image, gradients=False)


def test_timm_resnet_with_squeeze_excite() -> None:
    theirs = timm.create_model("seresnet18", num_classes=4)
    assert_loaded_like(ek.models.resnet18(num_classes=4, se_ratio=1 / 16), theirs, 64)


@pytest.mark.parametrize(
    ("name", "to", "theirs"),
    [
        ("efficientnet_b0", "timm", lambda: timm.create_model("efficientnet_b0")),
        ("efficientnet_b1", "torchvision", torchvision.models.efficientnet_b1),
        ("efficientnet_v2_s", "torchvision", torchvision.models.efficientnet_v2_s),
        ("resnet50", "torchvision", torchvision.models.resnet50),
        (
            "efficientnet_b3",
            "efficientnet_pytorch",
            lambda: efficientnet_pytorch.EfficientNet.from_name("efficientnet-b3"),
        ),
        (
            "efficientnet_lite1",
            "efficientnet_lite_pytorch",
            lambda: efficientnet_lite_pytorch.EfficientNet.from_name("efficientnet-lite1"),
        ),
    ],
)
def test_there_and_back(name: str, to: str, theirs: Any) -> None:
    with torch.device("meta"):
        ours, foreign = ek.models.create_model(name), theirs()
    ours.to_empty(device="cpu")
    with torch.no_grad():
        for index, value in enumerate(ours.state_dict().values()):
            value.fill_(index)  # to recognise it by
    due = values(ours)
    foreign.load_state_dict(convert_state_dict(ours, to), assign=True)
    returning = {key: value.clone() for key, value in foreign.state_dict().items()}
    with torch.no_grad():
        for value in ours.state_dict().values():
            value.fill_(-1)
    assert load_checkpoint(ours, returning) == LoadResult([], [])
    assert_unchanged(ours, due)


@pytest.mark.parametrize(
    ("name", "options", "to", "message"),
    [
        ("efficientnet_b0", {}, "keras", "to is 'keras', one of timm, torchvision, "),
        ("efficientnet_b0", {}, "efficientnet_lite_pytorch", "timm or torchvision or efficientnet"),
        ("efficientnet_lite0", {}, "torchvision", "timm or efficientnet_lite_pytorch has"),
        ("efficientnet_v2_s", {}, "efficientnet_pytorch", "timm or torchvision has"),
        (
            "resnet18",
            {},
            "efficientnet_pytorch",
            "no network like this ResNet, timm or torchvision",
        ),
        ("resnet18", {"se_ratio": 1 / 16}, "torchvision", "this ResNet, timm has"),
    ],
)
def test_libraries_without_such_a_network(
    name: str, options: dict[str, Any], to: str, message: str
) -> None:
    with torch.device("meta"):
        network = ek.models.create_model(name, **options)
    with pytest.raises(ValueError, match=message):
        convert_state_dict(network, to)


@pytest.mark.parametrize("wrapper", [None, "state_dict", "model", "model_state_dict"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_round_trip_through_a_file(wrapper: str | None, prefix: str, tmp_path: Path) -> None:
    source, target = (ek.models.efficientnet_lite0(num_classes=3) for _ in range(2))
    state: dict[str, Any] = {prefix + name: value for name, value in source.state_dict().items()}
    file = tmp_path / "checkpoint.pth"
    torch.save(state if wrapper is None else {wrapper: state, "epoch": 3}, file)
    assert load_checkpoint(target, file) == LoadResult([], [])
    assert_unchanged(target, values(source))
    load_checkpoint(copy.deepcopy(target), str(file))


def test_other_dtypes_are_converted(network: nn.Module) -> None:
    state = {name: value.to(torch.bfloat16) for name, value in network.state_dict().items()}
    target = ek.models.efficientnet_lite0(num_classes=3)
    load_checkpoint(target, state)
    assert target.conv_stem.weight.dtype == torch.float32
    assert torch.equal(target.conv_stem.weight, state["conv_stem.weight"].float())


def test_models_without_a_head_leave_it_unread() -> None:
    full = ek.models.efficientnet_lite0()
    for network in (
        ek.models.efficientnet_lite0(num_classes=0),
        ek.models.efficientnet_lite0(features_only=True),
    ):
        assert load_checkpoint(network, full.state_dict()) == LoadResult([], [])
        assert torch.equal(network.conv_stem.weight, full.conv_stem.weight)


def test_counters_may_be_missing(network: nn.Module) -> None:
    state = {k: v for k, v in network.state_dict().items() if "num_batches" not in k}
    load_checkpoint(ek.models.efficientnet_lite0(num_classes=3), state)


def change(name: str, value: Any = None) -> Any:
    def apply(state: dict[str, Tensor]) -> None:
        if value is None:
            del state[name]
        else:
            state[name] = value

    return apply


@pytest.mark.parametrize(
    ("apply", "messages"),
    [
        (change("blocks.1.0.conv_dw.weight"), ["1 missing: blocks.1.0.conv_dw.weight"]),
        (change("head.weight", torch.ones(2)), ["1 left over: head.weight"]),
        (
            change("classifier.weight", torch.ones(1000, 1280)),
            ["1 misshapen: classifier.weight has shape (1000, 1280)", "(3, 1280)"],
        ),
        (
            lambda state: state.clear() or state.update(a=torch.ones(1)),
            ["294 missing: conv_stem.weight", "and 240 more", "1 left over: a"],
        ),
    ],
    ids=["missing", "left over", "misshapen", "another network"],
)
def test_strict(network: nn.Module, apply: Any, messages: list[str], tmp_path: Path) -> None:
    state = OrderedDict(ek.models.efficientnet_lite0(num_classes=3).state_dict())
    apply(state)
    file = tmp_path / "wrong.pth"
    torch.save(state, file)
    before = values(network)
    with pytest.raises(RuntimeError) as raised:
        load_checkpoint(network, file)
    assert str(file) in str(raised.value)
    for message in messages[-1:] if "294" in messages[0] else messages:
        assert message in str(raised.value)
    assert_unchanged(network, before)


@pytest.mark.parametrize(
    ("name", "theirs", "messages"),
    [
        (
            "efficientnet_b1",
            lambda: efficientnet_pytorch.EfficientNet.from_name("efficientnet-b3"),
            [
                "_conv_stem.weight has shape (40, 3, 3, 3), the model's conv_stem.weight has "
                "(32, 3, 3, 3)",
                "left over: _blocks.23._expand_conv.weight",
            ],
        ),
        (
            "efficientnet_v2_s",
            torchvision.models.efficientnet_v2_l,
            [
                "features.0.0.weight has shape (32, 3, 3, 3), the model's conv_stem.weight has "
                "(24, 3, 3, 3)",
                "left over: features.1.2.block.0.0.weight",
            ],
        ),
        (
            "resnet18",
            torchvision.models.resnet50,
            [
                "misshapen: layer1.0.conv1.weight has shape (64, 64, 1, 1), the model's "
                "layer1.0.conv1.weight has (64, 64, 3, 3)",
                "left over: layer1.0.conv3.weight",
            ],
        ),
        ("resnet34", torchvision.models.resnet18, ["missing: layer1.2.conv1.weight"]),
    ],
)
def test_another_variant_names_keys_and_shapes(name: str, theirs: Any, messages: list[str]) -> None:
    network = ek.models.create_model(name)
    before = values(network)
    with torch.device("meta"):
        state = theirs().state_dict()
    with pytest.raises(RuntimeError) as raised:
        load_checkpoint(network, state)
    for message in messages:
        assert message in str(raised.value)
    assert_unchanged(network, before)


def test_not_strict(network: nn.Module) -> None:
    state = ek.models.efficientnet_lite0(num_classes=3).state_dict()
    del state["classifier.weight"]
    state["extra"] = torch.ones(1)
    result = load_checkpoint(network, state, strict=False)
    assert result == LoadResult(["classifier.weight"], ["extra"])
    state["bn1.weight"] = torch.ones(5)
    before = values(network)
    with pytest.raises(RuntimeError, match=r"bn1.weight has shape \(5,\)"):
        load_checkpoint(network, state, strict=False)
    assert_unchanged(network, before)


class Payload:
    def __reduce__(self) -> Any:
        return (print, ("this must never run",))


def test_files_that_are_no_checkpoint(
    network: nn.Module, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = tmp_path / "good.pth"
    torch.save(network.state_dict(), good)
    content = good.read_bytes()
    files = {
        "truncated.pth": content[: len(content) // 2],
        "stub.pth": content[:10],
        "empty.pth": b"",
        "text.pth": b"not a checkpoint\n" * 10,
        "hostile.pth": pickle.dumps(Payload()),
        "legacy.pth": pickle.dumps({"weights": [1, 2, 3]}),
    }
    before = values(network)
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=name):
            load_checkpoint(network, tmp_path / name)
    assert "this must never run" not in capsys.readouterr().out
    with pytest.raises(ValueError, match="checkpoint"):
        load_checkpoint(network, tmp_path)  # a folder
    with pytest.raises(FileNotFoundError, match=r"missing\.pth does not exist"):
        load_checkpoint(network, tmp_path / "missing.pth")
    assert_unchanged(network, before)


@pytest.mark.parametrize(
    "content",
    [[1, 2], torch.ones(3), {}, {"a": 1}, {1: torch.ones(1)}, {"epoch": 1, "net": {}}, "text"],
    ids=str,
)
def test_pickles_that_hold_something_else(network: nn.Module, content: Any, tmp_path: Path) -> None:
    file = tmp_path / "other.pth"
    torch.save(content, file)
    with pytest.raises(ValueError, match=r"other\.pth holds"):
        load_checkpoint(network, file)


def test_wrong_arguments(network: nn.Module) -> None:
    with pytest.raises(TypeError, match="checkpoint is int"):
        load_checkpoint(network, 5)  # type: ignore[arg-type]
    with torch.device("meta"):
        empty = ek.models.efficientnet_lite0(num_classes=3)
    with pytest.raises(ValueError, match="meta"):
        load_checkpoint(empty, network.state_dict())
    state = network.state_dict()
    state["module.bn1.weight"] = state["bn1.weight"]
    with pytest.raises(RuntimeError, match=r"left over: module\.bn1\.weight"):
        load_checkpoint(network, state)


def test_loading_is_seen_by_the_next_call() -> None:
    first, second = (ek.models.efficientnet_lite0(num_classes=3).eval() for _ in range(2))
    image = torch.randn(1, 3, 40, 40)
    with torch.no_grad():
        due = second(image)
        assert not torch.equal(first(image), due)
        load_checkpoint(first, second.state_dict())
        assert torch.equal(first(image), due)
