"""Grid search for the coefficients of compound scaling (Tan & Le, 2019, section 3.3, step 1).

φ is fixed at 1, and (α, β, γ) with α · β² · γ² ≈ 2 are tried by training each a little: successive
halving gives more training to those that do well. The study is Optuna's, kept in an SQLite file,
so that a search can be interrupted and goes on where it was.

How a candidate is trained is up to the caller: a function of the coefficients and of a budget.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from effkernels.modules import arguments

from .scaling import CompoundScaling

if TYPE_CHECKING:
    import optuna

Evaluate = Callable[[CompoundScaling, int], float]

STUDY = "compound scaling"
TARGET, TOLERANCE = 2.0, 0.1  # of α · β² · γ²; the paper's own coefficients have 1.92
_SETTINGS = "settings"  # of the study that is continued


@dataclass(frozen=True)
class Trial:
    """What a search found about a candidate."""

    scaling: CompoundScaling
    accuracy: float  # with the largest budget that it got
    budget: int
    dropped: bool  # before it got the whole budget


def candidates(step: float = 0.05, tolerance: float = TOLERANCE) -> list[CompoundScaling]:
    """Coefficients of at least 1, in multiples of ``step``, with α · β² · γ² within ``tolerance``
    of 2.

    Raises:
        ValueError: if ``step`` or ``tolerance`` is no positive number, or there are none.
    """
    arguments.ratio("candidates", "step", step)
    arguments.ratio("candidates", "tolerance", tolerance)
    most = math.floor((TARGET + tolerance - 1) / step)
    values = [round(1 + index * step, 9) for index in range(most + 1)]
    found = [
        CompoundScaling(*triple)
        for triple in product(values, repeat=3)
        if abs(triple[0] * triple[1] ** 2 * triple[2] ** 2 - TARGET) <= tolerance
    ]
    if not found:
        raise ValueError(
            f"candidates: step is {step!r} and tolerance {tolerance!r}: no coefficients have a "
            f"product within {tolerance:g} of {TARGET:g}"
        )
    return found


def grid_search(
    evaluate: Evaluate,
    study: str | os.PathLike[str],
    grid: Sequence[CompoundScaling] | None = None,
    *,
    least_budget: int = 1,
    reduction: int = 3,
    rungs: int = 3,
) -> list[Trial]:
    """Try every candidate of ``grid``, best first in the result.

    Each candidate gets ``least_budget``, then ``reduction`` times as much and so on, ``rungs``
    times; after each it goes on only if it is among the best 1 / ``reduction`` of those that got
    as far until then (asynchronous successive halving, Li et al., 2020).

    Args:
        evaluate: trains a candidate with φ = 1 and gives its accuracy, higher is better. The budget
            is in the caller's unit, epochs for instance, and counts from the start: a function
            that keeps what it trained may go on from there.
        study: an SQLite file. One that is there is continued: candidates that were finished are
            not tried again, one that was interrupted is tried from its first budget.
        grid: None for :func:`candidates`.
        least_budget, reduction, rungs: of successive halving.

    Raises:
        ValueError: naming the argument, what came and what is accepted; if the study in the file
            is another one, or ``evaluate`` gives no finite number.
        ModuleNotFoundError: without Optuna (``pip install 'effkernels[search]'``).
    """
    for name, value in (("least_budget", least_budget), ("rungs", rungs)):
        arguments.positive("grid_search", name, value)
    if arguments.positive("grid_search", "reduction", reduction) < 2:
        raise ValueError("grid_search: reduction is 1, an integer of at least 2 is accepted")
    grid = candidates() if grid is None else list(grid)
    if not grid or len(set(grid)) != len(grid):
        raise ValueError("grid_search: grid is empty or has a candidate twice")
    path = Path(study).absolute()
    if not path.parent.is_dir():
        raise ValueError(f"grid_search: study is {str(study)!r}, whose folder does not exist")
    budgets = [least_budget * reduction**rung for rung in range(rungs)]
    settings = {"grid": [list(asdict(scaling).values()) for scaling in grid], "budgets": budgets}
    found = _open(path, settings, least_budget, reduction)

    def objective(trial: optuna.Trial) -> float:
        import optuna

        names = ("alpha", "beta", "gamma")
        scaling = CompoundScaling(*(trial.suggest_float(name, 1.0, 1e3) for name in names))
        accuracy = -math.inf
        for budget in budgets:
            accuracy = float(evaluate(scaling, budget))
            if not math.isfinite(accuracy):
                raise ValueError(f"grid_search: evaluate gave {accuracy} for {scaling}")
            trial.report(accuracy, budget)
            if budget != budgets[-1] and trial.should_prune():
                raise optuna.TrialPruned
        return accuracy

    waiting = _enqueue(found, grid)
    if waiting:
        found.optimize(objective, n_trials=waiting)
    return _trials(found, budgets)


def _open(path: Path, settings: dict[str, Any], least: int, reduction: int) -> optuna.Study:
    try:
        import optuna
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"grid_search needs Optuna: pip install 'effkernels[search]' ({error})"
        ) from None
    from sqlalchemy.exc import DatabaseError

    pruner = optuna.pruners.SuccessiveHalvingPruner(least, reduction)
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        study = optuna.create_study(
            storage=f"sqlite:///{path}",
            pruner=pruner,
            study_name=STUDY,
            direction="maximize",
            load_if_exists=True,
        )
    except DatabaseError as error:
        raise ValueError(f"grid_search: {path} is no study: {error.orig}") from None
    finally:
        optuna.logging.set_verbosity(verbosity)
    known = study.user_attrs.get(_SETTINGS)
    if known is None:
        study.set_user_attr(_SETTINGS, settings)
    elif known != settings:
        raise ValueError(
            f"grid_search: study is {str(path)!r}, a search of {len(known['grid'])} candidates "
            f"with budgets {known['budgets']}; it is continued with the same ones only"
        )
    return study


def _enqueue(study: optuna.Study, grid: Sequence[CompoundScaling]) -> int:
    """Queue what is not finished; returns how many trials wait."""
    from optuna.trial import TrialState

    done = []
    for trial in study.get_trials(deepcopy=False):
        if trial.state == TrialState.RUNNING:  # interrupted: nobody else runs this study
            study.tell(trial.number, state=TrialState.FAIL)
        elif trial.state == TrialState.WAITING:
            done.append(trial.system_attrs["fixed_params"])
        elif trial.state in (TrialState.COMPLETE, TrialState.PRUNED):
            done.append(trial.params)
    for scaling in grid:
        if asdict(scaling) not in done:
            study.enqueue_trial(asdict(scaling))
    return len(study.get_trials(deepcopy=False, states=(TrialState.WAITING,)))


def _trials(study: optuna.Study, budgets: Sequence[int]) -> list[Trial]:
    from optuna.trial import TrialState

    finished = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))
    trials = []
    for trial in finished:
        budget = max(trial.intermediate_values)
        accuracy = trial.intermediate_values[budget]
        dropped = budget != budgets[-1]
        trials.append(Trial(CompoundScaling(**trial.params), accuracy, budget, dropped))
    return sorted(trials, key=lambda trial: (trial.budget, trial.accuracy), reverse=True)


def plot(trials: Sequence[Trial], path: str | os.PathLike[str]) -> None:
    """Accuracy against each coefficient; the size of a point tells its budget.

    Raises:
        ValueError: if ``trials`` is empty.
        ModuleNotFoundError: without matplotlib.
    """
    from matplotlib.figure import Figure

    if not trials:
        raise ValueError("plot: trials is empty, at least one is accepted")
    figure = Figure(figsize=(9.0, 3.5), layout="constrained")
    largest = max(trial.budget for trial in trials)
    for axes, name, letter in zip(
        figure.subplots(1, 3, sharey=True), ("alpha", "beta", "gamma"), "αβγ", strict=True
    ):
        for dropped, label in ((True, "dropped"), (False, "whole budget")):
            shown = [trial for trial in trials if trial.dropped == dropped]
            axes.scatter(
                [getattr(trial.scaling, name) for trial in shown],
                [trial.accuracy for trial in shown],
                s=[80 * trial.budget / largest for trial in shown],
                alpha=0.6,
                label=label,
            )
        axes.set_xlabel(letter)
        axes.grid(alpha=0.3)
        if name == "alpha":
            axes.set_ylabel("accuracy")
            axes.legend()
    target = Path(path)
    partial = target.with_name(target.name + ".part")
    try:
        figure.savefig(partial, format=target.suffix.lstrip(".") or "png", dpi=120)
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
