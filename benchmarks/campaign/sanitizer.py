"""The CUDA C++ kernels' tests under Compute Sanitizer: the stage ``sanitizer``."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..pytest_plugin import LATE, ON_GPU
from . import device
from .worker import Row

TOOL = "compute-sanitizer"
TOOLS = ("memcheck", "racecheck")
ERROR_EXIT = 86  # pytest ends with 0 to 5
CLOSING_SHARE, MOST_CLOSING_S = 0.25, 20.0  # of the time: for the last test, and to conclude
LEAST_S = 1.0
GRACE_S = 5.0
MOST_REPORTS, REPORT_LINES = 5, 4
_PREFIX = "========="

OPTIONS = {
    "memcheck": (
        # PyTorch calls some functions only to see whether they fail.
        *("--report-api-errors", "no"),
        # Allocations lie side by side: without a gap one's end is another's beginning.
        *("--padding", "512"),
        # Later tests go on.
        *("--destroy-on-device-error", "kernel"),
    ),
    "racecheck": ("--racecheck-report", "analysis"),
}
# Beside reports of errors the tool says these.
_REMARKS = re.compile(
    r"COMPUTE-SANITIZER|.*SUMMARY: |Target application|Tracking kernels|Default timeout|"
    r"Warning: |Error: (?!Race|Potential)|Internal"
)
# With one of these it has not watched, or not to the end.
_TROUBLE = re.compile(r"Error: |Internal")


def command(tool: str, arguments: Sequence[str], log: Path, seconds: float) -> list[str]:
    """pytest under ``tool``, in one process, with our own kernels instrumented alone.

    Args:
        tool: of TOOLS.
        arguments: pytest's.
        log: gets what the tool says.
        seconds: after which no test is started any more.
    """
    return [
        *(device.find_tool(TOOL) or TOOL, "--tool", tool),
        *("--kernel-name", "kernel_substring=effkernels"),  # in the mangled name: our namespace
        *("--target-processes", "application-only"),
        *("--launch-timeout", "120"),  # seconds until the process must have called CUDA
        *("--check-exit-code", "no", "--error-exitcode", str(ERROR_EXIT)),
        *("--log-file", str(log)),
        *OPTIONS[tool],
        *device.pytest_command(arguments),
        *("-p", "no:xdist", "-p", "benchmarks.pytest_plugin"),
        *("--seconds", f"{seconds:.0f}"),
    ]


def check(
    tool: str,
    arguments: Sequence[str],
    out: Path,
    timeout_s: float,
    environment: Mapping[str, str] | None = None,
) -> Row:
    """Run the tests under one tool; a row with what it found.

    ``ok`` is None where nothing is wrong, but there was no time for all tests.

    Args:
        tool: of TOOLS.
        arguments: pytest's.
        out: directory; gets ``sanitizer-<tool>.txt``.
        timeout_s: after which the run is stopped.
        environment: of the process; None: this one's.
    """
    log = out.resolve() / f"sanitizer-{tool}.txt"
    log.unlink(missing_ok=True)
    closing = min(MOST_CLOSING_S, CLOSING_SHARE * timeout_s)
    run = command(tool, arguments, log, timeout_s - closing)
    variables = {**(os.environ if environment is None else environment)}
    variables["EFFKERNELS_HYPOTHESIS_PROFILE"] = "first"
    # Each tensor is an allocation of its own: an access beyond its end is seen.
    variables["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    start = time.monotonic()
    code, output = device.run_command(run, timeout_s, variables, GRACE_S)
    said = log.read_text(errors="replace") if log.exists() else ""
    log.write_text(f"{said}\n{output}")
    outcomes = device.outcomes_of(output)
    counts = device.count(outcomes)
    row: Row = {
        "tool": tool,
        "command": " ".join(run),
        "exit_code": code,
        "seconds": time.monotonic() - start,
        **findings(f"{said}\n{output}"),
        "counts": counts,
        "on_gpu": sum(f" PASSED {ON_GPU}" in line for line in output.splitlines()),
        "failed": device.failed(outcomes),
    }
    ok, reason = _judge(row)
    return {**row, "ok": ok, "reason": reason}


def in_short(row: Row) -> str:
    """A run's outcome in a few words."""
    counts = ", ".join(f"{n} {what.lower()}" for what, n in row["counts"].items() if n)
    verdict = {True: "ok", False: "FAILED", None: "not to its end"}[row["ok"]]
    return (
        f"{verdict}, {row['errors']} errors, {row['warnings']} warnings; "
        f"{counts or 'no test ran'}, {row['on_gpu']} on the GPU"
        + f"; {row['reason']}"
        * bool(row["reason"])
    )


def findings(text: str) -> dict[str, Any]:
    """Errors, warnings and the first reports in what the tool said.

    Where it was stopped before its closing line (``closed``) reports are counted instead.
    """
    lines = [line for line in text.splitlines() if line.startswith(_PREFIX)]
    reports: list[list[str]] = []
    inside = False
    trouble = ""
    for line in lines:
        words = line[len(_PREFIX) :]
        begins = words[:1] == " " and words[1:2].strip() != ""
        if begins and _REMARKS.match(words[1:]):
            if not trouble and _TROUBLE.match(words[1:]):
                trouble = words.strip()
            inside = False
        elif begins and not words.startswith(" and "):  # racecheck's other access
            reports.append([words.strip()])
            inside = True
        elif inside and words.strip():
            reports[-1].append(words.strip())
    errors = [int(n) for n in re.findall(r"^=+ ERROR SUMMARY: (\d+) errors?", text, re.M)]
    hazards = re.findall(
        r"^=+ RACECHECK SUMMARY: \d+ hazards? displayed \((\d+) errors?, (\d+) warnings?\)",
        text,
        re.M,
    )
    closed = bool(errors or hazards)
    errors += [int(error) for error, _ in hazards]
    return {
        "closed": closed,
        "errors": max(errors) if closed else len(reports),
        "warnings": max((int(warning) for _, warning in hazards), default=0),
        "reports": ["\n".join(report[:REPORT_LINES]) for report in reports[:MOST_REPORTS]],
        "trouble": trouble,
    }


def _judge(row: Row) -> tuple[bool | None, str]:
    """Whether the kernels are clean, and why not."""
    counts, code = row["counts"], row["exit_code"]
    late = counts.get(LATE, 0)
    if row["errors"]:
        return False, f"{row['errors']} error{'s' * (row['errors'] > 1)}"
    if row["failed"]:
        return False, f"{len(row['failed'])} tests failed"
    if code is None:
        return None, f"stopped after {row['seconds']:.0f} s, nothing found so far"
    if row["trouble"]:
        return False, row["trouble"]
    if not row["closed"]:
        return False, f"no closing line, exit status {code}"
    if code != 0:
        return False, f"exit status {code}"
    if late:
        return None, f"out of time for {late} tests, nothing found in the others"
    if not row["on_gpu"]:
        return False, "no test ran on the GPU"
    return True, ""
