"""A campaign in words: lines while it runs, the summary at its end, the dry run."""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tabulate import tabulate

from ..gpus import Rates
from ..providers import CONTROL
from ..records import is_fair
from . import counters, sanitizer, targets
from .plan import STAGES, Plan
from .worker import Row

if TYPE_CHECKING:
    from . import StageFile

MOST_ROWS = 60  # of the layers, the furthest from their floor


def file_name(device_name: str) -> str:
    """Of the file with everything, as it is committed: ``gpu-nvidia-h100-80gb-hbm3.json``."""
    if device_name == "cpu":
        return "rehearsal.json"
    return "gpu-" + re.sub(r"[^a-z0-9]+", "-", device_name.lower()).strip("-") + ".json"


def in_short(rows: Sequence[Row]) -> str:
    """A case's outcome on one line."""
    parts = []
    for row in rows:
        if "ms_median" in row:
            ms = row["ms_median"]
            parts.append(f"{row['provider']} {'-' if ms is None else f'{ms:.4g} ms'}")
        elif "per_s" in row:
            parts.append(f"{row['name']} {row['per_s'] / 1e12:.3g} T{row['unit']}/s")
        elif "tuned" in row:
            parts.append(f"{len(row['tuned'])} tuned in {row['seconds']:.1f} s")
    return ", ".join(parts) or "no result"


def summarize(
    stages: Mapping[str, StageFile], rates: Rates, plan: Plan
) -> tuple[str, dict[str, Any]]:
    """Everything as Markdown, and the targets' check and controls as plain data."""
    rows = {stage: file.rows for stage, file in stages.items()}
    checked = targets.check(targets.read_gpu_targets(), rows, rates)
    controls = control_ratios(
        [row for stage in ("kernels", "inference", "training") for row in rows[stage]]
    )
    parts = [
        _head(stages, rates, controls),
        _table(
            "Targets",
            ["stage", "case", "batch", "target", "measured", "", "worst case"],
            [
                [
                    *(row["stage"], row["case"], row["batch"], row["target"]),
                    "not measured" if row["measured"] is None else f"{row['measured']:.4g}",
                    {None: "-", True: "ok", False: "MISSED"}[row["met"]],
                    row["worst"] + f" ({row['failed_cases']} failed)" * bool(row["failed_cases"]),
                ]
                for row in checked
            ],
        ),
        _models("Inference", rows["inference"]),
        _models("Training", rows["training"], training=True),
        _layers(rows["kernels"], rates),
        _counters(rows["counters"]),
        _reports(rows["sanitizer"]),
        _failures(stages, plan),
    ]
    content = {
        "targets": checked,
        "controls": {
            "count": len(controls),
            "median": statistics.median(controls.values()) if controls else None,
            "unfair": [task for task, ratio in controls.items() if not is_fair(ratio)],
        },
    }
    return "\n\n".join(part for part in parts if part), content


def targets_table() -> str:
    """All targets as Markdown, for a document."""
    rows = [
        [target.stage, target.case.replace("*", "\\*"), target.batch, f"{words} {target.value:g}"]
        for target in targets.read_gpu_targets()
        for words in [f"{target.label} {target.bound}".replace("*", "\\*")]
    ]
    headers = ["stage", "case", "batch", "target"]
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)


def control_ratios(rows: Sequence[Row]) -> dict[str, float]:
    """Every case's control over what it repeats, by stage and task."""
    by_task: dict[str, dict[str, Row]] = {}
    for row in rows:
        by_task.setdefault(f"{row['suite']}: {row['task']}", {})[row["provider"]] = row
    found = {}
    for task, providers in by_task.items():
        control = providers.get(CONTROL)
        same = providers.get(control["control_of"]) if control else None
        if control and same and control["ms_median"] and same["ms_median"]:
            found[task] = control["ms_median"] / same["ms_median"]
    return found


def of_floor(row: Row) -> float | None:
    """The floor's share of the time."""
    return row["floor_ms"] / row["ms_median"] if row["ms_median"] else None


def dry_run(plan: Plan, rates: Rates) -> str:
    """Every case of every stage with bytes, operations and floor; nothing is measured."""
    import torch

    itemsize = getattr(torch, plan.dtype).itemsize
    lines: list[list[Any]] = []

    def add(stage: str, case: str, size: float, flops: float, floor: float | None) -> None:
        lines.append([stage, case, size / 1e6, flops / 1e9, floor])

    add("build", "install, compile, versions", 0, 0, None)
    copied = 2 * plan.copy_bytes
    for name in ("copy", "pointwise"):
        add("ceilings", name, copied, 0, rates.floor_ms(copied))
    for dtype, side in plan.product_sides.items():
        size = 3 * side * side * (2 if dtype in ("bfloat16", "float16") else 4)
        add("ceilings", f"product, {dtype}", size, 2 * side**3, rates.floor_ms(size, 2 * side**3))
    add("parity", "pytest " + " ".join(plan.parity), 0, 0, None)
    for tool in sanitizer.TOOLS if plan.sanitized else ():
        add("sanitizer", f"{tool}: pytest " + " ".join(plan.sanitized), 0, 0, None)
    for stage, cases in (("autotune", plan.autotune_layers), ("kernels", plan.kernels)):
        for case in cases:
            floor = case.floor_ms(rates, itemsize)
            add(stage, case.name, case.bytes(itemsize), case.flops(), floor)
        if stage == "autotune":
            for model, training in plan.autotune_models:
                floor = model.floor_ms(rates, itemsize, training)
                name = f"{model.network}, batch {model.batch}"
                name += ", training" if training else ", freeze"
                add(stage, name, *model.sizes(itemsize, training), floor)
    if plan.counted is not None:
        wanted = (
            f"the {plan.counted.forward} layers and {plan.counted.backward} backward passes of "
        )
        wanted += f"{plan.counted.network}, batch {plan.counted.batch}, that lose the most time"
        add("counters", wanted, 0, 0, None)
    for stage, networks in (("inference", plan.inference), ("training", plan.training)):
        for model in networks:
            training = stage == "training"
            floor = model.floor_ms(rates, itemsize, training)
            add(stage, model.name, *model.sizes(itemsize, training), floor)
    add("summary", "tables, targets", 0, 0, None)
    counts = {stage: sum(line[0] == stage for line in lines) for stage in STAGES}
    text = ", ".join(f"{count} {stage}" for stage, count in counts.items())
    table = tabulate(
        lines,
        headers=["stage", "case", "MB", "GFLOP", "floor ms"],
        floatfmt=("", "", ".2f", ".2f", ".4f"),
        missingval="-",
    )
    return f"{rates.source}; {plan.dtype}.\n\n{table}\n\nCases: {text}."


def _head(stages: Mapping[str, StageFile], rates: Rates, controls: Mapping[str, float]) -> str:
    environment = stages["build"].content.get("environment", {})
    versions = stages["build"].content.get("header", {}).get("versions", {})
    parity = stages["parity"].content
    lines = [
        f"{environment.get('device', '?')}, torch {versions.get('torch')}, cuDNN "
        f"{environment.get('cudnn')}, CUDA {environment.get('cuda')}, Triton "
        f"{environment.get('triton')}; commit {stages['build'].fingerprint.get('commit')}.",
        f"Copy {rates.bytes_per_s / 1e12:.2f} TB/s, matrix product "
        f"{rates.matrix_flops_per_s / 1e12:.0f} TFLOP/s ({rates.source}).",
    ]
    if parity:
        counts = ", ".join(f"{count} {what.lower()}" for what, count in parity["counts"].items())
        lines.append(f"Parity: {'ok' if parity['ok'] else 'FAILED'}, {counts} {parity['reason']}")
    else:
        lines.append("Parity: not run.")
    lines += [f"{row['tool']}: {sanitizer.in_short(row)}" for row in stages["sanitizer"].rows]
    for stage in ("sanitizer", "counters"):
        reason = stages[stage].content.get("reason")
        lines += [f"{stage.capitalize()}: {reason}."] * bool(reason)
    if controls:
        low, high = min(controls.values()), max(controls.values())
        off = sum(not is_fair(ratio) for ratio in controls.values())
        lines.append(
            f"Controls: {len(controls)}, median ratio {statistics.median(controls.values()):.3f}, "
            f"{low:.2f} to {high:.2f}, {off} off by more than 5 %."
        )
    return "  \n".join(lines)


def _models(title: str, rows: Sequence[Row], training: bool = False) -> str:
    lines = []
    for row in rows:
        if row["provider"] == CONTROL:
            continue
        cells = [
            *(row["case"], row["batch"], row["task"].rpartition(", ")[2], row["provider"]),
            _number(row["ms_median"], ".3f"),
            _number(row["images_per_s"], ",.0f"),
            _number(of_floor(row), ".0%"),
            _number(row["peak_bytes"] and row["peak_bytes"] / 1e6, ",.0f"),
        ]
        if training:
            cells.append(_number(row["activation_bytes"] and row["activation_bytes"] / 1e6, ",.0f"))
        lines.append([*cells, _number(row["rel_err"], ".1e"), row["note"]])
    headers = ["network", "batch", "case", "provider", "ms", "images/s", "floor ÷ time", "peak MB"]
    headers += ["activations MB"] * training + ["rel. error", "note"]
    return _table(title, headers, lines)


def _layers(rows: Sequence[Row], rates: Rates) -> str:
    by_task: dict[str, dict[str, Row]] = {}
    for row in rows:
        by_task.setdefault(row["task"], {})[row["provider"]] = row
    lines = []
    for providers in by_task.values():
        any_row = next(iter(providers.values()))
        times = {name: row["ms_median"] for name, row in providers.items()}
        own, eager = times.get("effkernels"), times.get("eager")
        lost = own - any_row["floor_ms"] if own else float("inf")
        notes = "; ".join(row["note"] for row in providers.values() if row["note"])
        lines.append(
            (
                lost,
                [
                    *(any_row["case"], any_row["batch"]),
                    *(_number(times.get(n), ".4f") for n in ("eager", "torch.compile")),
                    _number(own, ".4f"),
                    _number(eager and own and eager / own, ".2f"),
                    _number(own and any_row["bytes"] / own * 1e3 / rates.bytes_per_s, ".0%"),
                    _number(own and any_row["flops"] / own * 1e3 / rates.matrix_flops_per_s, ".0%"),
                    _number(any_row["floor_ms"] / own if own else None, ".0%"),
                    notes,
                ],
            )
        )
    lines.sort(key=lambda line: -line[0])
    headers = ["layer", "batch", "eager ms", "compile ms", "ours ms", "eager ÷ ours"]
    headers += ["of copy", "of product", "floor ÷ ours", "note"]
    title = "Layers, those that lose the most time over their floor first"
    if len(lines) > MOST_ROWS:
        title += f" ({MOST_ROWS} of {len(lines)})"
    return _table(title, headers, [cells for _, cells in lines[:MOST_ROWS]])


def _counters(rows: Sequence[Row]) -> str:
    """A line per kernel, and one of all kernels where a layer has several."""
    calls: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        calls.setdefault((row["task"], row["provider"]), []).append(row)
    lines = []
    for kernels in calls.values():
        if len(kernels) > 1:
            sums = {
                name: sum(row["metrics"].get(name, 0.0) for row in kernels)
                for name in (counters.TIME, counters.READ, counters.WRITTEN)
            }
            whole = {"kernel": f"all {len(kernels)}", "metrics": sums}
            lines.append(_counter_cells({**kernels[0], **whole}))
        lines += [_counter_cells(row) for row in kernels]
    headers = ["layer", "batch", "backend", "kernel", "µs", "MB", "÷ must move", "L2 hits"]
    headers += ["of DRAM peak", "of SM peak", "tensor pipe", "issued a cycle", "occupancy"]
    headers += ["registers", "bank conflicts", "worst stall"]
    title = "Kernels by Nsight Compute, caches empty before each: what bounds them"
    return _table(title, headers, lines)


def _counter_cells(row: Row) -> list[Any]:
    metrics = row["metrics"]
    moved = [metrics[name] for name in (counters.READ, counters.WRITTEN) if name in metrics]
    bytes_ = sum(moved) if moved else None
    time = metrics.get(counters.TIME)
    stall = counters.worst_stall(metrics)

    def percent(name: str) -> str:
        return _number(metrics[name] / 100 if name in metrics else None, ".0%")

    return [
        *(row["case"], row["batch"], row["provider"], row["kernel"]),
        _number(time and time * 1e6, ".1f"),
        _number(bytes_ and bytes_ / 1e6, ",.1f"),
        _number(bytes_ and bytes_ / row["must_bytes"], ".2f"),
        *(percent(name) for name in (counters.L2_HITS, counters.MEMORY, counters.PROCESSORS)),
        percent(counters.TENSOR),
        _number(metrics.get(counters.ISSUED), ".2f"),
        percent(counters.OCCUPANCY),
        _number(metrics.get(counters.REGISTERS), ".0f"),
        _number(metrics.get(counters.CONFLICTS), ",.0f"),
        f"{stall[0]} {stall[1]:.1f}" if stall else "-",
    ]


def _reports(rows: Sequence[Row]) -> str:
    lines = [f"{row['tool']}: {report}" for row in rows for report in row["reports"]]
    return "\n".join(["## Reports of the sanitizer", "", "```", *lines, "```"]) if lines else ""


def _failures(stages: Mapping[str, StageFile], plan: Plan) -> str:
    lines = []
    for stage, file in stages.items():
        lines += [f"- {stage}: {task}: FAILED: {why}" for task, why in file.failures.items()]
        lines += [
            f"- {stage}: {row['task']}: {row['provider']}: {row['note']}"
            for row in file.rows
            if "WRONG" in row.get("note", "")
        ]
        if file.left_out:
            shown = "; ".join(file.left_out[:20])
            more = f" and {len(file.left_out) - 20} more" * (len(file.left_out) > 20)
            lines.append(f"- {stage}: out of time for {shown}{more}")
        elif not file.complete:
            lines.append(f"- {stage}: not run")
    return "\n".join(["## Failed, wrong or left out", "", *lines]) if lines else ""


def _number(value: float | None, spelled: str) -> str:
    return "-" if value is None else format(value, spelled)


def _table(title: str, headers: list[str], rows: list[list[Any]]) -> str:
    if not rows:
        return ""
    table = tabulate(rows, headers, tablefmt="github", disable_numparse=True)
    return f"## {title}\n\n{table}"
