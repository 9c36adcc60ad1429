"""The grid search for α, β and γ on real pictures: each candidate trains a little.

A candidate's folder is a training run's own. The budgets of successive halving are epochs, and a
candidate that gets more of them goes on from where it was, for its learning rate is constant.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from effkernels.models import CompoundScaling
from effkernels.models.search import Evaluate, Trial, grid_search, plot
from effkernels.models.summary import summary
from effkernels.models.training import NonFiniteLoss, TrainConfig, data, train
from effkernels.models.training.checkpoint import write_atomically
from effkernels.models.training.loop import build_network
from effkernels.models.training.run import CHECKPOINT, HISTORY
from tabulate import tabulate

STUDY, PAGE, PICTURE = "search.sqlite", "search.md", "search.png"
PHI = 1.0  # section 3.3, step 1


@dataclass(frozen=True, kw_only=True)
class Proxy:
    """The task on which candidates are compared.

    Args:
        base: the network that is scaled.
        out: folder for the runs, the study and the report.
        dataset, data, fraction, optimizer, lr, batch_size, workers, device, accelerate, seed: as
            for ``TrainConfig``.
    """

    base: str
    out: Path
    dataset: str
    data: str
    fraction: float
    optimizer: str
    lr: float | None
    batch_size: int
    workers: int
    device: str
    accelerate: bool
    seed: int

    def config(self, scaling: CompoundScaling, epochs: int) -> TrainConfig:
        """A candidate's run.

        Raises:
            ValueError: for what ``TrainConfig`` does not accept.
        """
        coefficients = (scaling.alpha, scaling.beta, scaling.gamma)
        folder = self.out / "-".join(f"{value:g}" for value in coefficients)
        return TrainConfig(
            model=self.base,
            phi=PHI,
            coefficients=coefficients,
            dataset=self.dataset,
            data=self.data,
            out=str(folder),
            fraction=self.fraction,
            epochs=epochs,
            optimizer=self.optimizer,
            lr=self.lr,
            batch_size=self.batch_size,
            workers=self.workers,
            device=self.device,
            accelerate=self.accelerate,
            seed=self.seed,
            schedule="constant",
            label_smoothing=0.0,
            resume=(folder / CHECKPOINT).exists(),
        )


def evaluate(proxy: Proxy, say: Callable[[str], object] = print) -> Evaluate:
    """Accuracy on the test pictures after so many epochs, for ``grid_search``."""

    def accuracy(scaling: CompoundScaling, budget: int) -> float:
        config = proxy.config(scaling, budget)
        if config.resume:
            # A search that was interrupted asks again for what is done.
            epochs = json.loads((Path(config.out) / HISTORY).read_text())["epochs"]
            if len(epochs) >= budget:
                return float(epochs[budget - 1]["val_accuracy"])
        say(f"{Path(config.out).name}, {budget} epochs")
        try:
            return train(config, say).epochs[-1].val_accuracy
        except NonFiniteLoss as error:
            say(str(error))
            return 0.0  # worse than guessing

    return accuracy


def run(
    proxy: Proxy,
    grid: list[CompoundScaling],
    *,
    least_budget: int,
    reduction: int,
    rungs: int,
    say: Callable[[str], object] = print,
) -> list[Trial]:
    """Search, and write the ranking as a page and a picture into ``proxy.out``.

    Raises:
        ValueError: naming what is not accepted, before anything is written.
        Interrupted: after the run that was going on has saved; the next call goes on there.
    """
    for scaling in grid:  # all of them, before the first one is trained
        build_network(proxy.config(scaling, least_budget), 0)
    data.open_source(proxy.config(grid[0], least_budget))
    proxy.out.mkdir(parents=True, exist_ok=True)
    trials = grid_search(
        evaluate(proxy, say),
        proxy.out / STUDY,
        grid,
        least_budget=least_budget,
        reduction=reduction,
        rungs=rungs,
    )
    plot(trials, proxy.out / PICTURE)
    text = page(proxy, trials)
    write_atomically(proxy.out / PAGE, lambda file: file.write(text.encode()))
    return trials


def page(proxy: Proxy, trials: list[Trial]) -> str:
    """The ranking with what each candidate costs, as Markdown."""
    rows = [
        (
            *(f"{value:g}" for value in (s.alpha, s.beta, s.gamma)),
            f"{s.cost:.2f}",
            *_costs(proxy, s),
            str(trial.budget),
            f"{100 * trial.accuracy:.2f}",
        )
        for trial in trials
        for s in [trial.scaling]
    ]
    head = ("α", "β", "γ", "α·β²·γ²", "input", "parameters, M", "multiply-adds, G")
    table = tabulate(rows, [*head, "epochs", "accuracy, %"], "github", disable_numparse=True)
    return (
        f"{proxy.base} at φ = 1 on {proxy.dataset} {Path(proxy.data).name}, "
        f"{proxy.fraction:.0%} of the training pictures, {proxy.optimizer}, seed {proxy.seed}. "
        f"Best first; {sum(trial.dropped for trial in trials)} of {len(trials)} candidates were "
        f"dropped before the last budget.\n\n{table}\n\n![Accuracy and coefficients]({PICTURE})\n"
    )


def _costs(proxy: Proxy, scaling: CompoundScaling) -> tuple[str, str, str]:
    config = proxy.config(scaling, 1)
    source = data.open_source(config)
    with torch.device("meta"):
        network = build_network(config, source.classes)
    expected: Any = network.data_config
    side = data.input_resolution(config, source, expected)
    counted = summary(network, (3, side, side))
    return f"{side}²", f"{counted.parameters / 1e6:.2f}", f"{counted.macs / 1e9:.4f}"
