"""What bounds the layers that lose the most time, by Nsight Compute: the stage ``counters``.

One process, watched by ``ncu``, calls each layer once between ``cudaProfilerStart`` and
``cudaProfilerStop``, behind a kernel that nobody else launches: it tells where in ncu's output a
layer begins. Which layer it is, the process has noted in a file before.
"""

from __future__ import annotations

import csv
import json
import os
import pickle
import re
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import IO, Any

import torch

from . import device
from .layers import OURS, LayerCase, gradients, layer_counts, ours_by_name, tensors_of
from .timing import WARM_UP, Call
from .worker import Row, clean_up, in_words

TOOL = "ncu"
MARKER = "cauchy"  # in the name of the kernel before each layer
TRIES = 3  # each without the metrics that ncu did not know
CALLING_SHARE = 0.75  # of the time; then the process ends, for ncu to print what it has
GRACE_S = 10.0
LEAST_S = 10.0

TIME, READ, WRITTEN = "gpu__time_duration.sum", "dram__bytes_read.sum", "dram__bytes_write.sum"
MEMORY = "dram__throughput.avg.pct_of_peak_sustained_elapsed"
PROCESSORS = "sm__throughput.avg.pct_of_peak_sustained_elapsed"
TENSOR = "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active"
ISSUED = "sm__inst_executed.avg.per_cycle_active"
OCCUPANCY = "sm__warps_active.avg.pct_of_peak_sustained_active"
L2_HITS = "lts__t_sector_hit_rate.pct"
REGISTERS = "launch__registers_per_thread"
CONFLICTS = "l1tex__data_bank_conflicts_pipe_lsu_mem_shared.sum"
STALL = "smsp__average_warps_issue_stalled_{}_per_issue_active.ratio"
STALLS = (
    *("long_scoreboard", "short_scoreboard", "lg_throttle", "mio_throttle"),
    *("math_pipe_throttle", "barrier", "wait", "not_selected", "dispatch_stall"),
    *("no_instruction", "drain"),
)
METRICS = (
    *(TIME, READ, WRITTEN, MEMORY, PROCESSORS, TENSOR, ISSUED, OCCUPANCY, L2_HITS, CONFLICTS),
    *(REGISTERS, "launch__grid_size", "launch__block_size"),
    *(f"launch__occupancy_limit_{what}" for what in ("registers", "shared_mem", "warps", "blocks")),
    *(STALL.format(reason) for reason in STALLS),
)
# To seconds and bytes; ncu has had two spellings of times.
UNITS = {
    **{"nsecond": 1e-9, "usecond": 1e-6, "msecond": 1e-3, "second": 1.0},
    **{"ns": 1e-9, "us": 1e-6, "ms": 1e-3, "s": 1.0},
    **{"byte": 1.0, "Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9, "Tbyte": 1e12},
}


@dataclass(frozen=True)
class Counted:
    """Whose layers are looked into, and how many."""

    network: str
    batch: int
    forward: int
    backward: int


@dataclass(frozen=True)
class Job:
    """What the watched process does.

    Attributes:
        calls: layers with the providers, of ``ours_by_name``, that run them.
        device, dtype, backends: as of :func:`layers.measure_layer`.
        order: file that gets a line of JSON before each call.
        seconds: after which no call is begun any more.
    """

    calls: tuple[tuple[LayerCase, tuple[str, ...]], ...]
    device: str
    dtype: str
    backends: tuple[str, ...]
    order: Path = Path()
    seconds: float = 0.0


@dataclass
class Kernel:
    """A launch that ncu measured; seconds and bytes where a metric has such a unit."""

    name: str
    metrics: dict[str, float] = field(default_factory=dict)


def worst_layers(
    counted: Counted, cases: Iterable[LayerCase], rows: Iterable[Row]
) -> tuple[tuple[LayerCase, tuple[str, ...]], ...]:
    """The layers that lose the most time over their floor, times how often the network has them.

    Args:
        counted: which network, how many layers.
        cases: of the stage ``kernels``.
        rows: its results; the faster one of our backends counts.

    Returns:
        Forward and backward ones, each with those of our providers that were timed.
    """
    timed: dict[str, dict[str, Row]] = {}
    for row in rows:
        if row["provider"].startswith(OURS) and row["ms_median"]:
            timed.setdefault(row["task"], {})[row["provider"]] = row
    counts: Mapping[Any, int] = layer_counts(counted.network)
    lost: list[tuple[float, LayerCase]] = []
    for case in cases:
        found = timed.get(case.name)
        if found and (case.network, case.batch) == (counted.network, counted.batch):
            least = min(row["ms_median"] - row["floor_ms"] for row in found.values())
            lost.append((least * counts.get(case.layer, 1), case))
    lost.sort(key=lambda entry: -entry[0])
    wanted = {False: counted.forward, True: counted.backward}
    return tuple(
        (case, tuple(timed[case.name]))
        for backward, most in wanted.items()
        for case in [case for _, case in lost if case.backward == backward][:most]
    )


def measure(
    job: Job, out: Path, timeout_s: float, environment: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Run ``job`` under ncu.

    Args:
        job: what to call; its ``order`` and ``seconds`` are set here.
        out: directory; gets ``counters.txt``, ncu's output.
        timeout_s: for all of it.
        environment: of the process; None: this one's.

    Returns:
        ``rows``, one per kernel; ``failures`` by case and provider, or of ncu; ``unknown`` metrics;
        ``left_out``: what there was no time for.
    """
    end = time.monotonic() + timeout_s
    log, path = out.resolve() / "counters.txt", out.resolve() / "counters.job"
    order = out.resolve() / "counters.jsonl"
    metrics = list(METRICS)
    unknown: list[str] = []
    for _ in range(TRIES):
        for file in (log, order):
            file.unlink(missing_ok=True)
        left = end - time.monotonic()
        timed = replace(job, order=order, seconds=CALLING_SHARE * left)
        path.write_bytes(pickle.dumps(timed))
        code, output = device.run_command(
            _command(metrics, log, path),
            left,
            dict(os.environ if environment is None else environment),
            GRACE_S,
        )
        text = (log.read_text(errors="replace") if log.exists() else "") + output
        log.write_text(text)
        kernels = parse(text)
        bad = [] if kernels else _unknown(text, metrics)
        unknown += bad
        metrics = [name for name in metrics if name not in bad]
        if not bad or code is None or end - time.monotonic() < LEAST_S:
            break
    path.unlink()
    lines = [json.loads(line) for line in order.read_text().splitlines()] if order.exists() else []
    order.unlink(missing_ok=True)
    begun = [line["begun"] for line in lines if "begun" in line]
    failures = {": ".join(line["failed"]): line["why"] for line in lines if "failed" in line}
    rows, problem = _rows(job, begun, kernels, cut_short=code != 0)
    stopped = code is None or any("out of time" in line for line in lines)
    if problem:
        failures[TOOL] = problem
    elif code or not (rows or failures or stopped):
        failures[TOOL] = _words(text, code)
    tried = {*map(tuple, begun), *(tuple(line["failed"]) for line in lines if "failed" in line)}
    reached = {(row["task"], row["provider"]) for row in rows} if code is None else tried
    return {
        "rows": rows,
        "failures": failures,
        "unknown": unknown,
        "left_out": [
            f"{case.name}: {provider}"
            for case, providers in job.calls
            for provider in providers
            if stopped and (case.name, provider) not in reached
        ],
        "exit_code": code,
    }


def _command(metrics: Sequence[str], log: Path, job: Path) -> list[str]:
    return [
        *(device.find_tool(TOOL) or TOOL, "--profile-from-start", "off"),
        *("--target-processes", "application-only"),
        *("--clock-control", "none"),  # as the other stages ran; virtual machines cannot set clocks
        *("--csv", "--page", "raw", "--print-units", "base", "--print-kernel-base", "demangled"),
        *("--log-file", str(log), "--metrics", ",".join(metrics)),
        *(sys.executable, "-c", "from benchmarks.campaign import counters; counters.work()"),
        str(job),
    ]


def work() -> None:
    """The watched process: the job's layers, each warmed up and then called once."""
    job: Job = pickle.loads(Path(sys.argv[1]).read_bytes())
    end = time.monotonic() + job.seconds
    with job.order.open("w", buffering=1) as order:
        # Nothing but the marker: a metric that ncu does not know is an error now, not in a minute.
        with _watched(job.device, order, "", ""):
            pass
        for case, providers in job.calls:
            for provider in providers:
                if time.monotonic() > end:
                    order.write(json.dumps({"out of time": True}) + "\n")
                    return
                try:
                    _call(job, case, provider, order)
                except Exception as error:
                    failed = {"failed": [case.name, provider], "why": in_words(error)}
                    order.write(json.dumps(failed) + "\n")
                clean_up()


def _call(job: Job, case: LayerCase, provider: str, order: IO[str]) -> None:
    """Autotuning is over: this is what the stage ``kernels`` has timed."""
    tensors = tensors_of(case, job.device, job.dtype)
    run = ours_by_name(case, job.backends)[provider]
    with nullcontext() if case.backward else torch.inference_mode():
        call: Call = gradients(run, tensors) if case.backward else partial(run, tensors)
        for _ in range(WARM_UP):
            call()
        with _watched(job.device, order, case.name, provider):
            call()


@contextmanager
def _watched(device: str, order: IO[str], case: str, provider: str) -> Iterator[None]:
    """ncu looks at what is launched inside, after the marker."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
    order.write(json.dumps({"begun": [case, provider]}) + "\n")
    try:
        torch.empty(1, device=device).cauchy_()
        yield
    finally:
        if device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.profiler.stop()


def parse(text: str) -> list[Kernel]:
    """The launches in ncu's CSV output, in their order.

    Either shape is read: a row for each launch below a row of units (``--page raw``), or a row for
    each metric of a launch.
    """
    kernels: list[Kernel] = []
    columns: list[str] = []
    units: list[str] = []
    last: list[str] = []
    for cells in csv.reader(line for line in text.splitlines() if line.startswith('"')):
        if "Kernel Name" in cells:
            columns, units, last = cells, [""] * len(cells), []
            continue
        if len(cells) != len(columns):
            continue
        row = dict(zip(columns, cells, strict=True))
        if not row["Kernel Name"]:
            units = cells
            continue
        if "Metric Name" not in row:
            metrics = {
                name: value
                for name, cell, unit in zip(columns, cells, units, strict=True)
                if "__" in name and (value := _number(cell, unit)) is not None
            }
            kernels.append(Kernel(row["Kernel Name"], metrics))
            continue
        which = [row.get(column, "") for column in ("ID", "Process ID", "Kernel Name")]
        if which != last:
            kernels.append(Kernel(row["Kernel Name"]))
            last = which
        found = _number(row["Metric Value"], row.get("Metric Unit", ""))
        if found is not None:
            kernels[-1].metrics[row["Metric Name"]] = found
    return kernels


def short_name(kernel: str) -> str:
    """``void effkernels::<unnamed>::scale_kernel<float>(...)`` -> ``scale_kernel``."""
    plain = kernel.replace("<unnamed>::", "").replace("(anonymous namespace)::", "")
    return re.split(r"[<(]", plain.removeprefix("void "))[0].split("::")[-1]


def worst_stall(metrics: Mapping[str, float]) -> tuple[str, float] | None:
    """What warps wait for the most: the reason, and how many of them do when one is issued."""
    found = {
        reason: metrics[name] for reason in STALLS if (name := STALL.format(reason)) in metrics
    }
    return max(found.items(), key=lambda entry: entry[1], default=None)


def _rows(
    job: Job, begun: Sequence[Sequence[str]], kernels: Sequence[Kernel], cut_short: bool
) -> tuple[list[Row], str]:
    """A row per kernel, and what is wrong with their order."""
    sections: list[list[Kernel]] = []
    for kernel in kernels:
        if MARKER in kernel.name.lower():
            sections.append([])
        elif sections:
            sections[-1].append(kernel)
    if len(sections) > len(begun) or (len(sections) < len(begun) and not cut_short):
        return [], f"{len(begun)} calls were marked, ncu has {len(sections)} of the markers"
    itemsize = getattr(torch, job.dtype).itemsize
    cases = {case.name: case for case, _ in job.calls}
    rows = []
    for (name, provider), section in zip(begun, sections, strict=False):
        for kernel in section if name else ():
            rows.append(
                {
                    **{"task": name, "case": cases[name].label, "batch": cases[name].batch},
                    **{"provider": provider, "kernel": short_name(kernel.name)},
                    "must_bytes": cases[name].bytes(itemsize),
                    "metrics": kernel.metrics,
                }
            )
    return rows, ""


def _number(cell: str, unit: str) -> float | None:
    """A cell in seconds or bytes, or in its own unit; None if it is no number."""
    try:
        return float(cell.replace(",", "")) * UNITS.get(unit.partition("/")[0], 1.0)
    except ValueError:
        return None


def _unknown(text: str, metrics: Sequence[str]) -> list[str]:
    """The metrics that ncu names in its errors."""
    said = [
        line.replace("\\", "")
        for line in text.splitlines()
        if line.startswith("==") and "metric" in line.lower()
    ]
    # "Failed to find metric NAME", with or without its ending
    return [
        name
        for name in metrics
        if any(
            re.search(rf"(?<![\w.]){re.escape(spelled)}(?![\w.]*\w)", line)
            for line in said
            for spelled in (name, name.partition(".")[0])
        )
    ]


def _words(text: str, code: int | None) -> str:
    """Why ncu failed, as it says."""
    said = [line for line in text.splitlines() if line.startswith("==ERROR==")]
    last = said or text.strip().splitlines()[-1:]
    return f"exit status {code}: {' '.join(line.removeprefix('==ERROR== ') for line in last[:2])}"
