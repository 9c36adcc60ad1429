"""``effkernels scale``: compound-scaled networks, by φ or by a budget, as a table."""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from .models import Budget, CompoundScaling, ScaledNetwork, list_models, solve
from .models.budget import Constraint, check_fits, machine_memory
from .models.common import text_table
from .models.memory import MODES

__all__ = ["run"]

_DEFAULT_PHI = (0.0, 1.0, 2.0)
_COUNT = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "b": 1e9, "t": 1e12}
_BYTES = {
    **{"b": 1.0, "kb": 1e3, "mb": 1e6, "gb": 1e9, "tb": 1e12},
    **{"kib": 2.0**10, "mib": 2.0**20, "gib": 2.0**30, "tib": 2.0**40},
}
_SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}
_BUDGETS = ("flops", "macs", "params", "memory", "latency")


def run(parsed: argparse.Namespace) -> None:
    """The command. All arguments are checked before anything is measured or written.

    Raises:
        ValueError: naming the argument, what came and what is accepted; or that no network keeps
            to the budget.
    """
    draw = None if parsed.plot is None else _plotter(Path(parsed.plot))
    given = {name: getattr(parsed, name) for name in ("alpha", "beta", "gamma")}
    scaling = CompoundScaling(**{k: value for k, value in given.items() if value is not None})
    options: dict[str, Any] = {"num_classes": parsed.num_classes}
    if parsed.stem is not None:
        if parsed.base in list_models("efficientnet*"):
            raise ValueError(f"--stem: {parsed.base} has one stem, only ResNets have a choice")
        options["stem"] = parsed.stem
    if parsed.mode not in MODES:
        raise ValueError(f"--mode: {parsed.mode!r} is given, {' or '.join(MODES)} is accepted")
    budget = _budget(parsed)

    def network(phi: float) -> ScaledNetwork:
        return ScaledNetwork(parsed.base, phi, scaling, parsed.batch, parsed.optimizer, options)

    binding: tuple[Constraint, ...] = ()
    if budget is None:
        networks = [network(phi) for phi in parsed.phi or _DEFAULT_PHI]
    else:
        network(0.0)  # its errors come first
        solution = solve(
            parsed.base, budget, scaling, batch=parsed.batch, optimizer=parsed.optimizer, **options
        )
        networks, binding = [solution.network], solution.binding
    if not parsed.no_measure:
        for row in networks:
            memory = row.training_memory if parsed.mode == "training" else row.inference_memory
            check_fits(memory.total, f"--phi: {parsed.base} at {row.phi:g}")
    rows = [_figures(row, measure=not parsed.no_measure) for row in networks]
    result = {
        "base": parsed.base,
        "coefficients": asdict(scaling),
        "threads": torch.get_num_threads(),
        "machine_memory": machine_memory(),
        "networks": rows,
        "binding": [
            {"name": item.name, "value": item.value, "limit": item.limit} for item in binding
        ],
    }
    if draw is not None:
        draw(parsed.base, rows)
    if parsed.json:
        print(json.dumps(result, indent=2))
        return
    print(_table(rows, scaling, parsed))
    if budget is not None:
        print(_why(binding))


def _figures(network: ScaledNetwork, measure: bool) -> dict[str, Any]:
    latency = network.latency * 1e3 if measure else None
    return {**network.to_dict(), "latency_ms": latency}


def _budget(parsed: argparse.Namespace) -> Budget | None:
    """The budget that was asked for; None: values of φ were."""
    given = [name for name in _BUDGETS if getattr(parsed, name) is not None]
    if not given:
        return None
    if parsed.phi is not None:
        raise ValueError(f"--phi and --{given[0]} are given, one of them is accepted")
    if parsed.flops is not None and parsed.macs is not None:
        raise ValueError("--flops and --macs are given, one of them is accepted")
    if parsed.latency is not None and parsed.no_measure:
        raise ValueError("--latency and --no-measure are given, one of them is accepted")
    flops = _quantity("--flops", parsed.flops, _COUNT)
    if parsed.macs is not None:
        flops = 2 * (_quantity("--macs", parsed.macs, _COUNT) or 0.0)
    memory = _quantity("--memory", parsed.memory, _BYTES)
    if memory is not None and not parsed.no_measure and memory > machine_memory():
        raise ValueError(
            f"--memory: {parsed.memory!r} is more than this machine's "
            f"{machine_memory() / 2**30:.1f} GiB; --no-measure plans for another machine"
        )
    return Budget(
        flops,
        _quantity("--params", parsed.params, _COUNT),
        memory,
        _quantity("--latency", parsed.latency, _SECONDS),
        parsed.mode,
    )


def _quantity(argument: str, text: str | None, units: Mapping[str, float]) -> float | None:
    """``4G`` as a number."""
    if text is None:
        return None
    found = re.fullmatch(r"(\d+\.?\d*(?:e[+-]?\d+)?|\.\d+)\s*([a-z]*)", text.strip().lower())
    if found is None or found[2] not in units or float(found[1]) <= 0:
        listed = ", ".join(unit for unit in units if unit)
        how = "perhaps with" if "" in units else "with"
        raise ValueError(
            f"{argument}: {text!r} is given, a positive number {how} one of {listed} is accepted"
        )
    return float(found[1]) * units[found[2]]


_HEAD = (
    *("phi", "resolution", "depth (blocks)", "width (last stage)", "parameters", "MACs"),
    *("FLOPs", "activations", "inference", "training", "measured"),
)


def _table(
    rows: Sequence[Mapping[str, Any]], scaling: CompoundScaling, parsed: argparse.Namespace
) -> str:
    cells = []
    for row in rows:
        factors, latency = row["multipliers"], row["latency_ms"]
        inference, training = (row[f"{mode}_memory"]["total"] for mode in ("inference", "training"))
        cells.append(
            (
                f"{row['phi']:g}",
                f"{row['resolution']}",
                f"{factors['depth']:.2f} ({sum(row['blocks'])})",
                f"{factors['width']:.2f} ({row['channels'][-1]})",
                f"{row['parameters'] / 1e6:.2f} M",
                f"{row['macs'] / 1e9:.3f} G",
                f"{row['flops'] / 1e9:.3f} G",
                f"{row['activations'] / 1e6:.2f} M",
                f"{inference / 2**20:,.0f} MiB",
                f"{training / 2**20:,.0f} MiB",
                "" if latency is None else f"{latency:.2f} ms",
            )
        )
    threads = torch.get_num_threads()
    images = f"batch {parsed.batch}"
    lines = [
        f"{parsed.base}, depth {scaling.alpha:g}^phi, width {scaling.beta:g}^phi, "
        f"resolution {scaling.gamma:g}^phi",
        *text_table(_HEAD, cells, left=0),
        "MACs: multiply-adds per image, which papers call FLOPs; FLOPs: 2 per MAC. activations: "
        "values that",
        f"convolutions give, per image. Memory: predicted, {images}, float32; training with "
        f"{parsed.optimizer}.",
    ]
    if not parsed.no_measure:
        plural = "s" if threads > 1 else ""
        lines.append(f"measured: evaluation mode, {images}, {threads} thread{plural}.")
    return "\n".join(lines)


def _why(binding: Sequence[Constraint]) -> str:
    if not binding:
        return "No limit binds up to the largest phi that is tried."
    return "\n".join(f"The next larger network breaks {constraint}." for constraint in binding)


def _plotter(path: Path) -> Callable[[str, Sequence[Mapping[str, Any]]], None]:
    """What draws into ``path``, which is written whole or not at all.

    Raises:
        ValueError: if it cannot be written, or without matplotlib.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("--plot needs matplotlib: pip install 'effkernels[benchmarks]'") from None
    accepted = FigureCanvasAgg.get_supported_filetypes()
    kind = path.suffix.lstrip(".").lower()
    if kind not in accepted:
        raise ValueError(
            f"--plot: {str(path)!r} is given, a file ending in .png, .svg or .pdf is accepted"
        )
    if not path.absolute().parent.is_dir():
        raise ValueError(f"--plot: {str(path.parent)!r} is no folder")

    def draw(base: str, rows: Sequence[Mapping[str, Any]]) -> None:
        figure = Figure(figsize=(8.0, 6.0), layout="constrained")
        panels = figure.subplots(2, 2)
        phi = [row["phi"] for row in rows]

        def line(axes: Any, values: list[float], label: str = "") -> None:
            axes.plot(phi, values, marker="o", label=label)
            axes.set_xlabel("φ")
            axes.set_ylim(bottom=0)
            axes.grid(alpha=0.3)

        line(panels[0, 0], [row["macs"] / 1e9 for row in rows])
        panels[0, 0].set_ylabel("multiply-adds per image (G)")
        line(panels[0, 1], [row["parameters"] / 1e6 for row in rows])
        panels[0, 1].set_ylabel("parameters (M)")
        for mode in ("inference", "training"):
            values = [row[f"{mode}_memory"]["total"] / 2**20 for row in rows]
            line(panels[1, 0], values, mode)
        panels[1, 0].set_ylabel(f"memory, batch {rows[0]['batch']} (MiB)")
        panels[1, 0].legend()
        if rows[0]["latency_ms"] is not None:
            line(panels[1, 1], [row["latency_ms"] for row in rows])
            panels[1, 1].set_ylabel(f"measured, batch {rows[0]['batch']} (ms)")
        else:
            line(panels[1, 1], [row["resolution"] for row in rows])
            panels[1, 1].set_ylabel("resolution (pixels)")
        figure.suptitle(base)
        partial = path.with_name(path.name + ".part")
        try:
            figure.savefig(partial, format=kind, dpi=120)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)

    return draw
