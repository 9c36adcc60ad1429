"""Runs jobs one after the other and keeps what came of each as a small JSON file.

A job's folder is a training run's own: one that was interrupted goes on where it was. Its result is
written when it is done, so a result is whole or not there.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from effkernels.models.summary import summary
from effkernels.models.training import (
    History,
    NonFiniteLoss,
    TrainConfig,
    data,
    distributed,
    train,
)
from effkernels.models.training.checkpoint import write_atomically
from effkernels.models.training.loop import build_network, environment
from effkernels.models.training.run import CHECKPOINT, HISTORY
from tabulate import tabulate

from ..machine import header
from .plan import OWNER, Job, Settings

SETTINGS = "study.json"
PATHS = ("data", "weights")  # of a run's arguments; a result has the files' names
LEFT_OUT = ("out", "resume")


@dataclass(frozen=True)
class JobResult:
    """A job that is done.

    Attributes:
        job: its name.
        groups: the parts of the study that it belongs to.
        config: the run's arguments.
        environment: what the run itself notes: device, threads, versions.
        machine: the processor and this checkout's commit.
        parameters: of the network.
        macs: multiply-adds for one picture.
        resolution: side of the network's input in pixels.
        train_pictures, test_pictures: how many there were.
        epochs: as ``EpochRecord`` has them.
        diverged: why there are fewer epochs than asked for; None if there are not.
    """

    job: str
    groups: list[str]
    config: dict[str, Any]
    environment: dict[str, Any]
    machine: dict[str, Any]
    parameters: int
    macs: int
    resolution: int
    train_pictures: int
    test_pictures: int
    epochs: list[dict[str, Any]]
    diverged: str | None = None

    @property
    def accuracy(self) -> float | None:
        """On the test pictures after the last epoch; None if the loss became infinite."""
        return None if self.diverged else float(self.epochs[-1]["val_accuracy"])

    @property
    def seconds(self) -> float:
        """Of training and evaluation."""
        return sum(epoch["train_seconds"] + epoch["val_seconds"] for epoch in self.epochs)


def run(
    jobs: Sequence[Job],
    settings: Settings,
    out: Path,
    results: Path,
    say: Callable[[str], object] = print,
) -> None:
    """Run those of ``jobs`` that have no result yet.

    Args:
        jobs: of ``plan(settings)``.
        settings: what they have in common; more epochs than last time are accepted.
        out: a folder with a folder for each run.
        results: a folder with a file for each result, and the settings.
        say: is given lines for the user.

    Raises:
        ValueError: naming what is not accepted, before a job is started: settings of another study
            in ``results``, a data set or weights that cannot be read, a run that is not the job's.
        OSError: if a folder cannot be written.
        Interrupted: after the run that was going on has saved.
    """
    configs = [job.config(settings, out) for job in jobs]
    _check_settings(settings, results)
    for config in configs[:1]:
        data.open_source(config)  # an error here leaves nothing behind
    machine = header()  # now, as it is this checkout's code that runs, whatever is edited meanwhile
    results.mkdir(parents=True, exist_ok=True)
    _write(results / SETTINGS, settings.to_dict())
    for number, (job, config) in enumerate(zip(jobs, configs, strict=True), 1):
        path = results / f"{job.name}.json"
        before = read_result(path) if path.exists() else None
        if before is not None and is_done(before, job):
            if before.groups != list(job.groups):
                _write(path, asdict(replace(before, groups=list(job.groups))))
            continue
        say(f"{job.name}, job {number} of {len(jobs)}")
        history, diverged = _train(config, say)
        _write(path, asdict(_result(job, config, history, diverged, machine)))


def _train(config: TrainConfig, say: Callable[[str], object]) -> tuple[History, str | None]:
    """The course of the run, from its beginning; and why it stopped early, if it did."""
    folder = Path(config.out)
    if (folder / CHECKPOINT).exists():
        config = replace(config, resume=True, weights=None)
    try:
        return train(config, say), None
    except NonFiniteLoss as error:
        say(str(error))
        reason = f"the loss is not finite at step {error.step}"
    ranks = distributed.ranks_from_environment()
    device = distributed.choose_device(config.device, ranks)
    history = History(asdict(config), environment(device, ranks))
    if (folder / HISTORY).exists():  # else it was in the first epoch
        history.restore(json.loads((folder / HISTORY).read_text()))
    return history, reason


def _result(
    job: Job,
    config: TrainConfig,
    history: History,
    diverged: str | None,
    machine: dict[str, Any],
) -> JobResult:
    source = data.open_source(config)
    with torch.device("meta"):
        network = build_network(config, history.config["num_classes"] or source.classes)
    expected: Any = network.data_config
    resolution = data.input_resolution(config, source, expected)
    counted = summary(network, (3, resolution, resolution))
    arguments = {k: v for k, v in history.config.items() if k not in LEFT_OUT}
    # of a run that was resumed, what it began with
    arguments |= {
        name: None if value is None else Path(value).name
        for name, value in (("data", config.data), ("weights", config.weights))
    }
    return JobResult(
        job.name,
        list(job.groups),
        arguments,
        history.environment,
        {name: machine[name] for name in ("cpu", "commit", "system", "date")},
        counted.parameters,
        counted.macs,
        resolution,
        len(data.training_pictures(config, source, expected)),
        len(source.val),
        [asdict(epoch) for epoch in history.epochs],
        diverged,
    )


def is_done(result: JobResult, job: Job) -> bool:
    """Whether the result is the job's, to its last epoch.

    Raises:
        ValueError: if it is that of other arguments.
    """
    for name, wanted in job.options.items():
        if name != "epochs" and result.config.get(name) != wanted:
            raise ValueError(
                f"{OWNER}: the result of {job.name} has {name} {result.config.get(name)!r}, "
                f"the job {wanted!r}; put results of other settings into a folder of their own"
            )
    return result.diverged is not None or len(result.epochs) >= job.options["epochs"]


def read_result(path: Path) -> JobResult:
    """A job's result.

    Raises:
        ValueError: if the file is something else.
    """
    try:
        return JobResult(**json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{OWNER}: {path} is damaged or no result: {error}") from error


def read_settings(results: Path) -> Settings:
    """What the runs in a results folder have in common.

    Raises:
        FileNotFoundError: if there are none.
        ValueError: if the file is something else.
    """
    path = results / SETTINGS
    if not path.is_file():
        raise FileNotFoundError(f"{OWNER}: results: {path} does not exist, there is no study")
    try:
        return Settings.from_dict(json.loads(path.read_text()))
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{OWNER}: results: {path} is damaged: {error}") from error


def _check_settings(settings: Settings, results: Path) -> None:
    if not (results / SETTINGS).exists():
        return
    before, now = read_settings(results).to_dict(), settings.to_dict()
    # These change what is run, or on what, but not what a run comes to, up to rounding.
    free = ("models", "workers", "device", "accelerate", "data_name")
    for name in now:
        grown = name.endswith("epochs") and now[name] >= before[name]
        if now[name] != before[name] and name not in free and not grown:
            raise ValueError(
                f"{OWNER}: {name} is {now[name]!r}, but {before[name]!r} in {results}; other "
                "settings need a folder of their own"
            )


def _write(path: Path, content: dict[str, Any]) -> None:
    text = json.dumps(content, indent=1) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def listing(jobs: Sequence[Job], settings: Settings, out: Path, results: Path) -> str:
    """A table of the jobs: their parts of the study, arguments, and how far they are.

    Raises:
        ValueError: as for :func:`run`.
    """
    rows = []
    _check_settings(settings, results)
    for job in jobs:
        job.config(settings, out)
        path = results / f"{job.name}.json"
        state = "interrupted" if (out / job.name / CHECKPOINT).exists() else "to do"
        if path.exists() and is_done(read_result(path), job):
            state = "done"
        words = " ".join(f"{name}={value}" for name, value in job.options.items())
        rows.append([job.name, ", ".join(job.groups), words, state])
    return tabulate(rows, ["job", "parts", "arguments", ""], "simple", disable_numparse=True)
