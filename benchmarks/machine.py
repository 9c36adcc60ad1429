"""What figures were measured on: versions, processor, and how fast it computes and copies."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

import effkernels as ek
from effkernels.info import collect

from .processes import MALLOC

PACKAGES = ("torch", "torchvision", "timm", "onnx", "onnxruntime", "openvino")
SOURCES = ("csrc", "effkernels", "models", ":(glob)benchmarks/**/*.py")
GEMM_SIZE = 2048
COPY_BYTES = 1 << 28
REPEATS = 5


class Rates(NamedTuple):
    """Limits of a machine with some number of threads."""

    flops_per_s: float  # of a large sgemm, by whichever library is faster
    bytes_per_s: float  # of a large copy, read and written bytes together
    torch_mm_flops_per_s: float

    def floor_ms(self, flops: float, bytes: float) -> float:
        """What the work takes if it computes at sgemm speed and moves bytes at copy speed."""
        return max(flops / self.flops_per_s, bytes / self.bytes_per_s) * 1e3


def measure_rates() -> Rates:
    """The rates of torch's threads as they are set; takes a second or two.

    ``torch.mm`` is MKL's, which leaves AVX-512 unused on other vendors' processors: oneDNN's
    product, which convolutions use, can be twice as fast.
    """
    left, right = torch.randn(2, GEMM_SIZE, GEMM_SIZE)
    product = torch.empty(GEMM_SIZE, GEMM_SIZE)
    source = torch.ones(COPY_BYTES // 4)
    target = torch.empty_like(source)
    with torch.inference_mode():
        mm = gemm = _best_seconds(lambda: torch.mm(left, right, out=product))
        if torch.backends.mkldnn.is_available():
            linear = torch.ops.mkldnn._linear_pointwise
            gemm = min(mm, _best_seconds(lambda: linear(left, right, None, "none", [], "")))
        copy = _best_seconds(lambda: target.copy_(source))
    return Rates(2 * GEMM_SIZE**3 / gemm, 2 * COPY_BYTES / copy, 2 * GEMM_SIZE**3 / mm)


def header() -> dict[str, Any]:
    """Versions and hardware, as plain data for a results file."""
    info = collect()
    return {
        "versions": {
            "effkernels": ek.__version__,
            "python": platform.python_version(),
            **{package: _version(package) for package in PACKAGES},
        },
        "commit": _commit(),
        "cpu": {
            "name": info["cpu"]["name"],
            "cores": info["threads"]["cores this process may use"],
            "instruction_sets": info["cpu"]["instruction_sets"],
            "effkernels_isa": info["cpu"]["in_use"],
        },
        "system": platform.platform(),
        "malloc": " ".join(f"{name}={value}" for name, value in MALLOC.items()),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def _best_seconds(function: Callable[[], Any]) -> float:
    function()
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The last commit that changed what is measured, with ``-dirty`` if something since did."""
    try:
        last = _git("log", "-1", "--abbrev=12", "--format=%h", "--", *SOURCES)
        return last + "-dirty" * bool(_git("status", "--porcelain", "--", *SOURCES))
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(*arguments: str) -> str:
    run = subprocess.run(
        ["git", *arguments],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
        capture_output=True,
        text=True,
        check=True,
    )
    return run.stdout.strip()
