"""A picture of every stage that has something to draw."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib

matplotlib.use("Agg")  # files only: no display is needed
import matplotlib.pyplot as plt
import numpy as np

from ..gpus import Rates
from ..plots import _save
from ..providers import CONTROL
from .models import ACCELERATE, COMPILED, EAGER, FREEZE, GRAPH, MAX_AUTOTUNE
from .report import of_floor
from .worker import Row

if TYPE_CHECKING:
    from . import StageFile

MOST_LAYERS = 40
COLOURED = (EAGER, COMPILED, MAX_AUTOTUNE, ACCELERATE, FREEZE)


def draw(stage: str, file: StageFile, out: Path, rates: Rates) -> None:
    """Write ``<stage>.png``, and for inference ``memory.png``, if there is something in them."""
    path = out / f"{stage}.png"
    if stage == "ceilings" and file.rows:
        _ceilings(file.rows, path)
    elif stage == "parity" and file.content.get("files"):
        _parity(file.content["files"], path)
    elif stage == "autotune" and file.rows:
        _autotune(file.rows, path)
    elif stage == "kernels" and file.rows:
        _kernels(file.rows, path)
    elif stage == "inference" and file.rows:
        _throughput(file.rows, path)
        _bars(file.rows, ("peak_bytes",), "peak MB of a call", 1e6, out / "memory.png")
    elif stage == "training" and file.rows:
        _training(file.rows, path)
    elif stage == "summary":
        _targets(file.content["targets"], path)


def _ceilings(rows: Sequence[Row], path: Path) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(7, 3.2))
    for axis, unit in zip(axes, ("byte", "FLOP"), strict=True):
        found = [row for row in rows if row.get("unit") == unit]
        bars = axis.bar([r["name"] for r in found], [r["per_s"] / 1e12 for r in found])
        axis.bar_label(bars, fmt="%.3g", fontsize=8)
        axis.set_ylabel(f"T{unit}/s")
    _save(figure, path)


def _parity(files: dict[str, dict[str, int]], path: Path) -> None:
    figure, axis = plt.subplots(figsize=(7, 1.2 + 0.3 * len(files)))
    left = np.zeros(len(files))
    colours = {"PASSED": "tab:green", "SKIPPED": "tab:grey", "FAILED": "tab:red", "ERROR": "black"}
    for outcome, colour in colours.items():
        widths = np.array([counts.get(outcome, 0) for counts in files.values()])
        axis.barh(list(files), widths, left=left, color=colour, label=outcome.lower())
        left += widths
    axis.set_xlabel("tests")
    axis.legend(fontsize=7)
    _save(figure, path)


def _autotune(rows: Sequence[Row], path: Path) -> None:
    counts: dict[str, int] = {}
    for row in rows:
        for problem in row["tuned"]:
            kernel = problem.partition("(")[0]
            counts[kernel] = counts.get(kernel, 0) + 1
    figure, axis = plt.subplots(figsize=(7, 1.2 + 0.3 * max(1, len(counts))))
    axis.barh(list(counts), list(counts.values()))
    axis.set_xlabel(f"problems tuned, in {sum(row['seconds'] for row in rows):.0f} s")
    _save(figure, path)


def _kernels(rows: Sequence[Row], path: Path) -> None:
    """Share of the floor, per layer, of the first network at its largest batch."""
    network = rows[0]["case"].partition(":")[0]
    batch = max(row["batch"] for row in rows if row["case"].startswith(network))
    mine = [r for r in rows if r["case"].startswith(f"{network}:") and r["batch"] == batch]
    layers = list(dict.fromkeys(row["case"] for row in mine))[:MOST_LAYERS]
    names = [n for n in dict.fromkeys(row["provider"] for row in mine) if n != CONTROL]
    figure, axis = plt.subplots(figsize=(9, 1.5 + 0.28 * len(layers)))
    height = 0.8 / max(1, len(names))
    for index, name in enumerate(names):
        shares = {r["case"]: of_floor(r) for r in mine if r["provider"] == name}
        places = np.arange(len(layers)) + index * height
        axis.barh(places, [100 * (shares.get(la) or 0.0) for la in layers], height, label=name)
    labels = [layer.partition(": ")[2] for layer in layers]
    axis.set_yticks(np.arange(len(layers)) + 0.4 - height / 2, labels, fontsize=6)
    axis.invert_yaxis()
    axis.axvline(100, color="black", linewidth=0.8)
    axis.set_xlabel("floor ÷ time, %")
    axis.set_title(f"{network}, batch {batch}", fontsize=9)
    axis.legend(fontsize=7)
    _save(figure, path)


def _throughput(rows: Sequence[Row], path: Path) -> None:
    """Images a second against the batch, a panel per network."""
    networks = list(dict.fromkeys(row["case"] for row in rows))
    columns = min(3, len(networks))
    lines = -(-len(networks) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(4.2 * columns, 3.4 * lines), squeeze=False)
    for axis, network in zip(axes.flat, networks, strict=False):
        mine = [row for row in rows if row["case"] == network and row["images_per_s"]]
        for name in dict.fromkeys(row["provider"] for row in mine if row["provider"] != CONTROL):
            best: dict[int, float] = {}
            for row in mine:
                if row["provider"] == name:
                    best[row["batch"]] = max(best.get(row["batch"], 0.0), row["images_per_s"])
            batches = sorted(best)
            style = {"color": _colour(name), "linestyle": "-" if name.endswith(GRAPH) else "--"}
            heights = [best[batch] for batch in batches]
            axis.plot(batches, heights, marker="o", ms=3, label=name, **style)
        floors = {row["batch"]: 1e3 * row["batch"] / row["floor_ms"] for row in mine}
        axis.plot(sorted(floors), [floors[b] for b in sorted(floors)], "k:", label="floor")
        axis.set(xscale="log", yscale="log", xlabel="batch", ylabel="images/s")
        axis.set_title(network, fontsize=9)
        axis.grid(which="both", alpha=0.2)
        axis.legend(fontsize=5)
    for axis in list(axes.flat)[len(networks) :]:
        axis.axis("off")
    _save(figure, path)


def _training(rows: Sequence[Row], path: Path) -> None:
    figure, axes = plt.subplots(1, 3, figsize=(12, 4))
    for axis, (column, title, scale) in zip(
        axes,
        (
            ("images_per_s", "images/s", 1.0),
            ("activation_bytes", "MB kept for the backward pass", 1e6),
            ("peak_bytes", "peak MB of a step", 1e6),
        ),
        strict=True,
    ):
        _grouped(axis, rows, column, title, scale)
    _save(figure, path)


def _bars(
    rows: Sequence[Row], columns: Sequence[str], title: str, scale: float, path: Path
) -> None:
    figure, axes = plt.subplots(1, len(columns), figsize=(10, 4), squeeze=False)
    for axis, column in zip(axes.flat, columns, strict=True):
        _grouped(axis, rows, column, title, scale)
    _save(figure, path)


def _grouped(axis: Any, rows: Sequence[Row], column: str, title: str, scale: float) -> None:
    """Bars: a group per network and batch, a colour per provider."""
    found = [row for row in rows if row[column] and row["provider"] != CONTROL]
    cases = list(dict.fromkeys((row["case"], row["batch"]) for row in found))
    names = list(dict.fromkeys(row["provider"] for row in found))
    width = 0.8 / max(1, len(names))
    for index, name in enumerate(names):
        values = {(r["case"], r["batch"]): r[column] for r in found if r["provider"] == name}
        heights = [values.get(case, 0.0) / scale for case in cases]
        axis.bar(
            np.arange(len(cases)) + index * width, heights, width, label=name, color=_colour(name)
        )
    labels = [f"{case}\nbatch {batch}" for case, batch in cases]
    axis.set_xticks(np.arange(len(cases)) + 0.4 - width / 2, labels, fontsize=6, rotation=45)
    axis.set_ylabel(title)
    axis.grid(axis="y", alpha=0.3)
    if names:
        axis.legend(fontsize=6)


def _colour(provider: str) -> str:
    """The same in every picture, with and without a graph."""
    return f"C{COLOURED.index(provider.removesuffix(GRAPH))}"


def _targets(targets: Sequence[dict[str, Any]], path: Path) -> None:
    """How much of each target was reached; more than 1 is better than asked for."""
    labels, shares, colours = [], [], []
    for target in targets:
        bound = float(target["target"].rpartition(" ")[2])
        measured = target["measured"]
        least = " at least " in target["target"]
        labels.append(f"{target['case']} b{target['batch']} {target['target']}")
        shares.append(0.0 if not measured else (measured / bound if least else bound / measured))
        colours.append({None: "tab:grey", True: "tab:green", False: "tab:red"}[target["met"]])
    figure, axis = plt.subplots(figsize=(9, 1.2 + 0.3 * len(labels)))
    axis.barh(labels, shares, color=colours)
    axis.axvline(1.0, color="black", linewidth=0.8)
    axis.tick_params(axis="y", labelsize=6)
    axis.invert_yaxis()
    axis.set_xlabel("share of the target; 1: met, no bar: not measured")
    _save(figure, path)
