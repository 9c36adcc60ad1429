"""A run that is prepared: its steps, epochs, evaluations and checkpoints."""

from __future__ import annotations

import contextlib
import math
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from . import checkpoint, data, distributed
from .config import OWNER, TrainConfig
from .distributed import Ranks
from .history import EpochRecord, History, StepRecord, TensorBoard

CHECKPOINT, BEST, HISTORY, CURVES = "checkpoint.pt", "best.pt", "history.json", "curves.png"
LOGS = "tensorboard"
# A loss is read this often: on a GPU reading one waits for everything before it.
READ_EVERY = {"cpu": 1, "cuda": 20}
# What may be otherwise when a run is resumed. Equal bits need the same device, too.
FREE = (
    "out",
    "data",
    "resume",
    "weights",
    "download",
    "epochs",
    "limit_steps",
    "workers",
    "device",
)
Say = Callable[[str], object]


class NonFiniteLoss(RuntimeError):
    """The loss became NaN or infinite; ``step`` says where."""

    def __init__(self, message: str, step: int) -> None:
        super().__init__(message)
        self.step = step


class Interrupted(KeyboardInterrupt):
    """The run was asked to stop by SIGINT or SIGTERM and has saved a checkpoint."""


class Stop(Exception):
    """Between two steps, or in an evaluation: a good moment to save and leave."""


@dataclass
class Request:
    """Whether someone has asked the run to stop."""

    signal: int | None = None


@dataclass(kw_only=True)
class Run:
    """The parts of a run, and how far it is: ``step`` steps are done."""

    config: TrainConfig
    ranks: Ranks
    device: torch.device
    request: Request
    say: Say
    network: nn.Module
    ema: AveragedModel | None
    optimizer: Optimizer
    scheduler: LambdaLR
    scaler: torch.amp.GradScaler
    criterion: nn.Module
    mixup: v2.MixUp | None
    pictures: data.Pictures
    evaluation: DataLoader[Any]
    steps_per_epoch: int
    history: History
    step: int = 0
    epoch_loss: float = 0.0  # sum over the steps of the epoch that is under way
    unread: list[Tensor] = field(default_factory=list)  # losses still on the device
    out: Path = field(init=False)
    trained: nn.Module = field(init=False)  # the network, wrapped where there are many processes
    board: TensorBoard = field(init=False)

    def __post_init__(self) -> None:
        self.out = Path(self.config.out)
        self.trained = self.network
        if self.ranks.world_size > 1:
            ids = [self.device.index] if self.device.type == "cuda" else None
            self.trained = DistributedDataParallel(self.network, device_ids=ids)

    def until_done(self) -> History:
        """Run the remaining epochs."""
        if self.ranks.first:
            self.out.mkdir(parents=True, exist_ok=True)
            self.board = TensorBoard(self.out / LOGS, self.step + 1)
        try:
            while len(self.history.epochs) < self.config.epochs:
                self.epoch()
            self.history.finished = True
        except Stop:
            self.save()
            where = f"step {self.step}, {self.out / CHECKPOINT} is saved"
            if self.request.signal is not None:
                raise Interrupted(f"{OWNER}: interrupted after {where}") from None
            self.say(f"stopped by limit_steps after {where}")
        finally:
            if self.ranks.first:
                self.board.close()
        if self.ranks.first:
            self.history.write(self.out / HISTORY)
            if not self.history.plot(self.out / CURVES):
                self.say(f"{CURVES} needs matplotlib: pip install 'effkernels[train]'")
        return self.history

    def epoch(self) -> None:
        """The rest of the epoch that is under way, its evaluation and its checkpoint."""
        number = len(self.history.epochs)
        start = time.perf_counter()
        self.train_epoch(number)
        middle = time.perf_counter()
        val_loss, val_accuracy = self.evaluate(self.network)
        if not math.isfinite(val_loss):
            raise NonFiniteLoss(self.bad("loss of the evaluation", val_loss, self.step), self.step)
        ema_loss, ema_accuracy = None, None
        if self.ema is not None:
            ema_loss, ema_accuracy = self.evaluate(self.ema.module)
        record = EpochRecord(
            number + 1,
            self.step,
            self.epoch_loss / self.steps_per_epoch,
            val_loss,
            val_accuracy,
            ema_loss,
            ema_accuracy,
            middle - start,
            time.perf_counter() - middle,
        )
        self.history.epochs.append(record)
        self.epoch_loss = 0.0
        # before the checkpoint, after which a resumed run would not come here again
        if self.ranks.first and self.history.best() is record:
            best = self.network if self.ema is None else self.ema.module
            checkpoint.save(self.out / BEST, {"state_dict": best.state_dict()})
        self.save()
        if not self.ranks.first:
            return
        self.board.epoch(record)
        averaged = "" if self.ema is None else f" (averaged {record.accuracy:.2%})"
        self.say(
            f"epoch {record.epoch}/{self.config.epochs}  train loss {record.train_loss:.4f}  "
            f"val loss {val_loss:.4f}  accuracy {val_accuracy:.2%}{averaged}  "
            f"{record.train_seconds:.1f} + {record.val_seconds:.1f} s"
        )

    def train_epoch(self, number: int) -> None:
        done = self.step - number * self.steps_per_epoch
        per_step = self.config.accumulate
        loader = data.training_loader(
            self.config,
            self.pictures,
            self.ranks,
            self.device,
            number,
            range(done * per_step, self.steps_per_epoch * per_step),
        )
        self.network.train()
        if self.config.freeze_bn:
            for module in self.network.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        batches = iter(loader)
        progress = self.progress(
            range(done, self.steps_per_epoch), f"epoch {number + 1}", self.steps_per_epoch, done
        )
        for position in progress:
            if self.step == self.config.limit_steps:
                raise Stop
            self.unread.append(self.take_step(batches))
            last = position + 1 == self.steps_per_epoch or self.step == self.config.limit_steps
            if last or len(self.unread) == READ_EVERY[self.device.type]:
                self.read_losses()

    def take_step(self, batches: Iterator[tuple[Tensor, Tensor]]) -> Tensor:
        """One step of the optimizer; returns its loss, still on the device."""
        config = self.config
        losses = []
        for part in range(config.accumulate):
            images, labels = self.to_device(next(batches))
            if self.mixup is not None:
                images, labels = self.mixup(images, labels)
            last = part + 1 == config.accumulate
            with contextlib.ExitStack() as stack:
                if self.ranks.world_size > 1 and not last:
                    stack.enter_context(self.trained.no_sync())  # type: ignore[operator]
                with self.autocast():
                    loss = self.criterion(self.trained(images), labels) / config.accumulate
                self.scaler.scale(loss).backward()
            losses.append(loss.detach().float())
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.scheduler.step()
        self.step += 1
        if self.ema is not None:
            # as TensorFlow's ExponentialMovingAverage does with num_updates
            decay = min(config.ema_decay, (1 + self.step) / (10 + self.step))
            self.ema.multi_avg_fn = get_ema_multi_avg_fn(decay)
            self.ema.update_parameters(self.network)
        return torch.stack(losses).sum()

    def read_losses(self) -> None:
        """Note the losses of the latest steps; stop if one is not finite or a signal has come.

        All processes do this after the same steps, and come to the same conclusion.
        """
        asked = self.unread[0].new_tensor(float(self.request.signal is not None))
        values = distributed.total(torch.stack([*self.unread, asked]), self.ranks).tolist()
        first = self.step - len(self.unread) + 1
        self.unread.clear()
        for step, value in enumerate(values[:-1], first):
            loss = value / self.ranks.world_size
            if not math.isfinite(loss):
                raise NonFiniteLoss(self.bad("loss", loss, step), step)
            self.epoch_loss += loss
            if step % self.config.log_every == 0:
                record = StepRecord(step, loss, self.learning_rate(step))
                self.history.steps.append(record)
                if self.ranks.first:
                    self.board.step(record)
        if values[-1]:
            self.request.signal = self.request.signal or signal.SIGTERM
            raise Stop

    def bad(self, what: str, value: float, step: int) -> str:
        path = self.out / CHECKPOINT
        kept = f"{path} is the last good checkpoint" if path.exists() else "no checkpoint yet"
        epoch = (step - 1) // self.steps_per_epoch + 1
        return (
            f"{OWNER}: {what} is {value} at step {step} (epoch {epoch}); {kept}. A lower lr, more "
            "warmup_epochs or another dtype may help"
        )

    def learning_rate(self, step: int) -> float:
        """What step number ``step`` (from 1) ran with."""
        base, factor = self.scheduler.base_lrs[0], self.scheduler.lr_lambdas[0]
        return float(base) * factor(step - 1)

    def evaluate(self, network: nn.Module) -> tuple[float, float]:
        """Mean cross entropy and top-1 accuracy over the evaluation pictures."""
        network.eval()
        sums = torch.zeros(3, dtype=torch.float64, device=self.device)  # loss, correct, pictures
        with torch.no_grad():
            for batch in self.progress(self.evaluation, "evaluation", len(self.evaluation)):
                # alone: the other processes would wait for this one
                if self.request.signal is not None and self.ranks.world_size == 1:
                    raise Stop
                images, labels = self.to_device(batch)
                with self.autocast():
                    logits = network(images)
                logits = logits.float()
                sums[0] += nn.functional.cross_entropy(logits, labels, reduction="sum")
                sums[1] += (logits.argmax(1) == labels).sum()
                sums[2] += len(labels)
        loss, correct, pictures = distributed.total(sums, self.ranks).tolist()
        return loss / pictures, correct / pictures

    def autocast(self) -> torch.autocast:
        dtype = getattr(torch, self.config.dtype)
        return torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32)

    def to_device(self, batch: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
        images, labels = batch
        images = images.to(self.device, non_blocking=True, memory_format=torch.channels_last)
        return images, labels.to(self.device, non_blocking=True)

    def progress(self, items: Iterable[Any], what: str, count: int, done: int = 0) -> Iterable[Any]:
        """``items`` with a bar, on a terminal and if tqdm is installed."""
        if not self.ranks.first:
            return items
        try:
            from tqdm import tqdm
        except ImportError:
            return items
        return tqdm(items, what, count, initial=done, leave=False, disable=None)

    def save(self) -> None:
        """Write everything that :meth:`load` needs to go on from here, and the history.

        A step whose own loss was finite may have thrown the weights away all the same.
        """
        for name, parameter in self.network.named_parameters():
            bad = parameter[~parameter.isfinite()]
            if len(bad):
                message = self.bad(f"a value of {name}", bad[0].item(), self.step)
                raise NonFiniteLoss(message, self.step)
        states = distributed.gathered(checkpoint.rng_state(self.device), self.ranks)
        if not self.ranks.first:
            return
        history = asdict(self.history)
        checkpoint.save(
            self.out / CHECKPOINT,
            {
                "version": checkpoint.VERSION,
                "config": history["config"],
                "model": self.network.state_dict(),
                "ema": None if self.ema is None else self.ema.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scheduler": self.scheduler.state_dict(),
                "scaler": self.scaler.state_dict(),
                "rng": states,
                "step": self.step,
                "steps_per_epoch": self.steps_per_epoch,
                "epoch_loss": self.epoch_loss,
                "history": {"steps": history["steps"], "epochs": history["epochs"]},
            },
        )
        self.history.write(self.out / HISTORY)

    def load(self, saved: dict[str, Any]) -> None:
        """Go on from a checkpoint.

        Raises:
            ValueError: if it is of a run with another result.
        """
        self.check_same_run(saved)
        self.network.load_state_dict(saved["model"])
        if self.ema is not None:
            self.ema.load_state_dict(saved["ema"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.scheduler.load_state_dict(saved["scheduler"])
        self.scaler.load_state_dict(saved["scaler"])
        self.step, self.epoch_loss = saved["step"], saved["epoch_loss"]
        self.history.restore(saved["history"])
        checkpoint.set_rng_state(saved["rng"][self.ranks.rank], self.device)

    def check_same_run(self, saved: dict[str, Any]) -> None:
        now = self.history.config
        # what an older checkpoint does not know was as it is by default
        before = asdict(TrainConfig(model="-", dataset="npz", data="-", out="-")) | saved["config"]
        free = set(FREE)
        if self.config.schedule == "cosine":
            free.remove("epochs")  # its curve depends on them
        different = {
            name: (before[name], now[name])
            for name in now
            if name not in free and before[name] != now[name]
        }
        different |= {
            name: (then, today)
            for name, then, today in (
                ("number of processes", len(saved["rng"]), self.ranks.world_size),
                ("steps per epoch", saved["steps_per_epoch"], self.steps_per_epoch),
            )
            if then != today
        }
        if different:
            listed = "; ".join(f"{name} was {a!r}, is {b!r}" for name, (a, b) in different.items())
            raise ValueError(f"{OWNER}: resume: this is not the run in {self.out}: {listed}")
        done = len(saved["history"]["epochs"])
        for name, wanted, reached in (
            ("epochs", self.config.epochs, done),
            ("limit_steps", self.config.limit_steps, saved["step"]),
        ):
            if wanted is not None and wanted < reached:
                raise ValueError(
                    f"{OWNER}: resume: {name} is {wanted}, but {reached} are done already"
                )
