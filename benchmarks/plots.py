"""Pictures of results."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # files only: no display is needed
import matplotlib.pyplot as plt
import numpy as np

from .machine import Rates
from .providers import CONTROL, in_order
from .records import Case, Results


def speed(results: Results, cases: Sequence[Case], path: Path) -> None:
    """Bars: how many times as fast as the slowest each provider runs each case."""
    names = in_order(name for case in cases for name in results.of(case))
    figure, axes = plt.subplots(figsize=(max(6.0, 1.5 + 1.1 * len(cases)), 4.5))
    width = 0.8 / max(len(names), 1)
    for index, name in enumerate(names):
        heights = []
        for case in cases:
            found = results.of(case)
            times = [r.ms_median for r in found.values() if r.ms_median]
            own = found[name].ms_median if name in found else None
            heights.append(max(times) / own if own else 0.0)
        places = np.arange(len(cases)) + (index - (len(names) - 1) / 2) * width
        axes.bar(places, heights, width, label=name)
    labels = [f"{case.case}\nbatch {case.batch}\n{case.threads} thr." for case in cases]
    axes.set_xticks(np.arange(len(cases)), labels, fontsize=7)
    axes.set_ylabel("times as fast as the slowest")
    axes.grid(axis="y", alpha=0.3)
    axes.legend(fontsize=7, ncols=2)
    axes.set_title(results.header["cpu"]["name"])
    _save(figure, path)


def roofline(results: Results, cases: Sequence[Case], path: Path) -> None:
    """Points: operations per second over operations per byte, under the machine's roof."""
    rates = Rates(**results.header["rates"][str(cases[0].threads)])
    figure, axes = plt.subplots(figsize=(7.0, 4.5))
    records = [record for case in cases for record in results.of(case).values()]
    timed = [r for r in records if r.ms_median and r.provider != CONTROL]
    for name in dict.fromkeys(record.provider for record in timed):
        mine = [record for record in timed if record.provider == name]
        axes.scatter(
            [r.flops / r.bytes for r in mine],
            [r.flops / (r.ms_median or 1.0) / 1e6 for r in mine],
            s=18,
            alpha=0.8,
            label=name,
        )
    intensities = [record.flops / record.bytes for record in timed] or [1.0]
    x = np.geomspace(min(intensities) / 2, max(intensities) * 2, 100)
    roof = np.minimum(rates.flops_per_s, x * rates.bytes_per_s) / 1e9
    axes.plot(x, roof, color="black", linewidth=1, label="sgemm and copy rate")
    axes.set(xscale="log", yscale="log", xlabel="FLOP per byte", ylabel="GFLOP/s")
    axes.grid(which="both", alpha=0.2)
    axes.legend(fontsize=8)
    case = cases[0]
    axes.set_title(str(case._replace(case=case.case.partition(":")[0])), fontsize=9)
    _save(figure, path)


def _save(figure: plt.Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
