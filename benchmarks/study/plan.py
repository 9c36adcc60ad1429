"""Which training runs the study has, the most important ones first."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from effkernels.models import list_models
from effkernels.models.training import TrainConfig

from effkernels.classify import packaged_weights
from effkernels.modules import arguments

OWNER = "study"  # in errors
# The parts of the study. A run can belong to several.
GROUPS = ("optimizers", "lr", "momentum", "networks", "phi", "transfer")
BASE = "resnet18"
NETWORKS = (BASE, "resnet34", "resnet50")
PHIS = (0, 1, 2)
# Adam's and SGD's usual ones at 128 pictures a step are among them.
LEARNING_RATES = {"adam": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2), "sgd": (1e-3, 1e-2, 5e-2, 2e-1)}
USUAL = {"adam": 1e-3, "sgd": 5e-2}
MOMENTUM, MOMENTA = 0.9, (0.0, 0.5, 0.9, 0.99)
SIZED_WITH = "adam"  # the optimizer of the comparisons between networks
TRANSFERRED, TRANSFER_LR, LAYER_DECAY = "efficientnet_lite0", 1e-3, 0.7


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the runs have in common.

    Args:
        dataset, data, batch_size, workers, device, accelerate, seed: as for ``TrainConfig``.
        data_name: what the report calls the pictures; None for the data set's own name.
        epochs: of the optimizer comparison, with all pictures.
        sweep_epochs, fraction: of the sweeps, and the part of the training pictures they see.
        models: networks of the comparison by size.
        transfer_epochs, transfer_fraction, transfer_resolution: of the fine-tuned network.

    Raises:
        ValueError: naming what is not accepted.
    """

    dataset: str
    data: str
    data_name: str | None = None
    epochs: int = 25
    sweep_epochs: int = 25
    fraction: float = 1.0
    models: tuple[str, ...] = NETWORKS
    transfer_epochs: int = 10
    transfer_fraction: float = 0.05
    transfer_resolution: int = 64
    batch_size: int = 128
    workers: int = 0
    device: str = "auto"
    accelerate: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "sweep_epochs", "transfer_epochs"):
            arguments.positive(OWNER, name, getattr(self, name))
        if not self.models:
            raise ValueError(f"{OWNER}: models is empty, at least one is accepted")
        for model in self.models:
            if model not in list_models():
                raise ValueError(
                    f"{OWNER}: models has {model!r}, of effkernels.models.list_models() is accepted"
                )

    @property
    def pictures(self) -> str:
        """The data set's name for a reader."""
        return self.data_name or self.dataset

    def to_dict(self) -> dict[str, Any]:
        """For JSON; where the pictures lie is this machine's business."""
        return asdict(self) | {"data": Path(self.data).name, "models": list(self.models)}

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> Settings:
        """What :meth:`to_dict` gave.

        Raises:
            ValueError: if it is something else.
        """
        names = {field.name for field in fields(cls)}
        if set(saved) != names:
            odd = sorted(set(saved) ^ names)[0]
            raise ValueError(f"{OWNER}: settings are not those of a study: {odd!r}")
        return cls(**{**saved, "models": tuple(saved["models"])})


@dataclass(frozen=True)
class Job:
    """A training run: a folder of that name, and arguments of ``TrainConfig``."""

    name: str
    groups: tuple[str, ...]
    options: dict[str, Any]
    pretrained: bool = False

    def config(self, settings: Settings, out: Path) -> TrainConfig:
        """The run's arguments.

        Raises:
            ValueError: for what ``TrainConfig`` does not accept; if the weights are not installed.
        """
        weights = packaged_weights(TRANSFERRED) if self.pretrained else None
        return TrainConfig(
            dataset=settings.dataset,
            data=settings.data,
            out=str(out / self.name),
            batch_size=settings.batch_size,
            workers=settings.workers,
            device=settings.device,
            accelerate=settings.accelerate,
            seed=settings.seed,
            weights=weights,
            # As plain as the lab's. And a run with a constant learning rate can be prolonged.
            schedule="constant",
            label_smoothing=0.0,
            **self.options,
        )


def plan(settings: Settings) -> list[Job]:
    """The jobs, in the order in which they run; what two parts have in common is there once."""
    jobs: dict[str, Job] = {}

    def add(name: str, group: str, pretrained: bool = False, **options: Any) -> None:
        known = next((job for job in jobs.values() if job.options == options), None)
        if known is None or pretrained or known.pretrained:
            jobs[name] = Job(name, (group,), options, pretrained)
        elif group not in known.groups:
            jobs[known.name] = replace(known, groups=(*known.groups, group))

    whole: dict[str, Any] = {"model": BASE, "epochs": settings.epochs}
    sweep: dict[str, Any] = {"epochs": settings.sweep_epochs, "fraction": settings.fraction}
    if sweep == {"epochs": settings.epochs, "fraction": 1.0}:
        del sweep["fraction"]  # its default, as above: the same runs

    for optimizer, lr in USUAL.items():
        add(f"optimizer-{optimizer}", "optimizers", **whole, **_optimizer(optimizer, lr))
    for optimizer, rates in LEARNING_RATES.items():
        for lr in (USUAL[optimizer], *(rate for rate in rates if rate != USUAL[optimizer])):
            options = _optimizer(optimizer, lr)
            add(f"lr-{optimizer}-{lr:g}", "lr", model=BASE, **sweep, **options)
    sized = _optimizer(SIZED_WITH, USUAL[SIZED_WITH])
    for phi in PHIS:
        scaled: dict[str, Any] = {"phi": float(phi)} if phi else {}
        add(f"phi-{phi}", "phi", model=BASE, **scaled, **sweep, **sized)
    for momentum in MOMENTA:
        options = _optimizer("sgd", USUAL["sgd"], momentum)
        add(f"momentum-{momentum:g}", "momentum", model=BASE, **sweep, **options)
    for model in settings.models:
        add(f"network-{model}", "networks", model=model, **sweep, **sized)
    transfer: dict[str, Any] = {
        "model": TRANSFERRED,
        "epochs": settings.transfer_epochs,
        "fraction": settings.transfer_fraction,
        "resolution": settings.transfer_resolution,
        **_optimizer("adam", TRANSFER_LR),
    }
    gentle: dict[str, Any] = {"layer_decay": LAYER_DECAY}
    add("transfer-from-scratch", "transfer", **transfer)
    add("transfer-fine-tuned", "transfer", True, **transfer)
    add("transfer-layer-decay", "transfer", True, **transfer, **gentle)
    add("transfer-frozen-bn", "transfer", True, **transfer, **gentle, freeze_bn=True)
    return list(jobs.values())


def _optimizer(name: str, lr: float, momentum: float = MOMENTUM) -> dict[str, Any]:
    options: dict[str, Any] = {"optimizer": name, "lr": lr}
    if name == "sgd":
        options["momentum"] = momentum
    return options


def chosen(jobs: list[Job], only: list[str]) -> list[Job]:
    """Those whose name, or one of whose groups, is in ``only``; all if it is empty.

    Raises:
        ValueError: for a word that is neither.
    """
    known = {job.name for job in jobs} | set(GROUPS)
    for word in only:
        if word not in known:
            raise ValueError(
                f"{OWNER}: only has {word!r}; {', '.join(GROUPS)} or a job of --dry-run is accepted"
            )
    return [job for job in jobs if not only or {job.name, *job.groups} & set(only)]
