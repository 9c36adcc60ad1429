"""What the device is and what it can do: the stages ``build`` and ``ceilings``."""

from __future__ import annotations

import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from ..gpus import GPUS, Rates
from .timing import Stopwatch
from .worker import Row

ROOT = Path(__file__).resolve().parents[2]
CUDA_TOOLS = Path("/usr/local/cuda/bin")  # where they are if not on PATH
SAMPLES = 30
SMI_FIELDS = (
    *("name", "driver_version", "vbios_version", "memory.total", "power.limit", "power.draw"),
    *("temperature.gpu", "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem"),
    "clocks_event_reasons.active",
)


def run_command(
    command: list[str],
    timeout_s: float,
    environment: dict[str, str] | None = None,
    grace_s: float = 0.0,
) -> tuple[int | None, str]:
    """Exit status (None: it was stopped at its time limit) and all that was printed.

    With ``grace_s`` it is interrupted at the limit and killed only after so many more seconds:
    tools then still say what they found.
    """
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # so that its helpers end with it
        # What was started in the background ignores interrupts, and so would its children.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL) if grace_s else None,
    )
    try:
        output, _ = process.communicate(timeout=max(timeout_s, 1.0))
        return process.returncode, output
    except subprocess.TimeoutExpired:
        if grace_s:
            os.killpg(process.pid, signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                process.communicate(timeout=grace_s)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        return None, output


def find_tool(name: str) -> str | None:
    """The path of a tool that comes with CUDA."""
    return shutil.which(name) or shutil.which(name, path=str(CUDA_TOOLS))


def build(timeout_s: float) -> dict[str, Any]:
    """Compile this checkout's native modules; install it first where it is not.

    Without build isolation and dependencies: no network is needed.
    """
    installed = find_spec("effkernels.models") is not None
    command = [sys.executable, "-m", "build_tools"]
    if not installed:
        command = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps"]
        command += ["--quiet", "--disable-pip-version-check", "-e", "."]
    start = time.monotonic()
    capability = os.environ.get("TORCH_CUDA_ARCH_LIST") or _capability()
    environment = {**os.environ, "TORCH_CUDA_ARCH_LIST": capability} if capability else None
    code, output = run_command(command, timeout_s, environment)
    return {
        "nvcc": find_tool("nvcc"),
        "architectures": capability,
        "command": " ".join(command[1:]),
        "exit_code": code,
        "seconds": time.monotonic() - start,
        "output": output[-4000:],
    }


def _capability() -> str:
    """The first GPU's, "9.0", if there is one; this process does not touch it."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return ""
    query = [tool, "--query-gpu=compute_cap", "--format=csv,noheader", "--id=0"]
    code, output = run_command(query, 10)
    return output.strip() if code == 0 else ""


def environment(device: str) -> Iterator[Row]:
    """One row: versions, the device and its state."""
    import effkernels as ek

    row: Row = {
        "backends": {name: [b.available, b.reason] for name, b in ek.backends().items()},
        "cudnn": torch.backends.cudnn.version(),
        "cuda": torch.version.cuda,
        "triton": _triton_version(),
        "device": "cpu",
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties()
        row |= {
            "device": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "processors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "l2_bytes": properties.L2_cache_size,
            "nvidia_smi": smi(),
        }
    yield row


def smi() -> dict[str, str]:
    """What nvidia-smi says of the first device; nothing where it is not there."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return {}
    query = f"--query-gpu={','.join(SMI_FIELDS)}"
    code, output = run_command([tool, query, "--format=csv,noheader", "--id=0"], 10)
    values = [value.strip() for value in output.strip().split(",")]
    if code != 0 or len(values) != len(SMI_FIELDS):
        return {"error": output.strip()[:200]}
    return dict(zip(SMI_FIELDS, values, strict=True))


def _triton_version() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    return triton.__version__


def measure_copy(device: str, size: int) -> Iterator[Row]:
    """Bytes a second of a copy, and of an addition of a number, both read and written."""
    source = torch.randn(size // 4, device=device)
    target = torch.empty_like(source)
    functions: dict[str, Callable[[], Any]] = {
        "copy": lambda: target.copy_(source),
        "pointwise": lambda: torch.add(source, 1.0, out=target),
    }
    for name, function in functions.items():
        seconds = _median_seconds(device, function)
        yield {"name": name, "per_s": 2 * size / seconds, "unit": "byte", "bytes": 2 * size}


def measure_product(device: str, dtype: str, side: int) -> Iterator[Row]:
    """Operations a second of a square product of random numbers; dtype ``tf32`` is float32's."""
    type_ = torch.float32 if dtype == "tf32" else getattr(torch, dtype)
    left, right = (torch.randn(side, side, device=device).to(type_) for _ in range(2))
    output = torch.empty(side, side, dtype=type_, device=device)
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = dtype == "tf32"
    try:
        seconds = _median_seconds(device, lambda: torch.mm(left, right, out=output))
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    yield {"name": dtype, "per_s": 2 * side**3 / seconds, "unit": "FLOP", "side": side}


def _median_seconds(device: str, function: Callable[[], Any]) -> float:
    stopwatch = Stopwatch(device)
    stopwatch.samples(function, 5)
    return statistics.median(stopwatch.samples(function, SAMPLES)) / 1e3


def rates_of(rows: list[Row], device_name: str) -> Rates:
    """The measured ceilings; vector arithmetic as published, which bounds hardly anything."""
    measured = {row["name"]: row["per_s"] for row in rows if "per_s" in row}
    known = next((r for name, r in GPUS.items() if name in device_name.lower()), GPUS["h100"])
    copies = [measured[name] for name in ("copy", "pointwise") if name in measured]
    products = [measured[n] for n in ("bfloat16", "float32") if n in measured]
    vector = known.vector_flops_per_s
    if not copies or not products:
        return Rates(known.bytes_per_s, known.matrix_flops_per_s, vector, f"not: {known.source}")
    return Rates(max(copies), max(products), vector, "measured")


def parity(arguments: tuple[str, ...], on_gpu: bool, log: Path, timeout_s: float) -> dict[str, Any]:
    """Run pytest in a process of its own; how many tests came out how, and which failed."""
    missing = [name for name in ("pytest", "hypothesis") if find_spec(name) is None]
    if missing:
        reason = f"{' and '.join(missing)} cannot be imported"
        return {"ok": False, "reason": reason, "exit_code": None, "counts": {}, "failed": []}
    command = pytest_command(arguments)
    if on_gpu and find_spec("xdist") is not None:
        # One GPU serves them all; most of the time goes into compiling.
        command += ["-n", str(min(8, os.cpu_count() or 1)), "--dist", "worksteal"]
    environment = dict(os.environ)
    if on_gpu:
        environment.pop("TRITON_INTERPRET", None)
    start = time.monotonic()
    code, output = run_command(command, timeout_s, environment)
    log.write_text(output)
    outcomes = outcomes_of(output)
    counts = count(outcomes)
    files: dict[str, dict[str, int]] = {}
    for test, outcome in outcomes.items():
        of_file = files.setdefault(test.partition("::")[0], {})
        of_file[outcome] = of_file.get(outcome, 0) + 1
    reason = ""
    if code is None:
        reason = f"stopped after {timeout_s:.0f} s, not every test had run"
    elif code != 0:
        tail = output.strip().splitlines()[-1:] or [""]
        reason = f"pytest ended with exit status {code}: {tail[0].strip('= ')}"
    elif not counts["PASSED"]:
        reason = "no test passed"
    return {
        "ok": not reason,
        "reason": reason,
        "command": " ".join(command[1:]),
        "exit_code": code,
        "seconds": time.monotonic() - start,
        "counts": counts,
        "files": files,
        "failed": failed(outcomes),
    }


def pytest_command(arguments: Sequence[str]) -> list[str]:
    """pytest in this Python, a line for every test."""
    command = [sys.executable, "-m", "pytest", *arguments, "-v", "--tb=short", "--color=no"]
    return [*command, "-p", "no:cacheprovider"]


def outcomes_of(output: str) -> dict[str, str]:
    """Every test's outcome, from what ``pytest -v`` printed."""
    outcomes: dict[str, str] = {}
    for line in output.splitlines():
        found = _outcome(line)
        if found is not None:
            outcomes.setdefault(*found)
    return outcomes


def count(outcomes: Mapping[str, str]) -> dict[str, int]:
    """How many tests came out how."""
    counts = {"PASSED": 0, "FAILED": 0, "ERROR": 0, "SKIPPED": 0}
    for outcome in outcomes.values():
        counts[outcome] = counts.get(outcome, 0) + 1
    return counts


def failed(outcomes: Mapping[str, str]) -> list[str]:
    """The tests that did not come out well."""
    return [test for test, what in outcomes.items() if what in ("FAILED", "ERROR")]


def _outcome(line: str) -> tuple[str, str] | None:
    """(test, outcome) of a line of ``pytest -v``, with or without xdist."""
    found = re.match(r"\[gw\d+\]\s+\[\s*\d+%\]\s+([A-Z]+)\s+(\S+::.+?)\s*$", line)
    if found:
        return found[2], found[1]
    found = re.match(r"(\S+::.+?)\s+([A-Z]+)\b(?:\s+\(.*\))?\s*(?:\[\s*\d+%\])?\s*$", line)
    return (found[1], found[2]) if found else None
