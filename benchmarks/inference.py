"""Whole networks by all providers: the suites ``models`` and ``peers``."""

from __future__ import annotations

import copy
import gc
import itertools
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from effkernels.testing import relative_error

from .harness import PAUSE_S, Timing, time_fairly
from .machine import Rates, measure_rates
from .networks import Network, settle
from .processes import run_with_threads
from .providers import (
    CONTROL,
    EXPORTED,
    PROVIDERS,
    Call,
    NotAvailable,
    Workload,
    export_onnx,
    with_control,
)
from .records import Case, Record, Results

# A provider whose error is this many times that of PyTorch's eager is wrong: it computes another
# network or in another precision. (Winograd's algorithm stays under ten times.)
WRONG = 20.0
SLOW_S = 1.0  # if one call of everybody takes longer, one call per round is timed, else three
MIN_ROUNDS, MAX_ROUNDS = 4, 12


def run(
    cases: Sequence[Case],
    providers: Sequence[str],
    results: Results,
    budget_s: float = 20.0,
    rounds: int | None = None,
) -> list[str]:
    """Measure every case that ``results`` lacks, each in a process of its own.

    Args:
        cases: what to run; ``case`` is what :meth:`Network.parse` accepts.
        providers: names in PROVIDERS.
        results: where records go, after every case.
        budget_s: seconds that a case's timing may take, roughly.
        rounds: passes over the providers; None: as many as fit into ``budget_s``, 4 to 12.

    Returns:
        What went wrong, a line per case that could not be measured.
    """
    names = sorted(providers, key=list(PROVIDERS).index)
    todo = [case for case in cases if not results.has(case, [*names, CONTROL])]
    export = any(name in EXPORTED for name in names)
    return run_cases(
        todo,
        results,
        partial(prepare, export=export),
        partial(measure, providers=names, budget_s=budget_s, rounds=rounds),
    )


def run_cases(
    cases: Sequence[Case],
    results: Results,
    prepare: Callable[[Network, str, int, Path], None],
    measure: Callable[[Case, Network, Path, Rates], list[Record]],
) -> list[str]:
    """Run ``prepare`` once for cases that differ in threads only, ``measure`` for each of them.

    Args:
        cases: ``case`` is what :meth:`Network.parse` accepts.
        results: where records go, after every case.
        prepare: (network, dtype, batch, directory), in a process with all cores.
        measure: (case, network, directory, rates), in a process with the case's threads.

    Returns:
        What went wrong, a line per group that could not be measured.
    """
    failures = []
    with (
        tempfile.TemporaryDirectory(prefix="effkernels-benchmarks-") as scratch,
        tqdm(total=len(cases), unit="case", disable=None if len(cases) > 1 else True) as bar,
    ):
        for (label, dtype, batch), group in itertools.groupby(
            cases, key=lambda case: (case.case, case.dtype, case.batch)
        ):
            directory = Path(scratch) / "work"
            directory.mkdir()
            bar.set_description(f"{label}, batch {batch}")
            network = Network.parse(label)
            try:
                cores = os.cpu_count() or 1
                run_with_threads(cores, prepare, network, dtype, batch, directory)
                for case in group:
                    rates = rates_of(case.threads, results)
                    results.add(
                        run_with_threads(case.threads, measure, case, network, directory, rates)
                    )
                    bar.update()
            except RuntimeError as error:
                failures.append(f"{label}, batch {batch}: {error}")
                tqdm.write(failures[-1])
            shutil.rmtree(directory)
    return failures


def rates_of(threads: int, results: Results) -> Rates:
    """The machine's rates with ``threads``, measured once per results file."""
    known = results.header.setdefault("rates", {})
    if str(threads) not in known:
        known[str(threads)] = run_with_threads(threads, measure_rates)._asdict()
    return Rates(**known[str(threads)])


def prepare(
    network: Network, dtype: str, batch: int, directory: Path, export: bool = False
) -> None:
    """Write to ``directory`` what all thread counts of a case share: weights, image, results.

    Not timed, so it runs on all cores.
    """
    torch.manual_seed(0)
    module = settle(network.build(), network.resolution)
    image = torch.randn(batch, 3, network.resolution, network.resolution)
    module, image = (value.to(getattr(torch, dtype)) for value in (module, image))
    with torch.inference_mode():
        exact = copy.deepcopy(module).double()(image.double())
        baseline = relative_error(module(image), exact)
    if export and dtype == "float32":
        with suppress(NotAvailable):  # the providers that need it say so
            export_onnx(module, image, directory / "network.onnx")
    moved = [image, exact.to(image.dtype), *module.parameters()]
    prepared = {
        "network": module,
        "image": image,
        "exact": exact,
        "baseline": baseline,
        "flops": count_flops(module, image),
        "bytes": sum(tensor.numel() * tensor.element_size() for tensor in moved),
    }
    torch.save(prepared, directory / "prepared.pt")


def measure(
    case: Case,
    network: Network,
    directory: Path,
    rates: Rates,
    providers: Sequence[str],
    budget_s: float,
    rounds: int | None,
) -> list[Record]:
    """Check every provider's output, then time those that are right, with the threads as set."""
    prepared = torch.load(directory / "prepared.pt", weights_only=False)
    work = Workload(
        network.name,
        prepared["network"],
        prepared["image"],
        case.threads,
        directory / "network.onnx",
    )
    calls: dict[str, Call] = {}
    errors: dict[str, float] = {}
    notes: dict[str, str] = {}
    allowed = WRONG * prepared["baseline"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in tqdm(
            providers, desc=f"preparing {case}", position=1, leave=False, disable=None
        ):
            try:
                # Not in inference mode: tensors made there have no versions to tell whether
                # what was packed from them is still valid.
                call = PROVIDERS[name](work)
                with torch.inference_mode():
                    errors[name] = relative_error(torch.as_tensor(call()), prepared["exact"])
            except Exception as error:  # a rival's failure must not end the run
                first_line = (str(error).splitlines() or [""])[0]
                known = isinstance(error, NotAvailable)
                notes[name] = first_line if known else f"{type(error).__name__}: {first_line}"
                continue
            if errors[name] <= allowed:
                calls[name] = call
            else:
                notes[name] = f"wrong: relative error {errors[name]:.1e}, {allowed:.1e} is allowed"
        with torch.inference_mode():
            if calls:
                timings, repeated = time_calls(calls, str(case), budget_s, rounds)
            else:
                timings, repeated = {}, ""
    if repeated:
        errors[CONTROL] = errors[repeated]
    else:
        notes[CONTROL] = "no provider could be timed"
    floor_ms = rates.floor_ms(prepared["flops"], prepared["bytes"])
    return [
        make_record(
            case,
            name,
            timings.get(name),
            bytes=prepared["bytes"],
            flops=prepared["flops"],
            floor_ms=floor_ms,
            rel_err=errors.get(name),
            control_of=repeated if name == CONTROL else "",
            note=notes.get(name, ""),
        )
        for name in [*providers, CONTROL]
    ]


def make_record(case: Case, provider: str, timing: Timing | None, **fields: Any) -> Record:
    """The record of one provider; without ``timing`` one that only has its ``note``."""
    return Record(
        suite=case.suite,
        case=case.case,
        provider=provider,
        device=case.device,
        dtype=case.dtype,
        threads=case.threads,
        batch=case.batch,
        ms_median=timing.median if timing else None,
        ms_p20=timing.percentile(0.2) if timing else None,
        ms_p80=timing.percentile(0.8) if timing else None,
        images_per_s=1e3 * case.batch / timing.median if timing else None,
        **fields,
    )


def time_calls(
    calls: dict[str, Call], title: str, budget_s: float, rounds: int | None
) -> tuple[dict[str, Timing], str]:
    """Timings with a control, and the name of what that repeats; ``rounds`` as for :func:`run`."""
    entered, repeated = with_control(calls)
    seconds = 0.0
    for call in calls.values():
        call()
        start = time.perf_counter()
        call()
        seconds += time.perf_counter() - start
    per_round = 1 if seconds > SLOW_S else 3
    if rounds is None:
        round_s = len(entered) * PAUSE_S + (1 + per_round) * seconds
        rounds = max(MIN_ROUNDS, min(MAX_ROUNDS, int(budget_s / round_s)))
    gc.collect()
    gc.freeze()  # no collection walks through torch's, onnx's and our modules while the clock runs
    steps = rounds * len(entered)
    with tqdm(total=steps, desc=f"timing {title}", position=1, leave=False, disable=None) as bar:
        timings = time_fairly(entered, rounds, per_round, on_step=lambda name: bar.update())
    return timings, repeated


def count_flops(network: nn.Module, image: Tensor) -> int:
    """Two per multiply-add of convolutions and products."""
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        copy.deepcopy(network).to("meta")(image.to("meta"))
    return counter.get_total_flops()
