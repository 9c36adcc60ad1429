"""``effkernels info``: what is installed, what was built, and what this machine can run."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from . import __version__, backends, native
from .build_info import BUILD_INFO, read_build_info

__all__ = ["collect", "render"]

# Instruction sets that matter to these kernels or to torch's, as /proc/cpuinfo spells them.
CPU_FEATURES = (
    *("sse4_2", "avx", "f16c", "fma", "avx2", "avx_vnni"),
    *("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni", "avx512_bf16", "avx512_fp16"),
    *("amx_tile", "amx_bf16", "amx_int8"),
    *("asimd", "asimdhp", "asimddp", "bf16", "i8mm", "sve", "sve2"),
)


def collect() -> dict[str, Any]:
    """Everything that ``effkernels info`` shows, as plain data (for ``--json``)."""
    name, features = _cpu()
    environment = {
        variable: value for variable, value in os.environ.items() if variable.startswith("EFFKERN")
    }
    return {
        "versions": {
            "effkernels": __version__,
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            **{package: _version(package) for package in ("torchvision", "numpy", "triton")},
        },
        "build": read_build_info(),
        "cpu": {
            "name": name,
            "instruction_sets": features,
            "kernels_for": native.cpu_isas(),
            "in_use": native.cpu_isa() or None,
        },
        "backends": {name: asdict(backend) for name, backend in backends().items()},
        "threads": {
            "torch.get_num_threads": torch.get_num_threads(),
            "torch.get_num_interop_threads": torch.get_num_interop_threads(),
            "cores this process may use": _cores(),
            **{name: os.environ.get(name) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")},
        },
        "environment": dict(sorted(environment.items())),
    }


def render(info: dict[str, Any]) -> str:
    """``collect()``'s result as text, one section per key."""
    cpu, threads = info["cpu"], info["threads"]
    sections = {
        "versions": info["versions"].items(),
        "build": _build_rows(info["build"]),
        "cpu": [
            ("name", cpu["name"]),
            ("instruction sets", " ".join(cpu["instruction_sets"]) or "unknown"),
            ("kernels for", ", ".join(cpu["kernels_for"]) or "none"),
            ("in use", cpu["in_use"] or "none"),
        ],
        "backends": [
            (name, f"{'available' if backend['available'] else 'not available'}: {why}")
            for name, backend in info["backends"].items()
            for why in [backend["reason"]]
        ],
        "threads": [(key, "not set" if value is None else value) for key, value in threads.items()],
        "environment": info["environment"].items() or [("EFFKERNELS_*", "none set")],
    }
    return "\n\n".join(_section(title, rows) for title, rows in sections.items())


def _build_rows(build: dict[str, Any] | None) -> list[tuple[str, str]]:
    if build is None:
        return [("nothing built", f"{BUILD_INFO.name} is missing; run pip install -e .")]
    rows = [("requested", f"EFFKERNELS_BUILD={build['requested']}")]
    for name, module in build["modules"].items():
        if not module["built"]:
            rows.append((f"{name} kernels", f"not built: {module['reason']}"))
            continue
        rows.append((f"{name} kernels", f"built against torch {build['torch']}"))
        rows.append(("  compiler", module["compiler"]))
        rows.append(("  flags", module["flags"]))
        for isa, flags in module.get("isa_flags", {}).items():  # the CPU module's
            rows.append((f"  flags {isa}", flags or "none more"))
        if "architectures" in module:  # the CUDA module's
            rows.append(("  architectures", ", ".join(module["architectures"])))
    return rows


def _section(title: str, rows: Iterable[tuple[str, Any]]) -> str:
    rows = list(rows)
    width = max(len(name) for name, _ in rows)
    return "\n".join([title, *(f"  {name:<{width}}  {value}" for name, value in rows)])


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _cores() -> int | None:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def _cpu() -> tuple[str, list[str]]:
    """The CPU's name and those of CPU_FEATURES that it has."""
    try:
        cpuinfo = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine(), []
    name = re.search(r"^model name\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
    present = set(flags[1].split()) if flags else set()
    return (
        name[1].strip() if name else platform.machine(),
        [feature for feature in CPU_FEATURES if feature in present],
    )
