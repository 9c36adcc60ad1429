"""The limits of memory, first calls, bfloat16 and threads; figures themselves are not asserted."""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks import limits
from benchmarks.__main__ import TARGETS, main
from benchmarks.limits import LIMITS, Limit, count_differing, peaks_above, read_limits, table
from benchmarks.providers import NotAvailable
from benchmarks.records import LimitRecord, Results
from benchmarks.report import markdown

SMALL = "efficientnet_b0@32"
MB = 1 << 20
OF_FREEZE = [name for name in LIMITS if "training" not in name]  # test_training.py has the other
HEADER = "limit,case,batch,threads,at_most\n"
DIFFER = "4 threads at once: results that differ"


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Measuring processes start in seconds; here their functions are called."""

    def call(threads: int, function: Callable, *arguments: Any, **options: Any) -> Any:
        return function(*arguments)

    monkeypatch.setattr(limits, "run_with_threads", call)
    yield
    gc.unfreeze()


def test_every_limit_is_measured_once(in_process: None, monkeypatch: pytest.MonkeyPatch) -> None:
    results = Results({})
    wanted = [Limit(name, SMALL, 1, 1, 1e9) for name in OF_FREEZE]
    try:
        peaks_above([int])
    except NotAvailable:
        wanted = [limit for limit in wanted if "memory" not in limit.limit]
    assert limits.run(wanted, results, rounds=1) == []
    for limit in wanted:
        record = results.limit(limit.key)
        assert record is not None and record.value >= 0
        over, under, *_ = record.figures.values()
        if "time" in limit.limit:
            expected = under / over if "bfloat16" in limit.limit else over / under
            assert record.value == pytest.approx(expected)
    differ = results.limit(wanted[-1].key)
    assert differ is not None and differ.figures == {"differ": 0, "of": 32}

    def broken(*arguments: Any) -> Any:
        raise AssertionError("measured again")

    monkeypatch.setattr(limits, "prepare", broken)
    fair = [limit for limit in wanted if results.has_limit(limit.key)]
    assert len(fair) >= len(wanted) - 1  # times of a busy machine may be off
    assert limits.run(fair, results, rounds=1) == []


def test_a_wrong_result_is_no_figure(in_process: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(network: nn.Module) -> Callable[[Tensor], Tensor]:
        return lambda image: network(image) * 1.01

    monkeypatch.setattr(limits.ek, "freeze", wrong)
    results = Results({})
    wanted = [Limit(name, SMALL, 1, 1, 1e9) for name in OF_FREEZE]
    failures = limits.run(wanted, results, rounds=1)
    assert len(failures) == len(wanted)
    assert "freeze is wrong" in failures[-1]
    assert results.limits == []


def test_a_buffer_kept_between_calls_counts_in_both() -> None:
    kept: list[Tensor] = []

    def keeps() -> None:
        if not kept:
            kept.append(torch.ones(64 * MB // 4))

    def passes() -> None:
        torch.ones(64 * MB // 4)

    def nothing() -> None:
        pass

    try:
        idle = peaks_above([nothing, nothing])
    except NotAvailable as error:
        pytest.skip(str(error))
    assert max(idle) < 8 * MB
    for function in (passes, keeps):
        assert all(60 * MB < peak < 80 * MB for peak in peaks_above([function, function]))
    first, after = peaks_above([passes, nothing])
    assert first > 60 * MB and after < 16 * MB


def test_a_shared_buffer_is_noticed() -> None:
    images = [torch.full((4,), float(index)) for index in range(4)]
    buffer = torch.empty(4)

    def shares(image: Tensor) -> Tensor:
        buffer.copy_(image)
        time.sleep(0.001)
        return buffer.clone()

    assert count_differing(lambda image: image + 1, images, [image + 1 for image in images]) == 0
    assert count_differing(shares, images, images) > 0


def record(value: float, control: float | None = None) -> LimitRecord:
    return LimitRecord(DIFFER, "efficientnet_b0", 1, 2, value, "ms", {"freeze": 3.0}, control)


@pytest.mark.parametrize(
    ("measured", "met"),
    [
        (record(0.5), True),
        (record(0.4, control=1.04), True),
        (record(0.51), False),
        (record(0.4, control=1.06), False),  # unfair
        (record(float("nan")), False),
        (None, False),
    ],
)
def test_table(measured: LimitRecord | None, met: bool) -> None:
    results = Results({})
    if measured is not None:
        results.add_limit(measured)
    text, all_met = table(results, [Limit(DIFFER, "efficientnet_b0", 1, 2, 0.5)])
    assert all_met is met
    assert ("MISSED" in text) is not met
    assert ("not measured" in text) is (measured is None)


def test_check_fails_where_a_limit_is_missed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One limit of the network that is asked for; the other network's is left alone."""
    monkeypatch.setattr("benchmarks.inference.run", lambda *arguments: [])  # speed
    file, out = tmp_path / "limits.csv", tmp_path / "out.json"
    file.write_text(f"{HEADER}{DIFFER},{SMALL},1,1,0\n{DIFFER},resnet18,1,1,0\n")
    arguments = ["peers", "--models", SMALL, "--rounds", "1", "--budget-s", "1", "--check"]
    arguments += ["--json", str(out), "--limits", str(file), "--providers"]
    assert main([*arguments, "freeze"]) == 0
    printed = capsys.readouterr().out
    assert "differ 0, of 32" in printed and "resnet18" not in printed
    (found,) = json.loads(out.read_text())["limits"]
    assert (found["limit"], found["value"]) == (DIFFER, 0)
    content = json.loads(out.read_text())
    out.write_text(json.dumps({**content, "limits": [{**found, "value": 1.0}]}))
    assert main([*arguments, "freeze"]) == 1
    assert "MISSED" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "accepted"),
    [
        ([], lambda limit: True),
        (["--models", "efficientnet_b4"], lambda limit: limit.case == "efficientnet_b4"),
        (
            ["--models", "efficientnet_b0,resnet18", "--batch", "1", "--threads", "2"],
            lambda limit: (limit.case, limit.batch, limit.threads) == ("efficientnet_b0", 1, 2),
        ),
        (["--models", "efficientnet_b4@64"], lambda limit: False),
        (["--providers", "eager"], lambda limit: False),
    ],
)
def test_which_limits_are_run(
    arguments: list[str], accepted: Callable[[Limit], bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[list[Limit]] = []
    monkeypatch.setattr("benchmarks.inference.run", lambda *arguments: [])
    monkeypatch.setattr(limits, "run", lambda found, *arguments: runs.append(found) or [])
    assert main(["peers", *arguments]) == 0
    assert runs == [[limit for limit in read_limits(TARGETS / "cpu-limits.csv") if accepted(limit)]]


def test_nothing_to_check_is_said_before_anything_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "limits.csv"
    file.write_text(f"{HEADER}{DIFFER},{SMALL},8,1,0\n")
    monkeypatch.setattr("benchmarks.inference.run", lambda *arguments: pytest.fail("measures"))
    arguments = ["peers", "--models", SMALL, "--batch", "1", "--check", "--limits", str(file)]
    assert main(arguments) == 2
    assert "no target is set" in capsys.readouterr().err


def test_committed_limits_are_those_that_were_promised() -> None:
    found = read_limits(TARGETS / "cpu-limits.csv")
    assert {limit.limit for limit in found} == set(OF_FREEZE)
    bounds = {(limit.limit, limit.case, limit.batch): limit.at_most for limit in found}
    for call in ("first", "warm"):
        assert bounds[f"{call} call: memory / eager", "efficientnet_b4", 8] == 0.5
    for case, batch in (("efficientnet_b0", 1), ("efficientnet_b4", 1), ("efficientnet_b4", 8)):
        assert bounds["first call: time / warm call", case, batch] == 5
    for batch in (1, 8):
        assert bounds["bfloat16: time / float32", "efficientnet_b0", batch] == 1


@pytest.mark.parametrize(
    ("row", "column"),
    [
        (f"nothing,{SMALL},1,1,1", "limit"),
        (f"{DIFFER},efficientnet_b99,1,1,1", "case"),
        (f"{DIFFER},{SMALL},0,1,1", "batch"),
        (f"{DIFFER},{SMALL},1,1,few", "at_most"),
    ],
)
def test_a_bad_row_is_named(row: str, column: str, tmp_path: Path) -> None:
    file = tmp_path / "bad.csv"
    file.write_text(f"{HEADER}{row}\n")
    with pytest.raises(ValueError, match=f"bad.csv, line 2, column {column}"):
        read_limits(file)


def test_limits_are_reported_where_they_were_measured(tmp_path: Path) -> None:
    header = {"cpu": {"name": "a", "cores": 1, "effkernels_isa": "b"}, "versions": {}}
    results = Results({**header, "commit": "c", "date": "d", "malloc": "e"}, tmp_path / "out.json")
    wanted = [Limit(DIFFER, "efficientnet_b0", 1, threads, 0.5) for threads in (1, 2)]
    assert DIFFER not in markdown(results, wanted)
    results.add_limit(record(0.25))
    lines = [line for line in markdown(results, wanted).splitlines() if DIFFER in line]
    assert len(lines) == 1 and "0.25" in lines[0] and "<= 0.5" in lines[0]
