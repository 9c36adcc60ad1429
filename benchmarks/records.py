"""Results as JSON: a header and one record per provider and case, or limit, written at once."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

CONTROL_RANGE = 0.05
NOT_COMPARED = ("date", "rates")  # of the header, when a file is continued


class Case(NamedTuple):
    """What is run, by whichever provider."""

    suite: str
    case: str
    dtype: str
    batch: int
    threads: int
    device: str = "cpu"

    def __str__(self) -> str:
        plural = "s" if self.threads > 1 else ""
        where = f"{self.threads} thread{plural}" if self.device == "cpu" else self.device
        return f"{self.case}, {self.dtype}, batch {self.batch}, {where}"


@dataclass(frozen=True)
class Record:
    """One provider's time for one case; a provider that was not timed has a ``note`` instead."""

    suite: str
    case: str
    provider: str
    device: str
    dtype: str
    threads: int
    batch: int
    ms_median: float | None
    ms_p20: float | None
    ms_p80: float | None
    images_per_s: float | None
    bytes: int  # input, output and weights: what has to move at least
    flops: int  # two per multiply-add
    floor_ms: float  # at this machine's own sgemm and copy rates
    rel_err: float | None  # of the output's norm, against float64
    control_of: str = ""  # the provider that this one is once more
    note: str = ""
    peak_bytes: int | None = None  # on a GPU: allocated during a call, above what was before it
    activation_bytes: int | None = None  # training: kept between forward and backward

    @property
    def key(self) -> Case:
        return Case(self.suite, self.case, self.dtype, self.batch, self.threads, self.device)


class LimitKey(NamedTuple):
    """Which number, of what."""

    limit: str
    case: str
    batch: int
    threads: int

    def __str__(self) -> str:
        plural = "s" if self.threads > 1 else ""
        return f"{self.limit}, {self.case}, batch {self.batch}, {self.threads} thread{plural}"


@dataclass(frozen=True)
class LimitRecord:
    """A number that a limit bounds, and the figures that it was made of."""

    limit: str
    case: str
    batch: int
    threads: int
    value: float
    unit: str  # of the figures
    figures: dict[str, float] = field(default_factory=dict)
    control: float | None = None  # where times were compared: 1 if that was fair

    @property
    def key(self) -> LimitKey:
        return LimitKey(self.limit, self.case, self.batch, self.threads)

    @property
    def is_fair(self) -> bool:
        return is_fair(self.control)


class Results:
    """Records by case, in memory and, given a path, in a file.

    Args:
        header: versions and hardware.
        path: None, or a JSON file. One that is there is continued.
        fresh: start over instead.

    Raises:
        ValueError: if the file is no results file, or was measured with other versions or on
            another machine.
    """

    def __init__(self, header: dict[str, Any], path: Path | None = None, fresh: bool = False):
        self.header = header
        self.path = path
        self.records: list[Record] = []
        self.limits: list[LimitRecord] = []
        if path is not None and path.exists() and not fresh:
            old, self.records, self.limits = load(path)
            for key in header.keys() - set(NOT_COMPARED):
                if old.get(key) != header[key]:
                    raise ValueError(
                        f"{path} was measured with another {key} ({old.get(key)}, "
                        f"now {header[key]}): --fresh starts over"
                    )
            self.header = old

    def add(self, records: Iterable[Record]) -> None:
        """Put in ``records``, in place of older ones of the same case and provider."""
        new = {(record.key, record.provider): record for record in records}
        kept = [record for record in self.records if (record.key, record.provider) not in new]
        self.records = kept + list(new.values())
        self._write()

    def add_limit(self, record: LimitRecord) -> None:
        """Put in ``record``, in place of an older one of the same limit."""
        self.limits = [old for old in self.limits if old.key != record.key] + [record]
        self._write()

    def of(self, case: Case) -> dict[str, Record]:
        """The case's records by provider."""
        return {record.provider: record for record in self.records if record.key == case}

    def has(self, case: Case, providers: Iterable[str]) -> bool:
        """Whether all ``providers`` were measured, by a control within its range."""
        found = self.of(case)
        return is_fair(control_ratio(found)) and set(providers) <= found.keys()

    def limit(self, key: LimitKey) -> LimitRecord | None:
        """The limit's record, if it was measured."""
        return next((record for record in self.limits if record.key == key), None)

    def has_limit(self, key: LimitKey) -> bool:
        """Whether the limit was measured, by a control within its range."""
        record = self.limit(key)
        return record is not None and record.is_fair

    def _write(self) -> None:
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_name(self.path.name + ".part")
        content = {
            "header": self.header,
            "records": [asdict(record) for record in self.records],
            "limits": [asdict(record) for record in self.limits],
        }
        partial.write_text(json.dumps(content, indent=1) + "\n")
        os.replace(partial, self.path)


def load(path: Path) -> tuple[dict[str, Any], list[Record], list[LimitRecord]]:
    """Header, records and limits of a results file; files from before there were limits have none.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is no results file.
    """
    try:
        content = json.loads(path.read_text())
        records = [Record(**record) for record in content["records"]]
        limits = [LimitRecord(**record) for record in content.get("limits", [])]
        return content["header"], records, limits
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no results file: {error!r}") from None


def is_fair(ratio: float | None) -> bool:
    """Whether a control, where there is one, came out like what it repeats."""
    return ratio is None or abs(ratio - 1) <= CONTROL_RANGE


def control_ratio(records: dict[str, Record]) -> float | None:
    """The control's time over that of the provider that it repeats; 1 if timing is fair."""
    for record in records.values():
        same = records.get(record.control_of)
        if same is not None and same.ms_median and record.ms_median:
            return record.ms_median / same.ms_median
    return None
