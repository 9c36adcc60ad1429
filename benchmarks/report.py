"""Records as tables: for the terminal, and for the README."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

from .limits import Limit
from .limits import table as limit_table
from .machine import Rates
from .networks import Network
from .providers import CONTROL, OWN, in_order
from .records import CONTROL_RANGE, Case, Record, Results, control_ratio, is_fair
from .shapes import Layer
from .targets import FASTEST_RIVAL, baseline_of, fastest_of

README_BEGIN = "<!-- benchmarks: begin, made by `python -m benchmarks report` -->"
README_END = "<!-- benchmarks: end -->"
# The README's columns: of several ways to use one runtime, the fastest.
COLUMNS = {
    "eager": ("eager", "eager channels_last"),
    "torch.compile": ("torch.compile", "torch.compile freezing"),
    "ONNX Runtime": ("ONNX Runtime",),
    "OpenVINO": ("OpenVINO",),
    "effkernels accelerate": ("accelerate",),
    "freeze": ("freeze",),
}
COLUMNS_NOTE = (
    "eager is the faster of NCHW and channels_last, torch.compile of without and with freezing."
)
OURS = "freeze"
OFF = "*"
LIMITS_NOTE = (
    "Memory: the peak of what is resident above what was before the first call, in a process of "
    "its own with glibc's malloc as it comes; against the leaner of the two eager layouts. First "
    "calls: recording and packing included, `ek.freeze` itself beside it; the median of three "
    "processes."
)
NUMBERS = {"numalign": "right", "stralign": "right", "disable_numparse": True}


def describe(header: dict[str, Any]) -> str:
    """A results file's header in a few lines."""
    cpu, versions = header["cpu"], header["versions"]
    lines = [
        f"{cpu['name']}, {cpu['cores']} cores, effkernels on {cpu['effkernels_isa']}",
        ", ".join(f"{name} {version or '-'}" for name, version in versions.items()),
        f"commit {header['commit']}, {header['date']}, {header['malloc']}",
    ]
    for threads, rates in sorted(header.get("rates", {}).items(), key=lambda item: int(item[0])):
        gemm, mm, copied = (
            rates[name] / 1e9 for name in ("flops_per_s", "torch_mm_flops_per_s", "bytes_per_s")
        )
        lines.append(
            f"{threads} thread{'s' * (int(threads) > 1)}: sgemm {gemm:.0f} GFLOP/s "
            f"(torch.mm {mm:.0f}), copy {copied:.0f} GB/s"
        )
    return "\n".join(lines)


def network_tables(results: Results, cases: Sequence[Case]) -> str:
    """One table per network: providers down, batch and threads across; the control comes last."""
    parts = []
    for label, dtype in dict.fromkeys((case.case, case.dtype) for case in cases):
        columns = [case for case in cases if (case.case, case.dtype) == (label, dtype)]
        found = [results.of(case) for case in columns]
        title = f"{label}, {Network.parse(label).resolution}², {dtype}, median ms"
        headers = ["", *(f"batch {c.batch}, {c.threads} thr." for c in columns)]
        table = tabulate(_network_rows(found), headers, stralign="right", colalign=["left"])
        parts.append("\n".join([title, table, *_notes(columns, found)]))
    return "\n\n".join(parts)


def kernel_table(results: Results, cases: Sequence[Case]) -> str:
    """One row per layer, and the control's over all of them."""
    rows, ratios = [], []
    for case in cases:
        found = results.of(case)
        timed = {name: record.ms_median for name, record in found.items() if record.ms_median}
        ratios += [ratio for ratio in [control_ratio(found)] if ratio is not None]
        eager, own = timed.get("eager"), timed.get("effkernels")
        any_record = next(iter(found.values()))
        rows.append(
            [
                case.case,
                eager,
                own,
                eager / own if eager and own else None,
                any_record.floor_ms,
                any_record.floor_ms / own if own else None,
                found["effkernels"].rel_err if "effkernels" in found else None,
            ]
        )
    headers = ["layer", "eager ms", "effkernels ms", "ratio", "floor ms", "of floor", "rel. error"]
    formats = ("", ".3f", ".3f", ".2f", ".3f", ".0%", ".1e")
    table = tabulate(rows, headers, floatfmt=formats, missingval="-")
    if not ratios:
        return f"{table}\ncontrol: nothing was timed"
    low, high = min(ratios), max(ratios)
    control = f"control: median ratio {statistics.median(ratios):.2f}, {low:.2f} to {high:.2f}"
    return f"{table}\n{control}"


def roofline_table(results: Results, layers: Sequence[Layer], cases: Sequence[Case]) -> str:
    """Where a network's time goes, layer by layer, next to what the machine can do."""
    rates = Rates(**results.header["rates"][str(cases[0].threads)])
    records = [results.of(case)["effkernels"] for case in cases]
    spent = [
        layer.count * (record.ms_median or 0.0)
        for layer, record in zip(layers, records, strict=True)
    ]
    floors = [layer.count * r.floor_ms for layer, r in zip(layers, records, strict=True)]
    rows: list[list[Any]] = []
    for layer, record, ms in zip(layers, records, spent, strict=True):
        seconds = (record.ms_median or float("nan")) / 1e3
        rows.append(
            [
                layer.label,
                layer.count,
                record.flops / 1e6,
                record.bytes / 1e6,
                record.floor_ms,
                record.ms_median,
                _percent(ms / sum(spent)),
                _percent(record.flops / seconds / rates.flops_per_s),
                _percent(record.bytes / seconds / rates.bytes_per_s),
            ]
        )
    flops = sum(layer.count * r.flops for layer, r in zip(layers, records, strict=True))
    moved = sum(layer.count * r.bytes for layer, r in zip(layers, records, strict=True))
    rows.append(
        [
            "all, times their count",
            sum(layer.count for layer in layers),
            flops / 1e6,
            moved / 1e6,
            sum(floors),
            sum(spent),
            "100 %",
            _percent(flops / sum(spent) * 1e3 / rates.flops_per_s),
            _percent(moved / sum(spent) * 1e3 / rates.bytes_per_s),
        ]
    )
    headers = ["layer", "count", "MFLOP", "MB", "floor ms", "ms", "share", "of sgemm", "of copy"]
    formats = ("", "", ".1f", ".2f", ".3f", ".3f", "", "", "")
    return tabulate(rows, headers, floatfmt=formats, colalign=["left", *["right"] * 8])


def markdown(results: Results, limits: Sequence[Limit] = ()) -> str:
    """The README's section: the machine, a row per network, batch and threads, and the limits."""
    cases = list(dict.fromkeys(record.key for record in results.records))
    found = [results.of(case) for case in cases]
    columns = {
        title: names
        for title, names in COLUMNS.items()
        if any(name in records for name in names for records in found)
    }
    fastest = f"{FASTEST_RIVAL} ÷ {OURS}"
    rows = []
    for case, records in zip(cases, found, strict=True):
        row = [_title(case.case), str(case.batch), str(case.threads)]
        row += [_milliseconds(fastest_of(records, names)) for names in columns.values()]
        ratio = _rival_ratio(records, OURS)
        mark = "" if ratio is None or is_fair(control_ratio(records)) else OFF
        rows.append([*row, _ratio(ratio) + mark])
    headers = ["model", "batch", "threads", *columns, fastest]
    alignment = ["left", *["right"] * (len(headers) - 1)]
    table = tabulate(rows, headers, tablefmt="github", colalign=alignment, disable_numparse=True)
    machine = describe(results.header).splitlines()
    parts = ["Median milliseconds. " + ".  \n".join(machine) + ".", table]
    notes = [COLUMNS_NOTE]
    if any(row[-1].endswith(OFF) for row in rows):
        notes.append(
            f"`{OFF}`: a control, one of the providers entered once more, was off by more than "
            f"{CONTROL_RANGE * 100:.0f} %: do not rely on the row."
        )
    parts.append("  \n".join(notes))
    measured = [limit for limit in limits if results.limit(limit.key)]
    if measured:
        parts.append(limit_table(results, measured, "github")[0])
        parts.append(LIMITS_NOTE)
    return "\n\n".join(parts)


def update_readme(
    path: Path, section: str, begin: str = README_BEGIN, end: str = README_END
) -> None:
    """Put ``section`` between the markers of ``path``.

    Where other markers than the first section's are not there yet, they come behind it.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the markers are not in it, in order and once.
    """
    text = path.read_text()
    if begin not in text and end not in text and text.count(README_END) == 1:
        text = text.replace(README_END, f"{README_END}\n\n{begin}\n{end}")
    before, found_begin, rest = text.partition(begin)
    _, found_end, after = rest.partition(end)
    if not found_begin or not found_end or begin in after or end in after:
        raise ValueError(f"{path}: {begin} and {end} are wanted, once each")
    path.write_text(f"{before}{begin}\n{section}\n{end}{after}")


def _network_rows(found: Sequence[dict[str, Record]]) -> list[list[str]]:
    names = in_order(name for records in found for name in records)
    rows = [[name, *(_milliseconds(records.get(name)) for records in found)] for name in names]
    floors = [next((r.floor_ms for r in records.values()), None) for records in found]
    rows.append(["floor", *("-" if ms is None else f"{ms:.2f}" for ms in floors)])
    for own in (name for name in names if name in OWN):
        ratios = [_rival_ratio(records, own) for records in found]
        if any(ratios):
            rows.append([f"{FASTEST_RIVAL} / {own}", *map(_ratio, ratios)])
    repeated = dict.fromkeys(r[CONTROL].control_of for r in found if CONTROL in r)
    rows.append([f"{CONTROL} / {', '.join(repeated)}", *(_ratio(control_ratio(r)) for r in found)])
    return rows


def _rival_ratio(records: dict[str, Record], own: str) -> float | None:
    """How many times as fast as the fastest rival ``own`` is."""
    rival, ours = baseline_of(records, FASTEST_RIVAL), records.get(own)
    if rival is None or ours is None or not rival.ms_median or not ours.ms_median:
        return None
    return rival.ms_median / ours.ms_median


def _notes(cases: Iterable[Case], found: Iterable[dict[str, Record]]) -> list[str]:
    """Why something was not timed, and controls that are off."""
    lines = []
    for case, records in zip(cases, found, strict=True):
        where = f"batch {case.batch}, {case.threads} thr."
        lines += [f"  {where}: {r.provider}: {r.note}" for r in records.values() if r.note]
        if not records:
            lines.append(f"  {where}: not measured")
    return lines


def _title(label: str) -> str:
    return f"{label.partition('@')[0]} {Network.parse(label).resolution}²"


def _milliseconds(record: Record | None) -> str:
    return f"{record.ms_median:.2f}" if record and record.ms_median else "-"


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _percent(share: float) -> str:
    return f"{share:.0%}"
