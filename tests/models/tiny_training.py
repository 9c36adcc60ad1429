"""A network and a dataset so small that a training run takes a second. As a script: the command."""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from effkernels.models import registry
from effkernels.models.common import DataConfig
from effkernels.models.efficientnet import Stage, Variant
from effkernels.models.train import main
from effkernels.models.training import TrainConfig
from PIL import Image

SIZE, CLASSES = 16, 4
TINY = Variant(
    stages=(Stage(1, 8, 3, 1, 1), Stage(2, 12, 5, 2, 3)),
    stem_channels=8,
    head_channels=32,
    drop_rate=0.2,
    data_config=DataConfig(SIZE, SIZE + 4),
)


def register(patch: pytest.MonkeyPatch) -> None:
    """Let ``create_model`` know the network ``tiny``: an EfficientNet with three blocks."""
    patch.setitem(registry._EFFICIENTNETS, "tiny", TINY)
    patch.setattr(registry, "_NAMES", (*registry._NAMES, "tiny"))


def picture(label: int, generator: torch.Generator, size: int = SIZE) -> Image.Image:
    """RGB, size × size: a class is a colour, under noise."""
    colour = torch.tensor([[200, 50, 50], [50, 200, 50], [50, 50, 200], [200, 200, 50]])[label]
    noise = torch.randint(-50, 51, (size, size, 3), generator=generator)
    return Image.fromarray((colour + noise).clamp(0, 255).to(torch.uint8).numpy())


def jpeg(image: Image.Image) -> Any:
    """Bytes as a uint8 array."""
    file = io.BytesIO()
    image.save(file, "JPEG")
    return np.frombuffer(file.getvalue(), np.uint8)


def write_blobs(path: Path, train: int = 24, test: int = 10) -> Path:
    """An ``.npz`` of JPEGs, sorted by class as real ones are."""
    generator = torch.Generator().manual_seed(0)
    arrays: dict[str, Any] = {}
    for part, count in (("train", train), ("test", test)):
        labels = sorted(index % CLASSES for index in range(count))
        files = [jpeg(picture(label, generator)) for label in labels]
        arrays[f"{part}_jpeg"] = np.concatenate(files)
        arrays[f"{part}_offset"] = np.cumsum([0, *map(len, files)]).astype(np.int64)
        arrays[f"{part}_label"] = np.array(labels)
    np.savez(path, **arrays)
    return path


def tiny_config(data: Path, out: Path, **options: Any) -> TrainConfig:
    """Three steps per epoch on the CPU."""
    defaults: dict[str, Any] = {
        "model": "tiny",
        "dataset": "npz",
        "epochs": 2,
        "batch_size": 8,
        "workers": 0,
        "lr": 0.05,
        "device": "cpu",
        "log_every": 1,
    }
    return TrainConfig(data=str(data), out=str(out), **(defaults | options))


def two_processes(script: str, *words: str) -> dict[str, Any]:
    """What ``subprocess`` needs to run ``script`` in two processes of this machine by torchrun."""
    torchrun = ["torch.distributed.run", "--nproc-per-node=2", "--master-addr=localhost"]
    return {
        "args": [sys.executable, "-m", *torchrun, "--master-port=0", "--rdzv-backend=c10d"]
        + ["--rdzv-endpoint=localhost:0", script, *words],
        "cwd": Path(__file__).parents[2],
        "env": os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        "start_new_session": True,
    }


if __name__ == "__main__":
    register(pytest.MonkeyPatch())
    torch.set_num_threads(1)
    sys.exit(main())
