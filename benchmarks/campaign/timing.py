"""Timing, CUDA graphs and memory on one device; a CPU takes part with wall-clock times."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from ..harness import Timing
from ..providers import CONTROL

Call = Callable[[], Any]

ROUNDS = 5
MAX_CALLS = 20  # of one provider in one round
CAPTURED_CALLS = 20  # in one graph, where a single call is too short to be timed
WARM_UP = 3


class Stopwatch:
    """Milliseconds of calls on a device.

    Args:
        device: ``"cuda"``, or ``"cpu"`` for rehearsals.
    """

    def __init__(self, device: str) -> None:
        self.on_gpu = device == "cuda"
        self._swept: torch.Tensor | None = None

    def samples(self, call: Call, calls: int, cold: bool = False) -> list[float]:
        """One value per call.

        Args:
            call: leaves its work on the current stream.
            calls: how many.
            cold: before each call the GPU overwrites a buffer of several times its L2 cache. While
                it does so, the CPU gets ahead: what is timed is the GPU's work, not the launching.
        """
        if not self.on_gpu:
            found = []
            for _ in range(calls):
                start = time.perf_counter()
                call()
                found.append((time.perf_counter() - start) * 1e3)
            return found
        pairs = []
        for _ in range(calls):
            if cold:
                self._sweep()
            pair = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            pair[0].record()
            call()
            pair[1].record()
            pairs.append(pair)
        torch.cuda.synchronize()
        return [start.elapsed_time(end) for start, end in pairs]

    def _sweep(self) -> None:
        if self._swept is None:
            size = 8 * torch.cuda.get_device_properties().L2_cache_size
            self._swept = torch.empty(size, dtype=torch.uint8, device="cuda")
        self._swept.zero_()

    def median(self, call: Call, seconds: float, cold: bool = False) -> float:
        """Median milliseconds of as many calls as fit into ``seconds``, 5 to 50."""
        for _ in range(WARM_UP):
            call()
        (once,) = self.samples(call, 1, cold)
        return statistics.median(self.samples(call, _calls(seconds, once, 5, 50), cold))


def time_in_turns(
    calls: Mapping[str, Call],
    stopwatch: Stopwatch,
    seconds: float,
    cold: bool = False,
    per_call: int = 1,
) -> dict[str, Timing]:
    """Every provider's timing, in rounds over all of them, and the last one's once more as CONTROL.

    Args:
        calls: name -> function; compiled and warmed up before.
        stopwatch: of the device.
        seconds: what all of it may take, roughly; three rounds of one call each is the least.
        cold: as for :meth:`Stopwatch.samples`.
        per_call: how many passes one call makes.
    """
    if not calls:
        return {}
    repeated = list(calls)[-1]
    entered = {CONTROL: calls[repeated], **calls}  # not next to what it repeats
    once = {name: stopwatch.samples(call, 2, cold)[-1] for name, call in entered.items()}
    total_s = sum(once.values()) / 1e3
    rounds = max(3, min(ROUNDS, int(seconds / max(total_s, 1e-9))))
    share = seconds / rounds / len(entered)
    counts = {name: _calls(share, ms, 1, MAX_CALLS) for name, ms in once.items()}
    found: dict[str, list[float]] = {name: [] for name in entered}
    names = list(entered)
    for index in range(rounds):
        first = index % len(names)
        for name in names[first:] + names[:first]:
            if counts[name] > 1:
                stopwatch.samples(entered[name], 1, cold)  # what ran before has left its traces
            found[name] += stopwatch.samples(entered[name], counts[name], cold)
    return {
        name: Timing(tuple(value / per_call for value in values)) for name, values in found.items()
    }


def captured(call: Call, calls: int = 1) -> Call:
    """``call`` as the replay of a CUDA graph, which gives what the last of ``calls`` gave."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            output = call()

    def replay() -> Any:
        graph.replay()
        return output

    return replay


class Memory:
    """Bytes that PyTorch's allocator handed out; nothing on a CPU."""

    def __init__(self, device: str) -> None:
        self._counts = device == "cuda"
        self._before = 0

    def start(self) -> None:
        """What is allocated now is not counted."""
        if self._counts:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()

    def now(self) -> int | None:
        """Above the start."""
        return torch.cuda.memory_allocated() - self._before if self._counts else None

    def peak(self) -> int | None:
        """The most since the start, above it."""
        return torch.cuda.max_memory_allocated() - self._before if self._counts else None


def _calls(seconds: float, milliseconds: float, least: int, most: int) -> int:
    return max(least, min(most, int(seconds * 1e3 / max(milliseconds, 1e-6))))
