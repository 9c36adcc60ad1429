"""Targets: how many times as fast as a rival a provider has to be."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from tabulate import tabulate

from .providers import CONTROL, OWN, PROVIDERS
from .records import CONTROL_RANGE, Case, Record, Results, control_ratio, is_fair
from .tables import CellError, read_rows

SUITE = "peers"
FASTEST_RIVAL = "fastest rival"


@dataclass(frozen=True)
class Target:
    """``baseline``'s median over ``provider``'s must be at least ``ratio``."""

    case: str
    batch: int
    threads: int
    provider: str
    baseline: str  # a provider, or the fastest of the rivals
    baseline_threads: int
    ratio: float

    suite: ClassVar[str] = SUITE
    providers: ClassVar[tuple[str, ...]] = tuple(PROVIDERS)

    def __post_init__(self) -> None:
        for column, more in (("provider", ()), ("baseline", (FASTEST_RIVAL,))):
            accepted = (*self.providers, *more)
            if getattr(self, column) not in accepted:
                message = f"{getattr(self, column)!r} is given, accepted: {', '.join(accepted)}"
                raise CellError(column, message)
        for column in ("batch", "threads", "baseline_threads"):
            if getattr(self, column) < 1:
                raise CellError(column, f"{getattr(self, column)} is given, >= 1 is accepted")

    def cases(self) -> tuple[Case, Case]:
        """Where the provider and its baseline are measured."""
        provider = Case(self.suite, self.case, "float32", self.batch, self.threads)
        return provider, provider._replace(threads=self.baseline_threads)

    def measured(self, results: Results) -> tuple[float | None, str]:
        """The ratio, or None if something was not timed, and the baseline's name."""
        here, there = self.cases()
        own = results.of(here).get(self.provider)
        baseline = baseline_of(results.of(there), self.baseline)
        if own is None or not own.ms_median or baseline is None or not baseline.ms_median:
            return None, self.baseline
        return baseline.ms_median / own.ms_median, baseline.provider


def read_targets(path: Path) -> list[Target]:
    """The rows of a CSV file.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: for a bad row, naming file, line and column.
    """
    return read_rows(path, Target)


def baseline_of(records: dict[str, Record], name: str) -> Record | None:
    """The record called ``name``; of FASTEST_RIVAL the quickest rival's."""
    if name != FASTEST_RIVAL:
        return records.get(name)
    return fastest_of(records, [name for name in records if name not in (*OWN, CONTROL)])


def fastest_of(records: dict[str, Record], names: Iterable[str]) -> Record | None:
    """The quickest of the providers ``names``, of those that were timed."""
    timed = [records[name] for name in names if name in records and records[name].ms_median]
    return min(timed, key=lambda record: record.ms_median or 0.0, default=None)


def check(results: Results, targets: list[Target]) -> tuple[str, bool]:
    """A table target | measured | ok, with every case's control, and whether all are met."""
    rows = []
    for target in targets:
        ratio, baseline = target.measured(results)
        met = ratio is not None and ratio >= target.ratio
        if target.baseline_threads != target.threads:
            baseline += f" at {target.baseline_threads}"
        rows.append(
            (
                str(target.cases()[0]),
                f"{baseline} / {target.provider}",
                ">=",
                target.ratio,
                ratio,
                met,
            )
        )
    for case in dict.fromkeys(case for target in targets for case in target.cases()):
        records = results.of(case)
        ratio = control_ratio(records)
        fair = ratio is not None and is_fair(ratio)
        repeated = records[CONTROL].control_of if CONTROL in records else "?"
        rows.append((str(case), f"{CONTROL} / {repeated}", "+-", CONTROL_RANGE, ratio, fair))
    table = tabulate(
        [(*row[:-1], "ok" if row[-1] else "MISSED") for row in rows],
        headers=["case", "ratio", "", "target", "measured", ""],
        floatfmt=".2f",
        missingval="not measured",
    )
    return table, all(row[-1] for row in rows)
