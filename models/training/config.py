"""Everything that a training run depends on, checked before anything happens."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from effkernels.modules import arguments

from ..scaling import CompoundScaling, Multipliers

OWNER = "train"  # in errors
DATASETS = (
    "cifar10",
    "cifar100",
    "fashion_mnist",
    "flowers102",
    "stanford_cars",
    "imagenet",
    "image_folder",
    "npz",
)
OPTIMIZERS = ("sgd", "adam", "adamw", "rmsprop")
SCHEDULES = ("cosine", "step", "constant")
AUGMENTATIONS = ("none", "standard", "autoaugment", "randaugment")
DTYPES = ("float32", "bfloat16", "float16")
MAX_SEED = 2**63 - 1


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A training run.

    Args:
        model: one of ``list_models()``.
        dataset: one of :data:`DATASETS`.
        data: the folder that torchvision's dataset takes as its ``root``; for ``image_folder`` a
            folder with ``train/<class>/`` and ``val/<class>/``; for ``npz`` the file (see
            :class:`~effkernels.models.training.data.JpegBlobs`).
        out: folder of the run: ``checkpoint.pt`` (everything, after every epoch), ``best.pt``
            (weights of the best epoch), ``history.json``, ``curves.png``, ``tensorboard/``.
        model_options: further arguments of ``create_model``, like ``{"stem": "cifar"}``.
        phi: scale ``model`` and the pictures to this φ; None for the network as it is.
        coefficients: α, β and γ of ``phi``; None for the paper's.
        num_classes: outputs; None for as many as ``dataset`` has classes.
        weights: checkpoint to start from, as ``load_checkpoint`` reads it, strictly; but a head for
            another number of classes is left out, and a new one starts from random values.
        resume: continue the run in ``out``. What the result depends on must be as before;
            ``epochs`` may grow if ``schedule`` does not depend on it.
        download: let torchvision download the dataset into ``data``.
        resolution: side of the network's input in pixels; None for the pictures' own size where
            they are small (CIFAR, Fashion-MNIST, npz), times γ^φ with ``phi``, else the model's.
        fraction: part of the training pictures to use, in (0, 1], drawn with ``seed``.
        augment: ``"none"``; ``"standard"``: flips and crops; ``"autoaugment"`` (the paper's) or
            ``"randaugment"``: one of torchvision's policies on top of these.
        epochs: passes over the training pictures.
        limit_steps: stop after this step of the whole run, with a checkpoint to resume from.
        batch_size: pictures of one forward pass in one process.
        accumulate: forward passes per step of the optimizer.
        workers: processes that load pictures; 0 to load in the training process. Which pictures
            come, and how augmented, does not depend on it.
        optimizer: one of :data:`OPTIMIZERS`.
        lr: peak learning rate; None for the optimizer's usual one
            (:data:`~effkernels.models.training.schedules.LEARNING_RATES`).
        momentum, nesterov: of ``sgd``; ``rmsprop`` takes the momentum, too.
        layer_decay: D in (0, 1]: the head learns with ``lr``, each layer before it with D times the
            learning rate of the one behind it (:mod:`~effkernels.models.training.layers`).
        weight_decay: of convolution and linear weights, not of biases and BatchNorms; None for
            the optimizer's usual one.
        schedule: ``"cosine"`` to 0 at the end, ``"step"``, or ``"constant"``.
        warmup_epochs: during which the learning rate grows linearly.
        decay_rate, decay_epochs: ``"step"`` multiplies by ``decay_rate`` every ``decay_epochs``.
        label_smoothing: of the cross entropy, in [0, 1).
        mixup: parameter α of mixup's Beta(α, α); 0 for no mixup.
        ema_decay: of an exponential moving average of the weights and BatchNorm statistics, in
            [0, 1); 0 for none. Step n uses min(ema_decay, (1 + n) / (10 + n)).
        freeze_bn: BatchNorms normalise with their running statistics and leave them unchanged.
        sync_bn: BatchNorms use the statistics of all processes' pictures.
        device: ``"auto"``, ``"cpu"``, ``"cuda"`` or ``"cuda:N"``.
        dtype: of autocast; ``"float32"`` for none. ``"float16"`` brings a gradient scaler.
        accelerate: run on this library's kernels; False for plain PyTorch.
        deterministic: ``torch.use_deterministic_algorithms``: equal bits on a GPU, too.
        seed: of the initial weights and everything random.
        log_every: steps from one loss in the history to the next.

    Raises:
        ValueError: naming the argument, what came and what is accepted.
    """

    model: str
    dataset: str
    data: str
    out: str
    model_options: Mapping[str, Any] = field(default_factory=dict)
    phi: float | None = None
    coefficients: tuple[float, float, float] | None = None
    num_classes: int | None = None
    weights: str | None = None
    resume: bool = False
    download: bool = False
    resolution: int | None = None
    fraction: float = 1.0
    augment: str = "standard"
    epochs: int = 10
    limit_steps: int | None = None
    batch_size: int = 128
    accumulate: int = 1
    workers: int = 2
    optimizer: str = "sgd"
    lr: float | None = None
    layer_decay: float = 1.0
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float | None = None
    schedule: str = "cosine"
    warmup_epochs: float = 0.0
    decay_rate: float = 0.97
    decay_epochs: float = 2.4
    label_smoothing: float = 0.1
    mixup: float = 0.0
    ema_decay: float = 0.0
    freeze_bn: bool = False
    sync_bn: bool = False
    device: str = "auto"
    dtype: str = "float32"
    accelerate: bool = True
    deterministic: bool = False
    seed: int = 0
    log_every: int = 50

    def __post_init__(self) -> None:
        for name in ("model", "data", "out", "device"):
            _text(name, getattr(self, name))
        for name in ("num_classes", "weights", "features_only", "in_channels"):
            if name in self.model_options:  # pictures are in RGB, the others have their own place
                raise ValueError(f"{OWNER}: model_options has {name!r}, not accepted there")
        for name, value in self.model_options.items():
            if value is not None and not isinstance(value, (bool, int, float, str)):
                raise ValueError(
                    f"{OWNER}: model_options has {name}={value!r}, strings, numbers, booleans and "
                    "None are accepted"
                )
        if self.coefficients is not None and self.phi is None:
            raise ValueError(
                f"{OWNER}: coefficients are {self.coefficients!r}, none are accepted without phi"
            )
        self.multipliers()
        _one_of("dataset", self.dataset, DATASETS)
        _one_of("augment", self.augment, AUGMENTATIONS)
        _one_of("optimizer", self.optimizer, OPTIMIZERS)
        _one_of("schedule", self.schedule, SCHEDULES)
        _one_of("dtype", self.dtype, DTYPES)
        for name in ("epochs", "batch_size", "accumulate", "log_every"):
            arguments.positive(OWNER, name, getattr(self, name))
        for name in ("num_classes", "resolution", "limit_steps"):
            if getattr(self, name) is not None:
                arguments.positive(OWNER, name, getattr(self, name))
        for name in ("momentum", "label_smoothing", "ema_decay"):
            arguments.probability(OWNER, name, getattr(self, name))
        for name in ("warmup_epochs", "mixup"):
            _not_negative(name, getattr(self, name))
        if self.weight_decay is not None:
            _not_negative("weight_decay", self.weight_decay)
        if self.lr is not None:
            arguments.ratio(OWNER, "lr", self.lr)
        for name in ("fraction", "layer_decay"):
            if arguments.ratio(OWNER, name, getattr(self, name)) > 1:
                raise ValueError(
                    f"{OWNER}: {name} is {getattr(self, name)!r}, a number in (0, 1] is accepted"
                )
        arguments.ratio(OWNER, "decay_rate", self.decay_rate)
        arguments.ratio(OWNER, "decay_epochs", self.decay_epochs)
        _integer("workers", self.workers, 2**15)
        _integer("seed", self.seed, MAX_SEED)
        if self.warmup_epochs > self.epochs:
            raise ValueError(
                f"{OWNER}: warmup_epochs is {self.warmup_epochs!r}, "
                f"at most epochs ({self.epochs}) is accepted"
            )
        if self.nesterov and (self.optimizer != "sgd" or not self.momentum):
            raise ValueError(
                f"{OWNER}: nesterov is accepted with optimizer 'sgd' and momentum above 0, "
                f"not with {self.optimizer!r} and {self.momentum!r}"
            )
        if self.mixup and self.batch_size == 1:
            raise ValueError(f"{OWNER}: batch_size is 1, mixup needs at least 2")
        if self.resume and self.weights is not None:
            raise ValueError(
                f"{OWNER}: weights is {self.weights!r}, none are accepted with resume, "
                "which has the run's own"
            )

    def multipliers(self) -> Multipliers | None:
        """What ``phi`` makes of depth, width and resolution; None without it."""
        if self.phi is None:
            return None
        return self.scaling().at(self.phi)

    def scaling(self) -> CompoundScaling:
        """The coefficients of ``phi``."""
        if self.coefficients is None:
            return CompoundScaling()
        if not isinstance(self.coefficients, tuple) or len(self.coefficients) != 3:
            raise ValueError(
                f"{OWNER}: coefficients are {self.coefficients!r}, "
                "a tuple of α, β and γ is accepted"
            )
        return CompoundScaling(*self.coefficients)


def _text(name: str, value: Any) -> None:
    if not isinstance(value, str) or not value:
        raise ValueError(f"{OWNER}: {name} is {value!r}, a non-empty string is accepted")


def _one_of(name: str, value: Any, accepted: tuple[str, ...]) -> None:
    if value not in accepted:
        raise ValueError(f"{OWNER}: {name} is {value!r}, one of {', '.join(accepted)} is accepted")


def _not_negative(name: str, value: Any) -> None:
    valid = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not valid or not math.isfinite(value) or value < 0:
        raise ValueError(f"{OWNER}: {name} is {value!r}, a number of at least 0 is accepted")


def _integer(name: str, value: Any, maximum: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= maximum:
        raise ValueError(f"{OWNER}: {name} is {value!r}, an integer in 0 to {maximum} is accepted")
