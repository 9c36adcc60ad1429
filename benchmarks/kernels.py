"""Single layers of real networks: the suites ``kernels`` (against eager) and ``roofline``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from tqdm import tqdm

import effkernels as ek
from effkernels.testing import relative_error

from .harness import time_fairly
from .inference import WRONG, make_record, rates_of
from .machine import Rates
from .processes import run_with_threads
from .providers import CONTROL
from .records import Case, Record, Results
from .shapes import Layer

ITEMSIZE = 4
# Both providers use torch's own threads, so nobody has to wait for another pool to calm down.
PAUSE_S = 0.01
ROUNDS = 5

PROVIDERS: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "eager": lambda: ek.use_backend("reference"),  # plain PyTorch, channels_last
    "effkernels": nullcontext,
}


def run(
    suite: str,
    network: str,
    layers: Sequence[Layer],
    batch: int,
    threads: int,
    providers: Sequence[str],
    results: Results,
    rounds: int | None = None,
) -> list[Case]:
    """Measure every layer that ``results`` lacks, in one process; the layers' cases.

    Raises:
        RuntimeError: if the process dies.
    """
    rates = rates_of(threads, results)
    cases = [case_of(suite, network, layer, batch, threads) for layer in layers]
    todo = [
        (case, layer)
        for case, layer in zip(cases, layers, strict=True)
        if not results.has(case, [*providers, CONTROL])
    ]
    if todo:
        results.add(run_with_threads(threads, measure, todo, providers, rates, rounds or ROUNDS))
    return cases


def case_of(suite: str, network: str, layer: Layer, batch: int, threads: int) -> Case:
    """What records call a layer of a network."""
    return Case(suite, f"{network}: {layer.label}", "float32", batch, threads)


def measure(
    todo: Sequence[tuple[Case, Layer]], providers: Sequence[str], rates: Rates, rounds: int
) -> list[Record]:
    """Check and time the layers, with the threads as set."""
    records = []
    first = todo[0][0]
    description = str(first._replace(case=first.case.partition(":")[0]))
    for case, layer in tqdm(todo, desc=description, unit="layer", leave=False, disable=None):
        torch.manual_seed(0)
        # Made outside of inference mode: tensors made there have no versions to tell whether what
        # was packed from them is still valid.
        tensors = layer.tensors(case.batch)
        with torch.inference_mode():
            records += _measure_layer(case, layer, tensors, providers, rates, rounds)
    return records


def _measure_layer(
    case: Case,
    layer: Layer,
    tensors: dict[str, Tensor],
    providers: Sequence[str],
    rates: Rates,
    rounds: int,
) -> list[Record]:
    with PROVIDERS["eager"]():
        exact = layer.run({name: tensor.double() for name, tensor in tensors.items()})
        allowed = WRONG * relative_error(layer.run(tensors), exact) + torch.finfo(torch.float32).eps

    def call(name: str) -> Tensor:
        with PROVIDERS[name]():
            return layer.run(tensors)

    errors = {name: relative_error(call(name), exact) for name in providers}
    right = [name for name in providers if errors[name] <= allowed]
    timings = {}
    if right:
        errors[CONTROL] = errors[right[-1]]
        entered = [*right, CONTROL]
        timings = time_fairly(
            {
                name: lambda name=right[-1] if name == CONTROL else name: call(name)
                for name in entered
            },
            rounds,
            pause_s=PAUSE_S,
        )
    flops, bytes = layer.flops(case.batch), layer.bytes(case.batch, ITEMSIZE)
    return [
        make_record(
            case,
            name,
            timings.get(name),
            bytes=bytes,
            flops=flops,
            floor_ms=rates.floor_ms(flops, bytes),
            rel_err=errors.get(name),
            control_of=right[-1] if name == CONTROL and right else "",
            note="" if name in timings else f"wrong: {allowed:.1e} is allowed",
        )
        for name in [*providers, CONTROL]
    ]
