"""Targets on a GPU: rows of ``benchmarks/targets/gpu.csv``, and what was measured for each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from ..gpus import Rates
from ..providers import CONTROL
from ..tables import CellError, read_rows
from .worker import Row

FILE = Path(__file__).parents[1] / "targets" / "gpu.csv"
QUANTITIES = ("ms", "images/s", "share of copy", "times as fast", "activation memory")
COMPARED = ("times as fast", "activation memory")  # with a baseline
BOUNDS = ("at least", "at most")


@dataclass(frozen=True)
class GpuTarget:
    """A bound of one quantity; ``case``, ``provider`` and ``baseline`` may have wildcards.

    Of several providers or baselines the fastest counts, of several cases the one that is worst.
    """

    stage: str
    case: str
    batch: int
    provider: str
    quantity: str
    baseline: str  # measured in the same case, in turns; empty for quantities of one provider
    bound: str
    value: float

    def __post_init__(self) -> None:
        for column, accepted in (
            ("stage", ("kernels", "inference", "training")),
            ("quantity", QUANTITIES),
            ("bound", BOUNDS),
        ):
            given = getattr(self, column)
            if given not in accepted:
                raise CellError(column, f"{given!r} is given, accepted: {', '.join(accepted)}")
        if bool(self.baseline) != (self.quantity in COMPARED):
            wanted = "one" if self.quantity in COMPARED else "none"
            raise CellError("baseline", f"{self.baseline!r} is given, {self.quantity} has {wanted}")

    @property
    def label(self) -> str:
        """In words."""
        against = {
            "times as fast": f" as {self.baseline}",
            "activation memory": f" ÷ that of {self.baseline}",
        }
        return f"{self.provider}: {self.quantity}{against.get(self.quantity, '')}"

    def measured(self, rows: Iterable[Row], rates: Rates) -> tuple[float, str] | None:
        """The worst value and the case that it comes from; None if nothing was measured."""
        tasks: dict[str, list[Row]] = {}
        for row in rows:
            if row.get("batch") == self.batch and fnmatchcase(row["case"], self.case):
                tasks.setdefault(row["task"], []).append(row)
        found = []
        for task in tasks.values():
            value = self._value(task, rates)
            if value is not None:
                found.append((value, task[0]["case"]))
        if not found:
            return None
        worst = min if self.bound == "at least" else max
        if self.stage != "kernels":  # the same case may have been measured by several tasks
            worst = max if self.bound == "at least" else min
        return worst(found)

    def unmeasured(self, rows: Iterable[Row]) -> int:
        """How many matching cases have no time of the provider: failures are not forgotten."""
        return sum(
            row.get("batch") == self.batch
            and fnmatchcase(row["case"], self.case)
            and fnmatchcase(row["provider"], self.provider)
            and row["provider"] != CONTROL
            and row["ms_median"] is None
            for row in rows
        )

    def is_met(self, value: float) -> bool:
        """Whether ``value`` keeps the bound."""
        return value >= self.value if self.bound == "at least" else value <= self.value

    def _value(self, task: list[Row], rates: Rates) -> float | None:
        own, other = _fastest(task, self.provider), _fastest(task, self.baseline)
        if own is None or (self.baseline and other is None):
            return None
        if self.quantity == "ms":
            return own["ms_median"]
        if self.quantity == "images/s":
            return own["images_per_s"]
        if self.quantity == "share of copy":
            return own["bytes"] / (own["ms_median"] / 1e3) / rates.bytes_per_s
        assert other is not None
        if self.quantity == "times as fast":
            return other["ms_median"] / own["ms_median"]
        if not own["activation_bytes"] or not other["activation_bytes"]:
            return None
        return own["activation_bytes"] / other["activation_bytes"]


def read_gpu_targets(path: Path = FILE) -> list[GpuTarget]:
    """The rows of the file.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: for a bad row, naming file, line and column.
    """
    return read_rows(path, GpuTarget)


def check(
    targets: Iterable[GpuTarget], stages: Mapping[str, list[Row]], rates: Rates
) -> list[dict[str, Any]]:
    """A dict per target: what it says, what was measured, and whether it is met (None: unknown)."""
    found = []
    for target in targets:
        rows = stages.get(target.stage, [])
        measured = target.measured(rows, rates)
        failed = target.unmeasured(rows) if target.stage == "kernels" else 0
        met = None if measured is None else target.is_met(measured[0]) and not failed
        found.append(
            {
                "stage": target.stage,
                "case": target.case,
                "batch": target.batch,
                "target": f"{target.label} {target.bound} {target.value:g}",
                "measured": None if measured is None else measured[0],
                "worst": "" if measured is None else measured[1],
                "failed_cases": failed,
                "met": met,
            }
        )
    return found


def _fastest(task: list[Row], pattern: str) -> Row | None:
    timed = [
        row
        for row in task
        if row["ms_median"] and row["provider"] != CONTROL and fnmatchcase(row["provider"], pattern)
    ]
    return min(timed, key=lambda row: row["ms_median"], default=None)
