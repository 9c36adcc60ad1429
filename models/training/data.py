"""Pictures with labels: torchvision's datasets and a file of JPEGs, as batches of tensors.

What a picture looks like in an epoch is a function of seed, epoch and picture: it depends neither
on the batch, nor on the worker or the process that loads it, nor on an interruption.
"""

from __future__ import annotations

import io
import os
import signal
import zipfile
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import BatchSampler, ConcatDataset, DataLoader, Dataset, DistributedSampler
from torchvision import datasets
from torchvision.transforms import InterpolationMode, v2

from ..common import DataConfig
from ..scaling import scale_resolution
from .config import OWNER, TrainConfig
from .distributed import Ranks


class Source(NamedTuple):
    """A dataset: items are (PIL picture, class)."""

    train: Any
    val: Any
    classes: int
    size: int | None  # side of all pictures where they are small; None: photographs


class JpegBlobs(Dataset[tuple[Image.Image, int]]):
    """One part, ``train`` or ``test``, of an ``.npz`` file of JPEGs.

    Arrays, each with the part's name in front: ``_jpeg`` (uint8, all files end to end),
    ``_offset`` (integers; picture i is bytes offset[i]:offset[i + 1]), ``_label`` (integers).

    Args:
        path: the file.
        part: which of its parts.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: naming the array, and what is accepted.
    """

    def __init__(self, path: str, part: str) -> None:
        if not os.path.isfile(path):
            raise FileNotFoundError(f"{OWNER}: data: {path} does not exist")
        self.path, self.part = path, part
        try:
            with np.load(path, allow_pickle=False) as arrays:
                found = list(arrays)
                wanted = [f"{part}_{kind}" for kind in ("jpeg", "offset", "label")]
                if missing := [name for name in wanted if name not in found]:
                    raise ValueError(f"array {missing[0]} is missing, there are {sorted(found)}")
                self.jpeg, self.offset, self.label = (arrays[name] for name in wanted)
        except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(f"{OWNER}: data: {path} is no .npz of JPEGs: {error}") from error
        self._check()

    def _check(self) -> None:
        where = f"{OWNER}: data: {self.path}: {self.part}"
        if self.jpeg.dtype != np.uint8 or self.jpeg.ndim != 1:
            raise ValueError(
                f"{where}_jpeg is {self.jpeg.dtype} of shape {self.jpeg.shape}, "
                "uint8 of one dimension is accepted"
            )
        for kind, array in (("offset", self.offset), ("label", self.label)):
            if array.dtype.kind not in "iu" or array.ndim != 1:
                raise ValueError(
                    f"{where}_{kind} is {array.dtype} of shape {array.shape}, "
                    "integers of one dimension are accepted"
                )
        if not len(self.label) or len(self.offset) != len(self.label) + 1:
            raise ValueError(
                f"{where}_offset has {len(self.offset)} values, one more than "
                f"{self.part}_label's {len(self.label)} (at least 1) is accepted"
            )
        rises = np.all(np.diff(self.offset.astype(np.int64)) > 0)
        if not rises or self.offset[0] < 0 or self.offset[-1] > len(self.jpeg):
            raise ValueError(
                f"{where}_offset is not accepted, it must rise within 0 to {len(self.jpeg)}"
            )
        if np.any(self.label < 0):
            raise ValueError(f"{where}_label has negative values, classes from 0 are accepted")

    def __len__(self) -> int:
        return len(self.label)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        blob = self.jpeg[int(self.offset[index]) : int(self.offset[index + 1])]
        try:
            # Pillow, as torchvision's datasets: torchvision's own decoders are on their way out
            picture = Image.open(io.BytesIO(blob)).convert("RGB")
        except OSError as error:
            raise ValueError(
                f"{OWNER}: data: {self.path}: {self.part} picture {index} is no JPEG: {error}"
            ) from error
        return picture, int(self.label[index])


class Pictures(Dataset[tuple[Tensor, int]]):
    """Some pictures of a source, transformed.

    Args:
        source: items are (picture, class).
        indices: which of them.
        transform: a picture to a float tensor.
        seed: of the transform's random numbers.
    """

    def __init__(
        self, source: Any, indices: list[int], transform: Callable[[Any], Any], seed: int
    ) -> None:
        self.source, self.indices = source, indices
        self.transform, self.seed = transform, seed
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> tuple[Tensor, int]:
        index = self.indices[position]
        picture, label = self.source[index]
        seed = np.random.SeedSequence((self.seed, self.epoch, index)).generate_state(1, np.uint64)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(int(seed[0]))  # torch.manual_seed resets GPUs, too
            return self.transform(picture), int(label)


def open_source(config: TrainConfig) -> Source:
    """The dataset that ``config`` names.

    Raises:
        FileNotFoundError: if ``data`` is missing.
        ValueError: if something else is wrong with it, saying how to get it.
    """
    try:
        return _OPEN[config.dataset](config)
    except (RuntimeError, ImportError) as error:  # torchvision's "not found", scipy for two of them
        raise ValueError(
            f"{OWNER}: dataset {config.dataset} cannot be read from data {config.data!r}: {error}"
        ) from error


def _cifar(config: TrainConfig) -> Source:
    kind = datasets.CIFAR10 if config.dataset == "cifar10" else datasets.CIFAR100
    train, val = (kind(config.data, part, download=config.download) for part in (True, False))
    return Source(train, val, len(train.classes), 32)


def _fashion_mnist(config: TrainConfig) -> Source:
    train, val = (
        datasets.FashionMNIST(config.data, part, download=config.download) for part in (True, False)
    )
    return Source(train, val, len(train.classes), 28)


def _flowers(config: TrainConfig) -> Source:
    train, val, test = (
        datasets.Flowers102(config.data, part, download=config.download)
        for part in ("train", "val", "test")
    )
    # as the paper splits it (Table 6): 2040 pictures to train, 6149 to test
    return Source(ConcatDataset([train, val]), test, 102, None)


def _cars(config: TrainConfig) -> Source:
    if config.download:
        raise ValueError(
            f"{OWNER}: download is not accepted with stanford_cars, whose address is gone; "
            f"put the files under {os.path.join(config.data, 'stanford_cars')}"
        )
    train, val = (datasets.StanfordCars(config.data, part) for part in ("train", "test"))
    return Source(train, val, len(train.classes), None)


def _imagenet(config: TrainConfig) -> Source:
    if config.download:
        raise ValueError(
            f"{OWNER}: download is not accepted with imagenet, which needs an account at "
            f"image-net.org; put its archives into {config.data!r}"
        )
    train, val = (datasets.ImageNet(config.data, part) for part in ("train", "val"))
    return Source(train, val, len(train.classes), None)


def _image_folder(config: TrainConfig) -> Source:
    if config.download:
        raise ValueError(f"{OWNER}: download is not accepted with image_folder")
    folders = [Path(config.data) / part for part in ("train", "val")]
    for folder in folders:
        if not folder.is_dir():
            raise FileNotFoundError(
                f"{OWNER}: data: {folder} does not exist, train/<class>/ and val/<class>/ "
                "are accepted"
            )
    train, val = (datasets.ImageFolder(str(folder)) for folder in folders)
    if train.classes != val.classes:
        odd = sorted(set(train.classes) ^ set(val.classes))[0]
        raise ValueError(f"{OWNER}: data: class {odd!r} is in only one of train and val")
    return Source(train, val, len(train.classes), None)


def _npz(config: TrainConfig) -> Source:
    if config.download:
        raise ValueError(f"{OWNER}: download is not accepted with npz")
    train, val = (JpegBlobs(config.data, part) for part in ("train", "test"))
    size = min(train[0][0].size)
    return Source(train, val, int(max(train.label.max(), val.label.max())) + 1, size)


_OPEN: dict[str, Callable[[TrainConfig], Source]] = {
    "cifar10": _cifar,
    "cifar100": _cifar,
    "fashion_mnist": _fashion_mnist,
    "flowers102": _flowers,
    "stanford_cars": _cars,
    "imagenet": _imagenet,
    "image_folder": _image_folder,
    "npz": _npz,
}


def training_transform(config: TrainConfig, source: Source, expected: DataConfig) -> v2.Compose:
    """A training picture to what the network sees, randomly as ``config.augment`` says."""
    resolution = input_resolution(config, source, expected)
    steps: list[torch.nn.Module] = [v2.PILToTensor(), v2.RGB()]
    if config.augment == "none":
        steps += _resized(resolution, source, expected)
    elif source.size is None:
        interpolation = InterpolationMode(expected.interpolation)
        steps += [v2.RandomResizedCrop(resolution, interpolation=interpolation)]
    else:
        # four pixels of CIFAR's 32 (He et al., 2016, section 4.2)
        crop = v2.RandomCrop(source.size, padding=source.size // 8, pad_if_needed=True)
        steps += [crop, *_resized(resolution, source, expected)]
    if config.augment != "none":
        steps += [v2.RandomHorizontalFlip()]
    if config.augment == "autoaugment":
        small = source.size is not None
        policy = v2.AutoAugmentPolicy.CIFAR10 if small else v2.AutoAugmentPolicy.IMAGENET
        steps += [v2.AutoAugment(policy)]
    elif config.augment == "randaugment":
        steps += [v2.RandAugment()]
    return v2.Compose([*steps, *_normalized(expected)])


def evaluation_transform(config: TrainConfig, source: Source, expected: DataConfig) -> v2.Compose:
    """A picture to what the network sees: photographs are resized and centre cropped."""
    resized = _resized(input_resolution(config, source, expected), source, expected)
    return v2.Compose([v2.PILToTensor(), v2.RGB(), *resized, *_normalized(expected)])


def input_resolution(config: TrainConfig, source: Source, expected: DataConfig) -> int:
    """The side of the network's input in pixels."""
    if config.resolution is not None or source.size is None:
        return config.resolution or expected.resolution
    scaled = config.multipliers()
    return source.size if scaled is None else scale_resolution(source.size, scaled.resolution)


def _resized(resolution: int, source: Source, expected: DataConfig) -> list[torch.nn.Module]:
    interpolation = InterpolationMode(expected.interpolation)
    if source.size is not None:  # [resolution, resolution] even where one picture is not square
        return [v2.Resize([resolution, resolution], interpolation)]
    side = round(resolution * expected.resize / expected.resolution)
    return [v2.Resize(side, interpolation), v2.CenterCrop(resolution)]


def _normalized(expected: DataConfig) -> list[torch.nn.Module]:
    to_float = v2.ToDtype(torch.float32, scale=True)
    return [to_float, v2.Normalize(list(expected.mean), list(expected.std))]


def training_pictures(config: TrainConfig, source: Source, expected: DataConfig) -> Pictures:
    """The part of the training pictures that ``config.fraction`` and its seed select."""
    count = len(source.train)
    indices = list(range(count))
    if config.fraction < 1.0:
        generator = torch.Generator().manual_seed(config.seed)
        kept = max(1, round(config.fraction * count))
        indices = sorted(torch.randperm(count, generator=generator)[:kept].tolist())
    return Pictures(
        source.train, indices, training_transform(config, source, expected), config.seed
    )


def evaluation_loader(
    config: TrainConfig, source: Source, expected: DataConfig, ranks: Ranks, device: torch.device
) -> DataLoader[Any]:
    """Every evaluation picture once, in one of the processes."""
    own = list(range(ranks.rank, len(source.val), ranks.world_size))
    transform = evaluation_transform(config, source, expected)
    pictures = Pictures(source.val, own, transform, config.seed)
    return DataLoader(pictures, config.batch_size, **_loading(config, device))


def training_loader(
    config: TrainConfig,
    pictures: Pictures,
    ranks: Ranks,
    device: torch.device,
    epoch: int,
    batches: range,
) -> DataLoader[Any]:
    """Batches number ``batches`` of this process in ``epoch``.

    A step's batches of all processes together are those of one process with larger batches.
    """
    pictures.epoch = epoch
    sampler: DistributedSampler[Any] = DistributedSampler(
        pictures, ranks.world_size, ranks.rank, shuffle=True, seed=config.seed, drop_last=True
    )
    sampler.set_epoch(epoch)
    order = BatchSampler(sampler, config.batch_size, drop_last=True)
    mine = list(islice(order, batches.start, batches.stop))
    return DataLoader(pictures, batch_sampler=mine, **_loading(config, device))


def _loading(config: TrainConfig, device: torch.device) -> dict[str, Any]:
    return {
        "num_workers": config.workers,
        "pin_memory": device.type == "cuda",
        "worker_init_fn": _leave_interrupts_to_the_parent,
        # else a loader would draw a seed from the numbers that dropout comes from
        "generator": torch.Generator().manual_seed(config.seed),
    }


def _leave_interrupts_to_the_parent(worker: int) -> None:
    """Ctrl-C reaches all processes of a terminal; this one loads pictures until it is told.

    (A forked worker has the training process's handler, others would have Python's.)
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
