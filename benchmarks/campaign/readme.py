"""A campaign's results as the README's section about GPUs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

from ..networks import Network
from ..providers import CONTROL
from ..records import is_fair
from .models import ACCELERATE, COMPILED, EAGER, FREEZE, GRAPH, MAX_AUTOTUNE
from .report import control_ratios
from .worker import Row

BEGIN = "<!-- GPU benchmarks: begin, made by `python -m benchmarks report` -->"
END = "<!-- GPU benchmarks: end -->"
RIVALS = (EAGER, COMPILED, MAX_AUTOTUNE)
OWN = {"inference": (ACCELERATE, FREEZE), "training": (ACCELERATE,)}
OFF = "*"


def load(path: Path) -> dict[str, Any] | None:
    """The content of a campaign's file by stage; None if it is another file."""
    try:
        content = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError):
        return None
    stages = ("build", "inference", "training", "summary")
    is_campaign = isinstance(content, dict) and all(
        isinstance(content.get(stage), dict) and {"rows", "content"} <= content[stage].keys()
        for stage in stages
    )
    return content if is_campaign else None


def markdown(stages: Mapping[str, Mapping[str, Any]]) -> str:
    """The machine, networks in inference and training, and which targets were missed."""
    parts = [_machine(stages)]
    for stage, title in (("inference", "Inference"), ("training", "Training steps")):
        table = _networks(stage, stages[stage]["rows"])
        if table:
            parts.append(f"{title}, median milliseconds:\n\n{table}")
    if any(f"{OFF} |" in part for part in parts[1:]):
        text = "a control, one of the providers entered once more, was off: do not rely on the row."
        parts.append(f"`{OFF}`: {text}")
    parts.append(
        "Every provider with and without CUDA graph, the faster one counts. The ratio is that of "
        "one run, in which both were timed in turns. Memory: the peak of a call above what was "
        "allocated before, of eager and of the fastest of ours."
    )
    parts.append(_targets(stages["summary"]["content"].get("targets", [])))
    return "\n\n".join(part for part in parts if part)


def _machine(stages: Mapping[str, Mapping[str, Any]]) -> str:
    environment = stages["build"]["content"].get("environment", {})
    header = stages["build"]["content"].get("header", {})
    versions = {**header.get("versions", {}), "Triton": environment.get("triton")}
    versions |= {"CUDA": environment.get("cuda"), "cuDNN": environment.get("cudnn")}
    versions["driver"] = environment.get("nvidia_smi", {}).get("driver_version")
    found = [f"{name} {version}" for name, version in versions.items() if version]
    name = str(environment.get("device", "?"))
    if name == "cpu":
        name = "A rehearsal on a CPU, with small sizes: no figure of a GPU"
    lines = [name, ", ".join(found), f"commit {header.get('commit')}, {header.get('date')}"]
    per_s = {row["name"]: row for row in stages.get("ceilings", {}).get("rows", ())}
    rates = [
        f"{what} {row['per_s'] / 1e12:.3g} T{row['unit']}/s"
        for what, row in per_s.items()
        if "per_s" in row
    ]
    lines += [", ".join(rates)] * bool(rates)
    parity = stages.get("parity", {}).get("content")
    if not parity:
        lines.append("The parity tests were **not run**")
    elif not parity["ok"]:
        lines.append(f"The parity tests **failed**: {parity['reason']}")
    else:
        lines.append(f"Parity tests: {parity['counts'].get('PASSED', 0)} passed")
    sanitized = stages.get("sanitizer", {}).get("rows", ())
    words = {True: "clean", False: "**failed**", None: "not to its end"}
    if sanitized:
        found = [f"{row['tool']} {words[row['ok']]}" for row in sanitized]
        lines.append(f"Compute Sanitizer: {', '.join(found)}")
    return ".  \n".join(lines) + "."


def _networks(stage: str, rows: Sequence[Row]) -> str:
    """A line per network and batch; a dash where nothing was timed."""
    ratios = control_ratios(rows)
    cases: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        if row["provider"] != CONTROL:
            cases.setdefault((row["case"], row["batch"]), []).append(row)
    there = {row["provider"].removesuffix(GRAPH) for row in rows}
    shown = [name for name in (*RIVALS, *OWN[stage]) if name in there]
    lines = []
    for (network, batch), found in cases.items():
        best = {name: _fastest(found, [name]) for name in shown}
        rival, ours = _fastest(found, RIVALS), _fastest(found, OWN[stage])
        turns = [row for row in found if rival is not None and row["task"] == rival["task"]]
        beside = _fastest(turns, OWN[stage])
        ratio = "-"
        if rival is not None and beside is not None:
            fair = is_fair(ratios.get(f"{stage}: {rival['task']}"))
            ratio = f"{rival['ms_median'] / beside['ms_median']:.2f}" + OFF * (not fair)
        eager = _fastest(found, [EAGER])
        label = f"{network.partition('@')[0]} {Network.parse(network).resolution}²"
        lines.append(
            [
                *(label, batch),
                *("-" if row is None else f"{row['ms_median']:.3f}" for row in best.values()),
                ratio,
                "-" if ours is None else f"{ours['images_per_s']:,.0f}",
                *(_megabytes(found, row) for row in (eager, ours)),
            ]
        )
    if not lines:
        return ""
    headers = ["network", "batch", *shown, "fastest rival ÷ ours", "our images/s"]
    headers += ["eager MB", "our MB"]
    alignment = ["left", *["right"] * (len(headers) - 1)]
    return tabulate(lines, headers, tablefmt="github", colalign=alignment, disable_numparse=True)


def _fastest(rows: Sequence[Row], names: Sequence[str]) -> Row | None:
    """Of providers with these names, with or without a graph."""
    timed = [
        row for row in rows if row["ms_median"] and row["provider"].removesuffix(GRAPH) in names
    ]
    return min(timed, key=lambda row: row["ms_median"], default=None)


def _megabytes(rows: Sequence[Row], row: Row | None) -> str:
    """Peak memory, which is measured without graphs."""
    if row is None:
        return "-"
    plain = row["provider"].removesuffix(GRAPH)
    peaks = [r["peak_bytes"] for r in rows if r["provider"] == plain and r["peak_bytes"]]
    return f"{min(peaks) / 1e6:,.0f}" if peaks else "-"


def _targets(targets: Sequence[Mapping[str, Any]]) -> str:
    """What was missed and what was not measured, by name."""
    if not targets:
        return ""
    missed = [target for target in targets if target["met"] is False]
    unknown = [target for target in targets if target["met"] is None]
    met = len(targets) - len(missed) - len(unknown)
    lines = [f"Targets: {met} met, {len(missed)} missed, {len(unknown)} not measured."]
    lines += [""] * bool(missed or unknown)
    for target in missed:
        measured = "" if target["measured"] is None else f": {target['measured']:.4g}"
        cases = f" ({target['failed_cases']} cases failed)" * bool(target["failed_cases"])
        lines.append(f"- **missed**: {_escaped(target)}{measured}{cases}")
    lines += [f"- not measured: {_escaped(target)}" for target in unknown]
    return "\n".join(lines)


def _escaped(target: Mapping[str, Any]) -> str:
    text = f"{target['stage']}: {target['case']}, batch {target['batch']}, {target['target']}"
    return text.replace("*", "\\*")
