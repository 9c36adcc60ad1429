"""Losses and accuracies of a run: as JSON, as a picture, and for TensorBoard."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from .checkpoint import write_atomically


@dataclass(frozen=True)
class StepRecord:
    """One step of the optimizer."""

    step: int  # the first is 1
    loss: float  # mean over the step's pictures, in all processes
    lr: float


@dataclass(frozen=True)
class EpochRecord:
    """One pass over the training pictures and what the network could do then.

    Accuracies are in [0, 1]. ``ema_*`` are those of the averaged weights, if there are any.
    """

    epoch: int  # the first is 1
    step: int
    train_loss: float
    val_loss: float
    val_accuracy: float
    ema_loss: float | None
    ema_accuracy: float | None
    train_seconds: float
    val_seconds: float

    @property
    def accuracy(self) -> float:
        """Of the averaged weights if there are any, else of the network's."""
        return self.val_accuracy if self.ema_accuracy is None else self.ema_accuracy


@dataclass
class History:
    """A run's course. ``finished`` tells whether all epochs are done."""

    config: dict[str, Any]
    environment: dict[str, Any]
    steps: list[StepRecord] = field(default_factory=list)
    epochs: list[EpochRecord] = field(default_factory=list)
    finished: bool = False

    def best(self) -> EpochRecord | None:
        """The first epoch with the highest accuracy."""
        return max(self.epochs, key=lambda record: record.accuracy, default=None)

    def restore(self, saved: dict[str, Any]) -> None:
        """Take over the records that ``asdict`` gave."""
        self.steps = [StepRecord(**record) for record in saved["steps"]]
        self.epochs = [EpochRecord(**record) for record in saved["epochs"]]

    def write(self, path: Path) -> None:
        """All of it as JSON, atomically."""
        text = json.dumps(asdict(self), indent=1) + "\n"
        write_atomically(path, lambda file: file.write(text.encode()))

    def plot(self, path: Path) -> bool:
        """Draw losses and accuracies over the epochs; False if matplotlib is not installed."""
        if importlib.util.find_spec("matplotlib") is None:
            return False
        from matplotlib.figure import Figure  # without pyplot: no display, no global state

        figure = Figure(figsize=(9.0, 3.6), layout="constrained")
        losses, accuracies = figure.subplots(1, 2)
        epochs = [record.epoch for record in self.epochs]
        for axes, curves in (
            (losses, ("train_loss", "val_loss", "ema_loss")),
            (accuracies, ("val_accuracy", "ema_accuracy")),
        ):
            for name in curves:
                values = [getattr(record, name) for record in self.epochs]
                if any(value is not None for value in values):
                    axes.plot(epochs, values, marker=".", label=name.replace("_", " "))
            axes.set_xlabel("epoch")
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.grid(alpha=0.3)
            if epochs:
                axes.legend()
        losses.set_ylabel("cross entropy")
        accuracies.set_ylabel("top-1 accuracy")
        figure.suptitle(f"{self.config['model']} on {self.config['dataset']}", fontsize=10)

        def draw(file: IO[bytes]) -> None:
            figure.savefig(file, format="png", dpi=120)

        write_atomically(path, draw)
        return True


class TensorBoard:
    """Scalars of a history for TensorBoard, as far as it is installed."""

    def __init__(self, folder: Path, first_step: int) -> None:
        self.writer: Any = None
        if importlib.util.find_spec("tensorboard") is not None:
            from torch.utils.tensorboard import SummaryWriter

            # What an interrupted run logged after its checkpoint is not shown.
            self.writer = SummaryWriter(str(folder), purge_step=first_step)

    def step(self, record: StepRecord) -> None:
        """Loss and learning rate."""
        if self.writer is not None:
            self.writer.add_scalar("step/loss", record.loss, record.step)
            self.writer.add_scalar("step/lr", record.lr, record.step)

    def epoch(self, record: EpochRecord) -> None:
        """Losses and accuracies."""
        if self.writer is not None:
            for name, value in asdict(record).items():
                if value is not None and name not in ("epoch", "step"):
                    self.writer.add_scalar(f"epoch/{name}", value, record.step)

    def close(self) -> None:
        """Write what is left."""
        if self.writer is not None:
            self.writer.close()
