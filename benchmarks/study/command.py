"""``python -m benchmarks study | study-report | search``: their arguments."""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields
from pathlib import Path

from effkernels.models.search import TOLERANCE, candidates
from effkernels.models.training import Interrupted
from effkernels.models.training.config import DATASETS, OPTIMIZERS

from .plan import BASE, GROUPS, NETWORKS, Settings, chosen, plan

INTERRUPTED = 130  # exit status, as a shell gives it


def add_parsers(commands: argparse._SubParsersAction) -> None:
    """The two commands, among the others."""
    text = "accuracies: optimizers, learning rates, momentum, size, fine-tuning"
    command = commands.add_parser("study", help=text, description=text)
    _common(command)
    command.add_argument("--data-name", metavar="NAME", help="of the pictures, in the report")
    command.add_argument("--epochs", type=int, default=25, metavar="N", help="(default: 25)")
    command.add_argument(
        "--sweep-epochs", type=int, metavar="N", help="of the sweeps (default: --epochs)"
    )
    command.add_argument(
        "--fraction",
        type=float,
        default=1.0,
        metavar="F",
        help="part of the training pictures that the sweeps see (default: 1)",
    )
    command.add_argument(
        "--models",
        nargs="+",
        default=list(NETWORKS),
        metavar="NAME",
        help=f"networks compared by size (default: {' '.join(NETWORKS)})",
    )
    command.add_argument("--transfer-epochs", type=int, default=10, metavar="N")
    command.add_argument("--transfer-fraction", type=float, default=0.05, metavar="F")
    command.add_argument("--transfer-resolution", type=int, default=64, metavar="PIXELS")
    command.add_argument(
        "--results",
        type=Path,
        metavar="FOLDER",
        help="small JSON files, one per job (default: OUT/results)",
    )
    command.add_argument(
        "--only",
        nargs="+",
        default=[],
        metavar="GROUP|JOB",
        help=f"of {', '.join(GROUPS)}, and jobs that --dry-run lists",
    )
    command.add_argument("--dry-run", action="store_true", help="list the jobs, and which are done")
    command.set_defaults(run=_study)

    text = "the report and plots of a study's results, finished or not"
    command = commands.add_parser("study-report", help=text, description=text)
    command.add_argument("results", type=Path, metavar="FOLDER", help="--results of the study")
    command.add_argument("--out", type=Path, required=True, metavar="FILE.md")
    command.set_defaults(run=_report)

    text = "the grid search for α, β and γ: every candidate trains a little, the best ones more"
    command = commands.add_parser("search", help=text, description=text)
    _common(command)
    command.add_argument("--base", default=BASE, metavar="NAME", help="(default: %(default)s)")
    command.add_argument(
        "--step", type=float, default=0.1, metavar="S", help="of the grid (default: %(default)s)"
    )
    command.add_argument(
        "--tolerance",
        type=float,
        default=TOLERANCE,
        metavar="T",
        help="how far α·β²·γ² may be from 2 (default: %(default)s)",
    )
    command.add_argument(
        "--fraction", type=float, default=0.2, metavar="F", help="part of the training pictures"
    )
    command.add_argument("--optimizer", choices=OPTIMIZERS, default="adam")
    command.add_argument("--lr", type=float, metavar="LR", help="default: its usual one")
    command.add_argument("--least-epochs", type=int, default=1, metavar="N", help="first budget")
    command.add_argument("--reduction", type=int, default=3, metavar="R", help="budgets grow by it")
    command.add_argument("--rungs", type=int, default=2, metavar="N", help="how many budgets")
    command.set_defaults(run=_search)


def _common(command: argparse.ArgumentParser) -> None:
    command.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="of the runs")
    command.add_argument("--dataset", required=True, choices=DATASETS)
    command.add_argument("--data", required=True, metavar="PATH", help="its folder, or .npz file")
    command.add_argument("--batch-size", type=int, default=128, metavar="N")
    command.add_argument("--workers", type=int, default=0, metavar="N", help="that load pictures")
    command.add_argument("--device", default="auto", metavar="D", help="auto, cpu, cuda or cuda:N")
    command.add_argument("--accelerate", action=argparse.BooleanOptionalAction, default=True)
    command.add_argument("--seed", type=int, default=0, metavar="N")


def _study(parsed: argparse.Namespace) -> int:
    from . import runs

    settings = Settings(
        dataset=parsed.dataset,
        data=parsed.data,
        data_name=parsed.data_name,
        epochs=parsed.epochs,
        sweep_epochs=parsed.sweep_epochs or parsed.epochs,
        fraction=parsed.fraction,
        models=tuple(dict.fromkeys(parsed.models)),
        transfer_epochs=parsed.transfer_epochs,
        transfer_fraction=parsed.transfer_fraction,
        transfer_resolution=parsed.transfer_resolution,
        batch_size=parsed.batch_size,
        workers=parsed.workers,
        device=parsed.device,
        accelerate=parsed.accelerate,
        seed=parsed.seed,
    )
    jobs = chosen(plan(settings), parsed.only)
    results = parsed.results or parsed.out / "results"
    if parsed.dry_run:
        print(runs.listing(jobs, settings, parsed.out, results))
        return 0
    try:
        runs.run(jobs, settings, parsed.out, results, _say)
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        return INTERRUPTED
    return 0


def _say(line: str) -> None:
    print(line, flush=True)


def _search(parsed: argparse.Namespace) -> int:
    from . import search

    grid = candidates(parsed.step, parsed.tolerance)
    names = [field.name for field in fields(search.Proxy)]
    proxy = search.Proxy(**{name: getattr(parsed, name) for name in names})
    budgets = {
        "least_budget": parsed.least_epochs,
        "reduction": parsed.reduction,
        "rungs": parsed.rungs,
    }
    try:
        trials = search.run(proxy, grid, **budgets, say=_say)
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        return INTERRUPTED
    print(f"\n{search.page(proxy, trials)}")
    return 0


def _report(parsed: argparse.Namespace) -> int:
    from . import report

    report.write(parsed.results, parsed.out)
    return 0
