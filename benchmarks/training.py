"""Training steps of whole networks: the suite ``training``.

A step frees the gradients, runs forward and backward in training mode and ends with SGD: on a CPU
in float32, on a GPU as the campaign's stage of the same name has it, under autocast.
"""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from tabulate import tabulate
from torch import Tensor, nn
from tqdm import tqdm

import effkernels as ek
from effkernels.testing import relative_error

from .campaign.targets import GpuTarget, read_gpu_targets
from .campaign.targets import check as check_gpu_targets
from .gpus import GPUS
from .inference import count_flops, make_record, run_cases, time_calls
from .machine import Rates
from .networks import Network
from .processes import run_with_threads
from .providers import CONTROL
from .records import Case, Record, Results
from .steps import cross_entropy, gradient, sgd_step, without_chance
from .tables import read_rows
from .targets import Target

SUITE = "training"
OURS = "accelerate"
BATCH, THREADS = 16, 2  # where nothing else is asked for
CLASSES = 1000
# A gradient whose error is this many times the worse of eager's two layouts is another gradient.
WRONG = 5.0
GPU_DTYPE = "bfloat16"  # of autocast
COPY_BYTES, PRODUCT_SIDE = 1 << 30, 8192  # what a GPU's rates are measured with


class Way(NamedTuple):
    """A memory format of network and image, and what becomes of the network."""

    channels_last: bool
    change: Callable[[nn.Module], Any]


def _unchanged(network: nn.Module) -> nn.Module:
    return network


def _compiled(network: nn.Module) -> Any:
    return torch.compile(network, dynamic=False)


PROVIDERS: dict[str, Way] = {
    "eager": Way(False, _unchanged),
    "eager channels_last": Way(True, _unchanged),
    "torch.compile": Way(True, _compiled),
    "torch.compile NCHW": Way(False, _compiled),
    OURS: Way(True, ek.accelerate),
}


@dataclass(frozen=True)
class TrainingTarget(Target):
    """As for inference, with the providers here."""

    suite: ClassVar[str] = SUITE
    providers: ClassVar[tuple[str, ...]] = tuple(PROVIDERS)


def read_targets(path: Path) -> list[Target]:
    """The rows of a CSV file, as :func:`benchmarks.targets.read_targets` has them."""
    return list(read_rows(path, TrainingTarget))


def run(
    cases: Sequence[Case],
    providers: Sequence[str],
    results: Results,
    budget_s: float = 120.0,
    rounds: int | None = None,
) -> list[str]:
    """Measure every case that ``results`` lacks, each in a process of its own.

    Args:
        cases: what to run.
        providers: names in PROVIDERS.
        results: where records go, after every case.
        budget_s: seconds that a case's timing may take, roughly.
        rounds: passes over the providers; None: as many as fit into ``budget_s``, 4 to 12.

    Returns:
        What went wrong, a line per case that could not be measured.
    """
    names = sorted(providers, key=list(PROVIDERS).index)
    todo = [case for case in cases if not results.has(case, [*names, CONTROL])]
    timing = partial(measure, providers=names, budget_s=budget_s, rounds=rounds)
    return run_cases(todo, results, prepare, timing)


def prepare(network: Network, dtype: str, batch: int, directory: Path) -> None:
    """Write to ``directory`` what all thread counts of a case share: weights, batch, gradient.

    Weights are as a user has them before the first step. Dropout and stochastic depth are off, for
    gradients to be comparable.
    """
    torch.manual_seed(0)
    module = without_chance(network.build()).train()
    image = torch.randn(batch, 3, network.resolution, network.resolution)
    labels = torch.randint(CLASSES, (batch,))
    twin, wide = copy.deepcopy(module).double(), image.double()
    exact = gradient(twin, partial(cross_entropy, twin, wide, labels))
    prepared: dict[str, Any] = {"network": module, "image": image, "labels": labels}
    eagers = ("eager", "eager channels_last")
    errors = [relative_error(gradient(*build(name, prepared)[:2]), exact) for name in eagers]
    parameters = sum(p.numel() * p.element_size() for p in module.parameters())
    prepared |= {
        "exact": exact,
        "baseline": max(errors),
        # either gradient of a product is as much work as the product
        "flops": 3 * count_flops(copy.deepcopy(module).eval(), image),
        # weights, gradients and momentum
        "bytes": image.numel() * image.element_size() + 3 * parameters,
    }
    torch.save(prepared, directory / "prepared.pt")


def build(
    provider: str, prepared: dict[str, Any]
) -> tuple[nn.Module, Callable[[], Tensor], Callable[[], None]]:
    """A provider's own copy of the network, its loss and its step, as functions."""
    way = PROVIDERS[provider]
    layout = torch.channels_last if way.channels_last else torch.contiguous_format
    module = copy.deepcopy(prepared["network"]).to(memory_format=layout)
    image = prepared["image"].contiguous(memory_format=layout)
    loss = partial(cross_entropy, way.change(module), image, prepared["labels"])
    return module, loss, sgd_step(module, loss)


def check(provider: str, module: nn.Module, loss: Callable[[], Tensor], prepared: Any) -> float:
    """The gradient's relative error; a figure of a wrong one is none.

    Raises:
        RuntimeError: if it is far from eager's.
    """
    error = relative_error(gradient(module, loss), prepared["exact"])
    allowed = WRONG * prepared["baseline"]
    if not error <= allowed:
        raise RuntimeError(
            f"{provider} is wrong: the gradient's relative error is {error:.1e}, "
            f"{allowed:.1e} is allowed"
        )
    return error


def measure(
    case: Case,
    network: Network,
    directory: Path,
    rates: Rates,
    providers: Sequence[str],
    budget_s: float,
    rounds: int | None,
) -> list[Record]:
    """Check every provider's gradient, then time the steps of those that are right."""
    prepared = torch.load(directory / "prepared.pt", weights_only=False)
    calls: dict[str, Callable[[], None]] = {}
    errors: dict[str, float] = {}
    notes: dict[str, str] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        title = f"preparing {case}"
        for name in tqdm(providers, desc=title, position=1, leave=False, disable=None):
            try:
                module, loss, step = build(name, prepared)
                errors[name] = check(name, module, loss, prepared)
            except Exception as error:  # a rival's failure must not end the run
                first_line = (str(error).splitlines() or [""])[0]
                notes[name] = f"{type(error).__name__}: {first_line}"
                continue
            calls[name] = step
        if calls:
            timings, repeated = time_calls(calls, str(case), budget_s, rounds)
        else:
            timings, repeated = {}, ""
            notes[CONTROL] = "no provider could be timed"
    return [
        make_record(
            case,
            name,
            timings.get(name),
            bytes=prepared["bytes"],
            flops=prepared["flops"],
            floor_ms=rates.floor_ms(prepared["flops"], prepared["bytes"]),
            rel_err=errors.get(repeated if name == CONTROL else name),
            control_of=repeated if name == CONTROL else "",
            note=notes.get(name, ""),
        )
        for name in [*providers, CONTROL]
    ]


def run_on_gpu(cases: Sequence[Case], results: Results, budget_s: float = 120.0) -> list[str]:
    """Measure every case that ``results`` lacks as the campaign does; returns what went wrong."""
    from .campaign.models import TRAINING_KINDS

    wanted = [*TRAINING_KINDS["compile"], CONTROL]
    failures = []
    for case in cases:
        if results.has(case, wanted):
            continue
        try:
            results.add(run_with_threads(os.cpu_count() or 1, measure_on_gpu, case, budget_s))
        except RuntimeError as error:
            failures.append(f"{case}: {error}")
            print(failures[-1])
    return failures


def measure_on_gpu(case: Case, budget_s: float) -> list[Record]:
    """The campaign's measurement of a case, ``torch.compile`` included."""
    from .campaign import device, models

    rates = device.rates_of(
        [
            *device.measure_copy(case.device, COPY_BYTES),
            *device.measure_product(case.device, case.dtype, PRODUCT_SIDE),
        ],
        case.device,
    )
    chosen = models.ModelCase(case.case, case.batch, "compile")
    rows = models.measure_training(chosen, case.device, case.dtype, rates, budget_s)
    return [Record(**row) for row in rows]


def gpu_targets(path: Path) -> list[GpuTarget]:
    """The campaign's targets that are about training."""
    return [target for target in read_gpu_targets(path) if target.stage == SUITE]


def gpu_case(label: str, batch: int, device: str = "cuda") -> Case:
    """The case of a network on a GPU, whatever its threads."""
    return Case(SUITE, label, GPU_DTYPE, batch, 1, device)


def case_of(target: GpuTarget) -> Case:
    """Where a target is measured."""
    return gpu_case(target.case, target.batch)


def check_on_gpu(results: Results, targets: Sequence[GpuTarget]) -> tuple[str, bool]:
    """A table target | measured | ok, and whether all are met."""
    rows = [{"task": str(r.key), **asdict(r)} for r in results.records if r.device != "cpu"]
    # No target of training is a share of what the device can do: any rates serve.
    found = check_gpu_targets(targets, {SUITE: rows}, GPUS["h100"])
    table = tabulate(
        [
            (f"{t['case']}, batch {t['batch']}", t["target"], t["measured"], _OK[t["met"] is True])
            for t in found
        ],
        headers=["case", "target", "measured", ""],
        floatfmt=".3f",
        missingval="not measured",
    )
    return table, all(target["met"] for target in found)


_OK = {True: "ok", False: "MISSED"}
