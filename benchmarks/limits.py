"""What ``freeze`` promises besides speed: memory, first calls, bfloat16, calls from many threads.

Each limit bounds one number, a ratio or a count, from above. Like everything here, the number
comes from fresh processes, and only after the outputs were compared with float64.
"""

from __future__ import annotations

import ctypes
import gc
import os
import re
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor
from tqdm import tqdm

import effkernels as ek
from effkernels.testing import relative_error

from . import training
from .harness import time_fairly
from .inference import MIN_ROUNDS, WRONG, prepare, time_calls
from .networks import Network
from .processes import DEFAULT_MALLOC, run_with_threads
from .providers import CONTROL, PROVIDERS, NotAvailable, Workload
from .records import LimitKey, LimitRecord, Results
from .tables import CellError, read_rows

PROVIDER = "freeze"  # whose limits these are
EAGERS = ("eager", "eager channels_last")  # the leaner one is compared with
FIRST_CALLS = 3  # processes; a first call cannot be repeated in one
CALLERS = 4  # threads
CALLS = 8  # of each caller

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"  # proc(5)
_SLACK = 1 << 20  # between two counters of the kernel, which counts per core


@dataclass(frozen=True)
class Limit:
    """A row of targets: the number called ``limit`` must be at most ``at_most``."""

    limit: str
    case: str
    batch: int
    threads: int
    at_most: float

    def __post_init__(self) -> None:
        if self.limit not in LIMITS:
            raise CellError("limit", f"{self.limit!r} is given, accepted: {', '.join(LIMITS)}")
        try:
            Network.parse(self.case)
        except ValueError as error:
            raise CellError("case", str(error)) from None
        for column in ("batch", "threads"):
            if getattr(self, column) < 1:
                raise CellError(column, f"{getattr(self, column)} is given, >= 1 is accepted")

    @property
    def key(self) -> LimitKey:
        return LimitKey(self.limit, self.case, self.batch, self.threads)


@dataclass(frozen=True)
class Task:
    """What a limit is measured with."""

    key: LimitKey
    scratch: Path  # of files that limits share
    budget_s: float
    rounds: int | None

    def run(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """``function(self, *arguments)`` in a fresh process with the limit's threads."""
        return run_with_threads(self.key.threads, function, self, *arguments, **options)

    def prepare(self, dtype: str = "float32") -> Path:
        """Where the network in ``dtype``, its input and its exact output are."""
        directory = self.scratch / f"{self.key.case}-{self.key.batch}-{dtype}"
        if not (directory / "prepared.pt").exists():
            directory.mkdir(exist_ok=True)
            network, cores = Network.parse(self.key.case), os.cpu_count() or 1
            run_with_threads(cores, prepare, network, dtype, self.key.batch, directory)
        return directory


def read_limits(path: Path) -> list[Limit]:
    """The rows of a CSV file.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: for a bad row, naming file, line and column.
    """
    return read_rows(path, Limit)


def run(
    limits: Sequence[Limit],
    results: Results,
    budget_s: float = 20.0,
    rounds: int | None = None,
) -> list[str]:
    """Measure every limit that ``results`` lacks.

    Args:
        limits: what to run.
        results: where records go, after every limit.
        budget_s: seconds that the timing of two things against each other may take, roughly.
        rounds: passes over them; None: as many as fit into ``budget_s``.

    Returns:
        What went wrong, a line per limit that could not be measured.
    """
    todo = [limit.key for limit in limits if not results.has_limit(limit.key)]
    failures = []
    with (
        tempfile.TemporaryDirectory(prefix="effkernels-benchmarks-") as scratch,
        tqdm(todo, unit="limit", disable=None if len(todo) > 1 else True) as bar,
    ):
        for key in bar:
            bar.set_description(str(key))
            try:
                record = LIMITS[key.limit](Task(key, Path(scratch), budget_s, rounds))
            except Exception as error:  # the other limits can still be measured
                failures.append(f"{key}: {type(error).__name__}: {error}")
                tqdm.write(failures[-1])
                continue
            results.add_limit(record)
    return failures


def table(results: Results, limits: Sequence[Limit], tablefmt: str = "simple") -> tuple[str, bool]:
    """A table limit | measured | target | ok, and whether all are met."""
    rows, all_met = [], True
    for limit in limits:
        record = results.limit(limit.key)
        met = record is not None and record.value <= limit.at_most and record.is_fair
        all_met = all_met and met
        rows.append(
            [
                limit.limit,
                limit.case,
                limit.batch,
                limit.threads,
                f"{record.value:.4g}" if record else "not measured",
                f"<= {limit.at_most:g}",
                "ok" if met else "MISSED",
                _figures(record) if record else "",
            ]
        )
    headers = ["limit", "network", "batch", "threads", "measured", "target", "", "figures"]
    alignment = ["left", "left", *["right"] * 4, "left", "left"]
    shown = tabulate(rows, headers, tablefmt=tablefmt, colalign=alignment, disable_numparse=True)
    return shown, all_met


def _figures(record: LimitRecord) -> str:
    """What the number was made of, and the control's ratio if there is one."""
    parts = [f"{name} {value:.4g}" for name, value in record.figures.items()]
    text = f"{', '.join(parts)} {record.unit}".rstrip()
    if record.control is None:
        return text
    return f"{text}; {CONTROL} {record.control:.2f}{'' if record.is_fair else ', is off'}"


def _memory(task: Task, call: int) -> LimitRecord:
    """Peak memory of the first (0) or a warm (1) call, as a share of the leaner eager's."""
    directory = task.prepare()
    peaks = {
        name: task.run(call_peaks, directory, name, malloc=DEFAULT_MALLOC)[call] / 1e6
        for name in (PROVIDER, *EAGERS)
    }
    value = peaks[PROVIDER] / min(peaks[name] for name in EAGERS)
    return LimitRecord(*task.key, value, "MB", peaks)


def _training_memory(task: Task) -> LimitRecord:
    """Peak memory of a training step as a share of the leaner eager's."""
    directory = task.scratch / f"{task.key.case}-{task.key.batch}-training"
    if not (directory / "prepared.pt").exists():
        directory.mkdir(exist_ok=True)
        network, cores = Network.parse(task.key.case), os.cpu_count() or 1
        run_with_threads(cores, training.prepare, network, "float32", task.key.batch, directory)
    peaks = {
        name: task.run(step_peak, directory, name, malloc=DEFAULT_MALLOC) / 1e6
        for name in (training.OURS, *EAGERS)
    }
    value = peaks[training.OURS] / min(peaks[name] for name in EAGERS)
    return LimitRecord(*task.key, value, "MB", peaks)


def step_peak(task: Task, directory: Path, provider: str) -> int:
    """Peak resident bytes of a second training step, above what was resident before the first.

    What outlives a step counts: gradients, the optimizer's momentum (a copy of the weights each)
    and whatever a provider keeps. The weights, the images and what the library loads do not.
    """
    prepared = _load(directory)
    step = training.build(provider, prepared)[2]
    peak = peaks_above([step, step])[1]
    # Of a fresh copy: these two steps have changed the weights.
    training.check(provider, *training.build(provider, prepared)[:2], prepared)
    return peak


def call_peaks(task: Task, directory: Path, provider: str) -> list[int]:
    """Peak resident bytes of a provider's first two calls, above what was resident before both.

    The second call's peak is not taken above what the first one left: a buffer that is kept from
    call to call would cost nothing then.
    """
    prepared = _load(directory)
    call = PROVIDERS[provider](_workload(task, prepared))
    with torch.inference_mode():
        peaks = peaks_above([call, call])
        _check(provider, torch.as_tensor(call()), prepared)
    return peaks


def peaks_above(calls: Sequence[Callable[[], Any]]) -> list[int]:
    """The process's peak resident bytes in each call, above what was resident before the first.

    Read from the kernel's high-water mark: sampling in a thread would miss peaks shorter than its
    interval and take a core from what it watches, and PyTorch's profiler does not see memory that
    other libraries allocate.

    The allocator has to be glibc's as it comes, as users have it: large blocks go back to the
    system when they are freed. With all memory kept (``processes.MALLOC``, for timing) the peak
    would be that of a heap's fragmentation, and no call after the first one would have any. What
    malloc itself still keeps is given back before every call: it would count as resident before
    the first one, and against the second although nobody uses it.

    Raises:
        NotAvailable: where the kernel or the C library lacks what this needs.
    """
    peaks: list[int] = []
    before = 0
    for call in calls:
        gc.collect()
        _give_back()
        level = _reset_peak()
        if not peaks:
            before = level
        output = call()
        peaks.append(_status("VmHWM") - before)
        del output
    return peaks


def _give_back() -> None:
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is None:
        raise NotAvailable("peak memory needs glibc, the C library has no malloc_trim")
    trim(0)


def _reset_peak() -> int:
    """Make the peak what is resident now, and that."""
    try:
        _CLEAR_REFS.write_text(_RESET_PEAK)
        resident, peak = _status("VmRSS"), _status("VmHWM")
    except OSError as error:
        raise NotAvailable(f"peak memory needs Linux's /proc: {error}") from None
    if peak > resident + _SLACK:
        raise NotAvailable(f"{_CLEAR_REFS} did not reset the peak: {peak} bytes, not {resident}")
    return peak


def _status(name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB$", _STATUS.read_text(), re.MULTILINE)
    if found is None:
        raise NotAvailable(f"{_STATUS} has no {name}")
    return int(found[1]) * 1024


def _first_call(task: Task) -> LimitRecord:
    """The time of the first call over that of a warm one; ``freeze`` itself is not part of it."""
    directory = task.prepare()
    found = [task.run(time_first_call, directory) for _ in range(FIRST_CALLS)]
    found.sort(key=lambda figures: figures["first call"] / figures["warm call"])
    figures = found[len(found) // 2]
    return LimitRecord(*task.key, figures["first call"] / figures["warm call"], "ms", figures)


def time_first_call(task: Task, directory: Path) -> dict[str, float]:
    """Milliseconds of a process's first call of a frozen model, of later ones, and of freezing."""
    prepared = _load(directory)
    network, image = prepared["network"], prepared["image"]
    start = time.perf_counter()
    frozen = ek.freeze(network)
    freeze_s = time.perf_counter() - start
    with torch.inference_mode():
        start = time.perf_counter()
        output = frozen(image)
        first_s = time.perf_counter() - start
        _check(PROVIDER, output, prepared)
        calls = {PROVIDER: lambda: frozen(image)}
        warm = time_fairly(calls, task.rounds or MIN_ROUNDS)[PROVIDER]
    return {"first call": first_s * 1e3, "warm call": warm.median, "freeze": freeze_s * 1e3}


def _bfloat16(task: Task) -> LimitRecord:
    """The time of the network stored in bfloat16, input included, over that in float32."""
    directories = {dtype: task.prepare(dtype) for dtype in ("float32", "bfloat16")}
    figures = task.run(time_dtypes, directories)
    control = figures.pop(CONTROL) / figures["bfloat16"]
    value = figures["bfloat16"] / figures["float32"]
    return LimitRecord(*task.key, value, "ms", figures, control)


def time_dtypes(task: Task, directories: dict[str, Path]) -> dict[str, float]:
    """Milliseconds per call of the network frozen in each dtype, in turns, and of the control."""
    calls = {}
    for dtype, directory in directories.items():
        prepared = _load(directory)
        calls[dtype] = PROVIDERS[PROVIDER](_workload(task, prepared))
        with torch.inference_mode():
            _check(dtype, calls[dtype](), prepared)
    with torch.inference_mode():
        timings, _ = time_calls(calls, str(task.key), task.budget_s, task.rounds)
    return {name: timing.median for name, timing in timings.items()}


def _callers(task: Task) -> LimitRecord:
    """How many results of threads that call one frozen model at once differ, in any bit."""
    figures = task.run(call_at_once, task.prepare())
    return LimitRecord(*task.key, figures["differ"], "", figures)


def call_at_once(task: Task, directory: Path) -> dict[str, float]:
    """Results of a frozen model that nobody called before, against those of one called alone."""
    prepared = _load(directory)
    image = prepared["image"]
    images = [image, *(torch.randn_like(image) for _ in range(CALLERS - 1))]
    alone, shared = ek.freeze(prepared["network"]), ek.freeze(prepared["network"])
    with torch.inference_mode():
        expected = [alone(image) for image in images]
        _check(PROVIDER, expected[0], prepared)
    differ = count_differing(shared, images, expected)
    return {"differ": differ, "of": CALLERS * CALLS}


def count_differing(
    function: Callable[[Tensor], Tensor], images: Sequence[Tensor], expected: Sequence[Tensor]
) -> int:
    """Call ``function`` from a thread per image at once; how many results are not ``expected``."""
    barrier = threading.Barrier(len(images))

    def caller(image: Tensor, result: Tensor) -> int:
        barrier.wait()
        with torch.inference_mode():  # a thread's own
            outputs = [function(image) for _ in range(CALLS)]
        return sum(not torch.equal(output, result) for output in outputs)

    with ThreadPoolExecutor(len(images)) as pool:
        return sum(pool.map(caller, images, expected))


def _load(directory: Path) -> dict[str, Any]:
    return torch.load(directory / "prepared.pt", weights_only=False)


def _workload(task: Task, prepared: dict[str, Any]) -> Workload:
    network, image = prepared["network"], prepared["image"]
    return Workload(Network.parse(task.key.case).name, network, image, task.key.threads, Path())


def _check(name: str, output: Tensor, prepared: dict[str, Any]) -> None:
    """A figure of a wrong result is none."""
    error, allowed = relative_error(output, prepared["exact"]), WRONG * prepared["baseline"]
    if not error <= allowed:
        raise RuntimeError(f"{name} is wrong: relative error {error:.1e}, {allowed:.1e} is allowed")


LIMITS: dict[str, Callable[[Task], LimitRecord]] = {
    "first call: memory / eager": partial(_memory, call=0),
    "warm call: memory / eager": partial(_memory, call=1),
    "first call: time / warm call": _first_call,
    "bfloat16: time / float32": _bfloat16,
    "4 threads at once: results that differ": _callers,
    "training step: memory / eager": _training_memory,
}
