"""Whole networks on a device: the stages ``inference`` and ``training``."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
import torch._inductor.config
import torch.nn.functional as F
from torch import Tensor, nn

import effkernels as ek
from effkernels.testing import relative_error

from ..gpus import Rates
from ..inference import make_record
from ..levels import network_floor_ms, network_layers, totals
from ..networks import Network, settle
from ..providers import CONTROL
from ..records import Case
from ..steps import cross_entropy, gradient, sgd_step, without_chance
from .layers import TUNING_S, exactly, table_path, tuned_table, worst
from .timing import Call, Memory, Stopwatch, captured, time_in_turns
from .worker import Row, in_words

FACTOR = 5.0  # our error may be this many times eager's: of one draw eager's own varies that much
GRAPH = " graph"  # behind a provider's name: replayed from a CUDA graph
LEVEL = "C"  # of fusion, whose floor records have

EAGER, COMPILED, MAX_AUTOTUNE = "eager", "torch.compile", "max-autotune"
ACCELERATE, FREEZE = "accelerate", "freeze"

# What a case times against each other. Compiling takes minutes: it is kept apart, next to ours once
# more, so that a case that is cut off takes nothing else with it.
KINDS = {
    "main": (EAGER, ACCELERATE, FREEZE),
    "compile": (EAGER, COMPILED, FREEZE),
    "max-autotune": (EAGER, MAX_AUTOTUNE, FREEZE),
}
TRAINING_KINDS = {"main": (EAGER, ACCELERATE), "compile": (EAGER, COMPILED, ACCELERATE)}


@dataclass(frozen=True)
class ModelCase:
    """A network at a batch size, and which of the providers."""

    network: str
    batch: int
    kind: str = "main"

    @property
    def name(self) -> str:
        """Unique in a stage."""
        return f"{self.network}, batch {self.batch}, {self.kind}"

    def sizes(self, itemsize: int, training: bool = False) -> tuple[int, int]:
        """Bytes that must move at LEVEL and operations; three times both in training.

        Training reads and writes at least as much again for either gradient.
        """
        level, passes = ("B", 3) if training else (LEVEL, 1)
        found = totals(network_layers(self.network), level, self.batch, itemsize)
        return passes * int(found["bytes"]), passes * int(found["flops"])

    def floor_ms(self, rates: Rates, itemsize: int, training: bool = False) -> float:
        """What the case takes at least."""
        level, passes = ("B", 3) if training else (LEVEL, 1)
        layers = network_layers(self.network)
        return passes * network_floor_ms(layers, level, rates, self.batch, itemsize)


def measure_inference(
    case: ModelCase, device: str, dtype: str, rates: Rates, seconds: float
) -> Iterator[Row]:
    """Check and time a network by every provider of the case's kind, with and without CUDA graph.

    Args:
        case: what.
        device: ``"cuda"`` or ``"cpu"``, where there are no graphs.
        dtype: of weights and images.
        rates: of the device.
        seconds: for the timing, roughly.
    """
    network = Network.parse(case.network)
    type_ = getattr(torch, dtype)
    torch.manual_seed(0)
    with torch.device(device):
        module = settle(network.build(), network.resolution)
        image = torch.randn(case.batch, 3, network.resolution, network.resolution)
    module = module.to(type_).to(memory_format=torch.channels_last)
    image = image.to(type_).contiguous(memory_format=torch.channels_last)
    images = sorted({0, case.batch - 1})
    with torch.inference_mode(), exactly():
        exact = copy.deepcopy(module).double()(image[images].double())
    torch.compiler.reset()
    calls: dict[str, Call] = {}
    errors: dict[str, float] = {}
    notes: dict[str, str] = {}
    peaks: dict[str, int | None] = {}
    memory = Memory(device)
    whole: Tensor | None = None
    allowed = 0.0  # without eager's result nothing is known to be right
    names = [name + graph for name in KINDS[case.kind] for graph in _variants(device)]
    for name in names:
        plain = name.removesuffix(GRAPH)
        try:
            if name == plain:
                # Not in inference mode: tensors made there have no versions to tell of changes.
                call = _PREPARE[name](module, image)
            elif plain not in calls:
                notes[name] = f"{plain} could not be timed"
                continue
            else:
                with torch.inference_mode():
                    call = captured(calls[plain])
            with torch.inference_mode():
                output = call()
                found = [relative_error(output[images], exact)]
                if name == EAGER:
                    whole = output.clone()
                    allowed = _allowed(found[0], type_)
                elif whole is not None:  # images in between, where both may be off
                    found.append(relative_error(output, whole) - 2 * allowed)
                errors[name] = worst(found)
                if name == plain:
                    memory.start()
                    call()
                    peaks[name] = memory.peak()
        except Exception as error:
            notes[name] = in_words(error)
            continue
        if errors[name] <= allowed or plain == EAGER:
            calls[name] = call
        else:
            notes[name] = f"WRONG: relative error {errors[name]:.1e}, {allowed:.1e} is allowed"
    with torch.inference_mode():
        timings = time_in_turns(calls, Stopwatch(device), seconds)
    size, flops = case.sizes(type_.itemsize)
    fields = {
        "bytes": size,
        "flops": flops,
        "floor_ms": case.floor_ms(rates, type_.itemsize),
    }
    key = Case("inference", network.label, dtype, case.batch, 1, device)
    yield from _rows(key, names, calls, timings, errors, notes, fields, peaks, {})


def measure_training(
    case: ModelCase, device: str, dtype: str, rates: Rates, seconds: float
) -> Iterator[Row]:
    """Check gradients and time steps (forward, backward, SGD) under autocast.

    Dropout and stochastic depth are off, for gradients to be comparable. They are compared with
    eager's in higher precision, on the same batch.

    Args:
        case: what.
        device: ``"cuda"`` or ``"cpu"``.
        dtype: of autocast; float32: none.
        rates: of the device.
        seconds: for the timing, roughly.
    """
    network = Network.parse(case.network)
    type_ = getattr(torch, dtype)
    torch.manual_seed(0)
    with torch.device(device):
        module = without_chance(network.build()).to(memory_format=torch.channels_last).train()
        image = torch.randn(case.batch, 3, network.resolution, network.resolution)
        labels = torch.randint(1000, (case.batch,))
    image = image.contiguous(memory_format=torch.channels_last)
    autocast = partial(torch.autocast, device, type_, enabled=type_ != torch.float32)
    # Float32 where less is computed in, else float64.
    higher = torch.float64 if type_ == torch.float32 else torch.float32
    with exactly():
        twin = copy.deepcopy(module).to(higher)
        exact = gradient(twin, partial(cross_entropy, twin, image.to(higher), labels))
    del twin
    torch.compiler.reset()
    allowed = 0.0
    names = TRAINING_KINDS[case.kind]
    calls: dict[str, Call] = {}
    errors: dict[str, float] = {}
    notes: dict[str, str] = {}
    peaks: dict[str, int | None] = {}
    kept: dict[str, int | None] = {}
    memory = Memory(device)
    for name in names:
        try:
            own = copy.deepcopy(module)
            if name == ACCELERATE:
                ek.accelerate(own)
            run: Any = own if name != COMPILED else torch.compile(own, dynamic=False)

            def loss(run: Any = run) -> Tensor:
                with autocast():
                    return cross_entropy(run, image, labels)

            errors[name] = relative_error(gradient(own, loss), exact)
            own.zero_grad(set_to_none=True)
            memory.start()
            value = loss()
            kept[name] = memory.now()
            value.backward()
            del value
            step = sgd_step(own, loss)
            step()
            memory.start()
            step()
            peaks[name] = memory.peak()
        except Exception as error:
            notes[name] = in_words(error)
            continue
        if name == EAGER:
            allowed = _allowed(errors[EAGER], type_)
        if errors[name] <= allowed or name == EAGER:
            calls[name] = step
        else:
            notes[name] = f"WRONG: gradient's relative error {errors[name]:.1e}, not {allowed:.1e}"
    del exact
    timings = time_in_turns(calls, Stopwatch(device), seconds)
    size, flops = case.sizes(type_.itemsize, training=True)
    fields = {
        "bytes": size,
        "flops": flops,
        "floor_ms": case.floor_ms(rates, type_.itemsize, training=True),
    }
    key = Case("training", network.label, dtype, case.batch, 1, device)
    yield from _rows(key, list(names), calls, timings, errors, notes, fields, peaks, kept)


def tune_model(case: ModelCase, device: str, dtype: str, training: bool) -> Iterator[Row]:
    """Run a network where the autotuner may measure: what its fused passes launch is tuned, too."""
    from effkernels.triton import tune

    network = Network.parse(case.network)
    type_ = getattr(torch, dtype)
    with torch.device(device):
        module = network.build()
        image = torch.randn(case.batch, 3, network.resolution, network.resolution)
    image = image.contiguous(memory_format=torch.channels_last)
    module = module.to(memory_format=torch.channels_last)
    before, start = tuned_table(device), time.monotonic()
    with tune.tuning(partial(Stopwatch(device).median, seconds=TUNING_S, cold=True)):
        if training:
            ek.accelerate(without_chance(module).train())
            with torch.autocast(device, type_, enabled=type_ != torch.float32):
                output = module(image)
            output.float().sum().backward()
        else:
            frozen = ek.freeze(module.to(type_))
            with torch.inference_mode():
                frozen(image.to(type_))
    new = {key: config for key, config in tuned_table(device).items() if key not in before}
    yield {
        "case": f"{case.network}, batch {case.batch}, {'training' if training else 'freeze'}",
        "seconds": time.monotonic() - start,
        "tuned": new,
        "table": str(table_path(device)),
    }


def precompile(case: ModelCase, device: str, dtype: str, training: bool) -> Iterator[Row]:
    """Let ``torch.compile`` fill its cache with a network, while nothing is timed."""
    network = Network.parse(case.network)
    type_ = getattr(torch, dtype)
    with torch.device(device):
        module = network.build().to(memory_format=torch.channels_last)
        image = torch.randn(case.batch, 3, network.resolution, network.resolution)
        labels = torch.randint(1000, (case.batch,))
    image = image.contiguous(memory_format=torch.channels_last)
    if training:
        run = _compiled(without_chance(module).train(), image)
        with torch.autocast(device, type_, enabled=type_ != torch.float32):
            loss = F.cross_entropy(run(), labels)
        loss.backward()
    else:
        with torch.inference_mode():
            _compiled(module.to(type_), image.to(type_))()
    yield {"case": case.name}


def _eager(module: nn.Module, image: Tensor) -> Call:
    return lambda: module(image)


def _compiled(module: nn.Module, image: Tensor, mode: str | None = None) -> Call:
    # Inductor picks launch sizes by timing and would keep its choice on disk. A choice made beside
    # the parity tests would be a noisy one: it is made again, on a quiet GPU.
    torch._inductor.config.autotune_local_cache = False
    function = torch.compile(module, dynamic=False, mode=mode)
    return lambda: function(image)


def _own(make: Callable[[nn.Module], nn.Module], module: nn.Module, image: Tensor) -> Call:
    network = make(copy.deepcopy(module))
    return lambda: network(image)


# max-autotune's own CUDA graphs are left out: with GRAPH every provider is captured the same way.
_PREPARE: dict[str, Callable[[nn.Module, Tensor], Call]] = {
    EAGER: _eager,
    COMPILED: _compiled,
    MAX_AUTOTUNE: partial(_compiled, mode="max-autotune-no-cudagraphs"),
    ACCELERATE: lambda module, image: _own(ek.accelerate, module, image),
    FREEZE: lambda module, image: _own(ek.freeze, module, image),
}


def _variants(device: str) -> tuple[str, ...]:
    return ("", GRAPH) if device == "cuda" else ("",)


def _allowed(baseline: float, dtype: torch.dtype) -> float:
    return FACTOR * baseline + torch.finfo(dtype).eps + 1e-5


def _rows(
    key: Case,
    names: list[str],
    calls: dict[str, Call],
    timings: dict[str, Any],
    errors: dict[str, float],
    notes: dict[str, str],
    fields: dict[str, Any],
    peaks: dict[str, int | None],
    kept: dict[str, int | None],
) -> Iterator[Row]:
    last = list(calls)[-1] if calls else ""
    for name in [*names, CONTROL]:
        same = last if name == CONTROL else name
        yield asdict(
            make_record(
                key,
                name,
                timings.get(name),
                **fields,
                rel_err=errors.get(same),
                control_of=last if name == CONTROL else "",
                note=notes.get(name, "" if calls else "no provider could be timed"),
                peak_bytes=peaks.get(same),
                activation_bytes=kept.get(same),
            )
        )
