"""``python -m effkernels.models.training.compare``: runs' curves in one picture."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from effkernels.models.training.checkpoint import write_atomically
from effkernels.models.training.history import History
from effkernels.models.training.run import HISTORY

__all__ = ["load_history", "main", "plot_together"]


def load_history(run: Path) -> History:
    """The history of a run's folder.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if the file is another one.
    """
    path = run / HISTORY
    if not path.is_file():
        raise FileNotFoundError(f"compare: {path} does not exist, a run's folder is accepted")
    try:
        saved = json.loads(path.read_text())
        history = History(saved["config"], saved["environment"], finished=saved["finished"])
        history.restore(saved)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"compare: {path} is no history of a run: {error!r}") from error
    return history


def plot_together(runs: Sequence[Path], path: Path) -> None:
    """Draw losses over steps and accuracies over epochs, a colour for each run.

    Args:
        runs: their folders, whose names are the labels.
        path: of the picture, a PNG.

    Raises:
        FileNotFoundError, ValueError: as :func:`load_history`; nothing is written then.
        ImportError: without matplotlib.
    """
    from matplotlib.figure import Figure  # without pyplot: no display, no global state

    histories = [(run.name, load_history(run)) for run in runs]
    figure = Figure(figsize=(9.0, 3.6), layout="constrained")
    losses, accuracies = figure.subplots(1, 2)
    for name, history in histories:
        losses.plot([r.step for r in history.steps], [r.loss for r in history.steps], label=name)
        epochs = [record.epoch for record in history.epochs]
        values = [record.accuracy for record in history.epochs]
        seconds = sum(record.train_seconds for record in history.epochs)
        accuracies.plot(epochs, values, marker=".", label=f"{name}, {seconds:.0f} s of training")
    losses.set(xlabel="step", ylabel="training loss")
    accuracies.set(xlabel="epoch", ylabel="top-1 accuracy")
    accuracies.xaxis.get_major_locator().set_params(integer=True)
    for axes in (losses, accuracies):
        axes.grid(alpha=0.3)
        axes.legend()
    titles = {f"{h.config['model']} on {h.config['dataset']}" for _, h in histories}
    figure.suptitle(", ".join(sorted(titles)), fontsize=10)

    def draw(file: IO[bytes]) -> None:
        figure.savefig(file, format="png", dpi=120)

    write_atomically(path, draw)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, or 2 if something is not accepted."""
    parser = argparse.ArgumentParser(
        prog="python -m effkernels.models.training.compare",
        description="Draw the curves of several runs in one picture.",
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.png")
    words = parser.parse_args(arguments)
    try:
        plot_together(words.runs, words.out)
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
