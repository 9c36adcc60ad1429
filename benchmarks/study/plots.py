"""Pictures of the study's results."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import IO

from effkernels.models.training.checkpoint import write_atomically
from matplotlib.axes import Axes
from matplotlib.figure import Figure  # without pyplot: no display, no global state

from .runs import JobResult

SIZE = (9.0, 3.6)  # inches, two pictures side by side


def curves(results: Sequence[tuple[str, JobResult]], path: Path) -> None:
    """Training loss and test accuracy after each epoch, a line for each labelled result."""
    figure = Figure(figsize=SIZE, layout="constrained")
    losses, accuracies = figure.subplots(1, 2)
    for label, result in results:
        epochs = [epoch["epoch"] for epoch in result.epochs]
        for axes, name in ((losses, "train_loss"), (accuracies, "val_accuracy")):
            axes.plot(epochs, [epoch[name] for epoch in result.epochs], marker=".", label=label)
    losses.set_ylabel("cross entropy, training")
    accuracies.set_ylabel("accuracy, test")
    for axes in (losses, accuracies):
        axes.set_xlabel("epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
    accuracies.legend(fontsize=8)
    _save(figure, path)


def sweep(results: Iterable[tuple[str, float, float]], label: str, log: bool, path: Path) -> None:
    """Accuracy against a number.

    Args:
        results: line, number, accuracy.
        label: what the number is.
        log: whether its axis is logarithmic.
        path: of the picture.
    """
    figure = Figure(figsize=(SIZE[0] / 2, SIZE[1]), layout="constrained")
    axes = figure.subplots()
    _lines(axes, results)
    axes.set(xlabel=label, ylabel="accuracy, test", xscale="log" if log else "linear")
    _save(figure, path)


def sizes(results: Sequence[tuple[str, JobResult]], path: Path) -> None:
    """Accuracy against parameters and against FLOPs, a labelled point for each result."""
    figure = Figure(figsize=SIZE, layout="constrained")
    for axes, name in zip(figure.subplots(1, 2, sharey=True), ("parameters", "FLOPs"), strict=True):
        for label, result in results:
            if result.accuracy is None:
                continue
            size = result.parameters / 1e6 if name == "parameters" else 2 * result.macs / 1e9
            axes.plot(size, result.accuracy, "o")
            axes.annotate(
                label, (size, result.accuracy), (4, 4), textcoords="offset points", fontsize=7
            )
        axes.set_xlabel("parameters, M" if name == "parameters" else "FLOPs of a picture, G")
        axes.margins(0.2)
        if name == "parameters":
            axes.set_ylabel("accuracy, test")
    _save(figure, path)


def _lines(axes: Axes, results: Iterable[tuple[str, float, float]]) -> None:
    found: dict[str, list[tuple[float, float]]] = {}
    for line, number, accuracy in results:
        found.setdefault(line, []).append((number, accuracy))
    for line, points in found.items():
        numbers, accuracies = zip(*sorted(points), strict=True)
        axes.plot(numbers, accuracies, marker="o", label=line)
    if found:
        axes.legend(fontsize=8)


def _save(figure: Figure, path: Path) -> None:
    for axes in figure.axes:
        axes.grid(alpha=0.3)

    def draw(file: IO[bytes]) -> None:
        # Without the version of matplotlib, the same results make the same file.
        figure.savefig(file, format="png", dpi=100, metadata={"Software": None})

    write_atomically(path, draw)
