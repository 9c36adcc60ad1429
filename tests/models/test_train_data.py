"""Datasets as torchvision finds them on a disk, a file of JPEGs, and what becomes of pictures."""

from __future__ import annotations

import hashlib
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from effkernels.models.common import DataConfig
from effkernels.models.training import data
from effkernels.models.training.distributed import Ranks
from torchvision import datasets

from tests.models.tiny_training import CLASSES, SIZE, picture, tiny_config, write_blobs

EXPECTED = DataConfig(SIZE, SIZE + 4)
CPU = torch.device("cpu")
GENERATOR = torch.Generator()


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


def image_files(folder: Path, names: list[str]) -> None:
    folder.mkdir(parents=True)
    for index, name in enumerate(names):
        picture(index % CLASSES, GENERATOR, 20).save(folder / name)


def write_cifar(kind: type[datasets.CIFAR10], labels: str) -> Callable[..., None]:
    """Files as torchvision downloads them, with fewer pictures, and their checksums."""

    def write(root: Path, patch: pytest.MonkeyPatch) -> None:
        folder = root / kind.base_folder
        folder.mkdir()
        entry = {"data": np.zeros((2, 3072), np.uint8), labels: [0, 3]}
        lists: dict[str, list[list[str]]] = {"train_list": [], "test_list": []}
        for name, files in lists.items():
            path = folder / name
            path.write_bytes(pickle.dumps(entry))
            files.append([name, md5(path)])
            patch.setattr(kind, name, files)
        path = folder / kind.meta["filename"]
        path.write_bytes(pickle.dumps({kind.meta["key"]: list("abcd")}))
        patch.setattr(kind, "meta", kind.meta | {"md5": md5(path)})

    return write


def write_fashion_mnist(root: Path, patch: pytest.MonkeyPatch) -> None:
    folder = root / "FashionMNIST" / "raw"
    folder.mkdir(parents=True)
    for part in ("train", "t10k"):
        images = struct.pack(">4i", 0x803, 2, 28, 28) + bytes(2 * 28 * 28)
        (folder / f"{part}-images-idx3-ubyte").write_bytes(images)
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">2i2B", 0x801, 2, 0, 9))


def write_flowers(root: Path, patch: pytest.MonkeyPatch) -> None:
    scipy_io = pytest.importorskip("scipy.io")
    folder = root / "flowers-102"
    image_files(folder / "jpg", [f"image_{index:05d}.jpg" for index in range(1, 7)])
    scipy_io.savemat(folder / "imagelabels.mat", {"labels": np.array([1, 1, 2, 2, 102, 102])})
    scipy_io.savemat(folder / "setid.mat", {"trnid": [1, 3], "valid": [5, 6], "tstid": [2, 4]})
    names = {key: value[0] for key, value in datasets.Flowers102._file_dict.items()}
    sums = {key: (name, md5(folder / name)) for key, name in names.items() if key != "image"}
    patch.setattr(datasets.Flowers102, "_file_dict", datasets.Flowers102._file_dict | sums)


def write_cars(root: Path, patch: pytest.MonkeyPatch) -> None:
    scipy_io = pytest.importorskip("scipy.io")
    folder = root / "stanford_cars"
    notes = np.array([("0.jpg", 1), ("1.jpg", 2)], dtype=[("fname", "O"), ("class", "i4")])
    (folder / "devkit").mkdir(parents=True)
    names = np.array(["a car", "another car"], dtype=object)
    scipy_io.savemat(folder / "devkit" / "cars_meta.mat", {"class_names": names})
    scipy_io.savemat(folder / "devkit" / "cars_train_annos.mat", {"annotations": notes})
    scipy_io.savemat(folder / "cars_test_annos_withlabels.mat", {"annotations": notes})
    for part in ("train", "test"):
        image_files(folder / f"cars_{part}", ["0.jpg", "1.jpg"])


def write_imagenet(root: Path, patch: pytest.MonkeyPatch) -> None:
    torch.save(({"n01": ("a", "b"), "n02": ("c",)}, ["n01", "n02"]), root / "meta.bin")
    write_folders(root, patch)


def write_folders(root: Path, patch: pytest.MonkeyPatch) -> None:
    for part in ("train", "val"):
        for name in ("n01", "n02"):
            image_files(root / part / name, ["0.jpg", "1.png"])


CIFAR10 = write_cifar(datasets.CIFAR10, "labels")
CIFAR100 = write_cifar(datasets.CIFAR100, "fine_labels")


@pytest.mark.parametrize(
    ("dataset", "write", "classes", "lengths", "side"),
    [
        ("cifar10", CIFAR10, 4, (2, 2), 32),
        ("cifar100", CIFAR100, 4, (2, 2), 32),
        ("fashion_mnist", write_fashion_mnist, 10, (2, 2), 28),
        ("flowers102", write_flowers, 102, (4, 2), SIZE),
        ("stanford_cars", write_cars, 2, (2, 2), SIZE),
        ("imagenet", write_imagenet, 2, (4, 4), SIZE),
        ("image_folder", write_folders, 2, (4, 4), SIZE),
    ],
)
@pytest.mark.parametrize("augment", ["none", "standard", "autoaugment", "randaugment"])
def test_a_dataset_from_its_files(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    dataset: str,
    write: Callable[..., None],
    classes: int,
    lengths: tuple[int, int],
    side: int,
    augment: str,
) -> None:
    write(tmp_path, monkeypatch)
    config = tiny_config(tmp_path, tmp_path / "out", dataset=dataset, augment=augment)
    source = data.open_source(config)
    assert source.classes == classes and (len(source.train), len(source.val)) == lengths
    pictures = data.training_pictures(config, source, EXPECTED)
    loader = data.evaluation_loader(config, source, EXPECTED, Ranks(), CPU)
    for images, labels in loader:
        assert images.shape == (lengths[1], 3, side, side) and images.dtype == torch.float32
        assert labels.max() < classes
    image, label = pictures[1]
    assert image.shape == (3, side, side) and image.isfinite().all() and label < classes


@pytest.mark.parametrize("dataset", data._OPEN)
def test_a_missing_dataset_is_named(tmp_path: Path, dataset: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match="data") as caught:
        data.open_source(tiny_config(tmp_path / "nowhere", tmp_path, dataset=dataset))
    assert "nowhere" in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_classes_of_train_and_val_must_agree(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_folders(tmp_path, monkeypatch)
    (tmp_path / "val" / "n02").rename(tmp_path / "val" / "n03")
    with pytest.raises(ValueError, match="class 'n02' is in only one of train and val"):
        data.open_source(tiny_config(tmp_path, tmp_path, dataset="image_folder"))


def test_blobs_are_the_pictures(tmp_path: Path) -> None:
    path = write_blobs(tmp_path / "a.npz")
    source = data.open_source(tiny_config(path, tmp_path))
    assert (len(source.train), len(source.val), source.classes, source.size) == (24, 10, 4, SIZE)
    means = [np.asarray(image).mean((0, 1)) for image, _ in source.train]
    assert [label for _, label in source.train] == sorted(list(range(4)) * 6)
    for mean, (_, label) in zip(means, source.train, strict=True):  # red, green, blue, yellow
        assert mean.argmax() == label or (label == 3 and mean[2] < 100 < min(mean[:2]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train_jpeg": None}, "array train_jpeg is missing"),
        ({"train_jpeg": np.zeros(9)}, r"train_jpeg is float64 of shape \(9,\), uint8"),
        ({"test_offset": np.zeros(3)}, "test_offset is float64"),
        ({"test_offset": np.arange(3)}, "test_offset has 3 values, one more than test_label's 10"),
        ({"train_label": -np.ones(24, np.int64)}, "train_label has negative values"),
        ({"train_offset": np.arange(25) * 10**6}, "it must rise within 0 to"),
        ({"train_offset": np.arange(25)[::-1].copy()}, "it must rise within 0 to"),
        ({"train_jpeg": "zeros"}, "train picture 0 is no JPEG"),
    ],
)
def test_blobs_that_are_none(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with np.load(write_blobs(tmp_path / "a.npz")) as arrays:
        changed = dict(arrays)
    for name, value in change.items():
        changed[name] = np.zeros_like(changed[name]) if isinstance(value, str) else value
    np.savez(tmp_path / "b.npz", **{k: v for k, v in changed.items() if v is not None})
    with pytest.raises(ValueError, match=message):
        data.open_source(tiny_config(tmp_path / "b.npz", tmp_path))


def test_a_file_that_is_no_npz(tmp_path: Path) -> None:
    (tmp_path / "a.npz").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match=r"a.npz is no .npz of JPEGs"):
        data.open_source(tiny_config(tmp_path / "a.npz", tmp_path))


def test_a_fraction_is_drawn_by_the_seed(tmp_path: Path) -> None:
    path = write_blobs(tmp_path / "a.npz")

    def drawn(**options: Any) -> list[int]:
        config = tiny_config(path, tmp_path, **options)
        return data.training_pictures(config, data.open_source(config), EXPECTED).indices

    assert drawn() == list(range(24))
    half = drawn(fraction=0.5)
    assert len(set(half)) == 12 and half == drawn(fraction=0.5, batch_size=3)
    assert half != drawn(fraction=0.5, seed=1)
    assert len(drawn(fraction=1e-9)) == 1


def order(path: Path, epoch: int, batches: range, rank: int, count: int, **options: Any) -> Any:
    """Labels and pictures that a process gets."""
    config = tiny_config(path, path.parent, **options)
    pictures = data.training_pictures(config, data.open_source(config), EXPECTED)
    ranks = Ranks(rank, count)
    return list(data.training_loader(config, pictures, ranks, CPU, epoch, batches))


def test_batches_are_shuffled_and_begin_where_they_are_told(tmp_path: Path) -> None:
    path = write_blobs(tmp_path / "a.npz")
    first, second = (order(path, epoch, range(3), 0, 1) for epoch in (0, 1))
    assert [len(labels) for _, labels in first] == [8, 8, 8]
    assert not torch.equal(first[0][1], second[0][1])
    labels = torch.cat([labels for _, labels in first])
    assert labels.bincount().tolist() == [6, 6, 6, 6]
    rest = order(path, 0, range(1, 3), 0, 1)
    assert len(rest) == 2
    for (images, _), (expected, _) in zip(rest, first[1:], strict=True):
        assert torch.equal(images, expected)


def test_processes_share_one_large_batch(tmp_path: Path) -> None:
    path = write_blobs(tmp_path / "a.npz")
    whole = order(path, 3, range(3), 0, 1)
    parts = [order(path, 3, range(3), rank, 2, batch_size=4) for rank in (0, 1)]
    for step, (images, _) in enumerate(whole):
        together = torch.stack([parts[0][step][0], parts[1][step][0]], 1).flatten(0, 1)
        assert torch.equal(together, images)


def test_every_evaluation_picture_belongs_to_one_process(tmp_path: Path) -> None:
    config = tiny_config(write_blobs(tmp_path / "a.npz"), tmp_path)
    source = data.open_source(config)
    counts = [
        sum(
            len(labels)
            for _, labels in data.evaluation_loader(config, source, EXPECTED, Ranks(rank, 3), CPU)
        )
        for rank in range(3)
    ]
    assert counts == [4, 3, 3]  # 10 pictures, none twice


def test_resolution_scales_small_pictures_and_photographs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_folders(tmp_path, monkeypatch)
    path = write_blobs(tmp_path / "a.npz")
    for dataset, where in (("npz", path), ("image_folder", tmp_path)):
        config = tiny_config(where, tmp_path, dataset=dataset, resolution=24)
        source = data.open_source(config)
        for transform in (data.training_transform, data.evaluation_transform):
            image = transform(config, source, EXPECTED)(source.train[0][0])
            assert image.shape == (3, 24, 24)


def test_evaluation_normalises_as_the_model_expects(tmp_path: Path) -> None:
    config = tiny_config(write_blobs(tmp_path / "a.npz"), tmp_path)
    source = data.open_source(config)
    image = source.val[0][0]
    values = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1) / 255  # [3, H, W]
    mean, std = (torch.tensor(each)[:, None, None] for each in (EXPECTED.mean, EXPECTED.std))
    result = data.evaluation_transform(config, source, EXPECTED)(image)
    torch.testing.assert_close(result, (values - mean) / std)
