"""The timing loop of the benchmarks."""

from __future__ import annotations

import time

import pytest

from benchmarks.harness import Timing, time_fairly


def test_every_provider_rests_and_loses_its_first_call() -> None:
    events: list[str] = []

    def provider(name: str) -> None:
        events.append(name)
        time.sleep(0.01)

    steps: list[str] = []
    timings = time_fairly(
        {"a": lambda: provider("a"), "b": lambda: provider("b")},
        rounds=3,
        calls=4,
        pause_s=0.0,
        on_step=steps.append,
    )
    assert list(timings) == ["a", "b"]
    assert [len(timing.milliseconds) for timing in timings.values()] == [12, 12]
    assert steps == ["a", "b", "b", "a", "a", "b"]
    assert events == [name for name in steps for _ in range(5)]


def test_first_call_after_the_pause_is_not_counted() -> None:
    calls: list[None] = []

    def cold_then_warm() -> None:
        calls.append(None)
        time.sleep(0.2 if len(calls) % 4 == 1 else 0.01)

    timing = time_fairly({"it": cold_then_warm}, rounds=2, calls=3, pause_s=0.0)["it"]
    assert max(timing.milliseconds) < 150


def test_one_provider_twice_is_equally_fast() -> None:
    def work() -> None:
        time.sleep(0.01)

    timings = time_fairly({"one": work, "same": work}, rounds=5, pause_s=0.0)
    assert 0.8 < timings["one"].median / timings["same"].median < 1.25


def test_quick_functions_are_called_more_often() -> None:
    timings = time_fairly({"quick": lambda: time.sleep(0.001)}, rounds=1, calls=1, pause_s=0.0)
    assert len(timings["quick"].milliseconds) > 5


def test_statistics() -> None:
    timing = Timing((5.0, 1.0, 2.0, 4.0, 3.0))
    assert timing.median == 3.0
    assert [timing.percentile(share) for share in (0.0, 0.2, 0.8, 1.0)] == [1.0, 2.0, 5.0, 5.0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"providers": {}}, "providers is empty"),
        ({"providers": {"a": int}, "rounds": 0}, "rounds is 0"),
        ({"providers": {"a": int}, "calls": -1}, "calls is -1"),
    ],
)
def test_bad_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        time_fairly(**arguments)
