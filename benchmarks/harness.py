"""Fair timing of several ways to do one thing.

Thread pools keep spinning after a call returns and slow whatever runs next, so providers are not
interleaved call by call: before each one comes a pause, its first call is discarded, then a few
are timed. Rounds over all providers spread slow drifts (heat, neighbours) over all of them.
One provider entered twice under two names must come out with a ratio of 1.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

PAUSE_S = 0.1
MIN_S = 0.02  # a provider's calls per round take at least this long, so that timers do not matter


@dataclass(frozen=True)
class Timing:
    """Milliseconds per call, one value for each timed call."""

    milliseconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.milliseconds)

    def percentile(self, share: float) -> float:
        """The value that ``share`` (0 to 1) of the calls stay under."""
        ordered = sorted(self.milliseconds)
        return ordered[min(int(share * len(ordered)), len(ordered) - 1)]


def time_fairly(
    providers: Mapping[str, Callable[[], Any]],
    rounds: int = 7,
    calls: int = 3,
    pause_s: float = PAUSE_S,
    on_step: Callable[[str], None] = lambda name: None,
) -> dict[str, Timing]:
    """Time every provider.

    Args:
        providers: name -> function without arguments; compiled and warmed up before.
        rounds: passes over all providers; each starts with another provider.
        calls: timed calls per round and provider, at least; quick functions get more.
        pause_s: seconds of rest before each provider.
        on_step: called with a provider's name before its pause, for a progress line.

    Returns:
        name -> its timing, in the order of ``providers``.

    Raises:
        ValueError: if there is no provider, or ``rounds`` or ``calls`` is not positive.
    """
    if not providers:
        raise ValueError("time_fairly: providers is empty, at least one is accepted")
    for argument, value in (("rounds", rounds), ("calls", calls)):
        if value < 1:
            raise ValueError(f"time_fairly: {argument} is {value}, a positive integer is accepted")
    names = list(providers)
    samples: dict[str, list[float]] = {name: [] for name in names}
    for round_index in range(rounds):
        first = round_index % len(names)
        for name in names[first:] + names[:first]:
            on_step(name)
            samples[name] += _timed_calls(providers[name], calls, pause_s)
    return {name: Timing(tuple(values)) for name, values in samples.items()}


def _timed_calls(function: Callable[[], Any], calls: int, pause_s: float) -> list[float]:
    time.sleep(pause_s)
    start = time.perf_counter()
    function()  # discarded: caches and threads are cold after the pause
    calls = max(calls, int(MIN_S / max(time.perf_counter() - start, 1e-9)))
    milliseconds = []
    for _ in range(calls):
        start = time.perf_counter()
        function()
        milliseconds.append((time.perf_counter() - start) * 1e3)
    return milliseconds
